"""Puts a method's layers, stacked factors and their owner on a model."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hyper_tune.errors import UserError
from hyper_tune.factors import FactorOwner, LearnedFactors, PartlyGenerated
from hyper_tune.method import HypernetworkSettings, MethodConfig
from hyper_tune.ranks import budgeted_ranks
from hyper_tune.split import SharedGeneration, SplitGeneration
from lowrank_adapters import (
    SVD,
    DoRA,
    DyLoRA,
    FactorGroup,
    FactorStack,
    LoRA,
    LowRankLinear,
    freeze_base_,
    inject_adapters_,
)

# What a hypernetwork never writes: numbers that are no rank's, and that start at the base's.
_LEARNED_DIRECTLY = ("magnitude", "scale")
_ZERO_AT_START = ("lam", "b")


def refuse_misuse(model: object, config: object) -> None:
    """Refuse what is no model or no configuration, before anything is changed or moved.

    >>> refuse_misuse(nn.Linear(2, 2), MethodConfig("hyperlora"))
    """
    if not isinstance(model, nn.Module):
        kind = type(model).__name__
        raise UserError(f"model is of the type {kind}, expected a torch module; give it first.")
    if isinstance(config, MethodConfig):
        return
    if isinstance(config, str):
        given, call = repr(config), f"MethodConfig({config!r})"
    elif isinstance(config, Mapping):
        given, call = "a dictionary", "MethodConfig.from_mapping(...)"
    else:
        given, call = f"of the type {type(config).__name__}", 'MethodConfig("hyperadalora")'
    raise UserError(f"config is {given}, expected a MethodConfig; write {call}.")


def attach(
    model: nn.Module,
    config: MethodConfig,
    *,
    also_exclude: Sequence[str] = (),
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    split_generation: SplitGeneration = False,
) -> tuple[dict[str, LowRankLinear], FactorStack, FactorOwner]:
    """Put layers, stacked factors and their owner on ``model``, in place, and freeze the rest.

    ``also_exclude``: patterns beside the config's, for modules that are trained as a whole.

    All that trains, without what becomes of the ranks: it also works where ``device`` is meta.

    Raises:
        ValueError: targets that match nothing, a rank above a matrix's, a budget without a rank.
    """
    layers = inject_adapters_(
        model,
        layer_maker(config),
        config.target_modules,
        exclude=[*config.exclude, *also_exclude],
        device=device,
        factor_dtype=dtype,
    )
    freeze_base_(model)
    stack = FactorStack(layers)
    if config.method.prunes:
        budgeted_ranks(config, stack)  # refuses one that leaves none
    return layers, stack, _make_owner(config, stack, split_generation)


def layer_maker(config: MethodConfig) -> LoRA | SVD | DoRA | DyLoRA:
    """Return what makes the method's layers.

    >>> layer_maker(MethodConfig("dora", init_rank=2))
    DoRA(rank=2, alpha=2.0, rslora=False, dropout=0.0, start=UnitRows(), magnitude='rows', \
detach_norm=True)
    """
    rank, alpha = config.init_rank, float(config.alpha or 0)
    if config.magnitude is not None:
        detach = config.magnitude.detach_norm is not False
        return DoRA(rank, alpha, magnitude=config.magnitude.form, detach_norm=detach)
    if config.sampling is not None:
        return DyLoRA(rank, alpha, frozen=config.sampling.frozen)
    return SVD(rank, alpha) if config.method.layer == "svd" else LoRA(rank, alpha)


def _make_owner(
    config: MethodConfig, stack: FactorStack, split_generation: SplitGeneration
) -> FactorOwner:
    settings = config.hypernetwork
    if settings is None:
        return LearnedFactors(stack.groups)
    written = [group for group in stack.groups if group.role not in _LEARNED_DIRECTLY]
    generated = _generated(settings, written)
    generated.share_(split_generation)
    if len(written) == len(stack.groups):
        return generated
    learned = [group for group in stack.groups if group.role in _LEARNED_DIRECTLY]
    return PartlyGenerated(generated, LearnedFactors(learned))


def _generated(settings: HypernetworkSettings, groups: list[FactorGroup]) -> SharedGeneration:
    leaves: dict[str, list[Tensor]] = {}
    labels: dict[str, list[str]] = {}
    for group in groups:
        leaves.setdefault(group.role, []).append(group.values)
        labels.setdefault(group.role, []).extend(name.rpartition(".")[2] for name in group.names)
    zero = [role for role in leaves if role in _ZERO_AT_START]
    return SharedGeneration(
        leaves,
        config=settings.config,
        sharing=labels if settings.sharing == "groups" else settings.sharing,
        outputs={role: settings.outputs for role in leaves if role not in zero},
        state=settings.state,
        relaxation=settings.relaxation or 0.5,
        zero_start=zero,
        gradient_normalisation=settings.gradient_normalisation,
        gradient_decay=0.99 if settings.gradient_decay is None else settings.gradient_decay,
        embeddings=settings.embeddings,
        body_dtype=torch.bfloat16 if settings.dtype == "bf16" else None,
    )
