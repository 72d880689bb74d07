"""A base whose files are of another model than the configuration names is refused.

Each of these would train, and on other numbers than the model of the files computes.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

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
            ["model.num_heads=8", "model.num_kv_heads=4"],
            "{path} is of another model: its num_attention_heads is 4, but 8 in "
            "torchtune.models.llama3.llama3; make model and checkpointer name the same model.",
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
