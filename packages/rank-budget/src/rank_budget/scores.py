"""How important a component is: pure functions of its value and its gradient."""

from collections.abc import Callable, Mapping

from torch import Tensor

Score = Callable[[Tensor, Tensor], Tensor]


def sensitivity(values: Tensor, gradients: Tensor) -> Tensor:
    """Return |σ·∇σ| (paper, equation 9): the first-order change of the loss if σ were zero.

    Shapes: all (matrices, rank).

    >>> import torch
    >>> sensitivity(torch.tensor([[2.0, -1.0]]), torch.tensor([[0.5, 3.0]]))
    tensor([[1., 3.]])
    """
    return (values * gradients).abs()


def magnitude(values: Tensor, gradients: Tensor) -> Tensor:
    """Return |σ| (paper, section 3.2); the gradients are not looked at.

    >>> import torch
    >>> magnitude(torch.tensor([[2.0, -1.0]]), torch.zeros(1, 2))
    tensor([[2., 1.]])
    """
    del gradients
    return values.abs()


SCORES: Mapping[str, Score] = {"sensitivity": sensitivity, "magnitude": magnitude}
