"""Samples as tensors: padded side by side, or packed with each sample blind to the others."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torchtune.data import padded_collate_sft

from hyper_tune.torchtune.loss import IGNORE_INDEX, cross_entropy_sum, shift_labels

Sample = Mapping[str, Any]


@dataclass(frozen=True)
class Batch:
    """Tokens and shifted labels, each (samples, longest).

    ``places``: of packed samples, which positions see each other, (samples, longest, longest), and
    each token's place in its own sample; arguments of torchtune's decoder, none of padded samples.
    """

    tokens: Tensor
    labels: Tensor
    places: Mapping[str, Tensor] = field(default_factory=dict)

    def logits(self, model: nn.Module) -> Sequence[Tensor]:
        """Return the decoder's logits, in parts along the length."""
        chunks: Sequence[Tensor] = model(self.tokens, **self.places)
        return chunks

    def loss_sum(self, logits: Sequence[Tensor]) -> Tensor:
        """Return the sum of the cross-entropies of the labels; see `cross_entropy_sum`."""
        return cross_entropy_sum(logits, self.labels)

    def label_count(self) -> Tensor:
        """Return how many tokens carry loss, 0-dim."""
        return (self.labels != IGNORE_INDEX).sum()


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device) -> Batch:
    """Return a batch of single samples, padded on the right, or of packs of equal length."""
    if "seq_lens" in samples[0]:
        return _packed(samples, device)
    plain = [{key: sample[key] for key in ("tokens", "labels")} for sample in samples]
    batch = padded_collate_sft(plain, padding_idx=pad_id, ignore_idx=IGNORE_INDEX)
    return Batch(batch["tokens"].to(device), shift_labels(batch["labels"]).to(device))


def _packed(packs: Sequence[Sample], device: torch.device) -> Batch:
    """Return packs of torchtune's `PackedDataset` as a batch; its padding is a sample apart."""
    tokens, labels, positions = (
        torch.stack([pack[key] for pack in packs]) for key in ("tokens", "labels", "input_pos")
    )
    numbers = [
        torch.arange(len(pack["seq_lens"])).repeat_interleave(pack["seq_lens"]) for pack in packs
    ]
    own = torch.stack(numbers)
    # The end of a sample does not predict the start of the next.
    starts = own.diff(prepend=own.new_full((len(packs), 1), -1), dim=1) != 0
    labels = shift_labels(labels.masked_fill(starts, IGNORE_INDEX))
    own = own.to(device)
    mask = (own.unsqueeze(2) == own.unsqueeze(1)).tril()
    return Batch(
        tokens.to(device), labels.to(device), {"mask": mask, "input_pos": positions.to(device)}
    )
