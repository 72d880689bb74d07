"""Nested state comes back exactly, or is refused with its path."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyper_tune.tree import flatten, unflatten

KEYS = st.text(alphabet="a$/%2F.5", max_size=4) | st.integers(-3, 99)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5)
)
TENSORS = st.builds(
    torch.full,
    st.lists(st.integers(0, 3), max_size=3),
    st.integers(-9, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
TREES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=20,
)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(map(repr, found)) == list(map(repr, expected))
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert repr(found) == repr(expected)


@settings(deadline=None)
@given(TREES)
def test_any_tree_survives_the_trip_through_json(tree: Any) -> None:
    tensors, plain = flatten(tree)
    assert_same(unflatten(tensors, json.loads(json.dumps(plain))), tree)


@pytest.mark.parametrize(
    "tree",
    [
        {1: torch.zeros(1), "1": torch.ones(1)},
        {"": {"a": torch.zeros(1)}, "a": torch.ones(1)},
        {"a/b": torch.zeros(1), "a": {"b": torch.ones(1)}, "a%2Fb": torch.full((1,), 2.0)},
        [torch.zeros(1), {"0": torch.ones(1)}, [torch.full((1,), 2.0)]],
        {"$tensor": "name", "$pairs": [["x"]], "plain": {"$pairs": {}}},
    ],
)
def test_names_that_look_alike_are_kept_apart(tree: Any) -> None:
    tensors, plain = flatten(tree)
    assert_same(unflatten(tensors, json.loads(json.dumps(plain))), tree)


def test_paths_name_the_tensors() -> None:
    tensors, plain = flatten({"owner": {"w/x": torch.ones(2)}, "moments": [torch.zeros(1), 3]})
    assert list(tensors) == ["owner/w%2Fx", "moments/0"]
    assert plain == {
        "owner": {"w/x": {"$tensor": "owner/w%2Fx"}},
        "moments": [{"$tensor": "moments/0"}, 3],
    }


def test_tuples_become_lists() -> None:
    assert unflatten(*flatten({"betas": (0.9, 0.999)})) == {"betas": [0.9, 0.999]}


@pytest.mark.parametrize(
    ("tree", "error", "text"),
    [
        ({"a": [1, {2}]}, TypeError, "a/1 is a set, which a checkpoint cannot hold."),
        ({"run": SimpleNamespace()}, TypeError, "run is a SimpleNamespace, which a checkpoint "),
        ({"a": {(0, 1): 2}}, TypeError, "a has the key (0, 1), which is neither int nor str."),
        ({"a": {0.5: 2}}, TypeError, "a has the key 0.5, which is neither int nor str."),
        ({"lr": {"x": math.nan}}, ValueError, "lr/x is nan; only finite numbers are saved."),
        ({"lr": -math.inf}, ValueError, "lr is -inf; only finite numbers are saved."),
    ],
)
def test_what_cannot_be_kept_is_refused_by_its_path(
    tree: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as caught:
        flatten(tree)
    assert str(caught.value).startswith(text)


def test_a_missing_tensor_is_a_key_error() -> None:
    tensors, plain = flatten({"a": torch.ones(1)})
    tensors.clear()
    with pytest.raises(KeyError, match="'a'"):
        unflatten(tensors, plain)
