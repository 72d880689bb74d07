"""The leaf boundary: hypernetworks write leaf tensors and learn from their gradients."""

from collections.abc import Collection, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from hyper_core.errors import HyperError
from hyper_core.hypernetwork import Hypernetwork
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

    ``leaves``: by role, tensors (matrices, tokens, width), or (tokens, width) as a stack of one.
    ``state``: "recurrent" as in equations 4 to 6, the gradient stopping at P_i, or "static",
    P = out(P_0 + H(P_0)). ``outputs``: by role "free" (default) or "unit_rows", every row divided
    by its norm. ``zero_start``: roles whose values are exactly 0 at the first refresh.
    ``gradient_normalisation``: "none", or "token_rms", each token's gradient divided by the
    running root mean square of its own, averaged with ``gradient_decay``.

    Gradient: to the hypernetworks' weights, which are all of `parameters`.
    Saved: weights, the state of every leaf, the running averages, the number of commits.
    Dtype: float32, or the leaves' where it is wider; the leaves may be narrower.
    Paper: section 3.2, equations 4 to 6, and Appendix C.

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

    steps: Tensor

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
        _check_leaves(leaves)
        _check_roles("outputs", outputs, leaves)
        _check_roles("zero_start", zero_start, leaves)
        _check_choice("state", state, ("recurrent", "static"))
        _check_choice("gradient_normalisation", gradient_normalisation, ("none", "token_rms"))
        for role, output in outputs.items():
            _check_choice(f"outputs[{role!r}]", output, ("free", "unit_rows"))
        if not 0 <= gradient_decay < 1:
            raise HyperError(f"gradient_decay is {gradient_decay}, expected 0 or more, below 1.")
        self._leaves = {role: list(tensors) for role, tensors in leaves.items()}
        self._outputs = {role: outputs.get(role, "free") for role in leaves}
        self._recurrent = state == "recurrent"
        self._decay = gradient_decay if gradient_normalisation == "token_rms" else None
        self._pending: dict[str, list[Tensor]] | None = None
        self._versions: list[int] = []
        self._averages: list[Tensor] = []
        size = find_config(config)
        self.hypernetworks = nn.ModuleDict(
            {
                role: Hypernetwork(
                    [tuple(_stacked(t).shape) for t in tensors],  # type: ignore[misc]
                    size,
                    zero_output=not self._recurrent or role in zero_start,
                )
                for role, tensors in self._leaves.items()
            }
        )
        self._keep_state(zero_start)

    def _keep_state(self, zero_start: Collection[str]) -> None:
        """Register the state in the leaves' precision, at least float32, and move all to it."""
        dtype = torch.float32
        for _, _, leaf in self._each_leaf():
            dtype = torch.promote_types(dtype, leaf.dtype)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for role, position, leaf in self._each_leaf():
            start = _stacked(leaf).detach().to(dtype, copy=True)
            if role in zero_start:
                start.zero_()
            self.register_buffer(f"state_{role}_{position}", start)
            if self._decay is not None:
                average = torch.zeros(start.shape[:2], dtype=dtype)
                self.register_buffer(f"square_{role}_{position}", average)
        self.to(self._each_leaf()[0][2].device, dtype)

    def _each_leaf(self) -> list[tuple[str, int, Tensor]]:
        return [
            (role, position, leaf)
            for role, tensors in self._leaves.items()
            for position, leaf in enumerate(tensors)
        ]

    def _buffers_named(self, prefix: str) -> list[Tensor]:
        return [self.get_buffer(f"{prefix}_{role}_{i}") for role, i, _ in self._each_leaf()]

    def generate(self) -> dict[str, list[Tensor]]:
        """Return the values of every role, (matrices, tokens, width) each, in autograd's graph.

        A pure function of weights and state: it changes nothing.
        """
        generated = {}
        for role, network in self.hypernetworks.items():
            count = len(self._leaves[role])
            state = [self.get_buffer(f"state_{role}_{i}") for i in range(count)]
            values = network(state)
            if not self._recurrent:
                values = [start + change for start, change in zip(state, values, strict=True)]
            if self._outputs[role] == "unit_rows":
                values = [functional.normalize(value, dim=-1, eps=_EPSILON) for value in values]
            generated[role] = values
        return generated

    def refresh(self) -> None:
        """Write this step's values into the leaves; the leaves must not change until `backward`.

        Under `torch.no_grad` it only writes, for evaluation: nothing waits for a `backward`.
        """
        generated = self.generate()
        with torch.no_grad():
            for role, position, leaf in self._each_leaf():
                leaf.copy_(generated[role][position].view_as(leaf))
        self._pending = generated if torch.is_grad_enabled() else None
        self._versions = [leaf._version for _, _, leaf in self._each_leaf()]

    def backward(self) -> None:
        """Carry the leaves' gradients into the hypernetworks' weights, in one backward pass.

        Raises:
            HyperError: there was no `refresh`, a leaf has changed since, or has no gradient.
        """
        if self._pending is None:
            raise HyperError("backward() without refresh(); call refresh() once before each step.")
        for (role, position, leaf), version in zip(self._each_leaf(), self._versions, strict=True):
            if leaf._version != version:
                raise HyperError(
                    f"{role}[{position}] was changed between refresh() and backward(), so that its "
                    "gradient may be of other values; change it before refresh() or after "
                    "backward()."
                )
            if leaf.grad is None:
                raise HyperError(
                    f"{role}[{position}] has no gradient; run the model's backward pass after "
                    "refresh(), and make sure that the model reads this tensor."
                )
        values = [value for role in self._leaves for value in self._pending[role]]
        torch.autograd.backward(values, self._cotangents(values))

    def _cotangents(self, values: list[Tensor]) -> list[Tensor]:
        gradients = [
            leaf.grad.view_as(value).to(value.dtype)
            for (_, _, leaf), value in zip(self._each_leaf(), values, strict=True)
            if leaf.grad is not None
        ]
        if self._decay is None:
            return gradients
        squares = [gradient.square().mean(-1) for gradient in gradients]
        self._averages = list(
            torch._foreach_lerp(self._buffers_named("square"), squares, 1 - self._decay)
        )
        correction = 1 - torch.pow(self._decay, (self.steps + 1).to(gradients[0].dtype))
        return [
            gradient / ((average / correction).sqrt() + _EPSILON).unsqueeze(-1)
            for gradient, average in zip(gradients, self._averages, strict=True)
        ]

    @torch.no_grad()
    def commit(self) -> None:
        """Make the leaves' present values the state, and keep the gradients' running averages."""
        if self._recurrent:
            for state, (_, _, leaf) in zip(
                self._buffers_named("state"), self._each_leaf(), strict=True
            ):
                state.copy_(leaf.view_as(state))
        if self._decay is not None and self._averages:
            torch._foreach_copy_(self._buffers_named("square"), self._averages)
        self.steps.add_(1)
        self.discard()

    def discard(self) -> None:
        """Forget the last `refresh`: state and averages stay as they were."""
        self._pending = None
        self._averages = []


def _stacked(leaf: Tensor) -> Tensor:
    return leaf if leaf.ndim == 3 else leaf.unsqueeze(0)


def _check_leaves(leaves: Mapping[str, Sequence[Tensor]]) -> None:
    if not leaves:
        raise HyperError("there is no role; give at least one, such as {'weight': [tensor]}.")
    for role, tensors in leaves.items():
        if not tensors:
            raise HyperError(f"the role {role!r} has no tensors; give at least one, or drop it.")
        for position, leaf in enumerate(tensors):
            if leaf.ndim not in (2, 3):
                raise HyperError(
                    f"{role}[{position}] has the shape {tuple(leaf.shape)}, expected "
                    "(matrices, tokens, width) or (tokens, width)."
                )


def _check_roles(what: str, named: Collection[str], leaves: Mapping[str, object]) -> None:
    unknown = sorted(set(named) - set(leaves))
    if unknown:
        raise HyperError(
            f"{what} names the role {unknown[0]!r}, but the roles are {', '.join(leaves)}."
        )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise HyperError(f"{what} is {value!r}, expected one of {', '.join(choices)}.")
