"""The package's one error type."""


class AdapterError(ValueError):
    """What is wrong, in which module, what was expected, what was got, and the remedy."""
