"""A detector made in the scope of a strategy uses every device, and answers as on one."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
from forks import save_with_and_without

SEEN = set()


class Seen(keras.layers.Layer):
    """Tells which replicas compute it."""

    def call(self, images):
        context = tf.distribute.get_replica_context()
        if context is not None:  # There is none while Keras builds a model.
            SEEN.add(int(tf.get_static_value(context.replica_id_in_sync_group)))
        return images


def build(strategy):
    from sddns_tf.detector import Detector
    from sddns_tf.features import extract_features

    images = np.random.default_rng(0).integers(0, 256, (131, 16, 16, 3), dtype=np.uint8)
    with strategy.scope() if strategy else contextlib.nullcontext():
        keras.utils.set_random_seed(0)
        backbone = keras.Sequential(
            [
                keras.Input((16, 16, 3)),
                Seen(),
                keras.layers.Conv2D(8, 5, 4),
                keras.layers.ReLU(),
                keras.layers.GlobalAveragePooling2D(),
            ]
        )
        detector = Detector.from_images(
            backbone, images[:65], images[65:98], 0.1, batch_size=16, verbose=0
        )
    SEEN.clear()
    features = extract_features(detector.extractor, images[98:], batch_size=7, verbose=0)
    extractor_saw = sorted(SEEN)
    SEEN.clear()
    answers = detector.predict(images[98:], batch_size=16, verbose=0)
    return {
        "bank": detector.bank.numpy(),
        "features": features,
        "extractor saw": extractor_saw,
        "predict saw": sorted(SEEN),
        **answers,
    }


@pytest.mark.slow
def test_bank_features_and_predict_use_every_device(fork, tmp_path):
    path = tmp_path / "found.npz"
    process = fork(save_with_and_without, 3, build, path)
    assert process.wait() == 0, process.errors[-4000:]
    found = np.load(path)
    for name in ("bank", "features", "ood_score", "p_value", "is_ood"):
        one, three = (found[f"{count} {name}"].astype(float) for count in ("one", "several"))
        assert len(one) == len(three) == (65 if name == "bank" else 33)
        np.testing.assert_allclose(three, one, atol=2e-4, err_msg=name)
    assert found["several extractor saw"].tolist() == [0, 1, 2]
    assert found["several predict saw"].tolist() == [0, 1, 2]
