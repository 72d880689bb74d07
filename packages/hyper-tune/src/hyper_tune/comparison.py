"""Runs side by side: their figures, and the settings in which they differ."""

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from statistics import mean, median
from typing import Any

from hyper_tune.run_record import RunRecord

MISSING = "-"
# These name the run, so that they differ without telling it apart.
_NAMES = ("output_dir", "resume_from_checkpoint")


def compare_figures(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return a row for each figure that any run has: its name, then its value, or "-", for each.

    Losses are means over tokens, in nats. "Last tenth" is the mean over the last tenth of the
    steps; the mean over all steps is lower the sooner a run learns. Time is that of the steps,
    without evaluation and checkpoints.
    """
    rows = [(name, *(figure(run) for run in runs)) for name, figure in _FIGURES.items()]
    return [row for row in rows if set(row[1:]) != {MISSING}]


def compare_settings(runs: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    """Return a row for each setting that is not the same in all runs, by its dotted key."""
    flat = [dict(_flatten(run.config)) for run in runs]
    keys = dict.fromkeys(chain.from_iterable(flat))
    rows = [(key, *(settings.get(key, MISSING) for settings in flat)) for key in keys]
    return [row for row in rows if len(set(row[1:])) > 1 and row[0] not in _NAMES]


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for key, value in settings.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            found += _flatten(value, f"{name}.")
        else:
            found.append((name, str(value)))
    return found


def _values(run: RunRecord, key: str) -> list[float]:
    return [value for _, value in run.figures(key)]


def _of(
    key: str, reduce: Callable[[list[float]], float], form: str = "{:.4f}"
) -> Callable[[RunRecord], str]:
    """Return what reduces the values of one column of a run's rows to a text."""

    def figure(run: RunRecord) -> str:
        values = _values(run, key)
        return form.format(reduce(values)) if values else MISSING

    return figure


def _last_tenth(values: list[float]) -> float:
    return mean(values[-max(1, len(values) // 10) :])


def _evaluated(when: str, key: str) -> Callable[[RunRecord], str]:
    def figure(run: RunRecord) -> str:
        figures = run.summary[when] if run.summary is not None else {}
        value = figures.get(key)
        return MISSING if value is None else f"{value:.4f}"

    return figure


def _total(key: str) -> Callable[[RunRecord], str]:
    def figure(run: RunRecord) -> str:
        return f"{run.summary[key]:,}" if run.summary is not None else MISSING

    return figure


def _steps(run: RunRecord) -> str:
    done = run.rows[-1]["step"] if run.rows else 0
    return str(done) if run.summary is not None else f"{done}, not finished"


def _device(run: RunRecord) -> str:
    if not run.starts:
        return MISSING
    start = run.starts[-1]
    return f"{start['processes']} x {start['device']}"


_FIGURES: Mapping[str, Callable[[RunRecord], str]] = {
    "method": lambda run: str(run.config.get("method", {}).get("name", MISSING)),
    "base model": lambda run: str(run.config.get("base_model", MISSING)),
    "steps": _steps,
    "training loss, mean of all steps": _of("loss", mean),
    "training loss, last tenth": _of("loss", _last_tenth),
    "held-out loss, lowest": _of("validation_loss", min),
    "held-out loss, before": _evaluated("before", "loss"),
    "held-out loss, after": _evaluated("after", "loss"),
    "exact match, before": _evaluated("before", "exact_match"),
    "exact match, after": _evaluated("after", "exact_match"),
    "live ranks": _of("live_ranks", lambda values: values[-1], "{:,}"),
    "ranks at the start": _total("total_ranks"),
    "trained parameters": _total("trainable_parameters"),
    "factor parameters": _total("factor_parameters"),
    "seconds per step, median": _of("seconds", median),
    "seconds of all steps": _of("seconds", sum, "{:,.0f}"),
    "tokens per second, median": _of("tokens_per_second", median, "{:,.0f}"),
    "peak memory, MiB": _of("peak_memory_mib", max, "{:,.0f}"),
    "skipped steps": lambda run: str(sum(bool(row.get("skipped")) for row in run.rows)),
    "machine": _device,
}
