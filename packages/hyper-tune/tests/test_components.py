"""Components that fail: what refuses its arguments is one message, what is broken a traceback."""

import json
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor

from hyper_tune.errors import UserError
from hyper_tune.torchtune.components import build, build_tokenizer
from hyper_tune.torchtune.optimization import try_optimizer

HERE = "torchtune.training"


class LibraryError(Exception):
    """A class of a library's own."""


def _raises(error: Exception) -> NoReturn:
    raise error


@pytest.fixture
def section(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, Any]]:
    """Return what makes a section of a configuration that names ``component``."""

    def named(component: Callable[..., Any], **keys: Any) -> dict[str, Any]:
        monkeypatch.setattr(f"{HERE}.made_here", component, raising=False)
        return {"_component_": f"{HERE}.made_here", **keys}

    return named


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no such size"),
        OSError("no such size"),
        ImportError("no such size"),
        RuntimeError("no such size"),
        NotImplementedError("no such size"),
        AssertionError("no such size"),
        ZeroDivisionError("no such size"),
        Exception("no such\n size"),
        LibraryError("no such size"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_component_refuses_is_one_message(
    section: Callable[..., dict[str, Any]], error: Exception
) -> None:
    with pytest.raises(UserError) as refused:
        build("model", section(lambda: _raises(error)))
    assert str(refused.value) == f"model: {HERE}.made_here cannot be built: no such size"
    assert refused.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        TypeError("'int' object is not callable"),
        AttributeError("'Model' object has no attribute 'layer'"),
        KeyError("layer"),
        IndexError("list index out of range"),
        NameError("name 'layer' is not defined"),
        RecursionError("maximum recursion depth exceeded"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_component_that_is_broken_keeps_its_traceback(
    section: Callable[..., dict[str, Any]], error: Exception
) -> None:
    with pytest.raises(type(error)) as raised:
        build("model", section(lambda: _raises(error)))
    assert raised.value is error
    assert raised.traceback[-1].name == "_raises"
    assert error.__notes__ == [f"while model: {HERE}.made_here was built"]


def test_a_bug_in_code_without_a_module_keeps_its_traceback(
    section: Callable[..., dict[str, Any]],
) -> None:
    generated = FunctionType((lambda: {}["layer"]).__code__, {})  # as attrs makes some
    with pytest.raises(KeyError, match="layer"):
        build("model", section(generated))


def _sized(size: int, *, scale: float = 1.0) -> float:
    return size * scale


def _hands_on(**keys: Any) -> float:
    return _sized(**keys)


@pytest.mark.parametrize(
    ("component", "keys", "reason"),
    [
        (_sized, {}, "missing 1 required positional argument: 'size'"),
        (_sized, {"sise": 3}, "unexpected keyword argument 'sise'; did you mean 'size'?"),
        (_hands_on, {"size": 3, "sca": 3}, "unexpected keyword argument 'sca'; it has keys."),
        (divmod, {}, "divmod expected 2 arguments, got 0"),
    ],
)
def test_arguments_that_do_not_fit_the_call_are_one_message(
    section: Callable[..., dict[str, Any]],
    component: Callable[..., Any],
    keys: dict[str, Any],
    reason: str,
) -> None:
    with pytest.raises(UserError) as refused:
        build("model", section(component, **keys))
    assert str(refused.value).startswith(f"model: {HERE}.made_here cannot be built: ")
    assert str(refused.value).endswith(reason)


@pytest.mark.parametrize("content", [{}, [], {"added_tokens": [{}]}, {"added_tokens": 5}])
def test_a_tokenizers_file_of_another_form_is_one_message(
    llama: dict[str, Any], tmp_path: Path, content: Any
) -> None:
    path = tmp_path / "special_tokens.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError) as refused:
        build_tokenizer(llama["tokenizer"] | {"special_tokens_path": str(path)})
    message = str(refused.value)
    assert message.startswith("tokenizer: torchtune.models.llama3.llama3_tokenizer cannot be built")
    assert message.endswith("; its files may be of another form, or damaged: fetch them again.")


class Broken(torch.optim.SGD):
    """An optimizer whose step has a bug."""

    def step(self, closure: Any = None) -> None:
        del closure
        self.state["momentum"]["average"]


class Refusing(torch.optim.SGD):
    """An optimizer that refuses the first step."""

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("not on\n this device")


class Forwarding(torch.optim.SGD):
    """An optimizer whose step hands on whatever it is given."""

    def step(self, *args: Any, **keys: Any) -> None:
        super().step(*args, **keys)


def test_a_step_that_hands_on_what_it_is_given_is_taken(
    section: Callable[..., dict[str, Any]],
) -> None:
    try_optimizer(section(Forwarding), torch.zeros(1))


def test_a_step_that_is_broken_keeps_its_traceback(
    section: Callable[..., dict[str, Any]],
) -> None:
    with pytest.raises(KeyError) as raised:
        try_optimizer(section(Broken), torch.zeros(1))
    assert raised.traceback[-1].name == "step"
    assert raised.value.__notes__ == [f"while optimizer: {HERE}.made_here took a first step"]


def test_a_step_that_is_refused_is_one_message(section: Callable[..., dict[str, Any]]) -> None:
    like: Tensor = torch.zeros(1)
    with pytest.raises(UserError) as refused:
        try_optimizer(section(Refusing), like)
    assert str(refused.value) == (
        f"optimizer: {HERE}.made_here cannot take a step: not on this device"
    )
