"""The command `sddns`, also as `python -m sddns_tf`.

A command is a module with `main(argv)`, which returns an exit code or None for 0. It is imported
when it is asked for, and imports TensorFlow only where it needs it.

Ends with 0 if all that was asked for was done, else with 1 and one line on stderr that names the
option or file and what was received; `sddns score` ends with 2 if some images were not scored.
"""

import importlib
import sys
import warnings

from absl import app, flags, logging

from sddns_tf.cli.errors import UsageError

COMMANDS = {
    "train": "Train on unlabeled normal images, and make a calibrated detector.",
    "evaluate": "Measure how well a detector tells normal images from others.",
    "score": "Score image files: a row of CSV or JSON for each.",
    "export": "Write a detector for servers (SavedModel) and devices (TFLite).",
    "sensitivity": "Choose the shift without labels: train with each and compare.",
    "convert-dino": "Convert a DINO checkpoint of PyTorch to Keras weights.",
    "info": "Tell what a .keras file, a SavedModel or a .tflite file holds.",
}
_INTERRUPTED = 130


def overview():
    """Return what `sddns --help` shows."""
    lines = [f"  {name:<14}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            "usage: sddns COMMAND --OPTION=VALUE ...",
            "",
            "Self-supervised anomaly detection by self-distillation and negative sampling.",
            "",
            *lines,
            "",
            "`sddns COMMAND --help` shows a command's options, `sddns --version` the version.",
        ]
    )


def main(argv):
    """Run a command.

    Args:
        argv: List of strings: the command and its options.

    Returns:
        Exit code.
    """
    name = argv[0] if argv else "--help"
    if name in ("-h", "--help", "help"):
        print(overview())
        return 0
    if name == "--version":
        from sddns_tf.version import __version__

        print(f"sddns_tf {__version__}")
        return 0
    try:
        if name not in COMMANDS:
            raise UsageError(f"Expected one of {', '.join(COMMANDS)}. Received: {name}")
        command = importlib.import_module(f"sddns_tf.cli.{name.replace('-', '_')}")
        return command.main(argv[1:]) or 0
    except UsageError as error:
        print(f"sddns {name}: {error}" if name in COMMANDS else f"sddns: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"sddns {name}: interrupted", file=sys.stderr)
        return _INTERRUPTED


def run():
    """The console script: run the command line of the process and exit."""
    warnings.formatwarning = _one_line
    logging.set_verbosity(logging.WARNING)  # libraries tell much that nobody asked
    app.run(lambda argv: main(argv[1:]), flags_parser=_left_to_the_command)


def _left_to_the_command(argv):
    flags.FLAGS.mark_as_parsed()
    return argv


def _one_line(message, category, *place):
    del place
    return f"{category.__name__}: {message}\n"
