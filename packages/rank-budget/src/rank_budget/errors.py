"""The package's one error type."""


class BudgetError(ValueError):
    """What is wrong with a budget, its rule, and the remedy, in one line."""


def require_whole(field: str, value: object) -> None:
    """Raise a `BudgetError` unless the value is a whole number."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    require(whole, field, value, "must be a whole number")


def require(condition: bool, field: str, value: object, rule: str) -> None:
    """Raise a `BudgetError` that names the field, its value and the rule that it breaks."""
    if not condition:
        raise BudgetError(f"{field} is {value!r}, but {rule}.")


def refuse_class(field: str, value: object) -> None:
    """Raise a `BudgetError` where a class is given in place of an object of it."""
    if isinstance(value, type):
        raise BudgetError(
            f"{field} is the class {value.__name__}, expected an object; write "
            f"{value.__name__}(...)."
        )
