"""`import sddns_tf` against `import tensorflow`; our first training step against PyTorch's."""

import subprocess
import sys

import keras

from tools.benchmark import harness, models
from tools.benchmark.partners import pytorch


def run(settings):
    """Yield two records, the second with the number of operations of the step's graph."""

    def fresh(program):
        command = [sys.executable, "-c", program]
        return lambda: subprocess.run(command, check=True, capture_output=True)

    imports = fresh("import tensorflow, sddns_tf"), fresh("import tensorflow")
    times = harness.take_turns(*imports, settings.rounds)
    yield harness.durations("startup, import", "import tensorflow", times)
    torch = pytorch.imported(settings.threads)
    shape = (32, 4, 96, 3, 3) if settings.quick else models.training_shape(settings)

    def first_step():
        keras.utils.clear_session()
        return models.train_step(shape, 16)()

    # Three rounds are enough, because a first step takes many seconds.
    times = harness.take_turns(
        first_step, lambda: pytorch.train_step(torch, shape, 16)(), rounds=3, warm_up=False
    )
    record = harness.durations("startup, first step", "PyTorch eager first step", times)
    yield {**record, "operations": models.operations(models.training_model(shape), 16)}
