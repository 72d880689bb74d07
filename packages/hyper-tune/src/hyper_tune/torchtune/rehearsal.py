"""A training step on the meta device: every operation with its shapes, and no memory."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torchtune.modules import MultiHeadAttention, TransformerDecoder

from hyper_tune.attach import attach
from hyper_tune.errors import UserError
from hyper_tune.factors import FactorOwner, PartlyGenerated
from hyper_tune.memory import LiveMemory
from hyper_tune.plan import Rehearsal
from hyper_tune.ranks import SampledRanks
from hyper_tune.split import GenerationCost, SharedGeneration
from hyper_tune.torchtune.base_model import OUTPUT_CHUNKS, build_on_meta, prepare_
from hyper_tune.torchtune.components import build
from hyper_tune.torchtune.loss import cross_entropy_sum
from hyper_tune.torchtune.nf4 import quantisable, quantise_on_meta_
from hyper_tune.torchtune.optimization import try_optimizer
from hyper_tune.torchtune.settings import RecipeSettings
from lowrank_adapters import FactorStack, LowRankLinear, accumulate_orthogonality_gradient_

META = torch.device("meta")


def longest_sample(settings: RecipeSettings) -> int:
    """Return the most tokens of a sample: where it is cut, or what the model reads."""
    cut = settings.tokenizer.get("max_seq_len")
    return int(cut) if cut else int(build_on_meta(settings).max_seq_len)


def rehearse(settings: RecipeSettings, length: int) -> Rehearsal:
    """Carry out a step of samples of ``length`` tokens on one process, and measure it.

    The model, the layers, the hypernetworks and the optimizer are those of a run; attention is
    counted as flash attention, which does not keep its scores. Without compilation.

    Raises:
        UserError: a component cannot be built, or the model does not read so many tokens.
    """
    built = _build(settings, length)
    stack, owner = built.stack, built.owner
    buffers = [buffer for _, buffer in built.model.named_buffers() if buffer.numel()]
    own = {id(b): b for layer in built.layers.values() for b in layer.buffers(recurse=False)}
    trained = [parameter for _, parameter in owner.named_parameters()]
    # Learned factors are views of the stack, which is counted by itself.
    hypernetworks = [t for t in owner.state_dict().values() if not _shares(t, stack.values)]
    held = [*built.model.parameters(), *buffers, *hypernetworks, stack.values, stack.grads]
    peak = _measure(built, settings, length, held)
    return Rehearsal(
        blocks=built.blocks,
        root=built.root,
        buffers=[buffer for buffer in buffers if id(buffer) not in own],
        factors=stack.values.numel(),
        hypernetworks=sum(p.numel() for p in trained if not _shares(p, stack.values)),
        generation=_generation_cost(owner),
        split=settings.split_generation,
        offload=settings.fsdp_cpu_offload,
        held={
            "factors": stack.values.nbytes + sum(buffer.nbytes for buffer in own.values()),
            "factor gradients": stack.grads.nbytes,
            "hypernetworks and their state": sum(tensor.nbytes for tensor in hypernetworks),
        },
        peak={part: peak.get(part, 0) for part in _PARTS},
    )


@dataclass(frozen=True)
class _Built:
    """What a run builds; ``blocks`` and ``root`` are the base's parameters, by where they lie."""

    model: TransformerDecoder
    blocks: list[list[nn.Parameter]]
    root: list[nn.Parameter]
    layers: Mapping[str, LowRankLinear]
    stack: FactorStack
    owner: FactorOwner


def _build(settings: RecipeSettings, length: int) -> _Built:
    """Put the method on the model, as a run does on one process."""
    model = build_on_meta(settings)
    if length > model.max_seq_len:
        raise UserError(
            f"samples of {length} tokens are planned, but the model reads {model.max_seq_len}; "
            "give a --length up to that."
        )
    if settings.quantize_base:
        quantise_on_meta_(quantisable(model).values())
    blocks = [list(layer.parameters()) for layer in model.layers]
    in_blocks = {id(parameter) for block in blocks for parameter in block}
    root = [parameter for parameter in model.parameters() if id(parameter) not in in_blocks]
    with META:
        layers, stack, owner = attach(model, settings.method, device=META)
        if settings.method.sampling is not None:
            # It makes one of the layers' masks.
            SampledRanks(layers, settings.method.sampling, settings.method.init_rank, seed=0)
    alone = replace(
        settings,
        compile=False,
        fsdp_cpu_offload=False,
        data_parallel_shard_dim=-1,
        data_parallel_replicate_dim=1,
    )
    prepare_(model, alone, [], META)
    _make_runnable_(model)
    for layer in layers.values():
        layer.waiting = False  # for the base's values, which nothing here reads
    return _Built(model, blocks, root, layers, stack, owner)


