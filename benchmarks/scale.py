"""How a step's own cost grows with layers, width, rank and processes; writes a table.

    python benchmarks/scale.py --write benchmarks/results/scale.md

The base is on the meta device: what is measured is what a step does beside the model. Seconds are
of the processor (all threads of a process), the least of several repeats. Exponents are fitted by
least squares to the logarithms; a constant part makes them smaller. Shapes that do not fit here
are counted.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from hyper_tune import Assembly, MethodConfig, assemble, parallel
from hyper_tune.attach import attach
from hyper_tune.checkpoint import write_checkpoint
from hyper_tune.method import HypernetworkSettings, PruningSettings
from hyper_tune.split import GenerationCost, SharedGeneration

START = {"layers": 16, "width": 1024, "rank": 8}
AXES = {"layers": (16, 32, 64, 128), "width": (512, 1024, 2048, 4096), "rank": (4, 8, 16, 32)}
MATRICES = 4
# The greatest exponent that is as it should be. Scores are of λ alone, which has no width.
EXPECTED = {
    "refresh and pull back": {"layers": 1, "width": 1, "rank": 1},
    "reduce": {"layers": 1, "width": 1, "rank": 1},
    "score": {"layers": 1, "width": 0, "rank": 1},
    "checkpoint": {"layers": 1, "width": 1, "rank": 1},
}
TOLERANCE = 0.15
REPEATS, PROCESSES = 5, (1, 2, 4)
# By model: layers, and the (inputs, outputs) of each layer's matrices.
MODELS = {
    "Llama 3.1 8B": (32, [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2, 14336),
    "Llama 3.1 70B": (80, [(8192, 8192)] * 2 + [(8192, 1024)] * 2 + [(8192, 28672)] * 2, 28672),
}


def config_of(rank: int, preset: str) -> MethodConfig:
    return MethodConfig(
        "hyperadalora",
        init_rank=rank,
        budget=rank / 2,
        hypernetwork=HypernetworkSettings(preset=preset),
        pruning=PruningSettings(interval=10),
    )


def method_of(layers: int, width: int, rank: int) -> Assembly:
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(layers * MATRICES)])
    method = assemble(model, config_of(rank, "attention-small"), total_steps=100)
    method.stack.grads.normal_()
    return method


def seconds_of(action: Callable[[], object]) -> float:
    """Return the processor's seconds of the fastest of some repeats."""
    taken = []
    for _ in range(REPEATS):
        parallel.sum_over_ranks_(torch.zeros(1))  # start together
        start = time.process_time()
        action()
        taken.append(time.process_time() - start)
    return min(taken)


def generating(method: Assembly, *, shared: bool) -> Callable[[], None]:
    owner = method.owner
    assert isinstance(owner, SharedGeneration)

    def generate() -> None:
        owner.share_(shared)
        owner.zero_grad()
        owner.refresh()
        method.stack.grads.fill_(0.1)
        owner.backward()
        owner.discard()

    return generate


def measure(sizes: Mapping[str, int], folder: Path) -> dict[str, float]:
    """Return seconds by part, on this rank."""
    method = method_of(**sizes)
    optimizer = torch.optim.Adam(method.parameters())
    generating(method, shared=False)()
    optimizer.step()
    allocator = method.allocator
    assert allocator is not None
    seen = {
        "refresh and pull back": seconds_of(generating(method, shared=False)),
        "in shares": seconds_of(generating(method, shared=True)),
        "reduce": seconds_of(lambda: parallel.sum_over_ranks_(method.stack.grads)),
        "score": seconds_of(allocator.score),
    }
    steps = iter(range(REPEATS))
    state = method.state_dict(optimizer)
    own = Path(tempfile.mkdtemp(dir=folder))
    seen["checkpoint"] = seconds_of(lambda: write_checkpoint(own, next(steps), state, keep=1))
    return seen


def work(folder: Path) -> None:
    """Measure on this rank, and write what it saw."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parallel.start(torch.device("cpu"))
    seen: dict[str, object] = {"start": measure(START, folder)}
    if parallel.world_size() == 2:
        for axis, sizes in AXES.items():
            seen[axis] = [measure({**START, axis: size}, folder) for size in sizes]
    (folder / f"{parallel.world_size()}-{parallel.rank()}.json").write_text(json.dumps(seen))
    parallel.stop()


def exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return b of seconds = a * size**b, fitted.

    >>> round(exponent([1, 2, 4], [3, 12, 48]), 6)
    2.0
    """
    x = [math.log(size) for size in sizes]
    y = [math.log(taken) for taken in seconds]
    middle_x, middle_y = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - middle_x) * (b - middle_y) for a, b in zip(x, y, strict=True))
    return above / sum((a - middle_x) ** 2 for a in x)


