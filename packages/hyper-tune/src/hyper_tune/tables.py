"""Tables as records: a dictionary for each row of a CSV or parquet file, with where it is."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hyper_tune.errors import UserError

_ROWS_AT_A_TIME = 1024


def read_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line at which each row ends, and the row by the names of the first line.

    Fields in double quotes may hold commas and line ends, as RFC 4180 has them.

    Raises:
        UserError: a row has more or fewer fields than the first line names.

    >>> list(read_csv(Path("a.csv"), "question,answer\\nTwo?,2\\n"))
    [(2, {'question': 'Two?', 'answer': '2'})]
    """
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    names: list[str] = []
    try:
        for fields in rows:
            if not fields:
                continue
            if not names:
                names = fields
                continue
            if len(fields) != len(names):
                raise UserError(
                    f"{path}:{rows.line_num}: {len(fields)} fields, but the first line names "
                    f"{len(names)}; put quotes around fields that hold a comma."
                )
            yield rows.line_num, dict(zip(names, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{rows.line_num}: not CSV: {error}.") from error


def read_parquet(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number of each row, from 1, and the row by the names of its columns.

    Raises:
        UserError: pyarrow is not installed, or the file is damaged or no parquet.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ModuleNotFoundError as error:
        raise UserError(f"{path}: parquet needs pyarrow; pip install pyarrow.") from error
    try:
        with ParquetFile(path) as file:
            batches = file.iter_batches(_ROWS_AT_A_TIME)
            yield from enumerate((row for batch in batches for row in batch.to_pylist()), 1)
    except (ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a whole parquet file: {reason}") from error
