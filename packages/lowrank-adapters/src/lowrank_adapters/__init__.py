"""Low-rank adapter layers for any PyTorch model: injection, stacked storage, exchange with PEFT."""

from lowrank_adapters.errors import AdapterError
from lowrank_adapters.exchange.peft import export_peft
from lowrank_adapters.inject import freeze_base_, inject_adapters_, inside_adapters
from lowrank_adapters.layer import LowRankLinear
from lowrank_adapters.lora import LoRA, LoRALinear
from lowrank_adapters.penalty import accumulate_orthogonality_gradient_, orthogonality_penalty
from lowrank_adapters.stacked import FactorGroup, FactorStack
from lowrank_adapters.state import (
    adapter_state_dict,
    load_adapter_,
    load_adapter_state_dict_,
    save_adapter,
)
from lowrank_adapters.svd import SVD, SVDLinear

__all__ = [
    "SVD",
    "AdapterError",
    "FactorGroup",
    "FactorStack",
    "LoRA",
    "LoRALinear",
    "LowRankLinear",
    "SVDLinear",
    "accumulate_orthogonality_gradient_",
    "adapter_state_dict",
    "export_peft",
    "freeze_base_",
    "inject_adapters_",
    "inside_adapters",
    "load_adapter_",
    "load_adapter_state_dict_",
    "orthogonality_penalty",
    "save_adapter",
]
