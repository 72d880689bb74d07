"""Forward and backward of one layer against PEFT's and torchtune's, as ratios in one run.

`nox -s bench_layers` runs it. PEFT and torchtune cannot be in one environment, so that there is a
worker process for each, which holds their layer, ours and the bare base, and times them in turn.
Cases and rounds alternate between the workers.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

TOKENS = 512
CASES = [
    {"method": method, "width": width, "rank": rank}
    for method in ("LoRA", "DoRA", "AdaLoRA")
    for width in (1024, 2048)
    for rank in (8, 16)
]
PEERS = {"peft": ("LoRA", "DoRA", "AdaLoRA"), "torchtune": ("LoRA", "DoRA")}
LAYERS = ("ours", "theirs")


def main() -> None:
    """Drive the workers, print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__)
    for peer in PEERS:
        text = f"the Python of an environment with {peer} (this one)"
        parser.add_argument(f"--{peer}", default=sys.executable, help=text)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--worker", choices=PEERS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker)
        return
    workers = {peer: start(peer, getattr(arguments, peer)) for peer in PEERS}
    measured = {}
    for index, case in enumerate(CASES):
        for peer in [p for p in PEERS if case["method"] in PEERS[p]]:
            measured[index, peer] = ask(workers[peer], {**case, "rounds": arguments.rounds})
    found = {peer: ask(worker, {})["versions"] for peer, worker in workers.items()}
    for worker in workers.values():
        worker.communicate(timeout=60)
    text = report(measured, found, arguments.rounds)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


def start(peer: str, python: str) -> subprocess.Popen[str]:
    """Start the worker of one environment."""
    command = [python, __file__, "--worker", peer]
    # The profiler's own notes and the libraries' warnings say nothing of the figures.
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def ask(worker: subprocess.Popen[str], request: dict[str, Any]) -> dict[str, Any]:
    """Send a worker one request and return its answer."""
    assert worker.stdin
    assert worker.stdout
    worker.stdin.write(json.dumps(request) + "\n")
    worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise SystemExit(f"{' '.join(map(str, worker.args))} ended; pipe it {request} to see why.")
    answer: dict[str, Any] = json.loads(line)
    return answer


