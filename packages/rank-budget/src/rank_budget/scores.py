"""How important a component is: pure functions of λ and its gradient, and what serves a score."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor

from rank_budget.errors import BudgetError, refuse_class
from rank_budget.saved import damaged
from rank_budget.stacks import Block, Gather

__all__ = ["SCORES", "magnitude", "sensitivity"]

Score = Callable[[Tensor, Tensor], Tensor]


def sensitivity(values: Tensor, gradients: Tensor) -> Tensor:
    """Return |σ·∇σ| (paper, equation 9): the first-order change of the loss if σ were zero.

    Shapes: all (matrices, rank).

    >>> import torch
    >>> sensitivity(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]]))
    tensor([[1., 3.]])
    """
    return (values * gradients).abs()


def magnitude(values: Tensor, gradients: Tensor) -> Tensor:
    """Return |σ| (paper, section 3.2); the gradients are not looked at.

    >>> import torch
    >>> magnitude(torch.tensor([[2.0, -1.0]]), torch.zeros(1, 2))
    tensor([[2., 1.]])
    """
    del gradients
    return values.abs()


class Scorer(Protocol):
    """A score at work on the factors of one allocator.

    ``every_step``: it has averages, and reads every step, not only those that allocate.
    """

    every_step: bool

    def read(self, grad_scale: Tensor | None = None) -> set[str]:
        """Take what this step offers; return the matrices that had no gradient.

        ``grad_scale``: by which the gradients are still multiplied.
        """

    def finite(self) -> Tensor:
        """Return whether what was read is finite, bool, (), without a read."""

    def is_finite(self) -> bool:
        """Return it; this reads the device."""

    def commit(self, *, choosing: bool = False) -> None:
        """Make what was read part of the averages, unless it is not finite; without a read.

        ``choosing``: `scores` will be asked for next, and may be had on the way.
        """

    def scores(self) -> Tensor:
        """Return (components,), in the order of all components."""

    def state_dict(self) -> dict[str, Any]:
        """Return the averages; tensors are live."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, in place."""


@runtime_checkable
class ScoreMethod(Protocol):
    """A score with averages of its own; ``roles``: the factors that it reads, "lam" first."""

    roles: ClassVar[tuple[str, ...]]

    def start(self, blocks: Sequence[Block], order: Mapping[str, int]) -> Scorer:
        """Return the score at work on ``blocks``; ``order``: the rank of each matrix, in order."""


@dataclass(frozen=True)
class Momentary:
    """A function of λ and ∇λ of the step, as a `ScoreMethod` without a state."""

    function: Score
    roles: ClassVar[tuple[str, ...]] = ("lam",)

    def start(self, blocks: Sequence[Block], order: Mapping[str, int]) -> "_MomentaryScorer":
        """Return the function at work."""
        return _MomentaryScorer(self.function, blocks, order)


class _MomentaryScorer:
    every_step = False

    def __init__(self, function: Score, blocks: Sequence[Block], order: Mapping[str, int]) -> None:
        self._function = function
        self._blocks = blocks
        self._gather = Gather(blocks, order)
        self._scores = torch.zeros(0)

    def read(self, grad_scale: Tensor | None = None) -> set[str]:
        missing: set[str] = set()
        parts = []
        for block in self._blocks:
            values, grads = block.read()
            nothing = torch.zeros_like(values[0])
            found = [nothing if grad is None else grad for grad in grads]
            if self._function is not magnitude:
                pairs = zip(block.names, grads, strict=False)
                missing |= {name for name, grad in pairs if grad is None}
            value, grad = (
                wide(block.per_component(block.stack(part)).squeeze(-1)) for part in (values, found)
            )
            if grad_scale is not None:
                grad = grad / grad_scale.to(grad.device)
            part = self._function(value, grad)
            if not isinstance(part, Tensor) or part.shape != value.shape:
                what = tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__
                raise BudgetError(
                    f"the score function returned {what}, expected a tensor {tuple(value.shape)}, "
                    "a score for each component."
                )
            parts.append(part)
        self._scores = self._gather(parts)
        return missing

    def finite(self) -> Tensor:
        return self._scores.isfinite().all()

    def is_finite(self) -> bool:
        return bool(self.finite())

    def commit(self, *, choosing: bool = False) -> None:
        """Nothing is kept."""

    def scores(self) -> Tensor:
        return self._scores

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        check_keys(state, {})


def without_gradient(missing: Collection[str], step: int) -> BudgetError:
    """Return the error of matrices that have no gradient."""
    return BudgetError(
        f"{len(missing)} matrices, such as {min(missing)}, have no gradient at step {step}; call "
        "score or step after the backward pass and before zero_grad, or give missing='skip' for "
        "modules that are frozen or unused."
    )


def wide(values: Tensor) -> Tensor:
    """Return values at no less than float32: a product of narrow ones vanishes."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def check_keys(state: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Refuse the averages of another score."""
    if not isinstance(state, Mapping):
        raise damaged("score", state, "a mapping")
    if state.keys() != expected.keys():
        saved, here = (", ".join(keys) or "nothing" for keys in (state, expected))
        raise BudgetError(
            f"the saved score keeps {saved}, but this one {here}; make the allocator with the "
            "score that it was saved with."
        )


SCORES: Mapping[str, Score] = {"sensitivity": sensitivity, "magnitude": magnitude}


def score_named(score: "str | Score | ScoreMethod") -> ScoreMethod:
    """Return a score by name, a function of λ and ∇λ, or a score with averages, as a method."""
    refuse_class("score", score)
    if isinstance(score, str):
        if score not in SCORES:
            raise BudgetError(
                f"score is {score!r}, expected {' or '.join(SCORES)}, or a function or object."
            )
        return Momentary(SCORES[score])
    if isinstance(score, ScoreMethod):
        return score
    if not callable(score):
        raise BudgetError(
            f"score is {score!r}, expected {', '.join(SCORES)}, a function or an object."
        )
    return Momentary(score)
