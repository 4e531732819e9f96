"""oneDNN's operations against those that TensorFlow uses by itself on processors without AVX-512.

Training steps of three networks, and features of a fourth. TensorFlow chooses when it is imported,
so every round is a process of its own, which times a few steps. `quick` leaves all but the first
network out.
"""

import os
import statistics
import subprocess
import sys

import sddns_tf
from sddns_tf import backbones, efficientnet_lite
from tools.benchmark import harness, models

# Image size and batch of each network.
SIZES = {
    "ConvNet": (32, 64),
    "ViT of width 96 and depth 4, patch 4": (32, 64),
    "MobileNetV3Small": (64, 32),
    "EfficientNet-lite0, features": (224, 16),
}
BACKBONES = {
    "ConvNet": lambda *shape: sddns_tf.ConvNet(),
    "ViT of width 96 and depth 4, patch 4": lambda *shape: models.vit(32, 4, 96, 4, 3),
    "MobileNetV3Small": lambda *shape: backbones.application("MobileNetV3Small", weights=None),
}
WARM_UP, STEPS = 2, 7


def run(settings):
    """Yield a record for each network."""
    for name in list(SIZES)[: 1 if settings.quick else None]:
        batch = 8 if settings.quick else SIZES[name][1]
        program = "from tools.benchmark import onednn; onednn.time_steps({!r}, {}, {})"
        program = program.format(name, batch, settings.threads)
        times = harness.take_turns(
            ("1", program), ("0", program), settings.rounds, warm_up=False, measure=printed
        )
        yield harness.rates(f"onednn, {name}", "without oneDNN", times, batch)


def printed(side):
    """Return the number that a program prints, in a process with oneDNN ("1") or without ("0")."""
    choice, program = side
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "TF_ENABLE_ONEDNN_OPTS": choice}
    done = subprocess.run(
        command, env=environment, cwd=harness.ROOT, check=True, capture_output=True, text=True
    )
    return float(done.stdout)


def time_steps(name, batch, threads):
    """Print the median of the seconds that a few steps take."""
    harness.pin_threads(threads)
    size = SIZES[name][0]
    if name in BACKBONES:
        shape = (size, 4, 96, 4, 3)
        step = models.train_step(shape, batch, prototypes=1024, make_backbone=BACKBONES[name])
    else:
        network = efficientnet_lite.efficientnet_lite0()
        images = models.random_images(batch, size) / 255.0
        step = lambda: network.predict_on_batch(images)  # noqa: E731
    times = [harness.seconds(step) for _ in range(WARM_UP + STEPS)]
    print(statistics.median(times[WARM_UP:]))
