"""Puts a method on a model: layers, stacked factors, their owner, the allocator."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hyper_core import HyperError
from hyper_tune.attach import attach
from hyper_tune.checks import require
from hyper_tune.errors import UserError
from hyper_tune.factors import FactorOwner
from hyper_tune.method import MethodConfig
from hyper_tune.optimizer_state import load_named_optimizer_state, named_optimizer_state
from hyper_tune.parallel import broadcast_
from hyper_tune.ranks import SampledRanks, make_allocator
from hyper_tune.split import SplitGeneration
from hyper_tune.step import TrainingStep
from lowrank_adapters import FactorStack, LowRankLinear, export_peft
from rank_budget import RankAllocator


class Assembly:
    """A method on a model: what a training loop needs, made by `assemble`.

    The low-rank factors in the model are leaves: their gradients land in one flat buffer, from
    which each step carries them to the trainable parameters, all matrices at once.

    ``layers``: the adapted layers by name, in model order. ``stack``: their factors as stacked
    views of flat buffers. ``owner``: hypernetworks, or the factors themselves. ``allocator``: the
    rank budget, or None. ``sampled``: the ranks that are drawn, or None; between steps all are in
    use. Saved: owner, masks, allocator and draws; never the base.
    """

    def __init__(
        self,
        config: MethodConfig,
        layers: Mapping[str, LowRankLinear],
        stack: FactorStack,
        owner: FactorOwner,
        allocator: RankAllocator | None,
        sampled: SampledRanks | None,
    ) -> None:
        self.config = config
        self.layers = layers
        self.stack = stack
        self.owner = owner
        self.allocator = allocator
        self.sampled = sampled
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

    def step(self, optimizer: Optimizer, max_grad_norm: float | None = None) -> TrainingStep:
        """Return the context manager of one optimizer step; see `TrainingStep`."""
        return TrainingStep(self, optimizer, max_grad_norm)

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
            "sampled": None if self.sampled is None else self.sampled.state_dict(),
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
        if self.sampled is not None:
            self.sampled.load_state_dict(state["sampled"])
        if optimizer is not None:
            named = self.owner.named_parameters()
            load_named_optimizer_state(optimizer, named, state["optimizer"])

    def export(
        self,
        folder: str | Path,
        *,
        rank: int | None = None,
        form: Literal["padded", "compact"] = "padded",
        rename: Callable[[str], str] = str,
        transform_b: Callable[[str, Tensor], Tensor] = lambda _, b: b,
        base_model_name_or_path: str | None = None,
        task_type: str | None = None,
    ) -> Path:
        """Write the adapter as plain LoRA in PEFT's layout; λ, masks and scaling are folded in.

        DoRA is written as PEFT's DoRA, with its magnitude. ``rank``: of a method with nested ranks,
        how many to write; None is all. ``form``: of `export_peft`, "padded" to one rank, or
        "compact", each matrix with its own. ``rename`` maps this model's module names to the
        exported model's; ``transform_b`` may reorder the output rows of B.
        """
        self.write_factors_()
        with self.at_rank(rank):
            return export_peft(
                self.layers,
                folder,
                form=form,
                rename=rename,
                transform_b=transform_b,
                base_model_name_or_path=base_model_name_or_path,
                task_type=task_type,
            )

    @contextmanager
    def at_rank(self, rank: int | None) -> Iterator[None]:
        """Use the first ``rank`` components of each matrix in a block; None uses all.

        Raises:
            UserError: the method has no nested ranks, or not this one.
        """
        if rank is None:
            yield
            return
        if self.sampled is None:
            raise UserError(
                f"rank is {rank}, but {self.config.name} has no nested ranks to choose from; leave "
                "it out, or train dylora or hyperdylora."
            )
        whole = self.config.init_rank
        rule = f"must be a whole number of 1 to method.init_rank = {whole}"
        fits = type(rank) is int and 1 <= rank <= whole
        require(fits, "rank", rank, rule, "choose one")
        self.sampled.use_(rank)
        try:
            yield
        finally:
            self.sampled.use_()


def assemble(
    model: nn.Module,
    config: MethodConfig,
    *,
    total_steps: int,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    split_generation: SplitGeneration = False,
) -> Assembly:
    """Put ``config``'s method on ``model``, in place, and freeze everything else.

    ``total_steps``: optimizer steps of the run, from which the pruning schedule is derived.
    ``device`` and ``dtype``: of the factors and hypernetworks, whatever the base's; the base may
    still be on the meta device. ``split_generation``: each process of a job generates its share of
    the matrices; "auto" where that takes less than generating all.

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
    layers, stack, owner = attach(
        model, config, device=device, dtype=dtype, split_generation=split_generation
    )
    broadcast_([*owner.state_dict().values(), stack.values])
    allocator = make_allocator(config, stack, total_steps) if config.method.prunes else None
    sampled = None
    if config.sampling is not None:
        sampled = SampledRanks(layers, config.sampling, config.init_rank)
    return Assembly(config, layers, stack, owner, allocator, sampled)
