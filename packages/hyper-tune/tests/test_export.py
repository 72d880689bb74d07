"""The exported adapter, read as plain LoRA by transformers' model, gives the trained logits."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings


@pytest.mark.parametrize("family", ["llama", "llama3_2", "qwen"])
def test_exported_lora_gives_the_training_models_logits(
    tmp_path: Path,
    make_config: Callable[..., Path],
    request: pytest.FixtureRequest,
    family: str,
) -> None:
    config = make_config(**request.getfixturevalue(family), max_steps=30)
    settings = RecipeSettings.from_config(OmegaConf.load(config))
    tokens = torch.arange(3, 90).reshape(3, 29)
    with FineTuning(settings) as run:
        with torch.no_grad():
            base = torch.cat(run.model(tokens), dim=1)
        run.train()
        with torch.no_grad():
            trained = torch.cat(run.model.eval()(tokens), dim=1)
    assert (trained - base).abs().max() > 0.1

    plain = AutoModelForCausalLM.from_pretrained(settings.checkpointer["checkpoint_dir"])
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, base, rtol=1e-5, atol=1e-5)
    folder = tmp_path / "run" / "adapter"
    lora = load_file(folder / "adapter_model.safetensors")
    adapter_config = json.loads((folder / "adapter_config.json").read_text())
    scaling = adapter_config["lora_alpha"] / adapter_config["r"]
    modules = dict(plain.named_modules())
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in lora}
    assert len(names) == 14
    assert names == set(adapter_config["target_modules"])
    with torch.no_grad():
        for name in names:
            key = f"base_model.model.{name}.lora_"
            update = lora[f"{key}B.weight"] @ lora[f"{key}A.weight"]
            modules[name].weight += scaling * update
        torch.testing.assert_close(plain(tokens).logits, trained, rtol=1e-5, atol=1e-5)
