"""Asks a model all of a task's questions, goes on where it was stopped, and writes the results."""

import json
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from hyper_tune.durable import digest, write_text
from hyper_tune.errors import UserError
from hyper_tune.evaluate.generation import Decoding, LanguageModel, Request, answers, refuse_long
from hyper_tune.evaluate.tasks import Scored, Task
from hyper_tune.evaluate.text import Metric
from hyper_tune.folder_lock import take_folder
from hyper_tune.metrics import Metrics
from hyper_tune.provenance import start_record

Key = tuple[int, int]


@dataclass(frozen=True)
class Extent:
    """How much is asked: ``samples`` answers to each of the first ``limit`` rows, or to all.

    Raises:
        UserError: several samples of the likeliest answer, which are all the same.
    """

    samples: int = 1
    limit: int | None = None

    def keys(self, rows: int) -> list[Key]:
        """Return row and sample of every answer, in order.

        >>> Extent(samples=2, limit=1).keys(5)
        [(0, 0), (0, 1)]
        """
        count = rows if self.limit is None else min(rows, self.limit)
        return [(row, sample) for row in range(count) for sample in range(self.samples)]


def evaluate(
    model: LanguageModel,
    task: Task,
    folder: Path,
    *,
    decoding: Decoding,
    extent: Extent = Extent(),
    batch_size: int = 8,
    jobs: int = 1,
) -> list[Metric]:
    """Answer, score, and write ``answers.jsonl``, ``scores.jsonl`` and ``results.json``.

    What is in ``folder`` of the same model, data and decoding is kept, so that a command that was
    stopped goes on; more samples and rows may be asked for. Scores under other limits are not. The
    model's weights are loaded only if an answer is missing. ``jobs``: answers that are scored at a
    time.

    Raises:
        UserError: the folder is of another evaluation or another process evaluates there, samples
            are all the same, or a prompt is too long; before the weights are loaded.
    """
    if extent.samples > 1 and decoding.temperature == 0:
        raise UserError(
            f"{extent.samples} samples at temperature 0 would all be the same; set --temperature, "
            "such as 0.8, or ask for one."
        )
    begin = time.monotonic()
    settings = _settings(model, task, decoding)
    keys = extent.keys(len(task))
    requests = {key: _request(model, task, key) for key in keys}
    refuse_long(model, list(requests.values()), decoding)
    with take_folder(folder, option="--output", does="evaluates"):
        _open(folder, settings)
        given = _Rows(folder / "answers.jsonl")
        missing = {key: requests[key] for key in keys if key not in given}
        _answer(model, missing, given, decoding, batch_size)
        scores = _Rows(folder / "scores.jsonl")
        _score(model, task, [key for key in keys if key not in scores], given, scores, jobs)
        metrics = task.metrics([Scored(key[0], given[key]["answer"], scores[key]) for key in keys])
        results = {
            "metrics": [asdict(metric) for metric in metrics],
            **{"rows": len(keys) // extent.samples, "samples": extent.samples},
            "settings": settings,
            "seconds": time.monotonic() - begin,
            **start_record(model.device),
        }
        write_text(folder / "results.json", json.dumps(results, indent=1) + "\n")
    return metrics


def _settings(model: LanguageModel, task: Task, decoding: Decoding) -> dict[str, Any]:
    """Return all that an answer depends on, and its score besides."""
    return {
        **{"model": model.name, "identity": model.identity, "chat": model.chat},
        **{"task": task.name, "data": str(task.data), "sha256": digest(task.data)},
        **asdict(decoding),
        "scoring": dict(task.scoring),
    }


def _open(folder: Path, settings: Mapping[str, Any]) -> None:
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(settings, indent=1) + "\n")
        return
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}; give another --output.") from error
    for key, value in settings.items():
        # Model and data are known by what is in them, wherever they lie.
        if key not in ("model", "data", "scoring") and there.get(key) != value:
            raise UserError(
                f"{folder} holds answers of {key} = {there.get(key)!r}, but this is "
                f"{value!r}; give another --output, or remove it."
            )
    if there.get("scoring") != settings["scoring"]:
        (folder / "scores.jsonl").unlink(missing_ok=True)
        write_text(path, json.dumps({**there, "scoring": settings["scoring"]}, indent=1) + "\n")


class _Rows:
    """A file of one row for each answer, by row and sample; appended as they come."""

    def __init__(self, path: Path) -> None:
        self._file = Metrics(path)
        rows = self._file.rows()
        if path.exists():
            # Without a last line that a dying process tore.
            write_text(path, "".join(json.dumps(row) + "\n" for row in rows))
        self._rows = {(row.pop("row"), row.pop("sample")): row for row in rows}

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def __getitem__(self, key: Key) -> Mapping[str, Any]:
        return self._rows[key]

    def append(self, key: Key, row: dict[str, Any]) -> None:
        self._file.append({"row": key[0], "sample": key[1], **row})
        self._rows[key] = row


def _request(model: LanguageModel, task: Task, key: Key) -> Request:
    row, sample = key
    tokens = model.encode(task.turns(row, chat=model.chat))
    return Request(tokens, f"{row} {sample}", f"{task.where(row)}: the prompt")


def _answer(
    model: LanguageModel,
    requests: Mapping[Key, Request],
    given: _Rows,
    decoding: Decoding,
    batch_size: int,
) -> None:
    if not requests:
        return
    model.load_()
    keys = list(requests)
    found = answers(model, list(requests.values()), decoding, batch_size=batch_size)
    for index, text in _progress(found, "answers", len(keys)):
        given.append(keys[index], {"answer": text})


def _score(
    model: LanguageModel, task: Task, keys: list[Key], given: _Rows, scores: _Rows, jobs: int
) -> None:
    def score(key: Key) -> tuple[Key, dict[str, Any]]:
        return key, task.score(key[0], given[key]["answer"], chat=model.chat)

    with ThreadPoolExecutor(jobs) as threads:
        try:
            for key, found in _progress(threads.map(score, keys), "scores", len(keys)):
                scores.append(key, found)
        except BaseException:
            # Who stops a command does not want to wait for all that was planned.
            threads.shutdown(cancel_futures=True)
            raise


def _progress(what: Iterable[Any], name: str, count: int) -> Iterable[Any]:
    progress: Iterable[Any] = tqdm(what, name, total=count, delay=5, leave=False)
    return progress
