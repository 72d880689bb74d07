"""Names and shapes of an adapter's tensors in PEFT's files."""

from collections.abc import Mapping

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


def lora_parts(linear_map: Map) -> tuple[str, str]:
    """Return the names that A and B have in PEFT for a kind of module."""
    if isinstance(linear_map, EmbeddingMap):
        return EMBEDDING_A, EMBEDDING_B
    return LORA_A, LORA_B


def lora_tensors(linear_map: Map, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """Return A (k, in) and B (out, k) by PEFT's names, in the shapes that it has them in.

    >>> import torch
    >>> from lowrank_adapters.maps import map_of
    >>> convolution = map_of(torch.nn.Conv2d(3, 8, kernel_size=5))
    >>> found = lora_tensors(convolution, torch.zeros(2, 75), torch.zeros(8, 2))
    >>> {name: tuple(tensor.shape) for name, tensor in found.items()}
    {'lora_A.weight': (2, 3, 5, 5), 'lora_B.weight': (8, 2, 1, 1)}
    """
    if isinstance(linear_map, ConvolutionMap):
        ones = (1,) * (len(linear_map.kernel) - 1)
        a, b = a.reshape(-1, *linear_map.kernel), b.reshape(*b.shape, *ones)
    return dict(zip(lora_parts(linear_map), (a, b), strict=True))


def lora_factors(linear_map: Map, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Return A (k, in) and B (out, k), the inverse of `lora_tensors`; shapes are not checked."""
    a, b = (tensors[part] for part in lora_parts(linear_map))
    if isinstance(linear_map, ConvolutionMap):
        a, b = a.flatten(1), b.flatten(1)
    return a, b
