"""BLEU-4 and ROUGE-1 of answers against references, each with what it takes to compute it again."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any


@dataclass(frozen=True)
class Metric:
    """A figure, from 0 to 100, and its signature: which code and settings gave it."""

    name: str
    value: float
    signature: str


def corpus_bleu(answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Return sacrebleu's BLEU of the whole corpus: up to 4-grams of 13a tokens."""
    from sacrebleu.metrics import BLEU

    metric = BLEU()
    score = metric.corpus_score(list(answers), [list(references)])
    return Metric("BLEU-4", score.score, str(metric.get_signature()))


def rouge_1(answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Return the mean F-measure of rouge-score's ROUGE-1, without stemming."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1"], use_stemmer=False)
    scores = [
        scorer.score(reference, answer)["rouge1"].fmeasure
        for answer, reference in zip(answers, references, strict=True)
    ]
    signature = f"rouge-score:{version('rouge-score')}|rouge1|fmeasure|stemmer:no|mean"
    return Metric("ROUGE-1", 100 * fmean(scores), signature)


def character_bleu(answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Return the mean over answers of BLEU-4 of single characters, as fine-tuning tool kits do.

    LLaMA-Factory and others name this ``bleu-4``: NLTK's ``sentence_bleu`` with its smoothing of
    method 3. It is far above the BLEU of words, and not comparable with it.
    """
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    smoothing = SmoothingFunction().method3
    scores = [
        sentence_bleu([list(reference)], list(answer), smoothing_function=smoothing)
        for answer, reference in zip(answers, references, strict=True)
    ]
    signature = f"nltk:{version('nltk')}|sentence|characters|smooth:method3|mean"
    return Metric("BLEU-4 of characters", 100 * fmean(scores), signature)


def jieba_rouge_1(answers: Sequence[str], references: Sequence[str]) -> Metric:
    """Return the mean F-measure of ROUGE-1 of jieba's words, as fine-tuning tool kits do.

    LLaMA-Factory and others name this ``rouge-1``: rouge-chinese's, of the words, numbers and marks
    that jieba cuts a text into. Words are a set: how often one occurs does not count. An empty text
    has 0.
    """
    cutter, rouge = _jieba()
    scores = []
    for pair in zip(answers, references, strict=True):
        texts = [" ".join(cutter.cut(text)) for text in pair]
        blank = any(not text.strip() for text in texts)
        scores.append(0.0 if blank else rouge.get_scores(*texts)[0]["rouge-1"]["f"])
    versions = "|".join(f"{name}:{version(name)}" for name in ("rouge-chinese", "jieba"))
    signature = f"{versions}|rouge1|fmeasure|distinct words|mean"
    return Metric("ROUGE-1 of jieba words", 100 * fmean(scores), signature)


@cache
def _jieba() -> tuple[Any, Any]:
    """Return what cuts a text into words, and rouge-chinese's ROUGE-1."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of their source's escapes
        jieba, rouge_chinese = import_module("jieba"), import_module("rouge_chinese")
    jieba.setLogLevel(logging.WARNING)
    cutter = jieba.Tokenizer()
    # jieba would unmarshal a file of a fixed name that anyone may have put into /tmp.
    with TemporaryDirectory() as cutter.tmp_dir:
        cutter.initialize()
    return cutter, rouge_chinese.Rouge(metrics=["rouge-1"])


def import_metrics() -> None:
    """Import what the figures need, the extra ``evaluate``, before there is anything to lose.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    for name in ("sacrebleu", "rouge_score", "nltk"):
        import_module(name)


def text_metrics(answers: Sequence[str], references: Sequence[str]) -> list[Metric]:
    """Return BLEU-4, ROUGE-1 and BLEU-4 of characters of answers in the order of references.

    With the extra ``jieba`` also ROUGE-1 of jieba's words.
    """
    metrics = [corpus_bleu, rouge_1, character_bleu]
    if all(map(find_spec, ("jieba", "rouge_chinese"))):
        metrics.append(jieba_rouge_1)
    return [metric(answers, references) for metric in metrics]
