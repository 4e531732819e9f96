"""A training step with 2 global and 2 local views and negatives of one source, against PyTorch.

Network, number and size of the crops and optimizer are equal. The crops are made beforehand for
both; the time of ours with its views is a record of its own. Then the fastest mode of each (XLA,
bfloat16, `torch.compile`), which a few steps choose.
"""

import functools

import tensorflow as tf

from tools.benchmark import harness, models
from tools.benchmark.partners import pytorch

BATCH = 16


def run(settings):
    """Four records."""
    torch = pytorch.imported(settings.threads)
    shape = models.training_shape(settings)
    step = models.train_step(shape, BATCH, ready_made=True)
    whole = models.train_step(shape, BATCH)
    torch_step = pytorch.train_step(torch, shape, BATCH)
    products = matrix_products(models.multiplications(shape, 4096, 2, BATCH))
    for name, partner, ours, theirs in (
        ("train_step", "PyTorch eager float32", step, torch_step),
        ("train_step with views", "PyTorch eager float32, its crops ready made", whole, torch_step),
        (
            "train_step, share of the peak",
            "as many multiplications in matrix products of side 1,024",
            step,
            products,
        ),
    ):
        times = harness.take_turns(ours, theirs, settings.rounds)
        yield harness.rates(name, partner, times, BATCH)

    def made_when_called(**options):
        """A compilation that fails is then a mode left out."""
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


def matrix_products(count):
    """A function that does `count` multiplications the fastest way: large float32 products."""
    side = 1024
    matrix = tf.random.uniform((side, side))
    return lambda: [tf.matmul(matrix, matrix).numpy() for _ in range(round(count / side**3))]
