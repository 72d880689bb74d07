"""Sizes of bodies by name."""

from collections.abc import Mapping
from types import MappingProxyType

from hyper_core.bodies.attention import AttentionConfig
from hyper_core.bodies.config import BodyConfig
from hyper_core.bodies.conv import ConvConfig
from hyper_core.bodies.mlp import MLPConfig
from hyper_core.errors import HyperError

PRESETS: Mapping[str, BodyConfig] = MappingProxyType(
    {
        "attention-tinybert": AttentionConfig(),
        "attention-small": AttentionConfig(hidden=96, heads=4, feed_forward=384),
        "attention-tiny": AttentionConfig(hidden=48, heads=4, feed_forward=192),
        "conv-resnet18": ConvConfig(),
        "conv-small": ConvConfig(widths=(64, 96), blocks=(1, 1)),
        "mlp-15": MLPConfig(),
        "mlp-small": MLPConfig(hidden=32, widths=(64,)),
    }
)


def find_config(config: BodyConfig | str) -> BodyConfig:
    """Return the size that a preset's name stands for; a size stands for itself.

    Raises:
        HyperError: it is neither; the known names are listed.

    >>> find_config("attention-small").input_width
    96
    """
    if isinstance(config, BodyConfig) and not isinstance(config, type):
        return config
    if not isinstance(config, str) or config not in PRESETS:
        raise HyperError(
            f"config is {config!r}, expected a body's configuration or one of "
            f"{', '.join(PRESETS)}; correct it."
        )
    return PRESETS[config]
