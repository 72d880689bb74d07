"""Where a sandboxed process begins: isolation first, then its role."""

import json
import os
import sys

from .isolation import enter
from .roles import hold_candidate, run_tests


def main() -> None:
    """Read a request from the input, and report on the output: ``ready``, then what was found.

    Raises nothing: a sandbox that cannot be built is reported as ``refused``.
    """
    request = json.load(sys.stdin)
    del sys.path[0]  # this package's own
    report = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    os.close(null)
    try:
        enter(request["folder"], request["limits"], request["parent"])
    except OSError as error:
        _say(report, {"refused": str(error)})
        os._exit(1)
    _say(report, {"ready": True})
    if "program" in request:
        os.close(report)
        hold_candidate(request)
    _say(report, run_tests(request))
    os._exit(0)


def _say(descriptor: int, what: dict[str, object]) -> None:
    os.write(descriptor, json.dumps(what).encode() + b"\n")
