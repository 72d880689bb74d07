"""Every method on both families: trained, resumed bit for bit, exported."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hyper_tune.cli.main import main
from hyper_tune.method import METHODS
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

TOKENS = torch.arange(3, 61).reshape(2, 29)
STEPS, SAVED = 4, 2
ConfigMaker = Callable[..., Path]


def method_section(name: str) -> dict[str, Any]:
    """The method at a size for tests, pruning or sampling within its few steps."""
    method = METHODS[name]
    section: dict[str, Any] = {"name": name, "init_rank": 3}
    if method.generated:
        section["hypernetwork"] = {"preset": "attention-tiny"}
    if method.prunes:
        section |= {"budget": 2, "pruning": {"interval": 1, "finish_by": 0.6}}
    return section


def settings_of(config: Path, **overrides: Any) -> RecipeSettings:
    return RecipeSettings.from_config(OmegaConf.merge(OmegaConf.load(config), overrides))


def train(config: Path, **overrides: Any) -> tuple[Tensor, Tensor]:
    """Train to the end; the logits of the base and of the trained model."""
    with FineTuning(settings_of(config, **overrides)) as run, torch.no_grad():
        base = torch.cat(run.model.eval()(TOKENS), dim=1)
        with torch.enable_grad():
            run.train()
        run.folder.write_text("config.yaml", OmegaConf.to_yaml(OmegaConf.load(config)))
        return base, torch.cat(run.model.eval()(TOKENS), dim=1)


def checkpoint(folder: Path, step: int) -> dict[str, bytes]:
    """The bytes of every file of a checkpoint."""
    paths = (folder / "checkpoints" / f"step-{step:08d}").iterdir()
    return {path.name: path.read_bytes() for path in paths}


def assert_resumes(config: Path, whole: Path, trained: Tensor) -> None:
    """From the checkpoint in the middle, a run ends in the same checkpoint, bit for bit."""
    resumed = whole.with_name("resumed")
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "checkpoints" / f"step-{STEPS:08d}")
    _, again = train(config, output_dir=str(resumed), resume_from_checkpoint=True)
    assert torch.equal(again, trained)
    assert checkpoint(resumed, STEPS) == checkpoint(whole, STEPS)
    middle, end = (checkpoint(whole, step)["state.safetensors"] for step in (SAVED, STEPS))
    assert middle != end


def add_adapter_(model: torch.nn.Module, folder: Path) -> None:
    """Add an adapter's folder to the weights as PEFT's LoRA and DoRA are defined, by hand."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scaling = config["lora_alpha"] / config["r"]
    modules = dict(model.named_modules())
    names = {key.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for key in tensors}
    assert len(names) == 14
    for name in names:
        key = f"base_model.model.{name}.lora_"
        weight = modules[name].weight
        update = scaling * tensors[f"{key}B.weight"] @ tensors[f"{key}A.weight"]
        weight += update
        if config["use_dora"]:
            magnitude = tensors[f"{key}magnitude_vector"]
            weight *= (magnitude / weight.norm(dim=1))[:, None]


@pytest.mark.filterwarnings("ignore:lr_scheduler.num_warmup_steps", "ignore:the first pruning")
@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_resumes_and_exports(
    tmp_path: Path,
    make_config: ConfigMaker,
    request: pytest.FixtureRequest,
    name: str,
    family: str,
) -> None:
    keys = request.getfixturevalue(family)
    config = make_config(
        **keys,
        method=method_section(name),
        optimizer={"_component_": "torch.optim.Adam", "lr": 2e-3 if "hyper" in name else 0.05},
        lr_scheduler={
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
        },
        max_steps=STEPS,
        save_every_n_steps=SAVED,
        gradient_accumulation_steps=1,
    )
    whole = tmp_path / "run"
    base, trained = train(config)
    plain = AutoModelForCausalLM.from_pretrained(keys["checkpointer"]["checkpoint_dir"])
    with torch.no_grad():
        torch.testing.assert_close(plain(TOKENS).logits, base, rtol=1e-5, atol=1e-5)
    assert (trained - base).abs().max() > 0.05

    assert_resumes(config, whole, trained)

    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", str(whole), str(adapter)]) == 0
    assert main(["export", str(whole), str(merged), "--format", "merged"]) == 0
    with torch.no_grad():
        add_adapter_(plain, adapter)
        torch.testing.assert_close(plain(TOKENS).logits, trained, rtol=1e-5, atol=1e-5)
        loaded = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(loaded(TOKENS).logits, trained, rtol=1e-5, atol=1e-5)
    at_the_end = load_file(whole / "adapter" / "adapter_model.safetensors")
    exported = load_file(adapter / "adapter_model.safetensors")
    assert all(torch.equal(exported[key], value) for key, value in at_the_end.items())


