"""What words after ``--config`` do to a configuration."""

from typing import Any

import pytest
from omegaconf import OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.overrides import apply_overrides


def changed(*words: str) -> dict[str, Any]:
    """Return what of a small configuration is different after the overrides."""
    config = OmegaConf.create(
        {
            "folder": "f",
            "seed": 0,
            "data": {"_component_": "a.b", "path": "${folder}/p"},
            "held_out": None,
            "files": {"filename_format": "m-{}", "max_filename": "00004"},
        }
    )
    before = OmegaConf.to_container(config, resolve=True)
    after = OmegaConf.to_container(
        apply_overrides(config, words, ["data", "held_out"]), resolve=True
    )
    assert OmegaConf.to_container(config, resolve=True) == before
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    gone = {key: "removed" for key in before if key not in after}
    return {k: v for k, v in after.items() if k not in before or before[k] != v} | gone


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["seed=1"], {"seed": 1}),
        (["seed=1e-5"], {"seed": 1e-5}),
        (["seed=null"], {"seed": None}),
        (["seed=None"], {"seed": None}),
        (["seed='1'"], {"seed": "1"}),
        (["seed=a=b"], {"seed": "a=b"}),
        (["seed=1", "seed=2"], {"seed": 2}),
        (["new.deep=[x, y]"], {"new": {"deep": ["x", "y"]}}),
        (["data.path=${folder}/q"], {"data": {"_component_": "a.b", "path": "f/q"}}),
        (["data=c.d"], {"data": {"_component_": "c.d", "path": "f/p"}}),
        (["data={path: q}"], {"data": {"_component_": "a.b", "path": "q"}}),
        (["data=null"], {"data": None}),
        (["~data"], {"data": "removed"}),
        (["~data.path"], {"data": {"_component_": "a.b"}}),
        (
            ["held_out=c.d", "held_out.path=q"],
            {"held_out": {"_component_": "c.d", "path": "q"}},
        ),
        (
            ["held_out.path=q", "held_out=c.d"],
            {"held_out": {"_component_": "c.d", "path": "q"}},
        ),
        (["files=[x]"], {"files": ["x"]}),
        (
            ["files.max_filename=00012"],
            {"files": {"filename_format": "m-{}", "max_filename": "00012"}},
        ),
    ],
)
def test_an_override_changes_what_it_names(words: list[str], expected: dict[str, Any]) -> None:
    assert changed(*words) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed", "'seed' is not understood; overrides are written key=value, or ~key to remove "),
        ("--seed=1", "'--seed=1' is not understood"),
        ("=1", "'=1' is not understood"),
        ("~seed=1", "'~seed=1' is not understood"),
        ("~sed", "~sed: there is no such key to remove; did you mean 'seed'?"),
        ("~data.xyz", "~data.xyz: there is no such key to remove; there are _component_, path."),
        ("seed=[1", "'seed=[1': the value is not YAML; put quotes around it."),
    ],
)
def test_an_override_that_cannot_be_is_refused(word: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        changed(word)
    assert str(caught.value).startswith(message)
