"""Trains a small classifier on each rank of a job, for the tests to compare with one process.

Run by torchrun, or alone: `trained_ranks.py FOLDER` writes FOLDER/KIND-RANK-of-RANKS.safetensors
for each kind: by Trainer in DistributedDataParallel, and by hand with the base in shards.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

from hyper_tune import MethodConfig, parallel
from hyper_tune.hf import AdaptedModel, adapt, shard_
from hyper_tune.method import HypernetworkSettings, PruningSettings
from hyper_tune.tree import flatten

STEPS, BATCH = 4, 4


def build(seed: int) -> AdaptedModel:
    """The same base and head; a start of the factors by ``seed``."""
    torch.manual_seed(0)
    size = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = BertForSequenceClassification(size).double()
    torch.manual_seed(seed)
    config = MethodConfig(
        "hyperadalora",
        init_rank=3,
        hypernetwork=HypernetworkSettings(preset="attention-small"),
        pruning=PruningSettings(interval=1),
    )
    return adapt(model, config, dtype=torch.float64)


def rows() -> list[dict[str, Any]]:
    """Sixteen sentences."""
    words = torch.randint(0, 30, (16, 7), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": line, "labels": int(line[0] >= 15)} for line in words]


def by_trainer(folder: Path) -> AdaptedModel:
    """Train by Trainer, in DistributedDataParallel where there are several ranks."""
    adapted = build(1 + int(os.environ.get("RANK", "0")))  # before there is a job to agree in
    assert parallel.world_size() == 1
    arguments = TrainingArguments(
        str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2 // int(os.environ.get("WORLD_SIZE", "1")),
        gradient_accumulation_steps=2,
        train_sampling_strategy="sequential",
        save_steps=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    assert arguments.device.type == "cpu"  # joins the job
    optimizers = adapted.optimizers(lr=1e-2, optimizer=torch.optim.SGD)
    callbacks = [adapted.callback()]
    Trainer(
        adapted.model, arguments, train_dataset=rows(), callbacks=callbacks, optimizers=optimizers
    ).train()
    assert adapted.reduced == (parallel.world_size() > 1)
    return adapted


def by_hand(folder: Path) -> AdaptedModel:
    """Train in a loop, with the base in shards where there are several ranks."""
    del folder
    adapted = build(1 + parallel.rank())
    adapted.plan_(STEPS)
    if parallel.world_size() > 1:
        shard_(adapted)
        sharded = [type(p).__name__ for p in adapted.model.parameters() if not p.requires_grad]
        assert set(sharded) == {"DTensor"}
    optimizer, _ = adapted.optimizers(lr=1e-2, optimizer=torch.optim.SGD)
    share = BATCH // parallel.world_size()
    for step in range(STEPS):
        first = BATCH * step + share * parallel.rank()
        part = [rows()[i % 16] for i in range(first, first + share)]
        words = torch.stack([row["input_ids"] for row in part])
        labels = torch.tensor([row["labels"] for row in part])
        adapted.model(input_ids=words, labels=labels)["loss"].backward()
        optimizer.step()
    return adapted


def main(folder: Path) -> None:
    """Write the states that this rank ends with."""
    torch.set_num_threads(1)
    for kind, train in (("ddp", by_trainer), ("fsdp", by_hand)):
        adapted = train(folder)
        assert adapted.optimizer is not None
        tensors, _ = flatten(adapted.method.state_dict(adapted.optimizer.inner))
        name = f"{kind}-{parallel.rank()}-of-{parallel.world_size()}.safetensors"
        apart = {key: value.clone().contiguous() for key, value in tensors.items()}
        save_file(apart, folder / name)
    del adapted
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
