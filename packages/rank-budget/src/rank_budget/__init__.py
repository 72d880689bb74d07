"""A rank allocator: scores, schedules and exact pruning to a global rank budget."""

from rank_budget.allocator import Allocation, RankAllocator, RankedMatrices, prune_lowest
from rank_budget.errors import BudgetError
from rank_budget.report import rank_heatmap, rank_table
from rank_budget.schedules import ConstantBudget, CubicBudget, FixedPruning, Schedule
from rank_budget.scores import SCORES, magnitude, sensitivity

__all__ = [
    "SCORES",
    "Allocation",
    "BudgetError",
    "ConstantBudget",
    "CubicBudget",
    "FixedPruning",
    "RankAllocator",
    "RankedMatrices",
    "Schedule",
    "magnitude",
    "prune_lowest",
    "rank_heatmap",
    "rank_table",
    "sensitivity",
]
