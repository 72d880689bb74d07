"""What a run trains on and is measured on: opened, checked, packed, and put in order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.data import Subset
from torchtune.datasets import PackedDataset

from hyper_tune.checks import require
from hyper_tune.errors import UserError
from hyper_tune.sampling import derive_seed, sample_at
from hyper_tune.torchtune.batches import Sample
from hyper_tune.torchtune.data import FileDataset, refuse_unknown_token
from hyper_tune.torchtune.loading import build_dataset, columns_of
from hyper_tune.torchtune.settings import TOKENIZER_FILES, Component, RecipeSettings
from hyper_tune.torchtune.streaming import StreamedDataset, StreamOrder


class Samples(Protocol):
    """A data set: a length, and tokens with labels by position."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int) -> Sample:
        """Return ``{"tokens": […], "labels": […]}`` of equal length."""


class Order(Protocol):
    """The endless stream of epochs that a run trains on, by position from 0."""

    def at(self, position: int) -> Sample:
        """Return the sample at a position."""


@dataclass(frozen=True)
class Permuted:
    """Each epoch a permutation of all samples, of ``seed`` and the epoch alone; or as they are."""

    samples: Samples
    seed: int
    shuffle: bool

    def at(self, position: int) -> Sample:
        """Return the sample at a position."""
        size = len(self.samples)
        index = sample_at(position, dataset_size=size, seed=self.seed, shuffle=self.shuffle)
        return self.samples[index]


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

    def __iter__(self) -> Iterator[Sample]:
        """Yield all samples in their order."""
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Sample:
        """Return the tokens and labels of one sample.

        Raises:
            UserError: a column is missing or of another form, or the sample is longer than the
                model reads, or has a token that is unknown.
        """
        where = f"{self._section}, sample {index}"
        sample = self._read(where, index)
        refuse_unknown_token(where, sample["tokens"], self._vocabulary)
        if len(sample["tokens"]) > self._limit:
            raise UserError(
                f"{where}: {len(sample['tokens'])} tokens, but the model reads at most "
                f"{self._limit}; set tokenizer.max_seq_len to {self._limit} to cut long samples."
            )
        return sample

    def _read(self, where: str, index: int) -> Sample:
        try:
            return self._samples[index]
        except KeyError as error:
            there = columns_of(self._samples)
            if error.args[0] in there or not there:
                raise UserError(f"{where}: {error} is not understood.") from error
            raise UserError(
                f"{where}: there is no column {error}; there are {', '.join(there)}. Name the "
                f"columns to read by {self._section}.column_map, or conversation_column of chats."
            ) from error
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{where}: {' '.join(str(error).split())}.") from error


@dataclass(frozen=True)
class TrainingData:
    """What a run trains on and is measured on.

    ``order``: the samples to train on, by position. ``size``: how many there are; None of a stream.
    ``held_out``: samples for the loss, or None. ``content``: what the samples are, for comparison:
    the digest of a file's tokens, or else the settings by which they are found and cut.
    """

    order: Order
    size: int | None
    held_out: Samples | None
    content: Any


def open_training_data(
    settings: RecipeSettings, tokenizer: Any, *, limit: int, vocabulary: int
) -> TrainingData:
    """Open ``dataset`` and what is held out, for a model that reads ``limit`` tokens.

    Raises:
        UserError: data that cannot be opened or do not fit the model.
    """
    model = {"limit": limit, "vocabulary": vocabulary}
    section, seed, shuffle = settings.dataset, settings.seed, settings.shuffle
    built = _build("dataset", section, tokenizer)
    content: Any = {**section, "tokenizer": _without_files(settings.tokenizer)}
    held_out = None
    if settings.dataset_val is not None:
        held_out = _held_out(settings.dataset_val, tokenizer, **model)
    if isinstance(built, StreamedDataset):
        if settings.validation_fraction is not None:
            raise UserError(
                "validation_fraction is set, but dataset is a stream, whose size is not known: "
                "give dataset_val the same stream with take=N, and dataset skip=N."
            )
        stream = StreamOrder(built, seed, shuffle=shuffle, **model)
        return TrainingData(stream, None, held_out, content)
    if isinstance(built, FileDataset):
        digest = built.digest()
        content = {**content, "path": digest} if section.get("packed") else digest
    samples = _fit("dataset", section, built, tokenizer, **model)
    if settings.validation_fraction is not None:
        samples, held_out = hold_out(samples, settings.validation_fraction, seed)
    return TrainingData(Permuted(samples, seed, shuffle), len(samples), held_out, content)


