"""Puts a method on a model: layers, stacked factors, their owner, the allocator."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hyper_core import HyperError
from hyper_tune.attach import attach, refuse_misuse
from hyper_tune.checks import require
from hyper_tune.errors import UserError
from hyper_tune.factors import FactorOwner
from hyper_tune.method import MethodConfig
from hyper_tune.optimizer_state import load_named_optimizer_state, named_optimizer_state
from hyper_tune.parallel import broadcast_
from hyper_tune.ranks import SampledRanks, draw_seed, make_allocator
from hyper_tune.split import SplitGeneration
from hyper_tune.step import TrainingStep
from hyper_tune.whole import patterns_inside, whole_modules
from lowrank_adapters import FactorStack, LowRankLinear, export_peft
from rank_budget import RankAllocator


class Assembly:
    """A method on a model: what a training loop needs, made by `assemble`.

    The low-rank factors in the model are leaves: their gradients land in one flat buffer, from
    which each step carries them to the trainable parameters, all matrices at once.

    ``layers``: the adapted layers by name, in model order. ``stack``: their factors as stacked
    views of flat buffers. ``owner``: hypernetworks, or the factors themselves. ``allocator``: the
    rank budget, or None. ``sampled``: the ranks that are drawn, or None; between steps all are in
    use. ``modules_to_save``: modules that are trained as a whole beside the factors, by name.
    Saved: owner, masks, allocator, draws and those modules; never the base.
    """

    def __init__(
        self,
        config: MethodConfig,
        layers: Mapping[str, LowRankLinear],
        stack: FactorStack,
        owner: FactorOwner,
        allocator: RankAllocator | None,
        sampled: SampledRanks | None,
        modules_to_save: Mapping[str, nn.Module] | None = None,
    ) -> None:
        self.config = config
        self.layers = layers
        self.stack = stack
        self.owner = owner
        self.allocator = allocator
        self.sampled = sampled
        self.modules_to_save = modules_to_save or {}
        self._whole = [p for module in self.modules_to_save.values() for p in module.parameters()]
        self._parameters = [parameter for _, parameter in self.named_parameters()]

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
        """Return what the optimizer trains: hypernetworks, or the stacked factors themselves, and
        the modules that are trained as a whole.
        """
        return self._parameters

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """Yield `parameters` by name."""
        yield from self.owner.named_parameters()
        for name, module in self.modules_to_save.items():
            yield from module.named_parameters(prefix=f"modules_to_save.{name}")

    def gradients(self) -> list[Tensor]:
        """Return what a step reduces: the factors' flat gradient, and those of whole modules."""
        for parameter in self._whole:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [self.stack.grads, *(p.grad for p in self._whole if p.grad is not None)]

    def broadcast_(self) -> None:
        """Overwrite every rank's factors, owner and whole modules by rank 0's."""
        broadcast_([*self.owner.state_dict().values(), self.stack.values])
        for module in self.modules_to_save.values():
            broadcast_(module.state_dict().values())

    def plan_(self, total_steps: int) -> None:
        """Make the rank budget's schedule for a run of so many optimizer steps."""
        if self.config.method.prunes:
            self.allocator = make_allocator(self.config, self.stack, total_steps)

    def step(
        self,
        optimizer: Optimizer,
        max_grad_norm: float | None = None,
        stop_requested: Callable[[], bool] = lambda: False,
        *,
        reduced: bool = False,
    ) -> TrainingStep:
        """Return the context manager of one optimizer step; see `TrainingStep`.

        ``stop_requested`` is asked once, before the reduction over ranks; the step's report says
        whether it was true on any of them.

        Raises:
            UserError: the method prunes, and was not told of how many steps the run is.
        """
        if self.config.method.prunes and self.allocator is None:
            raise UserError(
                f"{self.config.name} prunes by a schedule, but the number of steps is not known; "
                "give total_steps, or call plan_(total_steps) before the first step; "
                "Trainer does so by callbacks=[adapted.callback()]."
            )
        return TrainingStep(self, optimizer, max_grad_norm, stop_requested, reduced=reduced)

    @torch.no_grad()
    def write_factors_(self) -> None:
        """Write into the model the factors that the next step would use, for evaluation or export.

        A pure function of the saved state: it changes nothing that training depends on.
        """
        self.owner.refresh()

    def state_dict(self, optimizer: Optimizer | None = None) -> dict[str, Any]:
        """Return everything that changes the next step; tensors are live, not copies."""
        whole = {name: dict(m.state_dict()) for name, m in self.modules_to_save.items()}
        return {
            "owner": dict(self.owner.state_dict()),
            "allocator": None if self.allocator is None else self.allocator.state_dict(),
            "sampled": None if self.sampled is None else self.sampled.state_dict(),
            "optimizer": None
            if optimizer is None
            else named_optimizer_state(optimizer, self.named_parameters()),
        } | ({"modules_to_save": whole} if whole else {})

    def load_state_dict(self, state: Mapping[str, Any], optimizer: Optimizer | None = None) -> None:
        """Restore what `state_dict` returned, in place; all of it, or nothing where it is refused.

        For as long as it takes, there is a copy of what was there before.

        Raises:
            ValueError: the state is of another model or method.
        """
        if optimizer is not None and state["optimizer"] is None:
            raise UserError("the saved state has no optimizer; load it without one, or save both.")
        before = copy.deepcopy(self.state_dict(optimizer))
        try:
            self._load(state, optimizer)
        except BaseException:
            self._load(before, optimizer)
            raise

    def _load(self, state: Mapping[str, Any], optimizer: Optimizer | None) -> None:
        try:
            self.owner.load_state_dict(state["owner"])
            for name, module in self.modules_to_save.items():
                module.load_state_dict(state["modules_to_save"][name])
        except (RuntimeError, KeyError, HyperError) as error:
            raise UserError(f"the saved state is of another model or method: {error}") from error
        if optimizer is not None:
            load_named_optimizer_state(optimizer, self.named_parameters(), state["optimizer"])
        # Last: it silences the leaves by the masks, which nothing but the next refresh undoes.
        if self.allocator is not None:
            self.allocator.load_state_dict(state["allocator"])
        if self.sampled is not None:
            self.sampled.load_state_dict(state["sampled"])

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
                modules_to_save=self.modules_to_save,
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
    total_steps: int | None,
    modules_to_save: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    split_generation: SplitGeneration = False,
) -> Assembly:
    """Put ``config``'s method on ``model``, in place, and freeze everything else.

    ``total_steps``: optimizer steps of the run, from which the pruning schedule is derived; None
    where they are not known yet, and `Assembly.plan_` will be called.
    ``modules_to_save``: names of modules that are trained as a whole, such as a classification
    head; nothing in them is adapted.
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
    refuse_misuse(model, config)
    whole = whole_modules(model, modules_to_save)
    layers, stack, owner = attach(
        model,
        config,
        also_exclude=patterns_inside(whole),
        device=device,
        dtype=dtype,
        split_generation=split_generation,
    )
    for module in whole.values():
        module.requires_grad_(True)
    sampled = None
    if config.sampling is not None:
        sampled = SampledRanks(layers, config.sampling, config.init_rank, draw_seed(device))
    method = Assembly(config, layers, stack, owner, None, sampled, whole)
    method.broadcast_()
    if total_steps is not None:
        method.plan_(total_steps)
    return method
