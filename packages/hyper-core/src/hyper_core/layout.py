"""Where the matrices of several stacks go: through which networks, in which batches."""

from collections.abc import Mapping, Sequence
from itertools import chain

from torch import nn

from hyper_core.sharing import Route

Shape = tuple[int, int, int]


class Layout(nn.Module):
    """Batches of the stacks with equally many tokens, and routes through projections and trunk.

    ``shapes``: (matrices, tokens, width) of each stack. ``networks``: of each matrix, by stack; a
    stack that has none is left out. ``held``: by width, the networks whose projections there are.
    ``trunks``: how many networks there are in all.

    >>> layout = Layout([(2, 3, 8), (1, 3, 4)], [[0, 0], [0]], {8: [0], 4: [0]}, trunks=1)
    >>> layout.batches
    [[0, 1]]
    """

    def __init__(
        self,
        shapes: Sequence[Shape],
        networks: Sequence[Sequence[int]],
        held: Mapping[int, Sequence[int]],
        trunks: int,
    ) -> None:
        super().__init__()
        filled = [i for i, own in enumerate(networks) if own]
        self.batches = [
            [i for i in filled if shapes[i][1] == tokens]
            for tokens in sorted({shapes[i][1] for i in filled})
        ]
        self.routes = nn.ModuleList(
            Route(own, held[width]) if own else nn.Identity()
            for (_, _, width), own in zip(shapes, networks, strict=True)
        )
        self.trunk_routes = nn.ModuleList(
            Route(list(chain.from_iterable(networks[i] for i in members)), range(trunks))
            for members in self.batches
        )
