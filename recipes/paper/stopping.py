"""When a run has got somewhere: the paper reports training times and not what ends training.

Two readings are measured. Time to the loss: until the smoothed loss is first at most the smoothed
loss at the end of the run without a hypernetwork, of the same model, data and seed. Time of equal
steps: of all steps, of which every run has as many.
"""

import math
from collections.abc import Sequence
from itertools import accumulate


def smoothed(losses: Sequence[float], window: int) -> list[float]:
    """Return the mean of the last ``window`` losses at each step from the ``window``-th on.

    A series shorter than the window has one value, the mean of all.

    >>> smoothed([4.0, 2.0, 0.0], 2)
    [3.0, 1.0]
    """
    if not losses:
        raise ValueError("a run without steps has no loss.")
    window = min(window, len(losses))
    return [
        math.fsum(losses[end - window : end]) / window for end in range(window, len(losses) + 1)
    ]


def steps_to(losses: Sequence[float], target: float, window: int) -> int | None:
    """Return how many steps it takes until the smoothed loss is at most ``target``; None: never.

    Losses that are not finite, of skipped steps, never are.

    >>> steps_to([4.0, 2.0, 0.0], 1.0, 2)
    3
    """
    first = min(window, len(losses))
    for steps, loss in enumerate(smoothed(losses, window), first):
        if loss <= target:
            return steps
    return None


def seconds_to(
    losses: Sequence[float], seconds: Sequence[float], target: float, window: int
) -> float | None:
    """Return the seconds of the steps of `steps_to`; None: never.

    >>> seconds_to([4.0, 2.0, 0.0], [1.0, 1.0, 2.0], 1.0, 2)
    4.0
    """
    steps = steps_to(losses, target, window)
    return None if steps is None else list(accumulate(seconds))[steps - 1]
