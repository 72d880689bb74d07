"""What a run trains: the choices of layer, owner of the factors, hypernetwork and rank budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from hyper_tune.checks import known_fields, require, require_choice, require_number
from hyper_tune.errors import UserError
from hyper_tune.method_sections import (
    HypernetworkSettings,
    MagnitudeSettings,
    PruningSettings,
    SamplingSettings,
)

__all__ = [
    "METHODS",
    "HypernetworkSettings",
    "MagnitudeSettings",
    "Method",
    "MethodConfig",
    "PruningSettings",
    "SamplingSettings",
]

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Method:
    """A point in the product of choices: which layer, who owns its factors, what becomes of ranks.

    ``ranks``: "fixed"; "pruned" down to a budget; or "sampled", one for each step.
    """

    layer: Literal["lora", "svd", "dora", "dylora"]
    generated: bool
    ranks: Literal["fixed", "pruned", "sampled"]

    @property
    def prunes(self) -> bool:
        """Whether ranks fall to a budget."""
        return self.ranks == "pruned"

    @property
    def settings(self) -> frozenset[str]:
        """The keys of a `MethodConfig` that this method has and not every one.

        >>> sorted(METHODS["hyperdora"].settings)
        ['hypernetwork', 'magnitude']
        """
        has = {
            "hypernetwork": self.generated,
            "pruning": self.prunes,
            "budget": self.prunes,
            "orthogonality": self.layer == "svd",
            "magnitude": self.layer == "dora",
            "sampling": self.ranks == "sampled",
        }
        return frozenset(name for name in has if has[name])


_LEARNED = {
    "lora": Method("lora", generated=False, ranks="fixed"),
    "adalora": Method("svd", generated=False, ranks="pruned"),
    "dora": Method("dora", generated=False, ranks="fixed"),
    "dylora": Method("dylora", generated=False, ranks="sampled"),
}
METHODS: Mapping[str, Method] = _LEARNED | {
    f"hyper{name}": replace(method, generated=True) for name, method in _LEARNED.items()
}
# What not every method has.
OWN_SETTINGS = frozenset().union(*(method.settings for method in METHODS.values()))

_PEFT_NAMES = {
    "r": "init_rank",
    "init_r": "init_rank",
    "target_r": "budget",
    "lora_alpha": "alpha",
    "exclude_modules": "exclude",
    "orth_reg_weight": "orthogonality",
}
_SECTIONS: Mapping[str, type[Any]] = {
    "hypernetwork": HypernetworkSettings,
    "pruning": PruningSettings,
    "magnitude": MagnitudeSettings,
    "sampling": SamplingSettings,
}


@dataclass(frozen=True)
class MethodConfig:
    """The method of a run, validated when it is made.

    ``init_rank``: components per matrix at the start. ``budget``: average components per matrix at
    the end (paper, Appendix E: three); None where nothing is pruned. ``alpha``: the update is
    scaled by ``alpha / init_rank``, also after pruning. ``target_modules``: "all-linear", or
    suffixes or globs of module names. ``orthogonality``: γ of equation 7, averaged over matrices.
    ``hypernetwork``, ``pruning``, ``magnitude`` and ``sampling``: the sections of the methods that
    have them.

    Raises:
        UserError: an unknown method, a value out of range, or options that contradict the method.

    >>> MethodConfig("hyperadalora", init_rank=6, budget=3).pruning.interval
    100
    """

    name: str = "hyperadalora"
    init_rank: int = 6
    budget: float | None = None
    alpha: float | None = None
    target_modules: str | Sequence[str] = ALL_LINEAR
    exclude: str | Sequence[str] = ()
    orthogonality: float | None = None
    hypernetwork: HypernetworkSettings | None = None
    pruning: PruningSettings | None = None
    magnitude: MagnitudeSettings | None = None
    sampling: SamplingSettings | None = None

    def __post_init__(self) -> None:
        require_choice("method.name", self.name, METHODS)
        require_number("method.init_rank", self.init_rank, whole=True, least=1)
        for field in ("target_modules", "exclude"):
            self._require_names(field)
        self._require_sections()
        self._refuse_contradictions()
        self._fill_defaults()
        if self.budget is not None:
            self._check_budget(self.budget)
        require_number("method.alpha", self.alpha, above=0)
        if self.orthogonality is not None:
            require_number("method.orthogonality", self.orthogonality, least=0)
        self._check_sampling()

    def _check_budget(self, budget: float) -> None:
        require_number("method.budget", budget, above=0)
        require(
            budget <= self.init_rank,
            "method.budget",
            budget,
            f"must be at most method.init_rank = {self.init_rank}",
            "lower the budget or raise init_rank",
        )

    def _require_names(self, field: str) -> None:
        """Take one name or a list for a tuple, as PEFT does; refuse what is no name."""
        value: Any = getattr(self, field)
        is_all = field == "target_modules" and value == ALL_LINEAR
        if isinstance(value, list) or (isinstance(value, str) and not is_all):
            value = tuple(value) if isinstance(value, list) else (value,)
            object.__setattr__(self, field, value)
        names = isinstance(value, (str, tuple)) and all(isinstance(name, str) for name in value)
        rule = "must be names or patterns of modules"
        require(names, f"method.{field}", value, rule, "write [q_proj, v_proj]")

    def _require_sections(self) -> None:
        for section, kind in _SECTIONS.items():
            value = getattr(self, section)
            if value is not None and not isinstance(value, kind):
                raise UserError(
                    f"method.{section} is {value!r}, but must be made by {kind.__name__}(...); "
                    "MethodConfig.from_mapping reads dictionaries."
                )

    @property
    def method(self) -> Method:
        """The choices that the name stands for."""
        return METHODS[self.name]

    def _refuse_contradictions(self) -> None:
        odd = [
            field.name
            for field in fields(self)
            if field.name in OWN_SETTINGS - self.method.settings
            and getattr(self, field.name) is not None
        ]
        if odd:
            named = ", ".join(f"method.{name}" for name in odd)
            removed = " ".join(f"'~method.{name}'" for name in odd)
            raise UserError(
                f"method.name {self.name!r} has no {named}; leave them out (on the command line of "
                f"a recipe: {removed}), or choose a method that has them."
            )

    def _fill_defaults(self) -> None:
        defaults: dict[str, Any] = {
            "budget": self.init_rank / 2,
            "orthogonality": 0.1,
            "hypernetwork": HypernetworkSettings(),
            "pruning": PruningSettings(),
            "magnitude": MagnitudeSettings(),
            "sampling": SamplingSettings(),
        }
        own = {name: default for name, default in defaults.items() if name in self.method.settings}
        common = {"alpha": float(self.init_rank)}
        for field, default in (common | own).items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)

    def _check_sampling(self) -> None:
        sampling = self.sampling
        if sampling is None:
            return
        for name in ("lowest", "highest"):
            bound = getattr(sampling, name)
            require(
                bound is None or bound <= self.init_rank,
                f"method.sampling.{name}",
                bound,
                f"must be at most method.init_rank = {self.init_rank}",
                "lower it or raise init_rank",
            )
        require(
            not (sampling.frozen and self.method.generated),
            "method.sampling.frozen",
            sampling.frozen,
            f"{self.name} generates all components by the same weights, so that all change",
            "leave it out, or choose dylora",
        )

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "MethodConfig":
        """Read the ``method`` section of a configuration file; PEFT's names are understood.

        Raises:
            UserError: an unknown key (the nearest one is named) or an invalid value.

        >>> MethodConfig.from_mapping({"name": "adalora", "init_r": 12, "target_r": 8}).budget
        8
        """
        values = {_PEFT_NAMES.get(key, key): value for key, value in given.items()}
        for name in values:
            names = sorted(key for key in given if _PEFT_NAMES.get(key, key) == name)
            if len(names) > 1:
                raise UserError(
                    f"method gives one setting twice, under two names: {', '.join(names)}; "
                    "give one of them."
                )
        known_fields("method", values, {field.name for field in fields(cls)})
        for key, kind in _SECTIONS.items():
            if values.get(key) is None:
                continue
            if not isinstance(values[key], Mapping):
                raise UserError(f"method.{key} is {values[key]!r}, but must be a section of keys.")
            known_fields(f"method.{key}", values[key], {field.name for field in fields(kind)})
            values[key] = kind(**values[key])
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"method: a value has the wrong type ({error}).") from error
