"""Measures memory and time of a training step of one method at one batch size (Table 7).

    python recipes/paper/step_cost.py --shape roberta-base --method hyperadalora --batch-size 4 \
        --output cost.json

The model has random weights, which cost as much as trained ones. Memory is the most that the
process has held: on CUDA of tensors, on a CPU of everything. Of it, in tensors: the frozen base;
the factors, their gradients and what they are generated from; what is trained beside them, with its
gradients, and all the optimizer's averages; and what a forward pass keeps for the backward pass,
the hypernetworks' own included.
Latency is the median of the steps after the first few, of a whole step: forward and backward pass,
and the method's own.
"""

import json
import resource
import time
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from hyper_tune import MethodConfig
from hyper_tune.durable import write_text
from hyper_tune.errors import PERSONS_MISTAKES
from hyper_tune.hf import AdaptedModel, adapt
from hyper_tune.method import METHODS, HypernetworkSettings
from hyper_tune.parallel import usable_device
from hyper_tune.provenance import start_record

_WARM_UP, _MIB = 1, 2**20  # the step before it counts what is kept, and is not timed
_LEARNING_RATE, _MOST_STEPS = 1e-5, 1000  # paper, section 4.1.4; for the pruning schedule


def _llama(**sizes: Any) -> Callable[[], Any]:
    return lambda: LlamaForCausalLM(LlamaConfig(**sizes))


SHAPES: Mapping[str, tuple[torch.dtype, Callable[[], Any]]] = {
    "roberta-base": (
        torch.float32,
        lambda: RobertaForSequenceClassification(
            RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1)
        ),
    ),
    "llama3.1-8b": (
        torch.bfloat16,
        _llama(
            vocab_size=128256,
            hidden_size=4096,
            intermediate_size=14336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
        ),
    ),
    "llama-small": (
        torch.float32,
        _llama(
            vocab_size=8192,
            hidden_size=512,
            intermediate_size=1792,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=2,
        ),
    ),
}
Shape = StrEnum("Shape", {name: name for name in SHAPES})  # type: ignore[misc]
Method = StrEnum("Method", {name: name for name in METHODS})  # type: ignore[misc]


def main(
    *,
    shape: Annotated[Shape, typer.Option(help="The model's sizes.")],
    method: Annotated[Method, typer.Option(help="What is trained.")],
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a step.")],
    output: Annotated[Path, typer.Option(help="The JSON file to write.")],
    length: Annotated[int, typer.Option(min=2, help="Tokens of a row.")] = 128,
    steps: Annotated[int, typer.Option(min=1, help="Steps that are timed.")] = 20,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    seed: Annotated[int, typer.Option(min=0, help="Of weights and tokens.")] = 0,
) -> None:
    """Write memory and latency of a step."""
    try:
        place = usable_device(device)
        found = measure(shape.value, method.value, batch_size, length, steps, place, seed)
    except PERSONS_MISTAKES as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error
    write_text(output, json.dumps(found | {"start": start_record(place)}, indent=1) + "\n")
    typer.echo(f"{found['memory (MiB)']:.0f} MiB, {found['latency (ms)']:.1f} ms")


def measure(
    shape: str, name: str, batch: int, length: int, steps: int, device: torch.device, seed: int
) -> dict[str, float]:
    """Return memory in MiB and latency in milliseconds of a step."""
    torch.manual_seed(seed)
    dtype, build = SHAPES[shape]
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = build()
    finally:
        torch.set_default_dtype(default)
    adapted = adapt(model.train(), config(name), total_steps=_MOST_STEPS)
    optimizer, _ = adapted.optimizers(_LEARNING_RATE, optimizer=torch.optim.Adam)
    tokens = torch.randint(5, model.config.vocab_size, (batch, length), device=device)
    causal = isinstance(model, LlamaForCausalLM)
    labels = tokens if causal else torch.zeros(batch, dtype=torch.long, device=device)

    def step() -> None:
        model(input_ids=tokens, labels=labels).loss.backward()
        optimizer.step()

    kept = kept_bytes(step, _lasting(adapted))
    seconds = []
    for _ in range(_WARM_UP + steps):
        started = _now(device)
        step()
        seconds.append(_now(device) - started)
    found = {"memory (MiB)": _peak_bytes(device) / _MIB, **parts(adapted, optimizer)}
    found["kept (MiB)"] = kept / _MIB
    return found | {"latency (ms)": 1e3 * median(seconds[_WARM_UP:])}


def parts(adapted: AdaptedModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return MiB of tensors by what they are for, each storage counted once.

    The gradients of what is trained, which the end of a step frees, take what it does.
    """
    method = adapted.method
    trained = method.parameters()
    names = {name for name, _ in method.owner.named_parameters()}
    state = [value for name, value in method.owner.state_dict().items() if name not in names]
    factors = [method.stack.values, method.stack.grads, *state]
    averages = [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, Tensor)
    ]
    base = [*adapted.model.parameters(), *adapted.model.buffers()]
    sizes = {
        "factors": _bytes(factors),
        "trained": 2 * _bytes(trained, besides=factors) + _bytes(averages),
        "base": _bytes(base, besides=[*factors, *trained]),
    }
    return {f"{name} (MiB)": size / _MIB for name, size in sizes.items()}


def kept_bytes(work: Callable[[], object], besides: Iterable[Tensor]) -> int:
    """Return the bytes that autograd saves for backward passes while ``work`` runs.

    Each storage is counted once and whole, of whatever size its views are; those of ``besides`` are
    left out.
    """
    others, saved = _storages(besides), dict[int, int]()

    def save(tensor: Tensor) -> Tensor:
        saved.update(_storages([tensor]))  # never the tensor, which would then live on
        return tensor

    with saved_tensors_hooks(save, lambda tensor: tensor):
        work()
    return sum(size for place, size in saved.items() if place not in others)


def _lasting(adapted: AdaptedModel) -> list[Tensor]:
    """Return what is there before and after a step."""
    method, model = adapted.method, adapted.model
    factors = [method.stack.values, method.stack.grads, *method.owner.state_dict().values()]
    return [*model.parameters(), *model.buffers(), *method.parameters(), *factors]


def _bytes(tensors: Iterable[Tensor], besides: Iterable[Tensor] = ()) -> int:
    others = _storages(besides)
    return sum(size for place, size in _storages(tensors).items() if place not in others)


def _storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Return the bytes of the storages of tensors, by their place in memory."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def config(name: str) -> MethodConfig:
    """Return a method with the paper's sizes: rank 3 at the end (section 4.1.4)."""
    method = METHODS[name]
    hypernetwork = HypernetworkSettings(preset="attention-tinybert") if method.generated else None
    if method.prunes:
        return MethodConfig(name, init_rank=6, budget=3, hypernetwork=hypernetwork)
    return MethodConfig(name, init_rank=3, hypernetwork=hypernetwork)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    typer.run(main)
