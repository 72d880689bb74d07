"""What one process cannot write ends all of them, and leaves the checkpoints that there were."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_tune.checkpoint import read_newest

FAILURES = {
    "disk full": ("write", "ENOSPC", 0, "No space left on device"),
    "no permission": ("write", "EACCES", 0, "Permission denied"),
    "a value that cannot be saved, on the first": ("collect", "poison", 0, "before/poison is a"),
    "a value that cannot be saved, on the last": ("collect", "poison", -1, "before/poison is a"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_save_ends_all_and_changes_nothing(
    jobs: Any,
    job_config: Callable[..., Path],
    nightly: bool,
    figure: Callable[..., None],
    slack: Callable[[], float],
    tmp_path: Path,
    name: str,
) -> None:
    stage, kind, victim, text = FAILURES[name]
    took = []
    for ranks in (2, 4) if nightly else (2,):
        output = tmp_path / str(ranks)
        config = job_config(max_steps=6, save_every_n_steps=2, batch_size=4 // ranks)
        fault = {"stage": stage, "step": 4, "rank": victim % ranks, "kind": kind}
        job = jobs.start(config, output, ranks=ranks, faults=[fault])
        codes = job.wait()
        assert job.struck(victim % ranks) == f"{kind} in {stage} at 4"
        # The last that each writes is why it ends.
        raised = [(job.log / f"{rank}.err").stat().st_mtime for rank in range(ranks)]
        struck = (job.log / f"mark-0.{victim % ranks}").stat().st_mtime
        took.append(max(raised) - struck)
        assert 0 not in codes
        assert text in job.said(victim % ranks)
        for other in set(range(ranks)) - {victim % ranks}:
            said = f"rank {victim % ranks} could not go on; its message says why."
            assert said in job.said(other)
            assert codes[other] == 2
        step, _, reports = read_newest(output / "checkpoints")
        assert (step, reports) == (2, [])
        assert os.listdir(output / "checkpoints") == ["step-00000002"]
        again = jobs.start(config, output, "resume_from_checkpoint=True", ranks=ranks)
        assert again.wait() == [0] * ranks
    assert max(took) <= 5 * slack()
    figure(
        6,
        f"a save fails ({name}): every process raises within 5 s, the old checkpoint stays",
        f"{len(took)} of {len(took)}, at most {max(took):.2f} s",
    )


@pytest.mark.parametrize(("step", "saved"), [(0, []), (3, [2]), (4, [2]), (6, [2, 4])])
def test_a_row_that_cannot_be_written_ends_all_before_the_next_save(
    jobs: Any,
    job_config: Callable[..., Path],
    figure: Callable[..., None],
    tmp_path: Path,
    step: int,
    saved: list[int],
) -> None:
    config = job_config(max_steps=6, save_every_n_steps=2, batch_size=2)
    fault = {"stage": "row", "step": step, "rank": 0, "kind": "ENOSPC"}
    job = jobs.start(config, tmp_path / "run", ranks=2, faults=[fault])
    assert job.wait() == [2, 2]
    assert job.struck() == f"ENOSPC in row at {step}"
    assert "No space left on device; nothing half-written is left, what was saved" in job.said(0)
    assert "rank 0 could not go on; its message says why." in job.said(1)
    assert [row["step"] for row in job.rows()] == list(range(1, step))
    checkpoints = tmp_path / "run" / "checkpoints"
    assert sorted(checkpoints.glob("*")) == [checkpoints / f"step-{n:08d}" for n in saved]
    again = jobs.start(config, tmp_path / "run", "resume_from_checkpoint=True", ranks=2)
    assert again.wait() == [0, 0]
    assert [row["step"] for row in again.rows()] == [1, 2, 3, 4, 5, 6]
    figure(
        6,
        f"a row of figures cannot be written (step {step}): all raise before the next save",
        f"2 of 2, checkpoints: {len(saved)} of {len(saved)} stay",
    )
