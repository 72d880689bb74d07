"""Tiny random models of transformers with a method on them, and ways to train them."""

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from hyper_tune import MethodConfig
from hyper_tune.hf import AdaptedModel, adapt
from hyper_tune.method import METHODS, HypernetworkSettings, PruningSettings
from hyper_tune.tree import flatten

STEPS, LR, HEAD_LR = 8, 1e-3, 1e-2


def configure(name: str = "hyperadalora", **options: Any) -> MethodConfig:
    """A small method of a name."""
    method = METHODS[name]
    hypernetwork = HypernetworkSettings(preset="attention-small") if method.generated else None
    pruning = PruningSettings(interval=2) if method.prunes else None
    defaults = {"init_rank": 3, "hypernetwork": hypernetwork, "pruning": pruning}
    return MethodConfig(name, **{**defaults, **options})


def classifier(
    dropout: float = 0.0, seed: int = 0, dtype: torch.dtype = torch.float64
) -> nn.Module:
    """A BERT of two layers with a head for two classes."""
    torch.manual_seed(seed)
    size = BertConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    return BertForSequenceClassification(size).to(dtype)


def rows(number: int = 32) -> list[dict[str, Any]]:
    """Sentences of seven words whose label is whether the first is in the vocabulary's half."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, 30, (number, 7), generator=generator)
    return [{"input_ids": line, "labels": int(line[0] >= 15)} for line in words]


class Batches(TrainerCallback):
    """Keeps what the model was given in training."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def watch(self, model: nn.Module) -> None:
        def keep(module: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
            if module.training:
                self.seen.append({name: value.clone() for name, value in options.items()})

        model.register_forward_pre_hook(keep, with_kwargs=True)


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """Arguments of a short run on the CPU."""
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "lr_scheduler_type": "linear",
    }
    return TrainingArguments(str(folder), **{**defaults, **options})


def train(
    folder: Path,
    *,
    name: str = "hyperadalora",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
    resume: Path | None = None,
    callbacks: tuple[TrainerCallback, ...] = (),
    trainer: dict[str, Any] | None = None,
    optimizer: type[torch.optim.Optimizer] = torch.optim.AdamW,
    method: dict[str, Any] | None = None,
    total_steps: int | None = None,
    **options: Any,
) -> SimpleNamespace:
    """Train a classifier by Trainer as a user would."""
    model = classifier(dropout, dtype=dtype)
    batches = Batches()
    batches.watch(model)
    torch.manual_seed(1)
    config = configure(name, **(method or {}))
    adapted = adapt(model, config, total_steps=total_steps, dtype=dtype)
    run = Trainer(
        model,
        arguments(folder, **options),
        train_dataset=rows(),
        eval_dataset=rows(8),
        callbacks=[adapted.callback(), *callbacks],
        optimizers=adapted.optimizers(lr=LR, head_lr=HEAD_LR, optimizer=optimizer),
        **(trainer or {}),
    )
    run.train(resume_from_checkpoint=None if resume is None else str(resume))
    return SimpleNamespace(trainer=run, adapted=adapted, model=model, batches=batches.seen)


def state_of(adapted: AdaptedModel) -> tuple[dict[str, Tensor], Any]:
    """A copy of everything that changes the next step."""
    assert adapted.optimizer is not None
    inner = adapted.optimizer.inner
    tensors, plain = flatten(adapted.method.state_dict(inner))
    return {name: value.clone() for name, value in tensors.items()}, copy.deepcopy(plain)


def assert_same(
    found: tuple[dict[str, Tensor], Any], expected: tuple[dict[str, Tensor], Any]
) -> None:
    """Compare all tensors bit for bit, and all plain values."""
    assert list(found[0]) == list(expected[0])
    for name, value in expected[0].items():
        assert torch.equal(found[0][name], value), name
    assert found[1] == expected[1]


@pytest.fixture(scope="session")
def hf() -> SimpleNamespace:
    """What the tests of this folder share."""
    return SimpleNamespace(
        arguments=arguments,
        assert_same=assert_same,
        classifier=classifier,
        configure=configure,
        rows=rows,
        state_of=state_of,
        train=train,
        LR=LR,
        HEAD_LR=HEAD_LR,
        STEPS=STEPS,
    )


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Let libraries warn of what is not ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*pin_memory.*")
        yield


Make = Callable[..., SimpleNamespace]
