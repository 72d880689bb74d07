"""A stream's order is exact: a function of seed and position, however and wherever it is read."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from safetensors.torch import load_file

from hyper_tune.errors import UserError
from hyper_tune.sampling import batch_positions, derive_seed
from hyper_tune.torchtune.components import build_tokenizer
from hyper_tune.torchtune.samples import open_training_data
from hyper_tune.torchtune.settings import RecipeSettings
from hyper_tune.torchtune.streaming import StreamedDataset, StreamOrder

ROWS = 23
MODEL = {"limit": 256, "vocabulary": 512}
COMPONENT = "hyper_tune.torchtune.streaming.StreamedDataset"


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    lines = [json.dumps({"question": "?", "answer": f"{n:02d}"}) for n in range(ROWS)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def tokenizer(llama: dict[str, Any]) -> Any:
    return build_tokenizer(llama["tokenizer"])


Order = Callable[..., StreamOrder]


@pytest.fixture(scope="module")
def order(rows: Path, tokenizer: Any) -> Order:
    def make(seed: int = 0, *, shuffle: bool = True, **options: Any) -> StreamOrder:
        options = {"source": "json", "data_files": str(rows), "shuffle_buffer": 5, **options}
        stream = StreamedDataset(tokenizer, **options)
        return StreamOrder(stream, seed, shuffle=shuffle, **MODEL)

    return make


@pytest.fixture(scope="module")
def number(tokenizer: Any) -> Callable[[Any], int]:
    """Return what tells which row a sample is."""

    def of(sample: Any) -> int:
        text = tokenizer.decode([token for token in sample["labels"] if token != -100])
        return int(text.strip()[-2:])

    return of


def twin(seed: int, size: int, buffer: int, epochs: int) -> list[int]:
    """The order of the stream, written out buffer by buffer."""
    found: list[int] = []
    for epoch in range(epochs):
        for start in range(0, size, buffer):
            held = list(range(start, min(start + buffer, size)))
            generator = torch.Generator().manual_seed(
                derive_seed(seed, "order", epoch, start // buffer)
            )
            found += [held[k] for k in torch.randperm(len(held), generator=generator).tolist()]
    return found


@pytest.mark.parametrize("buffer", [1, 5, 23, 100])
@pytest.mark.parametrize("seed", [0, 7])
def test_each_epoch_has_every_row_once_in_the_order_of_the_twin(
    order: Order, number: Callable[[Any], int], seed: int, buffer: int
) -> None:
    stream = order(seed, shuffle_buffer=buffer)
    found = [number(stream.at(position)) for position in range(3 * ROWS)]
    assert found == twin(seed, ROWS, buffer, 3)
    assert sorted(found[ROWS : 2 * ROWS]) == list(range(ROWS))


def test_without_shuffling_the_order_is_that_of_the_file(
    order: Order, number: Callable[[Any], int]
) -> None:
    stream = order(shuffle=False)
    assert [number(stream.at(p)) for p in range(2 * ROWS)] == [*range(ROWS)] * 2


@settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
@given(st.lists(st.integers(0, 4 * ROWS), min_size=1, max_size=4), st.sampled_from([4, 5, 23]))
def test_a_stream_that_starts_anywhere_goes_on_as_if_it_had_started_at_0(
    order: Order, number: Callable[[Any], int], positions: list[int], buffer: int
) -> None:
    expected = twin(3, ROWS, buffer, 5)
    stream = order(3, shuffle_buffer=buffer)
    for position in positions:
        assert number(stream.at(position)) == expected[position]
    assert number(stream.at(0)) == expected[0]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_processes_share_what_one_would_have_seen(
    order: Order, number: Callable[[Any], int], world: int
) -> None:
    seen: dict[int, int] = {}
    for rank in range(world):
        stream = order(1)
        for step in range(6):
            for part in batch_positions(
                step, batch_size=2, accumulation=6 // world, world_size=world, rank=rank
            ):
                seen |= {position: number(stream.at(position)) for position in part}
    assert [seen[position] for position in range(72)] == twin(1, ROWS, 5, 4)[:72]


def test_skipped_and_taken_rows_share_the_stream(
    order: Order, number: Callable[[Any], int]
) -> None:
    taken, rest = order(shuffle=False, take=6), order(shuffle=False, skip=6)
    assert [number(taken.at(p)) for p in range(12)] == [*range(6)] * 2
    assert [number(rest.at(p)) for p in range(20)] == [*range(6, 23), 6, 7, 8]


def test_only_one_buffer_of_rows_is_held_and_only_what_is_asked_is_tokenised(
    order: Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = order()
    tokenised: list[int] = []
    original = StreamedDataset.sample
    monkeypatch.setattr(
        StreamedDataset, "sample", lambda s, n, row: tokenised.append(n) or original(s, n, row)
    )
    for position in range(0, 40, 3):
        stream.at(position)
        assert len(stream._buffer) <= 5
    assert len(tokenised) == 14


def config_of(make_config: Callable[..., Path], rows: Path, **options: Any) -> Any:
    dataset = {
        "_component_": COMPONENT,
        "source": "json",
        "data_files": str(rows),
        "shuffle_buffer": 5,
        **options,
    }
    return OmegaConf.load(make_config(dataset=dataset))


def test_a_run_resumed_mid_epoch_is_bitwise_the_run_that_never_stopped(
    make_config: Callable[..., Path], run: Callable[..., None], rows: Path, tmp_path: Path
) -> None:
    config_of(make_config, rows)
    config = tmp_path / "config.yaml"
    state = "checkpoints/step-00000012/state.safetensors"
    whole, parts, other = (tmp_path / name for name in ("whole", "parts", "other"))
    run(config, f"output_dir={whole}")
    with pytest.MonkeyPatch.context() as patch:
        # Eight steps of four samples: the second epoch has begun.
        patch.setattr("hyper_tune.torchtune.recipe.FineTuning._count_skipped", stop_at(9))
        with pytest.raises(KeyboardInterrupt):
            run(config, f"output_dir={parts}")
    run(config, f"output_dir={parts}", "resume_from_checkpoint=True")
    run(config, f"output_dir={other}", "dataset.shuffle_buffer=6")
    first, second, third = (load_file(folder / state) for folder in (whole, parts, other))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], third[name]) for name in first)


def stop_at(step: int) -> Callable[..., None]:
    def count(run: Any, _: object) -> None:
        if run.step == step:
            raise KeyboardInterrupt

    return count


@pytest.mark.parametrize(
    ("options", "keys", "message"),
    [
        ({}, {"max_steps": None}, "dataset is a stream, whose end is not known before; set max_st"),
        ({"packed": True}, {}, "dataset.packed is set, but a stream is not packed: "),
        ({}, {"validation_fraction": 0.1}, "validation_fraction is set, but dataset is a stream"),
        ({"skip": 23}, {}, "json has no rows after the 23 that are skipped."),
        ({"skip": -1}, {}, "skip is -1, but must be a whole number at least 0"),
        ({"shuffle_bufer": 1}, {}, "dataset has no key 'shuffle_bufer'; did you mean 'shuffle_buf"),
        ({"format": "chat"}, {}, "json, row 0: 'messages' must be a list of at least one message"),
        ({"format": "talk"}, {}, "format is 'talk', but must be auto, question_answer, alpaca, ch"),
        ({"data_files": "none.json"}, {}, "dataset: hyper_tune.torchtune.streaming.StreamedDatas"),
    ],
)
def test_what_a_stream_does_not_promise_is_refused_by_name(
    make_config: Callable[..., Path],
    run: Callable[..., None],
    rows: Path,
    tmp_path: Path,
    options: dict[str, Any],
    keys: dict[str, Any],
    message: str,
) -> None:
    config = config_of(make_config, rows, **options)
    config.update(keys)
    OmegaConf.save(config, tmp_path / "config.yaml")
    with pytest.raises(UserError) as caught:
        run(tmp_path / "config.yaml")
    assert str(caught.value).startswith(message)


def test_held_out_rows_of_a_stream_must_be_counted(
    make_config: Callable[..., Path], rows: Path, tokenizer: Any
) -> None:
    config = config_of(make_config, rows)
    config.dataset_val = config.dataset
    with pytest.raises(UserError, match=r"dataset_val is a stream; set dataset_val\.take"):
        open_training_data(RecipeSettings.from_config(config), tokenizer, **MODEL)


def test_a_row_that_does_not_fit_is_named(tmp_path: Path, order: Order) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"question": "?", "answer": "00"}
    for bad, message in (
        ({"question": "?", "answer": None}, "json, row 2: 'answer' is NoneType, expected text"),
        ({"question": "?" * 300, "answer": "1"}, "json, row 2: 3"),
    ):
        path.write_text("\n".join(json.dumps(row) for row in (good, good, bad)))
        stream = order(data_files=str(path), shuffle=False)
        stream.at(1)
        with pytest.raises(UserError) as caught:
            stream.at(2)
        assert str(caught.value).startswith(message)


def test_a_stream_that_breaks_off_says_where(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = order(shuffle=False)

    class Breaking:
        def skip(self, count: int) -> Any:
            yield from [{"question": "?", "answer": "1"}] * 3
            raise ConnectionResetError(f"reset after {count}")

    monkeypatch.setattr(stream._stream, "_rows", Breaking())
    with pytest.raises(UserError) as caught:
        list(stream._stream.rows(4))
    assert str(caught.value) == "dataset: json, row 7 cannot be read: reset after 4."
