"""Feature extraction with a vision transformer against PyTorch, in float32 and fastest modes."""

import tensorflow as tf

from tools.benchmark import harness, models
from tools.benchmark.partners import pytorch

BATCH = 16


def run(settings):
    """Yield two records."""
    torch = pytorch.imported(settings.threads)
    shape = models.scoring_shape(settings)
    images = models.random_images(BATCH, shape[0]).astype("float32") / 255
    tensor = tf.constant(images)

    def ours(policy="float32", jit_compile=False):
        with models.dtype_policy(policy):
            function = tf.function(models.vit(*shape), jit_compile=jit_compile, autograph=False)
            function(tensor)
        return lambda: tf.cast(function(tensor), tf.float32).numpy()

    plain, torch_plain = ours(), pytorch.features(torch, shape, images)
    times = harness.take_turns(plain, torch_plain, settings.rounds)
    yield harness.rates("features", "PyTorch eager float32", times, BATCH)
    mode, best = harness.fastest(
        {
            "float32": plain,
            "XLA": ours(jit_compile=True),
            "bfloat16": ours("mixed_bfloat16"),
            "bfloat16, XLA": ours("mixed_bfloat16", jit_compile=True),
        }
    )
    torch_mode, torch_best = harness.fastest(
        {
            "eager float32": torch_plain,
            **{
                name: pytorch.features(torch, shape, images, **options)
                for name, options in pytorch.MODES.items()
            },
        }
    )
    times = harness.take_turns(best, torch_best, settings.rounds)
    yield harness.rates(f"features, fastest mode ({mode})", f"PyTorch {torch_mode}", times, BATCH)
