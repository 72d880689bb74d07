"""Puts a method on a model: layers, stacked factors, their owner, the allocator."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hyper_core import GeneratedParameters, HyperError
from hyper_tune.errors import UserError
from hyper_tune.factors import FactorOwner, LearnedFactors
from hyper_tune.method import MethodConfig
from hyper_tune.optimizer_state import load_named_optimizer_state, named_optimizer_state
from hyper_tune.parallel import broadcast_
from hyper_tune.step import TrainingStep
from lowrank_adapters import (
    SVD,
    FactorStack,
    LoRA,
    LowRankLinear,
    export_peft,
    freeze_base_,
    inject_adapters_,
)
from rank_budget import FixedPruning, RankAllocator, RankedMatrices

_MAKERS: Mapping[str, type[LoRA | SVD]] = {"lora": LoRA, "svd": SVD}
_OUTPUTS: Mapping[str, Literal["free", "unit_rows"]] = {
    "p": "unit_rows",
    "q": "unit_rows",
    "a": "unit_rows",
    "lam": "free",
    "b": "free",
}
_ZERO_AT_START = {"lam", "b"}


class Assembly:
    """A method on a model: what a training loop needs, made by `assemble`.

    The low-rank factors in the model are leaves: their gradients land in one flat buffer, from
    which each step carries them to the trainable parameters, all matrices at once.

    ``layers``: the adapted layers by name, in model order. ``stack``: their factors as stacked
    views of flat buffers. ``owner``: hypernetworks, or the factors themselves. ``allocator``: the
    rank budget, or None. Saved: owner, masks and allocator; never the base.
    """

    def __init__(
        self,
        config: MethodConfig,
        layers: Mapping[str, LowRankLinear],
        stack: FactorStack,
        owner: FactorOwner,
        allocator: RankAllocator | None,
    ) -> None:
        self.config = config
        self.layers = layers
        self.stack = stack
        self.owner = owner
        self.allocator = allocator
        self._parameters = [parameter for _, parameter in owner.named_parameters()]

    @property
    def orthogonality(self) -> float | None:
        """The weight γ of the orthogonality penalty; None where the method has none."""
        return self.config.orthogonality

    @property
    def total_ranks(self) -> int:
        """Components of all matrices at the start."""
        return sum(layer.rank for layer in self.layers.values())

    @property
    def live_ranks(self) -> int:
        """Components that are not pruned."""
        return self.total_ranks if self.allocator is None else self.allocator.live_ranks

    def ranks(self) -> dict[str, int]:
        """Return the live components of each matrix, in model order."""
        if self.allocator is None:
            return {name: layer.rank for name, layer in self.layers.items()}
        live = self.allocator.ranks()
        return {name: live[name] for name in self.layers}

    def parameters(self) -> list[Tensor]:
        """Return what the optimizer trains: hypernetworks, or the stacked factors themselves."""
        return self._parameters

    def step(
        self,
        optimizer: Optimizer,
        max_grad_norm: float | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
    ) -> TrainingStep:
        """Return the context manager of one optimizer step; see `TrainingStep`.

        ``stop_requested`` is asked once, before the reduction over ranks; the step's report says
        whether it was true on any of them.
        """
        return TrainingStep(self, optimizer, max_grad_norm, stop_requested)

    @torch.no_grad()
    def write_factors_(self) -> None:
        """Write into the model the factors that the next step would use, for evaluation or export.

        A pure function of the saved state: it changes nothing that training depends on.
        """
        self.owner.refresh()

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return everything that changes the next step; tensors are live, not copies."""
        return {
            "owner": dict(self.owner.state_dict()),
            "allocator": None if self.allocator is None else self.allocator.state_dict(),
            "optimizer": None
            if optimizer is None
            else named_optimizer_state(optimizer, self.owner.named_parameters()),
        }

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        """Restore what `state_dict` returned, in place.

        Raises:
            ValueError: the state is of another model or method.
        """
        if optimizer is not None and state["optimizer"] is None:
            raise UserError("the saved state has no optimizer; load it without one, or save both.")
        try:
            self.owner.load_state_dict(state["owner"])
        except (RuntimeError, HyperError) as error:
            raise UserError(f"the saved state is of another model or method: {error}") from error
        if self.allocator is not None:
            self.allocator.load_state_dict(state["allocator"])
        if optimizer is not None:
            named = self.owner.named_parameters()
            load_named_optimizer_state(optimizer, named, state["optimizer"])

    def export(
        self,
        folder: str | Path,
        *,
        rename: Callable[[str], str] = str,
        transform_b: Callable[[str, Tensor], Tensor] = lambda _, b: b,
        base_model_name_or_path: str | None = None,
        task_type: str | None = None,
    ) -> Path:
        """Write the adapter as plain LoRA in PEFT's layout; λ, masks and scaling are folded in.

        ``rename`` maps this model's module names to the exported model's; ``transform_b`` may
        reorder the output rows of B.
        """
        self.write_factors_()
        return export_peft(
            self.layers,
            folder,
            rename=rename,
            transform_b=transform_b,
            base_model_name_or_path=base_model_name_or_path,
            task_type=task_type,
        )


