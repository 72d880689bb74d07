"""A model of transformers with a method on it, kept right by hooks in whatever loop drives it."""

import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hyper_tune.assembly import Assembly
from hyper_tune.checks import require_number
from hyper_tune.errors import PERSONS_MISTAKES, UserError
from hyper_tune.hf.heads import ignores_count, task_type
from hyper_tune.hf.optimizer import MethodOptimizer, build_inner
from hyper_tune.hf.saved import STATE, is_packed, read_state, unpack, write_state
from hyper_tune.step import StepReport, TrainingStep

if TYPE_CHECKING:
    from hyper_tune.hf.callback import MethodCallback

_CHECKPOINT = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-\d+")


class AdaptedModel:
    """A model with a method on it, for `transformers.Trainer`, accelerate, or a loop of torch's.

    A step begins with the first forward pass that records gradients, and ends with
    ``optimizer.step()``; between them run as many forward and backward passes as you like. A
    forward pass without gradients sees the factors that the next step would use. The penalty is in
    the gradient and never in a loss.

    ``model``: it was changed in place. ``method``: the `Assembly` on it. ``report``: of the last
    step. ``steps``: how many were taken; ``skipped``: how many more were not finite.
    ``max_grad_norm``: what the gradient of everything that is trained is clipped to, or None.
    ``reduced``: whether a wrapper such as `DistributedDataParallel` averages the gradients, so that
    a step need not; it may, since means of equal gradients are these.

    ``model.save_pretrained`` writes the adapter in PEFT's layout and nothing of the base. In a
    checkpoint folder of Trainer it writes ``model.safetensors`` too: everything that changes the
    next step but the optimizer's averages, which Trainer saves; ``model.load_state_dict`` takes it.
    """

    def __init__(self, model: nn.Module, method: Assembly) -> None:
        self.model = model
        self.method = method
        self.report: StepReport | None = None
        self.steps = 0
        self.skipped = 0
        self.max_grad_norm: float | None = None
        self.reduced = False
        self.total_steps: int | None = None
        self.optimizer: MethodOptimizer | None = None
        self._step: TrainingStep | None = None
        self._stale = True
        self._restored = False
        untyped: Any = model
        disable: Any = torch.compiler.disable
        untyped.register_forward_pre_hook(disable(self._before_forward))
        untyped.register_load_state_dict_pre_hook(self._before_loading)
        untyped.register_load_state_dict_post_hook(self._after_loading)
        untyped.to = self._to
        if ignores_count(model):
            # Trainer would multiply the loss by the number of micro-batches and processes.
            untyped.accepts_loss_kwargs = False
        if hasattr(model, "save_pretrained"):
            untyped.save_pretrained = self.save_pretrained

    @property
    def sharded(self) -> bool:
        """Whether the base is in shards; see `shard_`."""
        return isinstance(self.model, FSDPModule)

    def optimizers(
        self,
        lr: float,
        *,
        head_lr: float | None = None,
        optimizer: type[Optimizer] = torch.optim.AdamW,
        max_grad_norm: float | None = None,
        **options: Any,
    ) -> tuple[MethodOptimizer, None]:
        """Return the optimizer, and None for the scheduler: the pair that Trainer takes.

        ``lr``: of the hypernetworks, or of the factors. ``head_lr``: of the modules that are
        trained as a whole; ``lr`` where it is None. ``max_grad_norm``: set by the callback where
        Trainer drives. ``options``: of ``optimizer``.

        Raises:
            UserError: a learning rate that is none, or options that ``optimizer`` refuses.

        >>> # trainer = Trainer(model, args, callbacks=[adapted.callback()],
        >>> #                   optimizers=adapted.optimizers(lr=1e-4, head_lr=1e-3))
        """
        require_number("lr", lr, least=0)
        require_number("head_lr", lr if head_lr is None else head_lr, least=0)
        owner = [parameter for _, parameter in self.method.owner.named_parameters()]
        groups = [{"params": owner, "lr": lr}]
        heads = [p for m in self.method.modules_to_save.values() for p in m.parameters()]
        if heads:
            groups.append({"params": heads, "lr": lr if head_lr is None else head_lr})
        self.max_grad_norm = max_grad_norm
        self.optimizer = MethodOptimizer(build_inner(optimizer, groups, options), self)
        return self.optimizer, None

    def callback(self, *, max_skipped_steps: int = 5) -> "MethodCallback":
        """Return what Trainer's ``callbacks`` needs; see `MethodCallback`."""
        from hyper_tune.hf.callback import MethodCallback

        return MethodCallback(self, max_skipped_steps=max_skipped_steps)

    def plan_(self, total_steps: int) -> None:
        """Make the pruning schedule for a run of so many steps, unless there is one.

        Raises:
            UserError: a schedule that would prune nothing in so few steps.
        """
        if self.total_steps is not None:
            return
        self.method.plan_(total_steps)
        self.total_steps = total_steps
        allocator, config = self.method.allocator, self.method.config
        if allocator is None or config.budget is None or config.pruning is None:
            return
        if (
            allocator.schedule.live_ranks(total_steps - 1)
            == self.method.total_ranks
            > round(config.budget * len(self.method.layers))
        ):
            raise UserError(
                f"{config.name} would prune nothing in {total_steps} steps: method.pruning."
                f"interval is {config.pruning.interval}; lower it, or train for longer."
            )

    def finish_step(self) -> None:
        """Do what ends a step, in the order of `TrainingStep`.

        Raises:
            UserError: no forward pass with gradients was run since the last step.
        """
        if self._step is None:
            raise UserError(
                "optimizer.step() was called, but the model has run no forward pass with gradients "
                "since the last step; call the model itself, not a copy or a part of it."
            )
        step, self._step, self._stale = self._step, None, True
        step.__exit__(None, None, None)
        self.report = step.report
        if step.report.finite:
            self.steps += 1
        else:
            self.skipped += 1

    def write_factors_(self) -> None:
        """Write the factors that the next step would use; nothing while a step is under way."""
        if self._stale and self._step is None:
            self.method.write_factors_()
            self._stale = False

    def _before_forward(self, module: nn.Module, inputs: Any) -> None:
        del module, inputs
        if self.optimizer is None or not torch.is_grad_enabled():
            self.write_factors_()
        elif self._step is None:
            self._step = self.method.step(
                self.optimizer.inner, self.max_grad_norm, reduced=self.reduced
            )
            self._step.__enter__()
        else:
            # Whoever sets gradients to None drops them; the views take their place again.
            self.method.stack.bind_grads_()

    def _to(self, *where: Any, **options: Any) -> nn.Module:
        """Stand for ``model.to``: the factors are views of one buffer and cannot be moved."""
        parse: Any = torch._C._nn._parse_to
        device, dtype, *_ = parse(*where, **options)
        here = self.method.stack.values.device
        there = here if device is None else device
        # Torch copies a tensor to "cpu:0", though it is there.
        anywhere = there.type == "cpu" or there.index in (None, here.index)
        if there.type == here.type and anywhere and dtype is None:
            return self.model
        raise UserError(
            f"the model was to be moved or cast to {device or dtype} with a method on it; do so "
            "before the method is put on it: adapt(model, config, device=args.device)."
        )

    def export(self, folder: str | Path) -> Path:
        """Write the adapter in PEFT's layout, with the modules that are trained as a whole.

        Raises:
            UserError: a step is under way that has gradients already.
        """
        self._end_idle_step()
        named = getattr(getattr(self.model, "config", None), "name_or_path", "") or None
        return self.method.export(
            folder, base_model_name_or_path=named, task_type=task_type(self.model)
        )

    def _end_idle_step(self) -> None:
        if self._step is None:
            return
        if bool(self.method.stack.grads.any()):
            raise UserError(
                "a step is under way, whose gradients an export would lose; call optimizer.step() "
                "first, or optimizer.zero_grad() to drop them."
            )
        step, self._step, self._stale = self._step, None, True
        step.__exit__(UserError, None, None)  # as an error in its block would: nothing is committed

    def save_pretrained(
        self, save_directory: str | Path, is_main_process: bool = True, **options: Any
    ) -> None:
        """Write the adapter's files into a folder; in a checkpoint of Trainer also the state.

        Other files of the folder stay. What ``options`` say of the base's files has no effect.

        Raises:
            UserError: ``push_to_hub``; call ``trainer.push_to_hub()`` or ``model.push_to_hub()``.
        """
        if options.get("push_to_hub"):
            raise UserError("save_pretrained(push_to_hub=True) is not offered; use push_to_hub().")
        if not is_main_process:
            return
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="_adapter-") as temporary:
            for path in self.export(Path(temporary) / "adapter").iterdir():
                path.replace(folder / path.name)
        if _CHECKPOINT.fullmatch(folder.name):
            self.save(folder)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that changes the next step, but the optimizer's averages."""
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "total_steps": self.total_steps,
            "method": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; a step under way is dropped.

        Raises:
            UserError: it is of another model or method, or of a run of another length; the state
                is what it was.
        """
        total = state["total_steps"]
        if self.total_steps is not None and total != self.total_steps:
            raise UserError(
                f"the checkpoint is of a run of {total} steps, and this one has "
                f"{self.total_steps}; its pruning would be another. Train for {total} steps."
            )
        if self._step is not None:
            step, self._step = self._step, None
            step.__exit__(UserError, None, None)
        before = self.total_steps, self.method.allocator
        try:
            if total is not None:
                self.plan_(total)
            self.method.load_state_dict(state["method"])
        except BaseException:
            self.total_steps, self.method.allocator = before
            raise
        self.steps, self.skipped = state["steps"], state["skipped"]
        self._stale = True

    def save(self, folder: str | Path) -> None:
        """Write the state as ``model.safetensors``, whole or not at all."""
        write_state(Path(folder), self.state_dict())

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote.

        Raises:
            UserError: there is no such file, it is damaged, or of another model or method.
        """
        path = Path(folder) / STATE
        state = read_state(path)
        try:
            self.load_state_dict(state)
        except PERSONS_MISTAKES as error:
            raise UserError(f"{path}: {error}") from error

    def _before_loading(self, module: nn.Module, tensors: dict[str, Any], *rest: Any) -> None:
        del module, rest
        packed = {name: tensors.pop(name) for name in list(tensors) if is_packed(name)}
        self._restored = bool(packed)
        if packed:
            self.load_state_dict(unpack(packed))

    def _after_loading(self, module: nn.Module, keys: Any) -> None:
        del module
        if self._restored:
            keys.missing_keys.clear()  # the base has not been trained, and was not saved
            self._restored = False
