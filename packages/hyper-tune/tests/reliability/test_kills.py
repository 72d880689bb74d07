"""SIGKILL at any moment of a save, a run or an export: nothing unusable, one interval lost."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from hyper_tune.checkpoint import has_checkpoints, read_newest

PATIENCE = 120


def announced(folder: Path) -> list[int]:
    path = folder / "announced"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_at_random(
    jobs: Any, function: str, folder: Path, chance: random.Random, span: float
) -> int:
    """Kill a writer at a random moment; return the last number that it announced."""
    before = len(announced(folder))
    job = jobs.call(function, folder / "written")
    deadline = time.monotonic() + PATIENCE
    while len(announced(folder)) == before:
        assert time.monotonic() < deadline, job.said()
        time.sleep(0.001)
    time.sleep(chance.uniform(0, span))
    os.kill(job.processes[0], signal.SIGKILL)
    assert job.wait() == [-signal.SIGKILL]
    return announced(folder)[-1]


def test_a_save_that_is_killed_leaves_the_old_or_the_new(
    jobs: Any, rounds: Callable[[int, int], int], figure: Callable[..., None], tmp_path: Path
) -> None:
    chance = random.Random(0)
    inside = 0
    count = rounds(30, 300)
    for _ in range(count):
        last = kill_at_random(jobs, "writers:save_forever", tmp_path, chance, 0.02)
        folder = tmp_path / "written"
        inside += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        step, state, reports = read_newest(folder)
        assert reports == []
        assert step in (last, last + 1)
        assert state["step"] == step
        assert state["history"] == list(range(step % 50))
        for name, size in (("p", 20_000), ("q", 7)):
            assert torch.equal(state["tensors"][name], torch.full((size,), float(step)))
    assert inside > count // 10
    figure(
        3,
        "SIGKILL during a save: the old or the new checkpoint, whole",
        f"0 of {count} unusable ({inside} were killed with files half-written)",
    )


def test_the_kills_find_a_writer_without_care(jobs: Any, tmp_path: Path) -> None:
    chance = random.Random(0)
    for _ in range(60):
        last = kill_at_random(jobs, "writers:save_in_place_forever", tmp_path, chance, 0.02)
        try:
            tensors = load_file(tmp_path / "written" / "state.safetensors")
        except SafetensorError:
            return
        assert tensors["q"][0] in (last, last + 1)
    pytest.fail("60 kills of a writer that writes in place left nothing torn")


def test_an_export_that_is_killed_leaves_the_old_or_the_new(
    jobs: Any, rounds: Callable[[int, int], int], figure: Callable[..., None], tmp_path: Path
) -> None:
    chance = random.Random(0)
    inside = 0
    count = rounds(30, 300)
    for _ in range(count):
        last = kill_at_random(jobs, "writers:export_forever", tmp_path, chance, 0.02)
        folder = tmp_path / "written"
        left = list(tmp_path.glob(".tmp-*"))
        inside += bool(left)
        for path in left:
            shutil.rmtree(path)
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        assert config["r"] == 4
        found = {
            value
            for name, t in tensors.items()
            if "lora_A" in name
            for value in t.unique().tolist()
        }
        assert found in ({last}, {last + 1})
    assert inside > count // 10
    figure(
        3,
        "SIGKILL during an export: the old or the new adapter, whole",
        f"0 of {count} unusable ({inside} were killed with files half-written)",
    )


STEPS, EVERY = 20, 4


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_that_is_killed_again_and_again_ends_as_one_that_is_not(
    jobs: Any,
    job_config: Callable[..., Path],
    rounds: Callable[[int, int], int],
    figure: Callable[..., None],
    tmp_path: Path,
    ranks: int,
) -> None:
    config = job_config(max_steps=STEPS, save_every_n_steps=EVERY, batch_size=2 // ranks)
    whole = jobs.start(config, tmp_path / "whole", ranks=ranks)
    assert whole.wait() == [0] * ranks
    took = whole.ended_at[0] - whole.started

    chance = random.Random(ranks)
    killed, lost, reached = 0, [0], 0
    while killed < rounds(1, 20):
        job = jobs.start(config, tmp_path / "run", "resume_from_checkpoint=True", ranks=ranks)
        assert job.wait(chance.uniform(0.2, 1.2) * took) != [2] * ranks
        job.kill()
        if -signal.SIGKILL not in job.wait():
            shutil.rmtree(tmp_path / "run")  # It has finished: start anew.
            reached = 0
            continue
        killed += 1
        folder = tmp_path / "run" / "checkpoints"
        logged = job.rows()[-1]["step"] if job.rows() else 0
        newest = 0
        if has_checkpoints(folder):
            newest, _, reports = read_newest(folder)
            assert reports == []
        assert newest >= reached
        reached = newest
        lost.append(logged - newest)
    assert max(lost) <= EVERY
    last = jobs.start(config, tmp_path / "run", "resume_from_checkpoint=True", ranks=ranks)
    assert last.wait() == [0] * ranks
    for name in (
        f"checkpoints/step-{STEPS:08d}/state.safetensors",
        "adapter/adapter_model.safetensors",
    ):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    figure(
        3,
        f"SIGKILL of a run of {ranks}, saved every {EVERY} steps: resumes to the same bits",
        f"{killed} of {killed} resumed, at most {max(lost)} logged steps lost, last checkpoint and "
        "adapter bitwise equal",
    )
