"""What a user can put right is told in one line; everything else keeps its traceback."""

import contextlib


class UsageError(Exception):
    """A mistake that a user can put right: the message is one line, and no traceback is shown."""


@contextlib.contextmanager
def user_input(option=None, kinds=(ValueError, OSError, ImportError)):
    """A block that looks at what the user gave: errors about it become a `UsageError`.

    Put it around checking and reading only. A `ValueError` from the middle of a computation is a
    bug, and keeps its traceback.

    Args:
        option: Name of the option that is looked at, or None.
        kinds: Class of error to expect, or a tuple of such.

    Raises:
        UsageError: For an error of these classes that the block raises.
    """
    try:
        yield
    except kinds as error:
        raise UsageError(f"--{option}: {error}" if option else str(error)) from error
