"""The generation recipe: its data in every schema, its table, its tiny rows."""

import argparse
import json
import sys
from pathlib import Path

import pytest

from hyper_tune import METHODS
from hyper_tune.entry import RECIPES
from hyper_tune.evaluate.sandbox import Sandbox
from hyper_tune.evaluate.tasks import Gsm8kTask, HumanEvalTask, TextTask
from hyper_tune.torchtune import cli
from hyper_tune.torchtune.settings import RecipeSettings

RECIPE = Path(__file__).parents[2] / "recipes" / "generation"
NAMES = ("alpaca", "magpie", "open_platypus", "gsm8k", "humaneval")


@pytest.fixture
def recipe(monkeypatch):
    """Return the recipe's modules, which import each other by name as scripts do."""
    monkeypatch.syspath_prepend(str(RECIPE))
    for name in ("data", "tiny", "generation"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import generation
    import tiny

    import data

    yield argparse.Namespace(data=data, generation=generation, tiny=tiny)
    for name in ("data", "tiny", "generation"):
        sys.modules.pop(name, None)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("name", NAMES)
def test_tiny_rows_become_files_that_their_task_reads(recipe, tmp_path, name):
    folder = recipe.generation.make_data(tmp_path, [name])
    task = {"gsm8k": Gsm8kTask, "humaneval": lambda path: HumanEvalTask(path, Sandbox())}
    test = task.get(name, TextTask)(folder / name / "test.jsonl")
    assert len(test) == 20
    trained = recipe.generation.TRAINED_ON.get(name, name)
    assert len(TextTask(folder / trained / "train.jsonl")) >= 270


@pytest.mark.parametrize("name", ["alpaca", "magpie", "open_platypus"])
def test_held_out_rows_are_chosen_by_the_seed_and_not_trained_on(recipe, tmp_path, name):
    rows = [dict(row, more=1) for row in recipe.tiny.rows(name, 200)]
    source = recipe.data.SOURCES[name]

    def written(seed):
        options = argparse.Namespace(held_out=15, seed=seed)
        recipe.data.write(tmp_path, source, rows, None, options)
        return lines(tmp_path / "train.jsonl"), lines(tmp_path / "test.jsonl")

    train, test = written(0)
    assert (len(train), len(test)) == (185, 15)
    plain = [{key: row[key] for key in source.columns} for row in rows]
    assert [row for row in plain if row not in test] == train
    assert sorted(map(str, train + test)) == sorted(map(str, plain))
    assert written(0) == (train, test) != written(1)
    few = argparse.Namespace(held_out=1000, seed=0)
    recipe.data.write(tmp_path, source, rows, None, few)
    assert len(lines(tmp_path / "test.jsonl")) == 20


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_local_files_are_read_in_place_of_the_hub(recipe, tmp_path, monkeypatch, kind):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    datasets = pytest.importorskip("datasets")
    rows = recipe.tiny.rows("gsm8k", 12)
    paths = []
    for name, part in (("a", rows[:10]), ("b", rows[10:])):
        paths.append(tmp_path / f"{name}.{kind}")
        made = datasets.Dataset.from_list(part)
        made.to_parquet(paths[-1]) if kind == "parquet" else made.to_json(paths[-1])
    source = recipe.data.SOURCES["gsm8k"]
    train, test = recipe.data.read(source, paths)
    recipe.data.write(tmp_path, source, train, test, argparse.Namespace())
    assert lines(tmp_path / "train.jsonl") == rows[:10]
    assert lines(tmp_path / "test.jsonl") == rows[10:]


def test_a_missing_column_is_named(recipe, tmp_path):
    source = recipe.data.SOURCES["alpaca"]
    with pytest.raises(SystemExit, match=r"tatsu-lab/alpaca: a row has no output; it has instruc"):
        recipe.data.write(tmp_path, source, [{"instruction": "a"}], None, argparse.Namespace())


def test_the_table_has_a_column_for_each_method(recipe):
    def results(**values):
        return {"metrics": [{"name": name, "value": value} for name, value in values.items()]}

    found = {
        ("alpaca", "adalora"): results(BLEU=70.711, ROUGE=56.8),
        ("alpaca", "hyperadalora"): results(BLEU=1, ROUGE=2),
        ("gsm8k", "adalora"): results(match=3),
        ("gsm8k", "hyperadalora"): results(match=4),
    }
    assert recipe.generation.table(found).splitlines() == [
        "| data | metric | adalora | hyperadalora |",
        "|---|---|---:|---:|",
        "| alpaca | BLEU | 70.71 | 1.00 |",
        "| alpaca | ROUGE | 56.80 | 2.00 |",
        "| gsm8k | match | 3.00 | 4.00 |",
    ]


@pytest.mark.filterwarnings("ignore:optimizer.lr is")
@pytest.mark.parametrize("scale", ["tiny", "real"])
@pytest.mark.parametrize("method", METHODS)
def test_the_recipe_accepts_every_scale_and_method(recipe, tmp_path, monkeypatch, scale, method):
    typed = []
    monkeypatch.setattr(recipe.generation, "_run", typed.append)
    chosen = recipe.generation.SCALES[scale]
    recipe.generation.train(
        tmp_path / "run", chosen.config, method, Path("data/alpaca"), chosen.overrides
    )
    (command,) = typed
    config = cli.configuration(command[3:], RECIPES[command[2]])
    assert RecipeSettings.from_config(config).method.name == method
    assert config.dataset["_component_"] == "hyper_tune.torchtune.data.file_dataset"
    assert config.dataset.path == "data/alpaca/train.jsonl"


def test_a_hub_that_cannot_be_reached_is_one_line(recipe, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def fail(*names):
        raise ConnectionError("Couldn't reach 'tatsu-lab/alpaca' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(SystemExit) as caught:
        recipe.data.read(recipe.data.SOURCES["alpaca"], None)
    assert caught.value.code == (
        "tatsu-lab/alpaca cannot be fetched (Couldn't reach 'tatsu-lab/alpaca' on the Hub); where "
        "there is a network, run `hf download tatsu-lab/alpaca --repo-type dataset --local-dir "
        "alpaca`, and name its files with --source."
    )


@pytest.mark.parametrize("place", ["missing.parquet", "missing.jsonl"])
def test_a_local_file_that_is_not_there_is_named(recipe, tmp_path, place):
    pytest.importorskip("datasets")
    with pytest.raises(SystemExit, match=f"--source .*{place} does not exist"):
        recipe.data.read(recipe.data.SOURCES["alpaca"], [tmp_path / place])


def test_commands_are_those_that_a_user_types(recipe, tmp_path, monkeypatch):
    typed = []
    monkeypatch.setattr(recipe.generation, "_run", typed.append)
    run = tmp_path / "run"
    recipe.generation.train(run, "llama3_1_8b", "adalora", Path("data/alpaca"), ["x={data}/y"])
    (command,) = typed
    assert command[1:] == [
        *("run", "hyper-tune/adalora_full", "--config", "llama3_1_8b", f"output_dir={run}"),
        *(
            "resume_from_checkpoint=True",
            "dataset=hyper_tune.torchtune.data.file_dataset",
            "dataset.path=data/alpaca/train.jsonl",
            "x=data/alpaca/y",
        ),
    ]
    run.mkdir()
    (run / "summary.json").write_text("{}")
    recipe.generation.train(run, "llama3_1_8b", "adalora", Path("data/alpaca"), [])
    assert len(typed) == 1
    folder = run / "evaluation" / "humaneval"
    folder.mkdir(parents=True)
    (folder / "results.json").write_text('{"metrics": []}')
    found = recipe.generation.evaluate(run, "humaneval", Path("data"), ("--limit", "3"))
    assert found == {"metrics": []}
    assert "--execute-generated-code" in typed[1]
    assert typed[1][typed[1].index("--data") + 1] == "data/humaneval/test.jsonl"
