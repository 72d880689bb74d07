"""A network that writes tokens from tokens, for one role and all of its matrices."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, chain, pairwise

import torch
from torch import Tensor, nn

from hyper_core.bodies.config import BodyConfig
from hyper_core.errors import HyperError
from hyper_core.sharing import Route, Sharing, networks_of
from hyper_core.stacked import StackedLayerNorm, StackedLinear

Shape = tuple[int, int, int]
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
        by_stack = [networks[start:end] for start, end in pairwise(ends)]
        self.batches = self._batches(by_stack, config)
        self._make_projections(by_stack, config)
        self.embedding: nn.Parameter | None = None
        if embeddings:
            tokens = sum(count * tokens for count, tokens, _ in self.shapes)
            self.embedding = nn.Parameter(torch.empty(tokens, config.input_width))
        self.context: nn.Linear | None = None
        if context_width:
            self.context = nn.Linear(context_width, config.input_width, bias=False)
        self.trunk = Trunk(self.networks, config, body_dtype)
        self.trunk_routes = nn.ModuleList(
            Route(list(chain.from_iterable(by_stack[i] for i in members)), range(self.networks))
            for members in self.batches
        )
        self._start(config.output_width, zero_output)

    def _batches(self, by_stack: list[list[int]], config: BodyConfig) -> list[list[int]]:
        """Return the stacks with equally many tokens, which go through the body together.

        Each network that has any of their matrices has as many places as the largest has matrices.
        """
        batches = []
        for tokens in sorted({tokens for _, tokens, _ in self.shapes}):
            members = [i for i, shape in enumerate(self.shapes) if shape[1] == tokens]
            counts = Counter(chain.from_iterable(by_stack[i] for i in members))
            config.check_tokens(len(counts) * max(counts.values()), tokens)
            batches.append(members)
        return batches

    def _make_projections(self, by_stack: list[list[int]], config: BodyConfig) -> None:
        """Make W_in and W_out of each width, for the networks that have it."""
        self.inputs, self.outputs = nn.ModuleDict(), nn.ModuleDict()
        held: dict[int, list[int]] = {}
        for (_, _, width), networks in zip(self.shapes, by_stack, strict=True):
            held.setdefault(width, []).extend(networks)
        held = {width: sorted(set(networks)) for width, networks in sorted(held.items())}
        for width, networks in held.items():
            count, name = len(networks), str(width)
            self.inputs[name] = StackedLinear(count, width, config.input_width, bias=False)
            self.outputs[name] = StackedLinear(count, config.output_width, width)
        self.routes = nn.ModuleList(
            Route(networks, held[width])
            for (_, _, width), networks in zip(self.shapes, by_stack, strict=True)
        )

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

    def forward(self, stacks: Sequence[Tensor], context: Tensor | None = None) -> list[Tensor]:
        """Return a stack for each of ``stacks``, of the same shape (matrices, tokens, width).

        ``context``: (matrices, context_width), the matrices counted through the stacks.

        Raises:
            HyperError: the shapes are not those that the network was made for.
        """
        got = [tuple(stack.shape) for stack in stacks]
        if got != self.shapes:
            raise HyperError(
                f"stacks has the shapes {got}, expected {self.shapes}; make another Hypernetwork "
                "for other shapes."
            )
        mixed: list[Tensor | None] = [None] * len(stacks)
        embedded = self._embed(stacks, context)
        for members, route in zip(self.batches, self.trunk_routes, strict=True):
            batch = route(self.trunk, torch.cat([embedded[i] for i in members]))
            sizes = [self.shapes[i][0] for i in members]
            for i, part in zip(members, torch.split(batch, sizes), strict=True):
                mixed[i] = self.routes[i](self.outputs[str(self.shapes[i][2])], part)
        return [stack for stack in mixed if stack is not None]

    def _embed(self, stacks: Sequence[Tensor], context: Tensor | None) -> list[Tensor]:
        embedded = [
            route(self.inputs[str(stack.shape[2])], stack)
            for route, stack in zip(self.routes, stacks, strict=True)
        ]
        if self.embedding is not None:
            sizes = [count * tokens for count, tokens, _ in self.shapes]
            parts = torch.split(self.embedding, sizes)
            embedded = [x + e.view_as(x) for x, e in zip(embedded, parts, strict=True)]
        features = self._context_features(context)
        if features is not None:
            by_stack = torch.split(features.unsqueeze(1), [count for count, _, _ in self.shapes])
            embedded = [x + c for x, c in zip(embedded, by_stack, strict=True)]
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
