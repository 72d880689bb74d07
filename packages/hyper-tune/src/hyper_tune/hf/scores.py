"""Scores of a classifier: accuracy, F1 and Matthews' correlation, from labels and predictions."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from hyper_tune.errors import UserError


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Return the share of predictions that are the label.

    >>> accuracy(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1]))
    0.75
    """
    return float((predicted == labels).double().mean())


def f1(predicted: Tensor, labels: Tensor) -> float:
    """Return 2 TP / (2 TP + FP + FN) of label 1; 0 where there is nothing to divide by.

    >>> f1(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1]))
    0.8
    """
    hits = int(((predicted == 1) & (labels == 1)).sum())
    missed = int((predicted != labels).sum())
    return 2 * hits / (2 * hits + missed) if hits or missed else 0.0


def matthews(predicted: Tensor, labels: Tensor) -> float:
    """Return the correlation of two labels; 0 where one of them never occurs.

    >>> round(matthews(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 0, 1])), 4)
    0.5774
    """
    pair = torch.stack([predicted, labels]).double()
    centred = pair - pair.mean(dim=1, keepdim=True)
    sizes = centred.square().sum(dim=1)
    if not bool(sizes.all()):
        return 0.0
    return float((centred[0] * centred[1]).sum() / sizes.prod().sqrt())


SCORES: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
}
_OF_TWO = ("f1", "matthews")


def check_scores(names: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse scores that the task does not have.

    Raises:
        UserError: a score of two labels is asked of a task that has more.

    >>> check_scores(["accuracy"], ["a", "b", "c"])
    """
    for name in names:
        if name in _OF_TWO and len(labels) != 2:
            raise UserError(
                f"metrics has {name!r}, which is for two labels, but the data has {len(labels)}: "
                f"{', '.join(labels)}; ask for accuracy."
            )
