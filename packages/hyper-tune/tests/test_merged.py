"""A merged checkpoint is the base with the named weights changed, or is not there at all."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from hyper_tune.errors import UserError
from hyper_tune.merged import write_merged

FILES = ["first.safetensors", "second.safetensors"]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    torch.manual_seed(0)
    first = {"a": torch.randn(3, 4), "b": torch.randn(3, 4).bfloat16()}
    save_file(first, folder / FILES[0])
    save_file({"c": torch.randn(2, 2), "n": torch.arange(3)}, folder / FILES[1])
    for name in (
        "tokenizer.json",
        "model.safetensors.index.json",
        "b.index.json",
        "notes.md",
        "old.pth",
    ):
        (folder / name).write_text("{}")
    (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
    (folder / "original").mkdir()
    return folder


def test_named_weights_change_and_nothing_else(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "merged"
    seen = []

    def edit(weight: torch.Tensor) -> torch.Tensor:
        seen.append(weight.dtype)
        return weight + 1

    write_merged(base, FILES, output, {"a": edit, "b": edit}, texts={"README.md": "text"})
    first, second = (load_file(base / name) for name in FILES)
    names = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    written = [load_file(output / name) for name in names]
    assert torch.equal(written[0]["a"], first["a"] + 1)
    assert torch.equal(written[0]["b"], (first["b"].float() + 1).bfloat16())
    assert torch.equal(written[1]["c"], second["c"])
    assert torch.equal(written[1]["n"], second["n"])
    assert seen == [torch.float32, torch.float32]
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {"a": names[0], "b": names[0], "c": names[1], "n": names[1]}
    assert index["metadata"]["total_size"] == 3 * 4 * 4 + 3 * 4 * 2 + 2 * 2 * 4 + 3 * 8
    others = {"config.json", "tokenizer.json", "README.md", "model.safetensors.index.json"}
    assert {path.name for path in output.iterdir()} == {*names, *others}


def test_a_dtype_is_that_of_every_number_and_of_the_configuration(
    base: Path, tmp_path: Path
) -> None:
    write_merged(base, FILES, tmp_path / "merged", {}, dtype=torch.float16)
    written = load_file(tmp_path / "merged" / "model-00001-of-00002.safetensors")
    assert {tensor.dtype for tensor in written.values()} == {torch.float16}
    second = load_file(tmp_path / "merged" / "model-00002-of-00002.safetensors")
    assert second["n"].dtype == torch.int64
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config == {"torch_dtype": "float16"}


def refused(base: Path, output: Path, **names: object) -> str:
    with pytest.raises(UserError) as error:
        write_merged(base, FILES, output, {name: lambda w: w for name in names})
    return str(error.value)


def test_what_cannot_be_merged_is_refused_before_anything_is_written(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "merged"
    assert refused(base, output, a=1, missing=1) == (
        f"{base} has no tensor missing (1 of 2 are missing); it is not the model that was trained."
    )
    free = SimpleNamespace(free=100)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: free)
    assert "needs 0.0 GiB, but" in refused(base, output)
    free.free = 3 * 4 * 4 + 3 * 4 * 2 + 2 * 2 * 4 + 3 * 8
    write_merged(base, FILES, output, {})
    free.free -= 1
    assert "make room, or write it elsewhere" in refused(base, tmp_path / "other")
    assert refused(base, output) == f"{output} exists; give a folder that does not."
    (base / FILES[1]).write_bytes(b"no")
    assert f"{base / FILES[1]} is not a whole safetensors file" in refused(base, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "merged"]


def test_a_failure_in_the_middle_leaves_nothing(base: Path, tmp_path: Path) -> None:
    def fail(_: torch.Tensor) -> torch.Tensor:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_merged(base, FILES, tmp_path / "merged", {"c": fail})
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
