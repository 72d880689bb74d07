"""`data=NAME` puts a data set, whole, in the place of a configuration's."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from hyper_tune.errors import UserError
from hyper_tune.packaged import DATA_KEYS, packaged_data, read_configuration


def sections(*words: str, config: str = "tiny_llama") -> dict[str, Any]:
    found = OmegaConf.to_container(read_configuration(config, words), resolve=True)
    assert isinstance(found, dict)
    return {str(key): found.get(key) for key in DATA_KEYS}


@pytest.mark.parametrize("name", packaged_data())
def test_every_knob_of_a_data_set_says_what_it_does(name: str) -> None:
    text = packaged_data()[name].read_text()
    assert f"--config llama3_1_8b data={name}" in text
    knobs = [line for line in text.splitlines() if re.match(r" *[a-z]\w*: *\S", line)]
    plain = {"_component_", "split", "column_map", "dataset_val", "exact_match", "source", "name"}
    plain |= {"conversation_style", "format"}
    silent = [line for line in knobs if "   # " not in line]
    assert {line.split(":")[0].strip() for line in silent} <= plain
    assert set(OmegaConf.load(packaged_data()[name])) <= set(DATA_KEYS)


def test_all_of_the_data_is_replaced_and_nothing_else() -> None:
    before = OmegaConf.to_container(read_configuration("tiny_llama", []))
    after = OmegaConf.to_container(read_configuration("tiny_llama", ["data=magpie"]))
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert before["dataset_val"] is not None
    found = sections("data=magpie")
    assert found["dataset_val"] is found["exact_match"] is None
    assert found["dataset"]["source"] == "Magpie-Align/Magpie-Pro-300K-Filtered"
    assert "path" not in found["dataset"]
    for key in before.keys() - set(DATA_KEYS):
        assert after[key] == before[key], key


def test_other_words_change_what_the_data_set_brought_wherever_it_stands() -> None:
    words = ["dataset.source=there", "data=gsm8k", "dataset.split=train[:9]"]
    found = sections(*words)
    assert found == sections("data=gsm8k", words[0], words[2])
    assert found["dataset"]["split"] == "train[:9]"
    # Held-out data follow the source.
    assert found["dataset_val"]["source"] == "there"
    assert found["dataset_val"]["split"] == "test"
    assert sections("data=files", "data_dir=mine")["dataset"]["path"] == "mine"


def test_a_file_of_ones_own_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("dataset: {_component_: mine, path: x}\n")
    assert sections(f"data={path}")["dataset"] == {"_component_": "mine", "path": "x"}
    path.write_text("dataset: {_component_: mine}\nseed: 3\n")
    with pytest.raises(UserError, match=rf"data={path} has no key 'seed'; "):
        sections(f"data={path}")
    path.write_text("exact_match: null\n")
    with pytest.raises(UserError, match=rf"data={path}: {path} has no section dataset"):
        sections(f"data={path}")


def test_an_unknown_name_lists_the_packaged_ones() -> None:
    with pytest.raises(UserError) as caught:
        sections("data=gsm9k")
    assert str(caught.value) == (
        "data=gsm9k is neither a file nor a data set of this package, which has "
        f"{', '.join(packaged_data())}. Did you mean gsm8k?"
    )
