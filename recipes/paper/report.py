"""Tables and figures of what was measured, with the paper's numbers beside it."""

import csv
import io
import json
import os
import platform
import shlex
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from cells import Cell
from experiment import MEASURES, Experiment, Point
from grid import DONE, Failure, finished
from measures import Results, Summary

from hyper_tune.durable import make_folder, write_text
from hyper_tune.provenance import git_state, versions

_PACKAGES = sysconfig.get_paths()["purelib"]
_RULES = {
    "to the loss": (
        "Time to the loss: until the trailing mean of the loss over {window} steps is first at "
        "most that at the end of the run of the same model, data and seed without a hypernetwork; "
        '"never" where no step came there. The paper states no rule.'
    ),
    "equal steps": "Seconds of equal steps: the sum of all steps, without evaluation and saving.",
}


def write_report(
    results: Results, cells: Sequence[Cell], failures: Sequence[Failure], command: Sequence[str]
) -> list[Path]:
    """Write the experiment's Markdown, CSV and, of a figure, plot; return their paths."""
    experiment, scale = results.planner.experiment, results.planner.scale
    folder = results.output / "results"
    make_folder(folder)
    stem = folder / f"{experiment.name}-{scale}"
    measured = results.before()
    measured += [(p, results.summaries(p)) for p in experiment.points(scale)]
    paths = [stem.with_suffix(".md"), stem.with_suffix(".csv")]
    if experiment.plot is not None:
        paths.append(stem.with_suffix(".png"))
        plot(results, paths[-1])
    text = markdown(results, measured, cells, failures, command)
    write_text(paths[0], text)
    write_text(paths[1], as_csv(experiment, measured))
    return paths


def markdown(
    results: Results,
    measured: Sequence[tuple[Point, Mapping[str, Summary]]],
    cells: Sequence[Cell],
    failures: Sequence[Failure],
    command: Sequence[str],
) -> str:
    """Return the report: the table, how it was measured, every command."""
    experiment, planner = results.planner.experiment, results.planner
    lines = [f"# {experiment.title}", "", f"{experiment.place}, at scale `{planner.scale}`.", ""]
    lines += table(results, measured)
    if experiment.plot is not None:
        lines += ["", f"![Smoothed training loss]({experiment.name}-{planner.scale}.png)"]
    lines += ["", *_notes(results, cells)]
    if failures:
        lines += ["", "## Failed", "", *(f"- {f.cell.label}: {f.reason}" for f in failures)]
    lines += ["", "## Commands", "", "```", shlex.join(command), "```", ""]
    lines += ["It ran, with the folders of results, data and Python's packages written as OUTPUT,"]
    lines += ["DATA and PACKAGES:", "", "```"]
    lines += [_shown(cell, results) for cell in cells]
    return "\n".join([*lines, "```", ""])


def table(results: Results, measured: Sequence[tuple[Point, Mapping[str, Summary]]]) -> list[str]:
    """Return the lines of the Markdown table: a row for each point."""
    experiment = results.planner.experiment
    theirs = _papers_names(experiment)
    head = [*experiment.axes, *(f"paper: {name}" for name in theirs), *experiment.measures]
    rule = ["---"] * len(experiment.axes) + ["---:"] * (len(head) - len(experiment.axes))
    lines = [_row(head), _row(rule)]
    for point, summaries in measured:
        paper, stand_ins = experiment.of_paper(point), results.planner.stand_ins(point)
        names = [_named(value, stand_ins.get(axis)) for axis, value in point.items()]
        numbers = [_printed(paper[name]) if name in paper else "-" for name in theirs]
        ours = [str(summaries.get(name, "-")) for name in experiment.measures]
        lines.append(_row([*names, *numbers, *ours]))
    return lines


def as_csv(experiment: Experiment, measured: Sequence[tuple[Point, Mapping[str, Summary]]]) -> str:
    """Return a line for each point and measure, the paper's own measures among them."""
    text = io.StringIO(newline="")
    out = csv.writer(text, lineterminator="\n")
    out.writerow([*experiment.axes, "measure", "by", "mean", "spread", "seeds", "never", "missing"])
    for point, summaries in measured:
        for name, number in experiment.of_paper(point).items():
            out.writerow([*point.values(), name, "paper", number, "", "", "", ""])
        for name, found in summaries.items():
            numbers = (found.mean, found.spread, len(found.values), found.never, found.missing)
            out.writerow(
                [*point.values(), name, "here", *("" if n is None else n for n in numbers)]
            )
    return text.getvalue()


