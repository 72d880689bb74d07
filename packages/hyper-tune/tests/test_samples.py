"""Samples as a run sees them: every data set's own rows, packed or padded, and what is held out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from omegaconf import OmegaConf
from torch import Tensor, nn

from hyper_tune.errors import UserError
from hyper_tune.packaged import packaged_data, read_configuration
from hyper_tune.sampling import sample_at
from hyper_tune.torchtune.batches import Batch, collate
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.data import FileDataset
from hyper_tune.torchtune.recipe import FineTuning
from hyper_tune.torchtune.samples import TrainingData, hold_out, open_training_data
from hyper_tune.torchtune.settings import RecipeSettings

CPU = torch.device("cpu")
MODEL = {"limit": 256, "vocabulary": 512}

# Rows with the columns that the data sets have on the Hub, and the turns that they are.
ROWS: dict[str, list[dict[str, Any]]] = {
    "alpaca": [
        {"instruction": "Name it.", "input": "a cat" * (n % 2), "output": f"cat {n}", "text": "x"}
        for n in range(8)
    ],
    "open_platypus": [
        {"input": "", "output": f"It is {n}.", "instruction": f"Solve {n}.", "data_source": "m"}
        for n in range(8)
    ],
    "gsm8k": [{"question": f"{n} + {n}?", "answer": f"So\n#### {2 * n}"} for n in range(8)],
    "magpie": [
        {
            "conversation_id": str(n),
            "instruction": f"Why {n}?",
            "response": f"Since {n}.",
            "conversations": [
                {"from": "human", "value": f"Why {n}?"},
                {"from": "gpt", "value": f"Since {n}."},
            ],
            "llama_guard_2": "safe",
        }
        for n in range(8)
    ],
    "files": [{"question": f"{n}?", "answer": f"{n}."} for n in range(8)],
}
ROWS["magpie_streamed"] = ROWS["magpie"]
ANSWERS = {
    "alpaca": "cat 3",
    "open_platypus": "It is 3.",
    "gsm8k": "So\n#### 6",
    "magpie": "Since 3.",
    "magpie_streamed": "Since 3.",
    "files": "3.",
}


def chosen(
    make_config: Callable[..., Path], name: str, folder: Path, *overrides: str
) -> RecipeSettings:
    """The settings of ``data=name`` on rows of its columns in a local parquet file."""
    for split in ("train", "test"):
        Dataset.from_list(ROWS[name]).to_parquet(folder / f"{split}.parquet")
    source = [f"dataset.source={folder}"]
    if name == "gsm8k":
        source += ["~dataset.name", "~dataset_val.name"]
    if name == "files":
        source = [f"dataset.path={folder}/train.parquet"]
    if name == "magpie_streamed":
        source += ["dataset.skip=2", "max_steps=6"]
    words = [f"data={name}", *source, *overrides]
    return RecipeSettings.from_config(read_configuration(str(make_config()), words))


@pytest.mark.parametrize("name", packaged_data())
def test_each_data_set_gives_the_turns_of_its_rows(
    make_config: Callable[..., Path], tmp_path: Path, name: str
) -> None:
    overrides = ["shuffle=False", "validation_fraction=null"]
    if name == "magpie_streamed":
        overrides.append("dataset.skip=0")
        overrides.append("dataset_val=null")
    settings = chosen(make_config, name, tmp_path, *overrides)
    tokenizer = build_tokenizer(settings.tokenizer)
    data = open_training_data(settings, tokenizer, limit=512, vocabulary=512)
    assert data.size in (8, None)
    sample = data.order.at(3)
    learned = [token for token in sample["labels"] if token != -100]
    assert tokenizer.decode(learned).strip().removeprefix("assistant\n\n") == ANSWERS[name]
    read = tokenizer.decode(sample["tokens"])
    row = ROWS[name][3]
    for key in ("instruction", "question"):
        assert row.get(key, "") in read
    assert data.order.at(11) == sample


@pytest.mark.parametrize("name", ["magpie", "magpie_streamed", "gsm8k"])
def test_each_data_set_trains_and_is_measured(
    make_config: Callable[..., Path],
    tmp_path: Path,
    name: str,
) -> None:
    overrides = ["max_steps=6"]
    if name == "magpie":
        overrides.append("validation_fraction=0.3")
    with FineTuning(chosen(make_config, name, tmp_path, *overrides)) as run:
        held_out = run.data.held_out
        assert held_out is not None
        assert len(held_out) == {"magpie": 2, "magpie_streamed": 2, "gsm8k": 8}[name]
        run.train()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert 0 < summary["after"]["loss"] != summary["before"]["loss"]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("files", "train.parquet:1"),
        ("alpaca", "dataset, sample 0"),
        ("magpie_streamed", ", row 2"),
    ],
)
def test_a_token_that_the_model_does_not_know_is_named(
    make_config: Callable[..., Path], tmp_path: Path, name: str, where: str
) -> None:
    overrides = ["shuffle=False", "dataset_val=null", "validation_fraction=null"]
    settings = chosen(make_config, name, tmp_path, *overrides)
    tokenizer = build_tokenizer(settings.tokenizer)
    with pytest.raises(UserError) as refused:
        open_training_data(settings, tokenizer, limit=256, vocabulary=200)
    assert f"{where}: the tokenizer makes token 2" in str(refused.value)
    assert "but the model knows 0 to 199; give the tokenizer that came with" in str(refused.value)


def test_a_held_out_share_is_a_function_of_the_seed_and_disjoint() -> None:
    samples = [{"tokens": [n]} for n in range(50)]
    parts = {}
    for seed in (0, 1):
        train, held_out = ([s["tokens"][0] for s in p] for p in hold_out(samples, 0.2, seed))
        assert len(held_out) == 10
        assert sorted(train + held_out) == list(range(50))
        assert train == sorted(train)
        again = hold_out(samples, 0.2, seed)[1]
        assert [s["tokens"][0] for s in again] == held_out
        parts[seed] = held_out
    assert parts[0] != parts[1]


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"validation_fraction is 0\.1, of 4 samples 0: at least"):
        hold_out([{"tokens": [n]} for n in range(4)], 0.1, 0)


class Twin(nn.Module):
    """Causal attention with places counted from 0, one sample at a time, in float64."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = torch.randn(vocabulary, 8, generator=generator, dtype=torch.float64)
        self.places = torch.randn(256, 8, generator=generator, dtype=torch.float64)

    def losses(self, tokens: list[int], labels: list[int]) -> list[float]:
        x = self.table[torch.tensor(tokens)] + self.places[: len(tokens)]
        found = []
        for last in range(len(tokens) - 1):
            weights = torch.softmax(x[: last + 1] @ x[last], dim=0)
            logits = self.table @ (weights @ x[: last + 1])
            if labels[last + 1] != -100:
                found.append(-torch.log_softmax(logits, dim=0)[labels[last + 1]].item())
        return found

    def forward(self, tokens: Tensor, *, mask: Tensor, input_pos: Tensor) -> list[Tensor]:
        """As torchtune's decoder takes packs."""
        x = self.table[tokens] + self.places[input_pos]
        scores = (x @ x.transpose(1, 2)).masked_fill(~mask, -torch.inf)
        return list((torch.softmax(scores, dim=-1) @ x @ self.table.T).chunk(3, dim=1))


