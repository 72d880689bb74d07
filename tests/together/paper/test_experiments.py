"""The files of experiments: one for every table and figure, and what is refused in them."""

import argparse

import pytest

from hyper_tune.errors import UserError

TABLES = [f"table{number}" for number in range(1, 12)] + ["figure2", "figure3"]
SWEEPS = ["rates_decoder", "rates_encoder"]


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
def test_a_file_that_is_not_right_is_refused(changed, name, old, new, message):
    with pytest.raises(UserError, match=message):
        changed(old, new, name)


def test_mistakes_of_the_command_line_are_named(recipe, tmp_path, capsys):
    def said(*words):
        assert recipe.run.main([*words, "--output", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    assert "there is no 'tabel6'" in said("tabel6", "--scale", "tiny")
    assert said("table6") == "error: Missing option '--scale'. Choose from: tiny, real\n"
    assert "did you mean table6?" in said("tabel6", "--scale", "tiny")
    missing = said("table6", "--scale", "tiny")
    assert "--data is missing; Stanford Alpaca needs alpaca/train.jsonl" in missing
    assert "python recipes/generation/data.py alpaca --output DATA" in missing
    empty = said("table6", "--scale", "real", "--data", str(tmp_path))
    assert f"{tmp_path} has no Stanford Alpaca: expected alpaca/train.jsonl and" in empty
    assert f"data.py alpaca --output {tmp_path}" in empty
    assert "gsm8k" not in empty
