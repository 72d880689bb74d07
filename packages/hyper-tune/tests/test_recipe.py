"""The recipe: the same samples give the same training however they are split; prints and files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torchtune.data import Message

from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

TUNE = Path(sys.executable).with_name("tune")
FILE_DATASET = "hyper_tune.torchtune.data.file_dataset"
SGD = {"_component_": "torch.optim.SGD", "lr": 0.05}


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "summary.json").read_text())


def state(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def tune(config: Path, ranks: int, *overrides: str) -> None:
    launch = [] if ranks == 1 else ["--nproc_per_node", str(ranks)]
    command = [str(TUNE), "run", *launch, "hyper-tune/hyperadalora_full", "--config", str(config)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [*command, *overrides], capture_output=True, text=True, check=False, env=environment
    )
    assert finished.returncode == 0, finished.stderr


@torch.no_grad()
def write_quiz(config: Path, path: Path) -> None:
    """Write five questions, the first three with the answers that the base gives."""
    rows = []
    with FineTuning(RecipeSettings.from_config(OmegaConf.load(config))) as run:
        for number in range(20):
            asked = [
                Message(role="user", content=f"What is {number}?"),
                Message(role="assistant", content=""),
            ]
            tokens = run.tokenizer({"messages": asked}, inference=True)["tokens"]
            for _ in range(3):
                logits = torch.cat(run.model(torch.tensor([tokens])), dim=1)
                tokens = [*tokens, int(logits[0, -1].argmax())]
            if max(tokens[-3:]) < 256:  # bytes, not special tokens
                answer = bytes(tokens[-3:]).decode(errors="replace")
                rows.append({"question": f"What is {number}?", "answer": answer})
    for row in rows[3:]:
        row["answer"] = "no"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:5]))


@pytest.mark.parametrize(
    ("family", "batch_size", "accumulation", "ranks", "checkpointing"),
    [
        ("llama", 1, 4, 1, False),
        ("llama", 2, 2, 1, True),
        ("llama3_2", 2, 1, 2, False),
        ("llama", 1, 2, 2, True),
    ],
)
def test_any_split_of_the_same_samples_trains_and_evaluates_alike(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    request: pytest.FixtureRequest,
    family: str,
    batch_size: int,
    accumulation: int,
    ranks: int,
    checkpointing: bool,
) -> None:
    quiz = tmp_path / "quiz.jsonl"
    keys: dict[str, Any] = {
        **request.getfixturevalue(family),
        "optimizer": SGD,
        "max_steps": 5,
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "save_every_n_steps": 5,
    }
    write_quiz(make_config(**keys), quiz)
    # Five samples are an odd number of batches, of which two ranks have unequal shares.
    config = make_config(
        **keys,
        dataset_val={"_component_": FILE_DATASET, "path": str(quiz)},
        exact_match={"path": str(quiz), "max_new_tokens": 3},
    )
    whole, split = tmp_path / "whole", tmp_path / "split"
    run(config, f"output_dir={whole}")
    tune(
        config,
        ranks,
        f"output_dir={split}",
        f"batch_size={batch_size}",
        f"gradient_accumulation_steps={accumulation}",
        f"enable_activation_checkpointing={checkpointing}",
    )
    for expected, found in zip(rows(whole), rows(split), strict=True):
        for key in ("step", "lr", "live_ranks", "tokens"):
            assert found[key] == expected[key]
        for key in ("loss", "penalty", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=2e-5)
    expected_state, found_state = state(whole, 5), state(split, 5)
    assert found_state.keys() == expected_state.keys()
    for name, expected_tensor in expected_state.items():
        torch.testing.assert_close(
            found_state[name], expected_tensor, rtol=1e-4, atol=1e-5, msg=name
        )
    expected, found = summary(whole), summary(split)
    assert expected["before"]["exact_match"] == 3 / 5
    for when in ("before", "after"):
        assert found[when] == pytest.approx(expected[when], rel=2e-5)
    for figures in (expected, found):
        for key in ("before", "after", "seconds_per_step", "peak_memory_mib", "adapter"):
            del figures[key]
    assert found == expected


def test_every_step_logs_its_figures(
    tmp_path: Path, make_config: Callable[..., Path], run: Callable[..., None], records: Path
) -> None:
    component = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(records)}
    run(
        make_config(
            dataset_val=component,
            exact_match={"path": str(records), "max_new_tokens": 4},
            validate_every_n_steps=6,
        )
    )
    logged = rows(tmp_path / "run")
    figures = {
        *("step", "loss", "penalty", "grad_norm", "lr", "live_ranks", "tokens"),
        *("tokens_per_second", "seconds", "peak_memory_mib", "skipped"),
    }
    assert [set(row) for row in logged if row["step"] % 6] == [figures] * 10
    assert [set(row) for row in logged if not row["step"] % 6] == [
        figures | {"validation_loss"}
    ] * 2
    assert [row["lr"] for row in logged[:3]] == [0.0, 5e-4, 1e-3]
    # 14 matrices of 4 ranks; 28 remain; the eight steps that the budget may take hold two prunings.
    assert [row["live_ranks"] for row in logged] == [56] * 2 + [42] * 3 + [28] * 7

    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["live_ranks"] == sum(summary["ranks"].values()) == 28
    assert summary["total_ranks"] == 56
    assert set(summary["before"]) == set(summary["after"]) == {"loss", "exact_match"}
    assert summary["after"]["loss"] == logged[-1]["validation_loss"]


def test_training_lowers_the_loss_on_its_records(
    tmp_path: Path, make_config: Callable[..., Path], run: Callable[..., None], records: Path
) -> None:
    component = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(records)}
    run(make_config(dataset_val=component, max_steps=60))
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["after"]["loss"] < summary["before"]["loss"] - 0.5


@pytest.mark.parametrize("name", ["lora", "adalora", "hyperlora", "hyperadalora"])
@pytest.mark.parametrize("family", ["llama", "qwen"])
def test_every_method_trains_both_families(
    tmp_path: Path,
    make_config: Callable[..., Path],
    run: Callable[..., None],
    request: pytest.FixtureRequest,
    name: str,
    family: str,
) -> None:
    method: dict[str, Any] = {"name": name, "init_rank": 4}
    if name.startswith("hyper"):
        method["hypernetwork"] = {"preset": "attention-small"}
    if "ada" in name:
        method["pruning"] = {"interval": 3}
    optimizer = {"_component_": "torch.optim.Adam", "lr": 1e-3 if "hyper" in name else 1e-2}
    keys = request.getfixturevalue(family)
    run(make_config(method=method, optimizer=optimizer, max_steps=40, **keys))
    logged = rows(tmp_path / "run")
    first, last = (sum(row["loss"] for row in part) / 10 for part in (logged[:10], logged[-10:]))
    assert last < first - 0.3
    assert logged[-1]["live_ranks"] == (28 if "ada" in name else 56)


def test_tune_run_finds_a_packaged_config_from_any_folder(tmp_path: Path) -> None:
    command = [str(TUNE), "run", "hyper-tune/hyperadalora_full", "--config", "llama3_1_8b"]
    finished = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=60
    )
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert "tune download meta-llama/Llama-3.1-8B-Instruct" in finished.stderr
