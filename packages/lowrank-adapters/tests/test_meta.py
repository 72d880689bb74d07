"""A model on the meta device takes its adapters first, and its weights afterwards."""

import itertools

import pytest
import torch

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    LoRA,
    PrincipalWeights,
    adapted_layers,
    adapter_state_dict,
    inject_adapters_,
    inside_adapters,
    load_adapter_state_dict_,
    materialise_,
)

MAKERS = [
    LoRA(3, 4.5),
    LoRA(3, 4.5, start=PrincipalWeights()),
    SVD(3, 4.5),
    SVD(3, 4.5, start=PrincipalWeights()),
    DoRA(3, 4.5),
    DoRA(3, 4.5, start=PrincipalWeights()),
    DyLoRA(3, 4.5),
]


def loaded_late(kit, plain, make):
    """The plain model's weights in a model that was on the meta device when it was adapted."""
    with torch.device("meta"):
        model = kit.Decoder()
    layers = inject_adapters_(model, make)
    assert all(
        parameter.is_meta for layer in layers.values() for parameter in layer.base.parameters()
    )
    weights = {inside_adapters(name, layers): t for name, t in plain.state_dict().items()}
    missing = model.load_state_dict(weights, assign=True, strict=False)
    assert set(missing.missing_keys) == set(adapter_state_dict(model))
    assert missing.unexpected_keys == []
    return model


@pytest.mark.parametrize("make", MAKERS, ids=str)
def test_it_starts_as_the_plain_model(kit, make):
    plain, words = kit.Decoder(), torch.arange(11)
    model = loaded_late(kit, plain, make)
    materialise_(model)
    torch.testing.assert_close(model(words), plain(words), rtol=1e-6, atol=1e-6)
    before = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    materialise_(model)
    torch.testing.assert_close(adapter_state_dict(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("make", MAKERS, ids=str)
def test_a_saved_adapter_makes_it_the_trained_model(kit, make):
    plain, words = kit.Decoder(), torch.arange(11)
    trained = kit.Decoder()
    trained.load_state_dict(plain.state_dict())
    inject_adapters_(trained, make)
    kit.shaken(trained)
    model = loaded_late(kit, plain, make)
    materialise_(model)
    load_adapter_state_dict_(model, adapter_state_dict(trained))
    assert (trained(words) - plain(words)).abs().max() > 0.1
    assert torch.equal(model(words), trained(words))


ORDERS = list(itertools.permutations(["base", "adapter", "materialise"]))
# Nothing is copied into meta, and materialise_ refuses a base that is there.
LATE = [(True, True, order) for order in ORDERS if order.index("base") < order.index("materialise")]
LOADS = LATE + [(False, assign, order) for assign in (True, False) for order in ORDERS]


@pytest.mark.parametrize(("meta", "assign", "order"), LOADS)
@pytest.mark.parametrize("make", MAKERS, ids=str)
def test_a_state_of_another_base_makes_it_the_trained_model(kit, make, meta, assign, order):
    words, trained = torch.arange(11), kit.Decoder()
    inject_adapters_(trained, make)
    kit.shaken(trained)
    with torch.no_grad():
        for layer in adapted_layers(trained).values():
            if "magnitude" in layer.roles:
                layer.magnitude.mul_(torch.rand(len(layer.magnitude)) + 0.5)
    state = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    with torch.device("meta" if meta else "cpu"):
        model = kit.Decoder()
    inject_adapters_(model, make)
    parts = {
        "base": {n: t for n, t in state.items() if n not in adapter_state_dict(trained)},
        "adapter": adapter_state_dict(trained),
    }
    for part in order:
        if part == "materialise":
            materialise_(model)
        else:
            copies = {name: tensor.clone() for name, tensor in parts[part].items()}
            result = model.load_state_dict(copies, assign=assign, strict=False)
            assert result.unexpected_keys == []
    assert torch.equal(model(words), trained(words))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name


@pytest.mark.parametrize("meta", [True, False])
@pytest.mark.parametrize("make", MAKERS, ids=str)
def test_a_whole_state_makes_it_the_trained_model_without_more(kit, make, meta):
    words, trained = torch.arange(11), kit.Decoder()
    inject_adapters_(trained, make)
    kit.shaken(trained)
    with torch.device("meta" if meta else "cpu"):
        model = kit.Decoder()
    inject_adapters_(model, make)
    model.load_state_dict(trained.state_dict(), assign=meta)
    assert torch.equal(model(words), trained(words))


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.bfloat16])
def test_a_magnitude_at_its_start_follows_the_base_that_is_loaded(factor_dtype):
    bases = torch.nn.Linear(6, 5), torch.nn.Linear(6, 5)
    layer = DoRA(2, 2.0).build(bases[0], device="cpu", dtype=factor_dtype)
    weights = {f"base.{name}": tensor for name, tensor in bases[1].state_dict().items()}
    layer.load_state_dict(weights, strict=False)
    norms = bases[1].weight.detach().norm(dim=1).to(factor_dtype)
    assert torch.equal(layer.magnitude.detach(), norms)
    assert torch.equal(layer.row_norms, norms.float())
    with torch.no_grad():
        layer.base.weight.mul_(3)
    materialise_(layer)
    norms = layer.base.weight.detach().norm(dim=1).to(factor_dtype)
    assert torch.equal(layer.magnitude.detach(), norms)
