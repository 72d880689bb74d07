"""The leaf boundary: hypernetworks write leaf tensors and learn from their gradients."""

from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from hyper_core.bodies.config import BodyConfig
from hyper_core.checks import check_choice, naming_role
from hyper_core.choices import check_saved, choices_of, encode
from hyper_core.context import Context, context_rows
from hyper_core.errors import HyperError
from hyper_core.hypernetwork import Hypernetwork
from hyper_core.learning_rates import parameter_groups
from hyper_core.leaves import LeafGroup, check_roles, group_leaves, widest_dtype
from hyper_core.normalisation import Normalisation, TokenRms, check_decay
from hyper_core.outputs import Output
from hyper_core.presets import find_config
from hyper_core.recursion import Recursion, State
from hyper_core.roles import resolve_roles
from hyper_core.sharing import Sharing, networks_of
from hyper_core.split import Split, fill_gradients_
from hyper_core.tokens import Tokens, token_shape


class GeneratedParameters(nn.Module):
    """P_{i+1} = out(H(P_i)): one hypernetwork per role generates the values of leaf tensors.

    The leaves are ordinary tensors that some model reads. Once per optimizer step:

    1. `refresh` runs the hypernetworks on the state and copies their outputs into the leaves;
    2. the model runs forward and backward, any number of times, as if its weights were plain;
    3. `backward` carries the leaves' ``.grad`` into the hypernetworks' weights;
    4. an optimizer changes those weights, and `commit` makes the leaves' values the next state.

    ``leaves``: by role, tensors (matrices, rows, columns), or (rows, columns) as a matrix each.
    They need not require grad where someone else sets their ``.grad``. They may be on several
    devices: values and gradients of each cross once a step.
    ``config``: a body's size, or the name of one in `PRESETS`.
    ``sharing``: "all" matrices of a role have one hypernetwork, "each" its own, or a label per
    matrix, in the order of the leaves: equal labels share. One choice for all roles, or by role.
    ``tokens``: by role, what a token is: "rows" (default), "columns", "elements", or "scalars",
    whose leaves are (matrices, numbers) or (numbers,).
    ``outputs``: by role "free" (default), "unit_rows", "unit_columns", each divided by its norm
    (zeros stay zero and get no gradient), or "orthonormal", the polar factor of each matrix.
    ``norms``: by role, what those rows or columns are multiplied by; for "free" the expected norm
    of a token at the start. 1 by default.
    ``state``: "recurrent" as in equations 4 to 6, the gradient stopping at P_i; "damped",
    P = out((1 − ρ)·P_i + ρ·H(P_i)) with ρ ``relaxation``; or "static", P = out(P_0 + H(P_0)) with
    H = 0 at the start, which begins at out(P_0). P_0 is what the leaves hold at construction.
    ``zero_start``: roles whose values are exactly 0 at the first refresh.
    ``context_width``: features of the context that each `refresh` is given; 0 for none.
    ``gradient_normalisation``: "none", or "token_rms": each token's gradient is divided by the
    root of the running mean of its squares, an average with ``gradient_decay``, bias-corrected.
    ``embeddings``, ``body_dtype``: as in `Hypernetwork`.

    Dtype and device: float32, or the leaves' where wider, on the first leaf's device. `to` changes
    it; the averages are never below float32. Values are converted where they meet the leaves.
    Gradient: to the hypernetworks' weights, which are all of `parameters`; never to the state.
    Saved: weights, state, running averages, choices; nothing else changes the next step. What does
    not fit is refused before anything is loaded; loading discards a pending `refresh`.
    Paper: section 3.2 and Appendix C. Deviations: the tokens, the sharing, the outputs, the
    damped and static states, token_rms.

    Raises:
        HyperError: an unknown preset, role or choice, a role without tensors, a wrong shape,
            a start that is not finite.

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
    _split: Split | None
    _marks: list[list[tuple[int, int]]]

    def __init__(
        self,
        leaves: Mapping[str, Sequence[Tensor]],
        *,
        config: BodyConfig | str = "attention-tinybert",
        sharing: Sharing | Mapping[str, Sharing] = "all",
        tokens: Mapping[str, Tokens] | None = None,
        outputs: Mapping[str, Output] | None = None,
        norms: Mapping[str, float] | None = None,
        state: State = "recurrent",
        relaxation: float = 0.5,
        zero_start: Collection[str] = (),
        context_width: int = 0,
        gradient_normalisation: Normalisation = "none",
        gradient_decay: float = 0.99,
        embeddings: bool = True,
        body_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.recursion = Recursion(state, relaxation)
        check_choice("gradient_normalisation", gradient_normalisation, ("none", "token_rms"))
        check_decay(gradient_decay)
        check_roles(leaves)
        self.roles = resolve_roles(
            leaves, tokens=tokens or {}, outputs=outputs or {}, norms=norms or {},
            zero_start=zero_start, sharing=sharing,
        )  # fmt: skip
        self.groups = group_leaves(leaves, self.roles)
        size = find_config(config)
        self.hypernetworks = nn.ModuleDict()
        networks: dict[str, list[int]] = {}
        for name, role in self.roles.items():
            groups = self.groups_of(name)
            order = [position for group in groups for position in group.positions]
            self.register_buffer(f"order_{name}", torch.tensor(order), persistent=False)
            networks[name] = networks_of(role.sharing, len(order), f"sharing of {name!r}")
            with naming_role(name):
                self.hypernetworks[name] = Hypernetwork(
                    [token_shape(group.shape, role.tokens) for group in groups],
                    size,
                    sharing=[networks[name][position] for position in order],
                    embeddings=embeddings,
                    context_width=context_width,
                    zero_output=role.zero_start or self.recursion.keeps_start,
                    body_dtype=body_dtype,
                )
        self._choices = choices_of(self.recursion, self.roles, networks, size)
        self.register_buffer("choices", encode(self._choices))
        self._register_state(gradient_decay if gradient_normalisation == "token_rms" else None)
        self._forget()

    def groups_of(self, role: str) -> list[LeafGroup]:
        """Return the leaves of ``role``, grouped by shape and device."""
        return [group for group in self.groups if group.role == role]

    def _register_state(self, decay: float | None) -> None:
        """Make state and averages, and move all to the first leaf's device and the widest dtype."""
        home = self.groups[0].device
        for group in self.groups:
            start = group.values().to(home, copy=True)
            start = start.zero_() if self.roles[group.role].zero_start else start
            self.register_buffer(f"state_{group.label}", start)
        self.averages: TokenRms | None = None
        if decay is not None:
            kinds = {g.label: (g.shape, self.roles[g.role].tokens) for g in self.groups}
            self.averages = TokenRms(kinds, decay)
        self.to(home, widest_dtype(self.groups))

    def state_of(self, role: str) -> list[Tensor]:
        """Return the state P_i of each group of ``role``, (matrices, rows, columns)."""
        return [self.get_buffer(f"state_{group.label}") for group in self.groups_of(role)]

    def generate(
        self, context: Context = None, split: Split | None = None
    ) -> dict[str, list[Tensor]]:
        """Return the values of each group by role, in autograd's graph; changes nothing.

        ``context``: as for `refresh`. ``split``: only of this share's matrices.
        """
        values = {}
        for name, network in self.hypernetworks.items():
            assert isinstance(network, Hypernetwork)
            state, only = self.state_of(name), None
            if split is not None:
                only = [split.bounds(len(stack)) for stack in state]
                state = split.own(state)
                network.layout(only)
            order = self.get_buffer(f"order_{name}")
            rows = context_rows(context, name, order, state[0].dtype)
            with naming_role(name):
                values[name] = self.recursion.values(network, self.roles[name], state, rows, only)
        return values

    def refresh(self, context: Context = None, *, split: Split | None = None) -> None:
        """Write this step's values into the leaves, which must not change until `backward`.

        A function of weights, state and context alone: a second call writes the same values. Under
        `torch.no_grad` it writes for evaluation only: nothing waits for `backward` or `commit`.

        ``context``: for a ``context_width`` n, features (n,) of all matrices, or (matrices, n) in
        the order of the leaves; the same for all roles, or a mapping by role. It is an input, not
        a state: nothing of it is saved.
        ``split``: the hypernetworks run on this share of the matrices, and the values of the rest
        come from the processes that have the other shares, of equal weights, state and context.

        Raises:
            HyperError: a context where none was declared, none where it was, or a wrong shape.
        """
        values = list(chain.from_iterable(self.generate(context, split).values()))
        counts = [group.shape[0] for group in self.groups]
        whole = values if split is None else split.exchange(values, counts)
        for group, rows in zip(self.groups, whole, strict=True):
            group.write_(rows)
        self._forget()
        if torch.is_grad_enabled():
            self._refreshed = True
            self._pending, self._split = values, split
            self._marks = [group.marks() for group in self.groups]

    def backward(self, scale: float = 1.0) -> None:
        """Carry the leaves' gradients into the hypernetworks' weights, in one backward pass.

        ``scale``: what the loss was multiplied by, as `torch.amp.GradScaler.get_scale` says. The
        weights' gradients have it too, until the scaler takes it out; the averages do not.

        After a split `refresh` this share's leaves alone give gradient: the sum of a weight's
        ``.grad`` over the processes, zeros where a share does not reach it, is that of an undivided
        step. The leaves' ``.grad`` must be equal in all processes: reduce them first.

        A leaf's change since `refresh` is seen by autograd's count, and by its memory. One in place
        through ``.data`` is not: the values alone would tell, and comparing makes a device wait.

        Raises:
            HyperError: there was no `refresh`, a leaf has changed since, or has no gradient.
        """
        if not self._pending:
            raise HyperError(
                "backward() was called without a pending refresh(), expected one refresh() before "
                "each backward(); call refresh() with gradients enabled before the model runs."
            )
        for group, marks in zip(self.groups, self._marks, strict=True):
            group.check_unchanged(marks)
        gradients = [
            group.gradients().to(rows.device)
            for group, rows in zip(self.groups, self._pending, strict=True)
        ]
        if self.averages is not None:
            gradients = self.averages.normalise(gradients, scale)
        reached = [g.to(v.dtype) for g, v in zip(gradients, self._pending, strict=True)]
        if self._split is not None:
            reached = self._split.own(reached)
        own = [i for i, rows in enumerate(self._pending) if len(rows)]
        torch.autograd.backward([self._pending[i] for i in own], [reached[i] for i in own])
        if self._split is not None:
            fill_gradients_(self.parameters())
        self._pending = []

    @torch.no_grad()
    def commit(self) -> None:
        """Make the leaves' values the state, advance the averages, and end the step by `discard`.

        Raises:
            HyperError: there was no `refresh` since the last `commit` or `discard`.
        """
        if not self._refreshed:
            raise HyperError(
                "commit() was called without a pending refresh(), expected one refresh() before "
                "each commit(); an evaluation's refresh() belongs after commit()."
            )
        if not self.recursion.keeps_start:
            for group in self.groups:
                self.get_buffer(f"state_{group.label}").copy_(group.values())
        if self.averages is not None:
            self.averages.commit()
        self.discard()

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        check_saved(self._choices, self.state_dict(), state_dict, prefix)
        self.discard()
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def discard(self) -> None:
        """Forget the pending `refresh`, and set the leaves' gradients to zero in place."""
        for group in self.groups:
            group.zero_gradients_()
        self._forget()

    def _forget(self) -> None:
        self._refreshed = False
        self._pending, self._split, self._marks = [], None, []
        if self.averages is not None:
            self.averages.forget()

    def parameter_groups(
        self,
        lr: float,
        *,
        parts: Mapping[str, float] | None = None,
        roles: Mapping[str, float] | None = None,
    ) -> list[dict[str, Any]]:
        """Return groups for an optimizer, with a learning rate for each role and part.

        ``lr`` is multiplied by ``parts``, for "input_projection", "body", "output_projection" and
        "embeddings", and by ``roles``; 1 where nothing is said.

        Raises:
            HyperError: an unknown part or role, or a rate that is negative or not finite.

        >>> generated = GeneratedParameters({"w": [torch.ones(2, 3)]}, config="mlp-small")
        >>> groups = generated.parameter_groups(1e-3, parts={"output_projection": 0.5})
        >>> {group["name"]: group["lr"] for group in groups}["w.output_projection"]
        0.0005
        """
        return parameter_groups(self.hypernetworks, lr, parts or {}, roles or {})
