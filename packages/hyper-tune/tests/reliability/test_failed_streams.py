"""A stream that one process cannot read ends all of them with its error, and not as a lost one."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SAID = "the stream broke off at step 3."
# Under torchrun the store is the launcher's, and outlives rank 0.
SCRIPT = """
import os, sys
sys.path.insert(0, {here!r})
from faults import install
from hyper_tune.torchtune import cli

cli._PATIENCE_SECONDS = 0
if os.environ["RANK"] == {victim!r}:
    install({fault!r})
sys.stderr = open({log!r} + os.environ["RANK"], "w", buffering=1)
cli.main()
"""


@pytest.fixture
def streamed(job_config: Callable[..., Path], records: Path) -> Path:
    """The configuration of a run of a stream."""
    stream = {
        "_component_": "hyper_tune.torchtune.streaming.StreamedDataset",
        **{"source": "json", "data_files": str(records), "shuffle_buffer": 4},
    }
    return job_config(max_steps=6, save_every_n_steps=2, batch_size=1, dataset=stream)


def test_every_process_says_the_error_of_the_one(jobs: Any, streamed: Path, tmp_path: Path) -> None:
    fault = {"stage": "draw", "step": 3, "rank": 1, "kind": "mistake"}
    job = jobs.start(streamed, tmp_path / "run", ranks=2, faults=[fault])
    assert job.wait() == [2, 2], job.said(0)
    assert job.struck(1)
    assert not job.struck(0)
    assert job.said(0).splitlines()[-1] == f"error: {SAID}"
    assert job.said(1).splitlines()[-1] == f"error (rank 1): {SAID}"
    assert (tmp_path / "run" / "checkpoints" / "step-00000002").is_dir()


def test_under_torchrun_the_error_of_rank_0_reaches_the_others(
    streamed: Path, tmp_path: Path
) -> None:
    fault = {"stage": "draw", "step": 3, "kind": "mistake", "mark": str(tmp_path / "mark")}
    script = tmp_path / "job.py"
    log = str(tmp_path / "said.")
    here = str(Path(__file__).parent)
    script.write_text(SCRIPT.format(here=here, victim="0", fault=fault, log=log))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    words = ["--config", str(streamed), f"output_dir={tmp_path / 'run'}"]
    subprocess.run([*launcher, str(script), *words], timeout=300, check=False, capture_output=True)
    assert (tmp_path / "mark").exists()
    assert Path(log + "0").read_text().splitlines()[-1] == f"error: {SAID}"
    assert Path(log + "1").read_text().splitlines()[-1] == f"error (rank 1): {SAID}"
