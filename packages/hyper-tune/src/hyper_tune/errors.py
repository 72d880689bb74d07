"""The errors whose text is meant for the person at the command line."""

from hyper_core import HyperError
from lowrank_adapters import AdapterError
from rank_budget import BudgetError


class UserError(ValueError):
    """A mistake that its reader can mend: what, where, expected, got, remedy.

    Commands print the text alone, without a traceback, and exit with status 2.
    """


class PeerLostError(RuntimeError):
    """Another process of the job has ended or does not answer; nothing is wrong with this one.

    Commands print the text alone, and exit with status 75: the job may be started again.
    """


class StoppedError(Exception):
    """The run ended at a step, saved, because a process of it was sent SIGTERM.

    Commands print the text alone, and exit with status 143, which is 128 + SIGTERM.
    """


PERSONS_MISTAKES = (UserError, AdapterError, BudgetError, HyperError)
EXIT_MISTAKE, EXIT_PEER_LOST, EXIT_INTERRUPTED, EXIT_STOPPED = 2, 75, 130, 143
