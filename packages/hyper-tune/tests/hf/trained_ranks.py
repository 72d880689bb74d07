"""Trains a small model on each rank of a job, for the tests to compare with one process.

Run by torchrun, or alone: `trained_ranks.py FOLDER [KIND]` writes
FOLDER/KIND-RANK-of-RANKS.safetensors for that kind or each of `KINDS`: losses, gradients of what
is trained at each step, the last state, and in a job the last state of a run that went on from the
middle of the first. FOLDER/KIND of RANKS/adapter is the adapter.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from hyper_tune import MethodConfig, UserError, parallel
from hyper_tune.hf import AdaptedModel, adapt, register_, shard_
from hyper_tune.hf.saved import pack
from hyper_tune.method import HypernetworkSettings, PruningSettings

STEPS, BATCH, CLIP = 4, 4, 0.5
SGD = {"lr": 1e-2, "optimizer": torch.optim.SGD, "momentum": 0.9}
BEST = {"load_best_model_at_end": True, "greater_is_better": False}
Found = dict[str, Tensor]


def ranks() -> int:
    """Processes of the job, also before they have met."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def classifier() -> nn.Module:
    """An encoder with a new head."""
    size = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model: nn.Module = BertForSequenceClassification(size)
    return model


def language_model() -> nn.Module:
    """A decoder without a head of its own."""
    size = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model: nn.Module = LlamaForCausalLM(size)
    return model


def build(
    seed: int, dtype: torch.dtype = torch.float64, base: Callable[[], nn.Module] = classifier
) -> AdaptedModel:
    """The same base and head; a start of the factors by ``seed``."""
    torch.manual_seed(0)
    model = base().to(dtype)
    torch.manual_seed(seed)
    config = MethodConfig(
        "hyperadalora",
        init_rank=3,
        hypernetwork=HypernetworkSettings(preset="attention-small"),
        pruning=PruningSettings(interval=2),
    )
    return adapt(model, config, dtype=dtype)