def growth(seen: Mapping[str, Sequence[Mapping[str, float]]]) -> list[str]:
    rows = [
        "| part | axis | times the first size | exponent | at most | |",
        "|---|---|---|---|---|---|",
    ]
    for part, limits in EXPECTED.items():
        for axis, limit in limits.items():
            taken = [entry[part] for entry in seen[axis]]
            found = exponent(AXES[axis], taken)
            ratios = " ".join(f"{value / taken[0]:.1f}" for value in taken)
            verdict = "as it should" if found <= limit + TOLERANCE else "more"
            rows.append(f"| {part} | {axis} | {ratios} | {found:.2f} | {limit} | {verdict} |")
    return rows


def shares(seen: Mapping[int, Sequence[Mapping[str, Mapping[str, float]]]]) -> list[str]:
    rows = [
        "| processes | generating all | in shares | reduce | checkpoint |",
        "|---|---|---|---|---|",
    ]
    one = seen[1][0]["start"]
    for processes, ranks in seen.items():
        most = {part: max(rank["start"][part] for rank in ranks) for part in one}
        whole = one["refresh and pull back"]
        figures = [most[part] / whole for part in ("refresh and pull back", "in shares")]
        figures += [most["reduce"] / whole, most["checkpoint"] / whole]
        rows.append(f"| {processes} | {' | '.join(f'{value:.2f}' for value in figures)} |")
    return rows


def counted() -> list[str]:
    """Return what Llama's shapes take, counted on the meta device."""
    rows = [
        "| model | rank | factors, MiB | products, 10^12 | factors' gradients, MiB received "
        "| in shares, MiB received | checkpoint, MiB | shares pay |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, (layers, matrices, inner) in MODELS.items():
        shapes = [*matrices, (inner, matrices[0][0])]
        for rank in (6, 16, 64):
            with torch.device("meta"):
                model = nn.Sequential(
                    *[nn.Linear(*shape) for _ in range(layers) for shape in shapes]
                )
                config = config_of(rank, "attention-tinybert")
                _, stack, owner = attach(model, config, device="meta")
            assert isinstance(owner, SharedGeneration)
            cost = GenerationCost.of(owner)
            saved = sum(value.nbytes for value in owner.state_dict().values()) + 2 * cost.weights
            mebibytes = [stack.grads.nbytes * 2 * 7 // 8, cost.received(8), saved]
            cells = [f"{value / 2**20:.0f}" for value in mebibytes]
            rows.append(
                f"| {name} | {rank} | {stack.values.nbytes / 2**20:.0f} "
                f"| {cost.operations / 1e12:.2f} | {' | '.join(cells)} "
                f"| {'yes' if cost.split_pays(8) else 'no'} |"
            )
    return rows


def report() -> str:
    seen = {}
    with tempfile.TemporaryDirectory() as name:
        for processes in PROCESSES:
            launcher = ["-m", "torch.distributed.run", "--standalone"]
            command = [*launcher, f"--nproc_per_node={processes}", __file__, "--work", name]
            subprocess.run([sys.executable, *command], check=True)
            files = [Path(name) / f"{processes}-{rank}.json" for rank in range(processes)]
            seen[processes] = [json.loads(file.read_text()) for file in files]
    sizes = ", ".join(f"{axis} {size}" for axis, size in START.items())
    return "\n".join(
        [
            "# Scale",
            "",
            f"`python benchmarks/scale.py` with PyTorch {torch.__version__}, {platform.machine()}, "
            "one thread a process. Seconds of the processor, the least of "
            f"{REPEATS} repeats, as ratios. hyperadalora with attention-small on {MATRICES} square "
            f"matrices a layer; where not varied: {sizes}. An exponent counts as it should up to "
            f"{TOLERANCE} above its limit.",
            "",
            "## Layers, width, rank",
            "",
            "Two processes over gloo; "
            + "; ".join(f"{axis} {', '.join(map(str, values))}" for axis, values in AXES.items())
            + ".",
            "",
            *growth(seen[2][0]),
            "",
            "## Processes",
            "",
            "Of the process that takes longest, in units of generating all in one process. gloo's "
            "own threads count, and the processes share the machine's caches.",
            "",
            *shares(seen),
            "",
            "## Counted",
            "",
            "hyperadalora with attention-tinybert on every linear layer. Products are those of one "
            "refresh and its backward pass; received is by each of 8 processes in a step; the "
            "checkpoint has Adam's two averages.",
            "",
            *counted(),
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    text = report()
    print(text)
    if arguments.write:
        arguments.write.write_text(text)


if __name__ == "__main__":
    main()
