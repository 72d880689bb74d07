"""What is shown of a run: a bar or lines, and the health of its method."""

import errno
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from hyper_core import GeneratedParameters, diagnose
from hyper_tune import MethodConfig, assemble
from hyper_tune.checkpoint import read_newest
from hyper_tune.diagnosis import diagnose_method
from hyper_tune.metrics import Metrics
from hyper_tune.run_folder import RunFolder
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.reporting import Reporter
from hyper_tune.torchtune.settings import RecipeSettings


@pytest.fixture
def reported(
    make_config: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Callable[[bool], str]]:
    """Return what reports four steps of twelve and returns what it wrote."""
    settings = RecipeSettings.from_config(OmegaConf.load(make_config(log_every_n_steps=2)))
    with FineTuning(settings) as run:

        def report(terminal: bool) -> str:
            monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
            capsys.readouterr()
            now = iter(range(0, 1000, 10))
            monkeypatch.setattr(
                "hyper_tune.torchtune.reporting.time.perf_counter", lambda: next(now)
            )
            with Reporter(run) as reporter:
                for step in (1, 2, 3, 4):
                    loss = None if step == 4 else step / 8
                    row = {"step": step, "loss": loss, "live_ranks": 50, "tokens_per_second": 99.6}
                    reporter.add(row)
            return capsys.readouterr().err

        yield report


def test_a_terminal_gets_a_bar_with_step_time_left_loss_ranks_and_speed(
    reported: Callable[[bool], str],
) -> None:
    written = reported(True)
    last = written.split("\r")[-1]
    assert re.search(r"hyperadalora: +33%\|.*\| 4/12 \[\d\d:\d\d<\d\d:\d\d, .*step", last), last
    assert "loss skipped, ranks 50/56, 100 tokens/s" in last
    assert "left" not in written


def test_no_terminal_gets_a_line_each_n_steps(reported: Callable[[bool], str]) -> None:
    assert reported(False).splitlines() == [
        # Ten seconds a reading: 10 s for two steps, then 20 s for four.
        "step 2/12: loss 0.2500, ranks 50/56, 100 tokens/s, 00:50 left",
        "step 4/12: loss skipped, ranks 50/56, 100 tokens/s, 00:40 left",
    ]


def test_a_diagnosis_is_that_of_the_hypernetworks_and_changes_nothing() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.Linear(24, 24))
    for name in ("hyperadalora", "hyperdora"):
        sections = {"name": name, "init_rank": 4, "hypernetwork": {"preset": "attention-small"}}
        config = MethodConfig.from_mapping(sections)
        method = assemble(torch.nn.Sequential(*map(_copy, model)), config, total_steps=900)
        before = {k: v.clone() for k, v in method.owner.state_dict().items()}
        chance = torch.get_rng_state()
        found = diagnose_method(method)
        assert torch.equal(torch.get_rng_state(), chance)
        after = method.owner.state_dict()
        assert all(torch.equal(before[key], after[key]) for key in before)
        owner = getattr(method.owner, "generated", method.owner)
        assert isinstance(owner, GeneratedParameters)
        expected = diagnose(owner)
        assert {r: f["cosine"] for r, f in found.hypernetworks.items()} == {
            r: f.cosine for r, f in expected.roles.items()
        }
        assert found.ranks == method.ranks()


def _copy(layer: torch.nn.Module) -> torch.nn.Module:
    assert isinstance(layer, torch.nn.Linear)
    return torch.nn.Linear(layer.in_features, layer.out_features)


@pytest.mark.parametrize(("step", "saved"), [(4, 3), (5, 3), (12, 12)])
def test_a_diagnosis_that_cannot_be_written_ends_the_run_after_the_next_step(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    step: int,
    saved: int,
) -> None:
    append = Metrics.append

    def full(metrics: Metrics, row: dict[str, Any]) -> None:
        if metrics._path.name == "diagnoses.jsonl" and row["step"] == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(metrics, row)

    taken = []
    monkeypatch.setattr(Metrics, "append", full)
    monkeypatch.setattr(FineTuning, "_count_skipped", lambda run, _: taken.append(run.step))
    with pytest.raises(OSError, match="No space left on device"):
        run(make_config(diagnose_every_n_steps=1, save_every_n_steps=3))
    assert taken == [*range(1, min(step + 1, 12) + 1)]
    folder = RunFolder(tmp_path / "run")
    assert read_newest(folder.checkpoints)[::2] == (saved, [])
    assert [row["step"] for row in folder.diagnoses.rows()] == [*range(1, step)]
    assert [row["step"] for row in folder.metrics.rows()] == [*range(1, step + 1)]
    assert not (folder.path / "summary.json").exists()
