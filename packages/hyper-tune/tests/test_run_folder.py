"""The folder of a run belongs to one process, and an earlier run in it is not lost."""

import json
import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hyper_tune import UserError
from hyper_tune.checkpoint import write_checkpoint
from hyper_tune.run_folder import RunFolder

HOLDER = """
import sys, time
from pathlib import Path
from hyper_tune.run_folder import RunFolder
folder = RunFolder(Path(sys.argv[1]))
folder.start(resume=True)
print("started", flush=True)
time.sleep(600)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[RunFolder]:
    folder = RunFolder(tmp_path / "runs" / "first")
    yield folder
    folder.close()


def refusal(folder: RunFolder, *, resume: bool) -> str:
    with pytest.raises(UserError) as caught:
        folder.start(resume=resume)
    return str(caught.value)


def test_start_makes_the_folder(folder: RunFolder) -> None:
    folder.start(resume=False)
    assert [path.name for path in folder.path.iterdir()] == [".lock"]
    assert folder.checkpoints == folder.path / "checkpoints"
    folder.metrics.append({"step": 1})
    assert (folder.path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_one_holder_at_a_time(folder: RunFolder) -> None:
    folder.start(resume=False)
    other = RunFolder(folder.path)
    message = f"another process trains in {folder.path}; wait for it, or set another output_dir."
    assert refusal(other, resume=True) == message
    folder.close()
    other.start(resume=True)
    assert refusal(folder, resume=True) == message
    other.close()


def test_the_lock_goes_with_the_process_that_is_killed(folder: RunFolder) -> None:
    command = [sys.executable, "-c", HOLDER, str(folder.path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "started\n"
        assert refusal(folder, resume=True).startswith("another process trains in ")
        holder.kill()
        assert holder.wait() == -signal.SIGKILL
    folder.start(resume=True)


def test_a_refused_start_leaves_the_holders_files(folder: RunFolder) -> None:
    folder.start(resume=False)
    (folder.path / ".tmp-summary.json").touch()
    refusal(RunFolder(folder.path), resume=True)
    assert (folder.path / ".tmp-summary.json").exists()


@pytest.mark.parametrize("what", ["checkpoint", "row"])
def test_an_earlier_run_is_only_resumed(folder: RunFolder, what: str) -> None:
    folder.start(resume=False)
    if what == "checkpoint":
        write_checkpoint(folder.checkpoints, 1, {})
    else:
        folder.metrics.append({"step": 1})
    folder.close()
    other = RunFolder(folder.path)
    assert refusal(other, resume=False) == (
        f"{folder.path} holds an earlier run; set resume_from_checkpoint=True to go on with it, "
        "or another output_dir."
    )
    folder.start(resume=True)  # the refused one holds no lock
    assert len(list(folder.path.iterdir())) == 2


def test_leftovers_of_a_dead_writer_are_no_earlier_run(folder: RunFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / ".tmp-summary.json").touch()
    (folder.path / "metrics.jsonl").write_text('{"step": 1, "lo')
    folder.start(resume=False)
    assert {path.name for path in folder.path.iterdir()} == {".lock", "metrics.jsonl"}


def test_a_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "run"
    text = refusal(RunFolder(path), resume=False)
    assert text.startswith(f"output_dir {path} cannot be written: ")
    assert text.endswith(f"Not a directory: '{path}'.")


def test_text_and_json_are_written_whole(folder: RunFolder) -> None:
    folder.start(resume=False)
    folder.write_text("config.yaml", "a: é\n")
    folder.write_json("summary.json", {"loss": 0.1, "ranks": {"q_proj": 3}})
    assert (folder.path / "config.yaml").read_bytes() == "a: é\n".encode()
    text = (folder.path / "summary.json").read_text()
    assert text == '{\n "loss": 0.1,\n "ranks": {\n  "q_proj": 3\n }\n}\n'
    with pytest.raises(ValueError, match="Out of range float values"):
        folder.write_json("summary.json", {"loss": math.nan})
    assert json.loads((folder.path / "summary.json").read_text())["loss"] == 0.1


def test_closing_twice_is_once(folder: RunFolder) -> None:
    folder.start(resume=False)
    folder.close()
    folder.close()
    folder.start(resume=False)
