import pathlib

import numpy as np
import pytest
import skimage.data

import sddns_tf


@pytest.fixture(scope="module")
def detector():
    return sddns_tf.pretrained("cifar10-small")


def test_it_is_small_calibrated_and_tells_photographs_from_noise(detector, photos):
    assert detector.false_positive_rate == 0.05
    assert detector.calibration_scores.shape == (2500,)
    noise = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3)).astype(np.uint8)
    pixel_p = detector.predict(noise, verbose=0)["p_value"]
    photo_p = detector.predict(photos, verbose=0)["p_value"]
    assert photo_p.mean() > pixel_p.mean()
    file = pathlib.Path(sddns_tf.__file__).parent / "trained" / "cifar10-small.keras"
    assert file.stat().st_size < 4e6


def test_it_takes_a_rate_and_another_calibration(detector):
    grass = np.repeat(skimage.data.grass()[..., np.newaxis], 3, axis=-1)
    images = np.stack([grass[i : i + 32, i : i + 32] for i in range(0, 400, 4)])
    own = sddns_tf.pretrained()
    own.recalibrate(images, false_positive_rate=0.1, verbose=0)
    assert np.mean(own.predict(images, verbose=0)["is_ood"]) <= 0.1
    assert detector.false_positive_rate == 0.05


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match=r"cifar10-small.*Received: 'resnet50'"):
        sddns_tf.pretrained("resnet50")