def _without_files(tokenizer: Component) -> dict[str, Any]:
    """Return what is set of a tokenizer, whose files may lie elsewhere: they are in the base."""
    return {key: value for key, value in tokenizer.items() if key not in TOKENIZER_FILES}


def _held_out(section: Component, tokenizer: Any, *, limit: int, vocabulary: int) -> Samples:
    built = _build("dataset_val", section, tokenizer)
    if not isinstance(built, StreamedDataset):
        return _fit("dataset_val", section, built, tokenizer, limit=limit, vocabulary=vocabulary)
    if built.take is None:
        raise UserError("dataset_val is a stream; set dataset_val.take, how many rows to measure.")
    rows = list(built.rows(0))
    order = StreamOrder(built, 0, shuffle=False, limit=limit, vocabulary=vocabulary)
    return [order.at(position) for position in range(len(rows))]


def _build(name: str, section: Component, tokenizer: Any) -> Any:
    """Build a data set unpacked: packing looks at the samples first."""
    packed = section.get("packed", False)
    require(isinstance(packed, bool), f"{name}.packed", packed, "must be True or False", "set one")
    unpacked = {key: value for key, value in section.items() if key != "packed"}
    built = build_dataset(name, unpacked, tokenizer)
    if packed and isinstance(built, StreamedDataset):
        raise UserError(
            f"{name}.packed is set, but a stream is not packed: its packs would depend on how it "
            f"was read; set {name}.packed=False, or load the data set whole."
        )
    return built


def _fit(
    name: str, section: Component, built: Any, tokenizer: Any, *, limit: int, vocabulary: int
) -> Samples:
    """Return samples that fit the model, packed if they are to be; the first one is read."""
    samples: Samples
    if not hasattr(built, "__len__"):
        raise UserError(
            f"{name}: {section['_component_']} makes no data set of a known size; name one of "
            "torchtune.datasets, or hyper_tune.torchtune.streaming.StreamedDataset."
        )
    if isinstance(built, FileDataset):
        built.refuse_unfit(limit, vocabulary)
        samples = built
    else:
        samples = CheckedSamples(name, built, limit, vocabulary)
    if not len(samples):
        raise UserError(f"{name} holds no samples; look at its path, source and split.")
    samples[0]
    return _pack(name, samples, tokenizer, limit) if section.get("packed") else samples


def _pack(name: str, samples: Samples, tokenizer: Any, limit: int) -> Samples:
    length = tokenizer.max_seq_len
    if length is None or length > limit:
        raise UserError(
            f"{name}.packed is set, and tokenizer.max_seq_len, the length of a pack, is "
            f"{length}; set it to at most {limit}, which is what the model reads."
        )
    packed: Samples = PackedDataset(samples, max_seq_len=length, padding_idx=tokenizer.pad_id)
    return packed


def hold_out(samples: Samples, fraction: float, seed: int) -> tuple[Samples, Samples]:
    """Return what to train on and a share held out of it, in their order, with none in common.

    Which are held out is a function of the seed and the number of samples.

    Raises:
        UserError: one of the two would be empty.

    >>> train, held_out = hold_out([{"tokens": [n]} for n in range(5)], 0.4, seed=0)
    >>> len(train), len(held_out)
    (3, 2)
    """
    size = len(samples)
    count = round(fraction * size)
    if not 0 < count < size:
        raise UserError(
            f"validation_fraction is {fraction}, of {size} samples {count}: at least one must be "
            "held out, and one be left; change it, or give dataset_val."
        )
    generator = torch.Generator().manual_seed(derive_seed(seed, "validation"))
    order = torch.randperm(size, generator=generator).tolist()
    return _part(samples, sorted(order[count:])), _part(samples, sorted(order[:count]))


def _part(samples: Any, indices: Sequence[int]) -> Samples:
    part: Samples = Subset(samples, indices)
    return part
