"""Matrices cut into tokens, and put together again."""

from typing import Literal

from torch import Tensor

Tokens = Literal["rows", "columns", "elements", "scalars"]
TOKENS: tuple[Tokens, ...] = ("rows", "columns", "elements", "scalars")


def to_tokens(stack: Tensor, tokens: Tokens) -> Tensor:
    """Return the tokens (matrices, tokens, width) of a stack (matrices, rows, columns).

    "rows": a token is a row. "columns": it is a column. "elements": it is a single number, read row
    by row, as in equation 8 of the paper. "scalars", for stacks of one column: the same.

    A low-rank factor's rank components are its rows where it is (rank, features), as A or Q, and
    its columns where it is (features, rank), as B or P.

    >>> import torch
    >>> to_tokens(torch.arange(6.0).view(1, 2, 3), "columns").tolist()
    [[[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]]
    """
    if tokens == "columns":
        return stack.mT
    return stack.flatten(1).unsqueeze(-1) if tokens == "elements" else stack


def from_tokens(cut: Tensor, tokens: Tokens, rows: int) -> Tensor:
    """Return the stack (matrices, ``rows``, columns) that `to_tokens` cut.

    >>> import torch
    >>> stack = torch.randn(2, 3, 4)
    >>> all(torch.equal(from_tokens(to_tokens(stack, t), t, 3), stack) for t in TOKENS)
    True
    """
    if tokens == "columns":
        return cut.mT
    return cut.reshape(len(cut), rows, -1) if tokens == "elements" else cut


def token_shape(shape: tuple[int, int, int], tokens: Tokens) -> tuple[int, int, int]:
    """Return the shape of `to_tokens` for a stack of ``shape``.

    >>> token_shape((2, 3, 4), "elements")
    (2, 12, 1)
    """
    matrices, rows, columns = shape
    if tokens == "columns":
        return matrices, columns, rows
    return (matrices, rows * columns, 1) if tokens == "elements" else shape
