"""What one run of an encoder does: every key known, every value checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from omegaconf import DictConfig

from hyper_tune.checks import known_fields, require, require_choice, require_number, require_text
from hyper_tune.errors import UserError
from hyper_tune.hf.classification import ClassificationData
from hyper_tune.hf.scores import SCORES
from hyper_tune.method import MethodConfig
from hyper_tune.read_settings import make_settings, read_settings

SCHEDULES = ("linear", "cosine", "constant", "constant_with_warmup")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, kw_only=True)
class EncoderSettings:
    """The keys of a configuration file.

    ``model``: a folder of transformers' files, or a name on the hub. ``lr``: of the hypernetworks
    or factors; ``head_lr``: of the classification head. ``batch_size``: rows per micro-batch and
    process. Steps count optimizer steps. ``max_steps``: None trains for ``epochs``.
    ``evaluate_every_n_steps``, ``save_every_n_steps``: None is once an epoch, and 0 is never.
    ``early_stopping_patience``: evaluations without a better first metric. ``keep_best``: end with
    the checkpoint whose first metric is best. ``model_dir``, ``data_dir``: for other keys to refer
    to, as ``${data_dir}``.

    Raises:
        UserError: an unknown key, a missing one, or a value that cannot be, named with the remedy.
    """

    output_dir: Path
    model: str
    data: ClassificationData
    method: MethodConfig
    lr: float
    head_lr: float = 1e-3
    weight_decay: float = 0.0
    lr_scheduler: str = "linear"
    warmup_steps: int = 0
    epochs: int = 3
    max_steps: int | None = None
    batch_size: int = 16
    gradient_accumulation_steps: int = 1
    max_length: int = 128
    max_grad_norm: float | None = 1.0
    label_smoothing: float = 0.0
    metrics: Sequence[str] = ("accuracy",)
    evaluate_every_n_steps: int | None = None
    save_every_n_steps: int | None = None
    keep_checkpoints: int = 3
    early_stopping_patience: int | None = None
    keep_best: bool = False
    seed: int = 0
    bf16: bool = False
    device: str = "cpu"
    resume_from_checkpoint: bool = False
    model_dir: str | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        require_text("model", self.model)
        self._check_numbers()
        for name in ("keep_best", "bf16", "resume_from_checkpoint"):
            value = getattr(self, name)
            require(isinstance(value, bool), name, value, "must be True or False", "set one")
        require_choice("lr_scheduler", self.lr_scheduler, SCHEDULES)
        require_choice("device", self.device, DEVICES)
        if isinstance(self.metrics, str):
            object.__setattr__(self, "metrics", (self.metrics,))
        require(bool(self.metrics), "metrics", self.metrics, "must be at least one", "name it")
        for metric in self.metrics:
            require_choice("metrics", metric, SCORES)
        if self.keep_best and self.evaluate_every_n_steps != self.save_every_n_steps:
            raise UserError(
                f"keep_best compares evaluations with checkpoints, but evaluate_every_n_steps is "
                f"{self.evaluate_every_n_steps} and save_every_n_steps is "
                f"{self.save_every_n_steps}; make them equal."
            )
        if (self.keep_best or self.early_stopping_patience) and self.evaluate_every_n_steps == 0:
            raise UserError(
                "evaluate_every_n_steps is 0, so that there is no best checkpoint; set it, or "
                "leave keep_best and early_stopping_patience out."
            )

        if self.data.regression and self.label_smoothing:
            raise UserError(
                f"label_smoothing is {self.label_smoothing}, which is for classes, but data is a "
                "regression; set it to 0."
            )

    def _check_numbers(self) -> None:
        for name in ("epochs", "batch_size", "gradient_accumulation_steps", "max_length"):
            require_number(name, getattr(self, name), whole=True, least=1)
        require_number("keep_checkpoints", self.keep_checkpoints, whole=True, least=1)
        require_number("seed", self.seed, whole=True, least=0)
        require_number("warmup_steps", self.warmup_steps, whole=True, least=0)
        for name in ("max_steps", "early_stopping_patience"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), whole=True, least=1)
        for name in ("evaluate_every_n_steps", "save_every_n_steps"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), whole=True, least=0)
        for name in ("lr", "head_lr"):
            require_number(name, getattr(self, name), above=0)
        require_number("weight_decay", self.weight_decay, least=0)
        require_number("label_smoothing", self.label_smoothing, least=0, most=0.9)
        if self.max_grad_norm is not None:
            require_number("max_grad_norm", self.max_grad_norm, above=0)

    @classmethod
    def from_config(cls, config: DictConfig) -> "EncoderSettings":
        """Read and check a whole configuration, after command-line overrides."""
        values = read_settings(cls, config)
        data = values["data"]
        if not isinstance(data, Mapping):
            raise UserError("configuration: data must be a section of keys.")
        known_fields("data", data, {entry.name for entry in fields(ClassificationData)})
        values["data"] = make_settings("data", ClassificationData, data)
        return make_settings("configuration", cls, values)
