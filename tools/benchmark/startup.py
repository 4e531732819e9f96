"""`import sddns_tf` against `import tensorflow`; our first training step against PyTorch's.

Every round is a process of its own, because the second first step of a process finds its memory
touched already.
"""

import subprocess
import sys

from tools.benchmark import harness, models
from tools.benchmark.partners import pytorch

BATCH = 16


def run(settings):
    """Yield two records, the second with the number of operations of the step's graph."""

    def fresh(program):
        command = [sys.executable, "-c", program]
        return lambda: subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True)

    imports = fresh("import tensorflow, sddns_tf"), fresh("import tensorflow")
    times = harness.take_turns(*imports, settings.rounds)
    yield harness.durations("startup, import", "import tensorflow", times)
    pytorch.imported(settings.threads)  # or there is no partner
    call = "from tools.benchmark import startup; startup.{}({}, {})"
    shape = models.training_shape(settings)
    times = harness.take_turns(
        call.format("our_first_step", shape, settings.threads),
        call.format("their_first_step", shape, settings.threads),
        rounds=3,  # enough, because each takes half a minute
        warm_up=False,
        measure=printed_seconds,
    )
    record = harness.durations("startup, first step", "PyTorch eager first step", times)
    yield {**record, "operations": models.operations(models.training_model(shape), BATCH)}


def printed_seconds(program):
    """Return the number that a program prints, run in a process of its own."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


def our_first_step(shape, threads):
    """Print the seconds in which the model is built and does its first step."""
    harness.pin_threads(threads)
    print(harness.seconds(lambda: models.train_step(shape, BATCH)()))


def their_first_step(shape, threads):
    """Print the same of PyTorch."""
    torch = pytorch.imported(threads)
    print(harness.seconds(lambda: pytorch.train_step(torch, shape, BATCH)()))
