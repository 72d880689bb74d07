"""The base's weights in torchtune's names and row orders, one tensor at a time."""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torchtune.models.convert_weights import hf_to_tune
from torchtune.models.gemma2._convert_weights import gemma2_hf_to_tune
from torchtune.models.phi3._convert_weights import phi3_hf_to_tune
from torchtune.models.qwen2._convert_weights import qwen2_hf_to_tune

Weights = dict[str, Tensor]
Conversion = Callable[[Weights], Weights]


class WeightFiles:
    """A checkpoint of safetensors files, of which one tensor is in memory at a time.

    torchtune's checkpointer reads all files whole, on each process. The conversion here is its
    own, tensor by tensor; tensors that it splits or drops are those of their one source.

    ``folder``: holds ``files`` and Hugging Face's config.json. ``model_type``: as torchtune's
    checkpointer takes it.
    """

    def __init__(self, folder: Path, files: list[str], model_type: str) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        self._convert = _conversion(model_type, config)
        self._paths = [folder / name for name in sorted(files)]

    def _converted(self, sources: Weights) -> Weights:
        try:
            return self._convert(sources)
        except Exception as error:  # torchtune's, of no class, for a name that it does not know
            raise ValueError(str(error)) from error

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shape of every converted tensor, from the headers of the files."""
        found: dict[str, tuple[int, ...]] = {}
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                sources = {
                    name: torch.empty(file.get_slice(name).get_shape(), device="meta")
                    for name in file.keys()  # noqa: SIM118
                }
            found |= {name: tuple(t.shape) for name, t in self._converted(sources).items()}
        return found

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every converted tensor with its name.

        Its memory may be the file's: copy what is to be kept. Rows that are never read are not
        fetched from the disk, unless the conversion reorders them.
        """
        for path in self._paths:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
            for name in names:
                # What was read stays in the process's memory until the file is closed.
                with safe_open(path, framework="pt") as file:
                    converted = self._converted({name: file.get_tensor(name)})
                yield from converted.items()


def _conversion(model_type: str, config: Mapping[str, Any]) -> Conversion:
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "dim": config["hidden_size"]}
    if model_type in ("PHI3_MINI", "PHI4"):
        sizes = sizes if heads != kv_heads else dict.fromkeys(sizes)
        return lambda weights: phi3_hf_to_tune(weights, **sizes)
    if model_type == "QWEN2":
        tied = config.get("tie_word_embeddings", False)
        return lambda weights: qwen2_hf_to_tune(weights, tie_word_embeddings=tied, **sizes)
    convert = gemma2_hf_to_tune if model_type == "GEMMA2" else hf_to_tune
    head_dim = config.get("head_dim")
    return lambda weights: convert(weights, head_dim=head_dim, **sizes)
