"""Files and folders that are there whole or not at all, whenever the process or machine stops."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyper_tune import strict_json

MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
FORMAT = 1
_MANIFEST_LIMIT = 1 << 20


class DamagedError(ValueError):
    """A committed folder that does not hold what its manifest says."""


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder and those above it, and wait until all of them are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync(folder.parent)


def write_text(path: Path, text: str) -> None:
    """Replace a file by ``text``: readers see the old one or the new one, never a part."""
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync(path.parent)


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish(temporary: Path, final: Path) -> None:
    """Give a folder of finished files its final name, once they are on the disk.

    Order: files synced, a manifest last, folder synced, renamed, parent synced.

    Raises:
        FileExistsError: ``final`` is there already; nothing is ever overwritten.
    """
    if final.exists():
        raise FileExistsError(f"{final} exists; a committed folder is never overwritten.")
    for path in sorted(temporary.iterdir(), key=lambda path: (path.name == MANIFEST, path.name)):
        sync(path)
    sync(temporary)
    temporary.rename(final)
    sync(final.parent)


def commit(temporary: Path, final: Path) -> None:
    """Publish a folder of finished files with a manifest of their digests, written last.

    Raises:
        FileExistsError: ``final`` is there already; nothing is ever overwritten.
    """
    names = sorted(path.name for path in temporary.iterdir())
    files = {
        name: {"bytes": (temporary / name).stat().st_size, "sha256": digest(temporary / name)}
        for name in names
    }
    manifest = {"format": FORMAT, "name": final.name, "files": files}
    (temporary / MANIFEST).write_bytes(_manifest_bytes(manifest))
    publish(temporary, final)


def _manifest_bytes(manifest: Mapping[str, Any]) -> bytes:
    return json.dumps(manifest, indent=1).encode()


def verify(folder: Path) -> None:
    """Check a committed folder against its manifest, before anything in it is parsed.

    Raises:
        DamagedError: what is wrong, in a few words.
    """
    manifest = _read_manifest(folder)
    present = {path.name for path in folder.iterdir()} - {MANIFEST}
    if present != manifest.keys():
        odd = ", ".join(sorted(present ^ manifest.keys()))
        raise DamagedError(f"files and manifest differ: {odd}")
    for name, entry in manifest.items():
        path = folder / name
        if path.is_symlink() or not path.is_file():
            raise DamagedError(f"{name} is not a regular file")
        size = path.stat().st_size
        if size != entry["bytes"]:
            raise DamagedError(f"{name} has {size} bytes, expected {entry['bytes']}")
        if digest(path) != entry["sha256"]:
            raise DamagedError(f"{name} does not match its digest")


def _read_manifest(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / MANIFEST
    if folder.is_symlink() or path.is_symlink() or not path.is_file():
        raise DamagedError("it has no manifest")
    if path.stat().st_size > _MANIFEST_LIMIT:
        raise DamagedError("its manifest is too large")
    content = path.read_bytes()
    try:
        manifest = strict_json.parse(content, _MANIFEST_LIMIT)
        files = manifest["files"]
        entries = {str(name): (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
        version, name = manifest["format"], manifest["name"]
        canonical = content == _manifest_bytes(manifest)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError("its manifest is not readable") from error
    if version != FORMAT:
        raise DamagedError(f"its format is {version}, this version reads {FORMAT}")
    if not canonical:
        raise DamagedError("its manifest was changed")
    if name != folder.name:
        raise DamagedError(f"it was written as {name}")
    return {name: {"bytes": size, "sha256": sha} for name, (size, sha) in entries.items()}


def remove_temporary(folder: Path) -> None:
    """Remove what writers that died left behind in ``folder``."""
    for path in folder.glob(f"{TEMPORARY}*"):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
