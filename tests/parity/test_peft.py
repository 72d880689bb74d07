"""PEFT reads what we export, and computes what we trained."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM

from hyper_tune.assembly import assemble
from hyper_tune.method import METHODS, MethodConfig

# Of transformers' names that PEFT still uses.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")
FORMS = [*METHODS, "dora scalar", "hyperdora scalar"]


def tiny_llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def settings(form):
    name, *scalar = form.split()
    options = {"magnitude": {"form": "scalar"}} if scalar else {}
    if name.endswith("adalora"):
        options |= {"budget": 2, "pruning": {"interval": 2}}
    if name.startswith("hyper"):
        options["hypernetwork"] = {"preset": "attention-small"}
    return MethodConfig.from_mapping({"name": name, "init_rank": 4, "alpha": 8, **options})


def train(model, method, tokens):
    optimizer = torch.optim.Adam(method.parameters(), lr=3e-3)
    for _ in range(8):
        with method.step(optimizer) as step:
            logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="sum"
            )
            step.backward(loss, tokens[:, 1:].numel())
    method.write_factors_()
    return step.report


@pytest.mark.parametrize("name", FORMS)
def test_peft_gives_the_trained_models_logits(name, tmp_path):
    tokens = torch.randint(97, (3, 17))
    base = tiny_llama()
    with torch.no_grad():
        before = base(tokens).logits
    base.save_pretrained(tmp_path / "base")

    model = tiny_llama()
    method = assemble(model, settings(name), total_steps=8)
    report = train(model, method, tokens)
    assert report.live_ranks == method.total_ranks // (2 if name.endswith("adalora") else 1)
    with torch.no_grad():
        expected = model(tokens).logits
    folder = method.export(tmp_path / "adapter", task_type="CAUSAL_LM")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_dora"] == name.endswith("dora")

    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    peft = PeftModel.from_pretrained(base, folder).eval()
    with torch.no_grad():
        found = peft(tokens).logits
        merged = peft.merge_and_unload()(tokens).logits
    assert (expected - before).abs().max() > 1e-2
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-5)


def test_the_config_is_that_of_a_causal_model(tmp_path):
    model = tiny_llama()
    method = assemble(model, settings("hyperadalora"), total_steps=8)
    folder = method.export(tmp_path / "adapter", task_type="CAUSAL_LM")
    config = json.loads((folder / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
