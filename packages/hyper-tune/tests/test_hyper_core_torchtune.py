"""Hypernetworks generate the factors of torchtune's LoRA model, in hyper-core's few lines."""

import re
from pathlib import Path

import torch
from torchtune.models.llama3_2 import lora_llama3_2
from torchtune.modules.peft import get_adapter_params, set_trainable_params

from hyper_core import GeneratedParameters

README = Path(__file__).parents[3] / "packages/hyper-core/README.md"


def hyperize(model):
    """Run the function of the README."""
    (code,) = re.findall(r"```python\n(def hyperize.*?)```", README.read_text(), flags=re.DOTALL)
    names = {"GeneratedParameters": GeneratedParameters}
    exec(compile(code, str(README), "exec"), names)
    return names["hyperize"](model)


def tiny_lora_llama():
    torch.manual_seed(0)
    model = lora_llama3_2(
        lora_attn_modules=["q_proj", "v_proj"],
        apply_lora_to_mlp=True,
        vocab_size=61,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        embed_dim=16,
        intermediate_dim=24,
        max_seq_len=32,
        lora_rank=3,
        lora_alpha=6,
    )
    set_trainable_params(model, get_adapter_params(model))
    return model


def test_a_lora_model_of_torchtune_starts_as_its_base_and_trains():
    model = tiny_lora_llama()
    tokens = torch.randint(61, (4, 12))
    with torch.no_grad():
        base = model(tokens)  # lora_b is zero
    factors = get_adapter_params(model)
    b = [p for name, p in factors.items() if name.endswith("lora_b.weight")]
    generated = hyperize(model)
    leaves = {id(leaf) for group in generated.groups for leaf in group.leaves}
    assert leaves == {id(factor) for factor in factors.values()}
    assert {id(p) for group in generated.groups_of("b") for p in group.leaves} == set(map(id, b))
    optimizer = torch.optim.Adam(generated.parameters(), lr=3e-3)
    losses = []
    for step in range(60):
        generated.refresh()
        logits = model(tokens)
        if step == 0:
            torch.testing.assert_close(logits.detach(), base)
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        )
        loss.backward()
        generated.backward()
        optimizer.step()
        generated.commit()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(p.abs().max() > 0 for p in b)
