"""The configuration of a method: defaults, PEFT's names, refusals."""

from dataclasses import replace
from typing import Any

import pytest

from hyper_core import AttentionConfig, ConvConfig, HyperError
from hyper_tune import MagnitudeSettings, MethodConfig, SamplingSettings
from hyper_tune.errors import UserError
from hyper_tune.method import METHODS, HypernetworkSettings, PruningSettings


@pytest.mark.parametrize("name", METHODS)
def test_defaults_fit_every_method(name: str) -> None:
    config = MethodConfig(name, init_rank=6)
    method = METHODS[name]
    assert config.budget == (3 if method.prunes else None)
    assert config.alpha == 6.0
    assert config.orthogonality == (0.1 if method.layer == "svd" else None)
    assert config.hypernetwork == (HypernetworkSettings() if method.generated else None)
    assert config.pruning == (PruningSettings() if method.prunes else None)
    assert config.magnitude == (MagnitudeSettings() if "dora" in name else None)
    assert config.sampling == (SamplingSettings() if "dylora" in name else None)


@pytest.mark.parametrize("name", METHODS)
def test_a_configuration_can_be_made_anew_with_one_value_changed(name: str) -> None:
    config = MethodConfig(name, init_rank=6)
    assert replace(config, alpha=3.0) == MethodConfig(name, init_rank=6, alpha=3.0)


def test_the_methods_are_the_product_of_layers_and_owners() -> None:
    layers = {"lora": "fixed", "svd": "pruned", "dora": "fixed", "dylora": "sampled"}
    product = {(layer, generated, ranks) for layer, ranks in layers.items() for generated in (0, 1)}
    found = [(method.layer, method.generated, method.ranks) for method in METHODS.values()]
    assert set(found) == product
    assert len(found) == len(product) == 8
    assert all(method.generated == name.startswith("hyper") for name, method in METHODS.items())


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


def test_names_may_be_a_list_where_python_makes_the_configuration() -> None:
    listed = MethodConfig("lora", target_modules=["q_proj", "v_proj"], exclude=["layers.0.*"])
    assert listed.target_modules == ("q_proj", "v_proj")
    assert listed.exclude == ("layers.0.*",)
    assert hash(listed) == hash(
        MethodConfig("lora", target_modules=("q_proj", "v_proj"), exclude=("layers.0.*",))
    )


