"""What a saved state must be, said before anything is changed."""

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from rank_budget.errors import BudgetError


def described(thing: Any) -> str:
    """Return what a schedule, a score or a cost is, as text that is the same in another process.

    >>> from rank_budget import ConstantBudget
    >>> from rank_budget.scores import magnitude
    >>> described(ConstantBudget(3)), described(magnitude), described("ranks")
    ('ConstantBudget(initial=3)', 'magnitude', 'ranks')
    """
    if isinstance(thing, str):
        return thing
    text = str(getattr(thing, "__qualname__", repr(thing)))
    return type(thing).__qualname__ if " object at 0x" in text else text


def made_with(score: Any, cost: Any, limits: Any, direction: str) -> dict[str, str]:
    """Return what an allocator was made with, beside its schedule, as text."""
    parts = {"score": score, "cost": cost, "limits": limits, "direction": direction}
    return {field: described(part) for field, part in parts.items()}


def damaged(field: str, value: Any, expected: str) -> BudgetError:
    """Return the error of a part of a state that cannot have been saved like that."""
    if isinstance(value, Tensor):
        text = f"{value.dtype} {tuple(value.shape)}"
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
    for field, value in here["made_with"].items():
        if saved["made_with"].get(field) != value:
            raise BudgetError(
                f"the saved state was made with the {field} {saved['made_with'].get(field)}, but "
                f"here it is {value}; make the allocator as it was made then."
            )
    for field in ("steps", "skipped", "budget"):
        number = saved[field]
        if not isinstance(number, int) or number < 0:
            raise damaged(field, number, "a whole number, 0 or more")
    for field in ("alive", "importance"):
        dtype = None if field == "importance" else here[field].dtype
        check_tensor(field, saved[field], here[field].shape, dtype)
    live = int(saved["alive"].sum())
    if ranks and live != saved["budget"]:
        raise BudgetError(
            f"the saved masks have {live} live components, but the budget was {saved['budget']}; "
            "the state is damaged."
        )


def check_same(saved: Sequence[Sequence[Any]], here: Sequence[Sequence[Any]], what: str) -> None:
    """Refuse a state of other matrices, by the first that differs."""
    for before, now in zip_longest(saved, here):
        if before is None or now is None or list(before) != list(now):
            raise BudgetError(
                f"the saved state has {what} {before}, but here is {now}; load it into the model "
                "that it was saved from."
            )
