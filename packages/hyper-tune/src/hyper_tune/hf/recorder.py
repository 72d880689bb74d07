"""The figures of a run of Trainer's, step by step, and a bar that shows how far it is."""

import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hyper_tune.hf.adapted import AdaptedModel
from hyper_tune.metrics import Metrics


class Recorder(TrainerCallback):  # type: ignore[misc]
    """Writes a row of ``metrics.jsonl`` for each optimizer step and each evaluation in training,
    and shows how far the run is.
    """

    def __init__(self, metrics: Metrics, adapted: AdaptedModel) -> None:
        self._metrics = metrics
        self._adapted = adapted
        self._started = 0.0
        self.seconds: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show the bar."""
        name, done = self._adapted.method.config.name, state.global_step
        self._bar = tqdm(total=state.max_steps, initial=done, desc=name, unit="step")

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the bar as it is."""
        self._bar.close()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock of a step."""
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop it."""
        self.seconds.append(time.perf_counter() - self._started)
        self._bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what Trainer logs of a step or an evaluation."""
        report = self._adapted.report
        if logs is None or report is None or state.global_step == 0:
            return
        if "loss" in logs:
            row = {
                "step": state.global_step,
                "loss": logs["loss"] if report.finite else None,
                "penalty": report.penalty if report.finite else None,
                "grad_norm": report.grad_norm if report.finite else None,
                "lr": logs["learning_rate"],
                "live_ranks": report.live_ranks,
                "seconds": self.seconds[-1],
                "skipped": not report.finite,
            }
            self._metrics.append(row)
            self._bar.set_postfix_str(f"loss {logs['loss']:.4f}, ranks {report.live_ranks}")
        elif "eval_loss" in logs:
            named = {key: value for key, value in logs.items() if key.startswith("eval_")}
            scores = {
                f"validation_{key.removeprefix('eval_')}": value
                for key, value in named.items()
                if not key.endswith(("time", "per_second"))
            }
            self._metrics.append({"step": state.global_step, **scores})
