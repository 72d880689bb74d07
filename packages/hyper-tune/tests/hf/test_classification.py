"""Classification sets: what is read, and each mistake named with its place before a model loads."""

import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest

from hyper_tune import UserError
from hyper_tune.hf.classification import ClassificationData, load_classification
from hyper_tune.hf.encoding import decode
from hyper_tune.hf.glue import GLUE, REGRESSION

TSV = 'index\tsentence1\tsentence2\tlabel\n0\tIt "rains.\tIt is wet.\tyes\n1\tOne.\tTwo.\tno\n'


def tsv(folder: Path, text: str = TSV, name: str = "train.tsv") -> Path:
    path = folder / name
    path.write_bytes(text.encode())
    return path


def pairs(path: Path, **options: Any) -> ClassificationData:
    defaults = {"validation": str(path), "text": ["sentence1", "sentence2"]}
    return ClassificationData(train=str(path), **{**defaults, **options})


def test_tsv_is_read_as_glue_writes_it(tmp_path: Path) -> None:
    train, held_out = load_classification(pairs(tsv(tmp_path)))
    assert train.texts == [('It "rains.', "It is wet."), ("One.", "Two.")]
    assert (train.names, train.labels) == (("no", "yes"), [1, 0])
    assert held_out == train
    named, _ = load_classification(pairs(tsv(tmp_path), labels=["yes", "no"]))
    assert (named.names, named.labels) == (("yes", "no"), [0, 1])


def test_csv_json_lines_and_parquet_hold_the_same(tmp_path: Path) -> None:
    rows = [{"text": 'a, "b"', "label": 1}, {"text": "ü", "label": 0}]
    csv = tsv(tmp_path, 'text,label\n"a, ""b""",1\nü,0\n', "rows.csv")
    lines = tsv(tmp_path, "\n".join(map(json.dumps, rows)), "rows.jsonl")
    parquet = tmp_path / "rows.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(parquet))
    for path in (csv, lines, parquet):
        train, _ = load_classification(pairs(path, text="text"))
        assert train.texts == [('a, "b"',), ("ü",)]
        assert (train.names, train.labels) == (("0", "1"), [1, 0])


def test_numbers_are_labels_in_their_order(tmp_path: Path) -> None:
    labels = ["10", "2", "-1", "word", "0"]
    lines = "".join(f"{number}\ta\tb\t{label}\n" for number, label in enumerate(labels))
    path = tsv(tmp_path, "index\tsentence1\tsentence2\tlabel\n" + lines)
    train, _ = load_classification(pairs(path))
    assert train.names == ("-1", "0", "2", "10", "word")
    assert [train.names[number] for number in train.labels] == labels


def test_numbers_with_a_point_may_be_names_of_classes(tmp_path: Path) -> None:
    path = tsv(tmp_path, TSV.replace("no\n", "0.5\n").replace("yes\n", "1.0\n"))
    named, _ = load_classification(pairs(path, labels=["0.5", "1.0"]))
    assert (named.names, named.labels) == (("0.5", "1.0"), [1, 0])
    whole = tsv(tmp_path, TSV.replace("no\n", "0.0\n").replace("yes\n", "1.0\n"))
    found, _ = load_classification(pairs(whole))
    assert (found.names, found.labels) == (("0.0", "1.0"), [1, 0])


def test_numbers_of_a_regression_stand_for_themselves(tmp_path: Path) -> None:
    path = tsv(tmp_path, TSV.replace("no\n", "-0.25\n").replace("yes\n", "4\n"))
    found, held_out = load_classification(pairs(path, regression=True))
    assert (found.names, found.labels) == ((), [4.0, -0.25])
    assert held_out == found
    same = tsv(tmp_path, TSV.replace("no\n", "1\n").replace("yes\n", "1\n"))
    assert load_classification(pairs(same, regression=True))[0].labels == [1.0, 1.0]


def test_folder_has_a_file_for_each_label_and_a_split_of_its_own(tmp_path: Path) -> None:
    for label in ("neg", "pos"):
        lines = [f"{label} {number} ñ" for number in range(10)]
        (tmp_path / label).write_bytes("\n".join(lines).encode("latin-1"))
    data = ClassificationData(train=str(tmp_path), encoding="latin-1", validation_fraction=0.2)
    train, held_out = load_classification(data)
    assert (len(train.texts), len(held_out.texts)) == (16, 4)
    assert not set(train.texts) & set(held_out.texts)
    for part in (train, held_out):
        assert part.names == ("neg", "pos")
        for (text,), label in zip(part.texts, part.labels, strict=True):
            assert text.startswith(part.names[label])
            assert text.endswith("ñ")
    assert load_classification(data) == (train, held_out)
    other = ClassificationData(train=str(tmp_path), encoding="latin-1", split_seed=1)
    assert load_classification(other)[1] != held_out


