"""What finished cells measured: one value for each seed, then mean and spread."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from cells import Cell, Planner
from experiment import MEASURES, Point
from grid import finished
from stopping import seconds_to, smoothed, steps_to

from hyper_tune.run_record import RunRecord


@dataclass(frozen=True)
class Summary:
    """A measure over seeds. ``values``: of the seeds that have one. ``never``: seeds whose run did
    not come to the loss. ``missing``: seeds whose cell is not finished.
    """

    values: tuple[float, ...]
    never: int = 0
    missing: int = 0

    @property
    def mean(self) -> float | None:
        """The mean of the values."""
        return mean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """The sample's standard deviation; None of fewer than two."""
        return stdev(self.values) if len(self.values) > 1 else None

    def __str__(self) -> str:
        """Write mean ± spread, and how many seeds it is not of.

        >>> str(Summary((1.0, 3.0))), str(Summary((2.0,), never=1)), str(Summary((), never=2))
        ('2.000 ± 1.414', '2.000 (1 of 2 seeds never)', 'never')
        """
        if self.mean is None:
            return "never" if self.never and not self.missing else "-"
        text = figure(self.mean)
        if self.spread is not None:
            text += f" ± {figure(self.spread)}"
        total = len(self.values) + self.never + self.missing
        notes = {"never": self.never, "missing": self.missing}
        for word, count in notes.items():
            text += f" ({count} of {total} seeds {word})" if count else ""
        return text


def figure(value: float) -> str:
    """Return a number to four digits, or all that are before the point.

    >>> figure(0.12345), figure(2.0), figure(13125.7)
    ('0.1235', '2.000', '13126')
    """
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:#.4g}"


def losses_and_seconds(run: Path) -> tuple[list[float], list[float]]:
    """Return the loss and the time of each step; a skipped step's loss is infinite."""
    rows = [row for row in RunRecord.read(run).rows if "loss" in row]
    losses = [float("inf") if row["loss"] is None else row["loss"] for row in rows]
    return losses, [row["seconds"] for row in rows]


@dataclass(frozen=True)
class Results:
    """The finished cells of an experiment, in the folder where they were run."""

    planner: Planner
    output: Path
    seeds: Sequence[int]

    def summaries(self, point: Point) -> dict[str, Summary]:
        """Return every measure at a point, over seeds."""
        names = self.planner.experiment.measures_of(point)
        each = [self._of_seed(point, seed, names) for seed in self.seeds]
        return {
            name: Summary(
                tuple(value for found in each if (value := found.get(name)) is not None),
                never=sum(name in found and found[name] is None for found in each),
                missing=sum(name not in found for found in each),
            )
            for name in names
        }

    def before(self) -> list[tuple[Point, dict[str, Summary]]]:
        """Return what the bases score before fine-tuning: a point for each model and data."""
        found = {}
        for point in self.planner.experiment.points(self.planner.scale):
            if cell := self.planner.before(point):
                place = {axis: point[axis] for axis in ("model", "data")}
                place |= dict.fromkeys(point.keys() - place.keys(), "-")
                found[cell] = {axis: place[axis] for axis in point} | {"method": "no fine-tuning"}
        measured: list[tuple[Point, dict[str, Summary]]] = []
        for cell, place in found.items():
            done = finished(cell, self.output)
            values = _evaluation(cell.folder(self.output) / cell.result) if done else {}
            names = self.planner.experiment.measures_of(place)
            numbers = {
                name: Summary((value,)) for name in names if (value := values.get(name)) is not None
            }
            measured.append((place, numbers))
        return measured

    def curves(self, point: Point) -> list[list[float]]:
        """Return the smoothed losses of each seed's run at a point, where it is finished."""
        cells = [self.planner.measured(point, seed)["training"] for seed in self.seeds]
        return [
            smoothed(losses_and_seconds(cell.folder(self.output) / "run")[0], self._window)
            for cell in cells
            if finished(cell, self.output)
        ]

    @property
    def _window(self) -> int:
        window: int = self.planner.settings["window"]
        return window

    def _of_seed(self, point: Point, seed: int, names: Sequence[str]) -> dict[str, float | None]:
        """Return what one seed measured; None: never. What is not finished is left out."""
        cells = self.planner.measured(point, seed)
        done = {kind: cell for kind, cell in cells.items() if finished(cell, self.output)}
        found: dict[str, float | None] = {}
        if "training" in done:
            found |= self._training(done["training"], done.get("baseline"))
        for kind, read in (
            ("evaluation", _evaluation),
            ("similarity", _plain),
            ("step cost", _plain),
        ):
            if kind in done:
                found |= read(done[kind].folder(self.output) / done[kind].result)
        return {name: found[name] for name in names if name in found}

    def _training(self, cell: Cell, baseline: Cell | None) -> dict[str, float | None]:
        run = cell.folder(self.output) / "run"
        losses, seconds = losses_and_seconds(run)
        found: dict[str, float | None] = {
            "final loss": smoothed(losses, self._window)[-1],
            "seconds of equal steps": fsum(seconds),
        }
        if baseline is not None:
            theirs, _ = losses_and_seconds(baseline.folder(self.output) / "run")
            target = smoothed(theirs, self._window)[-1]
            steps = steps_to(losses, target, self._window)
            found["steps to the loss"] = None if steps is None else float(steps)
            found["seconds to the loss"] = seconds_to(losses, seconds, target, self._window)
        after: Mapping[str, Any] = json.loads((run / "summary.json").read_text())["after"] or {}
        names = {"accuracy": "accuracy", "loss": "held-out loss"}
        return found | {name: float(after[key]) for key, name in names.items() if key in after}


def _evaluation(path: Path) -> dict[str, float | None]:
    metrics = json.loads(path.read_text(encoding="utf-8"))["metrics"]
    return {metric["name"]: float(metric["value"]) for metric in metrics}


def _plain(path: Path) -> dict[str, float | None]:
    values = json.loads(path.read_text(encoding="utf-8"))
    return {name: float(values[name]) for name in MEASURES if name in values}
