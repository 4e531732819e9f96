"""Import TensorFlow as a command wants it: without its messages, and with oneDNN.

TensorFlow's libraries warn about missing GPU drivers before they read `TF_CPP_MIN_LOG_LEVEL`, so
stderr (file descriptor 2) has to be redirected during the import.

oneDNN is part of TensorFlow on x86, but by itself it is used only on processors with AVX-512 VNNI
or the like. Most networks are faster with it on others too (`tools.benchmark --benchmarks=onednn`).
The variable has to be set before the import, so a library cannot do this for its users.

With it, TensorFlow says that oneDNN does not take uint8, as an error although nothing is wrong; so
errors of its libraries are not shown either. Those that matter are raised in Python.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile

_X86 = ("x86_64", "AMD64")


def import_tensorflow() -> None:
    """Import TensorFlow, and show its messages only if the import fails.

    Call it before anything that imports TensorFlow or Keras. Variables of the environment that are
    set already stay as they are, and all do where TensorFlow is imported already: processes that
    are started from there compute as their parent does.
    """
    if "tensorflow" in sys.modules:
        return
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if platform.machine() in _X86:
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
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