MISTAKES = {
    "missing column": (
        "a\tb\tlabel\nx\ty\t1\n",
        {},
        "train.tsv:2: the column 'sentence1' is missing; it has a, b, label.",
    ),
    "missing label": (
        "sentence1\tsentence2\tgold\nx\ty\t1\n",
        {},
        "train.tsv:2: the column 'label' is missing; it has sentence1, sentence2, gold.",
    ),
    "short row": (
        TSV + "2\tThree.\n",
        {},
        "train.tsv:4: the column 'sentence2' has no value; the row is short.",
    ),
    "long row": (
        TSV + "2\ta\tb\tyes\tmore\n",
        {},
        "train.tsv:4: the row has more fields than the 4 columns of the first line.",
    ),
    "empty text": (TSV + "2\t \tb\tyes\n", {}, "train.tsv:4: the text 'sentence1' is empty."),
    "empty file": ("", {}, "train.tsv holds no rows."),
    "head alone": (TSV.split("\n")[0] + "\n", {}, "train.tsv holds no rows."),
    "label out of range": (
        TSV,
        {"labels": ["no", "maybe"]},
        "train.tsv:2: the label is 'yes', but must be one of no, maybe; correct the row, or name "
        "the labels in data.labels.",
    ),
    "one label": (
        TSV.replace("no\n", "yes\n"),
        {},
        "data has the one label 'yes', in ",
    ),
    "regression": (
        TSV.replace("no\n", "3.8\n"),
        {},
        "train.tsv:3: the label is 3.8, a number that counts no classes; set data.regression=True, "
        "or, if it is the name of a class, name all in data.labels.",
    ),
    "no number": (
        TSV.replace("yes\n", "3.8\n"),
        {"regression": True},
        "train.tsv:3: the label is 'no', but data.regression needs a number; correct the row or "
        "data.label, or leave data.regression out.",
    ),
    "no finite number": (
        TSV.replace("yes\n", "inf\n"),
        {"regression": True},
        "train.tsv:2: the label is 'inf', but data.regression needs a number",
    ),
    "few rows": (
        TSV,
        {"validation": None},
        "train.tsv has 2 rows, of which a fraction of 0.1 leaves no rows to hold out or to train "
        "on; give data.validation.",
    ),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistake_in_a_table_is_named(tmp_path: Path, kind: str) -> None:
    text, options, message = MISTAKES[kind]
    with pytest.raises(UserError, match=re.escape(message)):
        load_classification(pairs(tsv(tmp_path, text), **options))


def test_label_that_only_the_held_out_rows_have_is_named(tmp_path: Path) -> None:
    other = tsv(tmp_path, TSV.replace("no\n", "perhaps\n"), "dev.tsv")
    with pytest.raises(UserError, match=r"dev.tsv:3: the label is 'perhaps', .* of no, yes"):
        load_classification(pairs(tsv(tmp_path), validation=str(other)))


def test_mistake_in_json_lines_is_named(tmp_path: Path) -> None:
    for text, message in (
        ('{"text": "a", "label": 0}\nnot', ":2: not JSON: "),
        ("[1]", ":1: expected an object, got list."),
    ):
        path = tsv(tmp_path, text, "rows.jsonl")
        with pytest.raises(UserError, match=re.escape(message)):
            load_classification(pairs(path, text="text"))
    broken = tsv(tmp_path, "no Parquet", "rows.parquet")
    with pytest.raises(UserError, match=r"rows.parquet cannot be read as Parquet: "):
        load_classification(pairs(broken, text="text"))
    with pytest.raises(UserError, match=r"ends in '.txt'; .tsv, .csv, .jsonl, .parquet can be"):
        load_classification(pairs(tsv(tmp_path, "x", "rows.txt"), text="text"))


def test_file_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    tsv(tmp_path, name="dev.tsv")
    with pytest.raises(UserError, match=r"train.tsv does not exist; .* has dev.tsv; correct data"):
        load_classification(pairs(tmp_path / "train.tsv"))


def test_folder_without_a_file_for_each_label_is_refused(tmp_path: Path) -> None:
    tsv(tmp_path, "a\n", "pos")
    with pytest.raises(UserError, match=r"must have a file of lines for each label; it has pos"):
        load_classification(ClassificationData(train=str(tmp_path)))
    tsv(tmp_path, "\n", "neg")
    with pytest.raises(UserError, match=r"neg holds no lines"):
        load_classification(ClassificationData(train=str(tmp_path)))


def test_encodings_are_told_apart(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes("a\nñ\n".encode("latin-1"))
    assert decode(path, "latin-1") == "a\nñ\n"
    with pytest.raises(UserError, match=r"lines:2: not UTF-8; set data.encoding, such as latin-1"):
        decode(path, "utf-8")
    path.write_bytes("a\nñ\n".encode())
    assert decode(path, "UTF8") == "a\nñ\n"
    with pytest.raises(UserError, match=r"lines:2: data.encoding is iso8859-1, but this is UTF-8"):
        decode(path, "latin-1")
    path.write_bytes("a\nñ\n".encode() + "ü\n".encode("latin-1"))
    for encoding in ("utf-8", "latin-1"):
        with pytest.raises(UserError, match=r"mixes encodings: line 2 is UTF-8, and line 3 is not"):
            decode(path, encoding)
    path.write_bytes("\ufeffä\r\n".encode())
    assert decode(path, "utf-8") == "ä\n"
    path.write_bytes("äu".encode("utf-16"))
    assert decode(path, "utf-16") == "äu"
    with pytest.raises(UserError, match=r"lines:1: not ascii|lines:1: not UTF-8"):
        decode(path, "utf-8")


def test_settings_that_cannot_be_are_refused() -> None:
    for options, message in (
        ({}, "data needs either glue, a task of GLUE, or train, a file; give one."),
        ({"glue": "rte", "train": "x"}, "data needs either glue"),
        ({"glue": "rt"}, "did you mean 'rte'?"),
        ({"glue": "sts-b"}, "did you mean 'stsb'?"),
        ({"glue": "ax"}, "data.glue is 'ax', but it has no labels, and no rows to train on; choo"),
        ({"glue": "stsb", "labels": ["0", "5"]}, "names classes, of which a regression has none"),
        ({"train": "x", "text": "a", "regression": "yes"}, "data.regression is 'yes', but must be"),
        ({"train": "x.tsv"}, "data.text is [], but must be one or two columns; name them."),
        ({"train": "x.tsv", "text": ["a", "b", "c"]}, "must be one or two columns"),
        ({"train": "x.tsv", "text": "a", "labels": ["a", 1, "1"]}, "must be names that differ"),
        ({"train": "x", "text": "a", "encoding": "klingon"}, "data.encoding is 'klingon': unknown"),
        ({"train": "x", "text": "a", "validation_fraction": 1.0}, "must be a number above 0 and"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            ClassificationData(**options)


@pytest.mark.parametrize("task", GLUE)
def test_glue_is_read_from_the_hub(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["yes", "no"]  # GLUE's own order, not the alphabet's: F1 is of the second
    features = {column: datasets.Value("string") for column in GLUE[task]}
    measured = task in REGRESSION
    features["label"] = datasets.Value("float32") if measured else datasets.ClassLabel(names=names)

    def rows(first: str) -> datasets.Dataset:
        columns: dict[str, Any] = {c: [f"{first} {c}", "x"] for c in GLUE[task]}
        columns["label"] = [4.5, 0] if measured else [1, 0]
        return datasets.Dataset.from_dict(columns, features=datasets.Features(features))

    endings = {"mnli": "_matched", "mnli_mismatched": "_mismatched"}
    held_out = f"validation{endings.get(task, '')}"
    splits = {"train": rows("a"), held_out: rows("b"), "test": None}
    asked: list[Any] = []

    def load(*what: Any) -> Any:
        asked.append(what)
        return splits

    monkeypatch.setattr(datasets, "load_dataset", load)
    train, validation = load_classification(ClassificationData(glue=task))
    assert asked == [("nyu-mll/glue", "mnli" if task in endings else task)]
    assert train.texts[0] == tuple(f"a {column}" for column in GLUE[task])
    assert validation.texts[0] == tuple(f"b {column}" for column in GLUE[task])
    if measured:
        assert (train.names, train.labels, validation.labels) == ((), [4.5, 0.0], [4.5, 0.0])
        return
    assert (train.names, train.labels) == (("yes", "no"), [1, 0])
    chosen, _ = load_classification(ClassificationData(glue=task, labels=["no", "yes"]))
    assert (chosen.names, chosen.labels) == (("no", "yes"), [0, 1])


def test_hub_that_cannot_be_reached_is_answered_with_what_to_download(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(*what: Any) -> Any:
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub\nmore")

    monkeypatch.setattr(datasets, "load_dataset", load)
    message = (
        "data.glue=rte: the hub's nyu-mll/glue cannot be reached (Couldn't reach 'nyu-mll/glue' on "
        "the Hub). Where there is a network, run `hf download nyu-mll/glue --repo-type dataset "
        "--include 'rte/*' --local-dir glue`; then leave data.glue out, and set data.train and "
        "data.validation to the files in glue/rte/."
    )
    with pytest.raises(UserError, match=re.escape(message)):
        load_classification(ClassificationData(glue="rte"))
