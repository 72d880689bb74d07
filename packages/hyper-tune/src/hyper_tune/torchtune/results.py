"""What a run says and leaves behind: rows of figures, the adapter, the summary."""

import sys
from collections.abc import Iterable, Mapping
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor
from tqdm import tqdm

from hyper_tune import parallel
from hyper_tune.step import StepReport
from hyper_tune.torchtune.evaluate import peak_memory_mib
from hyper_tune.torchtune.exports import export_adapter

if TYPE_CHECKING:
    from hyper_tune.torchtune.recipe import FineTuning


def say(line: str) -> None:
    """Print a line to standard error on rank 0, above a progress bar."""
    if parallel.rank() == 0:
        tqdm.write(line, file=sys.stderr)


def step_row(
    step: int, report: StepReport, lr: float, seconds: float, peak_memory_mib: float
) -> dict[str, Any]:
    """Return the figures of one optimizer step; None stands for what is not finite."""
    return {
        "step": step,
        "loss": report.loss if report.finite else None,
        "penalty": report.penalty if report.finite else None,
        "grad_norm": report.grad_norm if report.finite else None,
        "lr": lr,
        "live_ranks": report.live_ranks,
        "tokens": report.tokens,
        "tokens_per_second": report.tokens / seconds,
        "seconds": seconds,
        "peak_memory_mib": peak_memory_mib,
        "skipped": not report.finite,
    }


def progress_text(row: Mapping[str, Any], total_ranks: int) -> str:
    """Return what a progress bar shows of a step."""
    loss = "skipped" if row["loss"] is None else f"{row['loss']:.4f}"
    ranks = f"{row['live_ranks']}/{total_ranks}"
    return f"loss {loss}, ranks {ranks}, {row['tokens_per_second']:.0f} tokens/s"


def write_results(run: "FineTuning", after: Mapping[str, float | None]) -> None:
    """Write the adapter and ``summary.json`` into the run's folder, and say where."""
    method, settings = run.method, run.settings
    adapter = export_adapter(method, run.model, settings, run.folder.path / "adapter")
    factors = method.stack.values.numel()
    summary = {
        "before": run.before,
        "after": after,
        "base_parameters": _count(run.model.parameters()) - factors,
        "trainable_parameters": _count(method.parameters()),
        "factor_parameters": factors,
        "ranks": method.ranks(),
        "initial_rank": settings.method.init_rank,
        "live_ranks": method.live_ranks,
        "total_ranks": method.total_ranks,
        "steps": run.total_steps,
        "seconds_per_step": median(run.seconds) if run.seconds else None,
        "peak_memory_mib": peak_memory_mib(run.device),
        "adapter": str(adapter),
    }
    run.folder.write_json("summary.json", summary)
    say(f"adapter: {adapter}")
    for name, figures in (("before", run.before), ("after", after)):
        text = ", ".join(f"{key} {_shown(value)}" for key, value in figures.items())
        say(f"{name}: {text or 'nothing to evaluate on'}")
    if "loss" in after and not _is_below(after["loss"], run.before.get("loss")):
        say(
            "warning: the held-out loss did not fall; look at metrics.jsonl, and choose "
            "optimizer.lr and the number of steps anew."
        )


def _shown(figure: float | None) -> str:
    return "not finite" if figure is None else f"{figure:.4f}"


def _is_below(after: float | None, before: float | None) -> bool:
    return after is not None and (before is None or after < before)


def _count(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors)