@pytest.mark.parametrize(
    ("name", "section", "kind"),
    [
        ("hyperadalora", "pruning", "PruningSettings"),
        ("hyperlora", "hypernetwork", "HypernetworkSettings"),
        ("dora", "magnitude", "MagnitudeSettings"),
        ("dylora", "sampling", "SamplingSettings"),
    ],
)
def test_a_dictionary_in_a_sections_place_is_refused(name: str, section: str, kind: str) -> None:
    given: dict[str, Any] = {section: {}}
    with pytest.raises(UserError) as caught:
        MethodConfig(name, **given)
    assert str(caught.value) == (
        f"method.{section} is {{}}, but must be made by {kind}(...); "
        "MethodConfig.from_mapping reads dictionaries."
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"name": "adalor"}, "method.name is 'adalor', but must be one of lora, adalora, "),
        (
            {"r": 4, "init_rank": 4, "alpha": 4},
            "method gives one setting twice, under two names: init_rank, r; give one of them.",
        ),
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
        (
            {"name": "dora", "pruning": {}, "sampling": {}},
            "method.name 'dora' has no method.pruning, method.sampling; leave them out (on the ",
        ),
        (
            {"name": "adalora", "sampling": {"lowest": 2}},
            "method.name 'adalora' has no method.sampling; leave them out ",
        ),
        (
            {"name": "dora", "magnitude": {"form": "column"}},
            "method.magnitude.form is 'column', but must be one of rows, scalar; ",
        ),
        (
            {"name": "dora", "magnitude": {"detach_norm": "no"}},
            "method.magnitude.detach_norm is 'no', but must be True or False; ",
        ),
        (
            {"name": "dora", "magnitude": {"form": "scalar", "detach_norm": True}},
            "method.magnitude.detach_norm is for form 'rows', but method.magnitude.form is ",
        ),
        (
            {"name": "dylora", "sampling": {"lowest": 0}},
            "method.sampling.lowest is 0, but must be a whole number at least 1; ",
        ),
        (
            {"name": "dylora", "sampling": {"lowest": 3, "highest": 2}},
            "method.sampling.highest is 2, but must be a whole number at least 3; ",
        ),
        (
            {"name": "dylora", "init_rank": 4, "sampling": {"highest": 5}},
            "method.sampling.highest is 5, but must be at most method.init_rank = 4; lower it or ",
        ),
        (
            {"name": "dylora", "init_rank": 4, "sampling": {"lowest": 5}},
            "method.sampling.lowest is 5, but must be at most method.init_rank = 4; lower it or ",
        ),
        (
            {"name": "dylora", "sampling": {"draw": "share"}},
            "method.sampling.draw is 'share', but must be one of shared, each; did you mean 'share",
        ),
        (
            {"name": "hyperdylora", "sampling": {"frozen": True}},
            "method.sampling.frozen is True, but hyperdylora generates all components by the same ",
        ),
        (
            {"hypernetwork": {"state": "statick"}},
            "method.hypernetwork.state is 'statick', but must be one of recurrent, static, damped; "
            "did you mean 'static'?",
        ),
        (
            {"hypernetwork": {"sharing": "group"}},
            "method.hypernetwork.sharing is 'group', but must be one of all, groups, each; did you",
        ),
        (
            {"hypernetwork": {"outputs": "orthonormal_rows"}},
            "method.hypernetwork.outputs is 'orthonormal_rows', but must be one of unit_rows, ort",
        ),
        (
            {"hypernetwork": {"dtype": "fp16"}},
            "method.hypernetwork.dtype is 'fp16', but must be one of fp32, bf16; ",
        ),
        (
            {"hypernetwork": {"relaxation": 0.3}},
            "method.hypernetwork.relaxation is for state 'damped', but method.hypernetwork.state "
            "is 'recurrent'; leave it out.",
        ),
        (
            {"hypernetwork": {"state": "damped", "relaxation": 1.5}},
            "method.hypernetwork.relaxation is 1.5, but must be a number above 0 and at most 1; ",
        ),
        (
            {"hypernetwork": {"gradient_decay": 0.9}},
            "method.hypernetwork.gradient_decay is for gradient_normalisation 'token_rms', but ",
        ),
        (
            {"hypernetwork": {"gradient_normalisation": "token_rms", "gradient_decay": 1}},
            "method.hypernetwork.gradient_decay is 1, but must be below 1; lower it.",
        ),
        (
            {"hypernetwork": {"preset": "mlp-small", "body": "mlp"}},
            "method.hypernetwork has both preset 'mlp-small' and body 'mlp'; a preset says body",
        ),
        (
            {"hypernetwork": {"sizes": {"hidden": 8}}},
            "method.hypernetwork.sizes is {'hidden': 8}, but sizes are of a body, and none is ",
        ),
        (
            {"hypernetwork": {"body": "attenton"}},
            "method.hypernetwork.body is 'attenton', but must be one of attention, conv, mlp; did ",
        ),
        (
            {"hypernetwork": {"body": "conv", "sizes": {"width": [4]}}},
            "method.hypernetwork.sizes has no key 'width'; did you mean 'widths'?",
        ),
        (
            {"hypernetwork": {"body": "mlp", "sizes": 3}},
            "method.hypernetwork.sizes is 3, but must be a section of keys.",
        ),
    ],
)
def test_refusals_name_the_field_and_the_remedy(given: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as error:
        MethodConfig.from_mapping(given)
    assert str(error.value).startswith(message)


def test_a_size_that_no_body_can_have_is_refused_by_the_body() -> None:
    sizes = {"hidden": 10, "heads": 4}
    with pytest.raises(HyperError, match="hidden is 10, expected a multiple of heads, 4; make it"):
        MethodConfig.from_mapping({"hypernetwork": {"body": "attention", "sizes": sizes}})


def test_bodies_have_the_sizes_that_are_given() -> None:
    def size(**given: object) -> object:
        config = MethodConfig.from_mapping({"hypernetwork": given})
        assert config.hypernetwork is not None
        return config.hypernetwork.config

    assert size() == AttentionConfig()
    assert size(body="attention") == AttentionConfig()
    assert size(body="attention", sizes={"hidden": 8, "heads": 2, "norm": "pre"}) == (
        AttentionConfig(hidden=8, heads=2, norm="pre")
    )
    assert size(body="conv", sizes={"widths": [4, 8], "blocks": [1, 2], "kernel": 5}) == (
        ConvConfig(widths=(4, 8), blocks=(1, 2), kernel=5)
    )
