"""Processes that need not import TensorFlow: forks of one that has, and that does no more.

An import takes four seconds of a processor. A test that needs a process of its own, to kill it or
to divide the CPU into several devices before TensorFlow's first operation, gets a fork instead.
What is imported first, and how, is the subject of `test_rooms` and `test_cli_main`.
"""

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time


class Fork:
    """A function that runs in a process of its own.

    Attributes:
        pid: Its number.
        returncode: None until it has ended; 1 after an error, negative after a signal.
        errors: What it has written to stderr so far; `out` is the same of stdout.
    """

    def __init__(self, ask, pid, files):
        self._ask, self._files = ask, files
        self.pid, self.returncode = pid, None

    @property
    def out(self):
        return self._files[0].read_text()

    @property
    def errors(self):
        return self._files[1].read_text()

    def poll(self):
        if self.returncode is None:
            self.returncode = self._ask({"ended": self.pid})
        return self.returncode

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        """End it, whatever it does, and wait until it has ended."""
        self.send_signal(signal.SIGKILL)
        self.wait()

    def wait(self, seconds=400):
        """Wait for its end; the return code."""
        limit = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < limit, self.errors[-4000:]
            time.sleep(0.01)
        return self.returncode


class Forks:
    """Starts forks, and ends those that are left.

    Args:
        folder: Where to keep what they write to stdout and stderr.
    """

    def __init__(self, folder):
        self._folder, self._started = folder, []
        with open(folder / "errors", "w") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )

    def start(self, function, *arguments, **environment):
        """Call a function of a module, with arguments that JSON can hold, as a process.

        Args:
            function: The function. The process ends with the return code that it gives, if any.
            *arguments: Its arguments.
            **environment: Variables of the environment that the process has in addition.

        Returns:
            A `Fork`.
        """
        number = len(self._started)
        files = [self._folder / f"{number}.{name}" for name in ("out", "errors")]
        for file in files:
            file.touch()
        request = {
            "module": function.__module__,
            "name": function.__qualname__,
            "arguments": arguments,
            "environment": environment,
            "files": list(map(str, files)),
        }
        self._started.append(Fork(self._ask, self._ask(request), files))
        return self._started[-1]

    def _ask(self, request):
        print(json.dumps(request, default=os.fspath), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        assert answer, (self._folder / "errors").read_text()[-4000:]
        return json.loads(answer)

    def close(self):
        for fork in self._started:
            fork.kill()
        self._process.communicate()


# --- In the process that forks ------------------------------------------------------------------


def serve():
    """Fork for each request, and answer with the number of the process, or with how it ended."""
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        else:
            answer = os.fork()
            if answer == 0:
                sys.exit(become(**request))
        print(json.dumps(answer), flush=True)


def become(module, name, arguments, environment, files):
    """Be the process that was asked for."""
    for number, path in ((0, os.devnull), (1, files[0]), (2, files[1])):
        os.dup2(os.open(path, os.O_RDWR | os.O_APPEND), number)
    os.environ.update(environment)
    function = importlib.import_module(module)
    for part in name.split("."):
        function = getattr(function, part)
    return function(*arguments)


if __name__ == "__main__":
    import keras  # noqa: F401
    import pytest  # noqa: F401
    import skimage.data  # noqa: F401

    import sddns_tf

    for public in sddns_tf.__all__:
        getattr(sddns_tf, public)
    # As `conftest` does it: the garbage collector need not look at what was imported.
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)
    serve()
