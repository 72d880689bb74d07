"""The sum of per-token cross-entropies: exact under any split into micro-batches and ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

IGNORE_INDEX = -100


def shift_labels(labels: Tensor) -> Tensor:
    """Align labels (batch, length) with the logits that predict them; the last position has none.

    >>> shift_labels(torch.tensor([[5, 6, 7]])).tolist()
    [[6, 7, -100]]
    """
    return functional.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)


def cross_entropy_sum(chunks: Sequence[Tensor], labels: Tensor) -> Tensor:
    """Return Σ −log softmax(logits)[label] over the labels that are not ignored, in float32.

    ``chunks``: logits (batch, length/n, vocabulary) in n parts along the length, as torchtune's
    decoder returns them, so that a large vocabulary is upcast part by part. ``labels``: shifted,
    (batch, length). A batch whose labels are all ignored has the sum 0.

    >>> logits = torch.zeros(1, 2, 4)
    >>> round(float(cross_entropy_sum([logits], torch.tensor([[1, -100]])).exp()), 4)
    4.0
    """
    parts = torch.split(labels, [chunk.shape[1] for chunk in chunks], dim=1)
    losses = [
        functional.cross_entropy(
            chunk.flatten(0, 1) if chunk.dtype == torch.float64 else chunk.flatten(0, 1).float(),
            part.flatten(),
            ignore_index=IGNORE_INDEX,
            reduction="sum",
        )
        for chunk, part in zip(chunks, parts, strict=True)
    ]
    return torch.stack(losses).sum()
