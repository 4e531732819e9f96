"""A training step with 2 global and 2 local views and negatives of one source, against PyTorch.

Of a ViT-S/4, and of `ConvNet`, the default for CPUs.

The network, the number and size of crops, and the optimizer are the same. Crops are made in advance
for both; a separate record has the time of our step including its views. Then the fastest modes of
both (XLA, bfloat16, `torch.compile`), chosen by a few steps, are compared.
"""

import functools

import tensorflow as tf

import sddns_tf
from tools.benchmark import harness, models
from tools.benchmark.partners import pytorch

BATCH, CONVNET_BATCH = 16, 64


def run(settings):
    """Yield five records."""
    torch = pytorch.imported(settings.threads)
    shape = models.training_shape(settings)
    step = models.train_step(shape, BATCH, ready_made=True)
    whole = models.train_step(shape, BATCH)
    torch_step = pytorch.train_step(torch, shape, BATCH)
    products = matrix_products(models.multiplications(shape, 4096, 2, BATCH))
    for name, partner, ours, theirs in (
        ("train_step", "PyTorch eager float32", step, torch_step),
        (
            "train_step with views",
            "PyTorch eager float32, crops made in advance",
            whole,
            torch_step,
        ),
        (
            "train_step, share of the peak",
            "as many multiplications in matrix products of side 1,024",
            step,
            products,
        ),
    ):
        times = harness.take_turns(ours, theirs, settings.rounds)
        yield harness.rates(name, partner, times, BATCH)

    yield convnet(settings, torch)

    def made_when_called(**options):
        """Compile at the first call, so that a mode that fails to compile is left out."""
        made = functools.cache(lambda: models.train_step(shape, BATCH, ready_made=True, **options))
        return lambda: made()()

    mode, ours = harness.fastest(
        {
            "float32": step,
            "bfloat16": made_when_called(policy="mixed_bfloat16"),
            "XLA": made_when_called(jit_compile=True),
            "bfloat16, XLA": made_when_called(jit_compile=True, policy="mixed_bfloat16"),
        }
    )
    torch_mode, theirs = harness.fastest(
        {
            "eager float32": torch_step,
            **{
                name: pytorch.train_step(torch, shape, BATCH, **options)
                for name, options in pytorch.MODES.items()
            },
        }
    )
    times = harness.take_turns(ours, theirs, settings.rounds)
    yield harness.rates(f"train_step, fastest mode ({mode})", f"PyTorch {torch_mode}", times, BATCH)


def convnet(settings, torch):
    """Return the record of a step of `ConvNet`."""
    batch = 8 if settings.quick else CONVNET_BATCH
    # Of these numbers only the image size and the number of features count.
    shape = (32, 4, 128, 0, 0)
    ours = models.train_step(
        shape, batch, ready_made=True, make_backbone=lambda *shape: sddns_tf.ConvNet()
    )
    theirs = pytorch.train_step(torch, shape, batch, make_backbone=pytorch.convnet)
    times = harness.take_turns(ours, theirs, settings.rounds)
    return harness.rates("train_step, ConvNet", "PyTorch eager float32", times, batch)


def matrix_products(count):
    """Return a function that does `count` multiplications as large float32 matrix products."""
    side = 1024
    matrix = tf.random.uniform((side, side))
    return lambda: [tf.matmul(matrix, matrix).numpy() for _ in range(round(count / side**3))]
