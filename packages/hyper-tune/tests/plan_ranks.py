"""What each rank of a job holds, gathers and sums in a step, for a test to compare with the plan.

Run by torchrun: `plan_ranks.py CONFIG FOLDER` writes FOLDER/RANK.json.
"""

import hashlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from allocations import allocated_at_most
from hyper_tune import parallel
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings
from hyper_tune.tree import flatten


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in tensors_of(part)]


class Collectives(TorchDispatchMode):
    """Counts the bytes of the tensors that collective operations fill."""

    def __init__(self) -> None:
        super().__init__()
        self.filled: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function.namespace == "c10d":
            filled = sum(tensor.nbytes for tensor in tensors_of(args[0]))
            self.filled[function.overloadpacket.__name__] += filled
        return function(*args, **(kwargs or {}))


def digest_of(state: Any) -> str:
    """A digest of all tensors, bit by bit."""
    tensors, _ = flatten(state)
    digest = hashlib.sha256()
    for tensor in tensors.values():
        digest.update(bytes(tensor.flatten().contiguous().view(torch.uint8).tolist()))
    return digest.hexdigest()


def seen_of(config: str) -> dict[str, Any]:
    """Return what this rank's third step does."""
    settings = RecipeSettings.from_config(OmegaConf.load(config))
    with FineTuning(settings) as run:
        factors = {id(leaf) for leaf in run.method.stack.leaf_parameters()}
        base = [p for p in run.model.parameters() if id(p) not in factors]
        losses = [run._optimize().loss]
        run.step += 1
        with Collectives() as collectives:
            losses.append(run._optimize().loss)
        run.step += 1
        return {
            "losses": losses,
            "state": digest_of(run.method.state_dict(run.optimizer)),
            "length": len(run.data.order.samples[0]["tokens"]),
            "base": sum(p.to_local().nbytes for p in base),
            "filled": collectives.filled,
            "working": allocated_at_most(run._optimize),
            "rank": parallel.rank(),
        }


def main(config: str, folder: Path) -> None:
    """Write what this rank saw."""
    torch.set_num_threads(1)
    seen = seen_of(config)
    parallel.stop()
    (folder / f"{seen['rank']}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
