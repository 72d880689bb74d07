"""Hypernetworks generate the factors of a PEFT LoRA model, in the few lines of the README."""

import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from hyper_core import GeneratedParameters

# Of transformers' names that PEFT still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
README = Path(__file__).parents[2] / "packages/hyper-core/README.md"


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=61,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=32,
            initializer_range=0.3,
        )
    )


def lora_llama():
    config = LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(tiny_llama(), config)


def hyperize():
    """Return the function of the README."""
    (code,) = re.findall(r"```python\n(def hyperize.*?)```", README.read_text(), flags=re.DOTALL)
    names = {"GeneratedParameters": GeneratedParameters}
    exec(compile(code, str(README), "exec"), names)
    return names["hyperize"]


def test_a_lora_model_starts_as_its_base_trains_and_is_saved_as_lora(tmp_path):
    torch.manual_seed(0)
    tokens = torch.randint(61, (4, 12))
    base = tiny_llama()
    model = lora_llama()
    generated = hyperize()(model)
    assert len(generated.groups) > 2
    optimizer = torch.optim.Adam(generated.parameters(), lr=1e-3)

    losses = []
    for step in range(60):
        generated.refresh()
        if step == 0:
            with torch.no_grad():
                torch.testing.assert_close(model(tokens).logits, base(tokens).logits)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        generated.backward()
        optimizer.step()
        generated.commit()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]

    with torch.no_grad():
        generated.refresh()
        expected = model(tokens).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=0, atol=1e-6)


def test_gradients_equal_end_to_end_autograd_in_float64():
    model = lora_llama().double()
    generated = hyperize()(model)
    with torch.no_grad():
        for parameter in generated.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    tokens = torch.randint(61, (2, 9))
    generated.refresh()
    model(input_ids=tokens, labels=tokens).loss.backward()
    generated.backward()
    found = [p.grad for p in generated.parameters()]

    leaves = {id(p): name for name, p in model.named_parameters() if "lora_" in name}
    values = {}
    for role, stacks in generated.generate().items():
        for group, stack in zip(generated.groups_of(role), stacks, strict=True):
            for leaf, value in zip(group.leaves, stack, strict=True):
                values[leaves[id(leaf)]] = value
    assert len(values) == len(leaves)
    loss = torch.func.functional_call(
        model, values, kwargs={"input_ids": tokens, "labels": tokens}
    ).loss
    expected = torch.autograd.grad(loss, list(generated.parameters()))
    torch.testing.assert_close(found, list(expected), rtol=1e-9, atol=1e-12)
