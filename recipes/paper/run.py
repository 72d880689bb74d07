"""The paper's tables and figures, each by one command.

    python recipes/paper/run.py table6 --scale tiny --data DATA
    python recipes/paper/run.py figure2 --scale real --data DATA --jobs 2
    python recipes/paper/run.py table2 --scale tiny --data DATA --dry-run

`real` is the paper's setting; `tiny` runs the same commands with small models and few steps.
What is finished is not run again. OUTPUT/results/ gets NAME-SCALE.md, .csv and, of figures, .png.
"""

import shlex
import signal
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from cells import Planner
from experiment import catalogue, load
from grid import Grid, finished, locked
from measures import Results
from report import write_report

from hyper_tune.errors import EXIT_INTERRUPTED, EXIT_MISTAKE, PERSONS_MISTAKES


class Scale(StrEnum):
    """How large the models and runs are."""

    TINY = "tiny"
    REAL = "real"


class Device(StrEnum):
    """Where the models are."""

    CPU = "cpu"
    CUDA = "cuda"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command()
def run(
    name: Annotated[str, typer.Argument(help="table1 to table11, figure2 or figure3.")],
    *,
    scale: Annotated[Scale, typer.Option(help="The paper's setting, or the same one small.")],
    data: Annotated[
        Path | None, typer.Option(envvar="HYPER_TUNE_DATA", help="The folder of the data sets.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Of runs and results.")] = Path("paper-run"),
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", min=0, help="Repeat for several.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Commands at a time; times suffer.")] = 1,
    device: Annotated[Device | None, typer.Option(help="Of the scale, without it.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the commands, and what is finished.")
    ] = False,
) -> None:
    """Run what is not finished of a table or figure, and write it."""
    settings = catalogue()["scales"][scale]
    planner = Planner(load(name), scale.value, data, (device or settings["device"]))
    chosen = list(dict.fromkeys(seeds or settings["seeds"]))
    cells = planner.all_cells(chosen)
    output = output.resolve()
    if dry_run:
        for cell in cells:
            state = "finished" if finished(cell, output) else "to run"
            print(f"# {cell.label}: {state}\n{shlex.join(cell.command(output))}")
        return
    with locked(output) as lock:
        failures = Grid(output, lock, jobs).run(cells)
        words = _words(name, scale, chosen, jobs, device)
        paths = write_report(Results(planner, output, chosen), cells, failures, words)
    print(paths[0].read_text(encoding="utf-8").split("\n## ")[0])
    print("\n".join(str(path) for path in paths))
    for failure in failures:
        log = failure.cell.folder(output) / "log.txt"
        sys.stderr.write(f"failed: {failure.cell.label}: {failure.reason} ({log})\n")
    if failures:
        raise typer.Exit(1)


def _words(
    name: str, scale: Scale, seeds: Sequence[int], jobs: int, device: Device | None
) -> list[str]:
    """Return the command that makes the report again, wherever data and results are."""
    words = ["python", "recipes/paper/run.py", name, "--scale", scale.value, "--data", "DATA"]
    words += [word for seed in seeds for word in ("--seed", str(seed))]
    words += ["--jobs", str(jobs)] if jobs > 1 else []
    return words + (["--device", device.value] if device else [])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; return the exit status."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        status: Any = app(arguments, standalone_mode=False)
    except PERSONS_MISTAKES as error:
        sys.stderr.write(f"error: {error}\n")
        return EXIT_MISTAKE
    except typer.TyperException as error:
        sys.stderr.write(f"error: {' '.join(error.format_message().split())}\n")
        return EXIT_MISTAKE
    if status == EXIT_INTERRUPTED:
        sys.stderr.write("stopped; the same command goes on from here.\n")
    return status if isinstance(status, int) else 0


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
