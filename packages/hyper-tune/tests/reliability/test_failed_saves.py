"""A save that fails on one process ends all of them, and leaves the checkpoints that there were."""

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
