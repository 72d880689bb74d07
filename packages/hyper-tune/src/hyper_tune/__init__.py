"""HyperAdaLoRA fine-tuning: methods on any model, torchtune recipes, exact resume, LoRA export."""

from hyper_tune.assembly import Assembly, assemble
from hyper_tune.errors import UserError
from hyper_tune.method import (
    METHODS,
    HypernetworkSettings,
    MagnitudeSettings,
    MethodConfig,
    PruningSettings,
    SamplingSettings,
)
from hyper_tune.step import StepReport, TrainingStep

__all__ = [
    "METHODS",
    "Assembly",
    "HypernetworkSettings",
    "MagnitudeSettings",
    "MethodConfig",
    "PruningSettings",
    "SamplingSettings",
    "StepReport",
    "TrainingStep",
    "UserError",
    "assemble",
]
