"""Compares the factors of two runs: cosines of P, Λ and Q, as they lie and aligned (Table 8).

    python recipes/paper/similarity.py runs/adalora runs/hyperadalora --output similarity.json

An update P diag(λ) Q stays the same when its components change places, and when two of a
component's p, λ and q change sign, so that a cosine of factors as they lie may be anything where
the updates are equal. Aligned: the second run's components take the places and signs in which
they are most like the first's. ΔW is the product's own cosine, which needs no alignment.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn.functional import cosine_similarity

from hyper_tune.durable import write_text
from hyper_tune.errors import PERSONS_MISTAKES, UserError


@dataclass(frozen=True)
class Components:
    """One matrix' components: ``p`` (rank, out), ``lam`` (rank,), ``q`` (rank, in); 0 if pruned."""

    p: Tensor
    lam: Tensor
    q: Tensor


def align(reference: Components, other: Components) -> Components:
    """Return ``other`` with its components in the order and with the signs most like reference's.

    The order maximises the sum of |cos(p, p')| |cos(q, q')| over pairs. The signs make both
    cosines positive; λ takes their product, which leaves P diag(λ) Q as it is.
    """
    p, q = _cosines(reference.p, other.p), _cosines(reference.q, other.q)
    rows, order = linear_sum_assignment((p * q).abs().numpy(), maximize=True)
    signs_p, signs_q = _signs(p[rows, order]), _signs(q[rows, order])
    return Components(
        other.p[order] * signs_p[:, None],
        other.lam[order] * signs_p * signs_q,
        other.q[order] * signs_q[:, None],
    )


def similarities(reference: Components, other: Components) -> dict[str, float]:
    """Return the cosines of one matrix' factors: as they lie, aligned, of the components that are
    left in both; and of the updates.
    """
    aligned = align(reference, other)
    found = {}
    for name, attribute in (("P", "p"), ("Λ", "lam"), ("Q", "q")):
        mine = getattr(reference, attribute)
        found[name] = _cosine(mine, getattr(other, attribute))
        found[f"{name}, aligned"] = _cosine(mine, getattr(aligned, attribute))
    # A pruned component is zero, so that a pair of which one is pruned adds nothing to a cosine.
    both = reference.p.any(dim=1) & other.p.any(dim=1)
    for name, attribute in (("P", "p"), ("Q", "q")):
        mine, theirs = (getattr(parts, attribute)[both] for parts in (reference, other))
        found[f"{name}, in both"] = _cosine(mine, theirs)
    return found | {"ΔW": _cosine(_update(reference), _update(other))}


def compare(
    reference: Mapping[str, Components], other: Mapping[str, Components]
) -> dict[str, float]:
    """Return the means over the matrices in which a component is left in both.

    Raises:
        UserError: the matrices differ, or in none both have one component.
    """
    if reference.keys() != other.keys():
        odd = sorted(reference.keys() ^ other.keys())
        raise UserError(f"the runs adapt different matrices, such as {odd[0]}.")
    both = [n for n in reference if (reference[n].p.any(1) & other[n].p.any(1)).any()]
    if not both:
        raise UserError("there is no matrix in which both runs have the same component left.")
    found = [similarities(reference[name], other[name]) for name in both]
    means = {name: sum(each[name] for each in found) / len(found) for name in found[0]}
    return means | {"matrices": len(both), "of": len(reference)}


def components(run: Path) -> dict[str, Components]:
    """Return the components of every matrix of a run, of its newest checkpoint."""
    from hyper_tune.torchtune.trained import open_trained

    method = open_trained(run).method
    if method.config.method.layer != "svd":
        raise UserError(f"{run} is of {method.config.name}, which has no P, Λ and Q.")
    method.write_factors_()
    found: dict[str, dict[str, Tensor]] = {}
    masks: dict[str, Tensor] = {}
    for group in method.stack.groups:
        for i, name in enumerate(group.names):
            found.setdefault(name, {})[group.role] = group.values[i].detach().double()
            if group.rank_mask is not None:
                masks[name] = group.rank_mask[i].double()[:, None]
    return {
        name: Components(
            roles["p"] * masks[name], (roles["lam"] * masks[name])[:, 0], roles["q"] * masks[name]
        )
        for name, roles in found.items()
    }


def main(
    reference: Annotated[Path, typer.Argument(help="The run that is compared with.")],
    other: Annotated[Path, typer.Argument(help="The run that is compared.")],
    *,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
) -> None:
    """Write the mean cosines of two runs' factors."""
    try:
        found = compare(components(reference), components(other))
    except PERSONS_MISTAKES as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    write_text(output, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    typer.echo(", ".join(f"{name} {value:.4f}" for name, value in found.items()))


def _cosines(mine: Tensor, theirs: Tensor) -> Tensor:
    return cosine_similarity(mine[:, None], theirs[None], dim=-1)


def _signs(cosines: Tensor) -> Tensor:
    return torch.where(cosines < 0, -1.0, 1.0).to(cosines.dtype)


def _cosine(mine: Tensor, theirs: Tensor) -> float:
    return float(cosine_similarity(mine.flatten(), theirs.flatten(), dim=0))


def _update(parts: Components) -> Tensor:
    return parts.p.T @ (parts.lam[:, None] * parts.q)


if __name__ == "__main__":
    typer.run(main)
