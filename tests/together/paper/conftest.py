"""The paper recipe's modules, the files that it reads, and an experiment with a change in it."""

import argparse
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[3] / "recipes" / "paper"
MODULES = (
    *("stopping", "experiment", "sources", "cells", "grid", "measures", "report", "run"),
    *("similarity", "step_cost", "small_llama"),
)


@pytest.fixture(scope="module")
def recipe():
    """Return the recipe's modules, which import each other by name as scripts do."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield argparse.Namespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(RECIPE))
        for name in (*MODULES, "base", "world"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(recipe, tmp_path_factory):
    """Return a folder in which every file is that a data set may have."""
    folder = tmp_path_factory.mktemp("data")
    for entry in recipe.experiment.catalogue()["data"].values():
        for source in [*entry["sources"], *entry.get("tiny", [])]:
            for path in (folder / source[part] for part in ("train", "test") if part in source):
                path.parent.mkdir(exist_ok=True)
                path.write_text(str(path.relative_to(folder)))
    return folder


@pytest.fixture
def package(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe.cells, "_package", lambda name: tmp_path)


@pytest.fixture
def changed(recipe, tmp_path):
    """Return a function that reads an experiment's file with one text in it put for another."""

    def read(old, new, name="table1"):
        text = (RECIPE / "experiments" / f"{name}.yaml").read_text()
        assert old in text
        path = tmp_path / f"{name}.yaml"
        path.write_text(text.replace(old, new))
        return recipe.experiment.read(path)

    return read
