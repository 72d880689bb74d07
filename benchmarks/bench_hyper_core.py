"""Time and memory of refresh and backward: in one batch, and matrix by matrix.

Random state in the shapes of adapters on every linear layer of a model; roles p, lam and q. Each
case is a process of its own, so that its peak memory is its own. Beside each time stands that of
the matrix products that the hypernetworks cannot do without, alone, measured in the same process.

    python benchmarks/bench_hyper_core.py            # all cases, as a table
    python benchmarks/bench_hyper_core.py roberta-base 6 attention-small --repeats 20   # one
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from hyper_core import PRESETS, GeneratedParameters
from hyper_core.outputs import unit_vectors
from hyper_core.stacked import StackedLinear

# By model, layers and the (inputs, outputs) of each layer's matrices.
MODELS: dict[str, tuple[int, list[tuple[int, int]]]] = {
    "roberta-base": (12, [(768, 768)] * 4 + [(768, 3072), (3072, 768)]),
    "llama-3.1-8b": (
        32,
        [(4096, 4096)] * 2 + [(4096, 1024)] * 2 + [(4096, 14336)] * 2 + [(14336, 4096)],
    ),
    "llama-3.1-70b": (
        80,
        [(8192, 8192)] * 2 + [(8192, 1024)] * 2 + [(8192, 28672)] * 2 + [(28672, 8192)],
    ),
}
CASES = [
    *(("roberta-base", 6, preset, 8) for preset in PRESETS),
    *(
        ("roberta-base", rank, f"attention-{size}", 8)
        for rank in (3, 8, 16)
        for size in ("tinybert", "small", "tiny")
    ),
    *(
        ("llama-3.1-8b", rank, f"attention-{size}", 2)
        for size in ("tinybert", "small")
        for rank in (3, 8, 16)
    ),
    *(("llama-3.1-70b", rank, "attention-small", 2) for rank in (3, 8, 16)),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(model: str, rank: int, preset: str) -> GeneratedParameters:
    layers, matrices = MODELS[model]
    widths = {
        "p": [outputs for _ in range(layers) for _, outputs in matrices],
        "lam": [1] * layers * len(matrices),
        "q": [inputs for _ in range(layers) for inputs, _ in matrices],
    }
    leaves: dict[str, list[Tensor]] = {}
    for role, all_widths in widths.items():
        for width in sorted(set(all_widths)):
            leaf = torch.randn(all_widths.count(width), rank, width, device=DEVICE)
            leaf.grad = torch.randn_like(leaf)
            leaves.setdefault(role, []).append(leaf)
    return GeneratedParameters(
        leaves, config=preset, outputs={"p": "unit_rows", "q": "unit_rows"}, zero_start={"lam"}
    )


def batched(generated: GeneratedParameters) -> None:
    generated.zero_grad()
    generated.refresh()
    generated.backward()


def matrix_by_matrix(generated: GeneratedParameters) -> None:
    """The same hypernetworks on one matrix after the other, as a loop over modules would."""
    generated.zero_grad()
    written: list[Tensor] = []
    gradients: list[Tensor] = []
    for role, network in generated.hypernetworks.items():
        place = 0
        for group, state in zip(generated.groups_of(role), generated.state_of(role), strict=True):
            (leaf,) = group.leaves
            width = str(state.shape[2])
            for i, matrix in enumerate(state):
                embedding = network.embedding[place : place + len(matrix)]
                place += len(matrix)
                x = network.inputs[width](matrix[None, None]) + embedding
                rows = network.outputs[width](network.trunk(x))[0, 0]
                rows = rows if role == "lam" else unit_vectors(rows, -1)
                with torch.no_grad():
                    leaf[i].copy_(rows)
                written.append(rows)
                gradients.append(leaf.grad[i])
    torch.autograd.backward(written, gradients)


def check(generated: GeneratedParameters) -> None:
    """Both ways write the same values and reach the weights with the same gradients."""
    found = []
    for way in (batched, matrix_by_matrix):
        way(generated)
        values = [group.leaves[0][:2].clone() for group in generated.groups]
        found.append([*values, *(p.grad for p in generated.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3 * float(other.abs().max()))


def products_of(generated: GeneratedParameters) -> Callable[[], None]:
    """Return what runs the matrix products of `batched`, forward and backward, and no more."""
    linears: list[tuple[Tensor, Tensor, bool]] = []
    attentions: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: StackedLinear, inputs: tuple[Tensor], _: Tensor) -> None:
        x = inputs[0].detach().flatten(0, 2)
        linears.append((x, module.weight.detach().squeeze(0), inputs[0].requires_grad))

    hooks = [
        module.register_forward_hook(record)
        for module in generated.modules()
        if isinstance(module, StackedLinear)
    ]
    attend = functional.scaled_dot_product_attention

    def recorded(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        attentions.append(tuple(t.detach().contiguous().flatten(0, 1) for t in (query, key, value)))
        return attend(query, key, value)

    functional.scaled_dot_product_attention = recorded
    generated.refresh()
    generated.discard()
    functional.scaled_dot_product_attention = attend
    for hook in hooks:
        hook.remove()

    @torch.no_grad()
    def products() -> None:
        for x, weight, needs_input_gradient in linears:
            y = x @ weight.mT
            if needs_input_gradient:
                y @ weight
            y.mT @ x
        for query, key, value in attentions:
            scores = query @ key.mT
            mixed = scores @ value
            mixed @ value.mT, scores.mT @ mixed, scores @ key, scores.mT @ query

    return products


def now() -> float:
    """Seconds of the device; on a CPU those of this process, whatever else runs beside it."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def seconds(runs: list[Callable[[], None]], repeats: int) -> list[float]:
    """Return the median time of each of ``runs``, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for i in range(repeats + 1):
        for run, taken in zip(runs, times, strict=True):
            start = now()
            run()
            if i:
                taken.append(now() - start)
    return [statistics.median(taken) for taken in times]


def peak_mib() -> float:
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def measure(model: str, rank: int, preset: str, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    before = peak_mib()
    generated = make(model, rank, preset)
    batched(generated)
    memory = peak_mib() - before
    check(generated)
    runs = [lambda: batched(generated), products_of(generated)]
    taken = seconds(runs, repeats) + seconds([lambda: matrix_by_matrix(generated)], 1)
    values = sum(leaf.numel() for group in generated.groups for leaf in group.leaves)
    return {
        "values": values,
        "weights": sum(p.numel() for p in generated.parameters()),
        "batched": taken[0],
        "products": taken[1],
        "matrix_by_matrix": taken[2],
        "mib": memory,
    }


def table() -> None:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor()
    print(f"{name or platform.machine()}, 1 thread of {os.cpu_count()}; {DEVICE};", end=" ")
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}\n")
    print(
        "| model | rank | preset | values | weights | batched, ms | over products alone | "
        "matrix by matrix over batched | memory, MiB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for case in CASES:
        command = [sys.executable, __file__, *map(str, case[:3]), "--repeats", str(case[3])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
        ratio = found["batched"] / found["products"]
        print(
            f"| {case[0]} | {case[1]} | {case[2]} | {found['values'] / 1e6:.2f} M | "
            f"{found['weights'] / 1e6:.2f} M | {1e3 * found['batched']:.1f} | "
            f"{ratio:.2f} | "
            f"{found['matrix_by_matrix'] / found['batched']:.1f} | {found['mib']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", choices=MODELS)
    parser.add_argument("rank", nargs="?", type=int)
    parser.add_argument("preset", nargs="?", choices=PRESETS)
    parser.add_argument("--repeats", type=int, default=12)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the time of a process is that of all its threads
    if given.preset is None:
        table()
    else:
        print(json.dumps(measure(given.model, given.rank, given.preset, given.repeats)))
