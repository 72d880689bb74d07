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
from hyper_tune.packaged import packaged_configs

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
    "name", ["HypernetworkSettings", "MethodConfig", "PruningSettings", "assemble"]
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
