"""What a table runs: command lines that a user could type, each with a folder of its own."""

import hashlib
import importlib.util
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from experiment import MEASURES, Experiment, Point, catalogue
from sources import Source, find_source

from hyper_tune.errors import UserError
from hyper_tune.method import METHODS

RECIPES = Path(__file__).parents[1]
_ANOTHER_SEED = 1000  # what is added to a seed


@dataclass(frozen=True)
class Cell:
    """One command. In ``words``, {cell} is its folder, {need0} that of a cell it needs, {file0} a
    file that it reads. ``result``: the file that a finished one leaves in its folder.
    """

    label: str
    words: tuple[str, ...]
    result: str
    needs: tuple["Cell", ...] = ()
    files: tuple[Path, ...] = ()

    @cached_property
    def digest(self) -> str:
        """A name for all that defines the cell: words, contents of files, cells that it needs."""
        parts = [self.words, [contents(f) for f in self.files], [n.digest for n in self.needs]]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]

    def folder(self, output: Path) -> Path:
        """Return the cell's folder under that of all."""
        return output / "cells" / self.digest

    def command(self, output: Path) -> list[str]:
        """Return the words with paths in them."""
        places = {"cell": str(self.folder(output))}
        places |= {f"need{i}": str(need.folder(output)) for i, need in enumerate(self.needs)}
        places |= {f"file{i}": str(path) for i, path in enumerate(self.files)}
        return [_filled(word, places) for word in self.words]


def _filled(word: str, places: Mapping[str, str]) -> str:
    for name, path in places.items():
        word = word.replace(f"{{{name}}}", path)
    return word


@cache
def contents(path: Path) -> str:
    """Return a digest of a file, or of the names and sizes of a folder's files."""
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    inside = sorted(file for file in path.rglob("*") if file.is_file())
    sizes = [(str(file.relative_to(path)), file.stat().st_size) for file in inside]
    return hashlib.sha256(json.dumps(sizes).encode()).hexdigest()


