"""What a run trains: the choices of layer, owner of the factors, hypernetwork and rank budget."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from hyper_core import PRESETS
from hyper_tune.checks import known_fields, require, require_choice, require_number
from hyper_tune.errors import UserError

State = Literal["recurrent", "static"]
GradientNormalisation = Literal["none", "token_rms"]
Importance = Literal["sensitivity", "magnitude"]
ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class Method:
    """A point in the product of choices: which layer, who owns its factors, whether ranks fall."""

    layer: Literal["lora", "svd"]
    generated: bool
    prunes: bool


METHODS: Mapping[str, Method] = {
    "lora": Method("lora", generated=False, prunes=False),
    "adalora": Method("svd", generated=False, prunes=True),
    "hyperlora": Method("lora", generated=True, prunes=False),
    "hyperadalora": Method("svd", generated=True, prunes=True),
}

_PEFT_NAMES = {
    "r": "init_rank",
    "init_r": "init_rank",
    "target_r": "budget",
    "lora_alpha": "alpha",
    "exclude_modules": "exclude",
    "orth_reg_weight": "orthogonality",
}


@dataclass(frozen=True, kw_only=True)
class HypernetworkSettings:
    """How the factors are generated from their previous values.

    ``preset``: a size of `hyper_core.PRESETS`; "attention-tinybert" is the paper's (section 4.1.4).
    ``state``: "recurrent" feeds each output back (equations 4-6); "static" adds the output to a
    fixed start. ``gradient_normalisation``: "none" as in the paper, or "token_rms".

    Raises:
        UserError: a value is not one of the choices.

    >>> HypernetworkSettings(preset="attention-small").state
    'recurrent'
    """

    preset: str = "attention-tinybert"
    state: State = "recurrent"
    gradient_normalisation: GradientNormalisation = "none"

    def __post_init__(self) -> None:
        section = "method.hypernetwork"
        require_choice(f"{section}.preset", self.preset, PRESETS)
        require_choice(f"{section}.state", self.state, get_args(State))
        require_choice(
            f"{section}.gradient_normalisation",
            self.gradient_normalisation,
            get_args(GradientNormalisation),
        )


@dataclass(frozen=True, kw_only=True)
class PruningSettings:
    """When and by what the ranks are pruned (paper, section 3.2 and Appendix D).

    Every ``interval`` optimizer steps the ``count`` components of least ``importance`` are pruned,
    until the budget is met. ``count: None`` takes the smallest count that meets the budget by the
    fraction ``finish_by`` of the run.

    Raises:
        UserError: a value out of range; the field, the rule and the remedy are named.

    >>> PruningSettings(interval=50).count is None
    True
    """

    interval: int = 100
    count: int | None = None
    finish_by: float = 0.7
    importance: Importance = "sensitivity"

    def __post_init__(self) -> None:
        section = "method.pruning"
        require_number(f"{section}.interval", self.interval, whole=True, least=1)
        if self.count is not None:
            require_number(f"{section}.count", self.count, whole=True, least=1)
        require_number(f"{section}.finish_by", self.finish_by, above=0, most=1)
        require_choice(f"{section}.importance", self.importance, get_args(Importance))


@dataclass(frozen=True)
class MethodConfig:
    """The method of a run, validated when it is made.

    ``init_rank``: components per matrix at the start. ``budget``: average components per matrix at
    the end (paper, Appendix E: three). ``alpha``: the update is scaled by ``alpha / init_rank``,
    also after pruning. ``target_modules``: "all-linear", or suffixes or globs of module names.
    ``orthogonality``: γ of equation 7, averaged over matrices.

    Raises:
        UserError: an unknown method, a value out of range, or options that contradict the method.

    >>> MethodConfig("hyperadalora", init_rank=6, budget=3).pruning.interval
    100
    """

    name: str = "hyperadalora"
    init_rank: int = 6
    budget: float | None = None
    alpha: float | None = None
    target_modules: str | tuple[str, ...] = ALL_LINEAR
    exclude: str | tuple[str, ...] = ()
    orthogonality: float | None = None
    hypernetwork: HypernetworkSettings | None = None
    pruning: PruningSettings | None = None

    def __post_init__(self) -> None:
        require_choice("method.name", self.name, METHODS)
        require_number("method.init_rank", self.init_rank, whole=True, least=1)
        for field in ("target_modules", "exclude"):
            self._require_names(field)
        self._refuse_contradictions()
        self._fill_defaults()
        require_number("method.budget", self.budget, above=0)
        assert self.budget is not None
        require(
            self.budget <= self.init_rank,
            "method.budget",
            self.budget,
            f"must be at most method.init_rank = {self.init_rank}",
            "lower the budget or raise init_rank",
        )
        require_number("method.alpha", self.alpha, above=0)
        if self.orthogonality is not None:
            require_number("method.orthogonality", self.orthogonality, least=0)

    def _require_names(self, field: str) -> None:
        """Take one name for a tuple of it, as PEFT does; refuse what is no name."""
        value = getattr(self, field)
        if isinstance(value, str) and value != ALL_LINEAR:
            value = (value,)
            object.__setattr__(self, field, value)
        names = isinstance(value, (str, tuple)) and all(isinstance(name, str) for name in value)
        rule = "must be names or patterns of modules"
        require(names, f"method.{field}", value, rule, "write [q_proj, v_proj]")

    @property
    def method(self) -> Method:
        """The choices that the name stands for."""
        return METHODS[self.name]

    def _refuse_contradictions(self) -> None:
        method = self.method
        has = {
            "hypernetwork": method.generated,
            "pruning": method.prunes,
            "budget": method.prunes,
            "orthogonality": method.layer == "svd",
        }
        odd = [name for name in has if not has[name] and getattr(self, name) is not None]
        if odd:
            named = ", ".join(f"method.{name}" for name in odd)
            removed = " ".join(f"'~method.{name}'" for name in odd)
            raise UserError(
                f"method.name {self.name!r} has no {named}; leave them out (on the command line of "
                f"a recipe: {removed}), or choose a method that has them."
            )

    def _fill_defaults(self) -> None:
        method = self.method
        defaults: dict[str, Any] = {
            "budget": self.init_rank / 2 if method.prunes else self.init_rank,
            "alpha": float(self.init_rank),
            "orthogonality": 0.1 if method.layer == "svd" else None,
            "hypernetwork": HypernetworkSettings() if method.generated else None,
            "pruning": PruningSettings() if method.prunes else None,
        }
        for field, default in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, default)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> "MethodConfig":
        """Read the ``method`` section of a configuration file; PEFT's names are understood.

        Raises:
            UserError: an unknown key (the nearest one is named) or an invalid value.

        >>> MethodConfig.from_mapping({"name": "adalora", "init_r": 12, "target_r": 8}).budget
        8
        """
        values = {_PEFT_NAMES.get(key, key): value for key, value in given.items()}
        if len(values) < len(given):
            raise UserError(f"method gives one setting twice, under two names: {sorted(given)}.")
        known_fields("method", values, {field.name for field in fields(cls)})
        for key, kind in (("hypernetwork", HypernetworkSettings), ("pruning", PruningSettings)):
            if values.get(key) is None:
                continue
            if not isinstance(values[key], Mapping):
                raise UserError(f"method.{key} is {values[key]!r}, but must be a section of keys.")
            known_fields(f"method.{key}", values[key], {field.name for field in fields(kind)})
            values[key] = kind(**values[key])
        for key in ("target_modules", "exclude"):
            if isinstance(values.get(key), list):
                values[key] = tuple(values[key])
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"method: a value has the wrong type ({error}).") from error
