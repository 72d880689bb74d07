"""What a person follows of a run: a progress bar or lines, the loggers, the method's health."""

import sys
import time
from importlib.util import find_spec
from types import TracebackType
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from hyper_tune import parallel
from hyper_tune.diagnosis import MethodDiagnosis, diagnose_method
from hyper_tune.torchtune.results import progress_text, say
from rank_budget.report import rank_heatmap

if TYPE_CHECKING:
    from hyper_tune.torchtune.recipe import FineTuning


class Reporter:
    """Reports the rows of a run as they come, on rank 0; a context manager around the steps.

    Where standard error is a terminal, a bar shows the step, the time left, loss, live ranks and
    tokens a second. Elsewhere the same is a line, at every ``log_every_n_steps`` and at the end.
    Loggers get a row as often, and where it has a validation loss.
    """

    def __init__(self, run: "FineTuning") -> None:
        self._run = run
        self._silent = parallel.rank() != 0
        self._bar = tqdm(
            total=run.total_steps,
            initial=run.step,
            desc=run.settings.method.name,
            unit="step",
            disable=self._silent or not sys.stderr.isatty(),
        )
        self._first, self._started = run.step, time.perf_counter()
        self._findings: tuple[str, ...] = ()

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def add(self, row: dict[str, Any]) -> None:
        """Report one step."""
        if self._silent:
            return
        run, step = self._run, row["step"]
        text = progress_text(row, run.method.total_ranks)
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()
        due = step % run.settings.log_every_n_steps == 0 or step == run.total_steps
        if due and self._bar.disable:
            say(f"step {step}/{run.total_steps}: {text}, {self._left(step)} left")
        if due or "validation_loss" in row:
            run.loggers.log(_numbers(row), step)
        every = run.settings.diagnose_every_n_steps
        if every is not None and (step % every == 0 or step == run.total_steps):
            self._diagnose(step)

    def _left(self, step: int) -> str:
        seconds = (time.perf_counter() - self._started) / (step - self._first)
        return str(tqdm.format_interval(seconds * (self._run.total_steps - step)))

    def _diagnose(self, step: int) -> None:
        run = self._run
        found: MethodDiagnosis = diagnose_method(run.method)
        run.writing.attempt(lambda: run.folder.diagnoses.append(found.row(step)))
        run.loggers.log(found.scalars(), step)
        if find_spec("matplotlib") is not None:
            initial = run.settings.method.init_rank
            run.loggers.draw("ranks", lambda: rank_heatmap(found.ranks, initial), step)
        if len(found.findings) > len(self._findings):
            for text in found.findings:
                say(f"warning: step {step}: {text}")
        self._findings = found.findings


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {
        name: float(value) for name, value in row.items() if name != "step" and value is not None
    }
