"""BLEU-4 and ROUGE-1 of answers against references, each with what it takes to compute it again."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from statistics import fmean


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


def import_metrics() -> None:
    """Import what the figures need, the extra ``evaluate``, before there is anything to lose.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    for name in ("sacrebleu", "rouge_score", "nltk"):
        import_module(name)


def text_metrics(answers: Sequence[str], references: Sequence[str]) -> list[Metric]:
    """Return BLEU-4, ROUGE-1 and BLEU-4 of characters of answers in the order of references."""
    return [metric(answers, references) for metric in (corpus_bleu, rouge_1, character_bleu)]
