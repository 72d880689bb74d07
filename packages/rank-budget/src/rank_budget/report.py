"""The ranks that are left, as text and as a picture."""

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rank_budget.errors import BudgetError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LAYER = re.compile(r"(?:^|\.)(\d+)\.")


def _grid(ranks: Mapping[str, int]) -> tuple[list[str], list[str], dict[tuple[str, str], int]]:
    """Return layers, modules and the rank at each pair; a name without a number has layer ""."""
    found = {name: _LAYER.search(name) for name in ranks}
    # Two towers, such as an encoder and a decoder, have modules of the same name at a layer.
    towers = {name[: match.start()] for name, match in found.items() if match}
    cells: dict[tuple[str, str], int] = {}
    for name, match in found.items():
        layer, tower, module = "", "", name
        if match:
            layer, tower, module = match[1], name[: match.start()], name[match.end() :]
        prefix = f"{tower}." if tower and len(towers) > 1 else ""
        cells[layer, prefix + module] = ranks[name]
    layers = sorted({layer for layer, _ in cells}, key=lambda text: int(text or -1))
    modules = list(dict.fromkeys(module for _, module in cells))
    return layers, modules, cells


def rank_table(ranks: Mapping[str, int], initial: int) -> str:
    """Return the live ranks as lines of text, layers by modules.

    ``ranks``: live components by module name, the layer being the first number in it.
    ``initial``: components per matrix at the start.

    >>> print(rank_table({"layers.0.q_proj": 3, "layers.0.v_proj": 1, "layers.1.q_proj": 0}, 4))
    layer  q_proj  v_proj
    0           3       1
    1           0       -
    4 of 12 ranks
    """
    layers, modules, cells = _grid(ranks)
    widths = [max(6, len(module)) for module in modules]
    lines = ["  ".join(["layer", *(f"{m:>{w}}" for m, w in zip(modules, widths, strict=True))])]
    for layer in layers:
        row = [str(cells.get((layer, module), "-")) for module in modules]
        padded = (f"{text:>{width}}" for text, width in zip(row, widths, strict=True))
        lines.append("  ".join([f"{layer:<5}", *padded]))
    lines.append(f"{sum(ranks.values())} of {initial * len(ranks)} ranks")
    return "\n".join(lines)


def rank_heatmap(ranks: Mapping[str, int], initial: int) -> "Figure":
    """Return a matplotlib figure of the live ranks: a row per layer, a column per module.

    Raises:
        BudgetError: matplotlib is not installed.

    >>> figure = rank_heatmap({"layers.0.q_proj": 3, "layers.1.q_proj": 1}, initial=4)
    >>> [text.get_text() for text in figure.axes[0].texts]
    ['3', '1']
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        message = "rank_heatmap draws with matplotlib; pip install 'rank-budget[plot]'."
        raise BudgetError(message) from error
    layers, modules, cells = _grid(ranks)
    values = [[cells.get((layer, m), float("nan")) for m in modules] for layer in layers]
    figure = Figure(figsize=(2 + 0.9 * len(modules), 1.6 + 0.4 * len(layers)), layout="constrained")
    axes = figure.subplots()
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
