"""A network that writes tokens from tokens, for one role and all of its matrices."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from hyper_core.bodies.config import BodyConfig
from hyper_core.errors import HyperError
from hyper_core.layout import Layout, Shape
from hyper_core.sharing import Route, Sharing, networks_of
from hyper_core.stacked import StackedLayerNorm, StackedLinear

Bounds = Sequence[tuple[int, int]]
_EMBEDDING_VARIANCE = 2.0


class Hypernetwork(nn.Module):
    """y = W_out·Body(LN(W_in·x + e + W_c·c)) for each token x of all matrices of one role.

    A matrix is a row of tokens. Each distinct width of them has an input and an output projection;
    the body is one for all widths. Matrices of all widths go through the body in one batch (one
    per distinct number of tokens), so that the number of operations does not grow with them.

    ``shapes``: (matrices, tokens, width) of each stack. ``sharing``: "all" matrices have one
    network, "each" its own, or a label per matrix, through the stacks: equal labels share. Every
    weight has the networks that use it as its first dimension, and all of them run in one batch,
    which costs as much as if each had as many matrices as the largest: share about equally.
    ``embeddings``: add a learned vector e for each token of each matrix: without it nothing tells
    them apart. ``context_width``: the size of c, a vector per matrix given to `forward`;
    0 for none. ``zero_output``: start with output 0.
    ``body_dtype``: the body runs under autocast in this dtype; projections and weights keep theirs.

    Gradient: to all weights and to the input. Saved: all weights.
    Start: W_in has N(0, 1): the variance of Σⱼ wⱼ xⱼ is σ²·Σⱼ xⱼ², so that a token of unit norm
    arrives with unit variance. e has N(0, 2): one for its matrix, one for its place in it; a sum of
    two vectors, of matrix and place, would make equal places of all matrices alike. W_c has
    N(0, 1/context_width), for features of unit variance. W_out has N(0, 1/(n·width)): the body puts
    out a squared norm of n, its features, so that each of ``width`` numbers has variance 1/width
    and the token has an expected squared norm of one.
    Paper: section 3.3 and equation 8. Deviations: the tokens, the embeddings, the sharing.

    Raises:
        HyperError: no shape, a shape that is not three sizes, a size below one, labels that are
            not one per matrix, or more tokens than the body takes.

    >>> from hyper_core import AttentionConfig
    >>> network = Hypernetwork([(4, 3, 16), (2, 3, 8)], AttentionConfig(12, 2, 24))
    >>> [tuple(y.shape) for y in network([torch.ones(4, 3, 16), torch.ones(2, 3, 8)])]
    [(4, 3, 16), (2, 3, 8)]
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        config: BodyConfig,
        *,
        sharing: Sharing = "all",
        embeddings: bool = True,
        context_width: int = 0,
        zero_output: bool = False,
        body_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not shapes or any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
            raise HyperError(
                f"shapes is {list(shapes)}, expected at least one (matrices, tokens, width), all "
                "above 0; give the shape of each stack."
            )
        if not isinstance(context_width, int) or context_width < 0:
            raise HyperError(
                f"context_width is {context_width!r}, expected a whole number of at least 0; 0 is "
                "for no context."
            )
        if body_dtype not in (None, torch.bfloat16, torch.float16):
            raise HyperError(
                f"body_dtype is {body_dtype!r}, expected torch.bfloat16, torch.float16 or None; "
                "None keeps the dtype of the weights."
            )
        self.shapes, self.context_width = list(shapes), context_width
        counts = [count for count, _, _ in self.shapes]
        networks = networks_of(sharing, sum(counts))
        self.networks = max(networks) + 1
        ends = list(accumulate(counts, initial=0))
        self._by_stack = [networks[start:end] for start, end in pairwise(ends)]
        self.layouts = nn.ModuleDict()
        whole = self.layout(None)
        for members, route in zip(whole.batches, whole.trunk_routes, strict=True):
            assert isinstance(route, Route)
            config.check_tokens(route.networks * route.each, self.shapes[members[0]][1])
        self._make_projections(config)
        self.embedding: nn.Parameter | None = None
        if embeddings:
            tokens = sum(count * tokens for count, tokens, _ in self.shapes)
            self.embedding = nn.Parameter(torch.empty(tokens, config.input_width))
        self.context: nn.Linear | None = None
        if context_width:
            self.context = nn.Linear(context_width, config.input_width, bias=False)
        self.trunk = Trunk(self.networks, config, body_dtype)
        self._start(config.output_width, zero_output)

    def _held(self) -> dict[int, list[int]]:
        """Return by width the networks that have a matrix of it."""
        held: dict[int, set[int]] = {}
        for (_, _, width), networks in zip(self.shapes, self._by_stack, strict=True):
            held.setdefault(width, set()).update(networks)
        return {width: sorted(networks) for width, networks in sorted(held.items())}

    def layout(self, only: Bounds | None = None) -> Layout:
        """Return the layout of all matrices, or of those within ``only``, made at its first use.

        A compiled network cannot make one: call this before its `forward` with a new ``only``.
        """
        name = "all" if only is None else repr(only)
        if name not in self.layouts:
            chosen = self._by_stack
            if only is not None:
                chosen = [own[a:b] for own, (a, b) in zip(chosen, only, strict=True)]
            device = None if only is None else self.trunk.norm.weight.device
            layout = Layout(self.shapes, chosen, self._held(), self.networks)
            self.layouts[name] = layout.to(device)
        found = self.layouts[name]
        assert isinstance(found, Layout)
        return found

    def _make_projections(self, config: BodyConfig) -> None:
        """Make W_in and W_out of each width, for the networks that have it."""
        self.inputs, self.outputs = nn.ModuleDict(), nn.ModuleDict()
        for width, networks in self._held().items():
            count, name = len(networks), str(width)
            self.inputs[name] = StackedLinear(count, width, config.input_width, bias=False)
            self.outputs[name] = StackedLinear(count, config.output_width, width)

    @torch.no_grad()
    def _start(self, features: int, zero_output: bool) -> None:
        for weight in self.inputs.parameters():
            weight.normal_()
        if self.embedding is not None:
            self.embedding.normal_(std=_EMBEDDING_VARIANCE**0.5)
        if self.context is not None:
            self.context.weight.normal_(std=self.context_width**-0.5)
        for width, projection in self.outputs.items():
            std = 0.0 if zero_output else (features * int(width)) ** -0.5
            projection.get_parameter("weight").normal_(std=std)

    def forward(
        self,
        stacks: Sequence[Tensor],
        context: Tensor | None = None,
        only: Bounds | None = None,
    ) -> list[Tensor]:
        """Return a stack for each of ``stacks``, of the same shape (matrices, tokens, width).

        ``context``: (matrices, context_width), of all matrices, counted through the stacks.
        ``only``: for each stack the first of the matrices that it has, and the first after them;
        what comes out for them does not depend on which others there are. All by default.

        Raises:
            HyperError: the shapes are not those that the network was made for.
        """
        got = [tuple(stack.shape) for stack in stacks]
        bounds = only or [(0, count) for count, _, _ in self.shapes]
        expected = [
            (end - start, *shape[1:])
            for (start, end), shape in zip(bounds, self.shapes, strict=True)
        ]
        if got != expected:
            raise HyperError(
                f"stacks has the shapes {got}, expected {expected}; make another Hypernetwork "
                "for other shapes."
            )
        layout = self.layout(only)
        embedded = self._embed(stacks, context, layout, bounds)
        mixed = list(stacks)
        for members, route in zip(layout.batches, layout.trunk_routes, strict=True):
            batch = route(self.trunk, torch.cat([embedded[i] for i in members]))
            sizes = [len(stacks[i]) for i in members]
            for i, part in zip(members, torch.split(batch, sizes), strict=True):
                mixed[i] = layout.routes[i](self.outputs[str(self.shapes[i][2])], part)
        return mixed

    def _embed(
        self, stacks: Sequence[Tensor], context: Tensor | None, layout: Layout, bounds: Bounds
    ) -> list[Tensor]:
        embedded = [
            route(self.inputs[str(stack.shape[2])], stack) if len(stack) else stack
            for route, stack in zip(layout.routes, stacks, strict=True)
        ]
        added = []
        if self.embedding is not None:
            parts = torch.split(
                self.embedding, [count * tokens for count, tokens, _ in self.shapes]
            )
            added.append(
                [e.view(*shape[:2], -1) for e, shape in zip(parts, self.shapes, strict=True)]
            )
        features = self._context_features(context)
        if features is not None:
            counts = [count for count, _, _ in self.shapes]
            added.append(list(torch.split(features.unsqueeze(1), counts)))
        for terms in added:
            embedded = [
                x + term[start:end] if len(x) else x
                for x, term, (start, end) in zip(embedded, terms, bounds, strict=True)
            ]
        return embedded

    def _context_features(self, context: Tensor | None) -> Tensor | None:
        """Return what the context adds to all tokens of each matrix, (matrices, features)."""
        matrices = sum(count for count, _, _ in self.shapes)
        expected = (matrices, self.context_width) if self.context_width else None
        got = None if context is None else tuple(context.shape)
        if got != expected:
            raise HyperError(
                f"context has the shape {got}, expected {expected} as context_width says; give a "
                "row of features for each matrix."
            )
        return None if self.context is None else self.context(context)


class Trunk(nn.Module):
    """Body(LN(x)) for each network, (networks, matrices, tokens, features)."""

    def __init__(self, networks: int, config: BodyConfig, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.dtype = dtype
        self.norm = StackedLayerNorm(networks, config.input_width)
        self.body = config.build(networks)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mixed tokens in the dtype of x."""
        x = self.norm(x)
        device = x.device.type
        if self.dtype is None or not torch.amp.is_autocast_available(device):  # such as meta
            y: Tensor = self.body(x)
            return y
        with torch.autocast(device, self.dtype):
            y = self.body(x)
        return y.to(x.dtype)
