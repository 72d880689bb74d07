"""`hyper-tune compare`: runs side by side."""

import os
from pathlib import Path
from typing import Annotated

import typer

from hyper_tune.cli.options import Picture
from hyper_tune.cli.table import print_table
from hyper_tune.comparison import compare_figures, compare_settings
from hyper_tune.report import loss_figure
from hyper_tune.run_record import RunRecord


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Run folders, finished or not.")],
    *,
    png: Picture = None,
) -> None:
    """Show losses, time, memory and ranks of runs, and the settings in which they differ."""
    records = [RunRecord.read(path) for path in runs]
    names = _short_names(runs)
    right = range(1, len(names) + 1)
    if png is not None:
        loss_figure(dict(zip(names, records, strict=True))).savefig(png, dpi=150)
    print_table(("", *names), compare_figures(records), right=right)
    different = compare_settings(records)
    if different:
        typer.echo()
        print_table(("differing settings", *names), different, right=right)
    if png is not None:
        typer.echo(f"\ndrawn: {png}")


def _short_names(paths: list[Path]) -> list[str]:
    """Leave out the folders that all paths begin with."""
    whole = [path.absolute() for path in paths]
    if len(set(whole)) == 1:
        return [path.name for path in whole]
    common = os.path.commonpath(whole)
    return [str(path.relative_to(common)) for path in whole]