@pytest.mark.filterwarnings("ignore:lr_scheduler.num_warmup_steps")
@pytest.mark.parametrize("name", ["dylora", "hyperdylora"])
def test_a_rank_is_chosen_for_an_export(
    tmp_path: Path,
    make_config: ConfigMaker,
    llama: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    config = make_config(
        **llama,
        method=method_section(name),
        optimizer={"_component_": "torch.optim.Adam", "lr": 2e-3 if "hyper" in name else 0.05},
        max_steps=STEPS,
    )
    train(config)
    run = tmp_path / "run"
    with FineTuning(settings_of(config, resume_from_checkpoint=True)) as resumed, torch.no_grad():
        resumed.method.write_factors_()
        whole = torch.cat(resumed.model.eval()(TOKENS), dim=1)
        with resumed.method.at_rank(2):
            expected = torch.cat(resumed.model(TOKENS), dim=1)
    assert (whole - expected).abs().max() > 0.05
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    assert main(["export", str(run), str(adapter), "--rank", "2"]) == 0
    assert main(["export", str(run), str(merged), "--format", "merged", "--rank", "2"]) == 0
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 2
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(llama["checkpointer"]["checkpoint_dir"])
        add_adapter_(plain, adapter)
        torch.testing.assert_close(plain(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
        loaded = AutoModelForCausalLM.from_pretrained(merged)
        torch.testing.assert_close(loaded(TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
    capsys.readouterr()
    assert main(["export", str(run), str(tmp_path / "no"), "--rank", "4"]) == 2
    assert capsys.readouterr().err == (
        "error: rank is 4, but must be a whole number of 1 to method.init_rank = 3; choose one.\n"
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.filterwarnings("ignore:lr_scheduler.num_warmup_steps", "ignore:the first pruning")
@pytest.mark.parametrize(
    "hypernetwork",
    [
        {"body": "attention", "sizes": {"hidden": 16, "heads": 2, "norm": "pre"}, "dtype": "bf16"},
        {"body": "conv", "sizes": {"widths": [8, 12], "blocks": [1, 1]}, "state": "damped"},
        {"body": "mlp", "sizes": {"hidden": 8, "widths": [16]}, "sharing": "each"},
        {"preset": "mlp-small", "sharing": "groups", "outputs": "orthonormal", "state": "static"},
    ],
    ids=["attention", "conv", "mlp", "preset"],
)
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].generated])
def test_every_body_trains_resumes_and_exports_with_every_method(
    tmp_path: Path,
    make_config: ConfigMaker,
    llama: dict[str, Any],
    name: str,
    hypernetwork: dict[str, Any],
) -> None:
    config = make_config(
        method=method_section(name) | {"hypernetwork": hypernetwork},
        optimizer={"_component_": "torch.optim.Adam", "lr": 2e-3},
        max_steps=STEPS,
        save_every_n_steps=SAVED,
        gradient_accumulation_steps=1,
    )
    base, trained = train(config)
    assert (trained - base).abs().max() > 0.01
    assert_resumes(config, tmp_path / "run", trained)
    with torch.no_grad():
        plain = AutoModelForCausalLM.from_pretrained(llama["checkpointer"]["checkpoint_dir"])
        add_adapter_(plain, tmp_path / "run" / "adapter")
        torch.testing.assert_close(plain(TOKENS).logits, trained, rtol=1e-5, atol=1e-5)
