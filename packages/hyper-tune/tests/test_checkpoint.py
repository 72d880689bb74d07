"""Checkpoints give back all of a state; damaged ones are passed over and named."""

import hashlib
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_tune import UserError
from hyper_tune.checkpoint import has_checkpoints, read_newest, write_checkpoint


def state(step: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(step)
    flat = torch.randn(12, generator=generator)
    return {
        "owner": {"a.0": flat[:6].view(2, 3), "b.0": flat[6:].view(3, 2).T},
        "mask": torch.tensor([True, False]),
        "moments": {0: [flat.double() / 3, flat.bfloat16()], "step": torch.tensor(step)},
        "lr": 0.1 + step,
        "history": [{"step": step, "live": 3}],
        "none": None,
        "empty": torch.zeros(0, 3),
    }


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def folder_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of the steps 1, 2 and 3."""
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / "run" / "checkpoints", step, state(step))
    return tmp_path / "run" / "checkpoints"


def test_the_newest_state_comes_back_whole(folder: Path) -> None:
    step, found, reports = read_newest(folder)
    assert (step, reports) == (3, [])
    assert_same(found, state(3))


def test_the_newest_is_the_highest_step(tmp_path: Path) -> None:
    for step in (9, 10, 123456789):
        assert write_checkpoint(tmp_path, step, state(step)) == folder_of(tmp_path, step)
        assert read_newest(tmp_path)[0] == step


def test_what_is_read_is_a_copy(folder: Path) -> None:
    _, first, _ = read_newest(folder)
    first["owner"]["a.0"].zero_()
    assert_same(read_newest(folder)[1], state(3))


@pytest.mark.parametrize("plain", [{}, [], {"step": 3}, {"w": torch.zeros(())}, torch.ones(2)])
def test_small_states(tmp_path: Path, plain: Any) -> None:
    write_checkpoint(tmp_path, 1, plain)
    assert_same(read_newest(tmp_path)[1], plain)


def test_keep_newest(tmp_path: Path) -> None:
    there = []
    for step in range(1, 7):
        write_checkpoint(tmp_path, step, state(step), keep=1 if step == 6 else 2)
        there.append(sorted(int(path.name[5:]) for path in tmp_path.iterdir()))
    assert there == [[1], [1, 2], [2, 3], [3, 4], [4, 5], [6]]


def test_there_is_a_checkpoint_or_not(tmp_path: Path, folder: Path) -> None:
    assert has_checkpoints(folder)
    assert not has_checkpoints(tmp_path)
    assert not has_checkpoints(tmp_path / "nowhere")
    (tmp_path / ".tmp-step-00000001").mkdir()
    (tmp_path / "damaged-step-00000001").mkdir()
    (tmp_path / "step-final").mkdir()
    assert not has_checkpoints(tmp_path)
    (tmp_path / "step-00000004").mkdir()
    assert has_checkpoints(tmp_path)


def test_a_saved_step_is_not_written_again(folder: Path) -> None:
    with pytest.raises(FileExistsError, match="step-00000003 exists; a committed folder is never"):
        write_checkpoint(folder, 3, state(7))
    assert_same(read_newest(folder)[1], state(3))
    assert sorted(path.name for path in folder.iterdir()) == [
        f"step-{step:08d}" for step in (1, 2, 3)
    ]


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), ValueError), ({1, 2}, TypeError), (object(), TypeError)]
)
def test_a_state_that_cannot_be_saved_changes_nothing(
    folder: Path, value: object, error: type[Exception]
) -> None:
    with pytest.raises(error, match=r"^owner/x "):
        write_checkpoint(folder, 4, {"owner": {"x": value}})
    assert len(list(folder.iterdir())) == 3
    assert read_newest(folder)[0] == 3


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def rewrite(folder: Path, name: str, content: bytes) -> None:
    """Replace a file and its digest, as a program would that writes the same layout."""
    (folder / name).write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


def leave_only_a_manifest(folder: Path) -> None:
    for name in ("state.json", "state.safetensors"):
        (folder / name).unlink()
    manifest = {"format": 1, "name": folder.name, "files": {}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))


TENSORS, PLAIN = "state.safetensors", "state.json"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped tensors": (lambda f: flip(f / TENSORS), "state.safetensors does not match its digest"),
    "flipped JSON": (lambda f: flip(f / PLAIN), "state.json does not match its digest"),
    "flipped manifest": (lambda f: flip(f / "manifest.json"), ""),
    "cut tensors": (lambda f: cut(f / TENSORS), "state.safetensors has "),
    "cut JSON": (lambda f: cut(f / PLAIN), "state.json has "),
    "cut manifest": (lambda f: cut(f / "manifest.json"), "its manifest is not readable"),
    "empty manifest": (lambda f: (f / "manifest.json").write_bytes(b""), "its manifest is not "),
    "no tensors": (lambda f: (f / TENSORS).unlink(), "files and manifest differ: state.safetens"),
    "no JSON": (lambda f: (f / PLAIN).unlink(), "files and manifest differ: state.json"),
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it has no manifest"),
    "nothing in the manifest": (leave_only_a_manifest, "it cannot be read: "),
    "a pickle for tensors": (
        lambda f: rewrite(f, TENSORS, pickle.dumps(state(3))),
        "it cannot be read: ",
    ),
    "tensors cut before the digest": (
        lambda f: rewrite(f, TENSORS, (f / TENSORS).read_bytes()[:-3]),
        "it cannot be read: ",
    ),
    "another state's JSON": (lambda f: rewrite(f, PLAIN, b'{"$tensor": "x"}'), "it cannot be read"),
    "a list for a name": (lambda f: rewrite(f, PLAIN, b'{"$tensor": []}'), "it cannot be read: "),
    "broken pairs": (lambda f: rewrite(f, PLAIN, b'{"$pairs": [1]}'), "it cannot be read: "),
    "no JSON text": (lambda f: rewrite(f, PLAIN, b"step: 3"), "it cannot be read: "),
    "endless JSON": (lambda f: rewrite(f, PLAIN, b"[" * 200_000), "it cannot be read: "),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(folder: Path, name: str) -> None:
    inflict, text = DAMAGES[name]
    inflict(folder_of(folder, 3))
    step, found, (report,) = read_newest(folder)
    assert step == 2
    assert_same(found, state(2))
    start = f"checkpoint {folder_of(folder, 3)} is damaged and not used: "
    assert report.startswith(start + text)
    assert len(report) > len(start)


def test_no_pickle_is_run(folder: Path, tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    for name in (TENSORS, PLAIN):
        rewrite(folder_of(folder, 3), name, pickle.dumps(Attack()))
    torch.save(Attack(), tmp_path / "saved.pt")
    rewrite(folder_of(folder, 2), TENSORS, (tmp_path / "saved.pt").read_bytes())
    step, found, reports = read_newest(folder)
    assert (step, len(reports)) == (1, 2)
    assert_same(found, state(1))
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder_of(folder, 3) / PLAIN).read_bytes())
    assert (tmp_path / "ran").exists()


def test_every_damaged_checkpoint_is_listed_when_none_is_whole(folder: Path) -> None:
    for step in (1, 2, 3):
        flip(folder_of(folder, step) / TENSORS)
    with pytest.raises(UserError) as caught:
        read_newest(folder)
    lines = "\n".join(
        f"checkpoint {folder_of(folder, step)} is damaged and not used: state.safetensors does "
        "not match its digest"
        for step in (3, 2, 1)
    )
    assert str(caught.value) == f"no intact checkpoint to resume from. {lines}"


def test_no_checkpoint_at_all_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_newest(tmp_path)
    assert str(caught.value) == f"no intact checkpoint to resume from. {tmp_path} holds none."


def test_a_damaged_step_is_set_aside_when_it_is_reached_again(folder: Path) -> None:
    for times in (1, 2):
        flip(folder_of(folder, 3) / TENSORS)
        damaged = {path.name: path.read_bytes() for path in folder_of(folder, 3).iterdir()}
        write_checkpoint(folder, 3, state(3 + times))
        assert read_newest(folder)[::2] == (3, [])
        assert_same(read_newest(folder)[1], state(3 + times))
        aside = folder / "damaged-step-00000003"
        assert {path.name: path.read_bytes() for path in aside.iterdir()} == damaged
    assert len(list(folder.iterdir())) == 4


def test_damaged_newer_checkpoints_do_not_push_out_the_one_just_written(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        write_checkpoint(tmp_path, step, state(step))
    for step in (20, 30):
        flip(folder_of(tmp_path, step) / TENSORS)
    assert read_newest(tmp_path)[0] == 10
    write_checkpoint(tmp_path, 12, state(12), keep=2)
    write_checkpoint(tmp_path, 14, state(14), keep=2)
    step, found, reports = read_newest(tmp_path)
    assert (step, len(reports)) == (14, 2)
    assert_same(found, state(14))
    assert sorted(int(path.name[5:]) for path in tmp_path.iterdir()) == [12, 14, 20, 30]


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"note": "x" * (1 << 20)}, r"^\d+ bytes of JSON, at most 1048576 are read$"),
        ({"note": [[]] * 50_001}, r"^50003 lists and objects, at most 50000 are read$"),
        (
            {f"{n:0200}": torch.zeros(0) for n in range(5_000)},
            r"^\d+ bytes of names and shapes of tensors, at most 1048576 are read$",
        ),
    ],
    ids=["values", "lists", "tensors"],
)
def test_what_could_not_be_read_again_is_not_saved(folder: Path, state: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        write_checkpoint(folder, 4, state)
    assert len(list(folder.iterdir())) == 3
    assert read_newest(folder)[0] == 3
