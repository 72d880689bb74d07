"""How well hypernetworks of several sizes learn the same low-rank updates, on a toy.

A frozen network of random weights, and a teacher: the same with an update of rank 2 on every
matrix. The student adds P diag(lam) Q of rank 4 to each, generated, and learns the teacher's
outputs. Each size is given the best of several learning rates.

    python benchmarks/hyper_core_presets.py
"""

import argparse
import statistics

import torch
from torch import Tensor, nn

from hyper_core import GeneratedParameters

PRESETS = ("attention-tinybert", "attention-small", "attention-tiny", "mlp-small")
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
LAYERS, WIDTH, RANK = 12, 64, 4


def forward(x: Tensor, weights: Tensor) -> Tensor:
    for weight in weights.unbind():
        x = x + torch.tanh(nn.functional.layer_norm(x, (WIDTH,)) @ weight.mT)
    return x


def train(preset: str, state: str, lr: float, seed: int, steps: int) -> float:
    """Return the mean loss of the last twentieth of the steps over that of the frozen network."""
    torch.manual_seed(seed)
    base = torch.randn(LAYERS, WIDTH, WIDTH) / WIDTH**0.5
    update = torch.randn(LAYERS, WIDTH, 2) @ torch.randn(LAYERS, 2, WIDTH) / WIDTH
    p, q = torch.randn(2, LAYERS, RANK, WIDTH) / WIDTH**0.5
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in (("p", p), ("q", q))}
    leaves["lam"] = torch.zeros(LAYERS, RANK, 1, requires_grad=True)
    generated = GeneratedParameters(
        {name: [leaf] for name, leaf in leaves.items()},
        config=preset,
        outputs={"p": "unit_rows", "q": "unit_rows"},
        zero_start={"lam"},
        state=state,
    )
    optimizer = torch.optim.Adam(generated.parameters(), lr=lr)
    losses = []
    for _ in range(steps):
        x = torch.randn(64, WIDTH)
        with torch.no_grad():
            target = forward(x, base + update)
            start = (forward(x, base) - target).square().mean()
        generated.refresh()
        added = leaves["p"].mT @ (leaves["lam"] * leaves["q"])
        loss = (forward(x, base + added) - target).square().mean()
        loss.backward()
        generated.backward()
        optimizer.step()
        optimizer.zero_grad()
        generated.commit()
        losses.append((loss / start).item())
    return statistics.mean(losses[-steps // 20 :])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| state | preset | learning rate | loss over the frozen network's | seeds |")
    print("|---|---|---|---|---|")
    for state in ("recurrent", "static"):
        for preset in PRESETS:
            by_rate = {
                lr: [train(preset, state, lr, seed, given.steps) for seed in range(given.seeds)]
                for lr in LEARNING_RATES
            }
            lr, found = min(by_rate.items(), key=lambda item: statistics.mean(item[1]))
            seeds = ", ".join(f"{loss:.3f}" for loss in found)
            mean = statistics.mean(found)
            print(f"| {state} | {preset} | {lr:g} | {mean:.3f} | {seeds} |", flush=True)
