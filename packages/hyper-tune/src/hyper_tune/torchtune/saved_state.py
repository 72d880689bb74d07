"""What the recipe's checkpoints hold, and its way back into a run."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from hyper_tune.errors import UserError
from hyper_tune.torchtune.identity import refuse_other_run
from hyper_tune.tree import flatten

if TYPE_CHECKING:
    from hyper_tune.torchtune.recipe import FineTuning


def state_of(run: "FineTuning") -> dict[str, Any]:
    """Return everything that changes a run's next step; tensors are live.

    Raises:
        UserError: a trained tensor is not finite; saving it could push out the last good one.
        TypeError, ValueError: it has a value that no checkpoint can hold; its path is named.
        OSError: a row of figures could not be written, so that the run cannot go on.
    """
    run.writing.release()
    unfit = [name for name, value in run.method.owner.named_parameters() if not _finite(value)]
    if unfit:
        raise UserError(
            f"after step {run.step}, {unfit[0]} is not finite ({len(unfit)} tensors are not), so "
            "that it is not saved; older checkpoints stay. Lower optimizer.lr and resume."
        )
    state = {
        "run": run.identity,
        "method": run.method.state_dict(run.optimizer),
        "scheduler": run.scheduler.state_dict(),
        "before": run.before,
    }
    flatten(state)  # Refuses on whichever rank it is, before rank 0 writes.
    return state


def _finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())


def restore_(run: "FineTuning", state: Any, step: int) -> None:
    """Put the state of the checkpoint of ``step`` into a run.

    Raises:
        UserError: it is of another run, which names each difference, or of no run of this recipe.
    """
    try:
        refuse_other_run(state["run"], run.identity)
        run.method.load_state_dict(state["method"], run.optimizer)
        run.scheduler.load_state_dict(state["scheduler"])
        run.before = state["before"]
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise UserError(
            f"the checkpoint of step {step} in {run.folder.checkpoints} is intact, but holds no "
            f"state of this recipe ({error!r}); remove it, or set another output_dir."
        ) from error
