"""What a saved state must be, said before anything is changed."""

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rank_budget.errors import BudgetError

_ADDRESS = re.compile(r" at 0x[0-9A-Fa-f]+")


def described(thing: Any) -> str:
    """Return what a schedule, a score or a cost is, as text that is the same in another process.

    >>> from rank_budget import ConstantBudget
    >>> from rank_budget.scores import magnitude
    >>> described(ConstantBudget(3)), described(magnitude), described("ranks")
    ('ConstantBudget(initial=3)', 'magnitude', 'ranks')
    """
    if isinstance(thing, str):
        return thing
    return _ADDRESS.sub("", str(getattr(thing, "__qualname__", repr(thing))))


def made_with(score: Any, cost: Any, limits: Any, direction: str) -> dict[str, str]:
    """Return what an allocator was made with, beside its schedule, as text."""
    parts = {"score": score, "cost": cost, "limits": limits, "direction": direction}
    return {field: described(part) for field, part in parts.items()}


def damaged(field: str, value: Any, expected: str) -> BudgetError:
    """Return the error of a part of a state that cannot have been saved like that."""
    if isinstance(value, Tensor):
        text = f"{value.dtype} {tuple(value.shape)}"
    elif isinstance(value, list):
        text = f"a list of {len(value)}"
    else:
        text = f"a {type(value).__name__}"
    return BudgetError(f"the saved {field} is {text}, expected {expected}; the state is damaged.")


def check_tensor(
    field: str, value: Any, shape: Sequence[int], dtype: torch.dtype | None = None
) -> None:
    """Refuse what is not a tensor of this shape and dtype, or of any dtype."""
    fits = isinstance(value, Tensor) and tuple(value.shape) == tuple(shape)
    if not fits or dtype not in (None, value.dtype):
        raise damaged(field, value, f"{dtype or 'a tensor'} {tuple(shape)}")


def check_list(field: str, value: Any, count: int | None = None) -> None:
    """Refuse what is not a list, of so many where that is known."""
    if not isinstance(value, list) or count not in (None, len(value)):
        raise damaged(field, value, "a list" if count is None else f"a list of {count}")


def check_whole(field: str, value: Any) -> None:
    """Refuse what is not a whole number, 0 or more."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise damaged(field, value, "a whole number, 0 or more")


def check_state(saved: Mapping[str, Any], here: Mapping[str, Any], *, ranks: bool) -> None:
    """Refuse a state of other matrices, of an allocator made otherwise, or that is damaged.

    ``here``: the state of the allocator that would load it. ``ranks``: the budget counts ranks.
    """
    if not isinstance(saved, Mapping):
        raise damaged("state", saved, "what state_dict returned")
    for kind, keys in (("lacks", here.keys() - saved.keys()), ("has", saved.keys() - here.keys())):
        if keys:
            raise BudgetError(
                f"the saved state {kind} {', '.join(sorted(map(str, keys)))}, expected what "
                "state_dict of an allocator returned; load the state of this one."
            )
    check_same(saved["matrices"], here["matrices"], "(name, rank)")
    if not isinstance(saved["made_with"], Mapping):
        raise damaged("made_with", saved["made_with"], "a mapping")
    for field, value in here["made_with"].items():
        if saved["made_with"].get(field) != value:
            raise BudgetError(
                f"the saved state was made with the {field} {saved['made_with'].get(field)}, but "
                f"here it is {value}; make the allocator as it was made then."
            )
    for field in ("steps", "skipped", "budget"):
        check_whole(field, saved[field])
    for field in ("alive", "importance"):
        dtype = None if field == "importance" else here[field].dtype
        check_tensor(field, saved[field], here[field].shape, dtype)
    live = int(saved["alive"].sum())
    if ranks and live != saved["budget"]:
        raise BudgetError(
            f"the saved masks have {live} live components, but the budget was {saved['budget']}; "
            "the state is damaged."
        )


def check_same(saved: Any, here: Sequence[list[Any]], what: str) -> None:
    """Refuse a state of other matrices, by the first that differs."""
    check_list(f"list of {what}", saved)
    for before, now in zip_longest(saved, here):
        if before != now:
            raise BudgetError(
                f"the saved state has {what} {before}, but here is {now}; load it into the model "
                "that it was saved from."
            )
