"""How the base lies over the processes, and what of it leaves the GPU."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy

from hyper_tune import parallel
from hyper_tune.cli.main import main
from hyper_tune.errors import UserError
from hyper_tune.layout import BaseLayout
from hyper_tune.torchtune import base_model
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

ConfigMaker = Callable[..., Path]


@pytest.mark.parametrize(
    ("processes", "shard", "replicate", "expected"),
    [
        (1, -1, 1, (1, 1)),
        (8, -1, 1, (8, 1)),
        (8, -1, 2, (4, 2)),
        (8, 2, 4, (2, 4)),
        (8, 1, 8, (1, 8)),
    ],
)
def test_all_that_copies_leave_are_shards(
    processes: int, shard: int, replicate: int, expected: tuple[int, int]
) -> None:
    assert BaseLayout.of(processes, shard, replicate) == BaseLayout(*expected)


@pytest.mark.parametrize(
    ("shard", "replicate", "needed"), [(4, 1, "4"), (2, 2, "4"), (-1, 4, "a multiple of 4")]
)
def test_sizes_that_are_not_the_job_are_refused(shard: int, replicate: int, needed: str) -> None:
    with pytest.raises(UserError) as refused:
        BaseLayout.of(6, shard, replicate)
    assert str(refused.value) == (
        f"data_parallel_shard_dim={shard} and data_parallel_replicate_dim={replicate} need "
        f"{needed} processes, but the job has 6; make their product the number of processes, or "
        "set data_parallel_shard_dim=-1."
    )


def test_a_job_of_another_size_is_refused_before_the_base_is_read(
    make_config: ConfigMaker, run: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyper_tune.torchtune.recipe.build_on_meta", pytest.fail)
    with pytest.raises(UserError, match="need a multiple of 2 processes, but the job has 1; "):
        run(make_config(data_parallel_replicate_dim=2))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data_parallel_shard_dim": 0}, "data_parallel_shard_dim is 0, but must be a whole"),
        ({"data_parallel_shard_dim": True}, "data_parallel_shard_dim is True, but must be a whole"),
        ({"data_parallel_replicate_dim": -1}, "data_parallel_replicate_dim is -1, but must be a"),
        ({"fsdp_cpu_offload": True}, "fsdp_cpu_offload is True, but moves tensors from a GPU's"),
        ({"enable_activation_offloading": True}, "enable_activation_offloading is True, but moves"),
        (
            {"enable_activation_offloading": True, "device": "cuda"},
            "but moves what activation checkpointing keeps; set enable_activation_checkpointing=",
        ),
        (
            {"fsdp_cpu_offload": True, "device": "cuda", "method": {"name": "hyperdora"}},
            "but hyperdora reads the norms of the base's rows, which GPUs cannot gather from the ",
        ),
        ({"split_generation": "yes"}, "split_generation is 'yes', but must be True, False or auto"),
        (
            {"split_generation": True, "method": {"name": "lora", "init_rank": 2}},
            "split_generation is True, but lora has no hypernetworks; remove it, or choose a",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(
    make_config: ConfigMaker, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError) as refused:
        RecipeSettings.from_config(OmegaConf.load(make_config(**keys)))
    assert message in str(refused.value)


@pytest.mark.parametrize("offload", [False, True])
def test_shards_are_where_the_switch_says(monkeypatch: pytest.MonkeyPatch, offload: bool) -> None:
    policies: list[tuple[nn.Module, OffloadPolicy]] = []

    def record(module: nn.Module, *, offload_policy: OffloadPolicy, **_: object) -> None:
        policies.append((module, offload_policy))

    monkeypatch.setattr(parallel, "fully_shard", record)
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parallel.shard_base_(model, list(model), [], offload=offload)
    assert [module for module, _ in policies] == [*model, model]
    assert {isinstance(policy, CPUOffloadPolicy) for _, policy in policies} == {offload}


def test_activations_are_offloaded_in_the_forward_pass_alone(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    class Offloading:
        """In place of torchtune's, which needs a GPU."""

        def __enter__(self) -> None:
            seen.append("forward")

        def __exit__(
            self,
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            seen.append("loss")

    def manager(_: nn.Module, wanted: bool) -> Offloading:
        assert wanted
        return Offloading()

    monkeypatch.setattr("torchtune.training.get_act_offloading_ctx_manager", manager)
    settings = RecipeSettings.from_config(OmegaConf.load(make_config()))
    object.__setattr__(settings, "enable_activation_offloading", True)
    with FineTuning(settings) as run:
        handle = run.model.register_forward_hook(lambda *_: seen.append("logits"))
        run._optimize()
        handle.remove()
    assert seen == ["forward", "logits", "loss"] * settings.gradient_accumulation_steps
    assert not torch.cuda.is_initialized()


def test_offloading_is_asked_for_where_there_are_shards(
    make_config: ConfigMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []

    def record(*_: object, offload: bool) -> None:
        asked.append(offload)

    monkeypatch.setattr(base_model, "shard_base_", record)
    monkeypatch.setattr(BaseLayout, "mesh", lambda *_: None)
    settings = RecipeSettings.from_config(OmegaConf.load(make_config()))
    model = base_model.build_on_meta(settings)
    for processes in (1, 2):
        monkeypatch.setattr(base_model, "world_size", lambda processes=processes: processes)
        for offload in (False, True):
            object.__setattr__(settings, "fsdp_cpu_offload", offload)
            base_model.prepare_(model, settings, [], torch.device("cpu"))
    assert asked == [False, True]


def test_plan_speaks_of_copies_and_shares(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", "tiny_llama", "--length", "16", "data_parallel_replicate_dim=2"]
    assert main([*command, "--nproc", "4"]) == 0
    whole = capsys.readouterr().out
    assert main([*command, "--nproc", "4", "split_generation=True"]) == 0
    shared = capsys.readouterr().out
    assert "generating in shares" not in whole
    assert "generating in shares" in shared
    assert main([*command, "--nproc", "3"]) == 2
    assert "need a multiple of 2 processes, but the job has 3" in capsys.readouterr().err
