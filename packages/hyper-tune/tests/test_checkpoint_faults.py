"""A writer that is stopped anywhere, or finds the disk full, leaves the old state or the new."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_tune import checkpoint
from hyper_tune.checkpoint import read_newest, write_checkpoint

WORKER = Path(__file__).parent / "checkpoint_faults.py"
SPEC = importlib.util.spec_from_file_location("checkpoint_faults", WORKER)
assert SPEC is not None
assert SPEC.loader is not None
faults = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(faults)

KINDS = ["new", "damaged"]
FILES = ["manifest.json", "state.json", "state.safetensors"]


def assert_is_state(found: Any, step: int) -> None:
    expected = faults.state(step)
    assert list(found) == list(expected)
    assert torch.equal(found.pop("w"), expected.pop("w"))
    assert found == expected


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What writers of step 3 left that were stopped, where step 3 is new or there and damaged."""
    folder = tmp_path_factory.mktemp("checkpoints")
    for kind in KINDS:
        before = folder / "before" / kind
        for step in (1, 2):
            write_checkpoint(before, step, faults.state(step))
        if kind == "damaged":
            damage(write_checkpoint(before, 3, faults.state(0)) / "state.safetensors")
    subprocess.run([sys.executable, str(WORKER), str(folder)], check=True)
    return folder / "after"


def how_each_ended(folder: Path) -> list[int]:
    ended: list[int] = json.loads((folder / "ended.json").read_text())
    assert ended[-1] == faults.FINISHED
    return ended


def check_every_folder(folder: Path) -> list[int]:
    """Return the newest step in each folder; it is whole, and the next writer succeeds."""
    steps = []
    for number in range(len(how_each_ended(folder))):
        here = folder / str(number)
        step, found, _ = read_newest(here)
        assert_is_state(found, step)
        steps.append(step)
        write_checkpoint(here, step + 1, faults.state(step + 1), keep=2)
        after, found, reports = read_newest(here)
        assert (after, reports) == (step + 1, [])
        assert_is_state(found, after)
        names = {path.name for path in here.iterdir()} - {"damaged-step-00000003"}
        assert names == {f"step-{n:08d}" for n in (step, step + 1)}
        assert sorted(path.name for path in (here / f"step-{after:08d}").iterdir()) == FILES
    return steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", ["killed at a call", "refused at a call"])
def test_stopped_at_any_call(stopped: Path, kind: str, fault: str) -> None:
    folder = stopped / kind / fault
    ended = how_each_ended(folder)
    how = {-signal.SIGKILL} if fault.startswith("killed") else {faults.REFUSED, faults.SURVIVED}
    assert set(ended[:-1]) == how
    steps = check_every_folder(folder)
    survived = [step for step, end in zip(steps, ended, strict=True) if end == faults.SURVIVED]
    assert survived == [3] * len(survived)
    rest = [step for step, end in zip(steps, ended, strict=True) if end != faults.SURVIVED]
    committed = rest.index(3)
    assert rest == [2] * committed + [3] * (len(rest) - committed)
    assert 10 < committed < len(rest) - 3


@pytest.mark.parametrize("kind", KINDS)
def test_killed_at_any_byte(stopped: Path, kind: str) -> None:
    folder = stopped / kind / "killed at a byte"
    ended = how_each_ended(folder)
    assert set(ended[:-1]) == {-signal.SIGXFSZ}
    cut = set()
    for number in range(len(ended) - 1):
        (temporary,) = (folder / str(number)).glob(".tmp-*")
        sizes = {path.name: path.stat().st_size for path in temporary.iterdir()}
        assert max(sizes.values()) == number * faults.BYTES
        cut |= {name for name, size in sizes.items() if size == number * faults.BYTES}
    assert cut == set(FILES)
    assert check_every_folder(folder) == [2] * (len(ended) - 1) + [3]


@pytest.mark.parametrize("kind", KINDS)
def test_refused_at_any_byte(stopped: Path, kind: str) -> None:
    folder = stopped / kind / "refused at a byte"
    ended = how_each_ended(folder)
    assert set(ended[:-1]) == {faults.REFUSED}
    assert len(ended) == len(how_each_ended(stopped / kind / "killed at a byte"))
    assert list(folder.glob("*/.tmp-*")) == []
    assert check_every_folder(folder) == [2] * (len(ended) - 1) + [3]


def test_files_are_on_the_disk_before_their_folder_is_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[tuple[str, str]] = []
    synced: dict[str, bytes] = {}
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        events.append(("synced", str(path.relative_to(tmp_path))))
        if path.is_file():
            synced[path.name] = path.read_bytes()
        fsync(descriptor)

    def recorded_rename(source: Path, target: Path) -> None:
        events.append((str(source.relative_to(tmp_path)), str(target.relative_to(tmp_path))))
        rename(source, target)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    written = write_checkpoint(tmp_path, 7, faults.state(7))
    temporary = ".tmp-step-00000007"
    assert events == [
        ("synced", f"{temporary}/state.json"),
        ("synced", f"{temporary}/state.safetensors"),
        ("synced", f"{temporary}/manifest.json"),
        ("synced", temporary),
        (temporary, "step-00000007"),
        ("synced", "."),
    ]
    assert synced == {name: (written / name).read_bytes() for name in FILES}


def test_a_disk_that_cannot_be_read_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path, step, faults.state(step))
    digest = checkpoint.verify.__globals__["digest"]

    def broken(path: Path) -> str:
        if "step-00000002" in str(path):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return str(digest(path))

    monkeypatch.setattr("hyper_tune.durable.digest", broken)
    step, found, (report,) = read_newest(tmp_path)
    assert_is_state(found, 1)
    assert step == 1
    assert report.startswith(f"checkpoint {tmp_path / 'step-00000002'} is damaged and not used: ")
    assert "Input/output error" in report
