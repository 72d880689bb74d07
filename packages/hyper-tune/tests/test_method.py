"""The configuration of a method: defaults, PEFT's names, refusals."""

import pytest

from hyper_tune import MethodConfig
from hyper_tune.errors import UserError
from hyper_tune.method import METHODS, HypernetworkSettings, PruningSettings


@pytest.mark.parametrize("name", METHODS)
def test_defaults_fit_every_method(name: str) -> None:
    config = MethodConfig(name, init_rank=6)
    method = METHODS[name]
    assert config.budget == (3 if method.prunes else 6)
    assert config.alpha == 6.0
    assert config.orthogonality == (0.1 if method.layer == "svd" else None)
    assert config.hypernetwork == (HypernetworkSettings() if method.generated else None)
    assert config.pruning == (PruningSettings() if method.prunes else None)


def test_peft_names_are_understood() -> None:
    given = {
        "name": "adalora",
        "init_r": 12,
        "target_r": 8,
        "lora_alpha": 32,
        "orth_reg_weight": 0.5,
        "target_modules": ["q_proj", "v_proj"],
        "exclude_modules": ["layers.0.*"],
    }
    assert MethodConfig.from_mapping(given) == MethodConfig(
        "adalora",
        init_rank=12,
        budget=8,
        alpha=32,
        orthogonality=0.5,
        target_modules=("q_proj", "v_proj"),
        exclude=("layers.0.*",),
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "adalor"}, "method.name is 'adalor', but must be one of lora, adalora, "),
        ({"r": 4, "init_rank": 4}, "method gives one setting twice, under two names: "),
        ({"pruning": {"intervall": 3}}, "method.pruning has no key 'intervall'; did you mean "),
        ({"pruning": 3}, "method.pruning is 3, but must be a section of keys."),
        (
            {"pruning": {"interval": 0}},
            "method.pruning.interval is 0, but must be a whole number at ",
        ),
        ({"pruning": {"count": 0}}, "method.pruning.count is 0, but must be a whole number at le"),
        (
            {"pruning": {"finish_by": 1.5}},
            "method.pruning.finish_by is 1.5, but must be a number above 0 ",
        ),
        ({"orthogonality": -1}, "method.orthogonality is -1, but must be a number at least 0; "),
        ({"alpha": 0}, "method.alpha is 0, but must be a number above 0; "),
        (
            {"init_rank": "six"},
            "method.init_rank is 'six', but must be a whole number at least 1; ",
        ),
        ({"name": "lora", "budget": 2}, "method.name 'lora' has no method.budget; leave "),
        (
            {"name": "adalora", "hypernetwork": {}},
            "method.name 'adalora' has no method.hypernetwork; leave them out (on the command line "
            "of a recipe: '~method.hypernetwork'), or choose a method that has them.",
        ),
    ],
)
def test_refusals_name_the_field_and_the_remedy(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        MethodConfig.from_mapping(given)
    assert str(error.value).startswith(message)