def _measure(
    built: _Built, settings: RecipeSettings, length: int, held: Sequence[Tensor]
) -> Mapping[str, int]:
    """Return the most bytes of each phase of a step, beside those of ``held``."""
    optimizer = _optimizer(settings, [p for _, p in built.owner.named_parameters()])
    with LiveMemory(held) as memory, warnings.catch_warnings():
        # Which kernels are used is of no interest here.
        warnings.simplefilter("ignore", UserWarning)
        # The first update makes the optimizer's state, which the forward pass of the next has with
        # it.
        _update(memory, built, optimizer, settings)
        _forward_and_backward(memory, built, settings.batch_size, length)
        _update(memory, built, optimizer, settings, refresh=False)
    peak: Mapping[str, int] = memory.peak
    return peak


def _generation_cost(owner: FactorOwner) -> GenerationCost | None:
    generated = owner.generated if isinstance(owner, PartlyGenerated) else owner
    return GenerationCost.of(generated) if isinstance(generated, SharedGeneration) else None


_PARTS = (
    *("optimizer", "generated factors, kept for their gradients", "hypernetwork gradients"),
    *("activations", "logits and loss", "backward pass"),
)


def _shares(tensor: Tensor, other: Tensor) -> bool:
    return bool(tensor.untyped_storage()._cdata == other.untyped_storage()._cdata)


def _make_runnable_(model: TransformerDecoder) -> None:
    """Give the decoder what it needs to run without memory."""
    model.set_num_output_chunks(OUTPUT_CHUNKS)
    model.train()
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            module._attention_call = _flash_attention
        if hasattr(module, "rope_init"):
            with torch.device("cpu"):
                module.rope_init()
            module.to(META)


def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool
) -> Tensor:
    # Left to itself, the meta device keeps the whole matrix of scores, as no GPU does.
    del mask
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    output: Tensor = flash(q, k, v, dropout_p, is_causal)[0]
    return output


def _optimizer(settings: RecipeSettings, trained: Sequence[Tensor]) -> Optimizer:
    # One fused kernel, or one captured, computes the same and keeps the same, but not here.
    component = {k: v for k, v in settings.optimizer.items() if k not in ("fused", "capturable")}
    try_optimizer(component, torch.zeros(1))
    optimizer: Optimizer = build("optimizer", component, list(trained))
    return optimizer


def _forward_and_backward(memory: LiveMemory, built: _Built, batch_size: int, length: int) -> None:
    memory.phase = "generated factors, kept for their gradients"
    built.owner.refresh()
    memory.phase = "activations"
    tokens = torch.zeros(batch_size, length, dtype=torch.long, device=META)
    labels = torch.zeros_like(tokens)

    def after_the_layers(*_: object) -> None:
        memory.phase = "logits and loss"

    handle = built.model.get_submodule("norm").register_forward_hook(after_the_layers)
    loss = cross_entropy_sum(built.model(tokens), labels)
    handle.remove()
    memory.phase = "backward pass"
    torch.autograd.backward(loss)


def _update(
    memory: LiveMemory,
    built: _Built,
    optimizer: Optimizer,
    settings: RecipeSettings,
    *,
    refresh: bool = True,
) -> None:
    """Do what a step does outside the model, on the gradients that are there."""
    owner, stack = built.owner, built.stack
    memory.phase = "hypernetwork gradients"
    if refresh:
        owner.refresh()
    if settings.method.orthogonality is not None:
        groups = [group for group in stack.groups if group.role in ("p", "q")]
        accumulate_orthogonality_gradient_(groups, settings.method.orthogonality)
    owner.backward()
    memory.phase = "optimizer"
    optimizer.step()
    owner.commit()
    optimizer.zero_grad()
    stack.bind_grads_()
