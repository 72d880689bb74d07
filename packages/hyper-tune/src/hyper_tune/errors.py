"""The errors whose text is meant for the person at the command line."""

from hyper_core import HyperError
from lowrank_adapters import AdapterError
from rank_budget import BudgetError


class UserError(ValueError):
    """A mistake that its reader can mend: what, where, expected, got, remedy.

    Commands print the text alone, without a traceback, and exit with status 2.
    """


PERSONS_MISTAKES = (UserError, AdapterError, BudgetError, HyperError)
EXIT_MISTAKE = 2
