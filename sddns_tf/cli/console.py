"""What commands say, and how they take their options."""

import argparse
import sys

from absl.flags import argparse_flags

from sddns_tf.cli.errors import UsageError


def say(text):
    """Tell a person how far it is, on stderr: stdout is for results."""
    print(text, file=sys.stderr, flush=True)


def verbose():
    """Keras' `verbose`: a bar for a person, nothing where the output goes to a file."""
    return int(sys.stderr.isatty() and sys.stdout.isatty())


class Parser(argparse_flags.ArgumentParser):
    """Options of a command: what most people need first, the others in groups below.

    Args:
        command: Name of the command.
        description: What it does, with an example.

    Example:
        >>> parser = Parser("score", __doc__)
        >>> group = parser.group("most used")
        >>> group.add_argument("--model", metavar="FILE", required=True, help="File of the model.")
        >>> parser.parse_args(["--model=parts.tflite"]).model
        'parts.tflite'
    """

    def __init__(self, command, description):
        super().__init__(
            prog=f"sddns {command}",
            usage=f"sddns {command} --OPTION=VALUE ...",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            add_help=False,
            allow_abbrev=False,
            inherited_absl_flags=None,
        )

    def group(self, title):
        """Return a titled group of options.

        Help shows groups in the order in which they are made.
        """
        return self.add_argument_group(title)

    def parse_args(self, args=None, namespace=None):
        """Return options of a list of strings."""
        group = self.group("help")
        group.add_argument("-h", "--help", action="help", help="Show this and exit.")
        return super().parse_args(args, namespace)

    def error(self, message):
        """Refuse what was given, in one line."""
        raise UsageError(f"{message}. `{self.prog} --help` lists the options")


def positive_int(text):
    """Return the type of an option: an int of at least 1."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a positive int. Received: {text}")
    return int(text)


def share(text):
    """Return the type of an option: a float between 0 and 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.0 < value < 1.0:
        raise argparse.ArgumentTypeError(f"expected a number between 0 and 1. Received: {text}")
    return value


def size(text):
    """Return the type of an option: `SIDE` or `HEIGHT,WIDTH` in pixels; an int or a list of two."""
    sides = text.split(",")
    if len(sides) not in (1, 2) or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"expected SIDE or HEIGHT,WIDTH. Received: {text}")
    return int(text) if len(sides) == 1 else [int(side) for side in sides]


def require(options, *names):
    """Refuse a command line without some options."""
    for name in names:
        if not getattr(options, name):
            raise UsageError(f"--{name} is needed. Received: none")
