"""Whether the files of a base are of the model that the configuration names."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from torchtune.modules import MultiHeadAttention

from hyper_tune.errors import UserError
from hyper_tune.torchtune.settings import RecipeSettings
from lowrank_adapters import LowRankLinear, inside_adapters

# Hugging Face's names of what torchtune's checkpointer calls a model type.
HF_TYPES = {
    "LLAMA2": "llama",
    "LLAMA3": "llama",
    "LLAMA3_2": "llama",
    "MISTRAL": "mistral",
    "GEMMA": "gemma",
    "QWEN2": "qwen2",
}


# Hugging Face's names of a builder's keys.
_HF_KEYS = {
    "vocab_size": "vocab_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "tie_word_embeddings": "tie_word_embeddings",
    "norm_eps": "rms_norm_eps",
}


def check_config_file(settings: RecipeSettings) -> None:
    """Compare Hugging Face's config.json with the checkpointer's model type and the model's keys.

    Raises:
        UserError: it cannot be read, lacks what is needed, or is of another type or size.
    """
    path = Path(settings.checkpointer["checkpoint_dir"]) / "config.json"
    there, model_type = _read(path), str(settings.checkpointer["model_type"])
    if "num_attention_heads" not in there:
        raise UserError(f"{path} has no num_attention_heads; give the config.json of the model.")
    of_type = [name for name, kind in HF_TYPES.items() if kind == there.get("model_type")]
    if of_type and model_type not in of_type:
        raise UserError(
            f"checkpointer.model_type is {model_type}, but {path} is of a model of type "
            f"{there['model_type']}; set it to {' or '.join(of_type)}, or name another folder."
        )
    for key, name in _HF_KEYS.items():
        given, expected = settings.model.get(key), there.get(name)
        if given is not None and expected is not None and not _same(given, expected):
            raise UserError(
                f"model.{key} is {given!r}, but {path} has {name} {expected!r}; set model.{key}="
                f"{expected}, or checkpointer.checkpoint_dir to the folder of the model you mean."
            )


def _same(given: object, expected: object) -> bool:
    """Whether they are equal, numbers with a point up to how a float32 is written."""
    if isinstance(given, float) and isinstance(expected, float):
        return math.isclose(given, expected, rel_tol=1e-6)
    return given == expected


def _read(path: Path) -> dict[str, Any]:
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; fetch it again.") from error
    return loaded if isinstance(loaded, dict) else {}


def refuse_other_model(
    model: nn.Module,
    shapes: Mapping[str, tuple[int, ...]],
    layers: Mapping[str, LowRankLinear],
    settings: RecipeSettings,
) -> None:
    """Compare the names and ``shapes`` of a checkpoint's tensors, and its attention, with a model.

    Raises:
        UserError: they differ; the first difference is named.
    """
    got = {inside_adapters(name, layers): shape for name, shape in shapes.items()}
    factors = {
        f"{name}.{key}"
        for name, layer in layers.items()
        for key, _ in [*layer.factors(), *layer.named_buffers(recurse=False)]
    }
    expected = {
        name: tuple(value.shape)
        for name, value in model.state_dict().items()
        if name not in factors
    }
    wrong = [name for name in expected.keys() | got.keys() if expected.get(name) != got.get(name)]
    if wrong:
        first = min(wrong)
        raise UserError(
            f"the checkpoint in {settings.checkpointer['checkpoint_dir']} is of another model: "
            f"{first} is {got.get(first, 'missing')} there, but {expected.get(first, 'absent')} in "
            f"{settings.model['_component_']} ({len(wrong)} tensors differ); "
            "make model and checkpointer name the same model."
        )
    _refuse_other_attention(model, settings)


def _refuse_other_attention(model: nn.Module, settings: RecipeSettings) -> None:
    """Refuse heads or rotations of another model, which no tensor's shape tells."""
    path = Path(settings.checkpointer["checkpoint_dir"]) / "config.json"
    said = _attention_of_file(_read(path))
    attention = next(module for module in model.modules() if isinstance(module, MultiHeadAttention))
    rotation = attention.pos_embeddings
    has = {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "rope_theta": getattr(rotation, "base", None),
        "factor of the rotation's scaling": getattr(rotation, "scale_factor", 1),
    }
    for name, value in said.items():
        if value is not None and has[name] is not None and value != has[name]:
            raise UserError(
                f"{path} is of another model: its {name} is {value}, but {has[name]} in "
                f"{settings.model['_component_']}; make model and checkpointer name the same model."
            )


def _attention_of_file(there: Mapping[str, Any]) -> dict[str, Any]:
    """Return what config.json says of heads and rotation, in transformers' old form or new."""
    rotation = there.get("rope_parameters") or there.get("rope_scaling") or {}
    theta = there.get("rope_theta", rotation.get("rope_theta"))
    return {
        "num_attention_heads": there["num_attention_heads"],
        "num_key_value_heads": there.get("num_key_value_heads"),
        "rope_theta": theta,
        "factor of the rotation's scaling": None if theta is None else rotation.get("factor", 1),
    }