def assemble(
    model: nn.Module,
    config: MethodConfig,
    *,
    total_steps: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Assembly:
    """Put ``config``'s method on ``model``, in place, and freeze everything else.

    ``total_steps``: optimizer steps of the run, from which the pruning schedule is derived.
    ``device`` and ``dtype``: of the factors and hypernetworks, whatever the base's; the base may
    still be on the meta device.

    Raises:
        ValueError: targets that match nothing, a rank above a matrix's, a budget that cannot be.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 4))
    >>> method = assemble(model, MethodConfig("adalora", init_rank=2, budget=1), total_steps=300)
    >>> optimizer = torch.optim.Adam(method.parameters(), lr=1e-2)
    >>> with method.step(optimizer) as step:
    ...     step.backward(model(torch.ones(3, 8)).square().sum(), tokens=3)
    >>> step.report.live_ranks
    4
    """
    layers, stack, owner = attach(model, config, device=device, dtype=dtype)
    broadcast_([*owner.state_dict().values(), stack.values])
    allocator = _make_allocator(config, stack, total_steps) if config.method.prunes else None
    return Assembly(config, layers, stack, owner, allocator)


def attach(
    model: nn.Module,
    config: MethodConfig,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[dict[str, LowRankLinear], FactorStack, FactorOwner]:
    """Put layers, stacked factors and their owner on ``model``, in place, and freeze the rest.

    All that trains, without the rank budget: it also works where ``device`` is meta.
    """
    make = _MAKERS[config.method.layer](rank=config.init_rank, alpha=float(config.alpha or 0))
    layers = inject_adapters_(
        model,
        make,
        config.target_modules,
        exclude=config.exclude,
        device=device,
        factor_dtype=dtype,
    )
    freeze_base_(model)
    stack = FactorStack(layers)
    return layers, stack, _make_owner(config, stack)


def _make_owner(config: MethodConfig, stack: FactorStack) -> FactorOwner:
    settings = config.hypernetwork
    if settings is None:
        return LearnedFactors(stack.groups)
    leaves: dict[str, list[Tensor]] = {}
    for group in stack.groups:
        leaves.setdefault(group.role, []).append(group.values)
    return GeneratedParameters(
        leaves,
        config=settings.preset,
        state=settings.state,
        outputs={role: _OUTPUTS[role] for role in leaves},
        zero_start=_ZERO_AT_START & leaves.keys(),
        gradient_normalisation=settings.gradient_normalisation,
    )


def _make_allocator(config: MethodConfig, stack: FactorStack, total_steps: int) -> RankAllocator:
    settings = config.pruning
    assert settings is not None
    assert config.budget is not None
    matrices = [
        RankedMatrices(
            names=group.names,
            values=group.values.squeeze(-1),
            gradients=group.values.grad.squeeze(-1),
            rank_mask=group.rank_mask,
        )
        for group in stack.groups
        if group.rank_mask is not None and group.values.grad is not None
    ]
    initial = sum(group.rank_mask.numel() for group in matrices)
    budget = round(config.budget * sum(len(group.names) for group in matrices))
    if settings.count is None:
        schedule = FixedPruning.over(
            initial=initial,
            budget=budget,
            interval=settings.interval,
            total_steps=total_steps,
            finish_by=settings.finish_by,
        )
    else:
        schedule = FixedPruning(
            initial=initial, budget=budget, count=settings.count, interval=settings.interval
        )
    # What falls at the last step falls after the last update: nothing can make up for it.
    reached = schedule.live_ranks(total_steps - 1)
    if reached > budget:
        warnings.warn(
            f"the pruning schedule leaves {reached} of {initial} ranks before the last of "
            f"{total_steps} steps, above the budget of {budget}; lower method.pruning.interval "
            f"({settings.interval}) or raise method.pruning.count.",
            stacklevel=3,
        )
    return RankAllocator(matrices, schedule, score=settings.importance)