def plot(results: Results, path: Path) -> None:
    """Draw the smoothed losses: a panel for each model and data, a curve for each value."""
    from matplotlib.figure import Figure

    experiment, planner = results.planner.experiment, results.planner
    window: int = planner.settings["window"]
    panels: dict[str, list[Point]] = {}
    points: Sequence[Point] = experiment.points(planner.scale)
    for point in points:
        stand_ins = planner.stand_ins(point)
        title = ", ".join(_named(point[axis], stand_ins.get(axis)) for axis in ("model", "data"))
        panels.setdefault(title, []).append(point)
    figure = Figure(figsize=(4.5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, points) in zip(axes, panels.items(), strict=True):
        for point in points:
            curves = results.curves(point)
            if not curves:
                continue
            steps = range(window, window + len(curves[0]))
            middle = [mean(values) for values in zip(*curves, strict=True)]
            (line,) = axis.plot(steps, middle, label=str(point[experiment.plot or "method"]))
            low, high = ([f(v) for v in zip(*curves, strict=True)] for f in (min, max))
            axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
        axis.set(title=title, xlabel="optimizer step", ylabel=f"loss, mean of {window} steps")
        if axis.lines:
            axis.legend()
    figure.savefig(path, dpi=120, metadata={"Software": None})


def _notes(results: Results, cells: Sequence[Cell]) -> list[str]:
    experiment, planner = results.planner.experiment, results.planner
    seeds = ", ".join(map(str, results.seeds))
    notes = [f"Mean ± sample standard deviation over seeds {seeds}."]
    for word, rule in _RULES.items():
        if any(word in name for name in experiment.measures):
            notes.append(rule.format(window=planner.settings["window"]))
    stood = {
        f"{point[axis]}: {what}"
        for point in experiment.points(planner.scale)
        for axis, what in planner.stand_ins(point).items()
    }
    if stood:
        notes.append(
            "In parentheses is what stands in at this scale, so that the paper's numbers are no "
            "yardstick here: " + "; ".join(sorted(stood)) + "."
        )
    if any(MEASURES[name][0] == "step cost" for name in experiment.measures):
        asked = " ".join(planner.settings["ask"]["step cost"])
        notes.append(f"Each cost is by {asked}: tokens of a row, and steps that are timed.")
    jobs = max((_record(cell, results.output).get("jobs", 1) for cell in cells), default=1)
    if jobs > 1:
        notes.append(f"Up to {jobs} cells ran at a time, which lengthens every step.")
    return [" ".join([*notes, *experiment.notes]), "", _machine(planner.device)]


def _machine(device: str) -> str:
    if device == "cuda":
        import torch

        where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device now"
    else:
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        where = f"{os.cpu_count()} CPU cores, {platform.machine()}, load {load:.1f} at the end"
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    state = git_state(Path(__file__).parent)
    commit = f", commit {state['commit'][:12]}" if state else ""
    changed = " with changes" if state and state["changed"] else ""
    return f"{where}; Python {platform.python_version()}, {made}{commit}{changed}."


def _shown(cell: Cell, results: Results) -> str:
    record = _record(cell, results.output)
    # Not the recorded words: a folder of results, or the recipe, may have been moved since.
    text = shlex.join(cell.command(results.output)).replace(str(results.output), "OUTPUT")
    if results.planner.data is not None:
        text = text.replace(str(results.planner.data.resolve()), "DATA")
    text = text.replace(_PACKAGES, "PACKAGES")
    repository = str(Path(__file__).parents[2]) + "/"
    note = f"{record['seconds']:.0f} s" if record else "not finished"
    return f"# {cell.label}: {note}\n{text.replace(repository, '')}"


def _record(cell: Cell, output: Path) -> dict[str, Any]:
    if not finished(cell, output):
        return {}
    found: dict[str, Any] = json.loads((cell.folder(output) / DONE).read_text(encoding="utf-8"))
    return found


def _papers_names(experiment: Experiment) -> list[str]:
    points = experiment.points("real")
    return list(dict.fromkeys(name for point in points for name in experiment.of_paper(point)))


def _printed(number: float) -> str:
    """Return a number of the paper with at least two decimals, unless it is a whole one."""
    return max(f"{number:.2f}", str(number), key=len) if isinstance(number, float) else str(number)


def _named(value: Any, stand_in: str | None) -> str:
    return f"{value} ({stand_in})" if stand_in else str(value)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