@dataclass(frozen=True)
class Planner:
    """Makes the cells of an experiment at a scale, on the data in a folder."""

    experiment: Experiment
    scale: str
    data: Path | None
    device: str

    @property
    def settings(self) -> Mapping[str, Any]:
        """What the catalogue has of the scale."""
        found: Mapping[str, Any] = catalogue()["scales"][self.scale]
        return found

    def measured(self, point: Point, seed: int) -> dict[str, Cell]:
        """Return the cells whose results hold the measures at a point, by kind of measure.

        Of a run whose time to the loss is asked, "baseline" is the one that sets the loss.
        """
        kinds = {MEASURES[name][0] for name in self.experiment.measures_of(point)}
        if kinds == {"step cost"}:
            return {"step cost": self._step_cost(point, seed)}
        found = {"training": self._training(point, seed)}
        if any(name.endswith("to the loss") for name in self.experiment.measures_of(point)):
            found["baseline"] = self._training(self._without_hypernetwork(point), seed)
        if "evaluation" in kinds:
            label = f"evaluate {_label(point, seed)}"
            found["evaluation"] = self._evaluation(point, label, found["training"], "run")
        if "similarity" in kinds:
            # A method without a hypernetwork is compared with itself, from another seed.
            apart = 0 if METHODS[point["method"]].generated else _ANOTHER_SEED
            other = self._training(self._without_hypernetwork(point), seed + apart)
            found["similarity"] = self._similarity(point, seed, (other, found["training"]))
        return found

    def before(self, point: Point) -> Cell | None:
        """Return the evaluation of the base of a point's run, where it is made here and measured.

        It is the same for all points of one model and data.
        """
        kinds = {MEASURES[name][0] for name in self.experiment.measures_of(point)}
        if "evaluation" not in kinds or not self._makes_base(point):
            return None
        base = base_cell(self.source(point["data"]).train)
        label = f"evaluate {point['model']} before {point['data']}"
        return self._evaluation(point, label, base, "base")

    def all_cells(self, seeds: Sequence[int]) -> list[Cell]:
        """Return every cell once, each after those that it needs."""
        found: dict[str, Cell] = {}

        def add(cell: Cell) -> None:
            for need in cell.needs:
                add(need)
            found.setdefault(cell.digest, cell)

        points = self.experiment.points(self.scale)
        for point in points:
            if cell := self.before(point):
                add(cell)
        for seed in seeds:
            for point in points:
                for cell in self.measured(point, seed).values():
                    add(cell)
        return list(found.values())

    def stand_ins(self, point: Point) -> dict[str, str]:
        """Return what stands in for the point's model and data, by axis."""
        found = {}
        model = catalogue()["models"][point["model"]][self.scale].get("stand_in")
        if model is not None and "data" in point:
            found["model"] = model
        if "data" in point and (source := self.source(point["data"])).stand_in:
            found["data"] = source.stand_in
        if "data" not in point and self._shape(point) != point["model"].lower():
            found["model"] = self._shape(point)
        return found

    def source(self, name: str) -> Source:
        """Return the files of a data set; see `find_source`."""
        return find_source(name, self.scale, self.data)

    def _without_hypernetwork(self, point: Point) -> Point:
        """Return the point of the run that sets the loss: no hypernetwork, no choice of its own."""
        kept = {axis: point[axis] for axis in ("model", "data", *self.experiment.shared)}
        return kept | {"method": point["method"].removeprefix("hyper")}

    def _overrides(self, point: Point, kind: str) -> list[str]:
        groups = catalogue()["overrides"][kind][self.scale]
        method = METHODS[point["method"]]
        own = {
            "all",
            point["method"],
            "generated" if method.generated else "learned",
            "pruned" if method.prunes else "unpruned",
        }
        chosen = [group for group in groups if own.issuperset(group.split())]
        words = [word for group in chosen for word in groups[group]]
        words += self.experiment.chosen(point, self.scale)
        # Of two words for one key the experiment's own is the last.
        return list({word.partition("=")[0]: word for word in words}.values())

    def _makes_base(self, point: Point) -> bool:
        config: str | None = catalogue()["models"][point["model"]][self.scale].get("config")
        return config == "tiny_llama"

    def _training(self, point: Point, seed: int) -> Cell:
        model = catalogue()["models"][point["model"]]
        train = self._decoder if model["kind"] == "decoder" else self._encoder
        return train(point, seed, model[self.scale])

    def _decoder(self, point: Point, seed: int, model: Mapping[str, Any]) -> Cell:
        source = self.source(point["data"]).train
        bases = [base_cell(source)] if self._makes_base(point) else []
        words = [
            *("tune", "run", f"hyper-tune/{point['method']}_full", "--config", model["config"]),
            *("output_dir={cell}/run", f"seed={seed}", f"device={self.device}"),
            "dataset=hyper_tune.torchtune.data.file_dataset",
            *(
                ["model_dir={need0}/base", "dataset.path={need0}/train.jsonl"]
                if bases
                else ["dataset.path={file0}"]
            ),
            *self._overrides(point, "decoder"),
            "resume_from_checkpoint=True",
        ]
        files = () if bases else (source,)
        return Cell(_label(point, seed), tuple(words), "run/summary.json", tuple(bases), files)

    def _encoder(self, point: Point, seed: int, model: Mapping[str, Any]) -> Cell:
        source, entry = self.source(point["data"]), catalogue()["data"][point["data"]]
        folders = [_package(model["package"])] if "package" in model else []
        recipe = RECIPES / "encoders"
        files = [recipe / "train.py", recipe / "rte.yaml", source.train]
        files += [source.test] if source.test else []
        words = [
            *("python", "{file0}", "--config", "{file1}", "output_dir={cell}/run", f"seed={seed}"),
            *(f"device={self.device}", f"method.name={point['method']}"),
            *("~data.glue", "data.train={file2}", *entry["settings"]),
            *(["data.validation={file3}"] if source.test else []),
            f"model={{file{len(files)}}}" if folders else f"model={model['model']}",
            *self._overrides(point, "encoder"),
            "resume_from_checkpoint=True",
        ]
        files += folders
        return Cell(_label(point, seed), tuple(words), "run/summary.json", (), tuple(files))

    def _evaluation(self, point: Point, label: str, model: Cell, folder: str) -> Cell:
        """Return the evaluation of what a cell leaves in a folder of its own."""
        task = catalogue()["data"][point["data"]]["task"]
        words = [
            *("python", "-m", "hyper_tune", "evaluate", f"{{need0}}/{folder}"),
            *("--task", task, "--data", "{file0}"),
            *("--output", "{cell}/results", "--device", self.device, *self.settings["ask"][task]),
            *(["--execute-generated-code"] if task == "humaneval" else []),
        ]
        test = self.source(point["data"]).test
        assert test is not None
        return Cell(label, tuple(words), "results/results.json", (model,), (test,))

    def _similarity(self, point: Point, seed: int, runs: tuple[Cell, Cell]) -> Cell:
        words = (
            "python",
            "{file0}",
            "{need0}/run",
            "{need1}/run",
            "--output",
            "{cell}/similarity.json",
        )
        files = (Path(__file__).with_name("similarity.py"),)
        return Cell(f"compare {_label(point, seed)}", words, "similarity.json", runs, files)

    def _shape(self, point: Point) -> str:
        shape: str = catalogue()["models"][point["model"]][self.scale]["shape"]
        return shape

    def _step_cost(self, point: Point, seed: int) -> Cell:
        words = [
            *("python", "{file0}", "--shape", self._shape(point), "--method", point["method"]),
            *("--batch-size", str(point["batch size"]), "--device", self.device),
            *("--seed", str(seed), "--output", "{cell}/cost.json"),
            *self.settings["ask"]["step cost"],
        ]
        files = (Path(__file__).with_name("step_cost.py"),)
        return Cell(_label(point, seed), tuple(words), "cost.json", (), files)


def base_cell(rows: Path) -> Cell:
    """Return the cell that makes the small Llama that runs on these rows start from."""
    recipe = Path(__file__).with_name("small_llama.py")
    words = ("python", "{file0}", "--rows", "{file1}", "--output", "{cell}")
    files = (recipe, rows, RECIPES / "quickstart" / "base.py")
    return Cell("train the small Llama", words, "base/settings.sha256", (), files)


def _label(point: Point, seed: int) -> str:
    return ", ".join([*map(str, point.values()), f"seed {seed}"])


@cache
def _package(name: str) -> Path:
    """Return the folder of the model that a Python package holds."""
    module = importlib.util.find_spec(name.replace("-", "_"))
    if module is None or module.origin is None:
        raise UserError(f"the small encoder is not installed; pip install {name}.")
    return Path(module.origin).parent / "model"


def program(word: str) -> str:
    """Return the path of a command of this Python's environment."""
    return sys.executable if word == "python" else str(Path(sys.executable).with_name(word))
