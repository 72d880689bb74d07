"""Names and row orders of torchtune's modules in the Hugging Face model of the same weights."""

import re
from collections.abc import Callable

from torch import Tensor

_MODULES = {
    "attn.q_proj": "self_attn.q_proj",
    "attn.k_proj": "self_attn.k_proj",
    "attn.v_proj": "self_attn.v_proj",
    "attn.output_proj": "self_attn.o_proj",
    "mlp.w1": "mlp.gate_proj",
    "mlp.w2": "mlp.down_proj",
    "mlp.w3": "mlp.up_proj",
}
# torchtune rotates neighbouring pairs in all but its Qwens, transformers the halves of a head.
_PAIRED_ROTATION = ("LLAMA2", "LLAMA3", "LLAMA3_2", "MISTRAL", "GEMMA")


def hf_module_name(name: str) -> str:
    """Return the Hugging Face module of a torchtune one.

    >>> hf_module_name("layers.3.attn.output_proj")
    'model.layers.3.self_attn.o_proj'
    """
    if name == "output":
        return "lm_head"
    match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _MODULES:
        raise KeyError(f"{name} has no counterpart in a Hugging Face decoder.")
    return f"model.layers.{match[1]}.{_MODULES[match[2]]}"


def output_row_order(
    model_type: str, num_heads: int, num_kv_heads: int
) -> Callable[[str, Tensor], Tensor]:
    """Return what reorders the rows of a LoRA B (out, rank) from torchtune's order to theirs.

    Only the queries and keys of models whose rotation is stored in pairs change; Qwen's do not.
    """
    heads = {"attn.q_proj": num_heads, "attn.k_proj": num_kv_heads}

    def reorder(name: str, b: Tensor) -> Tensor:
        count = next((heads[key] for key in heads if name.endswith(key)), None)
        if count is None or model_type not in _PAIRED_ROTATION:
            return b
        pairs = b.view(count, len(b) // (2 * count), 2, b.shape[1])
        return pairs.transpose(1, 2).flatten(0, 2)

    return reorder