def rows() -> list[dict[str, Any]]:
    """Sixteen sentences."""
    words = torch.randint(0, 30, (16, 7), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": line, "labels": int(line[0] >= 15)} for line in words]


def answers() -> list[dict[str, Any]]:
    """The same sentences: half of them to be learned whole, and of each other a part."""
    words = [row["input_ids"] for row in rows()]
    starts = [0] * 8 + [place % 6 for place in range(8)]
    return [
        {"input_ids": line, "labels": line.masked_fill(torch.arange(7) < start, -100)}
        for line, start in zip(words, starts, strict=True)
    ]


def watch(adapted: AdaptedModel) -> Found:
    """The gradients that each step hands to the optimizer, by step and name, as they come."""
    assert adapted.optimizer is not None
    inner, seen = adapted.optimizer.inner, {}
    take = inner.step

    def step() -> None:
        for name, parameter in adapted.method.named_parameters():
            assert parameter.grad is not None
            seen[f"gradient {adapted.steps}/{name}"] = parameter.grad.clone()
        take()

    inner.step = step  # type: ignore[method-assign, assignment]
    return seen


def state_of(adapted: AdaptedModel, prefix: str) -> Found:
    """A copy of everything that changes the next step."""
    assert adapted.optimizer is not None
    adapted.optimizer.state_dict()  # hands on what a scheduler wrote
    state = {"steps": adapted.steps, "method": adapted.method.state_dict(adapted.optimizer.inner)}
    return {f"{prefix}/{name}": value.clone() for name, value in pack(state).items()}


def assert_sharded(adapted: AdaptedModel) -> None:
    """See that the base is in shards, and nothing that is trained."""
    frozen = {type(p).__name__ for p in adapted.model.parameters() if not p.requires_grad}
    trained = {type(p).__name__ for p in adapted.model.parameters() if p.requires_grad}
    assert (frozen, trained) == ({"DTensor"}, {"Parameter"}), (frozen, trained)


def by_hand(folder: Path) -> tuple[AdaptedModel, Found]:
    """Train in a loop of torch's, with the base in shards where there are several ranks."""
    adapted = build(1 + int(os.environ.get("RANK", "0")))
    adapted.plan_(STEPS)
    if ranks() > 1:
        with pytest.raises(UserError, match="the processes of this job have not met"):
            shard_(adapted)
        parallel.start(torch.device("cpu"))
        adapted.method.broadcast_()
        with pytest.raises(UserError, match=f"replicas is {ranks()}, which must divide the job"):
            shard_(adapted, replicas=ranks())
        with pytest.raises(UserError, match="replicas is 3, which must divide the job"):
            shard_(adapted, replicas=3)
        shard_(adapted, replicas=ranks() // 2)  # two processes share a copy
        assert_sharded(adapted)
        places = {p.device_mesh.shape for p in adapted.model.parameters() if not p.requires_grad}
        assert places == {(2, 2) if ranks() == 4 else (2,)}, places
    optimizer, _ = adapted.optimizers(max_grad_norm=CLIP, **SGD)
    found = watch(adapted)
    share = BATCH // ranks()
    for step in range(STEPS):
        first = BATCH * step + share * parallel.rank()
        part = rows()[first : first + share]
        words = torch.stack([row["input_ids"] for row in part])
        labels = torch.tensor([row["labels"] for row in part])
        adapted.model(input_ids=words, labels=labels)["loss"].backward()
        optimizer.step()
    if ranks() > 1:
        with pytest.raises(UserError, match="the base is in shards already; call shard_ once"):
            shard_(adapted)
        arguments = TrainingArguments(str(folder / "run"), use_cpu=True, report_to=[])
        with pytest.raises(UserError, match="Trainer would wrap it again; make Trainer first"):
            Trainer(adapted.model, arguments, callbacks=[adapted.callback()])
    return adapted, found


def by_loop(folder: Path, shard: bool, resume: bool = False) -> tuple[AdaptedModel, Found]:
    """Train in a loop of accelerate's: two micro-batches a step, saved after half of the steps."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    adapted = build((5 if resume else 1) + parallel.rank())
    adapted.plan_(STEPS)
    if shard and ranks() > 1:
        shard_(adapted, accelerator)
        assert_sharded(adapted)
    register_(accelerator, adapted)
    optimizer, _ = adapted.optimizers(max_grad_norm=CLIP, **SGD)
    found = watch(adapted)
    loader: Any = DataLoader(rows(), batch_size=BATCH // 2 // ranks())  # type: ignore[arg-type]
    model, optimizer, loader = accelerator.prepare(adapted.model, optimizer, loader)
    assert (model is adapted.model) == (shard or ranks() == 1)
    if resume:
        accelerator.load_state(str(folder / "state"))
        loader = accelerator.skip_first_batches(loader, STEPS)
    losses = []
    for number, batch in enumerate(loader, STEPS * resume):
        with accelerator.accumulate(model):
            loss = model(**batch)["loss"]
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean"))
        if number + 1 == STEPS and not resume:
            accelerator.save_state(str(folder / "state"))
            accelerator.wait_for_everyone()
    assert len(losses) == STEPS * (1 if resume else 2)
    return adapted, found | {"losses": torch.stack(losses)}


def arguments_of(folder: Path, **options: Any) -> TrainingArguments:
    """Two micro-batches a step, evaluated and saved after half of the steps and at the end."""
    return TrainingArguments(
        str(folder / "run"),
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // 2 // ranks(),
        per_device_eval_batch_size=BATCH // 2 // ranks(),
        gradient_accumulation_steps=2,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )


def by_trainer(
    folder: Path,
    shard: bool,
    resume: bool = False,
    evaluate_first: bool = False,
    dtype: torch.dtype = torch.float64,
    base: Callable[[], nn.Module] = classifier,
    **options: Any,
) -> tuple[AdaptedModel, Found]:
    """Train by Trainer, in DistributedDataParallel or in shards where there are several ranks."""
    adapted = build(5 if resume else 1, dtype, base)
    with torch.no_grad():  # as if it had been built before there was a job to agree in
        for tensor in (*adapted.method.parameters(), adapted.method.stack.values):
            tensor.add_(parallel.rank())
    arguments = arguments_of(folder, **options)
    data = answers() if base is language_model else rows()
    trainer = Trainer(
        adapted.model,
        arguments,
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[adapted.callback()],
        optimizers=adapted.optimizers(**SGD),
    )
    found = watch(adapted)
    if shard:
        shard_(adapted, trainer.accelerator)
    if shard and ranks() > 1:
        assert_sharded(adapted)
    if evaluate_first:
        trainer.evaluate()
    trainer.train(resume_from_checkpoint=str(folder / "run" / "checkpoint-2") if resume else None)
    assert adapted.reduced == (ranks() > 1 and not shard and not evaluate_first)
    assert adapted.steps == (2 if arguments.load_best_model_at_end else STEPS)
    history = trainer.state.log_history
    losses = [row[key] for row in history for key in ("loss", "eval_loss") if key in row]
    return adapted, found | {"losses": torch.tensor(losses, dtype=torch.float64)}


Train = Callable[..., tuple[AdaptedModel, Found]]
KINDS: dict[str, Train] = {
    "by hand, sharded": by_hand,
    "accelerate, DDP": partial(by_loop, shard=False),
    "accelerate, sharded": partial(by_loop, shard=True),
    "Trainer, DDP": partial(by_trainer, shard=False),
    "Trainer, evaluated first": partial(by_trainer, shard=False, evaluate_first=True),
    "Trainer, sharded": partial(by_trainer, shard=True),
    "Trainer, sharded, best": partial(by_trainer, shard=True, **BEST),
    "Trainer, sharded, smoothed": partial(
        by_trainer, shard=True, base=language_model, label_smoothing_factor=0.1
    ),
    "Trainer, sharded, bf16": partial(by_trainer, shard=True, dtype=torch.float32, bf16=True),
}


def main(folder: Path, *kinds: str) -> None:
    """Write what this rank finds."""
    torch.set_num_threads(1)
    for kind in kinds or KINDS:
        train = KINDS[kind]
        place = folder / f"{kind} of {ranks()}"
        adapted, found = train(place)
        found |= state_of(adapted, "state")
        if parallel.rank() == 0:
            adapted.export(place / "adapter")
        if train is not by_hand and ranks() > 1:
            found |= state_of(train(place, resume=True)[0], "resumed")
        save_file(found, folder / f"{kind}-{parallel.rank()}-of-{ranks()}.safetensors")
    del adapted
    parallel.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
