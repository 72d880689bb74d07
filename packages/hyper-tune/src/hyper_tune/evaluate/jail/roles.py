"""The two that talk over pipes: one holds the candidate, the other its tests."""

import io
import os
from collections.abc import Mapping
from typing import Any, NoReturn

from .values import NotPlainError, decode, encode

ENDED = "its process ended"
_TEXT = 300


class CandidateError(Exception):
    """The candidate raised, ended, or answered with something that is not plain data."""


class UnsendableError(BaseException):
    """The tests call the candidate with something that is not plain data."""


def hold_candidate(request: Mapping[str, Any]) -> NoReturn:
    """Define the candidate, then answer calls with values, until there are no more.

    ``request``: ``program``, ``entry_point``, and the pipes ``calls`` to read and ``replies`` to
    write.
    """
    calls = io.open(request["calls"], "rb")  # noqa: SIM115, UP020
    names: dict[str, Any] = {"__name__": "candidate"}
    failure = ""
    try:
        exec(compile(request["program"], "candidate", "exec"), names)  # noqa: S102
    except BaseException as error:
        failure = _said(error)
    for line in calls:
        try:
            if failure:
                raise CandidateError(failure)
            arguments, keywords = decode(line)
            reply = "=" + encode(names[request["entry_point"]](*arguments, **keywords))
        except BaseException as error:
            reply = "!" + encode(_said(error))
        _write(request["replies"], reply)
    os._exit(0)


def run_tests(request: Mapping[str, Any]) -> dict[str, Any]:
    """Run ``check(candidate)``, whose every call of the candidate goes to the other process.

    ``request``: ``context`` (code that the tests may use), ``tests``, ``entry_point``, the pipes
    ``calls`` to write and ``replies`` to read, and ``limits``, whose ``reply_bytes`` are the most
    that is read of one
    reply. Nothing of the candidate is ever in this process but values of built-in types.

    Returns ``passed``, and ``reason`` where it did not; ``unsendable`` where it cannot be told.
    """
    replies = io.open(request["replies"], "rb")  # noqa: SIM115, UP020

    def candidate(*arguments: Any, **keywords: Any) -> Any:
        try:
            call = encode((arguments, keywords))
        except NotPlainError as error:
            raise UnsendableError(str(error)) from error
        try:
            _write(request["calls"], call)
        except BrokenPipeError:
            raise CandidateError(ENDED) from None
        return _result(replies.readline(request["limits"]["reply_bytes"]))

    names: dict[str, Any] = {"__name__": "tests"}
    try:
        exec(compile(request["context"], "prompt", "exec"), names)  # noqa: S102
        # Some tests call it by name.
        names[request["entry_point"]] = candidate
        exec(compile(request["tests"], "tests", "exec"), names)  # noqa: S102
        names["check"](candidate)
    except UnsendableError as error:
        return {"passed": False, "unsendable": str(error)[:_TEXT]}
    except BaseException as error:
        return {"passed": False, "reason": _said(error)}
    return {"passed": True}


def _result(line: bytes) -> Any:
    if not line:
        raise CandidateError(ENDED)
    if not line.endswith(b"\n"):
        raise CandidateError("its answer is too long")
    try:
        value = decode(line[1:])
    except NotPlainError as error:
        raise CandidateError(str(error)) from None
    if line[:1] != b"=":
        raise CandidateError(str(value)[:_TEXT])
    return value


def _write(descriptor: int, line: str) -> None:
    data = f"{line}\n".encode()
    while data:
        data = data[os.write(descriptor, data) :]


def _said(error: BaseException) -> str:
    """Return an exception in one line; the candidate's may be of a class that misbehaves."""
    if isinstance(error, CandidateError):
        return str(error)[:_TEXT]
    try:
        lines = str(error).splitlines()
        return f"{type(error).__name__}: {lines[0] if lines else ''}"[:_TEXT].rstrip(": ")
    except BaseException:
        return "an exception that cannot be shown"
