"""A process that is killed or stopped ends the job: in seconds, with its name, nothing lost."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_tune.checkpoint import has_checkpoints, read_newest

# What a fault needs: where it strikes, at which step (of a run that saves at 2 and prunes at 3).
STAGES = {"forward": 3, "backward": 3, "allocation": 2, "collect": 4, "write": 4, "restore": 0}
WORDS = {"SIGKILL": "has ended", "SIGSTOP": "is stopped"}
TIMEOUT, PATIENCE = 4, 5


@pytest.fixture
def started(jobs: Any, job_config: Callable[..., Path], tmp_path: Path) -> Callable[..., Any]:
    """Return what starts a job of two that saves every two steps, with a fault."""
    config = job_config(max_steps=6, save_every_n_steps=2, batch_size=1)

    def start(name: str, *overrides: str, **options: Any) -> Any:
        return jobs.start(config, tmp_path / name, *overrides, ranks=2, **options)

    return start


def strike(
    started: Callable[..., Any], name: str, kind: str, stage: str, victim: int
) -> tuple[float, float]:
    """Strike one of two processes; return the seconds until the other says so, and has ended."""
    resume = "resume_from_checkpoint=True"
    if stage == "restore":
        stop = {"stage": "step", "step": 3, "rank": 1, "kind": "SIGTERM"}
        assert started(name, faults=[stop]).wait() == [143, 143]
    fault = {"stage": stage, "step": STAGES[stage], "rank": victim, "kind": kind}
    short = () if kind == "SIGKILL" else (f"collective_timeout_seconds={TIMEOUT}",)
    job = started(name, resume, *short, faults=[fault])
    survivor = 1 - victim
    deadline = time.monotonic() + 120
    while not job.struck(victim):
        assert time.monotonic() < deadline, job.said(survivor)
        time.sleep(0.005)
    struck = time.monotonic()
    while job.wait(0.05)[survivor] is None:
        assert time.monotonic() < deadline, job.said(survivor)
    codes = job.wait(0)
    assert codes[victim] == (-signal.SIGKILL if kind == "SIGKILL" else None)
    assert codes[survivor] == 75
    said = job.said(survivor).splitlines()[-1]
    assert f"rank {victim} (process {job.processes[victim]}) {WORDS[kind]}" in said
    assert said.endswith("start the job again with resume_from_checkpoint=True.")
    # The message is the last that it writes.
    mark, log = job.log / f"mark-0.{victim}", job.log / f"{survivor}.err"
    heard = log.stat().st_mtime - mark.stat().st_mtime
    ended = job.ended_at[survivor] - struck
    job.kill()
    folder = job.output / "checkpoints"
    if has_checkpoints(folder):
        assert read_newest(folder)[2] == []
    return heard, float(ended)


def victims(stage: str) -> tuple[int, ...]:
    return (0,) if stage == "write" else (0, 1)


@pytest.mark.parametrize("kind", WORDS)
def test_the_others_end_when_one_does_not_answer(
    started: Callable[..., Any],
    rounds: Callable[[int, int], int],
    figure: Callable[..., None],
    slack: Callable[[], float],
    kind: str,
) -> None:
    cases = [(stage, victim) for stage in STAGES for victim in victims(stage)]
    # Each round in continuous integration takes every stage once, with one of its victims.
    chosen = [
        (stage, victims(stage)[(number + place) % len(victims(stage))])
        for number in range(rounds(1, 20))
        for place, stage in enumerate(STAGES)
    ]
    limit = PATIENCE + (TIMEOUT if kind == "SIGSTOP" else 0)
    took = [
        strike(started, str(number), kind, stage, victim)
        for number, (stage, victim) in enumerate(chosen)
    ]
    heard, ended = zip(*took, strict=True)
    assert max(heard) <= limit * slack()
    assert set(chosen) <= set(cases)
    what = "killed" if kind == "SIGKILL" else f"stopped, with a timeout of {TIMEOUT} s"
    figure(
        7,
        f"a process is {what} in {', '.join(STAGES)}: the other names it within {limit} s and ends",
        f"{len(took)} of {len(took)}, named after {min(heard):.2f} to {max(heard):.2f} s, ended "
        f"after at most {max(ended):.2f} s",
    )


def test_without_a_fault_both_finish(started: Callable[..., Any]) -> None:
    job = started("run")
    assert job.wait() == [0, 0]
    assert "do not answer" not in job.said(0) + job.said(1)
