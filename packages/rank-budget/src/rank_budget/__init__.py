"""A rank allocator: scores, schedules and exact pruning to a global rank budget.

What goes with it is in submodules: ``tables`` and ``report`` show ranks and schedules, ``scores``
and ``costs`` have the choices by name, and ``gates`` the gates of SoRA and SaLoRA.
"""

from rank_budget.allocator import RankAllocator
from rank_budget.attach import Attachment, attach_, watch_
from rank_budget.compact import compact_, droppable
from rank_budget.errors import BudgetError
from rank_budget.layers import RankedFactors, RankedLayer, RankedMatrices, Triplet, ranked_layers
from rank_budget.layout import Limits
from rank_budget.norm_share import NormShare
from rank_budget.record import Allocation
from rank_budget.schedules import (
    ConstantBudget,
    CubicBudget,
    FixedGrowth,
    FixedPruning,
    OneShot,
    Schedule,
)
from rank_budget.smoothing import SmoothedSensitivity

__all__ = [
    "Allocation",
    "Attachment",
    "BudgetError",
    "ConstantBudget",
    "CubicBudget",
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
    "ranked_layers",
    "watch_",
]
