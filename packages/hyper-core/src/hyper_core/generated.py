"""The leaf boundary: hypernetworks write leaf tensors and learn from their gradients."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import Literal

import torch
from torch import Tensor, nn

from hyper_core.errors import HyperError
from hyper_core.hypernetwork import Hypernetwork
from hyper_core.leaves import LeafGroup, group_leaves
from hyper_core.presets import AttentionConfig, find_config

State = Literal["recurrent", "static"]
Output = Literal["free", "unit_rows"]
Normalisation = Literal["none", "token_rms"]
_EPSILON = 1e-12


class GeneratedParameters(nn.Module):
    """P_{i+1} = out(H(P_i)): one hypernetwork per role generates the values of leaf tensors.

    The leaves are ordinary tensors that some model reads. Once per optimizer step:

    1. `refresh` runs the hypernetworks on the state and copies their outputs into the leaves;
    2. the model runs forward and backward, any number of times, as if its weights were plain;
    3. `backward` carries the leaves' ``.grad`` into the hypernetworks' weights;
    4. an optimizer changes those weights, and `commit` makes the leaves' values the next state.

    ``leaves``: by role, tensors (matrices, tokens, width), or (tokens, width) as a matrix each.
    They need not require grad where someone else sets their ``.grad``.
    ``config``: a size, or the name of one in `PRESETS`.
    ``state``: "recurrent" as in equations 4 to 6, the gradient stopping at P_i, or "static",
    P = out(P_0 + H(P_0)) with H = 0 at the start. P_0 is what the leaves hold at construction.
    ``outputs``: by role "free" (default) or "unit_rows", each row divided by its norm; a row of
    zeros stays zero and gets no gradient.
    ``zero_start``: roles whose values are exactly 0 at the first refresh.
    ``gradient_normalisation``: "none", or "token_rms": each token's gradient is divided by the
    root of the running mean of its squares, an average with ``gradient_decay``, bias-corrected.

    Dtype and device: float32, or the leaves' where wider, on the leaves' device; `to` changes it.
    Values are converted where they meet the leaves, which may be narrower.
    Gradient: to the hypernetworks' weights, which are all of `parameters`; never to the state.
    Saved: the weights, the state, the running averages; nothing else changes the next step.
    Paper: section 3.2 and Appendix C. Deviations: unit rows, the static state, token_rms.

    Raises:
        HyperError: an unknown preset, role or choice, a role without tensors, a wrong shape.

    >>> weight = torch.nn.Parameter(torch.randn(3, 4) / 2)
    >>> generated = GeneratedParameters({"weight": [weight]}, config="attention-small")
    >>> generated.refresh()
    >>> (weight.sum() ** 2).backward()
    >>> generated.backward()
    >>> generated.commit()
    >>> all(p.grad is not None for p in generated.parameters())
    True
    """

    _refreshed: bool
    _pending: list[Tensor]
    _versions: list[list[int]]
    _averages: list[Tensor]

    def __init__(
        self,
        leaves: Mapping[str, Sequence[Tensor]],
        *,
        config: AttentionConfig | str = "attention-tinybert",
        state: State = "recurrent",
        outputs: Mapping[str, Output] | None = None,
        zero_start: Collection[str] = (),
        gradient_normalisation: Normalisation = "none",
        gradient_decay: float = 0.99,
    ) -> None:
        super().__init__()
        outputs = outputs or {}
        _check_choice("state", state, ("recurrent", "static"))
        _check_choice("gradient_normalisation", gradient_normalisation, ("none", "token_rms"))
        _check_decay(gradient_decay)
        self._groups = group_leaves(leaves)
        _check_outputs(outputs, zero_start, leaves)
        self._unit_rows = {role for role, output in outputs.items() if output == "unit_rows"}
        self._recurrent = state == "recurrent"
        self._decay = gradient_decay if gradient_normalisation == "token_rms" else None
        self.hypernetworks = nn.ModuleDict()
        size = find_config(config)
        for role in leaves:
            shapes = [group.shape for group in self._groups if group.role == role]
            zero_output = not self._recurrent or role in zero_start
            self.hypernetworks[role] = Hypernetwork(shapes, size, zero_output=zero_output)
        self._register_state(zero_start)
        self.discard()

    def _register_state(self, zero_start: Collection[str]) -> None:
        """Make the buffers, and move all to the leaves' device and dtype, at least float32."""
        dtype = torch.float32
        for leaf in (leaf for group in self._groups for leaf in group.leaves):
            dtype = torch.promote_types(dtype, leaf.dtype)
        self._state_names = [f"state_{group.role}_{i}" for i, group in self._numbered()]
        for name, group in zip(self._state_names, self._groups, strict=True):
            start = group.values()
            self.register_buffer(name, start.zero_() if group.role in zero_start else start)
        self._average_names: list[str] = []
        if self._decay is not None:
            self._average_names = [f"square_{group.role}_{i}" for i, group in self._numbered()]
            for name, group in zip(self._average_names, self._groups, strict=True):
                self.register_buffer(name, torch.zeros(*group.shape[:2], 1))
            self._average_names.append("square_weight")
            self.register_buffer("square_weight", torch.zeros(()))
        self.to(self._groups[0].leaves[0].device, dtype)

    def _numbered(self) -> list[tuple[int, LeafGroup]]:
        """Return the groups, each with its position in its role."""
        by_role = groupby(self._groups, key=lambda group: group.role)
        return [numbered for _, groups in by_role for numbered in enumerate(groups)]

    def _saved(self, names: Sequence[str]) -> list[Tensor]:
        return [self.get_buffer(name) for name in names]

    def _generate(self) -> list[Tensor]:
        """Return the values of each group, in autograd's graph; changes nothing."""
        state = dict(zip(self._groups, self._saved(self._state_names), strict=True))
        values: list[Tensor] = []
        for role, hypernetwork in self.hypernetworks.items():
            start = [state[group] for group in self._groups if group.role == role]
            with _without_autocast(start[0].device.type):
                output = hypernetwork(start)
            if not self._recurrent:
                output = [before + change for before, change in zip(start, output, strict=True)]
            values += [_unit_rows(rows) for rows in output] if role in self._unit_rows else output
        return values

    def refresh(self) -> None:
        """Write this step's values into the leaves, which must not change until `backward`.

        A function of weights and state alone: a second call writes the same values. Under
        `torch.no_grad` it writes for evaluation only: nothing waits for `backward` or `commit`.
        """
        values = self._generate()
        for group, rows in zip(self._groups, values, strict=True):
            group.write_(rows)
        self.discard()
        if torch.is_grad_enabled():
            self._refreshed = True
            self._pending = values
            self._versions = [group.versions() for group in self._groups]

    def backward(self) -> None:
        """Carry the leaves' gradients into the hypernetworks' weights, in one backward pass.

        Raises:
            HyperError: there was no `refresh`, a leaf has changed since, or has no gradient.
        """
        if not self._pending:
            raise HyperError(
                "backward() was called without a pending refresh(), expected one refresh() before "
                "each backward(); call refresh() with gradients enabled before the model runs."
            )
        for group, versions in zip(self._groups, self._versions, strict=True):
            group.check_unchanged(versions)
        gradients = [
            group.gradients().to(rows.dtype)
            for group, rows in zip(self._groups, self._pending, strict=True)
        ]
        torch.autograd.backward(self._pending, self._normalised(gradients))
        self._pending = []

    def _normalised(self, gradients: list[Tensor]) -> list[Tensor]:
        if self._decay is None:
            return gradients
        squares = [gradient.square().mean(-1, keepdim=True) for gradient in gradients]
        before = self._saved(self._average_names)
        self._averages = [
            torch.lerp(average, square, 1 - self._decay)
            for average, square in zip(before, [*squares, torch.ones_like(before[-1])], strict=True)
        ]
        weight = self._averages[-1]
        return [
            gradient / ((average / weight).sqrt() + _EPSILON)
            for gradient, average in zip(gradients, self._averages[:-1], strict=True)
        ]

    @torch.no_grad()
    def commit(self) -> None:
        """Make the leaves' present values the state, and advance the gradients' averages.

        Raises:
            HyperError: there was no `refresh` since the last `commit` or `discard`.
        """
        if not self._refreshed:
            raise HyperError(
                "commit() was called without a pending refresh(), expected one refresh() before "
                "each commit(); an evaluation's refresh() belongs after commit()."
            )
        if self._recurrent:
            for state, group in zip(self._saved(self._state_names), self._groups, strict=True):
                state.copy_(group.values())
        if self._averages:
            torch._foreach_copy_(self._saved(self._average_names), self._averages)
        self.discard()

    def discard(self) -> None:
        """Forget the pending `refresh`: state and averages stay as they were."""
        self._refreshed = False
        self._pending = []
        self._versions = []
        self._averages = []


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Keep a surrounding autocast from rounding the factors to the precision of activations."""
    if not torch.amp.is_autocast_available(device_type):  # such as the meta device
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _unit_rows(rows: Tensor) -> Tensor:
    """Divide each row by its norm; a row of zeros stays zero, with gradient zero."""
    square = rows.square().sum(-1, keepdim=True)
    has_norm = square > torch.finfo(rows.dtype).tiny
    return rows * torch.where(has_norm, torch.where(has_norm, square, 1.0).rsqrt(), 0.0)


def _check_decay(decay: float) -> None:
    if not 0 <= decay < 1:
        raise HyperError(
            f"gradient_decay is {decay}, expected 0 or more and below 1; 0.99 averages about the "
            "last 100 steps."
        )


def _check_outputs(
    outputs: Mapping[str, str], zero_start: Collection[str], leaves: Mapping[str, object]
) -> None:
    for what, named in (("outputs", outputs), ("zero_start", zero_start)):
        for role in sorted(set(named) - set(leaves)):
            raise HyperError(
                f"{what} names the role {role!r}, expected one of {', '.join(leaves)}; correct or "
                "drop it."
            )
    for role, output in outputs.items():
        _check_choice(f"outputs[{role!r}]", output, ("free", "unit_rows"))
        if output == "unit_rows" and role in zero_start:
            raise HyperError(
                f"outputs[{role!r}] is 'unit_rows' and zero_start names {role!r}, but zero has no "
                "direction; make the output 'free' or drop it from zero_start."
            )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise HyperError(f"{what} is {value!r}, expected one of {', '.join(choices)}; choose one.")
