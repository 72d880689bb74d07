"""HyperAdaLoRA fine-tuning: methods on any model, torchtune recipes, exact resume, LoRA export."""

from hyper_tune.assembly import Assembly, assemble
from hyper_tune.errors import UserError
from hyper_tune.method import METHODS, HypernetworkSettings, MethodConfig, PruningSettings
from hyper_tune.step import StepReport, TrainingStep

__all__ = [
    "METHODS",
    "Assembly",
    "HypernetworkSettings",
    "MethodConfig",
    "PruningSettings",
    "StepReport",
    "TrainingStep",
    "UserError",
    "assemble",
]
