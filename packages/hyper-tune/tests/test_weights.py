"""The base's weights, one tensor at a time, are those of torchtune's checkpointer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torchtune import training
from transformers import Gemma2Config, Gemma2ForCausalLM, Phi3Config, Phi3ForCausalLM

from hyper_tune.torchtune.weights import WeightFiles

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
}


def as_the_checkpointer_reads(
    folder: Path, files: list[str], kind: str, output: Path
) -> dict[str, Any]:
    checkpointer = training.FullModelHFCheckpointer(
        checkpoint_dir=str(folder), checkpoint_files=files, model_type=kind, output_dir=str(output)
    )
    loaded: dict[str, Any] = checkpointer.load_checkpoint()[training.MODEL_KEY]
    return loaded


def assert_same(weights: WeightFiles, expected: dict[str, torch.Tensor]) -> None:
    found = {name: tensor.clone() for name, tensor in weights.tensors()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    assert weights.shapes() == {name: tuple(tensor.shape) for name, tensor in expected.items()}


@pytest.mark.parametrize("family", ["llama", "qwen", "llama3_2", "tied_qwen"])
def test_llama_and_qwen(request: pytest.FixtureRequest, tmp_path: Path, family: str) -> None:
    section = request.getfixturevalue(family)["checkpointer"]
    folder, files = Path(section["checkpoint_dir"]), section["checkpoint_files"]
    expected = as_the_checkpointer_reads(folder, files, section["model_type"], tmp_path / "out")
    assert_same(WeightFiles(folder, files, section["model_type"]), expected)


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_weights_that_are_split_or_reordered(tmp_path: Path, kv_heads: int) -> None:
    torch.manual_seed(0)
    sizes = SIZES | {"num_key_value_heads": kv_heads}
    models = {
        "PHI3_MINI": Phi3ForCausalLM(Phi3Config(**sizes)),
        "GEMMA2": Gemma2ForCausalLM(Gemma2Config(**sizes, head_dim=16)),
    }
    for kind, model in models.items():
        folder = tmp_path / kind
        model.save_pretrained(folder)
        files = ["model.safetensors"]
        expected = as_the_checkpointer_reads(folder, files, kind, tmp_path / "out")
        assert_same(WeightFiles(folder, files, kind), expected)


def test_no_two_tensors_are_open_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(3)]
    save_file({name: torch.ones(2, 4) for name in names}, tmp_path / "a.safetensors")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(heads))
    opened: list[list[str]] = []

    class Recorded:
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.file = safe_open(*args, **kwargs)
            opened.append([])

        def __enter__(self) -> "Recorded":
            return self

        def __exit__(self, *_: object) -> None:
            self.file = None

        def keys(self) -> list[str]:
            return self.file.keys()

        def get_tensor(self, name: str) -> torch.Tensor:
            opened[-1].append(name)
            return self.file.get_tensor(name)

    monkeypatch.setattr("hyper_tune.torchtune.weights.safe_open", Recorded)
    tensors = WeightFiles(tmp_path, ["a.safetensors"], "LLAMA3").tensors()
    assert opened == []
    for _ in range(2):
        next(tensors)
    assert opened == [[], [names[0]], [names[1]]]


def test_a_name_that_torchtune_does_not_know_is_a_value_error(tmp_path: Path) -> None:
    save_file({"model.layers.0.extra": torch.ones(2)}, tmp_path / "a.safetensors")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "hidden_size": 4}
    (tmp_path / "config.json").write_text(json.dumps(heads))
    weights = WeightFiles(tmp_path, ["a.safetensors"], "LLAMA3")
    with pytest.raises(ValueError, match=r"unexpected key: \"model\.layers\.0\.extra\""):
        weights.shapes()
