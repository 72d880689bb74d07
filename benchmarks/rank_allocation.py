"""Times one allocation against PEFT's, on the same tensors, in one run; writes a table.

    python benchmarks/rank_allocation.py --write benchmarks/results/rank-budget.md

Needs peft. Both update AdaLoRA's averages at every step, and choose anew at every second; what a
training pays at each kind of step is timed. Rounds take turns, and the figures are medians: of the
milliseconds, and of the quotient of PEFT's and ours within a round.
"""

import argparse
import os
import platform
import statistics
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
    arena,
    products,
    ranked_layers,
)

RANK = 16
LLAMA = {"q": (4096, 4096), "k": (1024, 4096), "v": (1024, 4096), "o": (4096, 4096)}
LLAMA |= {"gate": (14336, 4096), "up": (14336, 4096), "down": (4096, 14336)}
SIZES = {"Llama-3.1-8B": LLAMA, "64-wide": dict.fromkeys(LLAMA, (64, 64))}
VIEWS = {"view", "unbind", "slice", "alias", "split_with_sizes", "squeeze", "unsqueeze", "t"}
VIEWS |= {"detach", "expand", "select", "transpose", "_unsafe_view"}
PLAIN = {"": SmoothedSensitivity()}
COMPILED = {", compiled": SmoothedSensitivity(compile=True)}
STEPS = 10**6  # far from the end, where both would stop
INTERVAL = 2
KINDS = ("between", "allocating")
PASSES = 8
LOAD = os.getloadavg()[0]


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
    config |= {"total_step": STEPS, "deltaT": INTERVAL}
    allocator = PeftAllocator(model, SimpleNamespace(**config), "default")
    assert allocator.init_bgt == matrices * RANK
    steps = iter(range(1001, STEPS))
    return lambda: void(allocator.update_and_allocate(model, next(steps)))


def our_step(allocator: RankAllocator) -> Callable[[], None]:
    """Return our update and choice."""
    allocator.steps = 1000
    return lambda: void((allocator.score(), allocator.step()))


def void(result: object) -> None:
    """Return nothing."""
    del result


def schedule_of(matrices: int) -> CubicBudget:
    """Return PEFT's schedule above."""
    schedule = CubicBudget(RANK, RANK // 2, STEPS, cooldown=1, interval=INTERVAL)
    return schedule.times(matrices)


def stacked(model: nn.Module, score: SmoothedSensitivity) -> RankAllocator:
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
        score=score,
        direction="regrow",
    )


def allocators(
    shapes: dict[str, tuple[int, int]], layers: int, scores: dict[str, SmoothedSensitivity]
) -> dict[str, Callable[[], None]]:
    """Return what takes a step of each allocator; ``scores``: by what their rows are called."""
    model = model_of(shapes, layers)
    matrices = layers * len(shapes)
    steps = {"PEFT": peft_step(model, matrices)}
    for how, score in scores.items():
        separate = RankAllocator(
            ranked_layers(model), schedule_of(matrices), score=score, direction="regrow"
        )
        steps[f"rank-budget, PEFT's tensors{how}"] = our_step(separate)
        steps[f"rank-budget, stacks{how}"] = our_step(stacked(model, score))
    return steps


def counted(step: Callable[[], None]) -> int:
    """Return the operations of a step."""
    with Counted() as mode:
        step()
    return mode.total()


def operations(shapes: dict[str, tuple[int, int]], layers: int, *, runs: bool) -> dict[str, int]:
    """Return those of a step that allocates; without ``runs``, as on an accelerator.

    What is compiled has none to be seen, and is compiled no more once it was looked at so.
    """
    limits = arena.CACHED, products.LARGE
    if not runs:
        arena.CACHED = products.LARGE = 2**62
    try:
        steps = allocators(shapes, layers, PLAIN)
        for step in steps.values():
            step()
        return {name: counted(step) for name, step in steps.items()}
    finally:
        arena.CACHED, products.LARGE = limits


