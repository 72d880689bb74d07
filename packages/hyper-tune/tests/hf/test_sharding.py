"""What cannot be sharded, or not in that order, is refused by name before anything is changed."""

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator, DistributedType
from accelerate.state import AcceleratorState, PartialState
from torch import nn
from transformers import Trainer

from hyper_tune import UserError
from hyper_tune.hf import AdaptedModel, adapt, register_, shard_


@pytest.fixture
def adapted(hf: SimpleNamespace) -> AdaptedModel:
    adapted: AdaptedModel = adapt(hf.classifier(), hf.configure("lora"), dtype=torch.float64)
    return adapted


@pytest.fixture(autouse=True)
def afresh() -> Iterator[None]:
    """Let accelerate forget what a test told it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def with_plugin() -> Accelerator:
    """An accelerator as one with an FSDP plugin is on GPUs; on CPUs the plugin is passed over."""
    accelerator = Accelerator(cpu=True)
    for state in (PartialState._shared_state, AcceleratorState._shared_state):
        state["distributed_type"] = DistributedType.FSDP
    return accelerator


PLUGIN = (
    "{} shards by FSDP, and keeps the optimizer's state by the names of the model's parameters, "
    "which the hypernetworks' are not; leave its FSDP out, and call hyper_tune.hf.shard_(adapted, "
    "{}), which shards the base with FSDP2."
)


def test_accelerates_own_fsdp_is_refused(adapted: AdaptedModel) -> None:
    accelerator = with_plugin()
    message = re.escape(PLUGIN.format("accelerate", "accelerator"))
    with pytest.raises(UserError, match=message):
        shard_(adapted, accelerator)
    with pytest.raises(UserError, match=message):
        register_(accelerator, adapted)


def test_trainers_own_fsdp_is_refused(
    hf: SimpleNamespace, adapted: AdaptedModel, tmp_path: Path
) -> None:
    message = re.escape(PLUGIN.format("Trainer", "trainer.accelerator"))
    arguments = hf.arguments(tmp_path)
    with_plugin()  # as `accelerate launch` says
    with pytest.raises(UserError, match=message):
        adapted.callback().on_train_begin(arguments, None, None)
    arguments = hf.arguments(tmp_path)
    arguments.fsdp = True
    with pytest.raises(UserError, match=message):
        adapted.callback().on_train_begin(arguments, None, None)


def test_an_accelerator_that_is_not_given_is_asked_for(adapted: AdaptedModel) -> None:
    Accelerator(cpu=True)
    with pytest.raises(UserError, match=r"there is an Accelerator, .*shard_\(adapted, accelerator"):
        shard_(adapted)


def test_a_model_that_accelerate_would_compile_is_refused(adapted: AdaptedModel) -> None:
    accelerator = Accelerator(cpu=True, dynamo_backend="eager")
    with pytest.raises(UserError, match=r"would compile the sharded model as one; leave torch_com"):
        shard_(adapted, accelerator)


def test_a_job_whose_processes_have_not_met_is_refused(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"processes of this job have not met.*init_process_group"):
        shard_(adapted, accelerator)


def test_blocks_and_replicas_are_those_that_can_be(adapted: AdaptedModel) -> None:
    accelerator = Accelerator(cpu=True)
    shard_(adapted, accelerator)
    shard_(adapted, accelerator, blocks=["BertLayer"])
    with pytest.raises(UserError, match="replicas is 0, but must be a whole number at least 1"):
        shard_(adapted, accelerator, replicas=0)
    with pytest.raises(UserError, match=r"BertFor\w+ has no module of LlamaDecoderLayer; give"):
        shard_(adapted, accelerator, blocks=["BertLayer", "LlamaDecoderLayer"])
    adapted.model._no_split_modules = None  # type: ignore[assignment]
    with pytest.raises(UserError, match=r"BertFor\w+ names no blocks of its own; give shard_ the"):
        shard_(adapted, accelerator)


def test_a_process_that_is_alone_shards_nothing(
    hf: SimpleNamespace, adapted: AdaptedModel, tmp_path: Path
) -> None:
    values = adapted.method.stack.values.data_ptr()
    trainer = Trainer(
        adapted.model,
        hf.arguments(tmp_path),
        train_dataset=hf.rows(),
        callbacks=[adapted.callback()],
        optimizers=adapted.optimizers(lr=1e-3),
    )
    shard_(adapted, trainer.accelerator, replicas=2)
    assert not adapted.sharded
    trainer.train()
    assert (adapted.steps, adapted.method.stack.values.data_ptr()) == (8, values)


def test_the_base_stays_where_it_is_for_shard_to_move(hf: SimpleNamespace) -> None:
    model = hf.classifier()
    model.bert.to("meta")
    adapted = adapt(model, hf.configure("lora"), device="cpu", move_base=False)
    assert {p.device.type for p in model.parameters() if not p.requires_grad} == {"meta"}
    assert {p.device.type for p in model.parameters() if p.requires_grad} == {"cpu"}
    assert adapted.method.stack.values.device.type == "cpu"
    assert isinstance(model.classifier, nn.Linear)
    everything = adapt(hf.classifier(), hf.configure("lora"), device="meta").model
    assert {p.device.type for p in everything.parameters()} == {"meta"}


def test_a_base_that_was_left_and_not_sharded_is_named(hf: SimpleNamespace) -> None:
    model = hf.classifier(dtype=torch.float32)
    model.bert.encoder.to("meta")
    adapted = adapt(model, hf.configure("lora"), device="cpu", move_base=False)
    with pytest.raises(UserError) as refused:
        adapted.model(torch.ones(1, 4, dtype=torch.long))
    assert str(refused.value) == (
        "bert.encoder.layer.0.attention.self.query.base.weight is on meta, but the factors are on "
        "cpu: adapt(..., move_base=False) leaves the base for shard_ to move; call "
        "shard_(adapted, accelerator) before the first forward pass, or leave move_base out."
    )
    assert adapted.method.stack.values.device.type == "cpu"


def test_a_base_that_is_in_its_place_is_looked_at_once(hf: SimpleNamespace) -> None:
    adapted = adapt(
        hf.classifier(dtype=torch.float32), hf.configure("lora"), device="cpu", move_base=False
    )
    moved = adapt(hf.classifier(), hf.configure("lora"), device="cpu")
    assert len(adapted.model._forward_pre_hooks) == len(moved.model._forward_pre_hooks) + 1
    adapted.model(torch.ones(1, 4, dtype=torch.long))
    assert len(adapted.model._forward_pre_hooks) == len(moved.model._forward_pre_hooks)
