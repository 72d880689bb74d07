"""The paper's tables and figures as files: what is run, what is measured, what the paper has."""

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from hyper_tune.checks import known_fields, require_choice
from hyper_tune.errors import UserError
from hyper_tune.method import METHODS

FOLDER = Path(__file__).parent / "experiments"
SCALES = ("tiny", "real")
MEMORY_PARTS = tuple(f"{part} (MiB)" for part in ("base", "factors", "trained", "kept"))
# What is measured, and the task that it is measured on; None: whatever is trained on.
MEASURES: Mapping[str, tuple[str, str | None]] = {
    **dict.fromkeys(
        ("BLEU-4", "ROUGE-1", "BLEU-4 of characters", "ROUGE-1 of jieba words"),
        ("evaluation", "text"),
    ),
    "exact match": ("evaluation", "gsm8k"),
    "pass@1": ("evaluation", "humaneval"),
    "accuracy": ("training", "classification"),
    **dict.fromkeys(
        ("final loss", "steps to the loss", "seconds to the loss", "seconds of equal steps"),
        ("training", None),
    ),
    "held-out loss": ("training", None),
    **dict.fromkeys(("memory (MiB)", "latency (ms)", *MEMORY_PARTS), ("step cost", None)),
    **dict.fromkeys(("P", "Λ", "Q", "ΔW"), ("similarity", None)),
    **{f"{name}, aligned": ("similarity", None) for name in ("P", "Λ", "Q")},
    **{f"{name}, in both": ("similarity", None) for name in ("P", "Q")},
}
_FREE_AXES = ("batch size",)

Point = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure.

    ``place``: where the paper has it. ``axes``: by name, what is combined with what; the last
    changes soonest. ``choices``: by an axis that is neither model, data, method nor batch size,
    the override that a value stands for: a pattern, or one for each value; both may be by scale,
    by method, or by both. ``overrides``: by scale. ``tiny``: the values that axes have at that
    scale; of data and patterns, any. ``paper``: nested like the axes, then by measure. ``plot``:
    the axis whose values are curves of the loss. ``shared``: axes whose value the run that is
    compared with has too. ``notes``: what a reader of the results must know.

    Raises:
        UserError: an unknown key, name or measure, or a measure of a task that no data set has.
    """

    name: str
    title: str
    place: str
    axes: Mapping[str, Sequence[Any]]
    measures: Sequence[str]
    choices: Mapping[str, Any] = field(default_factory=dict)
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    tiny: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    paper: Mapping[Any, Any] = field(default_factory=dict)
    plot: str | None = None
    shared: Sequence[str] = ()
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        known = catalogue()
        for axis, names in (("model", known["models"]), ("data", known["data"])):
            for value in self.axes.get(axis, ()):
                require_choice(f"{self.name}: {axis}", value, names)
        for method in self.axes.get("method", ()):
            require_choice(f"{self.name}: method", method, METHODS)
        self._check_axes()
        self._check_measures()

    def _check_axes(self) -> None:
        for axis in ("model", "method"):
            if axis not in self.axes:
                raise UserError(f"{self.name}: axes has no {axis}; add it.")
        for axis in self.axes.keys() - {"model", "data", "method", *_FREE_AXES, *self.choices}:
            raise UserError(f"{self.name}: choices does not say what the axis {axis!r} sets.")
        for axis, values in self.tiny.items():
            require_choice(f"{self.name}: tiny", axis, tuple(self.axes))
            known = catalogue()["data"] if axis == "data" else self.axes[axis]
            for value in values:
                if value not in known and not isinstance(self.choices.get(axis), str):
                    raise UserError(f"{self.name}: tiny has {axis} {value!r}, which axes has not.")
        if self.plot is not None:
            require_choice(f"{self.name}: plot", self.plot, tuple(self.axes))
        points = {tuple(point.values()) for point in self.points("real")}
        for place in _leaves(self.paper, len(self.axes)):
            if place not in points:
                where = ", ".join(map(str, place))
                raise UserError(f"{self.name}: paper has {where}, which the axes do not.")

    def _check_measures(self) -> None:
        tasks = {catalogue()["data"][name]["task"] for name in self.axes.get("data", ())}
        for measure in self.measures:
            require_choice(f"{self.name}: measures", measure, MEASURES)
            kind, task = MEASURES[measure]
            if task is not None and task not in tasks:
                theirs = ", ".join(m for m, (_, t) in MEASURES.items() if t in tasks)
                raise UserError(
                    f"{self.name}: {measure!r} is measured on data of the task {task}, but its "
                    f"data is {', '.join(sorted(tasks)) or 'none'}; choose of {theirs or 'others'}."
                )
            if (kind == "step cost") == ("data" in self.axes):
                needs = "no data" if kind == "step cost" else "data"
                raise UserError(f"{self.name}: {measure!r} needs {needs} among the axes.")

    def points(self, scale: str) -> list[dict[str, Any]]:
        """Return every combination of the axes' values at a scale."""
        axes = dict(self.axes) | (dict(self.tiny) if scale == "tiny" else {})
        return [
            dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())
        ]

    def chosen(self, point: Point, scale: str) -> list[str]:
        """Return the overrides of the experiment at a point: its own, and those of its axes."""
        words = list(self.overrides.get(scale, ()))
        for axis, rule in self.choices.items():
            if axis not in point:
                continue
            for key in (scale, point["method"]):
                rule = rule.get(key, rule) if isinstance(rule, Mapping) else rule
            value = point[axis]
            words.append(rule[value] if isinstance(rule, Mapping) else rule.format(value))
        return words

    def of_paper(self, point: Point) -> Mapping[str, float]:
        """Return the paper's numbers at a point, by its own name of the measure; may be none."""
        found: Any = self.paper
        for value in point.values():
            found = found.get(value, {})
        numbers: Mapping[str, float] = found
        return numbers

    def measures_of(self, point: Point) -> list[str]:
        """Return the measures that there are at a point: those of its data's task, and of any."""
        task = catalogue()["data"][point["data"]]["task"] if "data" in point else None
        return [name for name in self.measures if MEASURES[name][1] in (None, task)]


