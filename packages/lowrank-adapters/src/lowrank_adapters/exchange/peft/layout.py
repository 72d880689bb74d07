"""Names and shapes of an adapter's tensors in PEFT's files."""

from torch import Tensor

from lowrank_adapters.maps import ConvolutionMap, EmbeddingMap, Map

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
# AdaLoRA's scaling in PEFT is alpha / (init_r + this).
ADALORA_EPSILON = 1e-5

LORA_A, LORA_B = "lora_A.weight", "lora_B.weight"
EMBEDDING_A, EMBEDDING_B = "lora_embedding_A", "lora_embedding_B"
MAGNITUDE = "lora_magnitude_vector"
# Parameters, not layers: their names have no ".weight".
ADALORA_A, ADALORA_E, ADALORA_B = "lora_A", "lora_E", "lora_B"
PARTS = (LORA_A, LORA_B, EMBEDDING_A, EMBEDDING_B, MAGNITUDE, ADALORA_A, ADALORA_E, ADALORA_B)


def lora_tensors(linear_map: Map, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return A (k, in) and B (out, k) by PEFT's names, in the shapes that it has them in.

    >>> import torch
    >>> from lowrank_adapters.maps import map_of
    >>> convolution = map_of(torch.nn.Conv2d(3, 8, kernel_size=5))
    >>> found = lora_tensors(convolution, torch.zeros(2, 75), torch.zeros(8, 2))
    >>> {name: tuple(tensor.shape) for name, tensor in found.items()}
    {'lora_A.weight': (2, 3, 5, 5), 'lora_B.weight': (8, 2, 1, 1)}
    """
    if isinstance(linear_map, EmbeddingMap):
        return {EMBEDDING_A: a, EMBEDDING_B: b}
    if isinstance(linear_map, ConvolutionMap):
        ones = (1,) * (len(linear_map.kernel) - 1)
        return {LORA_A: a.reshape(-1, *linear_map.kernel), LORA_B: b.reshape(*b.shape, *ones)}
    return {LORA_A: a, LORA_B: b}


def lora_factors(linear_map: Map, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (k, in) and B (out, k), the inverse of `lora_tensors`; shapes are not checked."""
    if isinstance(linear_map, EmbeddingMap):
        return tensors[EMBEDDING_A], tensors[EMBEDDING_B]
    return tensors[LORA_A].flatten(1), tensors[LORA_B].flatten(1)
