"""Which matrices share a network, and how those of several networks go through it in one batch."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hyper_core.errors import HyperError

Sharing = str | Sequence[Hashable]


def networks_of(sharing: Sharing, matrices: int, what: str = "sharing") -> list[int]:
    """Return the network of each matrix, numbered in the order of first appearance.

    ``sharing``: "all", one network for all; "each", one per matrix; or a label per matrix:
    matrices of equal label share one.

    Raises:
        HyperError: another word, not one label per matrix, or labels that cannot be compared.

    >>> networks_of(["attention", "mlp", "attention"], 3)
    [0, 1, 0]
    """
    if isinstance(sharing, str) and sharing in ("all", "each"):
        return [0] * matrices if sharing == "all" else list(range(matrices))
    if isinstance(sharing, str) or not isinstance(sharing, Sequence):
        raise HyperError(
            f"{what} is {sharing!r}, expected 'all', 'each' or a label per matrix; choose one."
        )
    if len(sharing) != matrices:
        raise HyperError(
            f"{what} has {len(sharing)} labels, expected one for each of {matrices} matrices; "
            "give equal labels to those that share a network."
        )
    for label in sharing:  # equal tensors have different hashes
        if isinstance(label, Tensor) or not isinstance(label, Hashable):
            raise HyperError(
                f"{what} has the label {label!r}, expected words or numbers; give equal labels to "
                "those that share a network."
            )
    numbers: dict[Hashable, int] = {}
    return [numbers.setdefault(label, len(numbers)) for label in sharing]


class Route(nn.Module):
    """Runs a batch of matrices through stacked networks, each through its own.

    ``networks``: of each matrix. ``held``: the networks that the module holds, in its order.
    Matrices are laid out as (networks, matrices of each); where networks have unequally many, the
    places left are filled with copies whose results are dropped. A batch that is in order
    already, as with one network or one for each, is only viewed.

    >>> from hyper_core.stacked import StackedLinear
    >>> route = Route([0, 1, 0], held=[0, 1])
    >>> route(StackedLinear(2, 4, 5), torch.ones(3, 2, 4)).shape
    torch.Size([3, 2, 5])
    """

    fill: Tensor | None
    place: Tensor | None
    chosen: Tensor | None

    def __init__(self, networks: Sequence[int], held: Sequence[int]) -> None:
        super().__init__()
        position = {network: i for i, network in enumerate(held)}
        by_network: dict[int, list[int]] = {}
        for i, network in enumerate(networks):
            by_network.setdefault(network, []).append(i)
        used = sorted(by_network, key=position.__getitem__)
        members = [by_network[network] for network in used]
        self.networks, self.each = len(used), max(map(len, members))
        fill = [i for m in members for i in (m + m[:1] * self.each)[: self.each]]
        in_order = fill == list(range(len(networks)))
        place = [0] * len(networks)
        for network, own in enumerate(members):
            for number, i in enumerate(own):
                place[i] = network * self.each + number
        chosen = [position[network] for network in used]
        self.first, self.all = chosen[0], len(chosen) == len(held)
        adjacent = chosen == list(range(chosen[0], chosen[0] + len(chosen)))
        self._index("fill", None if in_order else fill)
        self._index("place", None if in_order else place)
        self._index("chosen", None if adjacent else chosen)

    def _index(self, name: str, positions: list[int] | None) -> None:
        index = None if positions is None else torch.tensor(positions)
        self.register_buffer(name, index, persistent=False)

    def forward(self, module: nn.Module, x: Tensor) -> Tensor:
        """Return ``module``'s output for x, both (matrices, tokens, features)."""
        spread = x if self.fill is None else x.index_select(0, self.fill)
        spread = spread.reshape(self.networks, self.each, *spread.shape[1:])
        if self.all:
            y = module(spread)
        else:
            own = {name: self._own(weight) for name, weight in module.named_parameters()}
            y = functional_call(module, own, (spread,))
        flat: Tensor = y.flatten(0, 1)
        return flat if self.place is None else flat.index_select(0, self.place)

    def _own(self, weight: Tensor) -> Tensor:
        """Return the weights of the networks that are used, as a view where they are adjacent."""
        if self.chosen is None:
            return weight.narrow(0, self.first, self.networks)
        return weight.index_select(0, self.chosen)
