"""The paper recipe: its files, every command line, the grid, the rules, the report."""

import argparse
import csv
import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import typer

from hyper_tune import MethodConfig, assemble
from hyper_tune.cli.main import app as hyper_tune_app
from hyper_tune.errors import UserError
from hyper_tune.packaged import read_config

RECIPE = Path(__file__).parents[2] / "recipes" / "paper"
MODULES = (
    *("stopping", "experiment", "sources", "cells", "grid", "measures", "report", "run"),
    *("similarity", "step_cost", "small_llama"),
)
TABLES = [f"table{number}" for number in range(1, 12)] + ["figure2", "figure3"]
SWEEPS = ["rates_decoder", "rates_encoder"]


@pytest.fixture(scope="module")
def recipe():
    """Return the recipe's modules, which import each other by name as scripts do."""
    sys.path.insert(0, str(RECIPE))
    try:
        yield argparse.Namespace(**{name: __import__(name) for name in MODULES})
    finally:
        sys.path.remove(str(RECIPE))
        for name in (*MODULES, "base", "world"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def data(recipe, tmp_path_factory):
    """Return a folder in which every file is that a data set may have."""
    folder = tmp_path_factory.mktemp("data")
    for entry in recipe.experiment.catalogue()["data"].values():
        for source in [*entry["sources"], *entry.get("tiny", [])]:
            for path in (folder / source[part] for part in ("train", "test") if part in source):
                path.parent.mkdir(exist_ok=True)
                path.write_text(str(path.relative_to(folder)))
    return folder


@pytest.fixture
def package(recipe, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe.cells, "_package", lambda name: tmp_path)


def test_there_is_a_file_for_every_table_and_figure(recipe):
    assert recipe.experiment.names() == TABLES + SWEEPS
    for name in TABLES:
        loaded = recipe.experiment.load(name)
        kind, number = name[:-1].rstrip("1"), name.removeprefix("table").removeprefix("figure")
        assert loaded.place.startswith(f"{kind.title()} {number}, "), name
        assert loaded.points("real")
        assert loaded.points("tiny")


def test_every_point_of_a_table_has_the_papers_numbers(recipe):
    counts = {}
    for name in TABLES:
        loaded = recipe.experiment.load(name)
        counts[name] = sum(len(loaded.of_paper(point)) for point in loaded.points("real"))
    # Cells with numbers in the paper's tables, counted there.
    assert counts == {
        **{"table1": 16, "table2": 6, "table3": 16, "table4": 4, "table5": 12, "table6": 12},
        **{"table7": 28, "table8": 3, "table9": 8, "table10": 16, "table11": 8},
        **{"figure2": 0, "figure3": 0},
    }


def test_what_an_evaluation_writes_of_text_is_what_tables_may_ask(recipe, monkeypatch):
    from hyper_tune.evaluate import text

    cutter = argparse.Namespace(cut=str.split)
    rouge = argparse.Namespace(get_scores=lambda *_: [{"rouge-1": {"f": 1.0}}])
    monkeypatch.setattr(text, "find_spec", lambda name: name)
    monkeypatch.setattr(text, "_jieba", lambda: (cutter, rouge))
    installed = text.version
    theirs = ("jieba", "rouge-chinese")
    monkeypatch.setattr(text, "version", lambda name: "-" if name in theirs else installed(name))
    written = [metric.name for metric in text.text_metrics(["so it is"], ["so it is"])]
    asked = [name for name, (_, task) in recipe.experiment.MEASURES.items() if task == "text"]
    assert written == asked
    assert recipe.experiment.load("table1").measures == asked


def changed(recipe, tmp_path, old, new, name="table1"):
    text = (RECIPE / "experiments" / f"{name}.yaml").read_text()
    assert old in text
    path = tmp_path / f"{name}.yaml"
    path.write_text(text.replace(old, new))
    return recipe.experiment.read(path)


@pytest.mark.parametrize(
    ("name", "old", "new", "message"),
    [
        ("table1", "measures: [BLEU-4,", "measures: [accuracy,", r"'accuracy' is measured on data "
         r"of the task classification, but its data is text; choose of BLEU-4, ROUGE-1"),
        ("table1", "measures: [BLEU-4,", "measures: [latency (ms),", "needs no data among the ax"),
        ("table7", "  [memory", "  [final loss, memory", "needs data among the ax"),
        ("table1", "measures: [BLEU-4,", "measures: [BLEU-5,", "did you mean 'BLEU-4'"),
        ("table1", "method: [adalora", "method: [adalroa", "did you mean 'adalora'"),
        ("table1", "data: [Stanford Alpaca,", "data: [Alpaca,", "must be one of Stanford Alpaca"),
        ("table1", "tiny: {model: [LLaMA3.1-8B]", "tiny: {model: [Gemma]", "tiny has model 'Gem"),
        ("figure2", "data: [MR]", "data: [SST]", "tiny has data 'SST', which axes has not"),
        ("table1", "      adalora: {", "      lora: {", "paper has .* lora, which the axes do not"),
        ("table1", "title:", "titel:", "has no key 'titel'; did you mean 'title'"),
        ("table5", "choices:\n  gamma: method.orthogonality={}\n", "", "does not say what the a"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_right_is_refused(recipe, tmp_path, name, old, new, message):
    with pytest.raises(UserError, match=message):
        changed(recipe, tmp_path, old, new, name)


def test_mistakes_of_the_command_line_are_named(recipe, tmp_path, capsys):
    def said(*words):
        assert recipe.run.main([*words, "--output", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "there is no 'tabel6'" in said("tabel6", "--scale", "tiny")
    assert "did you mean table6?" in said("tabel6", "--scale", "tiny")
    missing = said("table6", "--scale", "tiny")
    assert "--data is missing; Stanford Alpaca needs alpaca/train.jsonl" in missing
    assert "python recipes/generation/data.py alpaca --output DATA" in missing
    empty = said("table6", "--scale", "real", "--data", str(tmp_path))
    assert f"{tmp_path} has no Stanford Alpaca: expected alpaca/train.jsonl and" in empty
    assert f"data.py alpaca --output {tmp_path}" in empty
    assert "gsm8k" not in empty


def parse(recipe, cell, output):
    """Read a cell's command line as the program that it calls does, without running it."""
    words = cell.command(output)
    if words[:2] == ["tune", "run"]:
        from hyper_tune.torchtune.cli import configuration
        from hyper_tune.torchtune.settings import RecipeSettings

        method = words[2].removeprefix("hyper-tune/").removesuffix("_full")
        return RecipeSettings.from_config(configuration(words[3:], method))
    if words[1:3] == ["-m", "hyper_tune"]:
        command = typer.main.get_command(hyper_tune_app).commands[words[3]]
        return command.make_context(words[3], words[4:])
    script = Path(words[1])
    assert script.is_file()
    if script.name == "train.py":
        from hyper_tune.hf.encoder_settings import EncoderSettings
        from hyper_tune.overrides import apply_overrides

        return EncoderSettings.from_config(apply_overrides(read_config(Path(words[3])), words[4:]))
    single = typer.Typer()
    single.command()(getattr(recipe, script.stem).main)
    return typer.main.get_command(single).make_context(script.stem, words[2:])


@pytest.mark.parametrize(
    ("sweep", "measure", "table"),
    [("rates_decoder", "held-out loss", "table10"), ("rates_encoder", "final loss", "figure2")],
)
def test_the_rates_are_the_best_of_the_sweep(recipe, package, data, sweep, measure, table):
    def rate(name, method, **choice):
        planner = recipe.cells.Planner(recipe.experiment.load(name), "tiny", data, "cpu")
        point = next(
            point
            for point in planner.experiment.points("tiny")
            if point.items() >= {"method": method, **choice}.items()
        )
        words = planner.measured(point, 0)["training"].words
        (word,) = (w for w in words if w.startswith(("lr=", "optimizer.lr=")))
        return float(word.partition("=")[2])

    with (RECIPE / "results" / f"{sweep}-tiny.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["measure"] == measure]
    axes = recipe.experiment.load(sweep).axes
    for method in axes["method"]:
        means = {r["learning rate"]: float(r["mean"]) for r in rows if r["method"] == method}
        values = {str(value): value for value in axes["learning rate"]}
        assert means.keys() == values.keys()
        best = values[min(means, key=means.get)]
        assert rate(table, method) == rate(sweep, method, **{"learning rate": best})


def test_the_base_reads_no_row_that_is_tuned_on_or_tested(recipe, tmp_path):
    rows = tmp_path / "train.jsonl"
    asked = [{"question": f"How many are {i}?", "answer": f"{i} are {i}."} for i in range(50)]
    rows.write_text("".join(json.dumps(row) + "\n" for row in asked))
    llama = recipe.small_llama
    read, left = llama.divided(llama.read_records(rows))
    assert (len(read), len(left)) == (40, 10)
    texts, kept = {llama.text(c) for c in read}, {llama.text(c) for c in left}
    assert texts | kept == {f"{row['question']}\n\n{row['answer']}" for row in asked}
    assert not texts & kept
    (tmp_path / "left.jsonl").write_text("".join(map(llama.line, left)))
    again = llama.read_records(tmp_path / "left.jsonl")
    assert [c.turns for c in again] == [c.turns for c in left]
    stream = list(itertools.islice(llama.forever(sorted(texts), 0), 80))
    assert sorted(stream[:40]) == sorted(stream[40:]) == sorted(texts)
    assert stream[:40] != stream[40:]
    planned = recipe.cells.base_cell(rows)
    assert rows in planned.files
    assert "--rows" in planned.words


def test_a_base_is_scored_before_it_is_tuned(recipe, data, tmp_path):
    planner = recipe.cells.Planner(recipe.experiment.load("table5"), "tiny", data, "cpu")
    cell = planner.before(planner.experiment.points("tiny")[0])
    assert {planner.before(p).digest for p in planner.experiment.points("tiny")} == {cell.digest}
    assert cell.digest in {each.digest for each in planner.all_cells((0,))}
    assert f"{cell.needs[0].folder(tmp_path)}/base" in cell.command(tmp_path)
    assert str(data / "alpaca" / "test.jsonl") in cell.command(tmp_path)
    results = recipe.measures.Results(planner, tmp_path, (0,))
    ((place, found),) = results.before()
    assert list(place.values()) == ["LLaMA3.1-8B", "Stanford Alpaca", "no fine-tuning", "-"]
    assert found == {}
    folder = cell.folder(tmp_path)
    (folder / "results").mkdir(parents=True)
    metrics = {"metrics": [{"name": "ROUGE-1", "value": 12.5}]}
    (folder / "results" / "results.json").write_text(json.dumps(metrics))
    (folder / recipe.grid.DONE).write_text("{}")
    ((_, found),) = results.before()
    assert found == {"ROUGE-1": recipe.measures.Summary((12.5,))}
    real = recipe.cells.Planner(recipe.experiment.load("table5"), "real", data, "cpu")
    assert real.before(real.experiment.points("real")[0]) is None
    table6 = recipe.cells.Planner(recipe.experiment.load("table6"), "tiny", data, "cpu")
    assert table6.before(table6.experiment.points("tiny")[0]) is None


def test_rows_are_held_out_where_a_set_has_no_test(recipe, package, data, tmp_path):
    planner = recipe.cells.Planner(recipe.experiment.load("figure2"), "tiny", data, "cpu")
    point = next(p for p in planner.experiment.points("tiny") if p["data"] == "MR")
    read = parse(recipe, planner.measured(point, 0)["training"], tmp_path).data
    assert (read.train, read.validation) == (str(data / "mr"), None)
    assert (read.text, read.validation_fraction, read.split_seed) == ((), 0.03, 0)


# The paper's learning rate is not one for learned factors, as the recipe says.
@pytest.mark.filterwarnings("ignore:optimizer.lr is")
@pytest.mark.parametrize("scale", ["tiny", "real"])
@pytest.mark.parametrize("name", TABLES + SWEEPS)
def test_every_command_line_is_read_by_its_program(recipe, package, data, tmp_path, name, scale):
    loaded = recipe.experiment.load(name)
    planner = recipe.cells.Planner(loaded, scale, data, "cpu")
    cells = planner.all_cells([3])
    before = set()
    for cell in cells:
        assert {need.digest for need in cell.needs} <= before, cell.label
        before.add(cell.digest)
        read = parse(recipe, cell, tmp_path)
        assert read, cell.label
        if cell.result == "run/summary.json":
            # Table 8 compares with another seed.
            assert read.seed in ({3, 1003} if name == "table8" else {3})
            assert read.output_dir == cell.folder(tmp_path) / "run"
            assert read.resume_from_checkpoint is True
    assert len(before) == len(cells)


@pytest.mark.parametrize("scale", ["tiny", "real"])
def test_encoders_can_have_methods_that_do_not_prune(recipe, package, data, tmp_path, scale):
    figure = changed(recipe, tmp_path, "[adalora, hyperadalora]", "[lora, hyperdora]", "figure2")
    planner = recipe.cells.Planner(figure, scale, data, "cpu")
    read = [parse(recipe, cell, tmp_path).method for cell in planner.all_cells([0])]
    expected = {("lora", 3, None), ("hyperdora", 3, None)}
    assert {(m.name, m.init_rank, m.budget) for m in read} >= expected


def test_the_real_scale_is_the_papers_setting(recipe, package, data, tmp_path):
    def settings(name, **point):
        planner = recipe.cells.Planner(recipe.experiment.load(name), "real", data, "cuda")
        (found,) = [
            planner.measured(each, 0)["training"]
            for each in planner.experiment.points("real")
            if point.items() <= each.items()
        ]
        return parse(recipe, found, tmp_path)

    # Section 4.1.4 and Appendix E.
    for model in ("LLaMA3.1-8B", "Qwen2.5-7B"):
        read = settings("table6", model=model, data="OpenPlatypus", method="hyperadalora")
        assert read.batch_size * read.gradient_accumulation_steps == 64
        assert read.optimizer == {"_component_": "torch.optim.Adam", "lr": 1e-5, "fused": True}
        assert read.lr_scheduler["num_warmup_steps"] == 500
        assert "cosine" in read.lr_scheduler["_component_"]
        method = read.method
        assert (method.budget, method.orthogonality, method.pruning.interval) == (3, 0.1, 100)
        assert method.hypernetwork.preset == "attention-tinybert"
    read = settings("table2", method="hyperlora")
    assert read.batch_size * read.gradient_accumulation_steps == 8
    assert read.method.init_rank == 3
    read = settings("figure2", model="RoBERTa-base", data="RTE", method="adalora")
    assert (read.model, read.lr, read.head_lr, read.batch_size) == ("roberta-base", 1e-5, 1e-5, 64)
    assert (read.warmup_steps, read.lr_scheduler, read.method.budget) == (500, "cosine", 3)
    read = settings("figure3", data="WNLI", body="conv")
    assert (read.model, read.method.hypernetwork.preset) == (
        "microsoft/deberta-v3-base",
        "conv-resnet18",
    )
    assert settings("table11", data="Stanford Alpaca", gamma=0.0).method.orthogonality == 0


@pytest.mark.filterwarnings("ignore:optimizer.lr is")
def test_the_baseline_has_no_hypernetwork_and_no_other_choice(recipe, data):
    planner = recipe.cells.Planner(recipe.experiment.load("table11"), "tiny", data, "cpu")
    first, second = (planner.measured(p, 1)["baseline"] for p in planner.experiment.points("tiny"))
    assert first.digest == second.digest
    assert "hyper-tune/adalora_full" in first.words
    assert not [word for word in first.words if "orthogonality" in word]
    table8 = recipe.cells.Planner(recipe.experiment.load("table8"), "tiny", data, "cpu")
    for point in table8.experiment.points("tiny"):
        # The two that are compared have one learning rate, and differ by method or by seed.
        runs = table8.measured(point, 1)["similarity"].needs
        both = [parse(recipe, run, Path("out")) for run in runs]
        assert [run.optimizer["lr"] for run in both] == [point["learning rate"]] * 2
        seeds = [1, 1] if point["method"] == "hyperadalora" else [1001, 1]
        assert [run.seed for run in both] == seeds
        assert [run.method.name for run in both] == ["adalora", point["method"]]
    table6 = recipe.cells.Planner(recipe.experiment.load("table6"), "tiny", data, "cpu")
    plain, generated = (table6.measured(p, 1) for p in table6.experiment.points("tiny"))
    assert plain["training"].digest == generated["baseline"].digest == first.digest


def test_of_two_words_for_a_key_the_last_counts(recipe, package, data, tmp_path):
    planner = recipe.cells.Planner(recipe.experiment.load("figure3"), "tiny", data, "cpu")
    cells = [planner.measured(point, 0)["training"] for point in planner.experiment.points("tiny")]
    presets = [[w for w in cell.words if "preset=" in w] for cell in cells]
    key = "method.hypernetwork.preset"
    assert presets == [[f"{key}={body}-small"] for body in ("attention", "conv", "mlp")]
    figure2 = recipe.cells.Planner(recipe.experiment.load("figure2"), "tiny", data, "cpu")
    (same,) = [
        figure2.measured(point, 0)["training"]
        for point in figure2.experiment.points("tiny")
        if point["method"] == "hyperadalora"
    ]
    assert cells[0].digest == same.digest


def test_a_cell_is_another_when_what_defines_it_is(recipe, tmp_path):
    one, same, other = (tmp_path / name for name in ("one", "same", "other"))
    one.write_text("rows")
    same.write_text("rows")
    other.write_text("row")
    cell, cells = recipe.cells.Cell, recipe.cells
    plain = cell("a", ("python", "{file0}"), "r", (), (one,))
    assert cell("b", ("python", "{file0}"), "r", (), (same,)).digest == plain.digest
    others = [
        cell("a", ("python", "{file0}", "x"), "r", (), (one,)),
        cell("a", ("python", "{file0}"), "r", (), (other,)),
        cell("a", ("python", "{file0}"), "r", (plain,), (one,)),
    ]
    assert len({plain.digest, *(each.digest for each in others)}) == 4
    assert plain.command(tmp_path) == ["python", str(one)]
    assert cells.contents(tmp_path) != cells.contents(one)


# The stopping rule, on made series.


def literal_steps_to(losses, target, window):
    for steps in range(1, len(losses) + 1):
        if steps < window and len(losses) >= window:
            continue
        last = losses[max(0, steps - window) : steps]
        if len(losses) < window and steps < len(losses):
            continue
        if sum(last) / len(last) <= target:
            return steps
    return None


@pytest.mark.parametrize(
    ("losses", "target", "window", "expected"),
    [
        ([5.0, 4.0, 3.0, 2.0], 1.0, 2, None),  # never
        ([1.0, 4.0, 3.0, 2.0], 1.0, 1, 1),  # at the first step
        ([1.0, 1.0, 9.0, 9.0], 2.0, 2, 2),  # at the first that has a mean
        ([5.0, 0.0, 5.0, 3.0, 1.0, 1.0], 1.0, 2, 6),  # one low step of a noisy series is not it
        ([5.0, 0.0, 5.0, 3.0, 1.0, 1.0], 3.0, 2, 2),  # it need not stay there
        ([3.0, 1.0], 2.0, 9, 2),  # shorter than the window
        ([float("inf"), 1.0, 1.0], 1.0, 2, 3),  # a skipped step
        ([2.0, 2.0], 2.0, 2, 2),  # equal is reached
    ],
)
def test_the_stopping_rule(recipe, losses, target, window, expected):
    stopping = recipe.stopping
    assert stopping.steps_to(losses, target, window) == expected
    assert literal_steps_to(losses, target, window) == expected
    seconds = [1.0 + i for i in range(len(losses))]
    found = stopping.seconds_to(losses, seconds, target, window)
    assert found == (None if expected is None else sum(seconds[:expected]))


def test_the_stopping_rule_on_noise_is_that_of_its_twin(recipe):
    torch.manual_seed(0)
    for window, target in itertools.product((1, 3, 10), (0.4, 0.6, 0.9)):
        losses = (torch.linspace(1, 0.3, 40) + 0.3 * torch.randn(40)).tolist()
        expected = literal_steps_to(losses, target, window)
        assert recipe.stopping.steps_to(losses, target, window) == expected
    last = recipe.stopping.smoothed(losses, 10)[-1]
    assert recipe.stopping.steps_to(losses, last, 10) is not None
    with pytest.raises(ValueError, match="without steps"):
        recipe.stopping.smoothed([], 3)


# Table 8: alignment.


def literal_alignment(reference, other):
    """Try every order and all signs of p and q; return the best by the sum of cosine products."""
    rank = len(reference.lam)
    best, found = -1.0, None
    for order in itertools.permutations(range(rank)):
        parts, total = [], 0.0
        for i, j in enumerate(order):
            options = []
            for sp, sq in itertools.product((1.0, -1.0), repeat=2):
                p, q = sp * other.p[j], sq * other.q[j]
                cos_p = float(p @ reference.p[i] / (p.norm() * reference.p[i].norm()))
                cos_q = float(q @ reference.q[i] / (q.norm() * reference.q[i].norm()))
                options.append((min(cos_p, cos_q), cos_p * cos_q, p, sp * sq * other.lam[j], q))
            _, product, *chosen = max(options, key=lambda option: option[0] >= 0)
            total += product
            parts.append(chosen)
        if total > best:
            best, found = total, parts
    p, lam, q = zip(*found, strict=True)
    return torch.stack(p), torch.stack(lam), torch.stack(q)


def some_components(recipe, seed, rank=4):
    torch.manual_seed(seed)
    shapes = ((rank, 7), (rank,), (rank, 5))
    return recipe.similarity.Components(*(torch.randn(s, dtype=torch.float64) for s in shapes))


def product(parts):
    return parts.p.T @ torch.diag(parts.lam) @ parts.q


@pytest.mark.parametrize("seed", range(4))
def test_alignment_is_that_of_trying_everything(recipe, seed):
    reference, other = some_components(recipe, seed), some_components(recipe, 10 + seed)
    aligned = recipe.similarity.align(reference, other)
    p, lam, q = literal_alignment(reference, other)
    torch.testing.assert_close(aligned.p, p)
    torch.testing.assert_close(aligned.lam, lam)
    torch.testing.assert_close(aligned.q, q)
    torch.testing.assert_close(product(aligned), product(other))


def test_the_same_update_in_another_order_and_sign_is_found(recipe):
    reference = some_components(recipe, 0)
    order = [2, 0, 3, 1]
    sp, sq = torch.tensor([1.0, -1, -1, 1]), torch.tensor([-1.0, -1, 1, 1])
    other = recipe.similarity.Components(
        (reference.p * sp[:, None])[order],
        (reference.lam * sp * sq)[order],
        (reference.q * sq[:, None])[order],
    )
    torch.testing.assert_close(product(other), product(reference))
    found = recipe.similarity.similarities(reference, other)
    assert found["P"] < 0.9
    for name in ("P, aligned", "Λ, aligned", "Q, aligned", "ΔW"):
        assert found[name] == pytest.approx(1.0)


def test_components_that_one_run_has_pruned_are_left_out_of_those_in_both(recipe):
    one, other = some_components(recipe, 0), some_components(recipe, 1)
    for parts, pruned in ((one, 2), (other, 0)):
        for part in vars(parts).values():
            part[pruned] = 0
    found = recipe.similarity.similarities(one, other)
    for name, attribute in (("P", "p"), ("Q", "q")):
        mine, theirs = (
            torch.cat([getattr(parts, attribute)[i] for i in (1, 3)]) for parts in (one, other)
        )
        expected = float(mine @ theirs / (mine.norm() * theirs.norm()))
        assert found[f"{name}, in both"] == pytest.approx(expected)
    alone = recipe.similarity.Components(*(part[:1] for part in vars(one).values()))
    with pytest.raises(UserError, match="no matrix in which both runs have the same component"):
        recipe.similarity.compare({"m": alone}, {"m": pruned_only(recipe, alone)})


def pruned_only(recipe, parts):
    return recipe.similarity.Components(*(torch.zeros_like(part) for part in vars(parts).values()))


def test_components_of_a_run_are_its_update(recipe, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 4)).double()
    config = MethodConfig("adalora", init_rank=3, budget=2)
    method = assemble(model, config, total_steps=300, dtype=torch.float64)
    with torch.no_grad():
        method.stack.values.copy_(torch.randn_like(method.stack.values))
        for parameter in method.parameters():
            parameter.copy_(torch.randn_like(parameter))
        for group in method.stack.groups:
            if group.rank_mask is not None:
                group.rank_mask[:, 1] = False
    opened = argparse.Namespace(method=method)
    monkeypatch.setattr("hyper_tune.torchtune.trained.open_trained", lambda run: opened)
    found = recipe.similarity.components(Path("run"))
    assert list(found) == list(method.layers)
    for name, layer in method.layers.items():
        scaled = layer.scaling * product(found[name])
        torch.testing.assert_close(scaled, layer.delta().double())
        pruned = ~layer.rank_mask
        assert int(pruned.sum()) == 1
        assert not any(part[pruned].any() for part in vars(found[name]).values())
    with pytest.raises(UserError, match="adapt different matrices"):
        recipe.similarity.compare(found, {"other": found["0"]})


def test_what_is_kept_for_the_backward_pass_is_counted_by_hand(recipe):
    weight = torch.nn.Parameter(torch.ones(5, 3))
    rows = torch.ones(8, 3)

    def work():
        y = torch.tanh(rows[:4] @ weight.T)  # the whole of rows (8, 3); its own result (4, 5)
        z = y[:2] * y[2:]  # two views of what is counted already
        (z.exp() * 2).sum().backward()  # the result of exp (2, 5); a number is no tensor

    count = recipe.step_cost.kept_bytes
    assert count(work, besides=[weight]) == 4 * (8 * 3 + 4 * 5 + 2 * 5)
    assert weight.grad is not None
    assert count(work, besides=[weight, rows[5:]]) == 4 * (4 * 5 + 2 * 5)

    def of_weight():
        (rows @ (2 * weight).T).exp().sum().backward()

    # Rows and the result; not 2 * weight, since rows want no gradient.
    assert count(of_weight, besides=[weight]) == 4 * (8 * 3 + 8 * 5)


def assert_parts(found, adapted, generated):
    """Compare the parts with counts of numbers, of four bytes each."""
    method = adapted.method
    factors = 2 * method.stack.values.numel()
    if generated:  # and the state, which is as large, and what was chosen, in bytes
        states = [state for role in method.owner.roles for state in method.owner.state_of(role)]
        assert sum(state.numel() for state in states) == method.stack.values.numel()
        factors += method.stack.values.numel() + method.owner.choices.numel() / 4
    trained = sum(p.numel() for p in method.parameters())
    own = trained if generated else 0  # learned factors are counted as factors
    averages = 2 * trained + len(method.parameters())  # Adam's, and its count of steps
    inside = {id(p) for p in method.stack.leaf_parameters()}
    base = [p for p in adapted.model.parameters() if id(p) not in inside]
    base += [b for name, b in adapted.model.named_buffers() if not name.endswith("rank_mask")]
    expected = {"factors": factors, "trained": 2 * own + averages}
    for part, numbers in expected.items():
        assert found[f"{part} (MiB)"] * 2**20 == 4 * numbers, part
    assert found["base (MiB)"] * 2**20 == pytest.approx(4 * sum(b.numel() for b in base), rel=0.02)


def test_a_steps_cost_is_measured(recipe, monkeypatch):
    small = recipe.step_cost._llama(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    monkeypatch.setitem(recipe.step_cost.SHAPES, "llama-small", (torch.float32, small))
    made, adapt = [], recipe.step_cost.adapt
    monkeypatch.setattr(
        recipe.step_cost,
        "adapt",
        lambda *given, **more: made.append(adapt(*given, **more)) or made[-1],
    )

    def measured(name, batch=2):
        return recipe.step_cost.measure(
            "llama-small", name, batch, 8, 2, torch.device("cpu"), seed=0
        )

    kept = {}
    for name in ("hyperadalora", "adalora"):
        found = measured(name)
        assert made[-1].steps == 2 + 2  # those that warm up, too
        assert found["memory (MiB)"] > 50
        assert_parts(found, made[-1], generated=name == "hyperadalora")
        assert 0 < found["latency (ms)"] < 60_000
        kept[name] = found["kept (MiB)"] * 2**20
    # Beside what the model keeps the hypernetworks keep what they keep alone.
    owner = made[0].method.owner
    alone = recipe.step_cost.kept_bytes(
        owner.refresh, [*owner.parameters(), *owner.buffers(), made[0].method.stack.values]
    )
    assert kept["hyperadalora"] - kept["adalora"] == alone > 0
    assert recipe.step_cost.config("hyperadalora").hypernetwork.preset == "attention-tinybert"


# The grid, with stub cells.

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


# The report.


def finish(recipe, cell, output, losses, seconds, **summary):
    folder = cell.folder(output)
    (folder / "run").mkdir(parents=True)
    rows = [{"step": i, "loss": loss, "seconds": seconds} for i, loss in enumerate(losses, 1)]
    (folder / "run" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "run" / "config.yaml").write_text("seed: 0\n")
    whole = {
        "before": {},
        "ranks": {},
        "initial_rank": 1,
        "total_ranks": 1,
        "trainable_parameters": 1,
        "factor_parameters": 1,
        "after": summary,
    }
    (folder / "run" / "summary.json").write_text(json.dumps(whole))
    record = {"command": cell.command(output), "seconds": 9.0, "jobs": 2}
    (folder / recipe.grid.DONE).write_text(json.dumps(record))


def test_the_report_has_the_papers_numbers_beside_ours(recipe, data, tmp_path):
    planner = recipe.cells.Planner(recipe.experiment.load("table6"), "tiny", data, "cpu")
    plain, hyper = planner.experiment.points("tiny")
    slow, fast = [2.0] * 30 + [1.0] * 30, [2.0] * 15 + [1.0] * 45
    for seed, better in ((0, fast), (1, [2.0] * 60)):
        finish(recipe, planner.measured(plain, seed)["training"], tmp_path, slow, 0.5)
        finish(recipe, planner.measured(hyper, seed)["training"], tmp_path, better, 0.25)
    results = recipe.measures.Results(planner, tmp_path, (0, 1))
    cells = planner.all_cells((0, 1))
    failure = recipe.grid.Failure(cells[0], "error: it broke.")
    command = ["python", "recipes/paper/run.py", "table6"]
    paths = recipe.report.write_report(results, cells, [failure], command)
    text = paths[0].read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[0] == (
        "| model | data | method | paper: training time (s) | seconds to the loss "
        "| seconds of equal steps | steps to the loss |"
    )
    where = "| LLaMA3.1-8B (small Llama) | Stanford Alpaca"
    # AdaLoRA: its mean of thirty is at its last, 1, at step 60. Ours with seed 0: at step 45.
    assert rows[2] == f"{where} | adalora | 8125 | 30.00 ± 0.000 | 30.00 ± 0.000 | 60.00 ± 0.000 |"
    assert rows[3] == (
        f"{where} | hyperadalora | 6650 | 11.25 (1 of 2 seeds never) | 15.00 ± 0.000 "
        "| 45.00 (1 of 2 seeds never) |"
    )
    assert "trailing mean of the loss over 30 steps" in text
    assert "- train the small Llama: error: it broke." in text
    assert "Up to 2 cells ran at a time" in text
    assert str(tmp_path) not in text
    assert str(data) not in text
    for cell in cells[1:]:
        words = shlex.join(cell.command(Path("OUTPUT"))).replace(str(data.resolve()), "DATA")
        assert words in text
    with paths[1].open(newline="") as file:
        lines = {(r["method"], r["measure"], r["by"]): r for r in csv.DictReader(file)}
    assert lines["hyperadalora", "training time (s)", "paper"]["mean"] == "6650"
    found = lines["hyperadalora", "seconds to the loss", "here"]
    assert (found["mean"], found["seeds"], found["never"]) == ("11.25", "1", "1")


def test_a_figure_is_drawn_of_what_there_is(recipe, package, data, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    planner = recipe.cells.Planner(recipe.experiment.load("figure2"), "tiny", data, "cpu")
    monkeypatch.setattr(recipe.report, "_PACKAGES", str(tmp_path.parent))
    for point in planner.experiment.points("tiny")[:2]:
        cell = planner.measured(point, 0)["training"]
        finish(recipe, cell, output, [1.0] * 12, 0.5, accuracy=0.75)
    results = recipe.measures.Results(planner, output, (0, 1))
    found = results.summaries(planner.experiment.points("tiny")[0])
    assert str(found["accuracy"]) == "0.7500 (1 of 2 seeds missing)"
    paths = recipe.report.write_report(results, planner.all_cells((0, 1)), [], ["run"])
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    text = paths[0].read_text()
    assert "![Smoothed training loss](figure2-tiny.png)" in text
    assert f"model=PACKAGES/{tmp_path.name} " in text


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
