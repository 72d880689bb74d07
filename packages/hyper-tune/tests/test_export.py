"""What is exported gives, read by transformers, the logits of the model that was trained."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hyper_tune.cli.main import main
from hyper_tune.torchtune.fine_tune import fine_tune
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

FAMILIES = ["llama", "qwen", "llama3_2", "tied_qwen"]
TOKENS = torch.arange(3, 90).reshape(3, 29)


@pytest.mark.parametrize("family", FAMILIES)
def test_exported_lora_gives_the_training_models_logits(
    tmp_path: Path,
    make_config: Callable[..., Path],
    request: pytest.FixtureRequest,
    family: str,
) -> None:
    config = make_config(**request.getfixturevalue(family), max_steps=30)
    settings = RecipeSettings.from_config(OmegaConf.load(config))
    tokens = TOKENS
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


def with_adapter(base: str, folder: Path) -> tuple[torch.Tensor, dict[str, int]]:
    """The logits of the base with an adapter's updates added, as PEFT reads them, and its ranks."""
    model = AutoModelForCausalLM.from_pretrained(base)
    modules, ranks = dict(model.named_modules()), {}
    lora = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    with torch.no_grad():
        for name in config["target_modules"]:
            key = f"base_model.model.{name}.lora_"
            a, b = lora[f"{key}A.weight"], lora[f"{key}B.weight"]
            ranks[name] = config["rank_pattern"].get(name, config["r"])
            assert len(a) == ranks[name]
            alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
            modules[name].weight += alpha / ranks[name] * b @ a
        return model(TOKENS).logits, ranks


@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_a_compact_adapter_gives_the_padded_ones_logits(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    request: pytest.FixtureRequest,
    family: str,
) -> None:
    keys = request.getfixturevalue(family)
    run(make_config(**keys, max_steps=12))
    folder, base = tmp_path / "compact", keys["checkpointer"]["checkpoint_dir"]
    assert main(["export", str(tmp_path / "run"), str(folder), "--compact"]) == 0
    compact, ranks = with_adapter(base, folder)
    padded, one_rank = with_adapter(base, tmp_path / "run/adapter")
    live = json.loads((tmp_path / "run/summary.json").read_text())["ranks"]
    assert sorted(ranks.values()) == sorted(rank for rank in live.values() if rank)
    assert len(set(ranks.values())) > 1
    assert set(one_rank.values()) == {max(live.values())}
    torch.testing.assert_close(compact, padded, rtol=1e-5, atol=1e-5)
    plain = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        assert (compact - plain(TOKENS).logits).abs().max() > 0.01


def test_a_merged_model_is_not_compact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["export", str(tmp_path), str(tmp_path / "out"), "--format", "merged", "--compact"]
    assert main(command) == 2
    assert "--compact is for --format peft; a merged model has no ranks." in capsys.readouterr().err


def trained_logits(config: Path) -> torch.Tensor:
    """Train, and return what the model says to `TOKENS` at the end."""
    loaded = OmegaConf.load(config)
    fine_tune(loaded)
    # At its last step, a resumed run has nothing to train, and holds the model that was trained.
    settings = RecipeSettings.from_config(OmegaConf.merge(loaded, {"resume_from_checkpoint": True}))
    with FineTuning(settings) as run, torch.no_grad():
        run.method.write_factors_()
        return torch.cat(run.model.eval()(TOKENS), dim=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_gives_the_training_models_logits(
    tmp_path: Path,
    make_config: Callable[..., Path],
    request: pytest.FixtureRequest,
    family: str,
) -> None:
    keys = request.getfixturevalue(family)
    config = make_config(**keys, max_steps=12)
    trained = trained_logits(config)
    merged = tmp_path / "merged"
    assert main(["export", str(tmp_path / "run"), str(merged), "--format", "merged"]) == 0
    model, report = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, trained, rtol=1e-5, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(keys["checkpointer"]["checkpoint_dir"])
        assert (base(TOKENS).logits - trained).abs().max() > 0.1
    files = {path.name for path in merged.iterdir()}
    assert {"config.json", "generation_config.json", "README.md"} <= files
    assert len([name for name in files if name.endswith(".safetensors")]) == len(
        keys["checkpointer"]["checkpoint_files"]
    )
    assert [path.name for path in tmp_path.glob(".tmp-*")] == []


def test_an_earlier_checkpoint_and_another_dtype_are_exported(
    tmp_path: Path, make_config: Callable[..., Path], run: Callable[..., None]
) -> None:
    run(make_config(max_steps=8))
    exported = {}
    for step in (4, 8):
        folder = tmp_path / f"adapter-{step}"
        assert main(["export", str(tmp_path / "run"), str(folder), "--step", str(step)]) == 0
        exported[step] = load_file(folder / "adapter_model.safetensors")
        assert f"| step of this checkpoint | {step} |" in (folder / "README.md").read_text()
    at_the_end = load_file(tmp_path / "run/adapter/adapter_model.safetensors")
    assert exported[8].keys() == at_the_end.keys()
    for name, tensor in at_the_end.items():
        assert torch.equal(exported[8][name], tensor)
    assert any(not torch.equal(exported[4][name], exported[8][name]) for name in exported[8])

    whole, half = tmp_path / "whole", tmp_path / "half"
    command = ["export", str(tmp_path / "run"), "--format", "merged"]
    assert main([*command, str(whole)]) == 0
    assert main([*command, str(half), "--dtype", "bf16"]) == 0
    wide, narrow = (load_file(folder / "model.safetensors") for folder in (whole, half))
    assert wide.keys() == narrow.keys()
    for name, tensor in wide.items():
        assert torch.equal(narrow[name], tensor.bfloat16()), name
    config = json.loads((half / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(half).dtype == torch.bfloat16
