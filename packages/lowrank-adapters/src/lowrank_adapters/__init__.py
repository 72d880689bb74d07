"""Low-rank adapter layers for any PyTorch model: injection, stacked storage, exchange with PEFT."""

from lowrank_adapters.convert import convert_to_lora_
from lowrank_adapters.disable import disable_adapters
from lowrank_adapters.dora import DoRA, DoRALinear, ScaledLoRALinear
from lowrank_adapters.dylora import DyLoRA, DyLoRALinear, RankSampler, set_rank_
from lowrank_adapters.errors import AdapterError
from lowrank_adapters.exchange.gguf import export_gguf
from lowrank_adapters.exchange.peft.export import export_peft
from lowrank_adapters.exchange.peft.load import import_peft_
from lowrank_adapters.inject import (
    adapted_layers,
    freeze_base_,
    inject_adapters_,
    inside_adapters,
    remove_adapters_,
)
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.lora import LoRA, LoRALinear
from lowrank_adapters.maker import LowRankMaker
from lowrank_adapters.merge import merge_, merged, unmerge_
from lowrank_adapters.meta import materialise_
from lowrank_adapters.penalty import accumulate_orthogonality_gradient_, orthogonality_penalty
from lowrank_adapters.stacked import FactorGroup, FactorStack
from lowrank_adapters.starts import (
    GradientApproximation,
    GradientStep,
    Normal,
    Orthonormal,
    PrincipalActivations,
    PrincipalWeights,
    UnitRows,
)
from lowrank_adapters.state import (
    adapter_state_dict,
    load_adapter_,
    load_adapter_state_dict_,
    save_adapter,
)
from lowrank_adapters.statistics import collect_activations, collect_gradients, start_factors_
from lowrank_adapters.svd import SVD, SVDLinear

__all__ = [
    "SVD",
    "AdapterError",
    "DoRA",
    "DoRALinear",
    "DyLoRA",
    "DyLoRALinear",
    "FactorGroup",
    "FactorStack",
    "GradientApproximation",
    "GradientStep",
    "LoRA",
    "LoRALinear",
    "LowRankLinear",
    "LowRankMaker",
    "Normal",
    "Orthonormal",
    "PrincipalActivations",
    "PrincipalWeights",
    "RankSampler",
    "SVDLinear",
    "ScaledLoRALinear",
    "UnitRows",
    "accumulate_orthogonality_gradient_",
    "adapted_layers",
    "adapter_state_dict",
    "collect_activations",
    "collect_gradients",
    "convert_to_lora_",
    "disable_adapters",
    "export_gguf",
    "export_peft",
    "freeze_base_",
    "import_peft_",
    "inject_adapters_",
    "inside_adapters",
    "load_adapter_",
    "load_adapter_state_dict_",
    "materialise_",
    "merge_",
    "merged",
    "orthogonality_penalty",
    "remove_adapters_",
    "save_adapter",
    "set_rank_",
    "start_factors_",
    "unmerge_",
]
