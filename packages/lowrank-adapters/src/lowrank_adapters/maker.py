"""What a method's maker has: the arguments of its layers, validated before there is a model."""

import math
from dataclasses import dataclass, fields
from typing import Any

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.layer import check_dropout
from lowrank_adapters.starts import Start, UnitRows


@dataclass(frozen=True)
class LowRankMaker:
    """What to build around a linear map: the arguments of `LowRankLinear`, validated.

    A method's maker adds its own fields and ``build``, as `LoRA` does.

    Raises:
        AdapterError: a value that no layer can have.

    >>> sorted(LowRankMaker(rank=2, alpha=4.0).common())
    ['alpha', 'dropout', 'rank', 'rslora', 'start']
    """

    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    start: Start = UnitRows()  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise AdapterError(f"rank is {self.rank}, expected at least 1.")
        if not 0 < self.alpha < math.inf:
            raise AdapterError(f"alpha is {self.alpha}, expected a finite number above 0.")
        check_dropout(self.dropout)

    def common(self) -> dict[str, Any]:
        """Return the arguments that every layer takes, by name."""
        return {field.name: getattr(self, field.name) for field in fields(LowRankMaker)}
