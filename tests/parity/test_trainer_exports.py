"""What Trainer saves by hyper_tune.hf, PEFT loads: the same logits, head included."""

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Trainer,
    TrainingArguments,
)

from hyper_tune import MethodConfig
from hyper_tune.hf import adapt
from hyper_tune.method import HypernetworkSettings, PruningSettings

# PEFT asks transformers' models by a name that is going.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SIZE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "pad_token_id": 0,
}
KINDS = {
    "roberta": {"max_position_embeddings": 20},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "max_position_embeddings": 20,
    },
    "qwen3": {"num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 1},
    "gemma3_text": {"num_key_value_heads": 1, "head_dim": 8, "eos_token_id": 1},
}
WORDS = torch.randint(2, 40, (16, 6), generator=torch.Generator().manual_seed(0))


def build(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **SIZE, **KINDS[kind])
    auto = AutoModelForCausalLM if "head_dim" in KINDS[kind] else AutoModelForSequenceClassification
    return auto.from_config(config, dtype=torch.float32)


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=WORDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_saved_model_computes_the_same_in_peft(kind, tmp_path):
    model = build(kind)
    config = MethodConfig(
        "hyperadalora",
        init_rank=4,
        hypernetwork=HypernetworkSettings(preset="attention-small"),
        pruning=PruningSettings(interval=2),
    )
    adapted = adapt(model, config)
    labels = (lambda row: row) if "head_dim" in KINDS[kind] else (lambda row: int(row[0]) % 2)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(tmp_path / "run"),
            max_steps=6,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            save_strategy="no",
        ),
        train_dataset=[{"input_ids": row, "labels": labels(row)} for row in WORDS],
        callbacks=[adapted.callback()],
        optimizers=adapted.optimizers(lr=1e-2),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    loaded = PeftModel.from_pretrained(build(kind), tmp_path / "saved")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits(build(kind)), logits(model), atol=1e-3)
