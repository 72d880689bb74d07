"""The text of a file in the encoding that it is said to have, and in no other."""

import codecs
from pathlib import Path

from hyper_tune.errors import UserError


def decode(path: Path, encoding: str) -> str:
    """Return a file's text.

    Raises:
        UserError: it is not of that encoding, or mixes it with UTF-8; lines are named.
    """
    content = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    name = codecs.lookup(encoding).name
    if not name.startswith(("utf-16", "utf-32")):
        _check_lines(path, content.split(b"\n"), name)
    try:
        return content.decode(encoding).replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(f"{path}:{line}: not {encoding} ({error.reason}).") from error


def _check_lines(path: Path, lines: list[bytes], encoding: str) -> None:
    """Refuse lines that are UTF-8 and should not be, or the other way about."""
    special = {i: _is_utf8(line) for i, line in enumerate(lines, 1) if not line.isascii()}
    utf8 = next((i for i, fits in special.items() if fits), None)
    other = next((i for i, fits in special.items() if not fits), None)
    if utf8 and other:
        raise UserError(
            f"{path} mixes encodings: line {utf8} is UTF-8, and line {other} is not; convert the "
            "file to UTF-8."
        )
    if encoding == "utf-8" and other:
        raise UserError(
            f"{path}:{other}: not UTF-8; set data.encoding, such as latin-1, or convert the file."
        )
    if encoding != "utf-8" and utf8:
        raise UserError(
            f"{path}:{utf8}: data.encoding is {encoding}, but this is UTF-8; leave it out."
        )


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
