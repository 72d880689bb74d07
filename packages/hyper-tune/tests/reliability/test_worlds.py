"""Jobs of one, two and four processes save, load and compute the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

WORLDS = (1, 2, 4)


def test_what_any_job_saves_every_job_loads(
    jobs: Any, figure: Callable[..., None], tmp_path: Path
) -> None:
    pairs = 0
    for saving in WORLDS:
        folder = tmp_path / str(saving) / "checkpoints"
        assert jobs.call("worlds:save_coloured", folder, ranks=saving).wait() == [0] * saving
        saved = {(folder.parent / f"saved.{rank}").read_text() for rank in range(saving)}
        assert len(saved) == 1
        for loading in WORLDS:
            assert jobs.call("worlds:load_coloured", folder, ranks=loading).wait() == [0] * loading
            befores = set()
            for rank in range(loading):
                found = json.loads((folder.parent / f"loaded-{loading}.{rank}").read_text())
                assert {found["after"]} == saved
                befores.add(found["before"])
            assert len(befores - saved) == loading
            pairs += 1
    figure(
        9,
        "a state saved on 1, 2 or 4, loaded on 1, 2 or 4: bitwise equal on every rank; the recipe "
        "refuses another number of processes by name",
        f"{pairs} of {pairs}",
    )


def worst_errors(jobs: Any, function: str, folder: Path) -> dict[str, float]:
    """Return the largest relative errors of gradients and losses against one process'."""
    for world in WORLDS:
        assert jobs.call(function, folder, ranks=world).wait() == [0] * world
    files = {path.stem: load_file(path) for path in folder.iterdir()}
    assert len(files) == sum(WORLDS)
    one = files.pop("1-0")
    assert all(tensor.isfinite().all() for tensor in one.values())
    assert max(one[name].abs().max() for name in one if name.isdecimal()) > 1e-3
    assert len(one["losses"].unique()) == 20
    worst = {"gradients": 0.0, "losses": 0.0, "masks": 0.0}
    for found in files.values():
        assert found.keys() == one.keys()
        for name, tensor in one.items():
            kind = name if name == "losses" else "masks" if "mask" in name else "gradients"
            expected = tensor.double()
            scale = expected.abs() if kind == "losses" else expected.abs().max()
            error = (found[name].double() - expected).abs() / scale
            worst[kind] = max(worst[kind], float(error.max()))
    pruned = [name for name, mask in one.items() if "mask" in name and not mask.all()]
    assert len(pruned) > 0
    return worst


def test_all_jobs_compute_the_same(jobs: Any, figure: Callable[..., None], tmp_path: Path) -> None:
    worst = worst_errors(jobs, "worlds:compute", tmp_path / "found")
    assert worst["gradients"] <= 1e-12
    assert 0 < worst["losses"] <= 1e-6
    assert worst["masks"] == 0
    figure(
        10,
        "1, 2 and 4 processes, unequal tokens: float64 gradients within 1e-12, float32 losses of "
        "20 steps of SGD within 1e-6, masks identical",
        f"{worst['gradients']:.1e}, {worst['losses']:.1e}, identical",
    )


def test_gradients_that_are_not_summed_are_found(jobs: Any, tmp_path: Path) -> None:
    worst = worst_errors(jobs, "worlds:compute_apart", tmp_path / "found")
    assert worst["gradients"] > 1e-2
    assert worst["losses"] > 1e-2
