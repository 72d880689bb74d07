"""The number that an answer ends in, however it is written."""

import json
import os
from fractions import Fraction
from pathlib import Path

import pytest

from hyper_tune.evaluate.gsm8k import final_number

CASES = [
    ("#### 18", 18),
    ("3 + 4 = 7\n#### 18\n\nQuestion: what is 2 + 2?\n#### 4", 18),
    ("####18", 18),
    ("#### -1,234", -1234),
    ("#### $18.50", Fraction(37, 2)),
    ("#### 18.", 18),
    ("#### 18 dollars", 18),
    ("#### 1/2", Fraction(1, 2)),
    ("#### unclear, but 7 remain", 7),
    ("####\nThe answer is 5", 5),
    ("The answer is 18.", 18),
    ("The answer is $-5$.", -5),
    ("The answer is: -$5", -5),
    ("So the final answer is **1,000 dollars**. She had 3 at first.", 1000),
    ("answer: 12 eggs, which is 3 more than 9", 12),
    ("The answer is 4. No, wait, the answer is 5.", 5),
    ("The answer is\n42", 42),
    ("The answer is unknown, perhaps 6", 6),
    ("The final answer is: $\\boxed{18}$", 18),
    ("We get \\boxed{3} and then \\boxed{\\$1{,}200}", 1200),
    ("\\boxed{\\frac{3}{4}} of 8", Fraction(3, 4)),
    ("\\boxed{-\\dfrac{1}{2}}", Fraction(-1, 2)),
    ("\\boxed{x} = 5", 5),
    ("She has 10-5", 5),
    ("It falls to \u22124", -4),
    ("It was 10 - 5", 5),
    ("- 5 apples", 5),
    ("x = 3.50", Fraction(7, 2)),
    ("= .5", Fraction(1, 2)),
    ("it costs $3.50.", Fraction(7, 2)),
    ("US$3", 3),
    ("12,345,678", 12345678),
    ("1234,567", 1234567),
    ("rooms 1,2", 2),
    ("rooms 1, 2 and 3", 3),
    ("20%", 20),
    ("(18)", 18),
    ("3 / 4", Fraction(3, 4)),
    ("#### 1 1/2", Fraction(3, 2)),
    ("The answer is $2 3/4$ cups of 5.", Fraction(11, 4)),
    ("The answer is -1 1/2.", Fraction(-3, 2)),
    ("It takes 1,000\u00a01/4 days", Fraction(4001, 4)),
    ("\\boxed{1\\frac{1}{2}}", Fraction(3, 2)),
    ("\\boxed{2 \\tfrac{1}{3}}", Fraction(7, 3)),
    ("\\boxed{-2\\dfrac{1}{3}}", Fraction(-7, 3)),
    ("She needs 1\u00bd hours", Fraction(3, 2)),
    ("#### \u00be", Fraction(3, 4)),
    ("Answer: 1 1/2 + 1 1/2 = 3 hours", 3),
    ("Answer: 1 1/2 + 2 = 3 1/2 hours", Fraction(7, 2)),
    ("The answer is 7 24/7 shops", 7),  # no mixed number: the fraction is above one
    ("The answer is 1.5 1/2", Fraction(3, 2)),
    ("The answer is 3/4 1/2", Fraction(3, 4)),
    ("The answer is 2\n1/2 of it is", 2),
    ("The answer is 2, 1/2 of it", 2),
    ("The answer is 2 -1/2", 2),
    ("The answer is 2 $1/2", 2),
    ("#### 1.5e3", 1500),
    ("#### 2E+2 eggs", 200),
    ("It weighs 25e-1", Fraction(5, 2)),
    ("#### 1.5 \u00d7 10^3", 1500),
    ("#### 1.5 x 10**3", 1500),
    ("\\boxed{1.5 \\times 10^{3}}", 1500),
    ("#### 10^3", 1000),
    ("\\boxed{-10^{-2}}", Fraction(-1, 100)),
    ("10**2 eggs", 100),
    ("#### 210^3", 210),
    ("\\boxed{-2 \\cdot 10^{-1}}", Fraction(-1, 5)),
    ("Answer: 3 x 10^2 = 300 eggs", 300),
    ("Answer: 3 x 10 = 30 eggs", 30),
    ("3e", 3),
    ("3e5x", 3),
    ("#### 1e9999", 1),
    ("e3", None),
    ("1/0 is nothing, 3 is", 3),
    ("2+2=4", 4),
    ("Answer: 3 + 4 = 7", 7),
    ("The answer is 3 * $4.50 = $13.50 a day, of 20.", Fraction(27, 2)),
    ("The answer is 2 * (3 + 4) = 2 x 7 = 14.", 14),
    ("The answer is 12 (3 x 4 = 13).", 12),
    ("The answer is 12, as 3 + 4 = 7", 12),
    ("Answer: 12 eggs/day = a lot", 12),
    ("Answer: 12 eggs/day = 84 eggs/week", 12),
    ("Answer: 20 minutes/day * 7 = 140 minutes", 140),
    ("Answer: 5 apples + 3 apples = 8 apples", 8),
    ("\\boxed{3 \\times 4 = 12}", 12),
    ("#### 3 + 4 = 7", 7),
    ("#### 3 + 4 = ?", 3),
    ("#### " + "9" * 5000, None),
    ("7, then " + "9" * 5000, 7),
    ("18\u00a0km", 18),
    ("v2.5.1 of A1", None),
    ("no number", None),
    ("", None),
    ("####", None),
]


@pytest.mark.parametrize(("text", "number"), CASES)
def test_final_number(text: str, number: Fraction | int | None) -> None:
    assert final_number(text) == number


def references(path: Path) -> list[str]:
    return [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").splitlines()]


def check(path: Path) -> int:
    """Read the number after the mark by itself, and compare."""
    texts = references(path)
    for text in texts:
        expected = text.rpartition("#### ")[2].replace(",", "")
        assert final_number(text) == Fraction(expected), text
    return len(texts)


def test_references_of_the_data_at_hand_are_read() -> None:
    assert check(Path(__file__).parents[1] / "data" / "gsm8k.jsonl") == 60


@pytest.mark.skipif("HYPER_TUNE_GSM8K" not in os.environ, reason="no HYPER_TUNE_GSM8K")
def test_all_references_are_read() -> None:
    assert check(Path(os.environ["HYPER_TUNE_GSM8K"])) == 1319
