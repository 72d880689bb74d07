"""From records to samples: tokenised conversations whose prompts carry no loss."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset
from torchtune.data import Message
from tqdm import tqdm

from hyper_tune.errors import UserError
from hyper_tune.records import SUFFIXES, Turn, data_files, read_records
from hyper_tune.torchtune.batches import Sample
from hyper_tune.torchtune.loss import IGNORE_INDEX


class FileDataset(Dataset[Sample]):
    """A local file of conversations, or a folder of such files, tokenised when it is opened.

    Files are ``.jsonl``, ``.json``, ``.csv`` or ``.parquet``; those of a folder are taken by name,
    its subfolders are not. Only the assistant's turns carry loss, unless ``train_on_input``; the
    labels of all other tokens are -100. See `hyper_tune.records.read_records` for the formats.

    Raises:
        UserError: a folder without files, or a file, line or sample that cannot be trained on.
    """

    def __init__(
        self,
        tokenizer: Any,
        path: str,
        format: str = "auto",  # noqa: A002
        *,
        train_on_input: bool = False,
    ) -> None:
        conversations = [
            (f"{file}:{conversation.line}", conversation.turns)
            for file in _files(Path(path))
            for conversation in read_records(file, format)
        ]
        self._places = [where for where, _ in conversations]
        self._samples = [
            tokenise(tokenizer, where, turns, train_on_input=train_on_input)
            for where, turns in tqdm(conversations, f"tokenising {path}", delay=5, leave=False)
        ]

    def where(self, index: int) -> str:
        """Name a conversation by file and line, for a message."""
        return self._places[index]

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
        for where, sample in zip(self._places, self._samples, strict=True):
            refuse_unknown_token(where, sample["tokens"], vocabulary)
        lengths = [len(sample["tokens"]) for sample in self._samples]
        long = [position for position, length in enumerate(lengths) if length > limit]
        if long:
            raise UserError(
                f"{self.where(long[0])}: {lengths[long[0]]} tokens, but the model reads at most "
                f"{limit} ({len(long)} of {len(self)} records are longer); set "
                f"tokenizer.max_seq_len to {limit} to cut them, raise model.max_seq_len if the "
                "model can read more, or leave them out."
            )


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = data_files(path)
    if not files:
        raise UserError(f"{path} is a folder without files of records ({', '.join(SUFFIXES)}).")
    return files


def tokenise(
    tokenizer: Any, where: str, turns: Sequence[Turn], *, train_on_input: bool = False
) -> Sample:
    """Return the tokens and labels of a conversation in the model's chat format.

    Raises:
        UserError: it is cut before anything that carries loss; names ``where``.
    """
    given = {"messages": messages(turns, train_on_input=train_on_input)}
    tokenised = tokenizer(given, inference=False)
    tokens, mask = tokenised["tokens"], tokenised["mask"]
    labels = [IGNORE_INDEX if hidden else token for token, hidden in zip(tokens, mask, strict=True)]
    if all(label == IGNORE_INDEX for label in labels[1:]):
        raise UserError(
            f"{where}: none of the {len(tokens)} tokens is the assistant's, "
            "so there is nothing to learn; raise tokenizer.max_seq_len (and model.max_seq_len, "
            "if the model can read more), or leave the record out."
        )
    return {"tokens": tokens, "labels": labels}


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
    """Open a local file or folder of records; the ``_component_`` of a configuration's data set."""
    return FileDataset(tokenizer, path, format, train_on_input=train_on_input)


def messages(turns: Sequence[Turn], *, train_on_input: bool = False) -> list[Message]:
    """Turn a conversation into torchtune's messages; the assistant's carry loss, or all."""
    return [
        Message(
            role=turn.role,
            content=turn.content,
            masked=turn.role != "assistant" and not train_on_input,
        )
        for turn in turns
    ]
