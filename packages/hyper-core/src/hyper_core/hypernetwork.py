"""A network that writes tokens from tokens, for one role and all of its matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hyper_core.bodies.attention import EncoderLayer
from hyper_core.errors import HyperError
from hyper_core.presets import AttentionConfig

Shape = tuple[int, int, int]


class Hypernetwork(nn.Module):
    """y = W_out·Body(LN(W_in·x + e_matrix + e_rank)), shared by all matrices of one role.

    A matrix is a row of tokens, one per rank component, each as wide as the component. Each
    distinct width has an input and an output projection; the body is one for all. Attention is
    among the tokens of one matrix. Matrices of all widths go through the body in one batch (one
    per distinct number of tokens), so that the number of operations does not grow with them.

    ``shapes``: (matrices, tokens, width) of each stack. ``embeddings``: add a learned vector per
    matrix and per token index, of unit variance: without them nothing tells matrices apart.
    ``zero_output``: start with output 0.

    Gradient: to all weights and to the input. Saved: all weights.
    Start: W_in has N(0, 1): the variance of Σⱼ wⱼ xⱼ is σ²·Σⱼ xⱼ², so that a token of unit norm
    arrives with unit variance, as much as either embedding. W_out has N(0, 1/(hidden·width)): the
    body puts out a squared norm of ``hidden``, so that each of ``width`` numbers has variance
    1/width and the row has an expected squared norm of one.
    Paper: section 3.3 and equation 8. Deviations: a token is a rank component, not a single
    number; the embeddings.

    Raises:
        HyperError: no shape, a shape that is not three sizes, or a size below one.

    >>> network = Hypernetwork([(4, 3, 16), (2, 3, 8)], AttentionConfig(12, 2, 24))
    >>> [tuple(y.shape) for y in network([torch.ones(4, 3, 16), torch.ones(2, 3, 8)])]
    [(4, 3, 16), (2, 3, 8)]
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        config: AttentionConfig,
        *,
        embeddings: bool = True,
        zero_output: bool = False,
    ) -> None:
        super().__init__()
        if not shapes or any(len(shape) != 3 or min(shape) < 1 for shape in shapes):
            raise HyperError(
                f"shapes is {list(shapes)}, expected at least one (matrices, tokens, width), all "
                "above 0; give the shape of each stack."
            )
        self.shapes = list(shapes)
        widths = sorted({width for _, _, width in self.shapes})
        self.inputs = nn.ModuleDict(
            {str(width): nn.Linear(width, config.hidden, bias=False) for width in widths}
        )
        self.outputs = nn.ModuleDict(
            {str(width): nn.Linear(config.hidden, width) for width in widths}
        )
        matrices = sum(count for count, _, _ in self.shapes)
        tokens = max(count for _, count, _ in self.shapes)
        self.matrix_embedding: nn.Parameter | None = None
        self.token_embedding: nn.Parameter | None = None
        if embeddings:
            self.matrix_embedding = nn.Parameter(torch.randn(matrices, config.hidden))
            self.token_embedding = nn.Parameter(torch.randn(tokens, config.hidden))
        self.norm = nn.LayerNorm(config.hidden)
        self.body = nn.Sequential(*(EncoderLayer(config) for _ in range(config.layers)))
        self._start(config.hidden, zero_output)

    @torch.no_grad()
    def _start(self, hidden: int, zero_output: bool) -> None:
        for weight in self.inputs.parameters():
            weight.normal_()
        for width, projection in self.outputs.items():
            weight, bias = projection.parameters()
            weight.normal_(std=0.0 if zero_output else (hidden * int(width)) ** -0.5)
            bias.zero_()

    def forward(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Return a stack for each of ``stacks``, of the same shape (matrices, tokens, width).

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
        embedded = self._embed(stacks)
        for count in sorted({tokens for _, tokens, _ in self.shapes}):
            members = [i for i, (_, tokens, _) in enumerate(self.shapes) if tokens == count]
            batch = self.body(self.norm(torch.cat([embedded[i] for i in members])))
            sizes = [self.shapes[i][0] for i in members]
            for member, part in zip(members, batch.split(sizes), strict=True):
                mixed[member] = self.outputs[str(self.shapes[member][2])](part)
        return [stack for stack in mixed if stack is not None]

    def _embed(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        projected = [self.inputs[str(stack.shape[2])](stack) for stack in stacks]
        if self.matrix_embedding is None or self.token_embedding is None:
            return projected
        by_stack = torch.split(self.matrix_embedding, [count for count, _, _ in self.shapes])
        return [
            tokens + matrix.unsqueeze(1) + self.token_embedding[: tokens.shape[1]]
            for tokens, matrix in zip(projected, by_stack, strict=True)
        ]
