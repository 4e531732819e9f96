"""Examples as modules, so that tests run them without a process for each."""

import contextlib
import importlib.util
import pathlib

from absl import flags

EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"


@contextlib.contextmanager
def example(name):
    """A script as a module; the flags that it defines go at the end of the block."""
    others = set(flags.FLAGS)
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        yield module
    finally:
        for flag in set(flags.FLAGS) - others:
            delattr(flags.FLAGS, flag)
        flags.FLAGS.unparse_flags()
