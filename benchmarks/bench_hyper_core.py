"""Time and memory of refresh and backward: in one batch, and matrix by matrix.

Random state in the shapes of adapters on every linear layer of a model; roles p, lam and q. Each
case is a process of its own. Beside each time stands that of the matrix products that the
hypernetworks cannot do without, alone, measured in the same process. Memory is the peak of what a
step allocates beyond weights, state, leaves and their gradients.

    python benchmarks/bench_hyper_core.py            # all cases, as a table
    python benchmarks/bench_hyper_core.py --model roberta-base --repeats 20   # those of one model
    python benchmarks/bench_hyper_core.py --model roberta-base --rank 6 --presets  # and compared
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
import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
PAPER, SMALL, TINY = "attention-tinybert", "attention-small", "attention-tiny"
# By model, rank, preset, dtype of the body, repeats.
Case = tuple[str, int, str, str, int]
CASES: list[Case] = [
    *(("roberta-base", 6, preset, "float32", 8) for preset in PRESETS),
    *(
        ("roberta-base", rank, preset, "float32", 8)
        for rank in (3, 8, 16)
        for preset in (PAPER, SMALL, TINY)
    ),
    *(
        ("llama-3.1-8b", rank, preset, "float32", 5)
        for preset in (PAPER, SMALL)
        for rank in (3, 8, 16)
    ),
    *(
        ("llama-3.1-70b", rank, preset, "float32", 1)
        for preset in (PAPER, SMALL)
        for rank in (3, 8, 16)
    ),
    ("roberta-base", 6, PAPER, "bfloat16", 8),
    ("llama-3.1-8b", 8, PAPER, "bfloat16", 5),
    ("llama-3.1-70b", 3, PAPER, "bfloat16", 1),
]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(model: str, rank: int, preset: str, dtype: str = "float32") -> GeneratedParameters:
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
        leaves,
        config=preset,
        outputs={"p": "unit_rows", "q": "unit_rows"},
        zero_start={"lam"},
        body_dtype=None if dtype == "float32" else getattr(torch, dtype),
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


def check(generated: GeneratedParameters, tolerance: float) -> None:
    """Both ways write the same values and reach the weights with the same gradients."""
    found = []
    for way in (batched, matrix_by_matrix):
        way(generated)
        values = [group.leaves[0][:2].clone() for group in generated.groups]
        found.append([*values, *(p.grad for p in generated.parameters())])
    for one, other in zip(*found, strict=True):
        error, size = (one - other).norm(), other.norm()
        assert error <= tolerance * size, f"the two ways differ by {error / size:.1e}"


def products_of(generated: GeneratedParameters) -> Callable[[], None]:
    """Return what runs the matrix products of `batched`, forward and backward, and no more."""
    linears: list[tuple[Tensor, Tensor, bool]] = []
    attentions: list[tuple[Tensor, Tensor, Tensor]] = []

    def record(module: StackedLinear, inputs: tuple[Tensor], y: Tensor) -> None:
        x = inputs[0].detach().flatten(0, 2).to(y.dtype)  # narrow in a narrow body
        weight = module.weight.detach().squeeze(0).to(y.dtype)
        linears.append((x, weight, inputs[0].requires_grad))

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
    """Return the median time of each of ``runs``, which have run before, taken in turn."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, taken in zip(runs, times, strict=True):
            start = now()
            run()
            taken.append(now() - start)
    return [statistics.median(taken) for taken in times]


class Allocated(TorchDispatchMode):
    """Peak bytes of the memory that came into being while this is active and still lived."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now = self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = function(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)
        }
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.live and storage._cdata not in given:
                    self._came(storage)
        return result

    def _came(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        self.live[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._went, key)

    def _went(self, key: int) -> None:
        self.now -= self.live.pop(key)


def peak_mib(run: Callable[[], None]) -> float:
    """Return the peak that ``run`` adds to what there is, from a device's allocator where it is."""
    if DEVICE == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with Allocated() as allocated:
        run()
    return allocated.peak / 2**20


