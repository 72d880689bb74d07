"""Sizes of the attention body by name."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType

from hyper_core.errors import HyperError


@dataclass(frozen=True)
class AttentionConfig:
    """The size of an attention body: ``layers`` encoder layers over tokens ``hidden`` wide.

    The defaults are one layer of TinyBERT (paper, section 4.1.4): 312 wide, 12 heads; its
    feed-forward part, which the paper does not state, is TinyBERT's 1200.

    Raises:
        HyperError: a size below one, or ``hidden`` that ``heads`` does not divide.

    >>> AttentionConfig().hidden
    312
    """

    hidden: int = 312
    heads: int = 12
    feed_forward: int = 1200
    layers: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int) or value < 1:
                raise HyperError(
                    f"AttentionConfig.{field.name} is {value!r}, expected a whole number of at "
                    f"least 1; the default is {field.default}."
                )
        if self.hidden % self.heads:
            above = self.hidden + self.heads - self.hidden % self.heads
            raise HyperError(
                f"AttentionConfig.hidden is {self.hidden}, expected a multiple of heads, "
                f"{self.heads}; make it {above}."
            )


PRESETS: Mapping[str, AttentionConfig] = MappingProxyType(
    {
        "attention-tinybert": AttentionConfig(),
        "attention-small": AttentionConfig(hidden=96, heads=4, feed_forward=384),
    }
)


def find_config(config: AttentionConfig | str) -> AttentionConfig:
    """Return the size that a preset's name stands for; a size stands for itself.

    Raises:
        HyperError: the name is unknown; the known ones are listed.

    >>> find_config("attention-small").hidden
    96
    """
    if isinstance(config, AttentionConfig):
        return config
    if config not in PRESETS:
        raise HyperError(
            f"config is {config!r}, expected an AttentionConfig or one of {', '.join(PRESETS)}; "
            "correct the name."
        )
    return PRESETS[config]