def report(
    measured: dict[tuple[int, str], dict[str, Any]], versions: dict[str, str], rounds: int
) -> str:
    """Return the table with the machine and the versions."""
    lines = [
        "# Layers against PEFT's and torchtune's",
        "",
        f"`nox -s bench_layers`: {TOKENS} tokens, square matrices, float32, one thread, "
        f"{rounds} rounds.",
        "Each number is ours divided by theirs: below 1 ours needs less. Time: CPU seconds of",
        "forward and backward of the layer with its frozen base, the least of all rounds, since",
        "what else the machine does only adds. Overhead: the time of all operations of a pass but",
        "the two products with the base's weight, likewise. Memory: the highest sum of what a pass",
        "had allocated at one time and not yet freed.",
        "",
        f"Machine: {processor()}; Python {platform.python_version()}; "
        + "; ".join(f"{peer}: {text}" for peer, text in versions.items())
        + ".",
        "",
        "| method | width | rank | against | time | overhead | memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for (index, peer), found in measured.items():
        case = CASES[index]
        cells = [case["method"], case["width"], case["rank"], peer]
        cells += [f"{found[key]:.2f}" for key in ("time", "overhead", "memory")]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def processor() -> str:
    """Return the processor's name."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def work(peer: str) -> None:
    """Answer requests from standard input until it ends."""
    import torch

    torch.set_num_threads(1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = measure(peer, **request) if request else {"versions": versions(peer)}
        print(json.dumps(answer), flush=True)


def versions(peer: str) -> str:
    """Return the versions of what a worker measured."""
    from importlib.metadata import version

    return " ".join(f"{name} {version(name)}" for name in ("torch", peer))


def measure(peer: str, method: str, width: int, rank: int, rounds: int) -> dict[str, float]:
    """Time the layers in turn; return the ratios."""
    import torch

    torch.manual_seed(0)
    base = torch.nn.Linear(width, width, bias=False).requires_grad_(False)
    ours, theirs = our_layer(method, base, rank), THEIRS[peer](method, base, rank)
    copy_factors(method, ours, theirs)
    x = torch.randn(TOKENS, width, requires_grad=True)
    cotangent = torch.randn(TOKENS, width)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)
    passes = {"ours": one_pass(ours, x, cotangent), "theirs": one_pass(theirs, x, cotangent)}
    times: dict[str, list[float]] = {name: [] for name in LAYERS}
    overheads: dict[str, list[float]] = {name: [] for name in LAYERS}
    for round_ in range(rounds + 2):
        # Each goes first in turn, and the first two rounds only warm up.
        for name in LAYERS[:: 1 if round_ % 2 else -1]:
            started = time.process_time()
            passes[name]()
            elapsed = time.process_time() - started
            overhead = overhead_of(passes[name], width)
            if round_ >= 2:
                times[name].append(elapsed)
                overheads[name].append(overhead)
    return {
        "time": min(times["ours"]) / min(times["theirs"]),
        "overhead": min(overheads["ours"]) / min(overheads["theirs"]),
        "memory": peak_bytes(passes["ours"]) / peak_bytes(passes["theirs"]),
    }


def one_pass(layer: Any, x: Any, cotangent: Any) -> Callable[[], None]:
    """Return forward and backward from no gradients."""
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        layer(x).backward(cotangent)

    return run


def overhead_of(run: Callable[[], None], width: int) -> float:
    """Return the time of a pass without its two products with the base's weight."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiler:
        run()
    base = [[TOKENS, width], [width, width]]
    events = profiler.key_averages(group_by_input_shape=True)
    products = [event for event in events if event.input_shapes[:2] == base]
    assert sum(event.count for event in products if event.key == "aten::mm") == 2
    total = sum(event.self_cpu_time_total for event in events)
    return float(total - sum(event.self_cpu_time_total for event in products))


def peak_bytes(run: Callable[[], None]) -> int:
    """Return the highest sum of what a pass had allocated and not yet freed."""
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    now, highest = 0, 0
    for size in allocations(profiler):
        now += size
        highest = max(highest, now)
    return highest


def allocations(profiler: Any) -> Iterator[int]:
    """Yield the sizes of allocations, and of frees as negative ones, in order of time."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    yield from (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))


def our_layer(method: str, base: Any, rank: int) -> Any:
    """Build our layer."""
    from torch import float32

    from lowrank_adapters import SVD, DoRA, LoRA

    make = {"LoRA": LoRA, "DoRA": DoRA, "AdaLoRA": SVD}[method]
    return make(rank=rank, alpha=2.0 * rank).build(base, device="cpu", dtype=float32)


def peft_layer(method: str, base: Any, rank: int) -> Any:
    """Build PEFT's layer around the same base."""
    from peft import AdaLoraConfig, LoraConfig
    from peft.tuners.adalora.layer import SVDLinear
    from peft.tuners.lora.layer import Linear

    if method == "AdaLoRA":
        config = AdaLoraConfig(init_r=rank, lora_alpha=2 * rank, total_step=100)
        return SVDLinear(base, "default", config, r=rank, lora_alpha=2 * rank)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, use_dora=method == "DoRA")
    return Linear(base, "default", config, r=rank, lora_alpha=2 * rank)


def torchtune_layer(method: str, base: Any, rank: int) -> Any:
    """Build torchtune's layer, with its weight that of the base."""
    from torchtune.modules.peft import DoRALinear, LoRALinear

    kind = {"LoRA": LoRALinear, "DoRA": DoRALinear}[method]
    layer = kind(base.in_features, base.out_features, rank=rank, alpha=2.0 * rank)
    layer.weight = base.weight
    return layer


THEIRS = {"peft": peft_layer, "torchtune": torchtune_layer}


def copy_factors(method: str, ours: Any, theirs: Any) -> None:
    """Give both layers the same factors, off their start."""
    import torch

    parameters = {n: p for n, p in theirs.named_parameters() if p.requires_grad}

    def of(*names: str) -> Any:
        (found,) = [p for n, p in parameters.items() if any(name in n for name in names)]
        return found

    with torch.no_grad():
        for role, factor in ours.factors():
            if role != "magnitude":
                factor.copy_(0.02 * torch.randn_like(factor))
        if method == "AdaLoRA":
            of("lora_A").copy_(ours.q)
            of("lora_B").copy_(ours.p)
            of("lora_E").copy_(ours.lam[:, None])
            return
        of("lora_A", "lora_a").copy_(ours.a)
        of("lora_B", "lora_b").copy_(ours.b)
        if method == "DoRA":
            of("magnitude").copy_(ours.magnitude)


if __name__ == "__main__":
    main()
