"""Same weights in, same logits and gradients out as PEFT's, in float64, on small transformers."""

import pytest
import torch
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer

from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    LoRA,
    PrincipalWeights,
    freeze_base_,
    import_peft_,
    inject_adapters_,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
MODELS = ("llama", "qwen2", "roberta", "deberta-v3")
METHODS = ("lora", "rslora", "dora", "adalora")
# Our names of the factors that PEFT has under these.
ROLES = {
    "lora": {"a": "lora_A.default.weight", "b": "lora_B.default.weight"},
    "adalora": {"q": "lora_A.default", "lam": "lora_E.default", "p": "lora_B.default"},
}
ROLES["rslora"] = ROLES["lora"]
ROLES["dora"] = ROLES["lora"] | {"magnitude": "lora_magnitude_vector.default.weight"}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_gradients_are_pefts(kit, tmp_path, name, method):
    theirs = kit.with_peft(name, method, torch.float64)
    theirs.save_pretrained(tmp_path)
    ours = kit.build(name, torch.float64)
    batch = kit.tokens()
    plain = ours(batch).logits
    layers = import_peft_(ours, tmp_path, factor_dtype=torch.float64)
    freeze_base_(ours)
    assert len(layers) == 2 * len(kit.TARGETS[name]) + (2 if name == "roberta" else 0)

    expected, found = theirs(batch).logits, ours(batch).logits
    assert (expected - plain).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)

    kit.loss_of(theirs, batch).backward()
    kit.loss_of(ours, batch).backward()
    for name_of_layer, layer in layers.items():
        assert {role for role, _ in layer.factors()} == ROLES[method].keys()
        for role, factor in layer.factors():
            key = f"base_model.model.{name_of_layer}.{ROLES[method][role]}"
            twin = theirs.get_parameter(key)
            assert twin.grad.abs().max() > 0, key
            gradient = twin.grad.reshape(factor.shape)
            torch.testing.assert_close(factor.grad, gradient, rtol=1e-9, atol=1e-12, msg=key)


@pytest.mark.parametrize("name", MODELS)
def test_all_linear_is_what_it_is_in_peft(kit, name):
    task = "SEQ_CLS" if name in ("roberta", "deberta-v3") else "CAUSAL_LM"
    theirs = get_peft_model(kit.build(name), kit.peft_config("lora", "all-linear", task_type=task))
    expected = [
        where.removeprefix("base_model.model.")
        for where, module in theirs.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    ours = kit.build(name)
    assert list(inject_adapters_(ours, LoRA(rank=2, alpha=2.0))) == expected
    assert len(expected) > 10


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "make",
    [
        LoRA(4, 6.0),
        LoRA(4, 6.0, rslora=True, dropout=0.1),
        LoRA(4, 6.0, start=PrincipalWeights()),
        SVD(4, 6.0),
        DoRA(4, 6.0),
        DoRA(4, 6.0, magnitude="scalar"),
        DyLoRA(4, 6.0),
    ],
    ids=["lora", "rslora", "pissa", "adalora", "dora", "scalar dora", "dylora"],
)
def test_injected_model_is_the_plain_one(kit, name, make):
    model, batch = kit.build(name), kit.tokens()
    expected = model(batch).logits
    inject_adapters_(model, make)
    torch.testing.assert_close(model(batch).logits, expected, rtol=1e-5, atol=1e-5)
