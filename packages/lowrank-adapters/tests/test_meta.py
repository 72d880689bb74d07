"""A model on the meta device takes its adapters first, and its weights afterwards."""

import pytest
import torch

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    LoRA,
    PrincipalWeights,
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
