"""The examples for several machines: the arguments are ones that are taken, and they agree."""

import argparse
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from torchtune._cli.tune import TuneCLIParser

from hyper_tune.layout import BaseLayout
from hyper_tune.overrides import apply_overrides
from hyper_tune.packaged import find_config, read_config
from hyper_tune.torchtune.settings import COMPONENTS, RecipeSettings

GUIDE = (Path(__file__).parents[3] / "docs/guide/multi-node.md").read_text()
NODES, GPUS = 2, 8


def block(language: str) -> str:
    """The guide's one block of a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", GUIDE, flags=re.DOTALL)
    return text


def job() -> Any:
    return yaml.safe_load(block("yaml"))


def pods() -> list[dict[str, Any]]:
    replicas = job()["spec"]["pytorchReplicaSpecs"]
    return [replicas[name]["template"]["spec"] for name in ("Master", "Worker")]


def slurm_command() -> list[str]:
    (line,) = (
        line for line in block("bash").replace("\\\n", " ").splitlines() if "tune run" in line
    )
    return shlex.split(line)[1:]


def kubernetes_command() -> list[str]:
    (container,) = pods()[0]["containers"]
    assert container["command"] == ["bash", "-c"]
    (line,) = container["args"]
    return shlex.split(line)


COMMANDS = {"slurm": slurm_command(), "kubernetes": kubernetes_command()}


def parsed(command: list[str]) -> argparse.Namespace:
    """What torchtune's own parser makes of a command."""
    assert command[0] == "tune"
    arguments: argparse.Namespace = TuneCLIParser()._parser.parse_args(command[1:])
    return arguments


@pytest.mark.parametrize("name", COMMANDS)
def test_the_launchers_arguments_are_taken(name: str) -> None:
    arguments = parsed(COMMANDS[name])
    assert (arguments.nnodes, arguments.nproc_per_node) == (str(NODES), str(GPUS))
    # Without an endpoint, `tune run` makes a job of each machine.
    assert arguments.rdzv_backend == "c10d"
    assert ":" in arguments.rdzv_endpoint
    assert arguments.rdzv_id != "none"
    assert arguments.recipe == "hyper-tune/hyperadalora_full"


@pytest.mark.parametrize("name", COMMANDS)
def test_the_recipes_arguments_make_the_papers_batch(name: str) -> None:
    option, config, *overrides = parsed(COMMANDS[name]).recipe_args
    assert option == "--config"
    chosen = apply_overrides(read_config(find_config(config)), overrides, COMPONENTS)
    settings = RecipeSettings.from_config(chosen)
    assert settings.resume_from_checkpoint
    batch = settings.batch_size * settings.gradient_accumulation_steps
    assert batch * NODES * GPUS == 64
    layout = BaseLayout.of(
        NODES * GPUS, settings.data_parallel_shard_dim, settings.data_parallel_replicate_dim
    )
    assert layout == BaseLayout(shard=GPUS, replicate=NODES)


def test_slurm_starts_as_many_machines_as_the_launcher_expects() -> None:
    asked = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", block("bash"), re.M))
    assert (asked["nodes"], asked["gpus-per-node"]) == (str(NODES), str(GPUS))
    assert asked["ntasks-per-node"] == "1"


def test_the_pods_are_as_many_machines_as_the_launcher_expects() -> None:
    replicas = job()["spec"]["pytorchReplicaSpecs"]
    assert sum(part["replicas"] for part in replicas.values()) == NODES
    master, worker = pods()
    assert master == worker
    (container,) = master["containers"]
    assert container["name"] == "pytorch"  # the operator sets variables of this one alone
    assert container["resources"]["limits"] == {"nvidia.com/gpu": GPUS}
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in master["volumes"]}
