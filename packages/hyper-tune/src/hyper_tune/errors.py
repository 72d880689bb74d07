"""The one error type whose text is meant for the person at the command line."""


class UserError(ValueError):
    """A mistake that its reader can mend: what, where, expected, got, remedy.

    Commands print the text alone, without a traceback, and exit with status 2.
    """
