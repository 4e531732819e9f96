"""A local detector that is built and asked on two replicas is that of one device."""

import contextlib

import numpy as np
import pytest
from forks import save_with_and_without


def build(strategy):
    """Bank, threshold and answers of a detector of bricks."""
    from test_local import bricks, convnet, damaged

    from sddns_tf.detector import Detector

    with strategy.scope() if strategy else contextlib.nullcontext():
        detector = Detector.from_images(
            convnet(), bricks(40, 0), bricks(39, 1), layers="auto", bank_size=100, verbose=0
        )
        images = np.concatenate([bricks(11, 2), damaged(6, 3)])
        answers = detector.predict(images, batch_size=8, verbose=0)
    found = {"bank": detector.bank.numpy(), "threshold": detector.threshold, **answers}
    detector.extend(damaged(6, 3), verbose=0)
    detector.recalibrate(bricks(39, 4), verbose=0)
    found["extended"] = detector.bank.numpy()
    found["recalibrated"] = detector.threshold
    return found


@pytest.mark.slow
def test_two_replicas_equal_one_device(fork, tmp_path):
    path = tmp_path / "found.npz"
    process = fork(save_with_and_without, 2, build, path)
    assert process.wait() == 0, process.errors[-4000:]
    found = np.load(path)
    names = [name.removeprefix("one ") for name in found if name.startswith("one ")]
    assert {"anomaly_map", "is_ood", "bank", "extended"} <= set(names)
    for name in names:
        one, two = found[f"one {name}"], found[f"several {name}"]
        assert one.shape == two.shape, name
        np.testing.assert_allclose(two.astype(float), one.astype(float), atol=2e-3, err_msg=name)
    assert found["one is_ood"][11:].all() and len(found["one extended"]) > 100
