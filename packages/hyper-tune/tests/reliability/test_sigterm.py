"""SIGTERM to any process: all stop at the same step, saved, with one exit code, and go on."""

import os
import random
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_tune.checkpoint import read_newest

STEPS = 20
COMPARED = ("step", "loss", "penalty", "grad_norm", "lr", "live_ranks", "tokens")


def figures(job: Any) -> list[Any]:
    return [[row[key] for key in COMPARED] for row in job.rows()]


@pytest.mark.parametrize("ranks", [1, 2, *([4] if "HYPER_TUNE_FULL_COUNTS" in os.environ else [])])
def test_all_stop_at_one_step_which_is_saved(
    jobs: Any,
    job_config: Callable[..., Path],
    rounds: Callable[[int, int], int],
    figure: Callable[..., None],
    slack: Callable[[], float],
    tmp_path: Path,
    ranks: int,
) -> None:
    config = job_config(max_steps=STEPS, save_every_n_steps=STEPS, batch_size=4 // ranks)
    whole = jobs.start(config, tmp_path / "whole", ranks=ranks)
    assert whole.wait() == [0] * ranks
    chance = random.Random(ranks)
    took, stops = [], []
    number = 0
    count = rounds(1, 25)
    while len(took) < count:
        number += 1
        output = tmp_path / str(number)
        job = jobs.start(config, output, ranks=ranks)
        deadline = time.monotonic() + 120
        at_least = chance.randrange(1, STEPS - 8)
        while len(job.rows()) < at_least:
            assert time.monotonic() < deadline, job.said()
            time.sleep(0.005)
        os.kill(job.processes[chance.randrange(ranks)], signal.SIGTERM)
        asked = time.monotonic()
        codes = job.wait()
        if codes == [0] * ranks and number < 3 * count:
            continue  # It was done before it could be asked.
        assert codes == [143] * ranks, job.said()
        took.append(max(job.ended_at) - asked)
        step, _, reports = read_newest(output / "checkpoints")
        assert reports == []
        assert step == job.rows()[-1]["step"] < STEPS
        assert re.search(rf"stopped by SIGTERM after step {step} of {STEPS}, which", job.said())
        stops.append(step)
        again = jobs.start(config, output, "resume_from_checkpoint=True", ranks=ranks)
        assert again.wait() == [0] * ranks
        assert figures(again) == figures(whole)
        last = f"checkpoints/step-{STEPS:08d}/state.safetensors"
        assert (output / last).read_bytes() == (tmp_path / "whole" / last).read_bytes()
    assert max(took) <= 10 * slack()
    figure(
        8,
        f"SIGTERM to one of {ranks}: all end with 143 at one step, saved, within 10 s, and resume "
        "to the same bits",
        f"{len(took)} of {len(took)}, at most {max(took):.2f} s, stopped after the steps "
        f"{min(stops)} to {max(stops)}",
    )


def test_without_sigterm_nothing_stops(
    jobs: Any, job_config: Callable[..., Path], tmp_path: Path
) -> None:
    stop = {"stage": "step", "step": 5, "rank": 1, "kind": "SIGTERM"}
    config = job_config(max_steps=8, save_every_n_steps=8, batch_size=1)
    stopped = jobs.start(config, tmp_path / "stopped", ranks=2, faults=[stop])
    assert stopped.wait() == [143, 143]
    assert stopped.struck(1) == "SIGTERM in step at 5"
    assert [row["step"] for row in stopped.rows()] == [1, 2, 3, 4, 5, 6]
    one_more = jobs.start(config, tmp_path / "all", ranks=2)
    assert one_more.wait() == [0, 0]
    assert len(one_more.rows()) == 8


def test_a_finished_run_is_not_a_stopped_one(
    jobs: Any, job_config: Callable[..., Path], tmp_path: Path
) -> None:
    stop = {"stage": "step", "step": 3, "rank": 0, "kind": "SIGTERM"}
    job = jobs.start(job_config(max_steps=4), tmp_path / "run", faults=[stop])
    assert job.wait() == [0]
    assert job.struck() == "SIGTERM in step at 3"
    assert (tmp_path / "run" / "summary.json").exists()
