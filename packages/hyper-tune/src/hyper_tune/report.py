"""What a run was, for people: a model card beside its adapter, losses and ranks as pictures."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from hyper_tune.durable import write_text
from hyper_tune.model_card import CARD, model_card
from hyper_tune.run_record import RunRecord
from rank_budget.report import rank_heatmap

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(folder: Path) -> None:
    """Write the card of a finished run's adapter and, if matplotlib is there, its pictures."""
    run = RunRecord.read(folder)
    assert run.summary is not None
    write_text(folder / "adapter" / CARD, model_card(run, run.summary["ranks"]))
    if find_spec("matplotlib") is None:
        return
    loss_figure({folder.name: run}).savefig(folder / "loss.png", dpi=120)
    heatmap = rank_heatmap(run.summary["ranks"], run.summary["initial_rank"])
    heatmap.savefig(folder / "ranks.png", dpi=120)


def loss_figure(runs: Mapping[str, RunRecord]) -> "Figure":
    """Return a matplotlib figure: training and held-out loss over steps, live ranks below.

    ``runs``: by the name that the legend gives them.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    losses, ranks = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    for number, (name, run) in enumerate(runs.items()):
        color = f"C{number % 10}"
        label = name if len(runs) > 1 else "training"
        losses.plot(*_columns(run.figures("loss")), color=color, linewidth=1, label=label)
        held_out = run.figures("validation_loss")
        if held_out:
            label = f"{name}, held out" if len(runs) > 1 else "held out"
            color = color if len(runs) > 1 else "C1"
            losses.plot(*_columns(held_out), "o--", color=color, markersize=3, label=label)
        ranks.step(*_columns(run.figures("live_ranks")), where="post", color=color)
    losses.set(ylabel="loss per token", yscale="log")
    losses.legend()
    ranks.set(xlabel="step", ylabel="live ranks", ylim=(0, None))
    return figure


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [step for step, _ in points], [value for _, value in points]
