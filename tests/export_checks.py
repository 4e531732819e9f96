"""The check of a SavedModel without a process for it, where the check is not what is tested.

`export.saved_model` runs what it wrote in a new process, which takes four seconds of a processor
to import TensorFlow. Tests that only need the files run the same program in their own process.
`test_export`, `test_serving` and `test_cli_info` export as users do.
"""

import contextlib
import sys
from unittest import mock

import numpy as np

from sddns_tf.export import to_saved_model


def run_here(program, folder, images):
    """`verify.run_apart` without a process: the answers of the export in `folder`."""
    np.save(folder / "images.npy", images)
    hidden = {name: sys.modules[name] for name in ("keras", "sddns_tf")}
    try:
        with contextlib.chdir(folder):
            exec(program, {"__name__": "check"})
    finally:
        sys.modules.update(hidden)  # The program hides them, as a server has none of them.
    with np.load(folder / "answers.npz") as answers:
        return dict(answers)


def in_this_process():
    """A block in which SavedModels are checked in this process."""
    return mock.patch.object(to_saved_model, "run_apart", run_here)
