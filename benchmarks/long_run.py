"""Memory and step time of a long run, which must stay flat, and of runs that must be told apart.

    python benchmarks/long_run.py --write benchmarks/results/long-run.md

Trains a tiny random Llama with HyperAdaLoRA on the CPU, with prunings, checkpoints and validation.
After the first tenth, the last quarter's steps are compared with the first quarter's: the median
of resident memory, and of the processor's seconds in units of a fixed piece of work that is done
after each step, so that other work on the machine, which slows both, does not count. Two controls
are faulty on purpose: one keeps a little memory each step, the other works a little longer each
step. The run passes where its own figures are within the limits and each control is beyond its own.
"""

import argparse
import base64
import json
import math
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torchtune.models.llama3._tokenizer import SPECIAL_TOKENS

from hyper_tune.packaged import find_config, read_config
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.settings import RecipeSettings

MEMORY_LIMIT = 1.02
TIME_LIMIT = 1.10
# A step of the tiny model takes tens of milliseconds and a few hundred MiB in all.
LEAKED_BYTES = 128 * 1024
SLOWER_BY = 0.4
LAYERS, WIDTH, HEADS, KV_HEADS, INNER = 4, 64, 4, 2, 128


def make_base(folder: Path) -> int:
    """Write random weights and a tokenizer of bytes; return its size."""
    ranks = [f"{base64.b64encode(bytes([byte])).decode()} {byte}" for byte in range(256)]
    (folder / "original").mkdir(parents=True)
    (folder / "original/tokenizer.model").write_text("\n".join(ranks) + "\n")
    added = [{"content": name, "id": 256 + i} for i, name in enumerate(SPECIAL_TOKENS)]
    (folder / "special_tokens.json").write_text(json.dumps({"added_tokens": added}))
    vocabulary = 256 + len(added)
    per_layer = {
        "self_attn.q_proj": (WIDTH, WIDTH),
        "self_attn.k_proj": (WIDTH * KV_HEADS // HEADS, WIDTH),
        "self_attn.v_proj": (WIDTH * KV_HEADS // HEADS, WIDTH),
        "self_attn.o_proj": (WIDTH, WIDTH),
        "mlp.gate_proj": (INNER, WIDTH),
        "mlp.up_proj": (INNER, WIDTH),
        "mlp.down_proj": (WIDTH, INNER),
    }
    weights = {
        f"model.layers.{layer}.{name}.weight": torch.randn(shape) / WIDTH**0.5
        for layer in range(LAYERS)
        for name, shape in per_layer.items()
    }
    norms = [
        f"layers.{i}.{n}_layernorm" for i in range(LAYERS) for n in ("input", "post_attention")
    ]
    weights |= {f"model.{name}.weight": torch.ones(WIDTH) for name in [*norms, "norm"]}
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    weights |= {name: torch.randn(vocabulary, WIDTH) / WIDTH**0.5 for name in tables}
    save_file(weights, folder / "model.safetensors")
    config = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "hidden_size": WIDTH}
    (folder / "config.json").write_text(json.dumps(config))
    return vocabulary


def settings_of(folder: Path, steps: int) -> RecipeSettings:
    base, records = folder / "base", folder / "records.jsonl"
    vocabulary = make_base(base)
    rows = [{"question": f"What is {n} + {n}?", "answer": str(2 * n)} for n in range(64)]
    records.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = {"num_layers": LAYERS, "num_heads": HEADS, "num_kv_heads": KV_HEADS}
    sizes |= {"embed_dim": WIDTH, "intermediate_dim": INNER, "vocab_size": vocabulary}
    data = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(records)}
    component = "torchtune.training.FullModelHFCheckpointer"
    changed: dict[str, Any] = {
        "model": {"_component_": "torchtune.models.llama3.llama3", "max_seq_len": 128, **sizes},
        "checkpointer": {
            "_component_": component,
            "checkpoint_dir": str(base),
            "checkpoint_files": ["model.safetensors"],
            "model_type": "LLAMA3",
        },
        "tokenizer": {
            "_component_": "torchtune.models.llama3.llama3_tokenizer",
            "path": str(base / "original/tokenizer.model"),
            "special_tokens_path": str(base / "special_tokens.json"),
        },
        "dataset": data,
        "dataset_val": data,
        "exact_match": None,
        "output_dir": str(folder / "run"),
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "epochs": math.ceil(steps * 4 / len(rows)),
        "max_steps": steps,
    }
    config = read_config(find_config("tiny_llama"))
    for key, value in changed.items():
        OmegaConf.update(config, key, value, merge=False)
    return RecipeSettings.from_config(config)


