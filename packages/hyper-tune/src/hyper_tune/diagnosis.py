"""How a method stands in the middle of a run: ranks, and the hypernetworks' health."""

import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hyper_core import GeneratedParameters, diagnose
from hyper_tune.assembly import Assembly
from hyper_tune.factors import FactorOwner, PartlyGenerated


@dataclass(frozen=True)
class MethodDiagnosis:
    """Figures of a method at a step.

    ``ranks``: live components by matrix. ``hypernetworks``: by role what `hyper_core.diagnose`
    measures, None for what is not finite; empty where nothing is generated. ``findings``: what it
    warns of, each with what to change.
    """

    ranks: Mapping[str, int]
    hypernetworks: Mapping[str, Mapping[str, float | None]]
    findings: tuple[str, ...]

    def row(self, step: int) -> dict[str, Any]:
        """Return a row for a file of rows."""
        return {"step": step, **asdict(self)}

    def scalars(self) -> dict[str, float]:
        """Return numbers by name for any logger.

        >>> diagnosis = MethodDiagnosis({"q": 3}, {"p": {"cosine": 0.5, "residual": None}}, ())
        >>> diagnosis.scalars()
        {'ranks/q': 3, 'hypernetwork/p/cosine': 0.5}
        """
        ranks = {f"ranks/{name}": rank for name, rank in self.ranks.items()}
        return ranks | {
            f"hypernetwork/{role}/{name}": value
            for role, figures in self.hypernetworks.items()
            for name, value in figures.items()
            if value is not None
        }


def diagnose_method(method: Assembly) -> MethodDiagnosis:
    """Measure a method between two steps; it changes nothing, and reads the device.

    >>> import torch
    >>> from hyper_tune import MethodConfig, assemble
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    >>> method = assemble(model, MethodConfig("lora", init_rank=2), total_steps=3)
    >>> diagnose_method(method)
    MethodDiagnosis(ranks={'0': 2}, hypernetworks={}, findings=())
    """
    generated = _generated(method.owner)
    if generated is None:
        return MethodDiagnosis(method.ranks(), {}, ())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # they are among the findings
        found = diagnose(generated)
    figures = {
        role: {
            name: value if math.isfinite(value) else None for name, value in asdict(all_).items()
        }
        for role, all_ in found.roles.items()
    }
    return MethodDiagnosis(method.ranks(), figures, found.warnings)


def _generated(owner: FactorOwner) -> GeneratedParameters | None:
    part = owner.generated if isinstance(owner, PartlyGenerated) else owner
    return part if isinstance(part, GeneratedParameters) else None
