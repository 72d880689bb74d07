"""What Trainer tells a method, and what the method tells Trainer."""

import warnings
from typing import TYPE_CHECKING, Any

from accelerate import DistributedType
from accelerate.state import AcceleratorState
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hyper_tune.errors import UserError
from hyper_tune.hf.sharding import refuse_fsdp
from hyper_tune.parallel import world_size

if TYPE_CHECKING:
    from hyper_tune.hf.adapted import AdaptedModel


class MethodCallback(TrainerCallback):  # type: ignore[misc]
    """Tells the method how long the run is, takes clipping over, and watches that ranks fall.

    Trainer clips the gradients of the model's own parameters, which are the factors; a method clips
    those of what is trained. So ``args.max_grad_norm`` is 0 for Trainer while it trains, and the
    method clips to its value. Figures of the last step are added to what Trainer logs: the
    gradient's norm before clipping, the orthogonality penalty, live ranks and skipped steps.

    ``max_skipped_steps``: after so many steps in a row that were not finite, training ends.

    Raises:
        UserError: before the first step, an optimizer that is not the method's, a way of training
            that cannot be, a checkpoint of another run, a schedule that would prune nothing; at the
            end, ranks that are not those of the schedule.
    """

    def __init__(self, adapted: "AdaptedModel", *, max_skipped_steps: int = 5) -> None:
        self._adapted = adapted
        self._max_skipped = max_skipped_steps
        self._in_a_row = 0
        self._taken = self._done = 0

    def on_init_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Refuse a sharded base of which Trainer's accelerator does not know."""
        del args, state, control, kwargs
        if self._adapted.sharded and not _left_alone(self._adapted):
            raise UserError(
                "the base is in shards, and Trainer would wrap it again; make Trainer first, then "
                "call shard_(adapted, trainer.accelerator)."
            )

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """Check how Trainer was set up, and plan the run."""
        del control, kwargs
        adapted = self._adapted
        _check_setup(args)
        if adapted.optimizer is None or getattr(optimizer, "optimizer", None) != adapted.optimizer:
            raise UserError(
                "Trainer has an optimizer of its own, which would train the factors past the "
                "method; give it optimizers=adapted.optimizers(lr=...)."
            )
        done = adapted.steps + adapted.skipped
        if state.global_step != 0 and done != state.global_step:
            raise UserError(
                f"Trainer resumes at step {state.global_step}, but the method is at step {done}; "
                "the checkpoint was not written with this callback."
            )
        if state.global_step and adapted.total_steps != state.max_steps:
            raise UserError(
                f"the checkpoint is of a run of {adapted.total_steps} steps, and this one has "
                f"{state.max_steps}; its pruning would be another. Train for as many steps."
            )
        if not done and adapted.total_steps not in (None, state.max_steps):
            raise UserError(
                f"adapt was given total_steps={adapted.total_steps}, but Trainer takes "
                f"{state.max_steps} steps, for which the pruning would be another; leave "
                "total_steps out."
            )
        adapted.plan_(state.max_steps)
        adapted.method.broadcast_()
        adapted.reduced = world_size() > 1 and not _left_alone(adapted)
        if args.max_grad_norm:
            adapted.max_grad_norm, args.max_grad_norm = args.max_grad_norm, 0.0
        self._taken, self._done = adapted.steps, done

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """See that the method took part in the step, and count what is skipped in a row."""
        del args, control, kwargs
        adapted = self._adapted
        if adapted.steps + adapted.skipped == self._done:
            if not getattr(optimizer, "step_was_skipped", False):
                raise UserError(
                    f"Trainer took step {state.global_step}, but the method saw nothing of it; "
                    "look for code that replaces the optimizer or its step."
                )
            adapted.skipped += 1
        self._in_a_row = 0 if adapted.steps > self._taken else self._in_a_row + 1
        self._taken, self._done = adapted.steps, adapted.steps + adapted.skipped
        if self._in_a_row >= self._max_skipped:
            raise UserError(
                f"the loss or its gradient was not finite in {self._in_a_row} steps in a row, up "
                f"to step {state.global_step}; lower the learning rate, or look at the data."
            )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the method's figures to those of a training step."""
        del args, control, kwargs
        report = self._adapted.report
        if report is None or logs is None or "loss" not in logs:
            return
        figures = {
            "grad_norm": report.grad_norm,
            "penalty": report.penalty,
            "live_ranks": self._adapted.method.live_ranks,
            "skipped_steps": self._adapted.skipped,
        }
        logs.update(figures)
        state.log_history[-1].update(figures)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Give clipping back, and compare the ranks with the schedule."""
        del control, kwargs
        adapted = self._adapted
        if adapted.max_grad_norm is not None:
            args.max_grad_norm = adapted.max_grad_norm
        allocator = adapted.method.allocator
        if allocator is None:
            return
        live, due = adapted.method.live_ranks, allocator.schedule.live_ranks(adapted.steps)
        if live != due:
            raise UserError(
                f"after {adapted.steps} steps {live} ranks are alive, but the schedule leaves {due}"
                ": pruning did not run; look for code that replaces the optimizer or its step."
            )
        final = allocator.schedule.live_ranks(adapted.total_steps or 0)
        if live > final:
            warnings.warn(
                f"training ended at step {state.global_step} of {adapted.total_steps}, or its best "
                f"checkpoint is of step {adapted.steps}, with {live} ranks, above the budget of "
                f"{final}.",
                stacklevel=2,
            )


def _check_setup(args: TrainingArguments) -> None:
    if args.deepspeed:
        raise UserError("Trainer uses DeepSpeed, whose gradients are not seen; use DDP.")
    if args.fsdp or AcceleratorState().distributed_type == DistributedType.FSDP:
        refuse_fsdp("Trainer", "trainer.accelerator")
    if args.n_gpu > 1:
        raise UserError(
            f"Trainer would copy the model to {args.n_gpu} GPUs in one process; start it with "
            "torchrun, or make one GPU visible."
        )


def _left_alone(adapted: "AdaptedModel") -> bool:
    """Return whether accelerate wraps the model no more: sharded, or evaluated before training."""
    return bool(getattr(adapted.model, "_is_accelerate_prepared", False))
