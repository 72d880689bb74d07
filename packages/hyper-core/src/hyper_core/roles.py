"""What holds for all matrices of one role: tokens, output, norm, start, sharing; validated."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hyper_core.checks import check_choice, is_number
from hyper_core.errors import HyperError
from hyper_core.outputs import OUTPUTS, Output
from hyper_core.sharing import Sharing
from hyper_core.tokens import TOKENS, Tokens


@dataclass(frozen=True)
class Role:
    """How the matrices of one role are cut, constrained, started and shared.

    ``norm``: of each row or column that ``output`` constrains, and else the expected norm of a
    token at the start.
    """

    tokens: Tokens
    output: Output
    norm: float
    zero_start: bool
    sharing: Sharing

    def token_scale(self, rows: int, columns: int) -> float:
        """Return what brings the tokens of a matrix to unit norm, for which a network is made.

        Where vectors of n numbers have the norm ν, a number has the mean square ν²/n, and a token
        of w numbers the norm ν·√(w/n).

        >>> Role("columns", "unit_rows", 1.0, False, "all").token_scale(3, 12)
        2.0
        """
        token = {"columns": rows, "elements": 1}.get(self.tokens, columns)
        vector = {
            "unit_rows": columns,
            "unit_columns": rows,
            "orthonormal": max(rows, columns),
            "free": rows if self.tokens == "columns" else columns,
        }[self.output]
        return math.sqrt(vector / token) / self.norm


def resolve_roles(
    leaves: Mapping[str, Sequence[object]],
    *,
    tokens: Mapping[str, Tokens],
    outputs: Mapping[str, Output],
    norms: Mapping[str, float],
    zero_start: Collection[str],
    sharing: Sharing | Mapping[str, Sharing],
) -> dict[str, Role]:
    """Return the choices for each role of ``leaves``.

    Raises:
        HyperError: a choice for an unknown role, an unknown or contradictory choice.
    """
    _check_kinds(leaves, {"tokens": tokens, "outputs": outputs, "norms": norms}, zero_start)
    by_role = sharing if isinstance(sharing, Mapping) else dict.fromkeys(leaves, sharing)
    named = {
        "tokens": tokens, "outputs": outputs, "norms": norms, "zero_start": zero_start,
        "sharing": by_role,
    }  # fmt: skip
    for what, given in named.items():
        for role in sorted(set(given) - set(leaves)):
            raise HyperError(
                f"{what} names the role {role!r}, expected one of {', '.join(leaves)}; correct or "
                "drop it."
            )
    for role, cut in tokens.items():
        check_choice(f"tokens[{role!r}]", cut, TOKENS)
    for role, output in outputs.items():
        check_choice(f"outputs[{role!r}]", output, OUTPUTS)
        if output != "free" and role in zero_start:
            raise HyperError(
                f"outputs[{role!r}] is {output!r} and zero_start names {role!r}, but zero has no "
                "direction; make the output 'free' or drop it from zero_start."
            )
    for role, norm in norms.items():
        if not is_number(norm) or norm <= 0:
            raise HyperError(
                f"norms[{role!r}] is {norm!r}, expected a positive number; the default is 1."
            )
    return {
        role: Role(
            tokens=tokens.get(role, "rows"),
            output=outputs.get(role, "free"),
            norm=norms.get(role, 1.0),
            zero_start=role in zero_start,
            sharing=by_role.get(role, "all"),
        )
        for role in leaves
    }


def _check_kinds(
    leaves: Mapping[str, Sequence[object]], by_role: Mapping[str, Any], zero_start: Any
) -> None:
    """Raise a `HyperError` for a choice by role that is no mapping, or roles that are no set."""
    role = next(iter(leaves))
    for what, given in by_role.items():
        if not isinstance(given, Mapping):
            raise HyperError(
                f"{what} is {given!r}, expected a mapping by role; give for example "
                f"{{{role!r}: …}}."
            )
    if isinstance(zero_start, str) or not isinstance(zero_start, Collection):
        raise HyperError(
            f"zero_start is {zero_start!r}, expected a collection of roles; give for example "
            f"{{{role!r}}}."
        )
