"""Two real processes over gloo choose the same, whoever reduces and whatever is sharded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

WORKER = Path(__file__).parent / "parallel_ranks.py"


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two processes have written."""
    folder = tmp_path_factory.mktemp("ranks")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    finished = subprocess.run(
        [sys.executable, *launcher, str(WORKER), str(folder)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert finished.returncode == 0, finished.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", ["ddp", "sharded", "replicated"])
def test_both_processes_have_identical_masks_and_scores(ranks, case):
    assert ranks[0][case] == ranks[1][case]
    masks = [row[0] for row in ranks[0][case]]
    live = [sum(map(sum, step.values())) for step in masks]
    assert live[0] == 10
    assert live[-1] == 3


@pytest.mark.parametrize("case", ["ddp", "sharded", "replicated"])
def test_without_a_mask_exactly_what_is_pruned_is_zero(ranks, case):
    for masks, *_, zero in ranks[0][case]:
        assert zero == [not alive for alive in masks["2"]]


@pytest.mark.parametrize("case", ["ddp", "sharded", "replicated"])
def test_two_processes_choose_as_one_with_the_whole_batch(ranks, case):
    for found, expected in zip(ranks[0][case], ranks[0]["reference"], strict=True):
        assert found[0] == expected[0]
        assert found[2:] == expected[2:]
        for name, values in expected[1].items():
            np.testing.assert_allclose(found[1][name], values, rtol=1e-3, atol=1e-9)


def test_a_part_that_is_not_finite_on_one_process_is_skipped_by_all(ranks):
    assert ranks[0]["not_finite"] == ranks[1]["not_finite"]
    assert ranks[0]["not_finite"][:3] == [[1, 0], [2, 0], [2, 1]]


def test_each_process_held_a_part(ranks):
    assert [[seen["parts"][role] for role in ("p", "lam", "q")] for seen in ranks] == [
        [[3, 5], [3], [3, 7]],
        [[3, 5], [2], [2, 7]],
    ]


def test_norm_share_refuses_sharded_factors(ranks):
    assert [seen["refusal"] for seen in ranks] == [
        "NormShare needs whole factors, but these are sharded; leave the factors out of the "
        "sharding (ignored_params), or use SmoothedSensitivity."
    ] * 2


def test_sharded_factors_are_not_compacted(ranks):
    text = "p of 0 is sharded, expected a whole tensor; gather the factors before compact_."
    assert [seen["compact"] for seen in ranks] == [[text, True]] * 2


def test_the_state_of_another_process_is_refused(ranks):
    for rank, seen in enumerate(ranks):
        here, there = (["lam", ["0"], [1, 2], 2 * place] for place in (rank, 1 - rank))
        assert seen["other_part"] == (
            f"the saved state has (role, names, shape, start) {there}, but here is {here}; load it "
            "into the model that it was saved from."
        )
