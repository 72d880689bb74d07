"""From records to batches: tokenised conversations whose prompts carry no loss."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchtune.data import Message, padded_collate_sft
from torchtune.datasets import PackedDataset
from tqdm import tqdm

from hyper_tune.errors import UserError
from hyper_tune.records import Conversation, read_records
from hyper_tune.torchtune.components import build
from hyper_tune.torchtune.loss import IGNORE_INDEX, shift_labels

Sample = Mapping[str, Sequence[int]]


class Samples(Protocol):
    """What the recipe asks of a data set: a length, and tokens with labels by position."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """Return ``{"tokens": […], "labels": […]}`` of equal length."""


class FileDataset(Dataset[Sample]):
    """A local JSON or JSONL file of conversations, tokenised when it is opened.

    Only the assistant's turns carry loss, unless ``train_on_input``; the labels of all other
    tokens are -100. See `hyper_tune.records.read_records` for the formats.

    Raises:
        UserError: a file, line or sample that cannot be trained on.
    """

    def __init__(
        self,
        tokenizer: Any,
        path: str,
        format: str = "auto",  # noqa: A002
        *,
        train_on_input: bool = False,
    ) -> None:
        self._path = Path(path)
        self._train_on_input = train_on_input
        self.conversations = read_records(self._path, format)
        progress = tqdm(self.conversations, f"tokenising {self._path.name}", delay=5, leave=False)
        self._samples = [self._tokenise(tokenizer, conversation) for conversation in progress]

    def _tokenise(self, tokenizer: Any, conversation: Conversation) -> Sample:
        turns = messages(conversation, train_on_input=self._train_on_input)
        tokenised = tokenizer({"messages": turns}, inference=False)
        tokens, mask = tokenised["tokens"], tokenised["mask"]
        labels = [
            IGNORE_INDEX if hidden else token for token, hidden in zip(tokens, mask, strict=True)
        ]
        if all(label == IGNORE_INDEX for label in labels[1:]):
            raise UserError(
                f"{self.where(conversation)}: none of the {len(tokens)} tokens is the assistant's, "
                "so there is nothing to learn; raise tokenizer.max_seq_len (and model.max_seq_len, "
                "if the model can read more), or leave the record out."
            )
        return {"tokens": tokens, "labels": labels}

    def where(self, conversation: Conversation) -> str:
        """Name a conversation by file and line, for a message."""
        return f"{self._path}:{conversation.line}"

    def __len__(self) -> int:
        """Return the number of conversations."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """Return the tokens and labels of one conversation."""
        return self._samples[index]

    def digest(self) -> str:
        """Return the SHA-256 of all tokens and labels, in hexadecimal."""
        lists = [[sample["tokens"], sample["labels"]] for sample in self._samples]
        return hashlib.sha256(json.dumps(lists).encode()).hexdigest()

    def refuse_unfit(self, limit: int, vocabulary: int) -> None:
        """Compare with a model that reads ``limit`` tokens of a ``vocabulary``.

        Raises:
            UserError: names the first conversation with more tokens, or one that is unknown.
        """
        for conversation, sample in zip(self.conversations, self._samples, strict=True):
            refuse_unknown_token(self.where(conversation), sample["tokens"], vocabulary)
        lengths = [len(sample["tokens"]) for sample in self._samples]
        long = [position for position, length in enumerate(lengths) if length > limit]
        if long:
            raise UserError(
                f"{self.where(self.conversations[long[0]])}: {lengths[long[0]]} tokens, but the "
                f"model reads at most {limit} ({len(long)} of {len(self)} records are longer); set "
                f"tokenizer.max_seq_len to {limit} to cut them, raise model.max_seq_len if the "
                "model can read more, or leave them out."
            )


class CheckedSamples:
    """A data set of torchtune's, whose samples are compared with the model when they are read."""

    def __init__(self, section: str, samples: Samples, limit: int, vocabulary: int) -> None:
        self._section = section
        self._samples = samples
        self._limit = limit
        self._vocabulary = vocabulary

    def __len__(self) -> int:
        """Return the number of samples."""
        return len(self._samples)

    def __getitem__(self, index: int) -> Sample:
        """Return the tokens and labels of one sample.

        Raises:
            UserError: the sample is longer than the model reads, or has a token that is unknown.
        """
        sample = self._samples[index]
        where = f"{self._section}, sample {index}"
        refuse_unknown_token(where, sample["tokens"], self._vocabulary)
        if len(sample["tokens"]) > self._limit:
            raise UserError(
                f"{where}: {len(sample['tokens'])} tokens, but the model reads at most "
                f"{self._limit}; set tokenizer.max_seq_len to {self._limit} to cut long samples."
            )
        return sample


def open_dataset(
    section: str, component: Mapping[str, Any], tokenizer: Any, *, limit: int, vocabulary: int
) -> Samples:
    """Build a data set of torchtune's or of a file, for a model that reads ``limit`` tokens.

    Raises:
        UserError: it cannot be built, packs several samples into one, or does not fit the model.
    """
    data: Samples = build(section, component, tokenizer)
    if isinstance(data, PackedDataset):
        raise UserError(
            f"{section}.packed is set, but packed samples need a mask per document, which this "
            f"recipe has not: set {section}.packed=False."
        )
    if isinstance(data, FileDataset):
        data.refuse_unfit(limit, vocabulary)
        return data
    return CheckedSamples(section, data, limit, vocabulary)


def refuse_unknown_token(where: str, tokens: Sequence[int], vocabulary: int) -> None:
    """Refuse a token that a model of this vocabulary does not know.

    Raises:
        UserError: names ``where`` and the token.
    """
    if max(tokens) >= vocabulary:
        raise UserError(
            f"{where}: the tokenizer makes token {max(tokens)}, but the model knows 0 to "
            f"{vocabulary - 1}; give the tokenizer that came with the model, and the vocab_size of "
            "its config.json."
        )


def file_dataset(
    tokenizer: Any,
    *,
    path: str,
    format: str = "auto",  # noqa: A002
    train_on_input: bool = False,
) -> FileDataset:
    """Open a local file of records; the ``_component_`` of a configuration's data set."""
    return FileDataset(tokenizer, path, format, train_on_input=train_on_input)


def messages(conversation: Conversation, *, train_on_input: bool = False) -> list[Message]:
    """Turn a conversation into torchtune's messages; the assistant's carry loss, or all."""
    return [
        Message(
            role=turn.role,
            content=turn.content,
            masked=turn.role != "assistant" and not train_on_input,
        )
        for turn in conversation.turns
    ]


def collate(samples: Sequence[Sample], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens and shifted labels, each (samples, longest), padded on the right."""
    samples = [{key: sample[key] for key in ("tokens", "labels")} for sample in samples]
    batch = padded_collate_sft(list(samples), padding_idx=pad_id, ignore_idx=IGNORE_INDEX)
    return batch["tokens"].to(device), shift_labels(batch["labels"]).to(device)
