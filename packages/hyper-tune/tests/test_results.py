"""The figures that a run reports are those of the model, the data and the clock."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from hyper_tune.comparison import compare_figures
from hyper_tune.run_record import RunRecord
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

# (out, in) of the matrices of one of the two layers: queries, keys, values, output, w1, w2, w3.
MATRICES = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (32, 48), (48, 32)]
RANK = 4


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def test_tokens_and_seconds_are_those_of_the_steps(
    tmp_path: Path, make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    update = torch.optim.Adam.step

    def slow(self: torch.optim.Adam, closure: None = None) -> None:
        time.sleep(0.01)
        update(self, closure)

    monkeypatch.setattr(torch.optim.Adam, "step", slow)
    settings = RecipeSettings.from_config(OmegaConf.load(make_config(max_steps=11)))
    resident_mib = psutil.Process().memory_info().rss / 1024 / 1024
    started = time.perf_counter()
    with FineTuning(settings) as run:
        run.train()
        labels = [run.data.order.samples[index]["labels"] for index in range(22)]
    elapsed = time.perf_counter() - started

    logged = rows(tmp_path / "run")
    # Eleven steps of four samples are two epochs of 22; the first label predicts nothing.
    counts = [sum(label != -100 for label in sample[1:]) for sample in labels]
    assert len(set(counts)) > 1
    assert sum(row["tokens"] for row in logged) == 2 * sum(counts)
    assert all(row["seconds"] >= 0.01 for row in logged)
    assert sum(row["seconds"] for row in logged) <= elapsed
    for row in logged:
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] / row["seconds"], rel=1e-12)
    seconds = [row["seconds"] for row in logged]
    assert summary(tmp_path / "run")["seconds_per_step"] == median(seconds)

    memory = [row["peak_memory_mib"] for row in logged]
    memory.append(summary(tmp_path / "run")["peak_memory_mib"])
    assert memory == sorted(memory)
    assert resident_mib <= memory[0] < 16 * resident_mib


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("llama", "lora"),
        ("llama", "adalora"),
        ("llama", "hyperlora"),
        ("llama3_2", "hyperadalora"),
    ],
)
def test_parameters_are_counted_as_they_are_saved(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    request: pytest.FixtureRequest,
    family: str,
    name: str,
) -> None:
    method: dict[str, Any] = {"name": name, "init_rank": RANK}
    if name.startswith("hyper"):
        method["hypernetwork"] = {"preset": "attention-small"}
    if "ada" in name:
        method["pruning"] = {"interval": 3}
    keys = request.getfixturevalue(family)
    run(make_config(method=method, max_steps=4, **keys))
    figures = summary(tmp_path / "run")

    folder = Path(keys["checkpointer"]["checkpoint_dir"])
    base = load_file(folder / "model.safetensors")
    assert ("lm_head.weight" in base) is (family == "llama")
    assert figures["base_parameters"] == sum(tensor.numel() for tensor in base.values())
    component = 1 if "ada" in name else 0  # λ
    factors = 2 * sum(RANK * (out + width + component) for out, width in MATRICES)
    assert figures["factor_parameters"] == factors
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000004" / "state.safetensors")
    averages = [tensor.numel() for key, tensor in state.items() if key.endswith("exp_avg")]
    assert figures["trainable_parameters"] == sum(averages)
    if not name.startswith("hyper"):
        assert figures["trainable_parameters"] == factors
    assert figures["initial_rank"] == RANK
    assert figures["total_ranks"] == 2 * RANK * len(MATRICES)


def test_a_held_out_loss_that_is_not_finite_ends_no_run(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rate = {"_component_": "torch.optim.Adam", "lr": 1e30}
    config = make_config(
        optimizer=rate,
        lr_scheduler={
            "_component_": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "num_warmup_steps": 0,
        },
        method={"name": "lora", "init_rank": 4},
        max_steps=1,
        validation_fraction=0.2,
        validate_every_n_steps=1,
    )
    run(config)
    assert rows(tmp_path / "run")[0]["validation_loss"] is None
    found = summary(tmp_path / "run")
    assert found["before"]["loss"] > 0
    assert found["after"]["loss"] is None
    said = capsys.readouterr().err
    assert "after: loss not finite" in said
    assert "warning: the held-out loss did not fall" in said
    compared = dict(compare_figures([RunRecord.read(tmp_path / "run")]))
    assert compared["held-out loss, before"] == f"{found['before']['loss']:.4f}"
    assert "held-out loss, after" not in compared
