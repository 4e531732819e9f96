"""Sensitivity on a detector whose scores are known."""

import numpy as np
import pytest

from sddns_tf.sensitivity import PROBES, bar_chart, rank_correlation, sensitivity


class TopIsBright:
    """Scores an image by how much darker its top half is than its bottom half."""

    def predict(self, images, batch_size, verbose):
        del batch_size, verbose
        images = np.asarray(images, np.float32)
        top, bottom = images[:, :8].mean((1, 2, 3)), images[:, 8:].mean((1, 2, 3))
        return {"ood_score": bottom - top}


@pytest.fixture
def images():
    generator = np.random.default_rng(0)
    bright = generator.integers(150, 256, (40, 8, 16, 3))
    dark = generator.integers(0, 106, (40, 8, 16, 3))
    return np.concatenate([bright, dark], axis=1).astype(np.uint8)


def test_probe_that_moves_every_score_is_told_apart(images):
    result = sensitivity(TopIsBright(), images)
    assert set(result) == {*PROBES, "mean"}
    # A rotation by 90, 180 or 270 degrees never leaves the bright half on top.
    assert result["rot90"] == 1.0
    assert result["pixel_perm"] == 1.0
    assert result["mean"] == pytest.approx(np.mean([result[name] for name in PROBES]))


def test_shift_trained_on_is_left_out(images):
    by_name = sensitivity(TopIsBright(), images, trained_on="rot90")
    assert "rot90" not in by_name

    def same(batch, seed):
        del seed
        return batch

    result = sensitivity(TopIsBright(), images, probes=("perm4", same))
    assert result["same"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="other than the one trained on"):
        sensitivity(TopIsBright(), images, trained_on=same, probes=(same,))
    with pytest.raises(ValueError, match="one of"):
        sensitivity(TopIsBright(), images, trained_on="rot91")


def test_rank_correlation_is_that_of_ranks():
    sensitivities, aurocs = [0.9, 0.7, 0.8, 0.6, 0.5], [0.95, 0.7, 0.6, 0.65, 0.5]
    # Ranks 5 3 4 2 1 and 5 4 2 3 1: 1 - 6 * (0 + 1 + 4 + 1 + 0) / (5 * 24)
    value, low, high = rank_correlation(sensitivities, aurocs)
    assert value == pytest.approx(0.7)
    assert -1 <= low < value < high <= 1
    assert rank_correlation([1, 2, 3], [3, 2, 1], resamples=50) == (-1.0, -1.0, -1.0)
    for wrong in ([1, 2], [1, 1, 1]):
        with pytest.raises(ValueError, match="at least 3 strategies that differ"):
            rank_correlation(wrong, list(range(len(wrong))))
    with pytest.raises(ValueError, match="one entry per strategy"):
        rank_correlation([1, 2, 3], [1, 2])


def test_bar_chart_puts_the_highest_on_top():
    figure = bar_chart({"a": 0.6, "b": 0.9}, {"a": 0.7, "b": 0.8})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert sorted(bar.get_width() for bar in axes.patches) == [0.6, 0.7, 0.8, 0.9]
