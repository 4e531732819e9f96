"""The command `sddns`, also as `python -m sddns_tf`.

Each command is a module with a function `main(argv)` that returns an exit code, or None for 0. The
module is imported only when its command is run, and imports TensorFlow only if it needs it.

The exit code is 0 on success. On a user's mistake it is 1, with one line on stderr that names the
option or file and what was received. `sddns score` exits with 2 if some images were not scored.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import signal
import sys
import warnings

from absl import app, flags, logging

from sddns_tf.cli.errors import UsageError

COMMANDS = {
    "train": "Train on unlabeled normal images and make a calibrated detector.",
    "evaluate": "Measure how well a detector tells normal images from others.",
    "score": "Score image files: one row of CSV or JSON per file.",
    "export": "Write a detector for servers (SavedModel) and devices (TFLite).",
    "sensitivity": "Choose a shift without labels: train with each one and compare.",
    "convert-dino": "Convert a PyTorch DINO checkpoint to Keras weights.",
    "convert-efficientnet-lite": "Convert ImageNet weights of EfficientNet-lite0 to Keras.",
    "info": "Show what a .keras file, a SavedModel or a .tflite file contains.",
}
_INTERRUPTED = 130


def overview() -> str:
    """Return the text of `sddns --help`."""
    lines = [f"  {name:<27}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sddns COMMAND --OPTION=VALUE ...",
            "",
            "Self-supervised anomaly detection by self-distillation and negative sampling.",
            "",
            *lines,
            "",
            "`sddns COMMAND --help` shows the options of a command, `sddns --version` the version.",
        ]
    )


def main(argv: list[str]) -> int:
    """Run a command.

    Args:
        argv: List of strings, the command and its options.

    Returns:
        Exit code.
    """
    name = argv[0] if argv else "--help"
    try:
        try:
            return _run_command(name, argv[1:])
        finally:
            _flush()
    except UsageError as error:
        sender = f"sddns {name}" if name in COMMANDS else "sddns"
        message = re.sub(r"\s*\n\s*", " ", str(error).strip())  # Keras' errors have many lines.
        print(f"{sender}: {message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"sddns {name}: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:
        return 1  # Whatever reads the output, such as `head`, has seen enough.
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        print(f"sddns {name}: the disk must have room for all output. {error}", file=sys.stderr)
        return 1


def _flush() -> None:
    """Flush stdout now: what cannot be written would only be noticed when Python exits."""
    try:
        sys.stdout.flush()
    except OSError:
        # Python would try again to write the rest.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise


def _run_command(name: str, arguments: list[str]) -> int:
    """Run the command of that name, or print what `--help` and `--version` ask for."""
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        from sddns_tf.version import __version__

        print(f"sddns_tf {__version__}")
        return 0
    if name not in COMMANDS:
        raise UsageError(f"Expected one of {', '.join(COMMANDS)}. Received: {name}")
    command = importlib.import_module(f"sddns_tf.cli.{name.replace('-', '_')}")
    return command.main(arguments) or 0


def run() -> None:
    """Entry point of the console script: run the command line of the process and exit."""
    warnings.formatwarning = _one_line
    # An exception, unlike the signal, lets a command remove what is unfinished.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    logging.set_verbosity(logging.WARNING)  # hides the info messages of libraries
    app.run(lambda argv: main(argv[1:]), flags_parser=_left_to_the_command)


def _left_to_the_command(argv: list[str]) -> list[str]:
    flags.FLAGS.mark_as_parsed()
    return argv


def _one_line(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    del filename, lineno, line
    return f"{category.__name__}: {message}\n"
