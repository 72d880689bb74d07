"""Ranks, budgets and scores as pictures; each function returns a matplotlib figure."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rank_budget.errors import BudgetError
from rank_budget.record import Allocation
from rank_budget.schedules import Schedule
from rank_budget.tables import changes_of, grid_of

__all__ = ["importance_histogram", "rank_heatmap", "rank_timeline", "schedule_plot"]

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(caller: str, width: float, height: float, rows: int = 1) -> "tuple[Figure, Any]":
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = f"{caller} draws with matplotlib; pip install 'rank-budget[plot]'."
        raise BudgetError(message) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, sharex=True)


def rank_heatmap(ranks: Mapping[str, int], initial: int) -> "Figure":
    """Return a matplotlib figure of the live ranks: a row per layer, a column per module.

    Raises:
        BudgetError: matplotlib is not installed.

    >>> figure = rank_heatmap({"layers.0.q_proj": 3, "layers.1.q_proj": 1}, initial=4)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['3', '1']
    """
    layers, modules, cells = grid_of(ranks)
    size = (2 + 0.9 * len(modules), 1.6 + 0.4 * len(layers))
    figure, axes = _figure("rank_heatmap", *size)
    values = [[cells.get((layer, m), float("nan")) for m in modules] for layer in layers]
    image = axes.imshow(values, vmin=0, vmax=initial, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(modules)), modules, rotation=30, ha="right")
    axes.set_yticks(range(len(layers)), layers)
    axes.set(ylabel="layer", title=f"live ranks: {sum(ranks.values())} of {initial * len(ranks)}")
    for row, layer in enumerate(layers):
        for column, module in enumerate(modules):
            rank = cells.get((layer, module))
            if rank is not None:
                shade = "black" if rank > 0.6 * initial else "white"
                axes.text(column, row, str(rank), ha="center", va="center", color=shade)
    figure.colorbar(image, ax=axes, label="ranks")
    return figure


def schedule_plot(schedule: Schedule, total_steps: int) -> "Figure":
    """Return a matplotlib figure of a schedule: the budget over the steps.

    Raises:
        BudgetError: matplotlib is not installed.

    >>> from rank_budget import FixedPruning
    >>> figure = schedule_plot(FixedPruning(initial=8, budget=4, count=2, interval=100), 300)
    >>> figure.axes[0].lines[0].get_xydata().tolist()
    [[0.0, 8.0], [100.0, 6.0], [200.0, 4.0], [300.0, 4.0]]
    """
    figure, axes = _figure("schedule_plot", 6, 3)
    changes = changes_of(schedule, total_steps)
    changes.append((total_steps, changes[-1][1]))
    axes.step(*zip(*changes, strict=True), where="post", color="tab:green")
    axes.set(xlabel="optimizer step", ylabel="budget", ylim=(0, None))
    return figure


def rank_timeline(
    history: Sequence[Allocation], initial: int, ranks: Mapping[str, int] | None = None
) -> "Figure":
    """Return a matplotlib figure of the live ranks over the steps.

    ``history``: of a `RankAllocator`; ``initial``: ranks of all matrices at the start. ``ranks``:
    what `RankAllocator.ranks` returns now, for a line per kind of module, on axes of their own
    below those of all modules. This reads which components fell and woke up from the device.

    Raises:
        BudgetError: matplotlib is not installed.

    >>> before, alive = torch.tensor([[True] * 4, [False] + [True] * 3])
    >>> history = [Allocation(2, 3, torch.tensor(0.5), before, alive, {"w": 4})]
    >>> rank_timeline(history, initial=4).axes[0].lines[0].get_xydata().tolist()
    [[0.0, 4.0], [2.0, 3.0]]
    """
    figure, drawn = _figure("rank_timeline", 6, 5 if ranks else 3, 2 if ranks else 1)
    axes = list(drawn) if ranks else [drawn]
    steps = [0, *(done.step for done in history)]
    live = [initial, *(done.live for done in history)]
    axes[0].step(steps, live, where="post", color="black", label="all")
    axes[0].set(ylabel="live ranks", ylim=(0, None), title="all modules" if ranks else None)
    if ranks:
        for module, counts in _by_module(history, ranks).items():
            axes[1].step(steps, counts, where="post", label=module)
        axes[1].set(ylabel="live ranks", ylim=(0, None), title="by kind of module")
        axes[1].legend(loc="best")
    axes[-1].set_xlabel("optimizer step")
    return figure


def _by_module(history: Sequence[Allocation], ranks: Mapping[str, int]) -> dict[str, list[int]]:
    """Return the live ranks of each kind of module at the start and after each allocation."""
    now = dict(ranks)
    states = [now]
    for done in reversed(history):
        now = dict(now)
        for name, fell in done.pruned_components.items():
            now[name] += len(fell)
        for name, woke in done.grown_components.items():
            now[name] -= len(woke)
        states.insert(0, now)
    _, modules, cells = grid_of({name: place for place, name in enumerate(ranks)})
    names = list(ranks)
    return {
        module: [
            sum(state[names[place]] for (_, kind), place in cells.items() if kind == module)
            for state in states
        ]
        for module in modules
    }


def importance_histogram(
    importance: Mapping[str, Tensor], threshold: float | None = None, bins: int = 40
) -> "Figure":
    """Return a matplotlib figure of the scores of all components, on a logarithmic axis.

    ``importance``: what `RankAllocator.importance` returns. ``threshold``: the highest score that
    fell, drawn as a line. Scores of zero, which have no logarithm, are counted in the title.

    Raises:
        BudgetError: matplotlib is not installed.

    >>> figure = importance_histogram({"w": torch.tensor([0.0, 0.1, 10.0])}, threshold=0.1)
    >>> figure.axes[0].get_title()
    '3 components, 1 with a score of zero'
    """
    figure, axes = _figure("importance_histogram", 6, 3)
    scores = torch.cat([part.double().cpu() for part in importance.values()])
    shown = scores[scores.isfinite() & (scores > 0)]
    if shown.numel():
        low, high = float(shown.min().log10()), float(shown.max().log10())
        edges = torch.logspace(low - 0.01, high + 0.01, bins + 1, dtype=torch.float64)
        axes.hist(shown.tolist(), bins=edges.tolist(), color="tab:blue")
        axes.set_xscale("log")
    if threshold is not None and threshold > 0:
        axes.axvline(threshold, color="tab:red")
    zeros = int((scores == 0).sum())
    axes.set(xlabel="importance", ylabel="components")
    axes.set_title(f"{scores.numel()} components, {zeros} with a score of zero")
    return figure
