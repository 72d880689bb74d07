"""Checkpoints: everything that changes the next step, in safetensors and JSON, or not at all."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from hyper_tune import strict_json
from hyper_tune.durable import (
    MANIFEST,
    TEMPORARY,
    DamagedError,
    commit,
    digest,
    make_folder,
    remove_temporary,
    verify,
)
from hyper_tune.errors import UserError
from hyper_tune.tree import flatten, unflatten

TENSORS, PLAIN = "state.safetensors", "state.json"
_PREFIX = "step-"
# In bytes. What is parsed takes many times its text, and a file may be made to exhaust the memory.
_LIMIT = 1 << 20


def _folder(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}"


def _steps(folder: Path) -> list[int]:
    """Return the steps of all committed checkpoints, newest first."""
    names = [path.name.removeprefix(_PREFIX) for path in folder.glob(f"{_PREFIX}*")]
    return sorted((int(name) for name in names if name.isdecimal()), reverse=True)


def has_checkpoints(folder: Path) -> bool:
    """Return whether any checkpoint was committed, intact or not."""
    return bool(_steps(folder))


def write_checkpoint(folder: Path, step: int, state: Any, *, keep: int = 3) -> Path:
    """Write ``folder/step-00000123`` whole, then remove all up to it but the newest ``keep``.

    ``state``: nested dicts and lists of tensors and plain values. Older checkpoints are removed
    only after the new one has been read back and verified. Of a later step there can only be a
    damaged one, which is left alone and does not count.

    Raises:
        ValueError: the state has more names or plain values than are read again.
        FileExistsError: the step was saved before; nothing is overwritten.
        OSError: the disk is full or refuses; the checkpoints that were there stay.
    """
    tensors, plain = flatten(state)
    contents = {
        TENSORS: save({key: value.contiguous() for key, value in tensors.items()}),
        PLAIN: json.dumps(plain, allow_nan=False).encode(),
    }
    _plain_of(contents)  # Refuses what could not be read again.
    make_folder(folder)
    remove_temporary(folder)
    final = _folder(folder, step)
    _set_aside_if_damaged(final)
    temporary = folder / f"{TEMPORARY}{final.name}"
    temporary.mkdir()
    try:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
        commit(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    verify(final)
    for old in [saved for saved in _steps(folder) if saved <= step][keep:]:
        shutil.rmtree(_folder(folder, old))
    return final


def _plain_of(contents: Mapping[str, bytes]) -> Any:
    """Return the plain values of a checkpoint's files, of which nothing else is looked at.

    Raises:
        ValueError: there are more than are read, of plain values or of tensors, or not one way to
            read them.
    """
    size = int.from_bytes(contents[TENSORS][:8], "little")
    # safetensors takes the last of two tensors of one name; others might take the first.
    if size > _LIMIT:
        raise ValueError(f"{size} bytes of names and shapes of tensors, at most {_LIMIT} are read")
    strict_json.parse(contents[TENSORS][8 : 8 + size], _LIMIT)
    return strict_json.parse(contents[PLAIN], _LIMIT)


def _set_aside_if_damaged(path: Path) -> None:
    """Make way for a step that is reached again after its checkpoint was found damaged."""
    if not path.exists():
        return
    try:
        verify(path)
    except DamagedError:
        aside = path.with_name(f"damaged-{path.name}")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)


def read_newest(folder: Path) -> tuple[int, Any, list[str]]:
    """Return step and state of the newest intact checkpoint, and a line for each damaged one.

    Raises:
        UserError: no checkpoint is intact; what was found is listed.
    """
    reports: list[str] = []
    for step in _steps(folder):
        path = _folder(folder, step)
        try:
            return step, _read(path), reports
        except DamagedError as error:
            reports.append(f"checkpoint {path} is damaged and not used: {error}")
    found = "\n".join(reports) or f"{folder} holds none."
    raise UserError(f"no intact checkpoint to resume from. {found}")


def read_step(folder: Path, step: int) -> Any:
    """Return the state of the checkpoint of one step.

    Raises:
        UserError: there is none, which lists the steps that there are, or it is damaged.
    """
    if step not in _steps(folder):
        there = ", ".join(str(saved) for saved in reversed(_steps(folder))) or "none"
        raise UserError(f"{folder} has no checkpoint of step {step}; it has {there}.")
    try:
        return _read(_folder(folder, step))
    except DamagedError as error:
        raise UserError(f"checkpoint {_folder(folder, step)} is damaged: {error}") from error


def checkpoint_digest(folder: Path, step: int) -> str:
    """Return the SHA-256 of a checkpoint's manifest, which has those of its files."""
    return digest(_folder(folder, step) / MANIFEST)


def _read(path: Path) -> Any:
    try:
        verify(path)
        contents = {name: (path / name).read_bytes() for name in (TENSORS, PLAIN)}
        plain = _plain_of(contents)
        return unflatten(load(contents[TENSORS]), plain)
    except DamagedError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise DamagedError(f"it cannot be read: {error}") from error
