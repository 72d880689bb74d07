"""Tables of the verbs: fitted to a terminal, whole where the output is a file or a pipe."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

_WHOLE = 10_000


def print_table(
    header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Sequence[int] = ()
) -> None:
    """Print lines in columns; ``right`` numbers the columns that are aligned on the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(header):
        table.add_column(
            Text(name), justify="right" if number in right else "left", overflow="fold"
        )
    for row in rows:
        # A name in square brackets would otherwise be read as a style.
        table.add_row(*(Text(cell) for cell in row))
    Console(width=None if Console().is_terminal else _WHOLE).print(table)
