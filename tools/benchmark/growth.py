"""Time and peak memory of training steps with more prototypes, local views, images and pixels.

Each step runs in a separate process. It is compared with the time of the smallest step, scaled by
the number of multiplications.
"""

import json
import resource
import subprocess
import sys

from tools.benchmark import harness

SMALLEST = {"prototypes": 1024, "local_views": 0, "batch": 16, "size": 32}
STEPS = {
    "prototypes": (16_384, 65_536),
    "local_views": (2, 10),
    "batch": (64, 256),
    "size": (64, 128, 256),
}
QUICK_STEPS = {"batch": (64,)}


def run(settings):
    """Yield a record for each size of a training step."""
    from tools.benchmark import models

    network = (96, 3, 3) if settings.quick else (192, 6, 3)
    steps = QUICK_STEPS if settings.quick else STEPS
    smallest = None
    for one in [SMALLEST, *({**SMALLEST, name: x} for name, xs in steps.items() for x in xs)]:
        shape = one["size"], one["size"] // 8, *network
        work = models.multiplications(shape, one["prototypes"], one["local_views"], one["batch"])
        measured = measured_apart({**vars(settings), **one, "shape": shape})
        smallest = smallest or (measured["seconds"], work)
        expected = [each * work / smallest[1] for each in smallest[0]]
        name = "growth, " + ", ".join(f"{key} {value}" for key, value in one.items())
        record = harness.durations(name, "multiplications", (measured["seconds"], expected))
        yield {**record, "peak_memory_mb": measured["peak_memory_mb"]}


def measured_apart(setting):
    """Return the result of `measure` for a setting, run in a separate process."""
    command = [sys.executable, "-m", "tools.benchmark.growth", json.dumps(setting)]
    result = subprocess.run(command, cwd=harness.ROOT, check=True, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1])


def measure(setting):
    """Return the times of training steps of one size, and the peak memory."""
    from tools.benchmark import models

    harness.pin_threads(setting["threads"])
    step = models.train_step(
        tuple(setting["shape"]),
        setting["batch"],
        prototypes=setting["prototypes"],
        local_views=setting["local_views"],
    )
    step()
    found = [harness.seconds(step) for _ in range(setting["rounds"])]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": found, "peak_memory_mb": round(peak)}


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
