"""The final number of an answer, as GSM8K counts it."""

import re
from fractions import Fraction

_SIGN = r"(?P<sign>[-−–])?"  # noqa: RUF001
_CURRENCY = r"(?:(?:US)?\\?[$€£]\s?)?"
_DIGITS = r"\d+(?:,\d{3})+(?!\d)|\d+"
_NUMBER = re.compile(
    rf"(?<![\w.)]){_SIGN}{_CURRENCY}(?P<inner>[-−])?"  # noqa: RUF001
    rf"(?:\\d?frac{{(?P<over>\d+)}}{{(?P<under>\d+)}}"
    rf"|(?P<whole>{_DIGITS})?(?P<decimals>\.\d+)?(?:\s?/\s?(?P<denominator>\d+)(?![\d/]))?)"
)
_MARKED = re.compile(r"####\s*([^\n]*)")
_BOXED = re.compile(r"\\boxed\s*{((?:[^{}]|{[^{}]*})*)}")
_SAID = re.compile(r"answer(?:\s+is|\s*[:=])(?=([^\n]*))", re.IGNORECASE)


def final_number(text: str) -> Fraction | None:
    r"""Return the number that an answer ends in, exactly; None if it has none.

    The first of these that has a number: what follows the first ``####``; the last ``\boxed{…}``;
    what follows the last "answer is" or "answer:" on its line; the last number of the text. Commas
    between thousands, signs of currency, units and a full stop are passed over; fractions and
    decimals are read.

    >>> final_number("She has 3 + 4 = 7 eggs.\n#### 7")
    Fraction(7, 1)
    >>> final_number("The answer is $1,234.50.")
    Fraction(2469, 2)
    """
    text = text.replace("{,}", ",").replace(r"\!", "")  # commas, and no space, in LaTeX
    marked = _MARKED.search(text)
    if marked and (numbers := _numbers(marked[1])):
        return numbers[0]
    for pattern in (_BOXED, _SAID):
        places = pattern.findall(text)
        if places and (numbers := _numbers(places[-1])):
            return numbers[0]
    numbers = _numbers(text)
    return numbers[-1] if numbers else None


def _numbers(text: str) -> list[Fraction]:
    found = []
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is not None:
            found.append(value)
    return found


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    if part["over"] is not None:
        above, below = Fraction(part["over"]), int(part["under"])
    elif part["whole"] is None and part["decimals"] is None:
        return None
    else:
        above = Fraction((part["whole"] or "0").replace(",", "") + (part["decimals"] or ""))
        below = int(part["denominator"] or 1)
    if below == 0:
        return None
    negative = (part["sign"] is None) != (part["inner"] is None)
    return -above / below if negative else above / below
