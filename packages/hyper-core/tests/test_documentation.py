"""Every example runs: those of the docstrings and that of the README."""

import doctest
import importlib
import pkgutil
import re
import time
from pathlib import Path

import pytest

import hyper_core

README = Path(__file__).parents[1] / "README.md"
MODULES = ["hyper_core"] + [
    module.name for module in pkgutil.walk_packages(hyper_core.__path__, "hyper_core.")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name):
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", sorted(set(hyper_core.__all__) - {"HyperError", "PRESETS"}))
def test_public_objects_have_an_example_and_their_errors(name):
    text = getattr(hyper_core, name).__doc__
    assert ">>> " in text
    assert "Raises:" in text


def test_all_is_what_the_readme_lists():
    table = README.read_text().split("## What there is")[1].split("| choice |")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(hyper_core.__all__)


def test_readme_examples_run_and_the_first_learns_in_seconds(capsys):
    code, *rest = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names: dict[str, object] = {"reuse_": hyper_core.reuse_, "diagnose": hyper_core.diagnose}
    started = time.perf_counter()
    exec(compile(code, str(README), "exec"), names)
    assert time.perf_counter() - started < 10
    losses = names["losses"]
    assert losses[0] > 0.2
    assert losses[-1] < 0.02
    assert capsys.readouterr().out.startswith(f"loss {losses[0]:.3f} at the start")
    for later in rest:  # read in the order of the page, as a reader does
        exec(compile(later, str(README), "exec"), names)
    assert re.search(r"\d+ tensors carried over; \d+ start afresh", capsys.readouterr().out)
    assert callable(names["hyperize"])
