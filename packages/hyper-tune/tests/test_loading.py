"""Data that a loader cannot give: one message, before a model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import LocalEntryNotFoundError
from omegaconf import OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.loading import build_dataset

ALPACA = "torchtune.datasets.alpaca_dataset"
STREAM = "hyper_tune.torchtune.streaming.StreamedDataset"
FETCH = (
    ".\nWhere there is a network, fetch it with:\n"
    "  hf download --repo-type dataset tatsu-lab/alpaca --local-dir data/alpaca\n"
    "bring the folder here, and set dataset.source=data/alpaca."
)

Refused = Callable[[dict[str, Any]], str]


@pytest.fixture
def refused(llama: dict[str, Any]) -> Refused:
    """Return what opens a data set, expects a refusal, and returns the message."""

    def open_it(component: dict[str, Any]) -> str:
        with pytest.raises(UserError) as caught:
            build_dataset("dataset", component, build_tokenizer(llama["tokenizer"]))
        return str(caught.value)

    return open_it


def test_the_hub_without_a_network_says_what_to_fetch_and_where_to_put_it(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    reason = "offline mode is enabled"
    found = refused({"_component_": ALPACA})
    assert found.startswith(
        "dataset: tatsu-lab/alpaca cannot be fetched from the Hugging Face Hub: "
    )
    assert found.endswith(FETCH)
    assert reason in found.lower() or "couldn't reach" in found.lower()


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("no route"),
        TimeoutError("no route"),
        LocalEntryNotFoundError("no route"),
        DatasetNotFoundError("no route"),
    ],
)
@pytest.mark.parametrize("component", [ALPACA, STREAM])
def test_every_way_in_which_the_hub_is_missed_has_the_remedy(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, error: Exception, component: str
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("wrapped") from error

    monkeypatch.setattr("torchtune.datasets._sft.load_dataset", fail)
    monkeypatch.setattr("datasets.load_dataset", fail)
    assert refused({"_component_": component, "source": "tatsu-lab/alpaca"}) == (
        f"dataset: tatsu-lab/alpaca cannot be fetched from the Hugging Face Hub: no route{FETCH}"
    )


GOOD = {"instruction": "?", "output": "."}
FILES: dict[str, tuple[str, bytes, str]] = {
    "empty.json": ("json", b"", "it holds no rows."),
    "latin.json": ("json", '[{"instruction": "é"}]'.encode("latin-1"), "UTF-8"),
    "latin.csv": ("csv", "instruction,output\né,é\n".encode("latin-1"), "'utf-8' codec can't dec"),
    "torn.json": ("json", b'[{"instruction": ', ""),
    "no.parquet": ("parquet", json.dumps(GOOD).encode(), "not a parquet file"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_says_why(refused: Refused, tmp_path: Path, name: str) -> None:
    kind, content, reason = FILES[name]
    (tmp_path / name).write_bytes(content)
    options = {"source": kind, "data_files": str(tmp_path / name), "cache_dir": str(tmp_path)}
    found = refused({"_component_": ALPACA, **options})
    assert found.startswith(f"dataset: {ALPACA} cannot be built: ")
    assert reason in found
    assert "error occurred while generating" not in found
    assert "\n" not in found


def test_a_missing_file_is_named(refused: Refused, tmp_path: Path) -> None:
    path = tmp_path / "none.json"
    found = refused({"_component_": ALPACA, "source": "json", "data_files": str(path)})
    assert found == f"dataset: {ALPACA} cannot be built: Unable to find '{path}'."


def test_an_unknown_component_and_an_unknown_key_are_named(refused: Refused) -> None:
    component = "hyper_tune.torchtune.data.file_dataset"
    assert refused({"_component_": component, "pth": "x"}) == (
        "dataset has no key 'pth'; did you mean 'path'?"
    )
    assert refused({"_component_": f"{component}s"}).startswith(
        f"dataset: {component}s cannot be built: "
    )
    assert refused({"_component_": ALPACA, "train_on_inputs": True}) == (
        "dataset has no key 'train_on_inputs'; did you mean 'train_on_input'?"
    )


INSTRUCT = "torchtune.datasets.instruct_dataset"


@pytest.mark.parametrize("component", [ALPACA, INSTRUCT, STREAM])
@pytest.mark.parametrize(
    ("source", "key", "hint"),
    [
        ("json", "xyzzy", "it has block_size, cache_dir, "),
        ("json", "delimiter", "it has "),  # of csv
        ("csv", "delimeter", "did you mean 'delimiter'?"),
        ("csv", "field", "it has "),  # of json
        ("parquet", "column", "did you mean 'column"),
        ("text", "sample", "did you mean 'sample_by'?"),
        ("arrow", "encoding", "it has "),
        ("someone/something", "xyzzy", "it has "),
        ("someone/something", "revison", "did you mean 'revision'?"),
        ("json", "streaming", "it has "),
        ("json", "path", "it has "),
        ("json", "load_dataset_kwargs", "it has "),
    ],
)
def test_a_key_that_no_loader_of_the_kind_has_is_refused(
    refused: Refused, component: str, source: str, key: str, hint: str
) -> None:
    keys = {"_component_": component, "source": source, "data_files": "x", key: 1}
    if component == INSTRUCT:
        keys["column_map"] = {"input": "question", "output": "answer"}
    found = refused(keys)
    assert found.startswith(f"dataset has no key {key!r}; {hint}")
    assert "\n" not in found


@pytest.mark.parametrize(
    ("kind", "text", "options"),
    [
        ("csv", "instruction|output\n?|.\n", {"sep": "|"}),
        ("csv", "instruction;output\n?;.\n", {"sep": ";", "quotechar": "^"}),
        ("json", '{"rows": [{"instruction": "?", "output": "."}]}', {"field": "rows"}),
    ],
)
def test_options_of_a_kind_of_file_reach_its_loader(
    llama: dict[str, Any], tmp_path: Path, kind: str, text: str, options: dict[str, Any]
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    path = folder / f"rows.{kind}"
    path.write_text(text)
    tokenizer = build_tokenizer(llama["tokenizer"])
    found = []
    for source in ({"source": kind, "data_files": str(path)}, {"source": str(folder)}):
        keys = {"split": "train", "cache_dir": str(tmp_path / "cache"), **source, **options}
        samples = build_dataset("dataset", {"_component_": ALPACA, **keys}, tokenizer)
        assert len(samples) == 1
        found.append(tokenizer.decode(samples[0]["tokens"]))
    assert "?" in found[0]
    assert found[0] == found[1]


def test_a_misspelt_role_of_a_column_is_refused(refused: Refused) -> None:
    for component in (ALPACA, "torchtune.datasets.alpaca_cleaned_dataset"):
        keys = {"_component_": component, "source": "json", "data_files": "x"}
        columns = {"instruction": "q", "inptu": "x", "output": "a"}
        assert refused({**keys, "column_map": columns}) == (
            "dataset.column_map has no key 'inptu'; did you mean 'input'?"
        )


def test_what_a_loader_of_ones_own_takes_beside_its_keys_is_its_own_matter(
    refused: Refused, llama: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(tokenizer: Any, *, rows: int = 1, **options: Any) -> Any:
        return rows, options

    monkeypatch.setattr("hyper_tune.torchtune.data.own", load, raising=False)
    keys = {"_component_": "hyper_tune.torchtune.data.own"}
    tokenizer = build_tokenizer(llama["tokenizer"])
    assert build_dataset("dataset", {**keys, "shards": 3}, tokenizer) == (1, {"shards": 3})
    assert refused({**keys, "row": 3}) == "dataset has no key 'row'; did you mean 'rows'?"


@pytest.mark.parametrize("source", ["pandas", "webdataset"])
def test_kinds_of_files_that_may_hold_pickles_are_refused(
    refused: Refused, tmp_path: Path, source: str
) -> None:
    assert refused({"_component_": ALPACA, "source": source, "data_files": "x.pkl"}) == (
        f"dataset.source is {source!r}, whose files may hold pickles, which are not read; convert "
        "them to json, csv or parquet."
    )


def test_bad_data_are_refused_before_the_base_is_read(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("the base was loaded")

    monkeypatch.setattr("hyper_tune.torchtune.recipe.load_", loaded)
    (tmp_path / "rows.json").write_text(json.dumps([{"question": "?", "answer": "."}]))
    dataset = {"_component_": ALPACA, "source": "json", "data_files": str(tmp_path / "rows.json")}
    config = OmegaConf.load(make_config(dataset=dataset))
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(UserError) as caught:
        run(tmp_path / "config.yaml")
    assert str(caught.value) == (
        "dataset, sample 0: there is no column 'instruction'; there are question, answer. Name "
        "the columns to read by dataset.column_map, or conversation_column of chats."
    )
