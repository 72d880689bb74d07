"""A rank allocator: scores, schedules and exact pruning to a global rank budget."""

from rank_budget.allocator import RankAllocator
from rank_budget.attach import Attachment, attach_, watch_
from rank_budget.compact import compact_, droppable
from rank_budget.costs import COSTS, ExportedBytes, total_cost
from rank_budget.errors import BudgetError
from rank_budget.gates import expected_l0, l0_gate, proximal_gate_
from rank_budget.layers import RankedFactors, RankedLayer, RankedMatrices, Triplet, ranked_layers
from rank_budget.layout import Limits
from rank_budget.norm_share import NormShare
from rank_budget.record import Allocation
from rank_budget.report import importance_histogram, rank_heatmap, rank_timeline, schedule_plot
from rank_budget.schedules import (
    ConstantBudget,
    CubicBudget,
    FixedGrowth,
    FixedPruning,
    OneShot,
    Schedule,
)
from rank_budget.scores import SCORES, magnitude, sensitivity
from rank_budget.smoothing import SmoothedSensitivity
from rank_budget.tables import rank_table, scalars, schedule_table

__all__ = [
    "COSTS",
    "SCORES",
    "Allocation",
    "Attachment",
    "BudgetError",
    "ConstantBudget",
    "CubicBudget",
    "ExportedBytes",
    "FixedGrowth",
    "FixedPruning",
    "Limits",
    "NormShare",
    "OneShot",
    "RankAllocator",
    "RankedFactors",
    "RankedLayer",
    "RankedMatrices",
    "Schedule",
    "SmoothedSensitivity",
    "Triplet",
    "attach_",
    "compact_",
    "droppable",
    "expected_l0",
    "importance_histogram",
    "l0_gate",
    "magnitude",
    "proximal_gate_",
    "rank_heatmap",
    "rank_table",
    "rank_timeline",
    "ranked_layers",
    "scalars",
    "schedule_plot",
    "schedule_table",
    "sensitivity",
    "total_cost",
    "watch_",
]
