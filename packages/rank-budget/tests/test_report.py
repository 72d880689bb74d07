"""The table and the picture, cell by cell."""

import sys

import numpy as np
import pytest

from rank_budget import rank_heatmap, rank_table

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


@pytest.mark.parametrize("missing", ["matplotlib", "matplotlib.figure"])
def test_heatmap_without_matplotlib(kit, monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    assert kit.error_text(rank_heatmap, RANKS, 4) == (
        "rank_heatmap draws with matplotlib; pip install 'rank-budget[plot]'."
    )
