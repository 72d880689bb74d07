"""Files that are whole or not there: written aside and renamed, read without trust."""

import ctypes
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lowrank_adapters.errors import AdapterError

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` make a file aside, and give it the name ``path`` once it is on the disk.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> replace_file(folder / "note", lambda path: path.write_text("whole") and None)
    >>> [file.name for file in folder.iterdir()]
    ['note']
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _aside(path)
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let ``write`` fill a folder aside, and give it the name ``folder`` once it is on the disk."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = _aside(folder), _aside(folder)
    temporary.mkdir()
    try:
        write(temporary)
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        if folder.exists() and not _exchange(temporary, folder):
            folder.rename(replaced)
        if not folder.exists():
            _rename_or_put_back(temporary, folder, replaced)
        sync(folder.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _rename_or_put_back(temporary: Path, folder: Path, replaced: Path) -> None:
    try:
        temporary.rename(folder)
    except OSError:
        if replaced.exists():
            replaced.rename(folder)
        raise


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names at once, so that neither is ever missing; False where it cannot be."""
    rename = getattr(ctypes.CDLL(None), "renameat2", None)
    if rename is None:
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    failed: int = rename(here, os.fsencode(one), here, os.fsencode(other), exchange)
    return failed == 0


def _aside(path: Path) -> Path:
    return path.with_name(f".tmp-{secrets.token_hex(8)}")


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        AdapterError: the file is missing (a pickle beside it is named, and not opened), cut short,
            or not safetensors.
    """
    if not path.is_file():
        raise AdapterError(f"{path} does not exist; {_never_a_pickle(path)}.")
    try:
        with safe_open(path, "pt") as file:
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
    except SafetensorError as error:
        raise AdapterError(f"{path} is not a whole safetensors file: {error}.") from error


def _never_a_pickle(path: Path) -> str:
    beside = sorted(path.parent.iterdir()) if path.parent.is_dir() else []
    pickles = [file.name for file in beside if file.suffix in _PICKLES]
    if not pickles:
        return f"only {path.name} is read, never a pickle"
    return (
        f"{', '.join(pickles)} is a pickle, which can run code when opened and is not read: "
        f"write it again as {path.name}, with the library that it is from"
    )
