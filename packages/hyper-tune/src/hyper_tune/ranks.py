"""What becomes of a method's ranks: pruned down to a budget, or one drawn for each step."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch

from hyper_tune.checks import require
from hyper_tune.method import MethodConfig, SamplingSettings
from hyper_tune.parallel import broadcast_
from lowrank_adapters import FactorStack, LowRankLinear, RankSampler
from rank_budget import FixedPruning, RankAllocator, RankedMatrices


class SampledRanks:
    """The ranks that steps train, and all of them in between.

    The ranks of a step are a function of a seed and of how many steps were taken: a step that is
    skipped or fails is not one.

    Saved: the seed, the bounds and the number of steps.
    """

    def __init__(
        self,
        layers: Mapping[str, LowRankLinear],
        settings: SamplingSettings,
        init_rank: int,
        seed: int,
    ) -> None:
        self._sampler = RankSampler(
            layers,
            seed=seed,
            lowest=settings.lowest,
            highest=settings.highest or init_rank,
            shared=settings.draw == "shared",
        )
        self._all = init_rank
        self._steps = 0

    def draw_(self) -> None:
        """Let the layers use the ranks of the next step."""
        self._sampler.draw_(self._steps)

    def commit(self) -> None:
        """Count the step as taken."""
        self._steps += 1

    def use_(self, rank: int | None = None) -> None:
        """Let all layers use their first ``rank`` components, or all of them."""
        self._sampler.use_(rank or self._all)

    def state_dict(self) -> dict[str, int]:
        """Return everything that changes the ranks of later steps."""
        return {**self._sampler.state_dict(), "steps": self._steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            AdapterError: it is of another sampler.
        """
        self._sampler.load_state_dict({k: value for k, value in state.items() if k != "steps"})
        self._steps = int(state["steps"])


def draw_seed(device: torch.device | str) -> int:
    """Return a seed from torch's generator, as the factors' start is; rank 0's on every process."""
    seed = torch.randint(2**62, (), device=device)
    broadcast_([seed])
    return int(seed)


def budgeted_ranks(config: MethodConfig, stack: FactorStack) -> tuple[int, int]:
    """Return the components of all matrices at the start, and how many the budget leaves.

    Raises:
        UserError: it leaves none.
    """
    masks = [group.rank_mask for group in stack.groups if group.rank_mask is not None]
    initial = sum(mask.numel() for mask in masks)
    assert config.budget is not None
    budget = round(config.budget * sum(len(mask) for mask in masks))
    rule = f"leaves none of the {initial} ranks"
    require(budget >= 1, "method.budget", config.budget, rule, "raise it")
    return initial, budget


def make_allocator(config: MethodConfig, stack: FactorStack, total_steps: int) -> RankAllocator:
    """Return the allocator of a method that prunes; warn of a schedule that misses the budget."""
    settings = config.pruning
    assert settings is not None
    initial, budget = budgeted_ranks(config, stack)
    matrices = [
        RankedMatrices(
            names=group.names,
            values=group.values.squeeze(-1),
            gradients=group.values.grad.squeeze(-1),
            rank_mask=group.rank_mask,
        )
        for group in stack.groups
        if group.rank_mask is not None and group.values.grad is not None
    ]
    if settings.count is None:
        schedule = FixedPruning.over(
            initial=initial,
            budget=budget,
            interval=settings.interval,
            total_steps=total_steps,
            finish_by=settings.finish_by,
        )
    else:
        schedule = FixedPruning(
            initial=initial, budget=budget, count=settings.count, interval=settings.interval
        )
    # What falls at the last step falls after the last update: nothing can make up for it.
    reached = schedule.live_ranks(total_steps - 1)
    if reached > budget:
        warnings.warn(
            f"the pruning schedule leaves {reached} of {initial} ranks before the last of "
            f"{total_steps} steps, above the budget of {budget}; lower method.pruning.interval "
            f"({settings.interval}) or raise method.pruning.count.",
            stacklevel=4,
        )
    return RankAllocator(matrices, schedule, score=settings.importance)
