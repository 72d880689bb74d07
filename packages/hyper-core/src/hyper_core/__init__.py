"""Small hypernetworks that generate the parameters of any PyTorch model."""

from hyper_core.bodies.attention import AttentionConfig
from hyper_core.bodies.config import BodyConfig
from hyper_core.bodies.conv import ConvConfig
from hyper_core.bodies.mlp import MLPConfig
from hyper_core.context import name_features
from hyper_core.diagnostics import Diagnosis, diagnose
from hyper_core.errors import HyperError
from hyper_core.generated import GeneratedParameters
from hyper_core.hypernetwork import Hypernetwork
from hyper_core.presets import PRESETS
from hyper_core.reuse import Reuse, reuse_
from hyper_core.split import Split

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "BodyConfig",
    "ConvConfig",
    "Diagnosis",
    "GeneratedParameters",
    "HyperError",
    "Hypernetwork",
    "MLPConfig",
    "Reuse",
    "Split",
    "diagnose",
    "name_features",
    "reuse_",
]
