"""Two ranks agree or stop together; one process needs no group."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from hyper_tune import parallel

WORKER = Path(__file__).parent / "parallel_ranks.py"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes over gloo have written."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_each_rank_knows_its_place(ranks: list[dict[str, Any]]) -> None:
    assert [(seen["rank"], seen["world_size"]) for seen in ranks] == [(0, 2), (1, 2)]
    assert [seen["after"] for seen in ranks] == [[0, 1], [0, 1]]


def test_sums_and_broadcasts(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["sum"] == [3.0, 10.0]
        assert seen["broadcast"] == [[1.0, 1.0], [0, 1, 2]]


def test_equal_values_are_agreed_on(ranks: list[dict[str, Any]]) -> None:
    assert [seen["agreed"] for seen in ranks] == [["", "", ""]] * 2


def test_every_rank_hears_of_a_difference(ranks: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(ranks):
        assert seen["disagreed"] == [
            f"UserError: the step differs between the ranks; rank {rank} has {value + rank}."
            for value in (0, -1, 10**9)
        ]
        sign = 1 - 2 * rank
        assert seen["opposite"] == (
            f"UserError: the sign differs between the ranks; rank {rank} has {sign}."
        )


def test_an_action_runs_on_rank_zero_alone(folder: Path, ranks: list[dict[str, Any]]) -> None:
    assert [seen["done"] for seen in ranks] == ["", ""]
    assert [path.name for path in folder.glob("written-by-*")] == ["written-by-0"]


def test_every_rank_stops_where_rank_zero_fails(ranks: list[dict[str, Any]]) -> None:
    assert [seen["failed"] for seen in ranks] == [
        "OSError: the disk is full",
        "UserError: rank 0 could not go on; its message says why.",
    ]


def test_the_ranks_start_and_train_as_one(ranks: list[dict[str, Any]]) -> None:
    first, second = ranks
    assert first["started"] == second["started"]
    assert first["states"] == second["states"]
    assert first["loss"] == second["loss"]
    assert first["states"][0] != first["states"][2]


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(
    ranks: list[dict[str, Any]],
) -> None:
    for seen in ranks:
        assert seen["finite"] == [True, False, True]
        assert seen["states"][1] == seen["states"][0]


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert parallel.start(CPU) == CPU
    assert not dist.is_initialized()
    assert (parallel.rank(), parallel.world_size()) == (0, 1)
    value = torch.tensor([1.0, 2.0])
    assert parallel.sum_over_ranks_(value) is value
    parallel.broadcast_([value])
    assert value.tolist() == [1.0, 2.0]
    parallel.agree(2**62, "the seed", CPU)
    done: list[int] = []
    parallel.on_rank_zero(lambda: done.append(1), CPU)
    assert done == [1]
    with pytest.raises(ZeroDivisionError):
        parallel.on_rank_zero(lambda: done.append(1 // 0), CPU)
    parallel.stop()
