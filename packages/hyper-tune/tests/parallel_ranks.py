"""What each rank of a job sees of the reductions, for the tests to compare.

Run by torchrun: `parallel_ranks.py FOLDER` writes FOLDER/RANK.json.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from hyper_tune import MethodConfig, assemble, parallel
from hyper_tune.tree import flatten

CPU = torch.device("cpu")


def text_of(call: Callable[[], object]) -> str:
    """The kind and the text of what is raised, or an empty text."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def fail() -> None:
    """Fail as an action on a full disk does."""
    raise OSError("the disk is full")


def reductions(folder: Path) -> dict[str, Any]:
    """The plain reductions, each with values that differ between the ranks."""
    rank = parallel.rank()
    marker = folder / f"written-by-{rank}"
    values = [torch.full((2,), float(rank + 1)), torch.arange(3) + rank]
    parallel.broadcast_(values)
    return {
        "rank": rank,
        "world_size": parallel.world_size(),
        "sum": parallel.sum_over_ranks_(torch.tensor([rank + 1.0, 10.0 * rank])).tolist(),
        "broadcast": [value.tolist() for value in values],
        "agreed": [text_of(lambda v=v: parallel.agree(v, "the step", CPU)) for v in (0, 7, 10**9)],
        "disagreed": [
            text_of(lambda v=v: parallel.agree(v + rank, "the step", CPU)) for v in (0, -1, 10**9)
        ],
        "opposite": text_of(lambda: parallel.agree(1 - 2 * rank, "the sign", CPU)),
        "done": text_of(lambda: parallel.on_rank_zero(marker.touch, CPU)),
        "failed": text_of(lambda: parallel.on_rank_zero(fail, CPU)),
    }


def training() -> dict[str, Any]:
    """A method whose factors start apart, and a step that is not finite on the last rank alone."""
    rank = parallel.rank()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    torch.manual_seed(rank)
    method = assemble(model, MethodConfig("adalora", init_rank=2, budget=1), total_steps=300)
    started = method.stack.values.tolist()
    optimizer = torch.optim.Adam(method.parameters(), lr=0.1)
    states, finite = [], []
    for bad in (False, True, False):
        x = torch.full((3, 4), float("nan")) if bad and rank else torch.ones(3, 4) * (rank + 1)
        with method.step(optimizer, 1.0) as step:
            step.backward(model(x).square().sum(), tokens=3)
        finite.append(step.report.finite)
        tensors, plain = flatten(method.state_dict(optimizer))
        states.append([{name: value.tolist() for name, value in tensors.items()}, plain])
    return {"started": started, "states": states, "finite": finite, "loss": step.report.loss}


def main(folder: Path) -> None:
    """Write what this rank saw."""
    torch.set_num_threads(1)
    assert parallel.start(CPU) == CPU
    seen = reductions(folder) | training()
    parallel.stop()
    seen["after"] = [parallel.rank(), parallel.world_size()]
    (folder / f"{seen['rank']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
