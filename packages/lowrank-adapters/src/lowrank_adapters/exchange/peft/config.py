"""What an ``adapter_config.json`` of PEFT says, as far as it changes the numbers."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal

from lowrank_adapters.errors import AdapterError

_LIMIT = 1 << 24
_REPETITIONS = 3
# Other starts change the base's weight, which the folder does not hold.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
# These change what a layer computes, and leave no trace among the tensors.
_OTHER_COMPUTATIONS = ("alora_invocation_tokens", "use_qalora", "arrow_config")


@dataclass(frozen=True)
class PeftConfig:
    """The fields of a folder's config, checked.

    ``kind``: what its layers are. ``alphas``: by pattern, in place of ``alpha``. ``initial_rank``
    and ``masks`` (by the name of λ): of AdaLoRA. ``whole``: names of modules that are saved whole.
    """

    kind: Literal["lora", "dora", "adalora"]
    alpha: float
    alphas: dict[re.Pattern[str], float]
    rslora: bool
    dropout: float
    initial_rank: int
    masks: dict[str, list[bool]]
    whole: tuple[str, ...]

    def alpha_of(self, name: str) -> float:
        """Return the alpha of a module: by the first pattern that stands for it, as in PEFT.

        >>> alphas = {re.compile(r"(.*\\.)?(q_proj)$"): 4.0}
        >>> config = PeftConfig("lora", 8.0, alphas, False, 0.0, 0, {}, ())
        >>> config.alpha_of("layers.0.q_proj"), config.alpha_of("layers.0.v_proj")
        (4.0, 8.0)
        """
        found = (alpha for pattern, alpha in self.alphas.items() if pattern.match(name))
        return next(found, self.alpha)


def read_config(path: Path) -> PeftConfig:
    """Return what the file says.

    Raises:
        AdapterError: it is missing or no JSON object; a field is not what it must be; or the
            adapter is of a kind that is not read here. The field is named.
    """
    config = _read(path)
    try:
        return _parse(config)
    except AdapterError as error:
        raise AdapterError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; give the folder that PEFT saved.")
    if path.stat().st_size > _LIMIT:
        raise AdapterError(f"{path} has {path.stat().st_size} bytes, too many for a config.")
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise AdapterError(f"{path} is no JSON: {error}.") from error
    if not isinstance(config, dict):
        raise AdapterError(f"{path} holds a {type(config).__name__}, expected an object.")
    return config


def _parse(config: dict[str, Any]) -> PeftConfig:
    peft_type = config.get("peft_type")
    if peft_type not in ("LORA", "ADALORA"):
        raise AdapterError(f"peft_type is {shown(peft_type)}; 'LORA' and 'ADALORA' are read here.")
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        raise AdapterError(
            f"init_lora_weights is {shown(start)}, which changes the base's weights; convert the "
            "adapter with PEFT (path_initial_model_for_weight_conversion) and save it again."
        )
    for field in _OTHER_COMPUTATIONS:
        if config.get(field):
            raise AdapterError(f"{field} is set; adapters with it are not read here.")
    adalora = peft_type == "ADALORA"
    if adalora and config.get("alpha_pattern"):
        raise AdapterError(
            "alpha_pattern is set, which PEFT's AdaLoRA does not apply; leave it out if the "
            "adapter was trained without it."
        )
    alpha = _number(config, "lora_alpha", 8)
    initial_rank = _rank(config, "init_r", 12) if adalora else 0
    return PeftConfig(
        kind="adalora" if adalora else "dora" if config.get("use_dora") else "lora",
        alpha=float(initial_rank) if adalora and alpha <= 0 else alpha,
        alphas={} if adalora else _alphas(config),
        rslora=bool(config.get("use_rslora")) and not adalora,
        dropout=_number(config, "lora_dropout", 0.0),
        initial_rank=initial_rank,
        masks=_masks(config) if adalora else {},
        whole=_names(config, "modules_to_save"),
    )


def _number(fields: dict[str, Any], name: str, default: float) -> float:
    value = fields.get(name, default)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    # Compared, not converted: a whole number may be too large for a float.
    if is_number and abs(value) <= sys.float_info.max:
        return float(value)
    raise AdapterError(f"{name} is {shown(value)}, expected a finite number.")


def _rank(fields: dict[str, Any], name: str, default: int) -> int:
    value = fields.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise AdapterError(f"{name} is {shown(value)}, expected a whole number of at least 1.")
    return value


def _alphas(config: dict[str, Any]) -> dict[re.Pattern[str], float]:
    alphas = {}
    patterns = _object(config, "alpha_pattern")
    for pattern in patterns:
        # A folder is from a stranger, and a pattern of many repetitions can take for ever.
        if re.search(r"\)[*+?{]", pattern) or len(re.findall(r"[*+{]", pattern)) > _REPETITIONS:
            raise AdapterError(
                f"alpha_pattern has {pattern!r}, expected at most {_REPETITIONS} repetitions, and "
                "none of a group; write it plainer."
            )
        try:
            # For the end of a name, from a dot on.
            compiled = re.compile(rf"(.*\.)?({pattern})$")
        except re.error as error:
            raise AdapterError(
                f"alpha_pattern has {pattern!r}, which is no pattern: {error.msg}."
            ) from error
        alphas[compiled] = _number(patterns, pattern, 0)
    return alphas


def _masks(config: dict[str, Any]) -> dict[str, list[bool]]:
    masks = _object(config, "rank_pattern")
    for name, mask in masks.items():
        if not isinstance(mask, list) or not all(isinstance(alive, bool) for alive in mask):
            raise AdapterError(
                f"rank_pattern has {shown(mask)} for {name}, expected a list of bools."
            )
    return masks


def _object(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name) or {}
    if not isinstance(value, dict):
        raise AdapterError(f"{name} is {shown(value)}, expected an object.")
    return value


def _names(config: dict[str, Any], name: str) -> tuple[str, ...]:
    value = config.get(name) or []
    if not isinstance(value, list) or not all(isinstance(entry, str) for entry in value):
        raise AdapterError(f"{name} is {shown(value)}, expected a list of names.")
    return tuple(value)
