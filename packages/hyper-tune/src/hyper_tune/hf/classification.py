"""Texts with labels: GLUE, files of TSV, CSV, JSON lines or Parquet, folders with a file a label.

Everything is read and checked before a model loads; a mistake is named with its file and line.
"""

import codecs
import csv
import io
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hyper_tune.checks import require, require_number
from hyper_tune.errors import UserError
from hyper_tune.hf.encoding import decode
from hyper_tune.hf.glue import GLUE, REGRESSION, check_glue, load_glue


@dataclass(frozen=True)
class Row:
    """One or two texts, the label as it was read, and where it was read."""

    texts: tuple[str, ...]
    label: str
    where: str


@dataclass(frozen=True)
class LabelledTexts:
    """Texts and the numbers of their labels; ``names`` says what a number stands for. Without
    names it stands for itself, which is regression.
    """

    texts: list[tuple[str, ...]]
    labels: list[int] | list[float]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class ClassificationData:
    """Where the rows of a set are, and what is what in them.

    ``glue``: a task of GLUE, from the hub; then nothing else is given. ``train``, ``validation``: a
    file (.tsv, .csv, .jsonl, .parquet), or a folder that has one file of lines for each label,
    named by it. ``text``: one or two columns. ``label``: the column of labels. ``labels``: their
    names in the order of their numbers; None takes GLUE's, or those of the training rows, sorted.
    ``regression``: labels are numbers that measure something, as STS-B's, which has it so.
    ``encoding``: of text files. ``validation_fraction``: where ``validation`` is None, the share of
    the training rows that is held out, chosen by ``split_seed`` alone.

    Raises:
        UserError: a value that cannot be.

    >>> ClassificationData(glue="rte").text
    ('sentence1', 'sentence2')
    """

    glue: str | None = None
    train: str | None = None
    validation: str | None = None
    text: Sequence[str] = ()
    label: str = "label"
    labels: Sequence[str] | None = None
    regression: bool = False
    encoding: str = "utf-8"
    validation_fraction: float = 0.1
    split_seed: int = 0

    def __post_init__(self) -> None:
        if (self.glue is None) == (self.train is None):
            raise UserError("data needs either glue, a task of GLUE, or train, a file; give one.")
        if self.glue is not None:
            check_glue(self.glue)
            object.__setattr__(self, "text", GLUE[self.glue])
            object.__setattr__(self, "regression", self.regression or self.glue in REGRESSION)
        elif isinstance(self.text, str):
            object.__setattr__(self, "text", (self.text,))
        if self.glue is not None or Path(self.train or "").suffix in _READERS:
            fits = len(self.text) in (1, 2)
            require(fits, "data.text", list(self.text), "must be one or two columns", "name them")
        flag = isinstance(self.regression, bool)
        require(flag, "data.regression", self.regression, "must be True or False", "set one")
        if self.regression and self.labels:
            raise UserError("data.labels names classes, of which a regression has none; drop it.")
        names = [str(name) for name in self.labels or ()]
        rule = "must be names that differ"
        require(len(set(names)) == len(names), "data.labels", names, rule, "correct them")
        try:
            codecs.lookup(self.encoding)
        except LookupError as error:
            raise UserError(f"data.encoding is {self.encoding!r}: {error}.") from error
        require_number("data.validation_fraction", self.validation_fraction, above=0, most=0.9)
        require_number("data.split_seed", self.split_seed, whole=True)


def load_classification(data: ClassificationData) -> tuple[LabelledTexts, LabelledTexts]:
    """Return the rows to train on and those held out.

    Raises:
        UserError: a file, column, text or label that cannot be used, with file and line.
    """
    if data.glue is not None:
        *parts, found = load_glue(data.glue)
        train, held_out = ([Row(*row) for row in part] for part in parts)
    else:
        assert data.train is not None
        train = _read(Path(data.train), data)
        if data.validation is None:
            train, held_out = _split(train, data)
        else:
            held_out = _read(Path(data.validation), data)
        found = ()
    if data.regression:
        return _measured(train), _measured(held_out)
    names = data.labels or found or sorted({_class(row) for row in train}, key=_place)
    return _numbered(train, names), _numbered(held_out, names)


_MEASURED = re.compile(r"[-+]?\d*\.\d+")


def _measured(rows: list[Row]) -> LabelledTexts:
    numbers = []
    for row in rows:
        try:
            number = float(row.label)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"{row.where}: the label is {row.label!r}, but data.regression needs a number; "
                "correct the row or data.label, or leave data.regression out."
            )
        numbers.append(number)
    return LabelledTexts([row.texts for row in rows], numbers, ())


def _class(row: Row) -> str:
    """Return the label, unless it measures something, as STS-B's similarities do."""
    if _MEASURED.fullmatch(row.label) and not float(row.label).is_integer():
        raise UserError(
            f"{row.where}: the label is {row.label}, a number that counts no classes; set "
            "data.regression=True, or, if it is the name of a class, name all in data.labels."
        )
    return row.label


