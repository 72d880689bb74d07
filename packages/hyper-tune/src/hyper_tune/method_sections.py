"""The sections of a method's configuration, each validated when it is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from hyper_core import PRESETS, AttentionConfig, BodyConfig, ConvConfig, MLPConfig
from hyper_tune.checks import known_fields, require, require_choice, require_flag, require_number
from hyper_tune.errors import UserError

State = Literal["recurrent", "static", "damped"]
Sharing = Literal["all", "groups", "each"]
Outputs = Literal["unit_rows", "orthonormal", "free"]
GradientNormalisation = Literal["none", "token_rms"]
BodyDtype = Literal["fp32", "bf16"]
Importance = Literal["sensitivity", "magnitude"]
MagnitudeForm = Literal["rows", "scalar"]
Draw = Literal["shared", "each"]

BODIES: Mapping[str, type[Any]] = {
    "attention": AttentionConfig,
    "conv": ConvConfig,
    "mlp": MLPConfig,
}
_PAPER = "attention-tinybert"


@dataclass(frozen=True, kw_only=True)
class HypernetworkSettings:
    """How the factors are generated from their previous values; `GeneratedParameters` has it all.

    ``preset``: a size of `hyper_core.PRESETS`; "attention-tinybert" is the paper's (section 4.1.4).
    ``body``: in its place "attention", "conv" or "mlp", with ``sizes`` by the names of its fields.
    ``state``: "recurrent" feeds each output back (equations 4-6); "damped" does so by the part
    ``relaxation`` (0.5); "static" adds the output to a fixed start.
    ``sharing``: "all" matrices of a role have one hypernetwork, "each" its own, or "groups" one for
    all modules of one name, such as q_proj.
    ``outputs``: of P, Q and A: "unit_rows" of norm one, "orthonormal", or "free".
    ``embeddings``: whether each token of each matrix has a learned vector of its own.
    ``gradient_normalisation``: "none" as in the paper, or "token_rms", an average that decays by
    ``gradient_decay`` (0.99). ``dtype``: of the body's arithmetic; its weights are float32.

    Raises:
        UserError: a value is not one of the choices, or is for another choice.
        HyperError: a size that no body can have.

    >>> HypernetworkSettings(body="mlp", sizes={"hidden": 8, "widths": [16]}).config
    MLPConfig(hidden=8, widths=(16,))
    """

    preset: str | None = None
    body: str | None = None
    sizes: Mapping[str, Any] = field(default_factory=dict)
    state: State = "recurrent"
    relaxation: float | None = None
    sharing: Sharing = "all"
    outputs: Outputs = "unit_rows"
    embeddings: bool = True
    gradient_normalisation: GradientNormalisation = "none"
    gradient_decay: float | None = None
    dtype: BodyDtype = "fp32"

    def __post_init__(self) -> None:
        section = "method.hypernetwork"
        choices = {
            "state": State,
            "sharing": Sharing,
            "outputs": Outputs,
            "gradient_normalisation": GradientNormalisation,
            "dtype": BodyDtype,
        }
        for name, kind in choices.items():
            require_choice(f"{section}.{name}", getattr(self, name), get_args(kind))
        require_flag(f"{section}.embeddings", self.embeddings)
        self._default_of(section, "relaxation", 0.5, "state", "damped")
        if self.relaxation is not None:
            require_number(f"{section}.relaxation", self.relaxation, above=0, most=1)
        self._default_of(section, "gradient_decay", 0.99, "gradient_normalisation", "token_rms")
        decay = 0.99 if self.gradient_decay is None else self.gradient_decay
        require_number(f"{section}.gradient_decay", decay, least=0)
        require(decay < 1, f"{section}.gradient_decay", decay, "must be below 1", "lower it")
        self._choose_size(section)

    def _default_of(self, section: str, name: str, default: float, of: str, choice: str) -> None:
        """Fill in a value that only one choice has; refuse it for the others."""
        chosen = getattr(self, of)
        if chosen == choice:
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        elif getattr(self, name) is not None:
            raise UserError(
                f"{section}.{name} is for {of} {choice!r}, but {section}.{of} is {chosen!r}; "
                "leave it out."
            )

    def _choose_size(self, section: str) -> None:
        if self.preset is not None and self.body is not None:
            raise UserError(
                f"{section} has both preset {self.preset!r} and body {self.body!r}; a preset says "
                "body and sizes: leave one of them out."
            )
        if not isinstance(self.sizes, Mapping):
            raise UserError(f"{section}.sizes is {self.sizes!r}, but must be a section of keys.")
        if self.body is None:
            require(
                not self.sizes,
                f"{section}.sizes",
                dict(self.sizes),
                "sizes are of a body, and none is named",
                f"name {section}.body",
            )
            object.__setattr__(self, "preset", _PAPER if self.preset is None else self.preset)
            require_choice(f"{section}.preset", self.preset, PRESETS)
            return
        require_choice(f"{section}.body", self.body, BODIES)
        known = {size.name for size in fields(BODIES[self.body])}
        known_fields(f"{section}.sizes", self.sizes, known)
        whole = {n: tuple(v) if isinstance(v, list) else v for n, v in self.sizes.items()}
        object.__setattr__(self, "sizes", whole)
        BODIES[self.body](**whole)

    @property
    def config(self) -> BodyConfig:
        """The size of the body."""
        if self.body is None:
            return PRESETS[str(self.preset)]
        config: BodyConfig = BODIES[self.body](**self.sizes)
        return config


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


@dataclass(frozen=True, kw_only=True)
class MagnitudeSettings:
    """DoRA's magnitude, which is learned directly, also beside generated factors.

    ``form``: "rows", one number for each output (Liu et al. 2024), or "scalar", one for the matrix
    (HyperAdaLoRA, Appendix B). ``detach_norm``: whether the norm it is divided by is a constant to
    the gradient, as in DoRA's section 4.3; of "rows" alone, and True without it.

    Raises:
        UserError: a value is not one of the choices, or is for another form.

    >>> MagnitudeSettings().detach_norm
    True
    """

    form: MagnitudeForm = "rows"
    detach_norm: bool | None = None

    def __post_init__(self) -> None:
        require_choice("method.magnitude.form", self.form, get_args(MagnitudeForm))
        if self.form == "scalar":
            if self.detach_norm is not None:
                raise UserError(
                    "method.magnitude.detach_norm is for form 'rows', but method.magnitude.form is "
                    "'scalar', which divides by no norm; leave it out."
                )
            return
        detach = True if self.detach_norm is None else self.detach_norm
        require_flag("method.magnitude.detach_norm", detach)
        object.__setattr__(self, "detach_norm", detach)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    """Which ranks DyLoRA's steps train (arXiv 2210.07558, section 4.1).

    Each step draws a rank, uniformly from ``lowest`` to ``highest`` (None: ``init_rank``), of which
    the first components are used and learn. ``draw``: one rank "shared" by all matrices, or one for
    "each". ``frozen``: only the last of the components in use learns, the others are read.

    Raises:
        UserError: a value out of range; the field, the rule and the remedy are named.

    >>> SamplingSettings(lowest=2).draw
    'shared'
    """

    lowest: int = 1
    highest: int | None = None
    draw: Draw = "shared"
    frozen: bool = False

    def __post_init__(self) -> None:
        section = "method.sampling"
        require_number(f"{section}.lowest", self.lowest, whole=True, least=1)
        if self.highest is not None:
            require_number(f"{section}.highest", self.highest, whole=True, least=self.lowest)
        require_choice(f"{section}.draw", self.draw, get_args(Draw))
        require_flag(f"{section}.frozen", self.frozen)
