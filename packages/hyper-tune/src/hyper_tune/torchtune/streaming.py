"""Data sets that are read as they come, never whole: the order is exact all the same."""

from collections.abc import Iterator, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

import torch

from hyper_tune.checks import require_number
from hyper_tune.errors import UserError
from hyper_tune.records import check_format, detect_format, read_turns
from hyper_tune.sampling import derive_seed
from hyper_tune.torchtune.batches import Sample
from hyper_tune.torchtune.data import refuse_unknown_token, tokenise
from hyper_tune.torchtune.loading import why

Row = Mapping[str, Any]


class StreamedDataset:
    """Rows of a data set of the Hub or of files, read by `datasets` as a stream.

    The ``_component_`` of a configuration's data set. Other keys go to `datasets.load_dataset`.
    ``shuffle_buffer``: how many rows are permuted together; see `StreamOrder`.
    ``skip`` and ``take``: leave rows out at the start, and end after so many; by them training and
    held-out data share one stream without a row in common. Formats: see
    `hyper_tune.records.read_turns`; "auto" tells by the keys of the first row.

    Raises:
        UserError: the stream cannot be opened, or has no rows, or rows of no known format.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        source: str,
        format: str = "auto",  # noqa: A002
        split: str = "train",
        skip: int = 0,
        take: int | None = None,
        shuffle_buffer: int = 10_000,
        train_on_input: bool = False,
        **load_dataset_kwargs: Any,
    ) -> None:
        require_number("skip", skip, whole=True, least=0)
        require_number("shuffle_buffer", shuffle_buffer, whole=True, least=1)
        if take is not None:
            require_number("take", take, whole=True, least=1)
        check_format(format)
        self.source = source
        self.take = take
        self.shuffle_buffer = shuffle_buffer
        self._tokenizer = tokenizer
        self._skip = skip
        self._train_on_input = train_on_input
        self._rows = _open(source, split, load_dataset_kwargs)
        first = list(islice(self.rows(0), 1))
        if not first:
            raise UserError(f"{source} has no rows after the {skip} that are skipped.")
        self._format = detect_format(self.where(0), first[0]) if format == "auto" else format
        self.sample(0, first[0])

    def rows(self, start: int) -> Iterator[Row]:
        """Yield the rows from the one at ``start`` on.

        Raises:
            UserError: reading fails; how far it came is named.
        """
        number = start
        left = None if self.take is None else max(self.take - start, 0)
        try:
            for row in islice(self._rows.skip(self._skip + start), left):
                yield row
                number += 1
        except Exception as error:
            failed = f"{self.where(number)} cannot be read"
            raise UserError(why("dataset", self.source, failed, error)) from error

    def where(self, number: int) -> str:
        """Name a row, from 0, for a message."""
        return f"{self.source}, row {self._skip + number}"

    def sample(self, number: int, row: Row) -> Sample:
        """Return the tokens and labels of a row.

        Raises:
            UserError: it is not of the format, or is cut before anything that carries loss.
        """
        where = self.where(number)
        turns = read_turns(where, row, self._format)
        return tokenise(self._tokenizer, where, turns, train_on_input=self._train_on_input)


def _open(source: str, split: str, options: Mapping[str, Any]) -> Any:
    from datasets import load_dataset

    return load_dataset(source, split=split, streaming=True, **options)


class StreamOrder:
    """A stream epoch after epoch, each buffer of rows permuted: a function of seed and position.

    Row ``b * shuffle_buffer + k`` of the stream is in buffer b. Epoch e passes through the buffers
    in their order, and through each in a permutation of seed, e and b alone. So the sample at a
    position is the same on every process and after every resume, and nothing needs to be saved: a
    process that starts at a position reads its way there, and tokenises only what it trains on.

    How many rows there are is known once their end was seen.
    """

    def __init__(
        self, stream: StreamedDataset, seed: int, *, shuffle: bool, limit: int, vocabulary: int
    ) -> None:
        self._stream = stream
        self._seed = seed
        self._shuffle = shuffle
        self._limit = limit
        self._vocabulary = vocabulary
        self._number: int | None = None
        self._buffer: list[Row] = []
        self._reader: Iterator[Row] = iter(())
        self._seen = 0
        self._count: int | None = None
        self.at(0)

    def at(self, position: int) -> Sample:
        """Return the sample at a position.

        Raises:
            UserError: reading fails, or the row does not fit the format or the model.
        """
        epoch, row = self._place(position)
        number, place = divmod(row, self._stream.shuffle_buffer)
        self._read(number)
        if self._shuffle:
            order = _permutation(self._seed, epoch, number, len(self._buffer))
            place = order[place]
        row = number * self._stream.shuffle_buffer + place
        sample = self._stream.sample(row, self._buffer[place])
        where = self._stream.where(row)
        refuse_unknown_token(where, sample["tokens"], self._vocabulary)
        if len(sample["tokens"]) > self._limit:
            raise UserError(
                f"{where}: {len(sample['tokens'])} tokens, but the model reads at most "
                f"{self._limit}; set tokenizer.max_seq_len to {self._limit} to cut long samples."
            )
        return sample

    def _place(self, position: int) -> tuple[int, int]:
        """Return the epoch of a position, and the row that is there without shuffling."""
        if self._count is None and position >= self._seen:
            self._read(position // self._stream.shuffle_buffer)
            if self._count is None and position >= self._seen:
                self._count = self._seen + sum(1 for _ in self._stream.rows(self._seen))
        return (0, position) if self._count is None else divmod(position, self._count)

    def _read(self, number: int) -> None:
        """Hold the rows of a buffer, of which there are none after the end."""
        size = self._stream.shuffle_buffer
        if number == self._number:
            return
        if self._number is None or number != self._number + 1:
            self._reader = self._stream.rows(number * size)
        self._buffer = list(islice(self._reader, size))
        self._number = number
        start, rows = number * size, len(self._buffer)
        if rows:
            self._seen = start + rows
        if rows < size and start <= self._seen:
            self._count = self._seen


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, number: int, size: int) -> list[int]:
    generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch, number))
    return torch.randperm(size, generator=generator).tolist()