def _leaves(nested: Mapping[Any, Any], depth: int) -> Iterator[tuple[Any, ...]]:
    if depth == 0:
        yield ()
        return
    for key, inner in nested.items():
        yield from ((key, *rest) for rest in _leaves(inner, depth - 1))


def names() -> list[str]:
    """Return the names of all experiments, tables first, by number."""
    stems = [path.stem for path in FOLDER.glob("*.yaml")]
    return sorted(stems, key=lambda stem: (stem[0] != "t", len(stem), stem))


def load(name: str) -> Experiment:
    """Return an experiment by name.

    Raises:
        UserError: there is none of that name (the nearest is named), or its file is not right.
    """
    if name not in names():
        near = difflib.get_close_matches(name.lower().replace(" ", ""), names(), n=1)
        hint = f"did you mean {near[0]}?" if near else "choose one of them."
        raise UserError(f"there is no {name!r}; there are {', '.join(names())}; {hint}")
    return read(FOLDER / f"{name}.yaml")


def read(path: Path) -> Experiment:
    """Return the experiment of a file."""
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    entries = {entry.name for entry in fields(Experiment)} - {"name"}
    known_fields(str(path), values, entries)
    for entry in ("title", "place", "axes", "measures"):
        if entry not in values:
            raise UserError(f"{path}: the key {entry!r} is missing; add it.")
    return Experiment(name=path.stem, **values)


@cache
def catalogue() -> Mapping[str, Any]:
    """Return what the experiments' names stand for: `catalogue.yaml`."""
    path = Path(__file__).with_name("catalogue.yaml")
    found: Mapping[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found
