"""What a disk may hold after the power fails: a trace, cut anywhere, less what was not synced.

The model is POSIX's: a file's content is on the disk once the file is synced, and a name once its
folder is; of what is not, any part may be there. A rename is one change of its folder.
"""

import io
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Event = tuple[Any, ...]
MADE = ("mkdir", "create", "rename", "remove")


class Recorder:
    """Lists what this process does to files under a folder: makes, fills, syncs, renames."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.events: list[Event] = []
        for module, name, note in (
            (os, "mkdir", lambda path, *_, **o: self._note("mkdir", path, o)),
            (io, "open", self._opened),
            (os, "fsync", self._synced),
            (os, "rename", lambda a, b, **o: self._note("rename", a, o, b)),
            (os, "replace", lambda a, b, **o: self._note("rename", a, o, b)),
            (os, "unlink", lambda path, **o: self._note("remove", path, o)),
            (os, "rmdir", lambda path, **o: self._note("remove", path, o)),
        ):
            monkeypatch.setattr(module, name, self._noted(getattr(module, name), note))

    @staticmethod
    def _noted(function: Callable[..., Any], note: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            event = note(*arguments, **options)
            result = function(*arguments, **options)
            if event is not None:
                event()
            return result

        return call

    def _path(self, path: Any, options: dict[str, Any]) -> str:
        folder = options.get("dir_fd")
        if folder is not None:
            path = Path(f"/proc/self/fd/{folder}").readlink() / path
        return str(Path(path).relative_to(self.root))

    def _note(
        self, kind: str, path: Any, options: dict[str, Any], *more: Any
    ) -> Callable[[], object]:
        event = (kind, self._path(path, options), *(self._path(p, {}) for p in more))
        return lambda: self.events.append(event)

    def _opened(self, path: Any, mode: str = "r", *_: Any, **__: Any) -> Any:
        if mode[0] not in "wxa" or not Path(path).is_relative_to(self.root):
            return None
        return self._note("create", path, {})

    def _synced(self, descriptor: int) -> Callable[[], object]:
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        name = self._path(path, {})
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return lambda: self.events.append(("sync folder", name))
        self.events.append(("fill", name, path.read_bytes()))
        return lambda: self.events.append(("sync file", name))


class Disk:
    """Folders and files as they are in memory, and as much of them as is on the disk for sure."""

    def __init__(self, root: Path) -> None:
        self.now: dict[int, dict[str, int]] = {0: {}}
        self.kept: dict[int, dict[str, int]] = {0: {}}
        self.pending: dict[int, list[tuple[str, int | None]]] = {}
        self.content: dict[int, bytes] = {}
        self.kept_content: dict[int, bytes] = {}
        for path in sorted(root.rglob("*")):
            name = str(path.relative_to(root))
            self.apply(("mkdir" if path.is_dir() else "create", name))
            if path.is_file():
                self.apply(("fill", name, path.read_bytes()))
                self.apply(("sync file", name))
        for folder in self.now:
            self._sync_folder(folder)

    def _find(self, path: str) -> int:
        node = 0
        for part in Path(path).parts:
            node = self.now[node][part]
        return node

    def _set(self, path: str, node: int | None) -> None:
        folder, name = self._find(str(Path(path).parent)), Path(path).name
        self.pending.setdefault(folder, []).append((name, node))
        if node is None:
            del self.now[folder][name]
        else:
            self.now[folder][name] = node

    def _sync_folder(self, folder: int) -> None:
        self.kept[folder] = dict(self.now[folder])
        self.pending.pop(folder, None)

    def apply(self, event: Event) -> None:
        """Take one event of a trace."""
        kind, path, *more = event
        if kind in ("mkdir", "create"):
            node = len(self.now) + len(self.content) + 1
            if kind == "mkdir":
                self.now[node], self.kept[node] = {}, {}
            else:
                self.content[node] = b""
            self._set(path, node)
        elif kind == "fill":
            self.content[self._find(path)] = more[0]
        elif kind == "sync file":
            node = self._find(path)
            self.kept_content[node] = self.content[node]
        elif kind == "sync folder":
            self._sync_folder(self._find(path))
        elif kind == "rename":
            self._rename(path, more[0])
        elif kind == "remove":
            self._set(path, None)

    def _rename(self, old: str, new: str) -> None:
        node, folder = self._find(old), self._find(str(Path(old).parent))
        assert folder == self._find(str(Path(new).parent)), "one change of one folder"
        del self.now[folder][Path(old).name]
        self.now[folder][Path(new).name] = node
        change = (Path(old).name, None), (Path(new).name, node)
        self.pending.setdefault(folder, []).append(change)  # type: ignore[arg-type]

    def crashes(self) -> Iterator[dict[str, bytes | None]]:
        """Yield what may be there after a crash: content by path, None of a folder."""
        folders = list(self.pending)
        full = {folder: len(changes) for folder, changes in self.pending.items()}
        choices = [dict.fromkeys(folders, 0), full]
        for folder in folders:
            for count in range(full[folder] + 1):
                choices += [{**base, folder: count} for base in choices[:2]]
        for chosen in {tuple(sorted(choice.items())) for choice in choices}:
            for part in (0.0, 0.5, 1.0):
                tree: dict[str, bytes | None] = {}
                self._walk(0, "", dict(chosen), part, tree)
                yield tree

    def _walk(
        self,
        node: int,
        path: str,
        chosen: dict[int, int],
        part: float,
        tree: dict[str, bytes | None],
    ) -> None:
        if node in self.content:
            unsynced = self.content[node]
            tree[path] = self.kept_content.get(node, unsynced[: int(part * len(unsynced))])
            return
        if path:
            tree[path] = None
        entries = dict(self.kept[node])
        for change in self.pending.get(node, [])[: chosen.get(node, 0)]:
            for name, target in change if isinstance(change[0], tuple) else [change]:
                entries.pop(name, None)
                if target is not None:
                    entries[name] = target
        for name, target in entries.items():
            self._walk(target, f"{path}/{name}" if path else name, chosen, part, tree)


def write_tree(tree: dict[str, bytes | None], folder: Path) -> None:
    """Write what `Disk.crashes` yields into an empty folder."""
    folder.mkdir()
    for path, content in tree.items():
        if content is None:
            (folder / path).mkdir()
        else:
            (folder / path).write_bytes(content)
