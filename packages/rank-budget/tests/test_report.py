"""The table and the picture, cell by cell."""

import sys

import numpy as np
import pytest
import torch

from rank_budget import ConstantBudget, CubicBudget, FixedGrowth, FixedPruning, RankAllocator
from rank_budget.report import importance_histogram, rank_heatmap, rank_timeline, schedule_plot
from rank_budget.tables import rank_table, scalars, schedule_table

RANKS = {
    "layers.10.q_proj": 3,
    "layers.2.q_proj": 1,
    "layers.2.mlp.down_projection": 0,
    "output": 4,
}


def test_table_orders_layers_by_number_and_modules_as_they_come():
    assert rank_table(RANKS, 4).splitlines() == [
        "layer  q_proj  mlp.down_projection  output",
        "            -                    -       4",
        "2           1                    0       -",
        "10          3                    -       -",
        "8 of 16 ranks",
    ]


def test_table_tells_towers_apart():
    ranks = {"encoder.layers.0.q": 1, "decoder.layers.0.q": 2, "decoder.layers.1.q": 3}
    assert rank_table(ranks, 3).splitlines() == [
        "layer  encoder.layers.q  decoder.layers.q",
        "0                     1                 2",
        "1                     -                 3",
        "6 of 9 ranks",
    ]


def test_table_takes_the_first_whole_number_of_a_name():
    ranks = {"0.w1": 1, "1.experts.3.w1": 2, "w2": 3}
    assert rank_table(ranks, 3).splitlines() == [
        "layer      w1  experts.3.w1      w2",
        "            -             -       3",
        "0           1             -       -",
        "1           -             2       -",
        "6 of 9 ranks",
    ]