def _place(label: str) -> tuple[float, str]:
    """Sort whole numbers by their value, and before words."""
    return (float(label) if label.removeprefix("-").isdecimal() else float("inf"), label)


def _numbered(rows: list[Row], names: Sequence[str]) -> LabelledTexts:
    if len(names) < 2:
        raise UserError(
            f"data has the one label {names[0]!r}, in {rows[0].where} and all other rows; a "
            "classifier needs two; look at data.label."
        )
    number = {str(name): i for i, name in enumerate(names)}
    for row in rows:
        if row.label not in number:
            raise UserError(
                f"{row.where}: the label is {row.label!r}, but must be one of "
                f"{', '.join(number)}; correct the row, or name the labels in data.labels."
            )
    labels = [number[row.label] for row in rows]
    return LabelledTexts([row.texts for row in rows], labels, tuple(number))


def _split(rows: list[Row], data: ClassificationData) -> tuple[list[Row], list[Row]]:
    order = list(range(len(rows)))
    random.Random(data.split_seed).shuffle(order)  # noqa: S311 - a split, no secret
    held = round(len(rows) * data.validation_fraction)
    if not 0 < held < len(rows):
        raise UserError(
            f"{data.train} has {len(rows)} rows, of which a fraction of "
            f"{data.validation_fraction} leaves no rows to hold out or to train on; give "
            "data.validation."
        )
    out = set(order[:held])
    kept = [row for i, row in enumerate(rows) if i not in out]
    return kept, [row for i, row in enumerate(rows) if i in out]


def _read(path: Path, data: ClassificationData) -> list[Row]:
    if not path.exists():
        there = sorted(p.name for p in path.parent.glob("*"))[:8]
        raise UserError(
            f"{path} does not exist; {path.parent} has {', '.join(there) or 'nothing'}; correct "
            "data.train or data.validation."
        )
    rows = list(_folder(path, data) if path.is_dir() else _file(path, data))
    if not rows:
        raise UserError(f"{path} holds no rows.")
    return rows


def _folder(path: Path, data: ClassificationData) -> Iterator[Row]:
    """Yield a row for each line of each file; a file's name without its ending is the label."""
    files = sorted(file for file in path.iterdir() if file.is_file() and file.name[0] != ".")
    if len(files) < 2:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(f"{path} must have a file of lines for each label; it has {names}.")
    for file in files:
        lines = decode(file, data.encoding).split("\n")
        found = [(i, line.strip()) for i, line in enumerate(lines, 1) if line.strip()]
        if not found:
            raise UserError(f"{file} holds no lines.")
        yield from (Row((line,), file.stem, f"{file}:{i}") for i, line in found)


def _file(path: Path, data: ClassificationData) -> Iterator[Row]:
    if path.suffix not in _READERS:
        raise UserError(f"{path} ends in {path.suffix!r}; {', '.join(_READERS)} can be read.")
    for line, record in _READERS[path.suffix](path, data.encoding):
        where = f"{path}:{line}"
        for column in (*data.text, data.label):
            if column not in record:
                there = ", ".join(str(key) for key in record)
                raise UserError(f"{where}: the column {column!r} is missing; it has {there}.")
            if record[column] is None:
                raise UserError(f"{where}: the column {column!r} has no value; the row is short.")
        texts = tuple(str(record[column]).strip() for column in data.text)
        if not all(texts):
            empty = data.text[texts.index("")]
            raise UserError(f"{where}: the text {empty!r} is empty.")
        yield Row(texts, str(record[data.label]).strip(), where)


Records = Iterator[tuple[int, Mapping[str, Any]]]


def _separated(delimiter: str, quoting: Literal[0, 3]) -> Callable[[Path, str], Records]:
    def read(path: Path, encoding: str) -> Records:
        text = io.StringIO(decode(path, encoding), newline="")
        reader = csv.DictReader(text, delimiter=delimiter, quoting=quoting, strict=True)
        try:
            for record in reader:
                if None in record:
                    raise UserError(
                        f"{path}:{reader.line_num}: the row has more fields than the "
                        f"{len(reader.fieldnames or [])} columns of the first line."
                    )
                yield reader.line_num, record
        except csv.Error as error:
            raise UserError(f"{path}:{reader.line_num}: {error}.") from error

    return read


def _json_lines(path: Path, encoding: str) -> Records:
    for number, line in enumerate(decode(path, encoding).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: expected an object, got {type(record).__name__}.")
        yield number, record


def _parquet(path: Path, encoding: str) -> Records:
    del encoding
    from datasets import Dataset

    try:
        rows = Dataset.from_parquet(str(path), keep_in_memory=True)
    except Exception as error:
        raise UserError(f"{path} cannot be read as Parquet: {error}.") from error
    yield from enumerate(rows, 1)


_READERS: Mapping[str, Callable[[Path, str], Records]] = {
    ".tsv": _separated("\t", csv.QUOTE_NONE),
    ".csv": _separated(",", csv.QUOTE_MINIMAL),
    ".jsonl": _json_lines,
    ".parquet": _parquet,
}
