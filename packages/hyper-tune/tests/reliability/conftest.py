"""Jobs that are forked and struck, how often, and where the measured figures go."""

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from hyper_tune.provenance import start_record

SERVER = Path(__file__).with_name("job_server.py")
PATIENCE = 120.0


@dataclass
class Job:
    """A job that was started: its processes, and what it has said and left."""

    server: "Jobs"
    processes: list[int]
    output: Path
    log: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, seconds: float = PATIENCE) -> list[int | None]:
        """Wait until all processes have ended; return each one's status, None if it goes on."""
        found = self.server.ask({"wait": seconds})
        self.ended_at = [None if end is None else end[1] for end in found]
        return [None if end is None else end[0] for end in found]

    def kill(self) -> None:
        """End every process that has not ended."""
        for process, end in zip(self.processes, self.server.ask({"wait": 0}), strict=True):
            if end is None:
                os.kill(process, signal.SIGKILL)
        self.wait()

    def struck(self, rank: int = 0, number: int = 0) -> str:
        """Return what a fault of a rank wrote when it struck, or nothing."""
        mark = self.log / f"mark-{number}.{rank}"
        return mark.read_text() if mark.exists() else ""

    def said(self, rank: int = 0) -> str:
        """Return what a process has written."""
        return (self.log / f"{rank}.err").read_text()

    def rows(self) -> list[dict[str, Any]]:
        """Return the whole rows of figures."""
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]


class Jobs:
    """Starts jobs of the packaged recipe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._count = 0
        self._process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request and return the answer."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    def start(
        self,
        config: Path,
        output: Path,
        *overrides: str,
        ranks: int = 1,
        faults: list[dict[str, Any]] | None = None,
        samples: Path | None = None,
    ) -> Job:
        """Start a job of the packaged recipe; `struck` says whether a fault of it has struck."""
        arguments = ["--config", str(config), f"output_dir={output}", *overrides]
        return self._start(output, arguments, ranks, faults, samples, "recipe")

    def call(self, function: str, output: Path, *arguments: str, ranks: int = 1) -> Job:
        """Start a job that calls a function, MODULE:NAME of this folder or the one above."""
        return self._start(output, [str(output), *arguments], ranks, None, None, function)

    def _start(
        self,
        output: Path,
        arguments: list[str],
        ranks: int,
        faults: list[dict[str, Any]] | None,
        samples: Path | None,
        function: str,
    ) -> Job:
        self._count += 1
        log = self._folder / str(self._count)
        log.mkdir()
        struck = [{**fault, "mark": str(log / f"mark-{n}")} for n, fault in enumerate(faults or [])]
        job = {
            "function": function,
            "arguments": arguments,
            "ranks": ranks,
            "log": str(log),
            "faults": struck,
            "samples": None if samples is None else str(samples),
        }
        return Job(self, self.ask({"start": job}), output, log)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        assert self._process.wait(PATIENCE) == 0
        self._process.stdout.close()


@pytest.fixture(scope="session")
def nightly() -> bool:
    """Whether tests are to do all that they can, which takes an hour."""
    return "HYPER_TUNE_FULL_COUNTS" in os.environ


@pytest.fixture(scope="session")
def rounds(nightly: bool) -> Callable[[int, int], int]:
    """Return what picks a test's number of rounds: that of continuous integration, or the full."""
    return lambda few, full: full if nightly else few


@pytest.fixture(scope="session")
def slack() -> Callable[[], float]:
    """Return what says how many times longer things take than on a machine without other work."""
    return lambda: max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


FIGURES: list[tuple[int, str, str]] = []


@pytest.fixture(scope="session")
def figure() -> Callable[[int, str, str], None]:
    """Return what notes a measured figure: its number, what is claimed, what was found."""
    return lambda number, claim, found: FIGURES.append((number, claim, found))


def pytest_sessionfinish() -> None:
    """Write the figures as a table, if a file for them is named."""
    path = os.environ.get("HYPER_TUNE_RELIABILITY_REPORT")
    if path is None or not FIGURES:
        return
    record = start_record(torch.device("cpu"))
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    rows = [f"| {number} | {claim} | {found} |" for number, claim, found in FIGURES]
    lines = [
        "# Reliability",
        "",
        "`nox -s reliability`; each row is written by a test that passed. Seconds are those of "
        "processes on this machine, which may have had other work.",
        "",
        f"{record['device']}, {record['platform']}, Python {record['python']}, {versions}; "
        f"{record['time']}.",
        "",
        "| figure | claim | found |",
        "|---|---|---|",
        *sorted([*_other_rows(Path(path)), *rows], key=lambda row: int(row.split("|")[1])),
    ]
    Path(path).write_text("\n".join(lines) + "\n")


def _other_rows(path: Path) -> list[str]:
    """Return the rows of claims that this session has not measured."""
    measured = {claim for _, claim, _ in FIGURES}
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [
        line for line in lines if line.startswith("| ") and line.split("|")[1].strip().isdigit()
    ]
    return [row for row in rows if row.split("|")[2].strip() not in measured]


@pytest.fixture(scope="session")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jobs]:
    """The server of jobs."""
    server = Jobs(tmp_path_factory.mktemp("jobs"))
    yield server
    server.close()


@pytest.fixture
def job_config(make_config: Callable[..., Path]) -> Callable[..., Path]:
    """Return what writes the configuration of a short run: pruned at the steps 3 and 6."""
    return lambda **keys: make_config(**{"gradient_accumulation_steps": 1, **keys})


@pytest.fixture(scope="session")
def disk_model() -> ModuleType:
    """The model of a disk whose power fails."""
    return load_beside("disk_model")


def load_beside(name: str) -> ModuleType:
    """Import a module of this folder, which is not on the path."""
    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
