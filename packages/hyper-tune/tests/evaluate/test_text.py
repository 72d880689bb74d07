"""BLEU-4, ROUGE-1 and BLEU-4 of characters equal literal twins."""

import importlib.util
import marshal
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest

from hyper_tune.evaluate.text import (
    _jieba,
    character_bleu,
    corpus_bleu,
    jieba_rouge_1,
    rouge_1,
    text_metrics,
)

JIEBA = importlib.util.find_spec("jieba") and importlib.util.find_spec("rouge_chinese")
with_jieba = pytest.mark.skipif(not JIEBA, reason="the extra jieba is not installed")

NAMES = ["BLEU-4", "ROUGE-1", "BLEU-4 of characters"]
NAMES += ["ROUGE-1 of jieba words"] if JIEBA else []
ANSWERS = [
    "the cat sat on the mat",
    "there is a cat on the mat today",
    "a dog barks",
    "",
    "the quick brown fox jumps over the lazy dog",
]
REFERENCES = [
    "the cat sat on the mat",
    "a cat is on the mat",
    "a dog barks loudly at night and day",
    "nothing at all",
    "the quick brown fox jumped over the lazy dogs",
]


def grams(tokens: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1))


def matches(answer: Sequence[str], reference: Sequence[str], n: int) -> tuple[int, int]:
    """How many n-grams of an answer the reference has, each at most as often, and of how many."""
    mine, theirs = grams(answer, n), grams(reference, n)
    return sum(min(count, theirs[gram]) for gram, count in mine.items()), sum(mine.values())


def test_corpus_bleu_sums_over_the_corpus_before_it_divides() -> None:
    found = [0] * 4
    there = [0] * 4
    for answer, reference in zip(ANSWERS, REFERENCES, strict=True):
        for n in range(4):
            pair = matches(answer.split(), reference.split(), n + 1)
            found[n] += pair[0]
            there[n] += pair[1]
    mine = sum(len(answer.split()) for answer in ANSWERS)
    theirs = sum(len(reference.split()) for reference in REFERENCES)
    assert mine < theirs
    logs = [math.log(found[n] / there[n]) for n in range(4)]
    expected = 100 * math.exp(sum(logs) / 4) * math.exp(1 - theirs / mine)
    metric = corpus_bleu(ANSWERS, REFERENCES)
    assert metric.value == pytest.approx(expected, rel=1e-12)
    assert metric.signature.startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")


def test_rouge_1_is_the_mean_f_measure_of_single_words() -> None:
    scores = []
    for answer, reference in zip(ANSWERS, REFERENCES, strict=True):
        common, _ = matches(answer.split(), reference.split(), 1)
        precision = common / max(1, len(answer.split()))
        recall = common / len(reference.split())
        scores.append(2 * precision * recall / (precision + recall) if common else 0.0)
    metric = rouge_1(ANSWERS, REFERENCES)
    assert metric.value == pytest.approx(100 * sum(scores) / len(scores), rel=1e-12)
    assert metric.signature.endswith("|rouge1|fmeasure|stemmer:no|mean")


def literal_character_bleu(answer: str, reference: str) -> float:
    """Without a common character 0; each n without a match counts half as much as the last."""
    if matches(answer, reference, 1)[0] == 0:
        return 0.0
    product = 1.0
    misses = 0
    for n in (1, 2, 3, 4):
        common, count = matches(answer, reference, n)
        if common == 0:
            misses += 1
            product *= 1 / (2**misses * max(1, count))
        else:
            product *= common / count
    brevity = 1.0 if len(answer) > len(reference) else math.exp(1 - len(reference) / len(answer))
    return product**0.25 * brevity


@pytest.mark.parametrize("answers", [ANSWERS, ["ab", "xyz", "the", "no", "quick"], REFERENCES])
def test_bleu_of_characters_is_that_of_tool_kits(answers: list[str]) -> None:
    scores = [
        literal_character_bleu(answer, reference)
        for answer, reference in zip(answers, REFERENCES, strict=True)
    ]
    metric = character_bleu(answers, REFERENCES)
    assert metric.value == pytest.approx(100 * sum(scores) / len(scores), rel=1e-12)


WORDS = [
    ("the cat sat.", "the cat, the cat!", {"the", "cat", "sat", "."}, {"the", "cat", ",", "!"}),
    ("it costs 3 euros", "3 euros", {"it", "costs", "3", "euros"}, {"3", "euros"}),
    (
        "\u6211\u7231\u5317\u4eac",
        "\u5317\u4eac",
        {"\u6211", "\u7231", "\u5317\u4eac"},
        {"\u5317\u4eac"},
    ),
    ("dog", "cat", {"dog"}, {"cat"}),
    ("", "cat", set(), {"cat"}),
    (" \n", "cat", set(), {"cat"}),
]


@with_jieba
def test_rouge_1_of_jieba_words_is_that_of_tool_kits() -> None:
    """The twin: words are written out, and each counts once."""
    scores = []
    for _, _, mine, theirs in WORDS:
        common = len(mine & theirs)
        scores.append(2 * common / (len(mine) + len(theirs)))
        # 2 P R / (P + R) is that, for P = common / mine and R = common / theirs.
    metric = jieba_rouge_1([row[0] for row in WORDS], [row[1] for row in WORDS])
    assert metric.value == pytest.approx(100 * sum(scores) / len(scores), rel=1e-6)
    assert metric.signature.endswith("|jieba:0.42.1|rouge1|fmeasure|distinct words|mean")


@with_jieba
def test_jieba_reads_no_file_that_another_user_may_have_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    planted = tmp_path / "jieba.cache"
    planted.write_bytes(marshal.dumps(({}, 1)))
    monkeypatch.setattr(marshal, "load", lambda _: pytest.fail("a planted file was read"))
    _jieba.cache_clear()
    cutter, _ = _jieba()
    assert cutter.FREQ
    assert list(tmp_path.iterdir()) == [planted]


def test_metrics_of_the_same_texts_are_100_and_differ_of_others() -> None:
    assert [m.value for m in text_metrics(REFERENCES, REFERENCES)] == pytest.approx(
        [100] * len(NAMES)
    )
    values = {m.name: m.value for m in text_metrics(ANSWERS, REFERENCES)}
    assert list(values) == NAMES
    assert values["BLEU-4"] < values["BLEU-4 of characters"]
