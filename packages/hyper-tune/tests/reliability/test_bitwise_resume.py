"""A run that is stopped anywhere and resumed is the run that was not: its bits and its samples.

The models have no dropout, and data are not loaded by workers: there is no state of either.
"""

import hashlib
import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

STEPS, EPOCH = 20, 5
# Of a run that prunes from step 3 on, every three steps: before the first save, around a pruning,
# within an epoch and at its end, before the last step and after it.
INTERRUPTS = {1: (0, 3, 10), 2: (7,)}
ALL_INTERRUPTS = (0, 1, 2, 3, 4, 5, 7, 10, 19, 20)
# Of a stream of buffers of four, four and two rows: between two of them, and within one.
STREAM_INTERRUPTS = {1: (7,), 2: (3,)}
COMPARED = ("step", "loss", "penalty", "grad_norm", "lr", "live_ranks", "tokens")
Samples = dict[int, list[int]]


@pytest.fixture(scope="module")
def config(
    write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """Return what writes a configuration of ten samples, two a step, saved at each step."""
    folder = tmp_path_factory.mktemp("ten")
    path = folder / "ten.jsonl"
    rows = [{"question": f"What is {n}?", "answer": f"{n * n} " + "!" * (n % 3)} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows_of = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(path)}
    stream = {
        "_component_": "hyper_tune.torchtune.streaming.StreamedDataset",
        **{"source": "json", "data_files": str(path), "shuffle_buffer": 4},
    }
    keys = {"max_steps": STEPS, "save_every_n_steps": 1, "keep_checkpoints": 99}
    return lambda ranks, *, streamed=False: write_config(
        folder,
        dataset=stream if streamed else rows_of,
        batch_size=2 // ranks,
        gradient_accumulation_steps=1,
        **keys,
    )


@dataclass
class Whole:
    """A run that nothing has stopped."""

    folder: Path
    digests: dict[str, str]
    figures: list[Any]
    live_ranks: list[int]
    samples: Samples


@pytest.fixture(scope="module")
def whole(
    jobs: Any, config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Whole]:
    """Return what gives the run of a number of processes, which is made once."""

    @cache
    def made(ranks: int, *, streamed: bool = False) -> Whole:
        folder = tmp_path_factory.mktemp(f"whole-{ranks}")
        path = config(ranks, streamed=streamed)
        job = jobs.start(path, folder / "run", ranks=ranks, samples=folder / "seen")
        assert job.wait() == [0] * ranks
        live = [row["live_ranks"] for row in job.rows()]
        seen = samples(folder / "seen", ranks)
        return Whole(folder / "run", digests(folder / "run"), figures(job), live, seen)

    return made


def digests(folder: Path) -> dict[str, str]:
    """Return the digest of every file of every checkpoint and of the adapter."""
    paths = [*folder.glob("checkpoints/*/*"), *folder.glob("adapter/*.safetensors")]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def figures(job: Any) -> list[Any]:
    return [[row[key] for key in COMPARED] for row in job.rows()]


def samples(path: Path, ranks: int) -> Samples:
    """Return the samples of each step, over all ranks; a step that was run again counts once."""
    seen: Samples = {}
    for rank in range(ranks):
        steps: Samples = {}
        current: list[int] = []
        lines = Path(f"{path}.{rank}").read_text().splitlines()
        for step, index in map(json.loads, lines):
            if step is None:
                current.append(index)
            else:
                current = steps[step] = []
        for step, indices in steps.items():
            seen.setdefault(step, []).extend(indices)
    return seen


def assert_every_epoch_is_whole(seen: Samples) -> None:
    assert sorted(seen) == list(range(STEPS))
    for first in range(0, STEPS, EPOCH):
        epoch = [index for step in range(first, first + EPOCH) for index in seen[step]]
        assert sorted(epoch) == list(range(10))


@pytest.mark.parametrize("streamed", [False, True], ids=["rows", "stream"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_is_the_run_itself(
    jobs: Any,
    config: Callable[..., Path],
    whole: Callable[..., Whole],
    nightly: bool,
    figure: Callable[..., None],
    tmp_path: Path,
    ranks: int,
    streamed: bool,
) -> None:
    path, run = config(ranks, streamed=streamed), whole(ranks, streamed=streamed)
    expected, seen, live = run.digests, run.samples, run.live_ranks
    assert_every_epoch_is_whole(seen)
    assert live[0] == live[1] > live[2] == live[3] > live[-1]
    states = [expected[f"checkpoints/step-{k + 1:08d}/state.safetensors"] for k in range(STEPS)]
    assert all(one != other for one, other in pairwise(states))

    some = STREAM_INTERRUPTS if streamed else INTERRUPTS
    interrupts = ALL_INTERRUPTS if nightly else some[ranks]
    for k in interrupts:
        folder, log = tmp_path / f"from-{k}", tmp_path / f"seen-{k}"
        shutil.copytree(run.folder, folder)
        for step in range(k + 1, STEPS + 1):
            shutil.rmtree(folder / "checkpoints" / f"step-{step:08d}")
        resume = "resume_from_checkpoint=True"
        job = jobs.start(path, folder, resume, ranks=ranks, samples=log)
        assert job.wait() == [0] * ranks
        assert digests(folder) == expected
        assert figures(job) == run.figures
        again = samples(log, ranks) if k < STEPS else {}
        assert again == {step: seen[step] for step in range(k, STEPS)}
    stopped, of = ", ".join(map(str, interrupts)), "of a stream, " if streamed else ""
    figure(
        1,
        f"resume {of}on {ranks}, all of {STEPS} checkpoints, adapter and figures: 0 bytes differ",
        f"0 of {len(expected) * len(interrupts)} files, interrupted after the steps {stopped}; "
        f"control: {STEPS} of {STEPS} successive checkpoints differ",
    )
    figure(
        12,
        f"samples {of}on {ranks} over {STEPS // EPOCH} epochs: none repeated, none skipped",
        f"0 and 0, interrupted after the steps {stopped}",
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_five_chained_resumes_give_the_same_digest(
    jobs: Any,
    config: Callable[..., Path],
    whole: Callable[..., Whole],
    figure: Callable[..., None],
    tmp_path: Path,
    ranks: int,
) -> None:
    path, run = config(ranks), whole(ranks)
    kills = (1, 2, 5, 7, 13)
    for step in kills:
        fault = {"stage": "forward", "step": step, "rank": "all", "kind": "SIGKILL"}
        job = jobs.start(
            path,
            tmp_path / "chained",
            "resume_from_checkpoint=True",
            ranks=ranks,
            faults=[fault],
            samples=tmp_path / "chain",
        )
        # The first that strikes may end the other before its own fault does.
        assert set(job.wait()) <= {-signal.SIGKILL, 75}
        assert f"SIGKILL in forward at {step}" in [job.struck(rank) for rank in range(ranks)]
    last = jobs.start(
        path,
        tmp_path / "chained",
        "resume_from_checkpoint=True",
        ranks=ranks,
        samples=tmp_path / "chain",
    )
    assert last.wait() == [0] * ranks
    assert digests(tmp_path / "chained") == run.digests
    assert figures(last) == run.figures
    assert samples(tmp_path / "chain", ranks) == run.samples
    figure(
        2,
        f"five chained resumes on {ranks}, after SIGKILL in the steps "
        f"{', '.join(str(step + 1) for step in kills)}: the same digests",
        f"{len(run.digests)} files equal",
    )


@pytest.mark.parametrize("part", ["moments", "learning rate", "allocator", "position"])
def test_a_resume_that_forgets_a_part_is_found(
    jobs: Any,
    config: Callable[..., Path],
    whole: Callable[..., Whole],
    tmp_path: Path,
    part: str,
) -> None:
    shutil.copytree(whole(1).folder, tmp_path / "run")
    first = STEPS - 3
    for step in range(first + 1, STEPS + 1):
        shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step-{step:08d}")
    fault = {"stage": "step", "step": first, "rank": 0, "kind": "forget", "part": part}
    resume = "resume_from_checkpoint=True"
    job = jobs.start(config(1), tmp_path / "run", resume, faults=[fault])
    job.wait()
    assert job.struck() == f"forget in step at {first}"
    assert digests(tmp_path / "run") != whole(1).digests
