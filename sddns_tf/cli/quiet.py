"""Imports TensorFlow without what it writes to the terminal while it is being imported.

TensorFlow's libraries tell of missing GPU drivers before any setting of theirs is read, so
`TF_CPP_MIN_LOG_LEVEL` does not stop it: only a closed mouth does, file descriptor 2 itself.
"""

import os
import sys
import tempfile


def import_tensorflow():
    """Import TensorFlow; what it says is shown only if the import fails.

    Call it before anything that imports TensorFlow or Keras.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "tensorflow" in sys.modules:
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    try:
        with tempfile.TemporaryFile() as said:
            os.dup2(said.fileno(), 2)
            try:
                import tensorflow

                tensorflow.config.list_physical_devices()  # Looks for GPUs, and tells of none.
            except BaseException:
                said.seek(0)
                os.write(terminal, said.read())
                raise
            finally:
                sys.stderr.flush()
                os.dup2(terminal, 2)
    finally:
        os.close(terminal)
