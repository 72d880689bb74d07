"""How the base lies over the processes, and what of it leaves the GPU."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from omegaconf import OmegaConf
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from hyper_tune import parallel
from hyper_tune.cli.main import main
from hyper_tune.errors import UserError
from hyper_tune.layout import BaseLayout, own_shard
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
    for processes, offload in ((1, False), (2, False), (2, True)):
        monkeypatch.setattr(base_model, "world_size", lambda processes=processes: processes)
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


@pytest.mark.parametrize(("processes", "replicate"), [(1, 1), (2, 2)])
def test_offloading_of_a_base_without_shards_is_refused(
    make_config: ConfigMaker, processes: int, replicate: int
) -> None:
    keys = {"fsdp_cpu_offload": True, "device": "cuda", "data_parallel_replicate_dim": replicate}
    settings = RecipeSettings.from_config(OmegaConf.load(make_config(**keys)))
    with pytest.raises(UserError) as refused:
        base_model.base_layout(settings, processes)
    assert str(refused.value) == (
        "fsdp_cpu_offload is set, and each process would hold the whole base, of which nothing is "
        "offloaded: only shards are; run more processes, lower data_parallel_replicate_dim, or set "
        "fsdp_cpu_offload=False."
    )
    assert base_model.base_layout(settings, 2 * processes).shard == 2


def test_a_plan_of_offloaded_shards_has_no_weights_on_the_gpu(
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["plan", "--config", "tiny_llama", "--length", "16", "device=cuda"]
    assert main([*command, "--nproc", "2", "fsdp_cpu_offload=True"]) == 0
    on_gpu, on_host = capsys.readouterr().out.split("memory of the host")
    assert "\nbase weights" not in on_gpu
    assert "\nbase weights" in on_host
    assert main([*command, "--nproc", "1", "fsdp_cpu_offload=True"]) == 2
    assert "fsdp_cpu_offload is set" in capsys.readouterr().err


@pytest.mark.parametrize("rank", range(2))  # of a copy: a stand-in has no groups for the others
def test_each_process_of_a_copy_keeps_its_own_rows(rank: int) -> None:
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        with torch.device("meta"):
            model = nn.Linear(3, 5, bias=False)
        mesh = BaseLayout(shard=2, replicate=2).mesh(torch.device("cpu"))
        parallel.shard_base_(model, [], [], mesh)
        place = model.weight
        assert isinstance(place, DTensor)
        whole = torch.arange(15.0).view(5, 3)
        held = own_shard(whole, place, torch.float64)
        assert torch.equal(held.to_local(), whole.double().chunk(2)[rank])
        assert (held.shape, held.placements) == (place.shape, place.placements)
    finally:
        dist.destroy_process_group()
