"""What to look at when generated parameters do not train: collapse, explosion, fixed points."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hyper_core.context import Context
from hyper_core.generated import GeneratedParameters
from hyper_core.outputs import unit_vectors
from hyper_core.roles import Role
from hyper_core.tokens import to_tokens

_COLLAPSED_COSINE = 0.5
_NUMBERS_THAT_TELL = 16  # unrelated vectors of fewer numbers have large cosines by chance
_LEAST_SHARE_OF_RANK = 1 / 8
_EXPLODED_NORM = 100.0


@dataclass(frozen=True)
class RoleDiagnosis:
    """Figures of one role.

    ``cosine``: mean absolute cosine between matrices of equal shape; 0 for one alone.
    ``effective_rank``: mean of exp(−Σ p ln p), p the shares of the squared singular values.
    ``full_rank``: mean of the lesser of rows and columns. ``residual``: ‖H(P) − P‖ / max of both
    norms, 0 at a fixed point. ``update_share``: of Σ‖H(P) − P‖² over all roles. ``token_norm``:
    root mean square norm of a token, in units of the role's norm.
    """

    cosine: float
    effective_rank: float
    full_rank: float
    residual: float
    update_share: float
    token_norm: float


@dataclass(frozen=True)
class Diagnosis:
    """Figures by role, and what they warn of, each with what to change.

    Raises:
        HyperError: never; it is made by `diagnose`.

    >>> Diagnosis(roles={}, warnings=()).warnings
    ()
    """

    roles: dict[str, RoleDiagnosis]
    warnings: tuple[str, ...]


@torch.no_grad()
def diagnose(generated: GeneratedParameters, context: Context = None) -> Diagnosis:
    """Return figures of the values that the next step would use, and warn of what is wrong.

    H(P) here is the value that `GeneratedParameters.refresh` would write, P the state; for the
    static state their difference is the whole update. Changes nothing.

    Warns of collapse, where matrices of 16 numbers and more are nearly the same (cosine above 0.5)
    or their components (effective rank r with (r − 1) below an eighth of the full rank's), and of
    explosion (tokens 100 times their norm, or values that are not finite).

    Raises:
        HyperError: the context is not what the hypernetworks were made for.

    >>> weights = [torch.randn(8, 32) for _ in range(4)]
    >>> generated = GeneratedParameters({"w": weights}, config="attention-small")
    >>> diagnose(generated).roles["w"].full_rank
    8.0
    """
    values = generated.generate(context)
    figures = torch.stack(
        [
            _figures(role, values[name], generated.state_of(name))
            for name, role in generated.roles.items()
        ]
    )
    total = max(figures[:, -1].sum().item(), torch.finfo(figures.dtype).tiny)
    roles = {}
    for name, (cosine, rank, norm, residual, change) in zip(
        generated.roles, figures.tolist(), strict=True
    ):
        full = _mean(
            [stack.new_full((len(stack),), min(stack.shape[1:])) for stack in values[name]]
        )
        roles[name] = RoleDiagnosis(cosine, rank, full.item(), residual, change / total, norm)
    texts = [text for name, role in roles.items() for text in _findings(name, role, values[name])]
    for text in texts:
        warnings.warn(text, stacklevel=3)
    return Diagnosis(roles, tuple(texts))


def cosine_between(stack: Tensor) -> Tensor:
    """Return |cosine| between any two matrices of (matrices, rows, columns), one per pair.

    >>> cosine_between(torch.tensor([[[1.0, 0.0]], [[3.0, 4.0]], [[0.0, 2.0]]])).tolist()
    [0.6000000238418579, 0.0, 0.800000011920929]
    """
    rows = unit_vectors(stack.flatten(1), -1)
    first, second = torch.triu_indices(len(rows), len(rows), 1, device=rows.device)
    return (rows @ rows.mT)[first, second].abs()


def effective_rank(stack: Tensor) -> Tensor:
    """Return exp(−Σ p ln p) of each matrix, p its squared singular values over their sum.

    It is k for k equal singular values and no others, and 1 for a matrix of zeros.

    >>> round(effective_rank(torch.eye(3, 5).unsqueeze(0)).item(), 4)
    3.0
    """
    wide = stack if stack.shape[1] <= stack.shape[2] else stack.mT
    squares = torch.linalg.eigvalsh(wide @ wide.mT).clamp(min=0)
    shares = squares / squares.sum(-1, keepdim=True).clamp(min=torch.finfo(stack.dtype).tiny)
    rank: Tensor = torch.special.entr(shares).sum(-1).exp()
    return rank


def _figures(role: Role, values: Sequence[Tensor], state: Sequence[Tensor]) -> Tensor:
    """Return cosine, effective rank, token norm, residual and squared change."""
    change = torch.cat([(new - old).flatten() for new, old in zip(values, state, strict=True)])
    norms = [torch.cat([stack.flatten() for stack in stacks]).norm() for stacks in (values, state)]
    tokens = [
        (to_tokens(stack, role.tokens) * role.token_scale(*stack.shape[1:])).square().sum(-1)
        for stack in values
    ]
    largest = torch.stack(norms).amax().clamp(min=torch.finfo(change.dtype).tiny)
    finite = [torch.where(stack.isfinite(), stack, 0.0) for stack in values]
    return torch.stack(
        [
            _mean([cosine_between(stack) for stack in finite]),
            _mean([effective_rank(stack) for stack in finite]),
            _mean([square.flatten() for square in tokens]).sqrt(),
            change.norm() / largest,
            change.square().sum(),
        ]
    )


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Return the mean of all numbers, 0 of none."""
    joined = torch.cat(list(parts))
    return joined.sum() / max(joined.numel(), 1)


def _findings(name: str, role: RoleDiagnosis, values: Sequence[Tensor]) -> list[str]:
    texts = []
    telling = [stack for stack in values if stack[0].numel() >= _NUMBERS_THAT_TELL]
    finite = [torch.where(stack.isfinite(), stack, 0.0) for stack in telling]
    cosine = _mean([cosine_between(stack) for stack in finite]).item() if finite else 0.0
    if not role.token_norm < _EXPLODED_NORM:
        texts.append(
            f"the tokens of {name!r} have {role.token_norm:.3g} times their norm, expected less "
            f"than {_EXPLODED_NORM:g}: the recursion explodes; make the output 'unit_rows' or "
            "'orthonormal', take state='static' or 'damped', or lower the learning rate."
        )
    if cosine > _COLLAPSED_COSINE:
        texts.append(
            f"the matrices of {name!r} have a mean absolute cosine of {cosine:.2f} to one "
            f"another, expected at most {_COLLAPSED_COSINE}: they collapse into one; keep "
            "the embeddings, take state='static', sharing='each' or a lower learning "
            "rate of the body."
        )
    least = 1 + (role.full_rank - 1) * _LEAST_SHARE_OF_RANK
    if role.token_norm > 0 and role.effective_rank < least:
        texts.append(
            f"the matrices of {name!r} have an effective rank of {role.effective_rank:.2f}, "
            f"expected at least {least:.2f} of {role.full_rank:g}: their components collapse into "
            "one; keep the embeddings, make the output 'orthonormal', or penalise "
            "what is not."
        )
    return texts
