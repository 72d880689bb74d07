"""Loggers and what is shown of a run: every figure, on rank 0, and never at the run's expense."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

from hyper_tune import parallel
from hyper_tune.errors import UserError
from hyper_tune.torchtune.loggers import Loggers
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.reporting import Reporter
from hyper_tune.torchtune.settings import RecipeSettings

LOGGING = "torchtune.training.metric_logging"
Run = Callable[..., None]
ConfigMaker = Callable[..., Path]


def rows(folder: Path, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def tensorboard(folder: Path) -> dict[str, Any]:
    return {
        "_component_": f"{LOGGING}.TensorBoardLogger",
        "log_dir": str(folder),
        "organize_logs": False,
    }


def scalars_of(folder: Path) -> dict[str, Any]:
    """What TensorBoard shows of a folder."""
    events = EventAccumulator(str(folder), {"tensors": 0}).Reload()
    found: dict[str, Any] = {"images": []}
    for name in events.Tags()["tensors"]:
        shown = [(e.step, e.tensor_proto) for e in events.Tensors(name)]
        if name == "ranks":
            found["images"] = [
                step for step, proto in shown if proto.string_val[2][:4] == b"\x89PNG"
            ]
        else:
            found[name] = [(step, proto.float_val[0]) for step, proto in shown]
    return found


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in for the library with what torchtune's logger and ours call of it."""
    stub = SimpleNamespace(run=None, logged=[], config={}, given={}, finished=0, saved=[])

    def init(*, project: str = "", resume: str = "", **others: object) -> Any:
        stub.given |= {"project": project, "resume": resume}
        assert not {name for name, value in others.items() if value is not None}
        stub.run = SimpleNamespace(_label=lambda repo: None)
        return stub.run

    def finish() -> None:
        stub.run, stub.finished = None, stub.finished + 1

    stub.init, stub.finish = init, finish
    stub.define_metric = lambda *_, **__: None
    stub.log = stub.logged.append
    stub.save = lambda path, base_path: stub.saved.append(path)
    stub.Image = lambda pixels: ("image", pixels.shape[2], str(pixels.dtype))
    stub.config = SimpleNamespace(update=lambda values, **_: stub.given.update(config=values))
    module = ModuleType("wandb")
    monkeypatch.setitem(sys.modules, "wandb", module)
    for name in vars(stub):
        setattr(module, name, None)
    # Read and written through the module, as the library's own state is.
    module.__class__ = type(
        "Stub",
        (ModuleType,),
        {
            "__getattribute__": lambda self, name: (
                getattr(stub, name)
                if hasattr(stub, name)
                else ModuleType.__getattribute__(self, name)
            )
        },
    )
    return stub


def test_tensorboard_gets_every_figure_of_every_logged_step(
    make_config: ConfigMaker, run: Run, tmp_path: Path, records: Path
) -> None:
    component = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(records)}
    run(
        make_config(
            metric_logger=tensorboard(tmp_path / "tb"),
            log_every_n_steps=4,
            diagnose_every_n_steps=6,
            dataset_val=component,
            validate_every_n_steps=5,
        )
    )
    logged, found = rows(tmp_path / "run"), scalars_of(tmp_path / "tb")
    for name in set(logged[0]) - {"step"}:
        steps = [4, 5, 8, 10, 12]
        expected = [(step, pytest.approx(float(logged[step - 1][name]))) for step in steps]
        assert found[name] == expected, name
    assert [step for step, _ in found["validation_loss"]] == [5, 10]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for name, rank in summary["ranks"].items():
        assert [step for step, _ in found[f"ranks/{name}"]] == [6, 12]
        assert found[f"ranks/{name}"][-1] == (12, rank)
    assert found["images"] == [6, 12]
    diagnoses = rows(tmp_path / "run", "diagnoses.jsonl")
    assert [row["step"] for row in diagnoses] == [6, 12]
    assert diagnoses[-1]["ranks"] == summary["ranks"]
    for role, figures in diagnoses[0]["hypernetworks"].items():
        for name, value in figures.items():
            assert found[f"hypernetwork/{role}/{name}"][0] == (6, pytest.approx(value))
    assert set(diagnoses[0]["hypernetworks"]) == {"p", "lam", "q"}