def test_heatmap_shows_every_rank_at_its_place():
    figure = rank_heatmap(RANKS, initial=5)
    axes, colours = figure.axes
    (image,) = axes.images
    nan = float("nan")
    expected = [[nan, nan, 4], [1, 0, nan], [3, nan, nan]]
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), nan), expected)
    assert image.get_clim() == (0, 5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["", "2", "10"]
    assert [label.get_text() for label in axes.get_xticklabels()] == [
        "q_proj",
        "mlp.down_projection",
        "output",
    ]
    written = {text.get_position(): text.get_text() for text in axes.texts}
    assert written == {(2, 0): "4", (0, 1): "1", (1, 1): "0", (0, 2): "3"}
    assert axes.get_title() == "live ranks: 8 of 20"
    assert axes.get_ylabel() == "layer"
    assert colours.get_ylabel() == "ranks"


def test_heatmap_is_drawn_without_a_display(tmp_path):
    rank_heatmap(RANKS, initial=4).savefig(tmp_path / "ranks.png")
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_numbers_on_light_cells_are_dark():
    figure = rank_heatmap({"layers.0.a": 10, "layers.0.b": 0}, initial=10)
    assert [text.get_color() for text in figure.axes[0].texts] == ["black", "white"]


DRAWN = {
    "rank_heatmap": lambda: rank_heatmap(RANKS, 4),
    "rank_timeline": lambda: rank_timeline([], 4),
    "importance_histogram": lambda: importance_histogram({"w": torch.ones(2)}),
    "schedule_plot": lambda: schedule_plot(ConstantBudget(3), 5),
}


@pytest.mark.parametrize("name", list(DRAWN))
@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure"])
def test_figures_without_matplotlib(kit, monkeypatch, missing, name):
    for module in [module for module in sys.modules if module.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, missing, None)
    assert kit.error_text(DRAWN[name]) == (
        f"{name} draws with matplotlib; pip install 'rank-budget[plot]'."
    )


def pruned(kit):
    names = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
    layers = {name: kit.triplet(3, 4, 5) for name in names}
    allocator = RankAllocator(layers, FixedPruning(12, 5, 3, 2))
    live = [12]
    for _ in range(7):
        allocator.step()
        live.append(sum(allocator.ranks().values()))
    return allocator, live


def test_a_table_of_one_row_is_refused(kit):
    text = kit.error_text(schedule_table, FixedPruning(8, 4, 2, 2), 10, rows=1)
    assert text == "rows is 1, but must be at least 2, for the start and the end."


@pytest.mark.parametrize(
    ("direction", "schedule"),
    [
        ("prune", FixedPruning(12, 5, 3, 2)),
        ("regrow", CubicBudget(12, 5, 8, cooldown=1, interval=2)),
        ("grow", FixedGrowth(4, 10, 2, 2)),
    ],
)
def test_timeline_has_the_ranks_after_every_allocation(kit, direction, schedule):
    names = ("layers.0.q", "layers.0.v", "layers.1.q", "layers.1.v")
    layers = {name: kit.triplet(3, 4, 5, mask=False) for name in names}
    allocator = RankAllocator(layers, schedule, direction=direction)
    seen = {0: allocator.ranks()}
    for _ in range(7):
        for layer in layers.values():
            torch.nn.init.normal_(layer.lam)
        done = allocator.step()
        if done is not None:
            seen[done.step] = allocator.ranks()
    assert len(seen) > 3
    figure = rank_timeline(allocator.history, schedule.initial, allocator.ranks())
    above, below = figure.axes
    (everything,) = above.lines
    steps = list(seen)
    live = [[step, sum(ranks.values())] for step, ranks in seen.items()]
    assert everything.get_xydata().tolist() == live
    assert above.get_title() == "all modules"
    lines = {line.get_label(): line.get_xydata().tolist() for line in below.lines}
    assert lines == {
        kind: [[s, sum(n for name, n in seen[s].items() if name[-1] == kind)] for s in steps]
        for kind in "qv"
    }
    # What is drawn above hides nothing below, and the other way round.
    assert above.get_position().y0 >= below.get_position().y1
    assert [text.get_text() for text in below.get_legend().get_texts()] == ["q", "v"]
    assert (
        rank_timeline(allocator.history, schedule.initial).axes[0].lines[0].get_xydata().tolist()
        == live
    )


def test_histogram_counts_every_component(kit):
    allocator, _ = pruned(kit)
    importance = allocator.importance()
    importance["layers.0.q"][0] = 0
    threshold = allocator.history[-1].threshold
    figure = importance_histogram(importance, threshold, bins=7)
    (axes,) = figure.axes
    assert sum(patch.get_height() for patch in axes.patches) == 11
    assert axes.get_title() == "12 components, 1 with a score of zero"
    assert axes.get_xscale() == "log"
    assert set(axes.lines[0].get_xdata()) == {threshold}
    scores = torch.cat(list(importance.values())).tolist()
    edges = [(patch.get_x(), patch.get_x() + patch.get_width()) for patch in axes.patches]
    heights = [sum(low <= score < high for score in scores) for low, high in edges]
    assert [patch.get_height() for patch in axes.patches] == heights


def test_schedule_is_printed_and_drawn_where_it_changes():
    cubic = CubicBudget(100, 20, 50, warmup=10, cooldown=10)
    lines = schedule_table(cubic, 50).splitlines()
    assert len(lines) == 13
    rows = [tuple(map(int, line.split())) for line in lines[1:]]
    assert lines[0].split() == ["step", "budget"]
    assert (rows[0], rows[-1]) == ((0, 100), (50, 20))
    assert all(cubic.live_ranks(step) == budget for step, budget in rows)
    drawn = schedule_plot(cubic, 50).axes[0].lines[0].get_xydata().tolist()
    assert drawn[-1] == [50, 20]
    changes = [t for t in range(1, 51) if cubic.live_ranks(t) != cubic.live_ranks(t - 1)]
    assert [step for step, _ in drawn] == [0, *changes, 50]
    assert all(cubic.live_ranks(int(step)) == budget for step, budget in drawn)


def test_a_schedule_in_fractions_has_the_steps_that_it_is_shown_for():
    parts = CubicBudget(100, 20, warmup=0.2, cooldown=0.2)
    whole = CubicBudget(100, 20, 50, warmup=10, cooldown=10)
    assert schedule_table(parts, 50) == schedule_table(whole, 50)
    drawn = [schedule_plot(s, 50).axes[0].lines[0].get_xydata().tolist() for s in (parts, whole)]
    assert drawn[0] == drawn[1]
    assert schedule_table(whole, 20).splitlines()[-1].split() == ["20", str(whole.live_ranks(20))]


def test_scalars_are_the_numbers_of_now(kit):
    allocator, live = pruned(kit)
    found = scalars(allocator, prefix="x/")
    assert all(type(value) is float for value in found.values())
    ranks = {f"x/ranks/{name}": rank for name, rank in allocator.ranks().items()}
    threshold = allocator.history[-1].threshold
    assert found == {
        "x/step": 7,
        "x/skipped": 0,
        "x/budget": 5,
        "x/live_ranks": live[-1],
        "x/threshold": threshold,
        **ranks,
    }
    assert not any(
        "threshold" in name
        for name in scalars(RankAllocator({"a": kit.triplet(2, 3, 3)}, ConstantBudget(2)))
    )
