"""Label-free choice of the shift: how sensitive the score is to shifts it was not trained on."""

import numpy as np
import tensorflow as tf

from sddns_tf import metrics, shifts

PROBES = ("rot90", "rot360", "perm4", "perm16", "pixel_perm")


def sensitivity(detector, images, trained_on=None, probes=PROBES, seed=0, batch_size=256):
    """How well the score tells held-out in-distribution images from their shifted selves.

    The sensitivity to one probe shift T is the AUROC of the scores of `images` against those of
    `T(images)`; that of a training strategy is the mean over the probes other than the shift it
    trained on. Neither labels nor OOD images are needed, so it can choose a strategy.

    Args:
        detector: Trained `Detector`.
        images: Held-out in-distribution images, squares, uint8 or float in 0-255, `(N, S, S, 3)`.
        trained_on: Shift that made the negatives, by name or callable; left out of the mean.
        probes: Names from `shifts.NAMES`, or callables.
        seed: Integer; fixes the draws of the probes.
        batch_size: Images per forward.

    Returns:
        Dictionary: the AUROC of each probe by name, and their mean as `"mean"`.

    Example:
        >>> sensitivity(detector, held_out_images, trained_on="rot90")
        {'rot360': 0.93, 'perm4': 0.87, 'perm16': 0.94, 'pixel_perm': 1.0, 'mean': 0.935}

    Reference:
        Rafiee et al., arXiv 2201.06378. The definition is this package's: the abstract says what
        the sensitivity is for, and that it comes from the score alone.
    """
    names = [shifts.name_of(probe) for probe in probes]
    trained_name = shifts.name_of(shifts.get(trained_on)) if trained_on else None
    used = [pair for pair in zip(names, probes, strict=True) if pair[0] != trained_name]
    if not used:
        raise ValueError(
            "`probes` must hold a shift other than the one trained on. Received: "
            f"probes={probes}, trained_on={trained_on!r}"
        )
    scores = _scores(detector, images, batch_size)
    result = {}
    for index, (name, probe) in enumerate(used):
        shifted = shifts.get(probe)(tf.convert_to_tensor(images), [seed, index]).numpy()
        shifted_scores = _scores(detector, shifted, batch_size)
        result[name] = metrics.ood_metrics(scores, shifted_scores)["auroc"]
    return {**result, "mean": float(np.mean(list(result.values())))}


def _scores(detector, images, batch_size):
    return detector.predict(images, batch_size=batch_size, verbose=0)["ood_score"]
