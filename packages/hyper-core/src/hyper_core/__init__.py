"""Small attention hypernetworks that generate the parameters of any PyTorch model."""

from hyper_core.bodies.attention import EncoderLayer
from hyper_core.errors import HyperError
from hyper_core.generated import GeneratedParameters
from hyper_core.hypernetwork import Hypernetwork
from hyper_core.presets import PRESETS, AttentionConfig

__all__ = [
    "PRESETS",
    "AttentionConfig",
    "EncoderLayer",
    "GeneratedParameters",
    "HyperError",
    "Hypernetwork",
]
