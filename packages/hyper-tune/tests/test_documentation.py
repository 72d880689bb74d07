"""Every example of the docstrings runs, and every public object has one."""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest

import hyper_tune
from hyper_tune.method import METHODS
from hyper_tune.packaged import packaged_configs
from hyper_tune.torchtune.model_types import MODEL_TYPES, REFUSED_TYPES

README = (Path(__file__).parents[1] / "README.md").read_text()
MODULES = ["hyper_tune"] + [
    module.name for module in pkgutil.walk_packages(hyper_tune.__path__, "hyper_tune.")
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0


def test_the_modules_are_found_and_have_examples() -> None:
    assert {"hyper_tune.sampling", "hyper_tune.torchtune.recipe"} <= set(MODULES)
    finder = doctest.DocTestFinder()
    examples = [
        example
        for name in MODULES
        for test in finder.find(importlib.import_module(name))
        for example in test.examples
    ]
    assert len(examples) > 30


@pytest.mark.parametrize(
    "name",
    ["HypernetworkSettings", "MagnitudeSettings", "MethodConfig", "SamplingSettings", "assemble"],
)
def test_what_users_call_first_has_an_example_and_its_errors(name: str) -> None:
    text = inspect.getdoc(getattr(hyper_tune, name)) or ""
    assert ">>> " in text
    assert "Raises:" in text


@pytest.mark.parametrize("name", hyper_tune.__all__)
def test_public_names_are_there_and_explained(name: str) -> None:
    assert getattr(hyper_tune, name).__doc__


def test_the_readme_lists_what_is_public() -> None:
    rows = [line.split("|")[1] for line in README.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(hyper_tune.__all__)


def test_the_readme_names_every_configuration() -> None:
    for name in packaged_configs():
        assert f"`{name}`" in README


def test_the_example_of_the_readme_learns(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["losses"][-1] < 0.8 * names["losses"][0]
    assert sum(names["method"].ranks().values()) == 4
    assert capsys.readouterr().out.startswith(f"loss {names['losses'][0]:.2f} to ")


GUIDE = (Path(__file__).parents[3] / "docs" / "guide" / "methods.md").read_text()


def table_below(heading: str) -> list[list[str]]:
    """The cells of the first table under a heading of the guide, without its rule."""
    below = GUIDE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in below.splitlines() if line.startswith("|") and "---" not in line]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_guide_has_the_options_of_every_method() -> None:
    head, *rows = table_below("Options by method")
    names = [name.strip("`") for name in head[1:]]
    assert names == list(METHODS)
    documented = {
        name: {row[0].strip("`") for row in rows if row[column] == "yes"}
        for column, name in enumerate(names, 1)
    }
    assert documented == {name: set(METHODS[name].settings) for name in METHODS}


def test_the_guide_has_every_model_that_is_trained() -> None:
    rows = table_below("Models")[1:]
    assert sorted(row[1].strip("`") for row in rows) == sorted(MODEL_TYPES)
    for name in re.findall(r"`(\w+)`", " ".join(row[0] for row in rows)):
        importlib.import_module(f"torchtune.models.{name}")
    for name in REFUSED_TYPES:
        assert f"`{name.lower().removesuffix('_mini')}`" in GUIDE.split("## Models")[1]
