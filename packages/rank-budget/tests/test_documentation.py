"""Every example runs: those of the docstrings and that of the README."""

import doctest
import importlib
import pkgutil
import re
import time
from operator import attrgetter
from pathlib import Path

import pytest

import rank_budget

README = Path(__file__).parents[1] / "README.md"
MODULES = ["rank_budget"] + [
    module.name for module in pkgutil.walk_packages(rank_budget.__path__, "rank_budget.")
]
WITHOUT_EXAMPLE = {
    *("COSTS", "SCORES"),
    *("Allocation", "Attachment", "BudgetError", "RankedFactors", "RankedLayer"),
    *("RankedMatrices", "Schedule"),
}
REFUSING = {
    *("CubicBudget", "FixedGrowth", "FixedPruning", "OneShot"),
    *("Limits", "NormShare", "RankAllocator", "SmoothedSensitivity"),
    *("attach_", "compact_", "ranked_layers", "watch_"),
    *("importance_histogram", "rank_heatmap", "rank_timeline", "schedule_plot", "schedule_table"),
}
SUBMODULES = ("costs", "gates", "report", "scores", "tables")
PUBLIC = list(rank_budget.__all__) + [
    f"{module}.{name}"
    for module in SUBMODULES
    for name in importlib.import_module(f"rank_budget.{module}").__all__
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_public_objects_have_an_example_and_those_that_refuse_say_so(name):
    last = name.rpartition(".")[2]
    if last in WITHOUT_EXAMPLE:
        return
    text = attrgetter(name)(rank_budget).__doc__
    assert ">>> " in text
    assert ("Raises:" in text) == (last in REFUSING)


def test_all_is_what_the_readme_lists():
    table = README.read_text().split("## What there is")[1].split("| rule |")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = [name for row in rows for name in re.findall(r"`([\w.]+)`", row)]
    assert sorted(names) == sorted(PUBLIC)


def test_the_reference_lists_what_is_public():
    page = Path(__file__).parents[3] / "docs" / "reference" / "rank-budget.md"
    listed = re.findall(r"^::: rank_budget\.([\w.]+)$", page.read_text(), flags=re.MULTILINE)
    assert sorted(listed) == sorted(PUBLIC)


def test_readme_example_finds_the_ranks_in_seconds(capsys):
    # The other one needs PEFT, and runs in the tests against it.
    _, code = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {}
    started = time.perf_counter()
    exec(compile(code, str(README), "exec"), names)
    assert time.perf_counter() - started < 10
    assert names["ranks"] == {"layers.0.weight": 1, "layers.1.weight": 3}
    losses = names["losses"]
    assert losses[0] > 1
    assert losses[-1] < 1e-3
    assert capsys.readouterr().out.startswith("layer  weight\n0           1\n1           3\n4 of 8")
