"""Modules that are trained as a whole beside the factors, such as a classification head."""

import difflib
import re
from collections.abc import Collection, Mapping

from torch import nn

from hyper_tune.errors import UserError

_ADAPTABLE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


def whole_modules(model: nn.Module, names: Collection[str]) -> dict[str, nn.Module]:
    """Return the modules of these names.

    Raises:
        UserError: the model has no such module (near names are listed), it has no parameters or
            is inside another one, or one name is given in place of a list.

    >>> model = nn.Sequential(nn.Linear(2, 2))
    >>> whole_modules(model, ["0"])
    {'0': Linear(in_features=2, out_features=2, bias=True)}
    """
    if isinstance(names, str):
        raise UserError(f"modules_to_save is {names!r}, expected a list; write [{names!r}].")
    there = dict(model.named_modules())
    for name in names:
        if not name or name not in there:
            near = difflib.get_close_matches(name, there, n=2)
            hint = f"did you mean {' or '.join(near)}?" if near else "give the whole name."
            raise UserError(f"modules_to_save names {name!r}, which the model has not; {hint}")
        if next(there[name].parameters(), None) is None:
            raise UserError(f"modules_to_save names {name!r}, which has no parameters to train.")
        for other in names:
            if name.startswith(f"{other}."):
                raise UserError(
                    f"modules_to_save names {name!r}, which is inside {other!r} and trained with "
                    "it; drop it."
                )
    return {name: there[name] for name in names}


def patterns_inside(modules: Mapping[str, nn.Module]) -> list[str]:
    """Return patterns for all that could be adapted in these modules.

    >>> patterns_inside({"head": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    ['re:head(\\\\..*)?']
    """
    return [
        rf"re:{re.escape(name)}(\..*)?"
        for name, module in modules.items()
        if any(isinstance(inner, _ADAPTABLE) for inner in module.modules())
    ]
