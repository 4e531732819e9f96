"""Import TensorFlow without its messages on the terminal.

TensorFlow's libraries warn about missing GPU drivers before they read `TF_CPP_MIN_LOG_LEVEL`, so
stderr (file descriptor 2) has to be redirected during the import.
"""

from __future__ import annotations

import os
import sys
import tempfile


def import_tensorflow() -> None:
    """Import TensorFlow, and show its messages only if the import fails.

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

                tensorflow.config.list_physical_devices()  # Looks for GPUs, which prints more.
            except BaseException:
                said.seek(0)
                os.write(terminal, said.read())
                raise
            finally:
                sys.stderr.flush()
                os.dup2(terminal, 2)
    finally:
        os.close(terminal)
