"""The grid, with stub cells: what is skipped, what fails, what is killed."""

import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hyper_tune.errors import UserError

RECIPE = Path(__file__).parents[3] / "recipes" / "paper"
WRITES = "import sys, pathlib; pathlib.Path(sys.argv[1], 'out').write_text('done')"
WAITS = (
    "import sys, time, pathlib; here = pathlib.Path(sys.argv[1]); here.joinpath('begun').touch()\n"
    "end = time.monotonic() + 120\n"
    "while not pathlib.Path(sys.argv[2]).exists() and time.monotonic() < end: time.sleep(0.02)\n"
    "here.joinpath('out').write_text('done')"
)
FAILS = "import sys; print('first', file=sys.stderr); sys.exit('error: no such rows; make some.')"


def stub(recipe, label, code, *more, needs=()):
    words = ("python", "-c", code, "{cell}", *more, label)
    return recipe.cells.Cell(label, words, "out", tuple(needs))


def run_grid(recipe, output, cells, jobs=1):
    with recipe.grid.locked(output) as lock:
        return recipe.grid.Grid(output, lock, jobs).run(cells)


def test_finished_cells_are_skipped_and_failed_ones_do_not_stop_the_others(recipe, tmp_path, capfd):
    good, bad = stub(recipe, "good", WRITES), stub(recipe, "bad", FAILS)
    after_bad = stub(recipe, "after bad", WRITES, needs=[bad])
    after_good = stub(recipe, "after good", WRITES, needs=[good])
    cells = [bad, after_bad, good, after_good]
    failures = run_grid(recipe, tmp_path, cells)
    assert [(f.cell.label, f.reason) for f in failures] == [
        ("bad", "error: no such rows; make some."),
        ("after bad", "needs bad, which failed"),
    ]
    assert [recipe.grid.finished(cell, tmp_path) for cell in cells] == [False, False, True, True]
    record = good.folder(tmp_path) / recipe.grid.DONE
    before = record.read_text()
    assert json.loads(before)["command"] == good.command(tmp_path)
    assert "4 cells, 0 of them finished" in capfd.readouterr().err
    assert len(run_grid(recipe, tmp_path, cells)) == 2
    assert record.read_text() == before
    assert "4 cells, 2 of them finished" in capfd.readouterr().err
    (good.folder(tmp_path) / "out").unlink()
    assert len(run_grid(recipe, tmp_path, [good])) == 0
    assert record.read_text() != before


def test_jobs_run_at_a_time(recipe, tmp_path):
    # Each waits for what the other leaves: one at a time would never end.
    output = tmp_path / "out"
    first = stub(recipe, "first", WAITS, str(tmp_path / "go"))
    begun = str(first.folder(output) / "begun")
    code = WAITS + "\npathlib.Path(sys.argv[3]).touch()"
    second = stub(recipe, "second", code, begun, str(tmp_path / "go"))
    assert run_grid(recipe, output, [first, second], jobs=2) == []


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from cells import Cell
import cells, run
output, waits, go, data = sys.argv[2:]
made = [Cell(name, ("python", "-c", waits, "{cell}", go, name), "out") for name in ("a", "b")]
cells.Planner.all_cells = lambda self, seeds: made
words = ["table6", "--scale", "tiny", "--data", data, "--output", output]
sys.exit(run.main(words))
"""


def drive(output, go, data):
    words = [sys.executable, "-c", DRIVER, str(RECIPE), str(output), WAITS, str(go), str(data)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_and_keeps_others_out(recipe, data, tmp_path, how):
    output, go = tmp_path / "out", tmp_path / "go"
    words = ("python", "-c", WAITS, "{cell}", str(go))
    first, second = (recipe.cells.Cell(name, (*words, name), "out") for name in ("a", "b"))
    begun = first.folder(output) / "begun"
    process = drive(output, go, data)
    wait_for(begun.exists)
    with pytest.raises(UserError, match="another run"), recipe.grid.locked(output):
        pass
    process.send_signal(how)
    said = process.communicate(timeout=60)[1]
    if how == signal.SIGKILL:
        # The command that it had started goes on, and the folder is still its.
        with pytest.raises(UserError, match="a killed one"), recipe.grid.locked(output):
            pass
        go.touch()
        wait_for((first.folder(output) / "out").exists)
    else:
        assert process.returncode == 130
        assert "stopped; the same command goes on from here." in said
        assert not (first.folder(output) / "out").exists()
        go.touch()
    assert not recipe.grid.finished(first, output)

    def free():
        try:
            with recipe.grid.locked(output):
                return True
        except UserError:
            return False

    wait_for(free)
    assert run_grid(recipe, output, [first, second]) == []
    assert recipe.grid.finished(first, output)
    assert recipe.grid.finished(second, output)


def test_the_command_reports_failures_and_a_dry_run_lists(
    recipe, data, tmp_path, monkeypatch, capfd
):
    planner = recipe.cells.Planner
    bad, good = stub(recipe, "bad", FAILS), stub(recipe, "good", WRITES)
    monkeypatch.setattr(planner, "all_cells", lambda self, seeds: [bad, good])
    output = tmp_path / "out"
    words = ["table6", "--scale", "tiny", "--data", str(data), "--output", str(output)]
    assert recipe.run.main(words) == 1
    said = capfd.readouterr()
    assert (
        f"failed: bad: error: no such rows; make some. ({bad.folder(output)}/log.txt)" in said.err
    )
    assert "| adalora | 8125 | - | - | - |" in said.out
    assert recipe.run.main([*words, "--dry-run"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert "# bad: to run" in lines
    assert "# good: finished" in lines
    assert shlex.join(good.command(output)).splitlines()[0] in lines
