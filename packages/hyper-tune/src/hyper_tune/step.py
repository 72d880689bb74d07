"""The order of one training step, written once for every recipe and trainer."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from hyper_tune.parallel import sum_over_ranks_, world_size
from lowrank_adapters import accumulate_orthogonality_gradient_
from rank_budget import Allocation

if TYPE_CHECKING:
    from hyper_tune.assembly import Assembly


@dataclass(frozen=True)
class StepReport:
    """What a step measured, the same on every rank.

    ``loss``: mean over the tokens of all micro-batches and ranks, without the penalty; None where
    the step was not told its tokens. ``penalty``: the orthogonality term, unweighted.
    ``grad_norm``: of the trainable parameters, before clipping. ``finite``: False where the step
    was skipped, which leaves every state as it was. ``stop_requested``: whether any rank was asked
    to stop, known where the step was told its tokens.
    """

    loss: float | None
    penalty: float
    grad_norm: float
    tokens: int
    finite: bool
    live_ranks: int
    allocation: Allocation | None
    stop_requested: bool


class TrainingStep:
    """Refresh · micro-batches · reduce · score · penalty · pull back · clip · step · prune · commit

    A context manager made by `Assembly.step`. Inside it, run any number of micro-batches, each
    with `backward`; the rest happens at the end of the block. The factors do not change inside
    the block, so that activation checkpointing recomputes what the forward pass saw. Where ranks
    are sampled, the block uses those of its step, and all are in use outside of it. An exception
    inside the block discards the step. A step whose loss or gradient is not finite is skipped: no
    parameter, score, mask or state changes.

    ``reduced``: whether the gradients are their means over ranks already, as after
    `DistributedDataParallel`.

    One host read a step: loss, penalty, norm and token count together, after the backward pass.
    A first pruning while all λ are zero, so that all scores are, is warned of: see
    docs/concepts/pruning.md.
    """

    def __init__(
        self,
        assembly: "Assembly",
        optimizer: Optimizer,
        max_grad_norm: float | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        *,
        reduced: bool = False,
    ) -> None:
        self._assembly = assembly
        self._optimizer = optimizer
        self._max_grad_norm = max_grad_norm
        self._stop_requested = stop_requested
        self._reduced = reduced
        self._sums: Tensor | None
        self.report: StepReport

    def __enter__(self) -> "TrainingStep":
        self._sums = None
        self._assembly.stack.bind_grads_()
        self._assembly.owner.refresh()
        if self._assembly.sampled is not None:
            self._assembly.sampled.draw_()
        return self

    def backward(self, loss_sum: Tensor, tokens: Tensor | int) -> None:
        """Run the backward pass of one micro-batch.

        ``loss_sum``: 0-dim, the sum of the per-token losses of the micro-batch. ``tokens``: how
        many there are. The step divides by the tokens of all micro-batches and ranks, so that any
        split of the same samples gives the same gradient.
        """
        loss_sum.backward()  # type: ignore[no-untyped-call]
        count = torch.as_tensor(tokens, device=loss_sum.device)
        sums = torch.stack([loss_sum.detach().double(), count.double()])
        self._sums = sums if self._sums is None else self._sums + sums

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
            else:
                self._assembly.owner.discard()
        finally:
            self._zero_grads()
            if self._assembly.sampled is not None:
                self._assembly.sampled.use_()

    def _finish(self) -> None:
        assembly = self._assembly
        loss, tokens, stops = self._reduce()
        if assembly.allocator is not None:
            assembly.allocator.score()
        penalty = self._add_penalty()
        assembly.owner.backward()
        norm = self._clip()
        largest = self._largest_lam()
        loss_value, penalty_value, norm_value, token_count, stop_count, lam_value = torch.stack(
            [value.double() for value in (loss, penalty, norm, tokens, stops, largest)]
        ).tolist()
        finite = math.isfinite(loss_value) and math.isfinite(norm_value)
        allocation = None
        if finite:
            allocation = self._update()
            if allocation is not None and lam_value == 0:
                _warn_of_equal_scores(allocation.step)
        else:
            assembly.owner.discard()
        self.report = StepReport(
            loss=loss_value if self._sums is not None else None,
            penalty=penalty_value,
            grad_norm=norm_value,
            tokens=int(token_count) if math.isfinite(token_count) else 0,
            finite=finite,
            live_ranks=assembly.live_ranks,
            allocation=allocation,
            stop_requested=stop_count > 0,
        )

    def _reduce(self) -> tuple[Tensor, Tensor, Tensor]:
        """Sum gradients over ranks, divide by all tokens.

        Returns the mean loss, the tokens, and the ranks that are asked to stop, which go into the
        same reduction, so that all ranks learn of it at the same step.
        """
        self._assembly.stack.check_bound()
        gradients = self._assembly.gradients()
        if not self._reduced:
            for gradient in gradients:
                sum_over_ranks_(gradient)
        if self._sums is None:
            if not self._reduced:
                torch._foreach_div_(gradients, world_size())
            zero = torch.zeros((), device=gradients[0].device)
            return zero, zero, zero
        stops = self._sums.new_full((1,), float(self._stop_requested()))
        loss_sum, tokens, stops = sum_over_ranks_(torch.cat([self._sums, stops])).unbind()
        torch._foreach_div_(gradients, tokens)
        return loss_sum / tokens, tokens, stops

    def _add_penalty(self) -> Tensor:
        assembly = self._assembly
        if assembly.orthogonality is None:
            return torch.zeros((), device=assembly.stack.grads.device)
        groups = [group for group in assembly.stack.groups if group.role in ("p", "q")]
        return accumulate_orthogonality_gradient_(groups, assembly.orthogonality)

    def _clip(self) -> Tensor:
        parameters = self._assembly.parameters()
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self._max_grad_norm is not None:
            clip_grads_with_norm_(parameters, self._max_grad_norm, norm)
        return norm

    @torch.no_grad()
    def _largest_lam(self) -> Tensor:
        """Return the largest |λ|, of which all scores are multiples, before the first pruning."""
        stack, allocator = self._assembly.stack, self._assembly.allocator
        if allocator is None or allocator.history:
            return torch.ones((), device=stack.values.device)
        lam = [group.values for group in stack.groups if group.rank_mask is not None]
        return torch.stack([values.abs().amax() for values in lam]).amax()

    @torch.no_grad()
    def _update(self) -> Allocation | None:
        assembly = self._assembly
        self._optimizer.step()
        allocation = assembly.allocator.step() if assembly.allocator is not None else None
        for group in assembly.stack.groups:
            if group.rank_mask is not None:
                group.values.mul_(group.rank_mask.unsqueeze(-1))
        assembly.owner.commit()
        if assembly.sampled is not None:
            assembly.sampled.commit()
        return allocation

    def _zero_grads(self) -> None:
        self._optimizer.zero_grad()
        self._assembly.stack.bind_grads_()
        self._assembly.stack.zero_grads_()


def _warn_of_equal_scores(step: int) -> None:
    warnings.warn(
        f"the first pruning, after step {step}, was by the components' positions alone: nothing "
        "had been learned by then, so that the importance of all was 0; raise "
        "method.pruning.interval above the steps whose learning rate is 0, and above 1.",
        stacklevel=5,
    )
