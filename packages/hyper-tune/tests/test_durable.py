"""Committed folders are checked whole; a replaced file is the old one or the new one."""

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hyper_tune import durable
from hyper_tune.durable import DamagedError, commit, digest, remove_temporary, verify, write_text

CONTENT = {"a.bin": b"\x00\xff" * 50, "b.txt": b""}


@pytest.fixture
def committed(tmp_path: Path) -> Path:
    temporary = tmp_path / ".tmp-final"
    temporary.mkdir()
    for name, content in CONTENT.items():
        (temporary / name).write_bytes(content)
    commit(temporary, tmp_path / "final")
    assert not temporary.exists()
    return tmp_path / "final"


def damage_of(folder: Path) -> str:
    with pytest.raises(DamagedError) as caught:
        verify(folder)
    return str(caught.value)


def test_a_committed_folder_holds_its_files_and_their_digests(committed: Path) -> None:
    verify(committed)
    files = {path.name: path.read_bytes() for path in committed.iterdir()}
    manifest = json.loads(files.pop("manifest.json"))
    assert files == CONTENT
    assert manifest == {
        "format": 1,
        "name": "final",
        "files": {
            name: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in CONTENT.items()
        },
    }


def test_nothing_is_overwritten(committed: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in committed.iterdir()}
    temporary = tmp_path / ".tmp-final"
    temporary.mkdir()
    (temporary / "a.bin").write_bytes(b"other")
    with pytest.raises(FileExistsError) as caught:
        commit(temporary, committed)
    assert str(caught.value) == f"{committed} exists; a committed folder is never overwritten."
    assert {path.name: path.read_bytes() for path in committed.iterdir()} == before


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_every_flipped_bit_is_found(committed: Path, name: str) -> None:
    path = committed / name
    whole = path.read_bytes()
    for position in range(len(whole)):
        for bit in (position % 8, (position + 3) % 8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            damage_of(committed)
    path.write_bytes(whole)
    verify(committed)


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_every_truncation_is_found(committed: Path, name: str) -> None:
    path = committed / name
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        damage_of(committed)
    path.write_bytes(whole + b"\0")
    damage_of(committed)


def change_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}, indent=1))


def replace_by_link(folder: Path) -> None:
    (folder / "a.bin").rename(folder.parent / "elsewhere")
    (folder / "a.bin").symlink_to(folder.parent / "elsewhere")


def flip(folder: Path) -> None:
    content = (folder / "a.bin").read_bytes()
    (folder / "a.bin").write_bytes(content[::-1])


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no manifest": (lambda f: (f / "manifest.json").unlink(), "it has no manifest"),
    "a missing file": (lambda f: (f / "b.txt").unlink(), "files and manifest differ: b.txt"),
    "one more file": (lambda f: (f / "c").touch(), "files and manifest differ: c"),
    "a short file": (
        lambda f: (f / "a.bin").write_bytes(b"1234"),
        "a.bin has 4 bytes, expected 100",
    ),
    "another content": (flip, "a.bin does not match its digest"),
    "a link": (replace_by_link, "a.bin is not a regular file"),
    "another format": (
        lambda f: change_manifest(f, format=2),
        "its format is 2, this version reads 1",
    ),
    "another name": (lambda f: change_manifest(f, name="step"), "it was written as step"),
    "an empty list": (
        lambda f: change_manifest(f, files={}),
        "files and manifest differ: a.bin, b.txt",
    ),
    "a space more": (
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes() + b" "),
        "its manifest was changed",
    ),
    "a huge manifest": (
        lambda f: change_manifest(f, padding="x" * (1 << 20)),
        "its manifest is too large",
    ),
}
UNREADABLE = [
    b"",
    b"{}",
    b"[]",
    b"null",
    b"\xff",
    b"[" * 200_000,
    b'{"files": []}',
    b'{"format": 1, "name": "final", "files": {}, "files": {}}',
    b'{"format": 1, "name": "final", "files": {}, "more": NaN}',
    b'{"files": {"a": 1}, "format": 1, "name": "final"}',
    b'{"files": {"a": {}}}',
]


@pytest.mark.parametrize("name", DAMAGES)
def test_damage_is_named(committed: Path, name: str) -> None:
    inflict, text = DAMAGES[name]
    inflict(committed)
    assert damage_of(committed) == text


@pytest.mark.parametrize("content", UNREADABLE, ids=range(len(UNREADABLE)))
def test_an_unreadable_manifest_is_named(committed: Path, content: bytes) -> None:
    (committed / "manifest.json").write_bytes(content)
    assert damage_of(committed) == "its manifest is not readable"


@pytest.mark.parametrize("name", ["final", "final/manifest.json"])
def test_a_linked_folder_or_manifest_is_not_accepted(committed: Path, name: str) -> None:
    path = committed.parent / name
    elsewhere = committed.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    assert damage_of(committed) == "it has no manifest"


def test_digest_is_the_sha256_of_the_content(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * 1000)
    assert digest(path) == hashlib.sha256(path.read_bytes()).hexdigest()


def test_text_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    for text in ("", "größe = 0.1\n", "x" * 100_000):
        write_text(path, text)
        assert path.read_text(encoding="utf-8") == text
        assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("existed", [True, False])
def test_text_is_old_or_new_wherever_writing_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existed: bool
) -> None:
    path = tmp_path / "summary.json"
    left = 0

    def stopping(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == -1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return function(*arguments, **options)

        return call

    for name in ("fsync", "open", "replace"):
        monkeypatch.setattr(durable.os, name, stopping(getattr(os, name)))
    seen = []
    for number in range(5):
        path.unlink(missing_ok=True)
        if existed:
            path.write_text("old")
        left = number
        if number < 4:
            with pytest.raises(OSError, match="No space left"):
                write_text(path, "new")
        else:
            write_text(path, "new")
        seen.append(path.read_text() if path.exists() else None)
    old = "old" if existed else None
    assert seen == [old, old, "new", "new", "new"]
    remove_temporary(tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_leftovers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (tmp_path / "tmp-file").touch()
    (tmp_path / ".tmp-file").touch()
    (tmp_path / ".tmp-folder" / "inner").mkdir(parents=True)
    (tmp_path / ".tmp-folder" / "inner" / "file").touch()
    (tmp_path / ".tmp-link").symlink_to(kept)
    (tmp_path / ".tmp-dangling").symlink_to(tmp_path / "nowhere")
    remove_temporary(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kept", "tmp-file"}
    assert (kept / "file").exists()
