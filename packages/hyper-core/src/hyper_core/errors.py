"""The package's one error type."""


class HyperError(ValueError):
    """What is wrong, where, what was expected, what was got, and the remedy, in one line."""
