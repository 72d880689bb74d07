"""Power fails at any point of a save: the checkpoint before or the new one is there, and whole."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hyper_tune import UserError
from hyper_tune.checkpoint import has_checkpoints, read_newest, write_checkpoint
from hyper_tune.durable import write_text

STEPS = 3


def state(step: int) -> dict[str, Any]:
    return {"w": torch.full((5,), float(step)), "step": step}


def is_parent(event: Any) -> bool:
    return event[0] == "sync folder" and event[1] in (".", "run")


DROPPED: dict[str, Callable[[Any], bool]] = {
    "no file is synced": lambda event: event[0] == "sync file",
    "no folder is synced": lambda event: event[0] == "sync folder",
    "the folders above the first checkpoint are not synced": is_parent,
}


@pytest.fixture
def trace(disk_model: ModuleType, tmp_path: Path) -> list[Any]:
    """What the first saves of a run do, from no folder at all; each keeps only the newest."""
    root = tmp_path / "recorded"
    root.mkdir()
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = disk_model.Recorder(root, monkeypatch)
        for step in range(1, STEPS + 1):
            write_checkpoint(root / "run" / "checkpoints", step, state(step), keep=1)
            recorder.events.append(("saved", step))
    return recorder.events


def newest(folder: Path) -> int:
    """Return the newest step, whose state must be whole; 0 if nothing was ever saved."""
    if not has_checkpoints(folder):
        return 0
    step, found, _ = read_newest(folder)
    assert torch.equal(found["w"], state(step)["w"])
    assert found["step"] == step
    return step


def crash_everywhere(
    disk_model: ModuleType, events: list[Any], folder: Path
) -> Iterator[tuple[int, int]]:
    """Yield, for each state after a crash, the last step that was saved, and the newest there is.

    That is -1 where there are checkpoints, and none is whole.
    """
    (folder / "empty").mkdir(parents=True)
    disk = disk_model.Disk(folder / "empty")
    known: dict[frozenset[Any], int] = {}
    saved = 0
    for event in events:
        if event[0] == "saved":
            saved = event[1]
        else:
            disk.apply(event)
        for tree in disk.crashes():
            key = frozenset(tree.items())
            if key not in known:
                disk_model.write_tree(tree, folder / "crashed")
                try:
                    known[key] = newest(folder / "crashed" / "run" / "checkpoints")
                except UserError:
                    known[key] = -1
                shutil.rmtree(folder / "crashed")
            yield saved, known[key]


def test_every_crash_point_leaves_the_old_checkpoint_or_the_new(
    disk_model: ModuleType, trace: list[Any], figure: Callable[..., None], tmp_path: Path
) -> None:
    assert {event[0] for event in trace} >= {"fill", "sync file", "sync folder", *disk_model.MADE}
    found = list(crash_everywhere(disk_model, trace, tmp_path / "model"))
    assert len(found) > 500
    assert [step for saved, step in found if step not in (saved, saved + 1)] == []
    assert {step - saved for saved, step in found} == {0, 1}
    figure(
        4,
        "power fails at any point of a save, what is unsynced is lost in part: the old or the new",
        f"0 of {len(found)} crash states of {len(trace)} points without one",
    )


@pytest.mark.parametrize("dropped", DROPPED)
def test_a_save_that_leaves_out_a_sync_is_found(
    disk_model: ModuleType, trace: list[Any], tmp_path: Path, dropped: str
) -> None:
    events = [event for event in trace if not DROPPED[dropped](event)]
    assert len(events) < len(trace)
    found = crash_everywhere(disk_model, events, tmp_path / "model")
    assert any(step not in (saved, saved + 1) for saved, step in found)


def test_a_text_is_the_old_or_the_new(disk_model: ModuleType, tmp_path: Path) -> None:
    root = tmp_path / "recorded"
    root.mkdir()
    (root / "summary.json").write_text("old")
    disk = disk_model.Disk(root)
    with pytest.MonkeyPatch.context() as monkeypatch:
        recorder = disk_model.Recorder(root, monkeypatch)
        write_text(root / "summary.json", "the new text")
    found = []
    for event in recorder.events:
        disk.apply(event)
        found += [tree["summary.json"] for tree in disk.crashes()]
    assert set(found) == {b"old", b"the new text"}
    assert {tree["summary.json"] for tree in disk.crashes()} == {b"the new text"}
