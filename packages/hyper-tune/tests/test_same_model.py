"""A base whose files are of another model than the configuration names is refused.

Each of these would train, and on other numbers than the model of the files computes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hyper_tune import UserError
from hyper_tune.torchtune import recipe, same_model
from hyper_tune.torchtune.model_types import MODEL_TYPES
from hyper_tune.torchtune.same_model import HF_TYPES

Failing = Callable[..., str]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["checkpointer.model_type=QWEN2"],
            "checkpointer.model_type is QWEN2, but {path} is of a model of type llama; set it to "
            "LLAMA2 or LLAMA3 or LLAMA3_2, or name another folder.",
        ),
        (
            ["model.rope_base=10000"],
            "{path} is of another model: its rope_theta is 500000.0, but 10000 in "
            "torchtune.models.llama3.llama3; make model and checkpointer name the same model.",
        ),
        (
            ["model=torchtune.models.llama3_1.llama3_1"],
            "{path} is of another model: its factor of the rotation's scaling is 1, but 8 in "
            "torchtune.models.llama3_1.llama3_1; make model and checkpointer name the same model.",
        ),
    ],
)
def test_tensors_of_equal_shapes_do_not_make_it_the_model(
    fails: Failing, llama: dict[str, Any], overrides: list[str], message: str
) -> None:
    path = Path(llama["checkpointer"]["checkpoint_dir"]) / "config.json"
    assert fails(*overrides) == message.format(path=path)


def test_a_scaled_rotation_must_be_scaled_alike(fails: Failing, llama3_2: dict[str, Any]) -> None:
    message = fails("model.scale_factor=8", **llama3_2)
    assert "its factor of the rotation's scaling is 32.0, but 8 in torchtune.models.ll" in message


@pytest.mark.parametrize(
    ("key", "value", "name", "there"),
    [
        ("vocab_size", 200, "vocab_size", 269),
        ("num_layers", 1, "num_hidden_layers", 2),
        ("num_layers", 3, "num_hidden_layers", 2),
        ("num_heads", 5, "num_attention_heads", 4),
        ("num_kv_heads", 4, "num_key_value_heads", 2),
        ("embed_dim", 64, "hidden_size", 32),
        ("intermediate_dim", 64, "intermediate_size", 48),
        ("norm_eps", 0.001, "rms_norm_eps", 1e-05),
    ],
)
def test_a_key_that_differs_from_config_json_is_named_before_anything_is_built(
    fails: Failing,
    llama: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    key: str,
    value: float,
    name: str,
    there: float,
) -> None:
    monkeypatch.setattr(recipe, "build_on_meta", pytest.fail)
    path = Path(llama["checkpointer"]["checkpoint_dir"]) / "config.json"
    assert fails(f"model.{key}={value}") == (
        f"model.{key} is {value}, but {path} has {name} {there}; set model.{key}={there}, or "
        "checkpointer.checkpoint_dir to the folder of the model you mean."
    )


def test_a_float32_of_config_json_is_the_number_that_it_was_written_for(tmp_path: Path) -> None:
    there = {"num_attention_heads": 4, "model_type": "llama", "rms_norm_eps": 9.999999747378752e-06}
    (tmp_path / "config.json").write_text(json.dumps(there))
    settings: Any = SimpleNamespace(
        checkpointer={"checkpoint_dir": tmp_path, "model_type": "LLAMA3"}, model={"norm_eps": 1e-5}
    )
    same_model.check_config_file(settings)
    settings.model["norm_eps"] = 1.01e-5
    with pytest.raises(UserError, match=r"has rms_norm_eps 9\.999"):
        same_model.check_config_file(settings)


def test_tied_embeddings_are_compared_with_config_json(
    fails: Failing, qwen: dict[str, Any]
) -> None:
    message = fails("model.tie_word_embeddings=True", **qwen)
    assert message.startswith("model.tie_word_embeddings is True, but ")
    assert "config.json has tie_word_embeddings False; set model.tie_word_emb" in message


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.intermediate_dim=64",
            "layers.0.mlp.w1.weight is (48, 32) there, but (64, 32) in torchtune.models.llama3."
            "llama3 (6 tensors differ)",
        ),
        ("model.num_layers=1", "layers.1.attn.k_proj.weight is (16, 32) there, but absent in "),
        ("model.num_layers=3", "layers.2.attn.k_proj.weight is missing there, but (16, 32) in "),
        (
            "model.num_heads=8",
            "layers.0.attn.k_proj.weight is (16, 32) there, but (8, 32) in ",
        ),
    ],
)
def test_where_config_json_does_not_say_the_headers_of_the_weights_do(
    fails: Failing,
    llama: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    override: str,
    message: str,
) -> None:
    # As of a builder that has the sizes in it, so that no key says them.
    monkeypatch.setattr(same_model, "_HF_KEYS", {})
    monkeypatch.setattr(recipe, "open_training_data", pytest.fail)
    said = fails(override)
    assert said.startswith(
        f"the checkpoint in {llama['checkpointer']['checkpoint_dir']} is of another model: "
    )
    assert message in said


def test_other_heads_of_equal_tensors_are_told_by_config_json(
    fails: Failing, llama: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(same_model, "_HF_KEYS", {})
    path = Path(llama["checkpointer"]["checkpoint_dir"]) / "config.json"
    assert fails("model.num_heads=8", "model.num_kv_heads=4") == (
        f"{path} is of another model: its num_attention_heads is 4, but 8 in "
        "torchtune.models.llama3.llama3; make model and checkpointer name the same model."
    )


@pytest.mark.parametrize(
    "rotation",
    [
        {"rope_theta": 500000.0, "rope_scaling": None},
        {"rope_theta": 500000.0},
        {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"}},
        {},
    ],
)
@pytest.mark.filterwarnings("ignore:the pruning schedule leaves", "ignore:lr_scheduler.num_warm")
def test_the_forms_that_transformers_writes_are_read(
    run: Callable[..., None],
    make_config: Callable[..., Path],
    llama: dict[str, Any],
    tmp_path: Path,
    rotation: dict[str, Any],
) -> None:
    folder = shutil.copytree(llama["checkpointer"]["checkpoint_dir"], tmp_path / "base")
    there = json.loads((folder / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        there.pop(key, None)
    (folder / "config.json").write_text(json.dumps({**there, **rotation}))
    run(make_config(max_steps=1), f"checkpointer.checkpoint_dir={folder}")


def test_every_model_type_has_its_name_at_hugging_face() -> None:
    assert HF_TYPES.keys() == set(MODEL_TYPES)
