"""Times one allocation against PEFT's, on the same tensors, in one run; writes a table.

    python benchmarks/rank_allocation.py --write benchmarks/results/rank-budget.md

Needs peft. Both update AdaLoRA's averages and choose anew, rounds taking turns; the figure is the
quotient of the fastest rounds, which other work on the machine disturbs least.
"""

import argparse
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import peft
import torch
from peft.tuners.adalora.layer import RankAllocator as PeftAllocator
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rank_budget import (
    CubicBudget,
    RankAllocator,
    RankedFactors,
    RankedMatrices,
    SmoothedSensitivity,
    ranked_layers,
)

RANK = 16
LLAMA = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
LLAMA |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
SIZES = {"Llama-3.1-8B": LLAMA, "64-wide": dict.fromkeys(LLAMA, (64, 64))}
VIEWS = {"view", "unbind", "slice", "alias", "split_with_sizes", "squeeze", "unsqueeze", "t"}
VIEWS |= {"detach", "expand", "select", "transpose", "_unsafe_view"}
STEPS = 10**6  # far from the end, where both would stop


class Counted(TorchDispatchMode):
    """Counts tensor operations that are not views."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """Count one."""
        self.operations[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))

    def total(self) -> int:
        """Return how many there were."""
        return sum(n for name, n in self.operations.items() if name not in VIEWS)


class Layer(nn.Module):
    """The three tensors of a PEFT AdaLoRA layer, with gradients, under PEFT's names."""

    def __init__(self, out: int, into: int) -> None:
        super().__init__()
        shapes = {"lora_A": (RANK, into), "lora_B": (out, RANK), "lora_E": (RANK, 1)}
        for name, shape in shapes.items():
            parameter = nn.Parameter(torch.randn(shape))
            parameter.grad = torch.randn(shape)
            setattr(self, name, nn.ParameterDict({"default": parameter}))


def model_of(shapes: dict[str, tuple[int, int]], layers: int) -> nn.Module:
    """Return so many layers of modules."""
    blocks = [
        nn.ModuleDict({n: Layer(*shape) for n, shape in shapes.items()}) for _ in range(layers)
    ]
    return nn.ModuleList(blocks)


def peft_step(model: nn.Module, matrices: int) -> Callable[[], None]:
    """Return PEFT's update and choice."""
    config = {"beta1": 0.85, "beta2": 0.85, "target_r": RANK // 2, "tinit": 0, "tfinal": 1}
    config |= {"total_step": STEPS, "deltaT": 1}
    allocator = PeftAllocator(model, SimpleNamespace(**config), "default")
    assert allocator.init_bgt == matrices * RANK
    steps = iter(range(1000, STEPS))
    return lambda: void(allocator.update_and_allocate(model, next(steps)))


def our_step(allocator: RankAllocator) -> Callable[[], None]:
    """Return our update and choice."""
    allocator.steps = 1000

    def step() -> None:
        allocator.score()
        allocator.step()

    return step


def void(result: object) -> None:
    """Return nothing."""
    del result


def schedule_of(matrices: int) -> CubicBudget:
    """Return PEFT's schedule above."""
    return CubicBudget(RANK, RANK // 2, STEPS, cooldown=1).times(matrices)


def stacked(model: nn.Module) -> RankAllocator:
    """Return an allocator on copies of the tensors in stacks, as lowrank-adapters has them."""
    layers = ranked_layers(model)
    groups: dict[tuple[str, int], list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(("p", layer.p.shape[0]), []).append(name)
        groups.setdefault(("q", layer.q.shape[1]), []).append(name)

    def pair(role: str, names: list[str], view: Callable) -> tuple[torch.Tensor, torch.Tensor]:
        tensors = [getattr(layers[name], role) for name in names]
        return (
            torch.stack([view(tensor.detach()) for tensor in tensors]),
            torch.stack([view(tensor.grad) for tensor in tensors]),
        )

    views = {"p": lambda t: t.T.contiguous(), "q": lambda t: t}
    factors = [
        RankedFactors(role, tuple(names), *pair(role, names, views[role]))
        for (role, _), names in groups.items()
    ]
    lam = pair("lam", list(layers), lambda t: t[:, 0])
    mask = torch.ones(lam[0].shape, dtype=torch.bool)
    return RankAllocator(
        [RankedMatrices(tuple(layers), *lam, mask)],
        schedule_of(len(layers)),
        factors=factors,
        score=SmoothedSensitivity(),
        direction="regrow",
    )


def measure(shapes: dict[str, tuple[int, int]], layers: int, rounds: int) -> dict[str, tuple]:
    """Return operations and the fastest round, in seconds, of each allocator."""
    model = model_of(shapes, layers)
    matrices = layers * len(shapes)
    separate = RankAllocator(
        ranked_layers(model),
        schedule_of(matrices),
        score=SmoothedSensitivity(),
        direction="regrow",
    )
    steps = {
        "PEFT": peft_step(model, matrices),
        "rank-budget, PEFT's tensors": our_step(separate),
        "rank-budget, stacks": our_step(stacked(model)),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    counts = {}
    for name, step in steps.items():
        step()
        with Counted() as counted:
            step()
        counts[name] = counted.total()
    for _ in range(rounds):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - started)
    return {name: (counts[name], min(times[name])) for name in steps}


def table(layers: int, rounds: int) -> str:
    """Return the results as Markdown."""
    lines = [
        "# rank-budget",
        "",
        "One allocation: AdaLoRA's averages updated, and all components chosen anew, for "
        f"P and Q of {layers * len(LLAMA)} modules of rank {RANK}.",
        "",
        f"`python benchmarks/rank_allocation.py --layers {layers} --rounds {rounds}` with PyTorch "
        f"{torch.__version__}, PEFT {peft.__version__}, {torch.get_num_threads()} threads, "
        f"{platform.processor() or platform.machine()}, on a CPU. The times are of the fastest of "
        f"{rounds} rounds that take turns. Views are no operations.",
        "",
        "| sizes | allocator | tensor operations | ms | times PEFT's speed |",
        "|---|---|---|---|---|",
    ]
    for name, shapes in SIZES.items():
        found = measure(shapes, layers, rounds)
        _, baseline = found["PEFT"]
        lines += [
            f"| {name} | {who} | {count} | {1000 * seconds:.2f} | {baseline / seconds:.1f} |"
            for who, (count, seconds) in found.items()
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    found = table(options.layers, options.rounds)
    print(found)
    if options.write:
        options.write.write_text(found)


if __name__ == "__main__":
    main()
