"""Start a run from the hypernetworks of another: another task, or another model."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_core.errors import HyperError
from hyper_core.generated import GeneratedParameters

_NETWORKS = "hypernetworks."


@dataclass(frozen=True)
class Reuse:
    """What was carried over, and what starts afresh and why, by name in the state dict.

    Raises:
        HyperError: never; it is made by `reuse_`.

    >>> print(Reuse(carried=("hypernetworks.p.inputs.768.weight",), fresh={"state_p_0": "its own"}))
    1 tensor carried over; 1 starts afresh:
    state_p_0: its own
    """

    carried: tuple[str, ...]
    fresh: Mapping[str, str]

    def __str__(self) -> str:
        counted = f"{len(self.carried)} tensor{'s' * (len(self.carried) != 1)} carried over"
        rest = "".join(f"\n{name}: {why}" for name, why in self.fresh.items())
        verb = "starts" if len(self.fresh) == 1 else "start"
        return f"{counted}; {len(self.fresh)} {verb} afresh{':' * bool(rest)}{rest}"


@torch.no_grad()
def reuse_(
    generated: GeneratedParameters, saved: Mapping[str, Tensor], *, same_matrices: bool = False
) -> Reuse:
    """Copy into ``generated`` the weights of ``saved`` that mean the same here; report all others.

    ``saved``: a state dict of a `GeneratedParameters`, of another task or model.
    ``same_matrices``: both have the same matrices in the same order, as for another task on the
    same model; then what belongs to a matrix is carried over too: its embeddings, and where
    sharing is not "all" its network.

    Carried over, a layer as a whole: projections of the widths in common, bodies and context maps,
    where role and shape are equal. One network of ``saved`` starts each of several here.
    Afresh: state and averages, which are the run's; output projections that start at zero, so
    that the first step is still at its target; and what has no equal.

    Raises:
        HyperError: nothing could be carried over.

    >>> old = GeneratedParameters({"w": [torch.ones(2, 3)]}, config="mlp-small")
    >>> new = GeneratedParameters({"w": [torch.ones(2, 3), torch.ones(2, 5)]}, config="mlp-small")
    >>> "hypernetworks.w.inputs.3.weight" in reuse_(new, old.state_dict()).carried
    True
    """
    here = generated.state_dict()
    fresh: dict[str, str] = {}
    for name, value in here.items():
        why = _obstacle(generated, name, value, saved, same_matrices)
        if why is not None:
            fresh[name] = why
    broken = {name.rpartition(".")[0]: name for name in fresh if name.startswith(_NETWORKS)}
    for name in here:
        module = name.rpartition(".")[0]
        if module in broken and name not in fresh:
            fresh[name] = f"it belongs to {broken[module]}"
    carried = tuple(name for name in here if name not in fresh)
    if not carried:
        first, why = next(item for item in fresh.items() if item[0].startswith(_NETWORKS))
        raise HyperError(
            f"saved has nothing that can be carried over, for instance {first} starts afresh: "
            f"{why}; make the hypernetworks with the same roles and the same config."
        )
    for name in carried:
        here[name].copy_(saved[name])
    return Reuse(carried, fresh)


def _obstacle(
    generated: GeneratedParameters,
    name: str,
    here: Tensor,
    saved: Mapping[str, Tensor],
    same_matrices: bool,
) -> str | None:
    """Return why ``name`` starts afresh, or None where it does not."""
    if not name.startswith(_NETWORKS):
        return "it is the run's own"
    role, part = name.removeprefix(_NETWORKS).split(".", 1)
    if part.startswith("outputs.") and (
        generated.roles[role].zero_start or generated.recursion.keeps_start
    ):
        return "it starts at zero"
    if name not in saved:
        return "saved has none"
    there = saved[name]
    if part == "embedding" and not same_matrices:
        return "it belongs to the matrices of the other run"
    if part not in ("embedding", "context.weight"):
        if len(there) > 1 and not same_matrices:
            return f"its {len(there)} networks belong to the matrices of the other run"
        if len(there) == 1:
            there = there.expand_as(here) if there.shape[1:] == here.shape[1:] else there
    if there.shape != here.shape:
        return f"saved has the shape {tuple(there.shape)}, this run {tuple(here.shape)}"
    return None
