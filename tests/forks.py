"""Processes that need not import TensorFlow: forks of one that has, and that does no more.

An import takes four seconds of a processor. A test that needs a process of its own, to kill it or
to divide the CPU into several devices before TensorFlow's first operation, gets a fork instead.
What is imported first, and how, is the subject of `test_rooms` and `test_cli_main`.
"""

import multiprocessing
import os
import signal
import sys

import numpy as np
import tensorflow as tf

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["keras", "pytest", "skimage.data", "sddns_tf.detector", "sddns_tf.self_distillation",
     "sddns_tf.callbacks", "sddns_tf.export", "sddns_tf.evaluation", "sddns_tf.plots"]
)  # fmt: skip


class Fork:
    """A function that runs in a process of its own.

    Args:
        folder: Where to keep what it writes to stdout and stderr.
        function: The function of a module. The process ends with the return code that it gives.
        *arguments: Its arguments.
        **environment: Variables of the environment that the process has in addition.
    """

    def __init__(self, folder, function, *arguments, **environment):
        self._files = [folder / name for name in ("out", "errors")]
        self._process = CONTEXT.Process(
            target=_become, args=(self._files, environment, function, arguments), daemon=True
        )
        self._process.start()
        self.pid = self._process.pid

    @property
    def out(self):
        """What it has written to stdout so far; `errors` is the same of stderr."""
        return self._files[0].read_text() if self._files[0].exists() else ""

    @property
    def errors(self):
        return self._files[1].read_text() if self._files[1].exists() else ""

    def poll(self):
        """None until it has ended; then its return code, negative after a signal."""
        return self._process.exitcode

    @property
    def returncode(self):
        return self.poll()

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """End it, whatever it does, and wait until it has ended."""
        self.send_signal(signal.SIGKILL)
        self._process.join()

    def wait(self, seconds=400):
        """Wait for its end; the return code."""
        self._process.join(seconds)
        assert self.poll() is not None, self.errors[-4000:]
        return self.poll()


def _become(files, environment, function, arguments):
    """Be the process that was asked for."""
    for number, path in zip((1, 2), files, strict=True):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(environment)
    sys.exit(function(*arguments))


def divide_the_cpu(count):
    """Make several devices of the CPU; possible before TensorFlow's first operation only."""
    cpu = tf.config.list_physical_devices("CPU")[0]
    parts = [tf.config.LogicalDeviceConfiguration()] * count
    tf.config.set_logical_device_configuration(cpu, parts)


def save_with_and_without(count, build, path):
    """Write what `build` gives with a strategy of so many devices and without (None), by name."""
    divide_the_cpu(count)
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
    assert strategy.num_replicas_in_sync == count
    several = {f"several {name}": value for name, value in build(strategy).items()}
    np.savez(path, **several, **{f"one {name}": value for name, value in build(None).items()})
