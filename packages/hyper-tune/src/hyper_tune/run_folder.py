"""The folder of one run: what is where, and who may write."""

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from hyper_tune.checkpoint import has_checkpoints
from hyper_tune.durable import make_folder, remove_temporary, write_text
from hyper_tune.errors import UserError
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
            self._take()
            remove_temporary(self.path)
            if not resume and (has_checkpoints(self.checkpoints) or self.metrics.rows()):
                raise UserError(
                    f"{self.path} holds an earlier run; set resume_from_checkpoint=True to go on "
                    "with it, or another output_dir."
                )
        except BaseException:
            self.close()
            raise

    def _take(self) -> None:
        try:
            make_folder(self.path)
            self._lock = (self.path / ".lock").open("w")
        except OSError as error:
            raise UserError(f"output_dir {self.path} cannot be written: {error}.") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another process trains in {self.path}; wait for it, or set another output_dir."
            ) from error

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
