"""What a run folder says about its run, read without a model."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.packaged import read_config
from hyper_tune.run_folder import RunFolder


@dataclass(frozen=True)
class RunRecord:
    """The files of a run folder, as they are: the run may still go on.

    ``config``: the settings, with overrides. ``rows``: a row of figures for each step. ``starts``:
    a record for each start. ``summary``: the figures of the whole run; None before its end.
    """

    path: Path
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]
    starts: list[dict[str, Any]]
    summary: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> "RunRecord":
        """Read the folder at ``path``.

        Raises:
            UserError: it is not a run folder, or a file of it cannot be read.
        """
        if not (path / "config.yaml").is_file():
            what = "is not a run folder: it has no config.yaml"
            raise UserError(f"{path} {what if path.is_dir() else 'does not exist'}.")
        folder = RunFolder(path)
        config = OmegaConf.to_container(read_config(path / "config.yaml"), resolve=True)
        assert isinstance(config, dict)
        settings = {str(key): value for key, value in config.items()}
        summary = path / "summary.json"
        try:
            record = cls(
                path,
                settings,
                folder.metrics.rows(),
                folder.starts.rows(),
                json.loads(summary.read_text(encoding="utf-8")) if summary.exists() else None,
            )
        except ValueError as error:
            raise UserError(f"the figures in {path} are not JSON: {error}.") from error
        _refuse_foreign(record)
        return record

    def figures(self, key: str) -> list[tuple[int, float]]:
        """Return step and value wherever a step has a figure of that name.

        >>> record = RunRecord(Path("."), {}, [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}],
        ...                    [], None)
        >>> record.figures("loss")
        [(2, 0.5)]
        """
        return [(row["step"], row[key]) for row in self.rows if row.get(key) is not None]


_SUMMARY = {
    **{"before": dict, "after": dict, "ranks": dict, "initial_rank": int},
    **{"total_ranks": int, "trainable_parameters": int, "factor_parameters": int},
}


def _refuse_foreign(record: RunRecord) -> None:
    """Refuse figures that are JSON, and not those of a run."""
    for number, row in enumerate(record.rows):
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(
                f"{record.path}/metrics.jsonl:{number + 1} is no row of a run's figures."
            )
    if record.summary is None:
        return
    there: Any = record.summary
    for key, kind in _SUMMARY.items():
        if not isinstance(there, dict) or not isinstance(there.get(key), kind):
            raise UserError(f"{record.path}/summary.json is not of a run: it lacks {key!r}.")
