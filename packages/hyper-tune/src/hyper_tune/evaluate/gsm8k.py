"""The final number of an answer, as GSM8K counts it."""

import re
import unicodedata
from fractions import Fraction

_SIGN = r"(?P<sign>[-−–])?"  # noqa: RUF001
_CURRENCY = r"(?:(?:US)?\\?[$€£]\s?)?"
_DIGITS = r"\d+(?:,\d{3})+(?!\d)|\d+"
_FRACTION = r"\\[dt]?frac{(?P<over>\d+)}{(?P<under>\d+)}"
# Of three digits at most: more would fill the memory.
_EXPONENT = r"[-−+]?\d{1,3}(?!\w)"  # noqa: RUF001
_TEN = r"10\s?(?:\^|\*\*)\s?{?"
_POWER = (
    rf"(?<=\d)(?:[eE]|\s?(?:[x×*]|\\times|\\cdot)\s?{_TEN})"  # noqa: RUF001
    rf"(?P<power>{_EXPONENT})"
)
_NUMBER = re.compile(
    rf"(?:(?<![\w.)])|(?<=\d)(?=\\[dt]?frac))"
    rf"{_SIGN}{_CURRENCY}(?P<inner>[-−])?"  # noqa: RUF001
    rf"(?:{_FRACTION}|{_TEN}(?P<exponent>{_EXPONENT})"
    rf"|(?P<whole>{_DIGITS})?(?P<decimals>\.\d+)?"
    rf"(?:{_POWER}|\s?/\s?(?P<denominator>\d+)(?![\d/]))?)"
)
# A sum up to its last equals sign: no sentence ends in it, and no bracket opens but in a product.
_SUM = re.compile(
    r"(?:(?:[^=\n.,;:?!(]|[.,](?=\d)|(?<=[-−+*/×÷]\s)\(|(?<=[-−+*/×÷])\()*=)+"  # noqa: RUF001
)
_OPERATION = re.compile(
    r"(?:[-−+*/×÷]|\bx\b|\\times|\\cdot|\\div)[\s(]*\\?[$€£]?\s*\d"  # noqa: RUF001
)
_MOST_CHARACTERS = 1000  # of a number; Python refuses to read very long ones
_PROPER = re.compile(r"\d+\s?/\s?\d+|\\[dt]?frac.*")
_VULGAR = {
    ord(letter): " " + unicodedata.normalize("NFKC", letter).replace("\u2044", "/")
    for letter in "½⅓⅔¼¾⅕⅖⅗⅘⅙⅚⅐⅛⅜⅝⅞⅑⅒"
}
_MARKED = re.compile(r"####\s*([^\n]*)")
_BOXED = re.compile(r"\\boxed\s*{((?:[^{}]|{[^{}]*})*)}")
_SAID = re.compile(r"answer(?:\s+is|\s*[:=])(?=([^\n]*))", re.IGNORECASE)


def final_number(text: str) -> Fraction | None:
    r"""Return the number that an answer ends in, exactly; None if it has none.

    The first of these that has a number: what follows the first ``####``; the last ``\boxed{…}``;
    what follows the last "answer is" or "answer:" on its line; the last number of the text. Where
    a sum follows, it is its result. Commas between thousands, signs of currency, units and a full
    stop are passed over. Decimals, fractions, mixed numbers and powers of ten are read.

    >>> final_number("She has 3 + 4 = 7 eggs.\n#### 7")
    Fraction(7, 1)
    >>> final_number("The answer is $1,234.50.")
    Fraction(2469, 2)
    >>> final_number("The answer is 1 1/2 hours.")
    Fraction(3, 2)
    >>> final_number("Answer: 3 + 4 = 7 eggs, of 12")
    Fraction(7, 1)
    """
    text = text.replace("{,}", ",").replace(r"\!", "")  # commas, and no space, in LaTeX
    text = text.translate(_VULGAR)
    marked = _MARKED.search(text)
    if marked and (number := _stated(marked[1])) is not None:
        return number
    for pattern in (_BOXED, _SAID):
        places = pattern.findall(text)
        if places and (number := _stated(places[-1])) is not None:
            return number
    return next(reversed(_numbers(text).values()), None)


def _stated(text: str) -> Fraction | None:
    """Return the first number of a text, or the result of the sum that begins with it."""
    numbers = _numbers(text)
    if not numbers:
        return None
    first = next(iter(numbers))
    working = _SUM.match(text, first)
    if working and _OPERATION.search(working[0]):
        result = _numbers(text[working.end() :])
        numbers = result or numbers
    return next(iter(numbers.values()))


def _numbers(text: str) -> dict[int, Fraction]:
    """Return the numbers of a text by where they begin."""
    found: dict[int, Fraction] = {}
    last: re.Match[str] | None = None
    for match in _NUMBER.finditer(text):
        value = _value(match)
        if value is None:
            continue
        if last and _is_mixed(last, match) and value < 1:
            found[last.start()] += value if found[last.start()] >= 0 else -value
        else:
            found[match.start()] = value
        last = match
    return found


def _is_mixed(whole: re.Match[str], part: re.Match[str]) -> bool:
    """Return whether a fraction follows a whole number, with nothing but spaces between them."""
    bare = whole.end() == whole.end("whole") and _PROPER.fullmatch(part[0])
    return bool(bare) and not part.string[whole.end() : part.start()].strip(" \u00a0")


def _value(match: re.Match[str]) -> Fraction | None:
    part = match.groupdict()
    if len(match[0]) > _MOST_CHARACTERS:
        return None
    if part["over"] is not None:
        above, below = Fraction(part["over"]), int(part["under"])
    elif part["exponent"] is not None:
        above, below = _ten_to(part["exponent"]), 1
    elif part["whole"] is None and part["decimals"] is None:
        return None
    else:
        above = Fraction((part["whole"] or "0").replace(",", "") + (part["decimals"] or ""))
        below = int(part["denominator"] or 1)
    if below == 0:
        return None
    if part["power"] is not None:
        above *= _ten_to(part["power"])
    negative = (part["sign"] is None) != (part["inner"] is None)
    return -above / below if negative else above / below


def _ten_to(exponent: str) -> Fraction:
    return Fraction(10) ** int(exponent.replace("−", "-"))  # noqa: RUF001
