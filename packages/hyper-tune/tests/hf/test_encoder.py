"""A run of an encoder from its file of settings to a folder that explains itself."""

import importlib.util
import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from omegaconf import OmegaConf
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForMaskedLM,
    DebertaV2Config,
    DebertaV2ForMaskedLM,
    RobertaConfig,
    RobertaForMaskedLM,
)
from transformers import BertTokenizerFast as BertTokenizer

from hyper_tune import UserError
from hyper_tune.hf.encoder import fine_tune_encoder
from hyper_tune.hf.encoder_settings import EncoderSettings
from hyper_tune.hf.heads import new_modules
from hyper_tune.hf.scores import accuracy, check_scores, f1, matthews, pearson, spearman
from hyper_tune.run_record import RunRecord
from lowrank_adapters import import_peft_

ROOT = Path(__file__).parents[4]
WORDS = ["red", "blue", "one", "two", "three", "four", "five", "six"]
DATA, MODEL = "HYPER_TUNE_ENCODER_DATA", "HYPER_TUNE_ENCODER_MODEL"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random BERT as its makers publish it: a body, another head, a tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt"), model_max_length=128).save_pretrained(folder)
    size = BertConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        initializer_range=0.5,  # so that an untrained body tells words apart
    )
    BertForMaskedLM(size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in the formats of RTE, WNLI and MR; red is yes, blue is no."""
    folder = tmp_path_factory.mktemp("data")
    lines = {"entailment": [], "not_entailment": []}
    for number in range(48):
        color, label = ("red", "entailment") if number % 2 else ("blue", "not_entailment")
        lines[label].append(f"{color} {WORDS[2 + number % 6]}")
    for task, names in (("rte", tuple(lines)), ("wnli", ("1", "0"))):
        (folder / task).mkdir()
        rows = [
            f"{i}\t{text}\t{text}\t{name}"
            for name, texts in zip(names, lines.values(), strict=True)
            for i, text in enumerate(texts)
        ]
        text = "index\tsentence1\tsentence2\tlabel\n" + "\n".join(rows) + "\n"
        for split in ("train", "dev"):
            (folder / task / f"{split}.tsv").write_text(text)
    (folder / "mr").mkdir()
    for name, texts in zip(("pos", "neg"), lines.values(), strict=True):
        (folder / "mr" / name).write_text("\n".join(texts) + "\n")
    return folder


def settings(folder: Path, encoder: Path, rows: Path, **options: Any) -> Any:
    pruning = {"interval": 2}
    method = {"init_rank": 2, "budget": 1, "pruning": pruning}
    method["hypernetwork"] = {"preset": "attention-small"}
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "model": str(encoder),
        "data": {
            "train": str(rows / "rte" / "train.tsv"),
            "validation": str(rows / "rte" / "dev.tsv"),
            "text": ["sentence1", "sentence2"],
        },
        "method": {"name": "hyperadalora", **method},
        "lr": 1e-3,
        "head_lr": 1e-2,
        "epochs": 8,
        "batch_size": 8,
        "metrics": ["accuracy", "f1"],
    }
    return OmegaConf.create({**defaults, **options})


def test_run_learns_and_its_folder_explains_it(tmp_path: Path, model: Path, data: Path) -> None:
    folder = tmp_path / "run"
    summary = fine_tune_encoder(settings(folder, model, data, epochs=10))
    assert summary["after"]["accuracy"] > 0.9 > 0.7 > summary["before"]["accuracy"]
    assert summary["after"]["loss"] < summary["before"]["loss"] / 2
    assert (summary["live_ranks"], summary["total_ranks"], summary["steps"]) == (12, 24, 60)
    assert summary["head_parameters"] == (2 * 16 + 2) + (16 * 16 + 16)  # with a new pooler
    run = RunRecord.read(folder)
    assert run.summary == json.loads(json.dumps(summary))
    assert [step for step, _ in run.figures("loss")] == list(range(1, 61))
    assert [step for step, _ in run.figures("validation_accuracy")] == list(range(6, 61, 6))
    assert run.figures("validation_f1")[-1] == (60, summary["after"]["f1"])
    assert len(run.starts) == 1
    assert run.config["method"]["name"] == "hyperadalora"
    fresh = AutoModelForSequenceClassification.from_pretrained(model, dtype=torch.float32)
    import_peft_(fresh, folder / "adapter")
    with torch.no_grad():
        logits = fresh(torch.tensor([[2, 5, 7, 3, 5, 7, 3], [2, 6, 7, 3, 6, 7, 3]]))["logits"]
    assert logits.argmax(dim=-1).tolist() == [0, 1]  # entailment, not_entailment


def test_a_regression_learns_numbers(tmp_path: Path, model: Path) -> None:
    numbers = {"red": 1.0, "blue": -1.0}
    rows = [(f"{color} {word}", numbers[color]) for color in numbers for word in WORDS[2:]] * 4
    lines = [json.dumps({"text": text, "score": number}) for text, number in rows]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "rows.jsonl")
    where = {"train": path, "validation": path, "text": ["text", "text"], "label": "score"}
    options: dict[str, Any] = {"data": {**where, "regression": True}, "head_lr": 3e-3}
    options |= {"max_steps": 100, "metrics": ["pearson", "spearman"]}
    never = {"evaluate_every_n_steps": 0, "save_every_n_steps": 0}
    summary = fine_tune_encoder(settings(tmp_path / "run", model, tmp_path, **options, **never))
    assert summary["after"]["loss"] < summary["before"]["loss"] / 2
    assert summary["after"]["pearson"] > 0.9 > 0.6 > summary["before"]["pearson"]
    assert summary["head_parameters"] == (16 + 1) + (16 * 16 + 16)  # with a new pooler
    torch.manual_seed(1)  # not the run's: the pooler, which the base has not, is in the adapter
    fresh = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    import_peft_(fresh, tmp_path / "run" / "adapter")
    tokenizer = BertTokenizer.from_pretrained(model)
    with torch.no_grad():
        texts = [text for text, _ in rows]
        asked = tokenizer(texts, texts, padding=True, return_tensors="pt")
        found = fresh(**asked)["logits"].squeeze(-1)
    scores = torch.tensor([number for _, number in rows])
    after = float((found - scores).square().mean())
    assert after == pytest.approx(summary["after"]["loss"], rel=1e-4)
    assert pearson(found, scores) == pytest.approx(summary["after"]["pearson"], rel=1e-5)
    assert spearman(found, scores) == pytest.approx(summary["after"]["spearman"], rel=1e-5)


def test_what_the_base_has_not_is_trained_and_in_the_adapter(model: Path) -> None:
    kinds = AutoModelForSequenceClassification
    bert, loaded = kinds.from_pretrained(model, output_loading_info=True)
    assert new_modules(bert, loaded["missing_keys"]) == ["classifier", "bert.pooler.dense"]
    size = {"num_hidden_layers": 1, "num_attention_heads": 1, "vocab_size": 9, "hidden_size": 8}
    deberta = kinds.from_config(DebertaV2Config(intermediate_size=8, **size))
    assert new_modules(deberta, {"pooler.dense.weight", "classifier.bias"}) == [
        *("pooler", "classifier"),
    ]


PAPERS = {
    "roberta": (RobertaForMaskedLM, RobertaConfig, {"type_vocab_size": 2}),
    "deberta-v3": (
        DebertaV2ForMaskedLM,
        DebertaV2Config,
        {  # as microsoft/deberta-v3-base has them
            "relative_attention": True,
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
    ),
}


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_encoders_give_an_adapter_that_is_all_they_learnt(
    tmp_path: Path, model: Path, data: Path, name: str
) -> None:
    kind, configuration, choices = PAPERS[name]
    folder = tmp_path / name
    shutil.copytree(model, folder)
    size = {"vocab_size": 13, "hidden_size": 16, "intermediate_size": 24, "pad_token_id": 0}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 130}
    kind(configuration(**size, **layers, **choices, initializer_range=0.5)).save_pretrained(folder)
    run = settings(tmp_path / "run", folder, data, max_steps=12, evaluate_every_n_steps=0)
    summary = fine_tune_encoder(run)
    torch.manual_seed(1)  # not the run's
    fresh = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    import_peft_(fresh, tmp_path / "run" / "adapter")
    lines = (data / "rte" / "dev.tsv").read_text().splitlines()[1:]
    first, second, names = zip(*(line.split("\t")[1:] for line in lines), strict=True)
    labels = torch.tensor([int(label != "entailment") for label in names])
    asked = BertTokenizer.from_pretrained(folder)(
        list(first), list(second), padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        loss = float(cross_entropy(fresh(**asked)["logits"], labels))
    assert loss == pytest.approx(summary["after"]["loss"], rel=1e-4)
    assert abs(loss - summary["before"]["loss"]) > 0.05


def test_what_is_inside_a_new_module_is_not_named_again(model: Path) -> None:
    bert = AutoModelForSequenceClassification.from_pretrained(model)
    bert.bert.pooler.scale = torch.nn.Parameter(torch.ones(1))
    for missing in (["pooler.dense.weight", "pooler.scale"], ["pooler.scale", "pooler.dense.bias"]):
        found = new_modules(bert, {f"bert.{name}" for name in missing})
        assert found == ["classifier", "bert.pooler"]


def test_what_is_in_no_module_of_its_own_is_named_in_a_warning(model: Path) -> None:
    bert = AutoModelForSequenceClassification.from_pretrained(model)
    bert.scale, bert.bert.scale = (torch.nn.Parameter(torch.ones(1)) for _ in range(2))
    for name in ("scale", "bert.scale"):
        with pytest.warns(UserWarning, match=rf"^{name} is not in the base: it starts at random"):
            assert new_modules(bert, {name}) == ["classifier"]


def test_run_goes_on_where_it_was_killed(tmp_path: Path, model: Path, data: Path) -> None:
    options = {"save_every_n_steps": 3, "evaluate_every_n_steps": 0, "max_steps": 9}
    whole = tmp_path / "whole"
    fine_tune_encoder(settings(whole, model, data, **options))
    adapters = load_file(whole / "adapter" / "adapter_model.safetensors")
    for step in (6, 9):
        for path in (whole / "checkpoints" / f"checkpoint-{step}").iterdir():
            path.unlink()
        (whole / "checkpoints" / f"checkpoint-{step}").rmdir()
    with pytest.raises(UserError, match=r"holds an earlier run; set resume_from_checkpoint=True"):
        fine_tune_encoder(settings(whole, model, data, **options))
    fine_tune_encoder(settings(whole, model, data, resume_from_checkpoint=True, **options))
    again = load_file(whole / "adapter" / "adapter_model.safetensors")
    assert list(again) == list(adapters)
    assert all(torch.equal(again[name], value) for name, value in adapters.items())
    assert [step for step, _ in RunRecord.read(whole).figures("loss")] == list(range(1, 10))


def test_a_finished_run_takes_no_step_more(tmp_path: Path, model: Path, data: Path) -> None:
    options = {"save_every_n_steps": 3, "evaluate_every_n_steps": 0, "max_steps": 9}
    folder = tmp_path / "run"
    summary = fine_tune_encoder(settings(folder, model, data, **options))
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    again = fine_tune_encoder(settings(folder, model, data, resume_from_checkpoint=True, **options))
    assert again["steps"] == summary["steps"] == 9
    assert again["after"] == summary["after"]
    after = load_file(folder / "adapter" / "adapter_model.safetensors")
    assert list(after) == list(adapter)
    assert all(torch.equal(after[name], value) for name, value in adapter.items())
    assert [step for step, _ in RunRecord.read(folder).figures("loss")] == list(range(1, 10))


def test_best_checkpoint_and_early_stopping(tmp_path: Path, model: Path, data: Path) -> None:
    options = {"keep_best": True, "early_stopping_patience": 2, "lr": 1e-9, "head_lr": 1e-9}
    with pytest.warns(UserWarning, match=r"at step 18 of 48, or its best checkpoint is of step 6"):
        summary = fine_tune_encoder(settings(tmp_path / "run", model, data, **options))
    run = RunRecord.read(tmp_path / "run")
    assert [step for step, _ in run.figures("validation_accuracy")] == [6, 12, 18]
    assert (summary["steps"], summary["live_ranks"]) == (6, 21)


REFUSED = {
    "unknown key": ({"epoch": 3}, "configuration has no key 'epoch'; did you mean 'epochs'?"),
    "missing key": ({"lr": None}, "configuration: the key 'lr' is missing; add it to the file."),
    "unknown data": ({"data": {"path": "x"}}, "data has no key 'path'"),
    "no section": ({"data": "rte"}, "configuration: data must be a section of keys."),
    "metric": ({"metrics": ["bleu"]}, "metrics is 'bleu', but must be one of accuracy, f1, matth"),
    "metric of another task": (
        {"metrics": ["pearson"]},
        "metrics has 'pearson', which is for numbers, but the data has the labels entailment, not",
    ),
    "smoothing": (
        {"data": {"glue": "stsb"}, "label_smoothing": 0.1},
        "label_smoothing is 0.1, which is for classes, but data is a regression; set it to 0.",
    ),
    "number": ({"batch_size": 0}, "batch_size is 0, but must be a whole number at least 1"),
    "method": ({"method": {"name": "adalore"}}, "did you mean 'adalora'?"),
    "best": (
        {"keep_best": True, "save_every_n_steps": 3},
        "keep_best compares evaluations with checkpoints, but evaluate_every_n_steps is None and",
    ),
    "no evaluation": (
        {"early_stopping_patience": 1, "evaluate_every_n_steps": 0},
        "evaluate_every_n_steps is 0, so that there is no best checkpoint; set it, or leave",
    ),
    "length": ({"max_length": 129}, "reads 128 tokens; lower it."),
    "no folder": (
        {"model": "no-such/encoder"},
        "model 'no-such/encoder' cannot be had (",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_mistake_is_named_before_a_model_loads(
    tmp_path: Path, model: Path, data: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*words: Any, **options: Any) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", never)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    options, message = REFUSED[kind]
    with pytest.raises(UserError, match=re.escape(message)):
        fine_tune_encoder(settings(tmp_path / "run", model, data, **options))
    assert not (tmp_path / "run").exists()


def test_score_of_two_labels_is_not_for_three() -> None:
    with pytest.raises(UserError, match=r"metrics has 'f1', which is for two labels, but the data"):
        check_scores(["accuracy", "f1"], ["a", "b", "c"])


def test_scores_of_classes_and_of_numbers_are_told_apart() -> None:
    with pytest.raises(UserError) as refused:
        check_scores(["pearson"], ["a", "b"])
    assert str(refused.value) == (
        "metrics has 'pearson', which is for numbers, but the data has the labels a, b; ask for "
        "accuracy."
    )
    with pytest.raises(UserError) as refused:
        check_scores(["spearman", "accuracy"], ())
    assert str(refused.value) == (
        "metrics has 'accuracy', which is for classes, but the data has numbers; ask for pearson "
        "or spearman."
    )


def literal_correlation(first: list[float], second: list[float]) -> float:
    count = len(first)
    mean, other = sum(first) / count, sum(second) / count
    both = sum((a - mean) * (b - other) for a, b in zip(first, second, strict=True))
    squares = sum((a - mean) ** 2 for a in first) * sum((b - other) ** 2 for b in second)
    return float(both / squares**0.5) if squares else 0.0


def literal_ranks(values: list[float]) -> list[float]:
    below = [sum(other < value for other in values) for value in values]
    equal = [sum(other == value for other in values) for value in values]
    return [less + (same + 1) / 2 for less, same in zip(below, equal, strict=True)]


def test_correlations_are_those_of_their_twins() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 40):
        exact = torch.randn(2, size, generator=generator, dtype=torch.float64)
        for guess, truth in (
            exact,
            exact.round(decimals=0),
            (exact[0], exact[0].new_full((size,), 0.1)),
        ):
            lists = guess.tolist(), truth.tolist()
            assert pearson(guess, truth) == pytest.approx(literal_correlation(*lists), abs=1e-9)
            ranks = map(literal_ranks, lists)
            assert spearman(guess, truth) == pytest.approx(literal_correlation(*ranks), abs=1e-9)


def test_scores_equal_counting_one_by_one() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 2, 7, 40):
        guess, truth = torch.randint(0, 2, (2, size), generator=generator)
        pairs = list(zip(guess.tolist(), truth.tolist(), strict=True))
        count = {pair: pairs.count(pair) for pair in ((0, 0), (0, 1), (1, 0), (1, 1))}
        tn, fn, fp, tp = (count[pair] for pair in ((0, 0), (0, 1), (1, 0), (1, 1)))
        assert accuracy(guess, truth) == (tp + tn) / size
        below = 2 * tp + fp + fn
        assert f1(guess, truth) == pytest.approx(2 * tp / below if below else 0.0)
        root = ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
        expected = (tp * tn - fp * fn) / root if root else 0.0
        assert matthews(guess, truth) == pytest.approx(expected, abs=1e-12)


def test_correlations_of_what_is_no_number_are_none() -> None:
    labels = torch.tensor([1.0, 2.0, 3.0])
    for predicted in (torch.full((3,), torch.nan), torch.tensor([1.0, torch.nan, 3.0])):
        assert math.isnan(pearson(predicted, labels))
        assert math.isnan(spearman(predicted, labels))


def recipe() -> Any:
    place = ROOT / "recipes" / "encoders" / "train.py"
    spec = importlib.util.spec_from_file_location("encoders_train", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["rte", "wnli", "mr"])
def test_files_of_settings_are_valid_but_for_what_the_user_gives(name: str) -> None:
    config = OmegaConf.load(ROOT / "recipes" / "encoders" / f"{name}.yaml")
    if name == "mr":
        config.data_dir = "somewhere"
    found = EncoderSettings.from_config(config)
    assert found.method.name == "hyperadalora"
    assert found.model == "roberta-base"


def test_command_trains_and_says_what_came_out(
    tmp_path: Path, model: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--config", str(ROOT / "recipes" / "encoders" / "mr.yaml")]
    given = {"data_dir": data, "model": model, "output_dir": tmp_path / "run", "max_steps": 4}
    words += [f"{key}={value}" for key, value in given.items()]
    words += ["method.name=adalora", "method.pruning.interval=3", "warmup_steps=1"]
    assert recipe().main([*words, "method.init_rank=2", "method.budget=1"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^before: loss \d\.\d{4}, accuracy 0\.\d{4}$", out, flags=re.MULTILINE)
    assert f"ranks: 12 of 24\nadapter: {tmp_path / 'run' / 'adapter'}\n" in out


def test_command_prints_a_mistake_without_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert recipe().main(["lr=1"]) == 2
    assert recipe().main(["--config", "nowhere.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "error: --config is missing; give a file, such as recipes/encoders/rte.yaml.",
        "error: --config nowhere.yaml does not exist.",
    ]


@pytest.mark.skipif(
    DATA not in os.environ or MODEL not in os.environ,
    reason=f"{DATA} or {MODEL} is not set: a folder with rte, wnli and mr, and one with an encoder",
)
@pytest.mark.parametrize("task", ["rte", "wnli", "mr"])
@pytest.mark.parametrize("name", ["lora", "adalora", "hyperadalora"])
def test_real_encoder_learns_real_rows(tmp_path: Path, task: str, name: str) -> None:
    source = Path(os.environ[DATA])
    rows: dict[str, Any] = {
        "train": str(source / task / "train.tsv"),
        "validation": str(source / task / "dev.tsv"),
        "text": ["sentence1", "sentence2"],
    }
    if task == "mr":
        rows = {"train": str(source / "mr"), "validation_fraction": 0.05}
    method: dict[str, Any] = {"name": name, "init_rank": 3}
    if name != "lora":
        method |= {"init_rank": 6, "budget": 3, "pruning": {"interval": 10}, "orthogonality": 0.01}
    if name == "hyperadalora":
        hypernetwork = {"preset": "attention-small", "gradient_normalisation": "token_rms"}
        method |= {"hypernetwork": hypernetwork}
    steps = 150 if task == "mr" else 20
    summary = fine_tune_encoder(
        settings(
            tmp_path / "run",
            Path(os.environ[MODEL]),
            source,
            data=rows,
            method=method,
            lr={"lora": 4e-3, "adalora": 1e-2, "hyperadalora": 5e-4}[name],
            head_lr=1e-3,
            warmup_steps=8,
            max_steps=steps,
            batch_size=16,
            max_length=64,
            metrics=["accuracy"],
        )
    )
    losses = [loss for _, loss in RunRecord.read(tmp_path / "run").figures("loss")]
    assert len(losses) == steps
    if task == "mr":  # the others take longer to leave chance
        assert summary["after"]["accuracy"] > 0.65
        assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
