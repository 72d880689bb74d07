"""Reads checkpoints that were made to do harm, and says what each reading did.

A script: `hostile_loads.py FOLDER ROUNDS` prints a JSON object. Each folder's manifest is right,
as its maker can make it: only what is parsed afterwards stands between the content and the run.
"""

import hashlib
import json
import os
import pickle
import random
import struct
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from hyper_tune import UserError
from hyper_tune.checkpoint import read_newest, write_checkpoint

BANNED = (
    *("pickle.", "exec", "compile", "import", "marshal.", "code.__new__", "ctypes."),
    *("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.", "socket."),
)
SEEN: list[str] = []
WATCHED: list[Path] = []
TENSORS, PLAIN, MANIFEST = "state.safetensors", "state.json", "manifest.json"


def hook(event: str, arguments: Any) -> None:
    """Note what a reading must not do: run code, start processes, speak, open other files."""
    if not WATCHED:
        return
    if event.startswith(BANNED):
        SEEN.append(event)
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith((str(WATCHED[0]), "/proc/self/")):
            SEEN.append(f"open {path}")


class Attack:
    """What runs when it is unpickled."""

    def __reduce__(self) -> Any:
        return os.system, ("true",)


def header(entries: dict[str, Any], data: bytes = b"") -> bytes:
    """Return a safetensors file with a header of one's own."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], start: int = 0, end: int = 0) -> dict[str, Any]:
    """Return a tensor's place in a safetensors file."""
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def files(kind: str, chance: random.Random, good: dict[str, bytes]) -> dict[str, bytes]:
    """Return the two files of a kind of attack."""
    many = chance.randint(1_000, 30_000)
    torn = chance.randbytes(chance.randint(0, 4096))
    tensors = {
        "pickled tensors": lambda: pickle.dumps(Attack()),
        "endless header": lambda: struct.pack("<Q", 2**63 - 1) + torn,
        "huge shape": lambda: header({"w": entry([2**40, 2**20], 0, 64)}, bytes(64)),
        "shape that wraps round": lambda: header({"w": entry([2**32, 2**32, 4], 0, 0)}),
        "nothing, but huge": lambda: header({"w": entry([0, 2**62])}),
        "overlapping tensors": lambda: header(
            {"w": entry([4], 0, 16), "v": entry([4], 0, 16)}, bytes(16)
        ),
        "a tensor twice": lambda: header(
            b'{"w":' + json.dumps(entry([0])).encode() + b',"w":' + b'{"dtype":"F32",'
            b'"shape":[0],"data_offsets":[0,0]}}'
        ),
        "many tensors": lambda: header({f"{n:x}": entry([0]) for n in range(many)}),
        "numbers that are none": lambda: header(
            {"w": entry([2], 0, 8)}, struct.pack("<2f", float("nan"), float("inf"))
        ),
        "bytes": lambda: torn,
    }
    nested = b"[" * (many * 30) + b"]" * (many * 30)
    plain = {
        "pickled values": lambda: pickle.dumps(Attack()),
        "deep": lambda: nested[: 2 << 20],
        "deep objects": lambda: b'{"a":' * many + b"1" + b"}" * many,
        "wide": lambda: b"[" + b"[]," * (10 * many + 50_000) + b"[]]",
        "wide objects": lambda: b"[" + b'{"":0},' * (4 * many + 50_000) + b"{}]",
        "longer than is read": lambda: b'"' + b"x" * (3 << 20) + b'"',
        "a key twice": lambda: b'{"run": 1, "run": 2}',
        "not a number": lambda: b'{"lr": NaN}',
        "infinite": lambda: b'{"lr": -Infinity}',
        "a long number": lambda: b"9" * (many + 5_000),
        "another tensor": lambda: b'{"w": {"$tensor": "../../elsewhere"}}',
        "a name that is none": lambda: b'{"w": {"$tensor": {"$tensor": "w"}}}',
        "keys that are none": lambda: b'{"$pairs": [[[1], 2], [{}, 3]]}',
        "attributes": lambda: b'{"__class__": "os.system", "__reduce__": ["true"]}',
        "no text": lambda: b"\xff\xfe\x00" + torn,
    }
    if kind in tensors:
        return {**good, TENSORS: tensors[kind]()}
    return {**good, PLAIN: plain[kind]()} if kind in plain else dict(good)


