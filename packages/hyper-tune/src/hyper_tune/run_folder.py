"""The folder of one run: what is where, and who may write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from hyper_tune.checkpoint import has_checkpoints
from hyper_tune.durable import remove_temporary, write_text
from hyper_tune.errors import UserError
from hyper_tune.folder_lock import take_folder
from hyper_tune.metrics import Metrics


class RunFolder:
    """``checkpoints/``, ``metrics.jsonl``, ``diagnoses.jsonl``, ``config.yaml``, ``starts.jsonl``
    and the results.

    Only the process that has called `start` writes; the lock goes when it ends, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = Metrics(path / "metrics.jsonl")
        self.diagnoses = Metrics(path / "diagnoses.jsonl")
        self.starts = Metrics(path / "starts.jsonl")
        self._lock: TextIO | None = None

    def start(self, *, resume: bool) -> None:
        """Create the folder and take it for this process; a refused start leaves it to others.

        Raises:
            UserError: another process trains there, it holds an earlier run that is not resumed,
                or it cannot be written.
        """
        try:
            self._lock = take_folder(self.path, option="output_dir", does="trains")
            remove_temporary(self.path)
            if not resume and (has_checkpoints(self.checkpoints) or self.metrics.rows()):
                raise UserError(
                    f"{self.path} holds an earlier run; set resume_from_checkpoint=True to go on "
                    "with it, or another output_dir."
                )
        except BaseException:
            self.close()
            raise

    def write_text(self, name: str, text: str) -> None:
        """Write a text file of the run, whole or not at all."""
        write_text(self.path / name, text)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a JSON file of the run, whole or not at all."""
        self.write_text(name, json.dumps(value, indent=1, allow_nan=False) + "\n")

    def close(self) -> None:
        """Leave the folder to others."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
