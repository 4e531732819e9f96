"""A training step in `mixed_bfloat16` against float32: the small convnet, and a small transformer.

On processors that multiply in bfloat16; others emulate it, which is slower. `quick` leaves out the
transformer.
"""

import sddns_tf
from tools.benchmark import harness, models

BATCH = 64


def run(settings):
    """Yield a record for each network."""
    batch = 8 if settings.quick else BATCH
    networks = {
        "ConvNet": lambda *shape: sddns_tf.ConvNet(),
        "ViT of width 96 and depth 4, patch 4": lambda *shape: models.vit(32, 4, 96, 4, 3),
    }
    if settings.quick:
        networks = {"ConvNet": networks["ConvNet"]}
    for name, make_backbone in networks.items():
        steps = [
            models.train_step(
                models.training_shape(settings),
                batch,
                policy=policy,
                prototypes=1024,
                make_backbone=make_backbone,
            )
            for policy in ("mixed_bfloat16", "float32")
        ]
        times = harness.take_turns(*steps, settings.rounds)
        yield harness.rates(f"precision, {name}, bfloat16", "float32", times, batch)
