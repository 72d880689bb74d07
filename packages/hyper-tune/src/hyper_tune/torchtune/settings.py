"""A recipe's configuration: every key known, every value checked before any work."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from hyper_tune.checks import (
    known_fields,
    require,
    require_choice,
    require_flag,
    require_number,
    require_text,
)
from hyper_tune.errors import UserError
from hyper_tune.layout import check_dims
from hyper_tune.method import MethodConfig
from hyper_tune.read_settings import make_settings, read_settings
from hyper_tune.split import SplitGeneration
from hyper_tune.torchtune.model_types import check_model_type

Component = Mapping[str, Any]

COMPONENTS = (
    "model",
    "tokenizer",
    "checkpointer",
    "dataset",
    "dataset_val",
    "optimizer",
    "lr_scheduler",
    "metric_logger",
)
CHECKPOINTERS = ("torchtune.training.FullModelHFCheckpointer",)
# Those of torchtune's checkpointer. Only the folder, its files and their model are used here.
CHECKPOINTER_KEYS = {
    *("_component_", "checkpoint_dir", "checkpoint_files", "model_type", "output_dir"),
    *("recipe_checkpoint", "adapter_checkpoint", "resume_from_checkpoint"),
    *("safe_serialization", "should_load_recipe_state"),
}
# Of these, what a run does without: its own keys say whether it resumes and from where.
CHECKPOINTER_UNREAD = {
    "recipe_checkpoint": None,
    "adapter_checkpoint": None,
    "resume_from_checkpoint": False,
    "should_load_recipe_state": False,
    "safe_serialization": True,
}
TOKENIZER_FILES = ("path", "merges_file", "special_tokens_path")
DEVICES = ("cpu", "cuda")
DTYPES = ("fp32", "bf16")


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """What one run does; the keys of a configuration file.

    Values that hold ``_component_`` are built by torchtune. ``batch_size`` counts samples per
    micro-batch and process; an optimizer step sees ``batch_size * gradient_accumulation_steps *
    processes`` of them. Steps count optimizer steps. ``model_dir`` and ``data_dir`` are there for
    other keys to refer to, as ``${model_dir}``.

    Raises:
        UserError: an unknown key, a missing one, or a value out of range, named with the remedy.
    """

    output_dir: Path
    model: Component
    tokenizer: Component
    checkpointer: Component
    dataset: Component
    optimizer: Component
    lr_scheduler: Component
    method: MethodConfig
    base_model: str | None = None
    dataset_val: Component | None = None
    validation_fraction: float | None = None
    exact_match: Component | None = None
    seed: int = 0
    shuffle: bool = True
    batch_size: int = 1
    gradient_accumulation_steps: int = 1
    epochs: int = 1
    max_steps: int | None = None
    clip_grad_norm: float | None = None
    compile: bool = False
    enable_activation_checkpointing: bool = False
    enable_activation_offloading: bool = False
    data_parallel_shard_dim: int = -1
    data_parallel_replicate_dim: int = 1
    fsdp_cpu_offload: bool = False
    split_generation: SplitGeneration = False
    device: str = "cpu"
    dtype: str = "fp32"
    quantize_base: bool = False
    save_every_n_steps: int = 100
    keep_checkpoints: int = 3
    validate_every_n_steps: int | None = None
    metric_logger: Component | Sequence[Component] | None = None
    log_every_n_steps: int = 10
    diagnose_every_n_steps: int | None = None
    max_skipped_steps: int = 5
    resume_from_checkpoint: bool = False
    collective_timeout_seconds: float = 600
    debug_rank_agreement: bool = False
    model_dir: str | None = None
    data_dir: str | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        for name in (
            "shuffle",
            "compile",
            "enable_activation_checkpointing",
            "enable_activation_offloading",
            "fsdp_cpu_offload",
            "quantize_base",
            "resume_from_checkpoint",
            "debug_rank_agreement",
        ):
            require_flag(name, getattr(self, name))
        require_choice("device", self.device, DEVICES)
        require_choice("dtype", self.dtype, DTYPES)
        check_dims(self.data_parallel_shard_dim, self.data_parallel_replicate_dim)
        self._check_offloading()
        self._check_split()
        self._check_checkpointer()
        self._check_tokenizer()
        for name in ("base_model", "model_dir", "data_dir"):
            if getattr(self, name) is not None:
                require_text(name, getattr(self, name))
        if self.exact_match is not None:
            _check_exact_match(self.exact_match)

    def _check_numbers(self) -> None:
        require_number("seed", self.seed, whole=True)
        for name in (
            "batch_size",
            "gradient_accumulation_steps",
            "epochs",
            "save_every_n_steps",
            "keep_checkpoints",
            "max_skipped_steps",
            "log_every_n_steps",
        ):
            require_number(name, getattr(self, name), whole=True, least=1)
        for name in ("max_steps", "validate_every_n_steps", "diagnose_every_n_steps"):
            if getattr(self, name) is not None:
                require_number(name, getattr(self, name), whole=True, least=1)
        require_number("collective_timeout_seconds", self.collective_timeout_seconds, above=0)
        if self.validation_fraction is not None:
            require_number("validation_fraction", self.validation_fraction, above=0, most=0.5)
            if self.dataset_val is not None:
                raise UserError(
                    "validation_fraction and dataset_val are both set; leave one of them null."
                )
        if self.clip_grad_norm is not None:
            require_number("clip_grad_norm", self.clip_grad_norm, above=0)

    def _check_offloading(self) -> None:
        for name in ("enable_activation_offloading", "fsdp_cpu_offload"):
            rule = "moves tensors from a GPU's memory to the CPU's, and device is 'cpu'"
            remedy = "set device=cuda, or turn it off"
            wanted = getattr(self, name)
            require(not wanted or self.device == "cuda", name, wanted, rule, remedy)
        magnitude = self.method.magnitude
        if self.fsdp_cpu_offload and magnitude is not None and magnitude.form == "rows":
            raise UserError(
                f"fsdp_cpu_offload is True, but {self.method.name} reads the norms of the base's "
                "rows, which GPUs cannot gather from the CPU's memory; turn it off, or set "
                "method.magnitude.form=scalar."
            )
        fits = self.enable_activation_checkpointing or not self.enable_activation_offloading
        rule = "moves what activation checkpointing keeps"
        remedy = "set enable_activation_checkpointing=True"
        require(fits, "enable_activation_offloading", True, rule, remedy)

    def _check_split(self) -> None:
        name, value = "split_generation", self.split_generation
        rule, remedy = "must be True, False or auto", "choose one"
        require(isinstance(value, bool) or value == "auto", name, value, rule, remedy)
        fits = value is not True or self.method.hypernetwork is not None
        rule = f"{self.method.name} has no hypernetworks"
        require(fits, name, value, rule, "remove it, or choose a method that has")

    def _check_checkpointer(self) -> None:
        component = self.checkpointer["_component_"]
        rule = "reads other files than .safetensors"
        require(
            component in CHECKPOINTERS, "checkpointer", component, rule, f"use {CHECKPOINTERS[0]}"
        )
        for key, usual in CHECKPOINTER_UNREAD.items():
            if self.checkpointer.get(key, usual) != usual:
                raise UserError(f"checkpointer.{key} is not read; remove it.")
        known_fields("checkpointer", self.checkpointer, CHECKPOINTER_KEYS)
        check_model_type(self.checkpointer.get("model_type"))
        if "checkpoint_dir" not in self.checkpointer:
            raise UserError(
                "checkpointer.checkpoint_dir is missing; give the folder of the base's weights."
            )
        require_text("checkpointer.checkpoint_dir", self.checkpointer["checkpoint_dir"])

    def _check_tokenizer(self) -> None:
        for key in TOKENIZER_FILES:
            if self.tokenizer.get(key) is not None:
                require_text(f"tokenizer.{key}", self.tokenizer[key])
        for name, section in {"tokenizer": self.tokenizer, "model": self.model}.items():
            if section.get("max_seq_len") is not None:
                longest = section["max_seq_len"]
                require_number(f"{name}.max_seq_len", longest, whole=True, least=1)

    @property
    def metric_loggers(self) -> Sequence[Component]:
        """The sections of the loggers, of which there may be none, one or a list."""
        given = self.metric_logger
        if given is None or isinstance(given, Mapping):
            return [given] if given else []
        return given

    @classmethod
    def from_config(cls, config: DictConfig) -> "RecipeSettings":
        """Read and check a whole configuration, after command-line overrides."""
        values = read_settings(cls, config)
        for key in COMPONENTS:
            several = key == "metric_logger" and isinstance(values.get(key), list)
            for section in values[key] if several else [values.get(key)]:
                _check_component(key, section)
        return make_settings("configuration", cls, values)


def _check_component(key: str, section: Any) -> None:
    """Refuse a section that names no component; one that may be null may be."""
    if section is None:
        return
    if not isinstance(section, dict) or not isinstance(section.get("_component_"), str):
        raise UserError(
            f"configuration: {key} names no component; write {key}._component_=NAME, or give a "
            "section with that key."
        )


def _check_exact_match(section: Any) -> None:
    if not isinstance(section, Mapping):
        raise UserError(f"exact_match is {section!r}, but must be a section of keys, such as path.")
    known_fields("exact_match", section, {"path", "format", "max_new_tokens"})
    if not section.get("path"):
        raise UserError("exact_match.path is missing; give a file of questions, or null.")
    require_text("exact_match.path", section["path"])
    longest = section.get("max_new_tokens", 1)
    require_number("exact_match.max_new_tokens", longest, whole=True, least=1)


def warn_of_no_effect(settings: RecipeSettings, total_steps: int, *, has_held_out: bool) -> None:
    """Warn of settings that change nothing in a run of ``total_steps``."""
    if settings.validate_every_n_steps is not None and not has_held_out:
        warnings.warn(
            "validate_every_n_steps is set, but dataset_val is null and validation_fraction too; "
            "nothing is validated.",
            stacklevel=1,
        )
    warmup = settings.lr_scheduler.get("num_warmup_steps")
    if isinstance(warmup, int) and warmup >= total_steps:
        warnings.warn(
            f"lr_scheduler.num_warmup_steps is {warmup}, but the run has {total_steps} steps, so "
            "that the learning rate never reaches optimizer.lr; lower it.",
            stacklevel=1,
        )
