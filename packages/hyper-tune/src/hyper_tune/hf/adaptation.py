"""Puts a method on a model of transformers."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from hyper_tune.assembly import assemble
from hyper_tune.attach import refuse_misuse
from hyper_tune.errors import UserError
from hyper_tune.hf.adapted import AdaptedModel
from hyper_tune.hf.heads import head_names
from hyper_tune.method import MethodConfig
from hyper_tune.whole import whole_modules


def adapt(
    model: nn.Module,
    config: MethodConfig,
    *,
    total_steps: int | None = None,
    modules_to_save: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    move_base: bool = True,
    dtype: torch.dtype = torch.float32,
) -> AdaptedModel:
    """Put a method on a model of transformers, in place, and freeze everything else.

    ``total_steps``: optimizer steps of the run; Trainer's callback says it where it is None.
    ``modules_to_save``: modules that are trained as a whole; by default the head that the model has
    beside its pretrained body, which is none for language models. ``device``: where the model is
    moved first, such as Trainer's ``args.device``. ``move_base``: False leaves the frozen base
    where it is, for `shard_` to move block by block: no device holds all of it. ``dtype``: of the
    factors.

    Raises:
        UserError: a method or module that the model cannot have; or, from the first forward pass,
            a base that ``move_base=False`` left elsewhere and nothing has moved since.

    >>> from transformers import BertConfig, BertForSequenceClassification
    >>> size = BertConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    ...                   num_attention_heads=1)
    >>> adapted = adapt(BertForSequenceClassification(size), MethodConfig("lora", init_rank=2))
    >>> len(adapted.method.layers), list(adapted.method.modules_to_save)
    (7, ['classifier'])
    """
    refuse_misuse(model, config)
    heads = head_names(model) if modules_to_save is None else modules_to_save
    here = next(model.parameters()).device if device is None else device
    here = torch.empty(0, device=here).device  # with its number
    for module in [model] if move_base else whole_modules(model, heads).values():
        module.to(here)
    method = assemble(
        model, config, total_steps=None, modules_to_save=heads, device=here, dtype=dtype
    )
    adapted = AdaptedModel(model, method)
    if not move_base:
        _check_place(adapted)
    if total_steps is not None:
        adapted.plan_(total_steps)
    return adapted


def _check_place(adapted: AdaptedModel) -> None:
    """Let the first forward pass refuse a base that is not where the factors are."""
    there = adapted.method.stack.values.device

    def check(module: nn.Module, inputs: object) -> None:
        del inputs
        for name, parameter in module.named_parameters():
            if parameter.device != there:
                raise UserError(
                    f"{name} is on {parameter.device}, but the factors are on {there}: "
                    "adapt(..., move_base=False) leaves the base for shard_ to move; call "
                    "shard_(adapted, accelerator) before the first forward pass, or leave "
                    "move_base out."
                )
        handle.remove()

    # Before the hook that opens a step.
    disable: Any = torch.compiler.disable
    handle = adapted.model.register_forward_pre_hook(disable(check), prepend=True)