def packs(settings: RecipeSettings) -> tuple[TrainingData, Any]:
    tokenizer = build_tokenizer(settings.tokenizer)
    return open_training_data(settings, tokenizer, **MODEL), tokenizer


@pytest.fixture
def unequal(tmp_path: Path) -> Path:
    """Eleven records of many lengths, of which up to three fit into 150 tokens."""
    path = tmp_path / "unequal.jsonl"
    rows = [{"question": "?" * (3 * n + 1), "answer": "ab" * (n % 4 + 1)} for n in range(11)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("family", ["llama", "qwen"])
@pytest.mark.parametrize("train_on_input", [False, True])
def test_the_loss_of_packs_is_that_of_each_sample_alone(
    make_config: Callable[..., Path],
    request: pytest.FixtureRequest,
    unequal: Path,
    family: str,
    train_on_input: bool,
) -> None:
    config = OmegaConf.load(make_config(**request.getfixturevalue(family)))
    config.dataset.update({"path": str(unequal), "packed": True, "train_on_input": train_on_input})
    config.tokenizer.max_seq_len = 150
    config.shuffle = False
    data, tokenizer = packs(RecipeSettings.from_config(config))
    alone = FileDataset(tokenizer, str(unequal), train_on_input=train_on_input)
    model = Twin(512)
    expected = [model.losses(s["tokens"], s["labels"]) for s in map(alone.__getitem__, range(11))]
    assert data.size is not None
    assert 1 < data.size < 11
    batch = collate([data.order.at(n) for n in range(data.size)], tokenizer.pad_id, CPU)
    assert batch.tokens.shape == (data.size, 150)
    assert batch.label_count() == sum(map(len, expected))
    torch.testing.assert_close(
        batch.loss_sum(batch.logits(model)),
        torch.tensor(sum(map(sum, expected)), dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
def test_in_torchtunes_decoder_packs_give_the_logits_of_each_sample_alone(
    make_config: Callable[..., Path], unequal: Path
) -> None:
    config = OmegaConf.load(make_config())
    config.dataset.update({"path": str(unequal), "packed": True})
    config.tokenizer.max_seq_len = 150
    config.shuffle = False
    with FineTuning(RecipeSettings.from_config(config)) as run, torch.no_grad():
        alone = FileDataset(run.tokenizer, str(unequal))
        run.model.double()
        pack = run.data.order.at(0)
        assert len(pack["seq_lens"]) > 2
        batch = collate([pack], run.tokenizer.pad_id, CPU)
        logits = torch.cat(run.model(batch.tokens, **batch.places), dim=1)[0]
        start = 0
        for number, length in enumerate(pack["seq_lens"][:-1].tolist()):
            tokens = torch.tensor([alone[number]["tokens"]])
            assert tokens.shape == (1, length)
            expected = torch.cat(run.model(tokens), dim=1)[0]
            # torchtune's norms and rotations are computed in float32, whatever the model is.
            torch.testing.assert_close(
                logits[start : start + length], expected, rtol=1e-6, atol=1e-6
            )
            start += length


def test_packs_train_as_padded_samples_do(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    unequal: Path,
    tmp_path: Path,
) -> None:
    component = {"_component_": "hyper_tune.torchtune.data.file_dataset", "path": str(unequal)}
    sgd = {"_component_": "torch.optim.SGD", "lr": 0.05}
    config = OmegaConf.load(make_config(dataset=component, optimizer=sgd, shuffle=False))
    config.tokenizer.max_seq_len = 250
    logged = {}
    for packed in (True, False):
        config.dataset.packed = packed
        # Steps of all samples, whatever they are packed into.
        config.batch_size = packs(RecipeSettings.from_config(config))[0].size
        config.gradient_accumulation_steps = 1
        config.max_steps = 6
        config.output_dir = str(tmp_path / str(packed))
        OmegaConf.save(config, tmp_path / "config.yaml")
        run(tmp_path / "config.yaml")
        lines = (tmp_path / str(packed) / "metrics.jsonl").read_text().splitlines()
        logged[packed] = [json.loads(line) for line in lines]
    for found, expected in zip(logged[True], logged[False], strict=True):
        assert found["tokens"] == expected["tokens"]
        for key in ("loss", "grad_norm"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5)


def test_a_sample_of_a_pack_sees_neither_others_nor_padding() -> None:
    pack = {
        "tokens": torch.tensor([1, 2, 3, 4, 0]),
        "labels": torch.tensor([1, 2, 3, 4, -100]),
        "input_pos": torch.tensor([0, 1, 0, 1, 2]),
        "seq_lens": torch.tensor([2, 2, 1]),
    }
    batch = collate([pack, pack], 0, CPU)
    assert isinstance(batch, Batch)
    assert batch.labels.tolist() == [[2, -100, 4, -100, -100]] * 2
    assert (
        batch.places["mask"].int().tolist()
        == [[[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 1]]]
        * 2
    )
    assert batch.places["input_pos"].tolist() == [[0, 1, 0, 1, 2]] * 2


def test_the_order_is_that_of_the_stream(make_config: Callable[..., Path], unequal: Path) -> None:
    config = OmegaConf.load(make_config())
    config.dataset.path, config.seed = str(unequal), 3
    data, tokenizer = packs(RecipeSettings.from_config(config))
    alone = FileDataset(tokenizer, str(unequal))
    for position in range(25):
        index = sample_at(position, dataset_size=11, seed=3, shuffle=True)
        assert data.order.at(position) == alone[index]


def test_a_data_set_without_samples_is_refused(
    make_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hyper_tune.torchtune.samples.build_dataset", lambda *_: [])
    with pytest.raises(UserError) as caught:
        packs(RecipeSettings.from_config(OmegaConf.load(make_config())))
    assert str(caught.value) == "dataset holds no samples; look at its path, source and split."


@pytest.mark.parametrize("packed", ["yes", 1])
def test_packed_is_true_or_false(make_config: Callable[..., Path], packed: object) -> None:
    config = OmegaConf.load(make_config())
    config.dataset.packed = packed
    with pytest.raises(UserError, match=rf"dataset.packed is {packed!r}, but must be True or Fal"):
        packs(RecipeSettings.from_config(config))