PATHS = ("path traversal", "absolute path", "linked file", "linked folder", "pipe", "two manifests")
KINDS = (
    *("pickled tensors", "endless header", "huge shape", "shape that wraps round"),
    *("nothing, but huge", "overlapping tensors", "a tensor twice", "many tensors"),
    *("numbers that are none", "bytes", "pickled values", "deep", "deep objects", "wide"),
    *("wide objects", "longer than is read", "a key twice", "not a number", "infinite"),
    *("a long number", "another tensor", "a name that is none", "keys that are none"),
    *("attributes", "no text", *PATHS),
)


def write(folder: Path, kind: str, content: dict[str, bytes]) -> None:
    """Write an attack as a checkpoint of step 2, with a manifest that agrees."""
    folder.mkdir()
    for name, data in content.items():
        (folder / name).write_bytes(data)
    outside = folder.parent.parent / "outside"
    outside.write_bytes(content[PLAIN])
    listed = {name: content[name] for name in sorted(content)}
    if kind == "path traversal":
        listed["../../outside"] = content[PLAIN]
    elif kind == "absolute path":
        listed[str(outside)] = content[PLAIN]
    elif kind == "linked file":
        (folder / PLAIN).unlink()
        (folder / PLAIN).symlink_to(outside)
    elif kind == "pipe":
        (folder / PLAIN).unlink()
        os.mkfifo(folder / PLAIN)
    entries = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name, data in listed.items()
    }
    manifest = json.dumps({"format": 1, "name": folder.name, "files": entries}, indent=1)
    if kind == "two manifests":
        manifest = manifest[:-2] + ',\n "files": {}\n}'
    (folder / MANIFEST).write_text(manifest)
    if kind == "linked folder":
        folder.rename(folder.parent.parent / "elsewhere")
        folder.symlink_to(folder.parent.parent / "elsewhere")


def peak_kib(name: str) -> int:
    """Return a line of this process's memory: VmRSS now, VmHWM the most since it was reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1])
    raise AssertionError(name)


def load(folder: Path) -> tuple[str, float, int]:
    """Read a checkpoint; say whether it was taken, the seconds, and the bytes of memory."""
    Path("/proc/self/clear_refs").write_text("5")
    before = peak_kib("VmRSS")
    started = time.process_time()
    try:
        WATCHED.append(folder.parent.resolve())
        read_newest(folder)
        outcome = "taken"
    except UserError:
        outcome = "refused"
    finally:
        WATCHED.clear()
    return outcome, time.process_time() - started, 1024 * (peak_kib("VmHWM") - before)


def main(root: Path, rounds: int) -> None:
    """Read as many attacks, each kind in turn, and print what was found."""
    sys.addaudithook(hook)
    chance = random.Random(0)
    write_checkpoint(root / "good", 2, {"w": torch.ones(3), "step": 2})
    read_newest(root / "good")
    good = {n: (root / "good" / "step-00000002" / n).read_bytes() for n in (TENSORS, PLAIN)}
    outcomes: dict[str, Counter[str]] = {kind: Counter() for kind in KINDS}
    slowest, most = 0.0, -(2**62)
    for number in range(rounds):
        kind = KINDS[number % len(KINDS)]
        folder = root / str(number) / "checkpoints"
        folder.mkdir(parents=True)
        content = files(kind, chance, good)
        write(folder / "step-00000002", kind, content)
        size = sum(map(len, content.values()))
        del content
        outcome, seconds, memory = load(folder)
        outcomes[kind][outcome] += 1
        slowest, most = max(slowest, seconds), max(most, memory - 2 * size)
    events = list(SEEN)
    WATCHED.append(root)
    pickle.loads(pickle.dumps(Attack()))
    json.dump(
        {
            "outcomes": outcomes,
            "events": events,
            "seconds": slowest,
            "memory_above_twice_the_file": most,
            "control": SEEN[len(events) :],
        },
        sys.stdout,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]))