def times(steps: dict[str, Callable[[], None]], rounds: int) -> dict[tuple[str, str], list[float]]:
    """Return the milliseconds of every round, by allocator and kind of step."""
    found: dict[tuple[str, str], list[float]] = {(name, k): [] for name in steps for k in KINDS}
    for number in range(rounds + 1):
        for kind in KINDS:
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if number:  # the first is to warm up
                    found[name, kind].append(1000 * (time.perf_counter() - started))
    return found


def bandwidth(numbers: int) -> float:
    """Return the bytes per second, read and written, of copying so many float32."""
    source, target = torch.ones(numbers), torch.ones(numbers)
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - started)
    return 8 * numbers / statistics.median(seconds)


def rows(size: str, layers: int, rounds: int, threads: list[int]) -> list[str]:
    """Return lines of the table."""
    shapes = SIZES[size]
    counts = [operations(shapes, layers, runs=runs) for runs in (False, True)]
    steps = allocators(shapes, layers, PLAIN | COMPILED)
    lines = []
    for number in threads:
        torch.set_num_threads(number)
        found = times(steps, rounds)
        for name in steps:
            cells = [size, str(number), name, *(str(count.get(name, "-")) for count in counts)]
            for kind in KINDS:
                pairs = zip(found["PEFT", kind], found[name, kind], strict=True)
                quotient = statistics.median(theirs / ours for theirs, ours in pairs)
                cells += [f"{statistics.median(found[name, kind]):.2f}", f"{quotient:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def floor(layers: int, threads: list[int]) -> list[str]:
    """Return what the memory alone would take, at the speed of a copy."""
    numbers = RANK * layers * sum(sum(shape) for shape in LLAMA.values())
    lines = []
    for number in threads:
        torch.set_num_threads(number)
        speed = bandwidth(numbers)
        least = 1000 * PASSES * 4 * numbers / speed
        lines.append(
            f"With {number} threads a copy moves {speed / 1e9:.0f} GB/s, at which these take "
            f"{least:.0f} ms."
        )
    return lines


def report(layers: int, rounds: int, threads: list[int]) -> str:
    """Return the results as Markdown."""
    numbers = RANK * layers * sum(sum(shape) for shape in LLAMA.values())
    listed = " ".join(map(str, threads))
    lines = [
        "# rank-budget",
        "",
        "AdaLoRA's averages updated at every step, and all components chosen anew at every second, "
        f"for P and Q of {layers * len(LLAMA)} modules of rank {RANK}: what a step pays between "
        "two allocations, and at one.",
        "",
        f"`python benchmarks/rank_allocation.py --layers {layers} --rounds {rounds} --threads "
        f"{listed}` with PyTorch {torch.__version__}, PEFT {peft.__version__}, "
        f"{platform.processor() or platform.machine()}, on a CPU. Times are medians of {rounds} "
        "rounds that take turns, quotients medians of those within a round; the load of "
        f"the machine was {LOAD:.0f} at the start, 0 being idle. Operations are those of a step "
        "that allocates, views left out: first where all is one run, as on an "
        "accelerator or where a CPU's cache holds it, then here, in runs that the cache holds. "
        "Compiled is what `SmoothedSensitivity(compile=True)` does; compiling is not timed.",
        "",
        "| sizes | threads | allocator | operations, one run | here | ms between | times PEFT's "
        "speed | ms allocating | times PEFT's speed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for size in SIZES:
        lines += rows(size, layers, rounds, threads)
    lines += [
        "",
        f"At the first sizes a step reads and writes {numbers / 1e6:.0f} million numbers at least "
        f"{PASSES} times: value and gradient read, their product written and read again, two "
        "averages read and written.",
        *floor(layers, threads),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, and write if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--write", type=Path)
    options = parser.parse_args()
    found = report(options.layers, options.rounds, options.threads)
    print(found)
    if options.write:
        options.write.write_text(found)


if __name__ == "__main__":
    main()
