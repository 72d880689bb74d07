"""Runs cells: finished ones are skipped, failed ones reported at the end, a killed run goes on."""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO, TextIO

from cells import Cell, program
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from hyper_tune.durable import make_folder, remove_temporary, write_text
from hyper_tune.errors import UserError

DONE, LOG = "done.json", "log.txt"
_GRACE_SECONDS = 20


@dataclass(frozen=True)
class Failure:
    """A cell that did not finish: what it said last, or the cell that it needs and that failed."""

    cell: Cell
    reason: str


@contextmanager
def locked(output: Path) -> Iterator[TextIO]:
    """Keep the folder from other runs, and from ours while a command that it started goes on.

    Raises:
        UserError: another run has it, or it cannot be written.
    """
    try:
        make_folder(output / "cells")
        lock = (output / ".lock").open("w")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written: {error}.") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another run, or a command that a killed one has started, works in {output}; wait "
                "for it, or give another --output."
            ) from error
        remove_temporary(output)
        yield lock


def finished(cell: Cell, output: Path) -> bool:
    """Return whether a cell has run to its end, and what it left is there."""
    folder = cell.folder(output)
    return (folder / DONE).is_file() and (folder / cell.result).is_file()


@dataclass
class Grid:
    """Runs cells, ``jobs`` at a time, each when those that it needs are finished."""

    output: Path
    lock: TextIO
    jobs: int = 1
    console: Console = field(default_factory=lambda: Console(stderr=True))
    _running: set[subprocess.Popen[bytes]] = field(default_factory=set)
    _stopping: bool = False

    def run(self, cells: Sequence[Cell]) -> list[Failure]:
        """Run what is not finished; return what failed.

        An interrupt ends the commands that run, and is raised again.
        """
        waiting = [cell for cell in cells if not finished(cell, self.output)]
        self.console.print(f"{len(cells)} cells, {len(cells) - len(waiting)} of them finished")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        progress = Progress(*columns, TimeElapsedColumn(), console=self.console)
        with progress, ThreadPoolExecutor(self.jobs) as pool:
            bar = progress.add_task("cells", total=len(cells), completed=len(cells) - len(waiting))
            try:
                return self._drive(waiting, pool, lambda: progress.advance(bar))
            except BaseException:
                self._stop()
                raise

    def _drive(
        self, waiting: list[Cell], pool: ThreadPoolExecutor, advance: Callable[[], None]
    ) -> list[Failure]:
        failures: dict[str, Failure] = {}
        unfinished = {cell.digest for cell in waiting}
        running: dict[Future[str | None], Cell] = {}
        while waiting or running:
            for cell in list(waiting):
                lost = [need for need in cell.needs if need.digest in failures]
                if lost:
                    failures[cell.digest] = Failure(cell, f"needs {lost[0].label}, which failed")
                    waiting.remove(cell)
                    advance()
                elif len(running) < self.jobs and unfinished.isdisjoint(
                    need.digest for need in cell.needs
                ):
                    running[pool.submit(self._run_one, cell)] = cell
                    waiting.remove(cell)
            if not running:
                continue
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                cell, reason = running.pop(future), future.result()
                if reason is None:
                    unfinished.discard(cell.digest)
                else:
                    failures[cell.digest] = Failure(cell, reason)
                    self.console.print(
                        f"failed: {cell.label}: {reason}", markup=False, soft_wrap=True
                    )
                advance()
        return list(failures.values())

    def _run_one(self, cell: Cell) -> str | None:
        """Run a cell's command; return None, or the last line of what it said."""
        folder = cell.folder(self.output)
        make_folder(folder)
        command = cell.command(self.output)
        self.console.print(
            f"{cell.label}\n$ {shlex.join(command)}", markup=False, highlight=False, soft_wrap=True
        )
        started = time.perf_counter()
        with (folder / LOG).open("wb") as log:
            status = self._call(command, log)
        if status or not (folder / cell.result).is_file():
            return last_line(folder / LOG) or f"exit status {status}, without a word"
        record = {
            "label": cell.label,
            "command": command,
            "seconds": time.perf_counter() - started,
            "jobs": self.jobs,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_text(folder / DONE, json.dumps(record, indent=1) + "\n")
        return None

    def _call(self, command: list[str], log: BinaryIO) -> int:
        if self._stopping:
            return -signal.SIGTERM
        process = subprocess.Popen(
            [program(command[0]), *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            # While it lives, the folder is not another run's, even if this process is killed.
            pass_fds=(self.lock.fileno(),),
        )
        self._running.add(process)
        try:
            return process.wait()
        finally:
            self._running.discard(process)

    def _stop(self) -> None:
        """End the commands that run: asked first, which lets a training run save, then made to."""
        self._stopping = True
        for how, patience in ((signal.SIGTERM, _GRACE_SECONDS), (signal.SIGKILL, 1)):
            for process in list(self._running):
                try:
                    os.killpg(process.pid, how)
                except ProcessLookupError:
                    continue
            deadline = time.monotonic() + patience
            while self._running and time.monotonic() < deadline:
                time.sleep(0.05)


def last_line(path: Path) -> str:
    """Return the last line of a log that is not empty; of a progress bar, its last state."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    return lines[-1] if lines else ""
