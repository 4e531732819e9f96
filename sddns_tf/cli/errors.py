"""Errors that a user can fix are shown in one line; all others keep their traceback."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


class UsageError(Exception):
    """A mistake that a user can fix: shown as one line, without a traceback."""


def name_of(option: str) -> str:
    """Return how messages refer to an option: `--model`, or `FILE` for a positional argument."""
    return option if option.isupper() else f"--{option}"


@contextlib.contextmanager
def user_input(
    option: str | None = None,
    kinds: type[Exception] | tuple[type[Exception], ...] = (ValueError, OSError, ImportError),
) -> Iterator[None]:
    """Turn errors that a block raises about user input into a `UsageError`.

    Use it only around code that checks or reads input. A `ValueError` from the middle of a
    computation is a bug and should keep its traceback.

    Args:
        option: Name of the option that is checked, or None.
        kinds: Class of error to convert, or a tuple of classes.

    Raises:
        UsageError: If the block raises an error of these classes.
    """
    try:
        yield
    except kinds as error:
        raise UsageError(f"{name_of(option)}: {error}" if option else str(error)) from error
