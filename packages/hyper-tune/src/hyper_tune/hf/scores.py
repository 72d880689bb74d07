"""Scores from predictions and labels: of classes, and of a regression's numbers."""

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
    return pearson(predicted, labels)


def pearson(predicted: Tensor, labels: Tensor) -> float:
    """Return the correlation of two series (n,); 0 where one of them does not vary.

    >>> round(pearson(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([-2.0, -4.0, -8.0])), 4)
    -1.0
    """
    pair = torch.stack([predicted.double(), labels.double()])
    if bool((pair == pair[:, :1]).all(dim=1).any()):
        return 0.0
    centred = pair - pair.mean(dim=1, keepdim=True)
    unit = centred / centred.norm(dim=1, keepdim=True)
    return float((unit[0] * unit[1]).sum())


def spearman(predicted: Tensor, labels: Tensor) -> float:
    """Return the correlation of two series' ranks (n,); equal values share the mean of theirs.

    >>> round(spearman(torch.tensor([1.0, 2.0, 40.0]), torch.tensor([0.1, 0.2, 0.3])), 4)
    1.0
    """
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Tensor) -> Tensor:
    _, place, counts = torch.unique(values, return_inverse=True, return_counts=True)
    means: Tensor = counts.cumsum(0) - (counts - 1).double() / 2
    return means[place].where(~values.isnan(), torch.nan)  # of those each is unique


SCORES: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
_OF_TWO = ("f1", "matthews")
_OF_NUMBERS = ("pearson", "spearman")


def check_scores(names: Sequence[str], labels: Sequence[str]) -> None:
    """Refuse scores that the task does not have. ``labels``: none is a regression.

    Raises:
        UserError: a score of classes is asked of a regression, one of numbers of classes, or one of
            two labels of a task that has more.

    >>> check_scores(["accuracy"], ["a", "b", "c"])
    """
    for name in names:
        if (name in _OF_NUMBERS) == bool(labels):
            theirs = "numbers" if labels else "classes"
            has = f"the labels {', '.join(labels)}" if labels else "numbers"
            ask = "accuracy" if labels else " or ".join(_OF_NUMBERS)
            raise UserError(
                f"metrics has {name!r}, which is for {theirs}, but the data has {has}; ask for "
                f"{ask}."
            )
        if name in _OF_TWO and len(labels) != 2:
            raise UserError(
                f"metrics has {name!r}, which is for two labels, but the data has {len(labels)}: "
                f"{', '.join(labels)}; ask for accuracy."
            )
