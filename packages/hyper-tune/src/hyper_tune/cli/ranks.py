"""`hyper-tune ranks`: where the components that are left are."""

from pathlib import Path
from typing import Annotated

import typer

from hyper_tune.cli.options import Picture
from hyper_tune.run_record import RunRecord
from rank_budget.report import rank_heatmap
from rank_budget.tables import rank_table


def ranks(
    run: Annotated[Path, typer.Argument(help="A run folder.")],
    *,
    step: Annotated[
        int | None, typer.Option(help="Of this step's checkpoint; needs torchtune.")
    ] = None,
    png: Picture = None,
) -> None:
    """Show the live ranks by layer and module: of the finished run, or the newest checkpoint."""
    live, initial = _ranks(run, step)
    if png is not None:
        rank_heatmap(live, initial).savefig(png, dpi=150)
    typer.echo(rank_table(live, initial))
    if png is not None:
        typer.echo(f"drawn: {png}")


def _ranks(run: Path, step: int | None) -> tuple[dict[str, int], int]:
    summary = RunRecord.read(run).summary
    if summary is not None and step is None:
        return dict(summary["ranks"]), int(summary["initial_rank"])
    from hyper_tune.torchtune.trained import open_trained

    method = open_trained(run, step=step).method
    return method.ranks(), method.config.init_rank
