"""The allocator on an optimizer: stepped by it, or watched over."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rank_budget.allocator import RankAllocator
from rank_budget.errors import BudgetError, require


class Attachment:
    """Hooks on an optimizer; ``remove()`` takes them off, as the end of a ``with`` block does."""

    def __init__(
        self, handles: Sequence[RemovableHandle], release: Callable[[], None] = lambda: None
    ) -> None:
        self._handles = list(handles)
        self._release = release

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()
        self._release()

    def __enter__(self) -> "Attachment":
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()


def attach_(allocator: RankAllocator, optimizer: Optimizer) -> Attachment:
    """Let each ``optimizer.step()`` score before it and allocate after it.

    The training loop stays as it is. A step that an automatic mixed precision scaler leaves out
    is not seen; a step with gradients that are not finite, or that a fused optimizer leaves out,
    leaves scores and budget untouched, for which one flag is read from the device, and one more of
    a fused optimizer under a scaler; its gradients are scored unscaled. What is pruned is zero
    again after every step, whatever the optimizer's momentum did to it. Of several optimizers it is
    to be that of λ; whose the stacks of an allocator are is not looked at.

    Raises:
        BudgetError: the allocator is attached already, or a layer's λ is not among the optimizer's
            parameters, though it learns; and, from ``allocator.step()``, that the
            optimizer steps it.

    >>> import torch
    >>> from rank_budget import CubicBudget, Triplet
    >>> sizes = ((4, 2), 2, (2, 3))
    >>> p, lam, q = (torch.nn.Parameter(torch.ones(size)) for size in sizes)
    >>> schedule = CubicBudget(initial=2, final=1, total_steps=2)
    >>> allocator = RankAllocator({"w": Triplet(p, lam, q)}, schedule)
    >>> optimizer = torch.optim.Adam([p, lam, q])
    >>> attached = attach_(allocator, optimizer)
    >>> ((p * lam) @ q).sum().backward()
    >>> optimizer.step()
    >>> allocator.ranks()
    {'w': 1}
    """

    if allocator.attached:
        raise BudgetError(
            "the allocator is attached to an optimizer already; remove that Attachment first."
        )

    held = {id(factor) for group in optimizer.param_groups for factor in group["params"]}
    learning = {n: layer.lam for n, layer in allocator.layers.items() if layer.lam.requires_grad}
    if lost := [name for name, lam in learning.items() if id(lam) not in held]:
        raise BudgetError(
            f"the optimizer holds λ of {len(learning) - len(lost)} of {len(learning)} layers, but "
            f"not of {lost[0]}; attach to the optimizer that has the layers' parameters."
        )

    def before(*_: Any) -> None:
        # A gradient scaler leaves both to optimizers that unscale within their fused step.
        allocator.score(grad_scale=getattr(optimizer, "grad_scale", None))

    def after(*_: Any) -> None:
        found: Tensor | None = getattr(optimizer, "found_inf", None)
        if allocator.is_finite() and not (found is not None and bool(found)):
            allocator.step()
        else:
            allocator.skip()

    def release() -> None:
        allocator.attached = False

    allocator.attached = True
    return Attachment(
        [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)],
        release,
    )


def watch_(allocator: RankAllocator, optimizer: Optimizer, patience: int = 10) -> Attachment:
    """Raise once the optimizer has taken ``patience`` steps without one of the allocator.

    For loops that call the allocator themselves, where a forgotten call would train on at full
    rank without a word.

    Raises:
        BudgetError: patience below one; and, from ``optimizer.step()``, a forgotten allocator.

    >>> import torch
    >>> from rank_budget import ConstantBudget, Triplet
    >>> triplet = Triplet(*(torch.ones(size, requires_grad=True) for size in ((4, 2), 2, (2, 3))))
    >>> allocator = RankAllocator({"w": triplet}, ConstantBudget(2))
    >>> optimizer = torch.optim.SGD([triplet.lam])
    >>> watching = watch_(allocator, optimizer, patience=1)
    >>> optimizer.step()
    Traceback (most recent call last):
    rank_budget.errors.BudgetError: the optimizer has taken 1 steps since the rank allocator's ...
    """
    require(patience >= 1, "patience", patience, "must be at least 1 step")
    seen, waited = allocator.count.seen, 0

    def after(*_: Any) -> None:
        nonlocal seen, waited
        now = allocator.count.seen
        waited = waited + 1 if now == seen else 0
        seen = now
        if waited >= patience:
            raise BudgetError(
                f"the optimizer has taken {waited} steps since the rank allocator's last one, "
                f"which was step {allocator.steps}; call allocator.step() after each, or attach_ "
                "it to the optimizer."
            )

    return Attachment([optimizer.register_step_post_hook(after)])
