"""Every example of the docstrings runs, and every public object has one."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import hyper_tune

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
