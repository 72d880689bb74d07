"""Small models of random weights, and the same method put on them by PEFT and by us."""

from types import SimpleNamespace

import pytest
import torch
from peft import AdaLoraConfig, LoraConfig, get_peft_model
from torch import nn
from transformers import (
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

DECODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
ENCODER = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "num_labels": 3,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
# As microsoft/deberta-v3-base has them.
DEBERTA_V3 = ENCODER | {
    "relative_attention": True,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "type_vocab_size": 0,
}
BUILD = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
    "roberta": lambda: RobertaForSequenceClassification(RobertaConfig(**ENCODER)),
    "deberta-v3": lambda: DebertaV2ForSequenceClassification(DebertaV2Config(**DEBERTA_V3)),
}
TARGETS = {
    "llama": ["q_proj", "v_proj", "gate_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "o_proj", "up_proj"],
    "roberta": ["query", "value", "output.dense"],
    "deberta-v3": ["query_proj", "value_proj", "intermediate.dense"],
}


def build(name, dtype=torch.float32):
    """The model of a name, always with the same weights."""
    torch.manual_seed(0)
    return BUILD[name]().to(dtype).eval()


def tokens(seed=0, batch=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(5, 97, (batch, 17), generator=generator)


def loss_of(model, batch):
    """Cross-entropy without the model's own loss, to which PEFT's AdaLoRA adds a penalty."""
    logits = model(batch).logits
    if logits.dim() == 2:
        return nn.functional.cross_entropy(logits, batch[:, 0] % logits.shape[1])
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())


def peft_config(method, targets, **options):
    if method == "adalora":
        schedule = {"total_step": 1000, "tinit": 900}
        options = {"init_r": 4, "lora_alpha": 6, **schedule, **options}
        return AdaLoraConfig(target_modules=targets, **options)
    options = {"r": 4, "lora_alpha": 6, **options}
    extra = {"use_rslora": method == "rslora", "use_dora": method == "dora"}
    return LoraConfig(target_modules=targets, **extra, **options)


def with_peft(name, method, dtype=torch.float32, shake=0.3, **options):
    """A model with PEFT's adapter off its start."""
    model = get_peft_model(build(name, dtype), peft_config(method, TARGETS[name], **options))
    return shaken(model.to(dtype), shake).eval()


@torch.no_grad()
def shaken(model, scale=0.3, names=("lora_",)):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if any(part in name for part in names):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(scale * noise.to(parameter.dtype))
    return model


@torch.no_grad()
def shake_factors(layers, scale=0.3):
    for layer in layers.values():
        for _, factor in layer.factors():
            factor.add_(scale * torch.randn(factor.shape))


@pytest.fixture(scope="session")
def kit():
    return SimpleNamespace(
        MODELS=tuple(BUILD),
        TARGETS=TARGETS,
        build=build,
        loss_of=loss_of,
        peft_config=peft_config,
        shake_factors=shake_factors,
        shaken=shaken,
        tokens=tokens,
        with_peft=with_peft,
    )