def test_a_resumed_run_goes_on_in_tensorboard_at_its_step(
    make_config: ConfigMaker, run: Run, tmp_path: Path
) -> None:
    config = make_config(
        metric_logger=tensorboard(tmp_path / "tb"), log_every_n_steps=1, diagnose_every_n_steps=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hyper_tune.torchtune.recipe.FineTuning._count_skipped", stop_at(7))
        with pytest.raises(KeyboardInterrupt):
            run(config)
    assert [step for step, _ in scalars_of(tmp_path / "tb")["loss"]] == [1, 2, 3, 4, 5, 6]
    run(config, "resume_from_checkpoint=True")
    found = scalars_of(tmp_path / "tb")
    for name in ("loss", "ranks/layers.0.attn.q_proj"):
        assert [step for step, _ in found[name]] == [*range(1, 13)]
    assert [row["step"] for row in rows(tmp_path / "run", "diagnoses.jsonl")] == [*range(1, 13)]


def stop_at(step: int) -> Callable[..., None]:
    def count(run: Any, _: object) -> None:
        if run.step == step:
            raise KeyboardInterrupt

    return count


def test_several_loggers_get_the_same(
    make_config: ConfigMaker,
    run: Run,
    tmp_path: Path,
    wandb: SimpleNamespace,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(
        make_config(
            metric_logger=[
                {"_component_": f"{LOGGING}.StdoutLogger"},
                {"_component_": f"{LOGGING}.DiskLogger", "log_dir": str(tmp_path), "filename": "d"},
                {"_component_": f"{LOGGING}.WandBLogger", "project": "mine", "resume": "allow"},
            ],
            log_every_n_steps=6,
            diagnose_every_n_steps=12,
        )
    )
    logged = rows(tmp_path / "run")
    loss = [logged[5]["loss"], logged[11]["loss"]]
    for text in (capsys.readouterr().out, (tmp_path / "d").read_text()):
        assert [float(value) for value in re.findall(r"Step \d+ \| loss:(\S+) ", text)] == loss
        assert "ranks/layers.0.attn.q_proj:" in text
    assert [(entry["global_step"], entry["loss"]) for entry in wandb.logged if "loss" in entry] == [
        (6, loss[0]),
        (12, loss[1]),
    ]
    assert {"ranks": ("image", 4, "uint8"), "global_step": 12} in wandb.logged
    assert wandb.given["project"] == "mine"
    assert wandb.given["resume"] == "allow"
    assert wandb.given["config"]["method"]["name"] == "hyperadalora"
    assert wandb.finished == 1


class Broken:
    """A logger whose service is lost after some rows."""

    def __init__(self, after: int = 1) -> None:
        self.left = after

    def log_config(self, config: Any) -> None:
        pass

    def log_dict(self, payload: Any, step: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise ConnectionError("the service is gone")

    def close(self) -> None:
        raise AssertionError("it was switched off")


def test_a_logger_that_fails_is_switched_off_with_one_warning_and_the_run_goes_on(
    make_config: ConfigMaker,
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(f"{LOGGING}.Broken", Broken, raising=False)
    sections = [{"_component_": f"{LOGGING}.Broken", "after": 2}, tensorboard(tmp_path / "tb")]
    run(make_config(metric_logger=sections, log_every_n_steps=1))
    said = capsys.readouterr().err
    assert said.count("the service is gone") == 1
    assert (
        "warning: Broken failed and is switched off (ConnectionError('the service is gone')); the "
        "run goes on, and metrics.jsonl has every figure.\n"
    ) in said
    assert len(rows(tmp_path / "run")) == len(scalars_of(tmp_path / "tb")["loss"]) == 12


WANDB = {"_component_": f"{LOGGING}.WandBLogger"}


def test_a_logger_is_closed_where_the_base_cannot_be_loaded(
    make_config: ConfigMaker, run: Run, monkeypatch: pytest.MonkeyPatch, wandb: SimpleNamespace
) -> None:
    def load(*_: object) -> None:
        assert wandb.run is not None
        raise UserError("the weights are of another model.")

    monkeypatch.setattr("hyper_tune.torchtune.recipe.load_", load)
    config = make_config(metric_logger=WANDB)
    for attempt in (1, 2):  # The folder is free again.
        with pytest.raises(UserError, match="the weights are of another model"):
            run(config)
        assert (wandb.run, wandb.finished) == (None, attempt)


def test_a_logger_is_closed_where_the_next_cannot_be_made(
    make_config: ConfigMaker, run: Run, wandb: SimpleNamespace
) -> None:
    with pytest.raises(UserError, match="metric_logger has no key 'logdir'"):
        run(make_config(metric_logger=[WANDB, {**tensorboard(Path("x")), "logdir": "x"}]))
    assert wandb.given["project"] == "torchtune"
    assert (wandb.run, wandb.finished) == (None, 1)


def test_other_ranks_log_and_show_nothing(
    make_config: ConfigMaker,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = RecipeSettings.from_config(OmegaConf.load(make_config(diagnose_every_n_steps=1)))
    monkeypatch.setattr(parallel, "rank", lambda: 1)
    loggers = Loggers([tensorboard(tmp_path / "tb")], step=0, warn=pytest.fail)
    loggers.log({"loss": 1.0}, 1)
    loggers.close()
    assert not (tmp_path / "tb").exists()
    with FineTuning(settings) as run:
        capsys.readouterr()
        monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
        with Reporter(run) as reporter:
            reporter.add({"step": 12, "loss": 1.0, "live_ranks": 3, "tokens_per_second": 1.0})
        assert capsys.readouterr().err == ""
