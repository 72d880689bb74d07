"""What a method's maker has: the arguments of its layers, validated before there is a model."""

from dataclasses import dataclass, fields
from typing import Any

from lowrank_adapters.checks import check_dropout, check_positive, check_whole
from lowrank_adapters.errors import AdapterError
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
        check_whole("rank", self.rank)
        check_positive("alpha", self.alpha)
        check_dropout(self.dropout)
        if not isinstance(self.rslora, bool):
            raise AdapterError(f"rslora is {self.rslora!r}, expected True or False.")
        if not hasattr(self.start, "components") or isinstance(self.start, type):
            raise AdapterError(f"start is {self.start!r}, expected a start such as UnitRows().")

    def common(self) -> dict[str, Any]:
        """Return the arguments that every layer takes, by name."""
        return {field.name: getattr(self, field.name) for field in fields(LowRankMaker)}
