"""Damage to a checkpoint's files is found whatever it is, and the one before is taken instead."""

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_tune import durable
from hyper_tune.checkpoint import read_newest, write_checkpoint
from hyper_tune.durable import DamagedError, verify

FILES = ("state.safetensors", "state.json", "manifest.json")
Tree = dict[str, bytes]


def state(step: int) -> dict[str, Any]:
    return {"w": torch.arange(50.0) + step, "mask": torch.ones(3, dtype=torch.bool), "step": step}


def flip(tree: Tree, _: Tree, chance: random.Random) -> None:
    name = chance.choice(FILES)
    content = bytearray(tree[name])
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    tree[name] = bytes(content)


def truncate(tree: Tree, _: Tree, chance: random.Random) -> None:
    name = chance.choice(FILES)
    tree[name] = tree[name][: chance.randrange(len(tree[name]))]


def append(tree: Tree, _: Tree, chance: random.Random) -> None:
    name = chance.choice(FILES)
    tail = chance.choice([b" ", b"\n", b"\0", chance.randbytes(chance.randint(1, 99))])
    tree[name] += tail


def zero(tree: Tree, _: Tree, chance: random.Random) -> None:
    name = chance.choice(FILES)
    start = chance.randrange(len(tree[name]) // 2)
    rest = len(tree[name]) - start
    tree[name] = tree[name][:start] + bytes(rest)


def swap(tree: Tree, _: Tree, chance: random.Random) -> None:
    one, other = chance.sample(FILES, 2)
    tree[one], tree[other] = tree[other], tree[one]


def mix_steps(tree: Tree, before: Tree, chance: random.Random) -> None:
    for name in chance.sample(FILES, chance.randint(1, 3)):
        tree[name] = before[name]


def delete(tree: Tree, _: Tree, chance: random.Random) -> None:
    for name in chance.sample(FILES, chance.randint(1, 3)):
        del tree[name]


def add(tree: Tree, _: Tree, chance: random.Random) -> None:
    tree[f"state-{chance.randrange(99)}.safetensors"] = tree["state.safetensors"]


DAMAGES = (flip, flip, flip, truncate, append, zero, swap, mix_steps, delete, add)


def read_tree(folder: Path) -> Tree:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_folder(folder: Path, tree: Tree) -> None:
    shutil.rmtree(folder)
    folder.mkdir()
    for name, content in tree.items():
        (folder / name).write_bytes(content)


def damaged_folders(folder: Path, rounds: int) -> Any:
    """Save three steps; yield the newest's folder, damaged anew each time, and by what."""
    for step in (1, 2, 3):
        write_checkpoint(folder, step, state(step))
    newest = folder / "step-00000003"
    whole, before = read_tree(newest), read_tree(folder / "step-00000002")
    chance = random.Random(5)
    for number in range(rounds):
        damage = DAMAGES[number % len(DAMAGES)]
        tree = dict(whole)
        damage(tree, before, chance)
        assert tree != whole
        write_folder(newest, tree)
        yield newest, damage.__name__


def test_damage_is_found_and_the_step_before_is_used(
    rounds: Callable[[int, int], int], figure: Callable[..., None], tmp_path: Path
) -> None:
    counts: Counter[str] = Counter()
    for newest, kind in damaged_folders(tmp_path, rounds(1_000, 10_000)):
        with pytest.raises(DamagedError):
            verify(newest)
        step, found, (report,) = read_newest(tmp_path)
        assert step == 2
        assert torch.equal(found["w"], state(2)["w"])
        assert report.startswith(f"checkpoint {newest} is damaged and not used: ")
        counts[kind] += 1
    figure(
        5,
        "each damage to a checkpoint is rejected, and the step before is used",
        f"{counts.total():,} of {counts.total():,}: "
        + ", ".join(f"{kind.replace('_', ' ')} {count:,}" for kind, count in counts.items()),
    )


def test_without_digests_damage_would_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def trusting(path: Path) -> str:
        manifest = json.loads((path.parent / "manifest.json").read_text())
        return str(manifest["files"][path.name]["sha256"])

    used: Counter[int] = Counter()
    folders = damaged_folders(tmp_path, 60)
    next(folders)
    monkeypatch.setattr(durable, "digest", trusting)
    for _ in folders:
        used[read_newest(tmp_path)[0]] += 1
    assert used[3] > 0
    assert used[2] > 0
