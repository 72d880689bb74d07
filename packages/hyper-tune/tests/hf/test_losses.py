"""The loss of a step is a mean over its micro-batches, also of models that ignore their count."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForTokenClassification,
    Trainer,
)

from hyper_tune.hf import adapt

SIZE = {"vocab_size": 30, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
LENGTH = 6
COUNTED = ("modern", "causal")  # which use the count of items that they are given
LONG = torch.randint(2, 30, (4, LENGTH), generator=torch.Generator().manual_seed(0))
# In rows 2 and 3 fewer words are labelled, so that a mean of means is not the mean of all.
LABELS = LONG.masked_fill(torch.arange(4)[:, None] + torch.arange(LENGTH) > 5, -100)
FAMILIES: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "masked": (AutoModelForMaskedLM, "bert", {"num_attention_heads": 2}),
    "tokens": (AutoModelForTokenClassification, "bert", {"num_attention_heads": 2}),
    "bart": (
        AutoModelForSeq2SeqLM,
        "bart",
        {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 24,
            "decoder_ffn_dim": 24,
        },
    ),
    "modern": (AutoModelForMaskedLM, "modernbert", {"num_attention_heads": 2}),
    "causal": (AutoModelForCausalLM, "qwen3", {"num_attention_heads": 2, "head_dim": 8}),
}


def model_of(family: str) -> Any:
    kind, name, more = FAMILIES[family]
    more = {"num_labels": 30} | more if family == "tokens" else more
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **SIZE, **more, pad_token_id=0, num_key_value_heads=1)
    for dropout in ("dropout", "hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config, dropout, 0.0)
    return kind.from_config(config, dtype=torch.float64)


@torch.no_grad()
def logits_of(model: Any, batch: slice) -> Tensor:
    """The model's logits of a micro-batch."""
    logits: Tensor = model(input_ids=LONG[batch], labels=LABELS[batch]).logits
    return logits


def mean_of_all(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """What Trainer is given as ``compute_loss_func`` for a mean over all words of a step."""
    logits = outputs.logits
    summed = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return summed / num_items_in_batch


@pytest.mark.parametrize(
    ("family", "loss"), [*((family, None) for family in FAMILIES), ("masked", mean_of_all)]
)
def test_loss_is_the_mean_of_its_micro_batches(
    hf: SimpleNamespace, tmp_path: Path, family: str, loss: Any
) -> None:
    model = model_of(family).train()
    adapted = adapt(model, hf.configure("lora"), modules_to_save=[], dtype=torch.float64)
    logits = [logits_of(model, slice(2 * i, 2 * i + 2)) for i in (0, 1)]
    labels = [LABELS[:2], LABELS[2:]]
    if family == "causal":
        logits, labels = [z[:, :-1] for z in logits], [y[:, 1:] for y in labels]
    sums = [
        functional.cross_entropy(z.reshape(-1, z.shape[-1]), y.reshape(-1), reduction="sum")
        for z, y in zip(logits, labels, strict=True)
    ]
    counts = [int((y != -100).sum()) for y in labels]
    assert counts[0] != counts[1]
    over_all = float(sum(sums) / sum(counts))
    of_means = float(sum(s / c for s, c in zip(sums, counts, strict=True)) / 2)
    assert abs(over_all - of_means) > 1e-4
    trainer = Trainer(
        model,
        hf.arguments(tmp_path, max_steps=1, train_sampling_strategy="sequential"),
        train_dataset=[{"input_ids": x, "labels": y} for x, y in zip(LONG, LABELS, strict=True)],
        callbacks=[adapted.callback()],
        optimizers=adapted.optimizers(lr=0.0),
        compute_loss_func=loss,
    )
    trainer.train()
    expected = over_all if family in COUNTED or loss else of_means
    assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-6)