def resident() -> int:
    """Return this process's memory in bytes."""
    status = Path("/proc/self/status").read_text()
    (line,) = (line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


def seconds_of_fixed_work() -> float:
    """Return the processor's seconds of small tensor operations, always the same."""
    started = time.process_time()
    x = torch.eye(WIDTH)
    for _ in range(300):
        x = torch.tanh(x @ x)
    return time.process_time() - started


class Watched(FineTuning):
    """A run that notes memory, and time in units of fixed work, of each step with a ``fault``."""

    def __init__(self, settings: RecipeSettings, fault: Callable[[int], object]) -> None:
        super().__init__(settings)
        self.fault = fault
        self.memory: list[float] = []
        self.seconds_taken: list[float] = []
        self.units: list[float] = []

    def _train_step(self) -> dict[str, Any]:
        started = time.process_time()
        row = super()._train_step()
        self.fault(self.step)
        self.seconds_taken.append(time.process_time() - started)
        self.units.append(self.seconds_taken[-1] / seconds_of_fixed_work())
        self.memory.append(resident())
        return row


def growth(values: Sequence[float]) -> float:
    """Return the last quarter by the first, without the first tenth of the steps.

    >>> growth([9.0] * 10 + [1.0] * 45 + [2.0] * 45)
    2.0
    """
    rest = values[len(values) // 10 :]
    quarter = len(rest) // 4
    return median(rest[-quarter:]) / median(rest[:quarter])


def faults(steps: int, usual: float) -> dict[str, Callable[[int], object]]:
    """Return what each run does wrong after each step; ``usual``: seconds of a step."""
    kept: list[bytes] = []

    def leak(step: int) -> None:
        kept.append(bytes([step % 251]) * LEAKED_BYTES)

    def linger(step: int) -> None:
        end = time.process_time() + SLOWER_BY * usual * step / steps
        while time.process_time() < end:
            pass

    return {"as it is": lambda _: None, "a leak": leak, "a slowdown": linger}


def measure(steps: int, folder: Path) -> dict[str, tuple[float, float]]:
    """Return the growth of memory and of seconds of each run."""
    found: dict[str, tuple[float, float]] = {}
    usual = 0.0
    for number, name in enumerate(faults(steps, usual)):
        own_steps = steps if number == 0 else steps // 4
        fault = faults(own_steps, usual)[name]
        settings = settings_of(folder / name, own_steps)
        torch.manual_seed(0)
        with Watched(settings, fault) as run:
            run.train()
        usual = usual or median(run.seconds_taken)
        found[name] = growth(run.memory), growth(run.units)
        print(f"{name}: memory x {found[name][0]:.4f}, time x {found[name][1]:.3f}", flush=True)
    return found


def passes(found: dict[str, tuple[float, float]]) -> bool:
    """Return whether the run is flat and each control is not."""
    memory, seconds = found["as it is"]
    flat = memory <= MEMORY_LIMIT and seconds <= TIME_LIMIT
    return flat and found["a leak"][0] > MEMORY_LIMIT and found["a slowdown"][1] > TIME_LIMIT


def report(found: dict[str, tuple[float, float]], steps: int) -> str:
    rows = [f"| {name} | {memory:.4f} | {taken:.3f} |" for name, (memory, taken) in found.items()]
    return "\n".join(
        [
            "# Long run",
            "",
            f"`python benchmarks/long_run.py --steps {steps}` with PyTorch {torch.__version__}, "
            f"{platform.machine()}, one thread. HyperAdaLoRA on a random Llama of {LAYERS} layers, "
            f"{WIDTH} wide: {steps} steps with prunings, validation and checkpoints. The median of "
            "the last quarter's steps by the first's, without the first tenth; time is the "
            "processor's, in units of a fixed piece of work that is done after each step. Limits "
            f"are {MEMORY_LIMIT} for memory and {TIME_LIMIT} for time. The controls, of "
            f"{steps // 4} steps, are a leak of {LEAKED_BYTES // 1024} KiB a step and steps that "
            f"get {SLOWER_BY:.0%} slower.",
            "",
            "| run | resident memory | time of a step |",
            "|---|---|---|",
            *rows,
            "",
            f"Result: {'passed' if passes(found) else 'failed'}.",
            "",
        ]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments.steps, Path(folder))
    text = report(found, arguments.steps)
    print(text)
    if arguments.write:
        arguments.write.write_text(text)
    return 0 if passes(found) else 1


if __name__ == "__main__":
    sys.exit(main())
