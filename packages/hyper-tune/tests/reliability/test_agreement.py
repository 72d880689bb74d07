"""All processes hold the same bits after each step, and one bit that differs is named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hyper_tune.rank_agreement import digests

PARTS = {
    "factors": "factors",
    "mask": "rank_mask/",
    "score": "allocator/importance",
    "hypernetwork": "owner/",
}
DEBUG = "debug_rank_agreement=True"


def test_no_step_differs(
    jobs: Any,
    job_config: Callable[..., Path],
    rounds: Callable[[int, int], int],
    figure: Callable[..., None],
    tmp_path: Path,
) -> None:
    steps = rounds(20, 200)
    config = job_config(max_steps=steps, epochs=99, batch_size=1, save_every_n_steps=steps)
    job = jobs.start(config, tmp_path / "run", DEBUG, ranks=2)
    assert job.wait() == [0, 0]
    assert len(job.rows()) == steps
    figure(
        11,
        "digests of factors, masks, scores, hypernetworks and moments on 2, after each step",
        f"0 differ in {steps} steps",
    )


@pytest.mark.parametrize("part", PARTS)
def test_one_bit_is_caught_and_named(
    jobs: Any,
    job_config: Callable[..., Path],
    figure: Callable[..., None],
    tmp_path: Path,
    part: str,
) -> None:
    fault = {"stage": "compare", "step": 4, "rank": 1, "kind": "flip", "part": part}
    job = jobs.start(
        job_config(max_steps=8, batch_size=1), tmp_path / "run", DEBUG, ranks=2, faults=[fault]
    )
    assert job.wait() == [2, 2]
    assert job.struck(1) == "flip in compare at 4"
    for rank in (0, 1):
        said = job.said(rank).splitlines()[-1]
        assert f"after step 4, {PARTS[part]}" in said
        assert "is not the same on every rank: rank 1 holds other bits than rank 0 (1 of " in said
    figure(11, f"one bit of a {part.removesuffix('s')} of one rank: caught and named", "at once")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_every_bit_and_every_exchange_changes_the_digest(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 0, 1, 1]).to(dtype)
    whole = digests({"a": tensor})
    assert whole.equal(digests({"a": tensor.clone()}))
    content = tensor.clone().view(torch.uint8)
    for position in range(content.numel()):
        for bit in range(8):
            flipped = content.clone()
            flipped[position] ^= 1 << bit
            assert not digests({"a": flipped.view(tensor.dtype)}).equal(whole)
    assert not digests({"a": tensor.flip(0)}).equal(whole)
