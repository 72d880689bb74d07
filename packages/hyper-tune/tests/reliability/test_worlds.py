"""Jobs of one, two and four processes save, load, compute and train the same."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
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


METHODS = ("dora", "hyperdora", "dylora", "hyperdylora")


def worst_differences(jobs: Any, function: str, folder: Path, worlds: tuple[int, ...]) -> Any:
    """Return the largest difference of each method's state from one process', after its steps.

    All processes of a job must end with the same bits.
    """
    for world in worlds:
        assert jobs.call(function, folder, ranks=world).wait() == [0] * world
    one, *others = (
        [load_file(folder / f"{world}-{rank}.safetensors") for rank in range(world)]
        for world in worlds
    )
    worst = dict.fromkeys(METHODS, 0.0)
    for name in METHODS:
        keys = [key for key in one[0] if key.startswith(f"{name}|")]
        assert len(keys) > 3
        assert any("magnitude" in key for key in keys) == name.endswith("dora")
        assert len(one[0][f"{name}|losses"].unique()) == 4
        for job in others:
            for key in keys:
                assert all(torch.equal(rank[key], job[0][key]) for rank in job), key
                error = (job[0][key].double() - one[0][key].double()).abs().max()
                worst[name] = max(worst[name], float(error))
    return worst


def test_dora_and_dylora_train_alike_on_every_number_of_processes(
    jobs: Any, nightly: bool, figure: Callable[..., None], tmp_path: Path
) -> None:
    worlds = WORLDS if nightly else (1, 2)
    worst = worst_differences(jobs, "method_ranks:train_all", tmp_path / "found", worlds)
    assert all(error <= 1e-12 for error in worst.values()), worst
    figure(
        10,
        f"{', '.join(METHODS)} on {', '.join(map(str, worlds))} processes, base sharded: float64 "
        "state after 4 steps within 1e-12, the same bits on all of a job",
        f"{max(worst.values()):.1e}",
    )


def test_methods_whose_gradients_are_not_summed_are_found(jobs: Any, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"^dora\|"):
        worst_differences(jobs, "method_ranks:train_apart", tmp_path / "found", (1, 2))