def measure(model: str, rank: int, preset: str, dtype: str, repeats: int) -> dict[str, float]:
    torch.manual_seed(0)
    generated = make(model, rank, preset, dtype)
    check(generated, 1e-3 if dtype == "float32" else 5e-2)
    runs = [lambda: batched(generated), products_of(generated)]
    runs[1]()
    taken = seconds(runs, repeats) + seconds([lambda: matrix_by_matrix(generated)], 1)
    generated.zero_grad()
    memory = peak_mib(lambda: batched(generated))
    generated.zero_grad()
    generated.discard()
    for group in generated.groups:
        for leaf in group.leaves:
            leaf.grad.normal_()
    values = sum(leaf.numel() for group in generated.groups for leaf in group.leaves)
    return {
        "values": values,
        "weights": sum(p.numel() for p in generated.parameters()),
        "batched": taken[0],
        "products": taken[1],
        "matrix_by_matrix": taken[2],
        "mib": memory,
        "mib_matrix_by_matrix": peak_mib(lambda: matrix_by_matrix(generated)),
        "rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10,
    }


def table(cases: list[Case]) -> None:
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else platform.processor()
    print(f"{name or platform.machine()}, 1 thread of {os.cpu_count()}; {DEVICE};", end=" ")
    print(f"Python {platform.python_version()}, PyTorch {torch.__version__}\n")
    print(
        "| model | rank | preset | body | values | weights | batched, ms | of | "
        "over products alone | matrix by matrix over batched | "
        "memory, MiB | matrix by matrix, MiB | process, MiB |\n" + "|---" * 13 + "|"
    )
    for case in cases:
        command = [sys.executable, __file__, "--case", json.dumps(case)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:  # such as out of memory: the other rows are worth having
            print(
                f"| {case[0]} | {case[1]} | {case[2]} | {case[3]} | failed: {done.stderr[-80:]!r}"
            )
            continue
        found = json.loads(done.stdout)
        print(
            f"| {case[0]} | {case[1]} | {case[2]} | {case[3]} | {found['values'] / 1e6:.2f} M | "
            f"{found['weights'] / 1e6:.2f} M | {1e3 * found['batched']:.1f} | {case[4]} | "
            f"{found['batched'] / found['products']:.2f} | "
            f"{found['matrix_by_matrix'] / found['batched']:.1f} | {found['mib']:.0f} | "
            f"{found['mib_matrix_by_matrix']:.0f} | {found['rss_mib']:.0f} |",
            flush=True,
        )


def compare_presets(model: str, rank: int, repeats: int) -> None:
    """Print each preset's time, and its matrix products', over that of the paper's size."""
    made = {preset: make(model, rank, preset) for preset in PRESETS}
    runs = [partial(batched, generated) for generated in made.values()]
    runs += [products_of(generated) for generated in made.values()]
    for run in runs:
        run()
    taken = seconds(runs, repeats)  # all in turn, so that other work meets all of them
    whole, products = (dict(zip(made, part, strict=False)) for part in (taken, taken[len(made) :]))
    print(f"{model}, rank {rank}, {repeats} repeats\n")
    print(f"| preset | over {PAPER} | its matrix products alone over {PAPER} |\n|---|---|---|")
    for preset in made:
        print(
            f"| {preset} | {whole[preset] / whole[PAPER]:.3f} | "
            f"{products[preset] / whole[PAPER]:.3f} |"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--rank", type=int)
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--presets", action="store_true", help="compare all presets in one run")
    parser.add_argument("--case", type=json.loads, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(1)  # the time of a process is that of all its threads
    if given.case is not None:
        print(json.dumps(measure(*given.case)))
    elif given.presets:
        compare_presets(given.model or "roberta-base", given.rank or 6, given.repeats or 15)
    else:
        table(
            [
                (*case[:4], given.repeats or case[4])
                for case in CASES
                if given.model in (None, case[0]) and given.rank in (None, case[1])
            ]
        )
