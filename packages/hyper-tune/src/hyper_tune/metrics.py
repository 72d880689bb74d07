"""Figures of each step, or records of each start: one JSON object a line."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hyper_tune.durable import write_text


class Metrics:
    """A file of rows, appended as they come and cut back when a run resumes.

    Floats are written so that they read back exactly; a number that is not finite is refused.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and hand it to the operating system."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Return every whole row; a last line that a dying process tore is left out."""
        if not self._path.exists():
            return []
        lines = self._path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]

    def truncate_after(self, step: int) -> None:
        """Keep the rows up to ``step``, so that a resumed run does not log a step twice."""
        if not self._path.exists():
            return
        kept = [row for row in self.rows() if row["step"] <= step]
        write_text(self._path, "".join(json.dumps(row) + "\n" for row in kept))
