"""Messages and option parsing, shared by all commands."""

from __future__ import annotations

import argparse
import re
import sys
from argparse import Namespace
from typing import Any, NoReturn

from absl.flags import argparse_flags

from sddns_tf.cli.errors import UsageError

# Messages of argparse, and how to say them in the form that all errors of the package have.
_ARGPARSE_MESSAGES = (
    (r"argument (\S+): expected one argument", r"\1 needs a value. Received: none"),
    (r"argument (\S+): invalid choice: (.+?) \(choose from (.+)\)",
     r"\1 must be one of \3. Received: \2"),
    (r"argument (\S+): invalid (\w+) value: (.+)", r"\1 must be of type \2. Received: \3"),
    (r"argument (\S+): ignored explicit argument (.+)", r"\1 takes no value. Received: \2"),
    (r"argument (\S+): expected (.+)", r"\1 must be \2"),
    (r"unrecognized arguments: (.+)", r"Expected options that --help lists. Received: \1"),
    (r"the following arguments are required: (.+)", r"\1 is needed. Received: none"),
)  # fmt: skip


def say(text: str) -> None:
    """Print progress to stderr; stdout is kept for results."""
    print(text, file=sys.stderr, flush=True)


def verbose() -> int:
    """Return Keras' `verbose`: 1 in a terminal, 0 where the output goes to a file."""
    return int(sys.stderr.isatty() and sys.stdout.isatty())


class Parser(argparse_flags.ArgumentParser):
    """Parser for a command's options: the most used ones first, the others in groups below.

    Args:
        command: Name of the command.
        description: What it does, with an example, for `--help`.

    Example:
        >>> parser = Parser("score", __doc__)
        >>> group = parser.group("most used")
        >>> group.add_argument("--model", metavar="FILE", required=True, help="File of the model.")
        >>> parser.parse_args(["--model=parts.tflite"]).model
        'parts.tflite'
    """

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"sddns {command}",
            usage=f"sddns {command} --OPTION=VALUE ...",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
            inherited_absl_flags=None,
        )

    def group(self, title: str) -> Any:
        """Return a new, titled group of options; help shows groups in the order of creation."""
        return self.add_argument_group(title)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse a list of strings."""
        group = self.group("help")
        group.add_argument("-h", "--help", action="help", help="Show this text and exit.")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise a `UsageError` in place of what argparse would print."""
        for pattern, form in _ARGPARSE_MESSAGES:
            if found := re.fullmatch(pattern, message, re.DOTALL):
                raise UsageError(found.expand(form))
        raise UsageError(f"{message}. `{self.prog} --help` lists the options")


def positive_int(text: str) -> int:
    """Parse an option's value as an int of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive int. Received: {text}")
    return int(text)


def natural_int(text: str) -> int:
    """Parse an option's value as an int of at least 0."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected an int of at least 0. Received: {text}")
    return int(text)


def share(text: str) -> float:
    """Parse an option's value as a float between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1. Received: {text}")
    return value


def size(text: str) -> int | list[int]:
    """Parse an option's value, `SIDE` or `HEIGHT,WIDTH` in pixels, as an int or a list of two."""
    sides = text.split(",")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHT,WIDTH. Received: {text}")
    return int(text) if len(sides) == 1 else [int(side) for side in sides]


def require(options: Namespace, *names: str) -> None:
    """Raise a `UsageError` if one of these options is missing."""
    for name in names:
        if not getattr(options, name):
            raise UsageError(f"--{name} is needed. Received: none")
