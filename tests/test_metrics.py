import math

import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from sddns_tf import metrics

tied = st.integers(-4, 4).map(float)
spread = st.floats(-1e6, 1e6, allow_nan=False, allow_subnormal=False)
score_lists = st.lists(tied, min_size=1, max_size=60) | st.lists(spread, min_size=1, max_size=60)


def rank_auroc(low, high):
    """Mann-Whitney: the share of pairs in the right order, ties counting half."""
    pairs = [(b > a) + 0.5 * (b == a) for a in low for b in high]
    return sum(pairs) / len(pairs)


def average_precision(positives, negatives):
    """The sum over distinct thresholds of precision times the recall gained there."""
    total, found_before = 0.0, 0
    for threshold in sorted({*positives, *negatives}, reverse=True):
        found = sum(p >= threshold for p in positives)
        wrong = sum(n >= threshold for n in negatives)
        total += found / (found + wrong) * (found - found_before) / len(positives)
        found_before = found
    return total


def brute_fpr95(id_scores, ood_scores):
    """The least share of OOD accepted by any threshold that accepts 95 % of in-distribution."""
    shares = []
    for threshold in {*id_scores, *ood_scores}:
        if 100 * sum(s <= threshold for s in id_scores) >= 95 * len(id_scores):
            shares.append(sum(s <= threshold for s in ood_scores) / len(ood_scores))
    return min(shares)


@settings(max_examples=150, deadline=None)
@given(score_lists, score_lists)
def test_metrics_match_their_definitions(id_scores, ood_scores):
    result = metrics.ood_metrics(id_scores, ood_scores)
    expected = {
        "auroc": rank_auroc(id_scores, ood_scores),
        "aupr_in": average_precision([-s for s in id_scores], [-s for s in ood_scores]),
        "aupr_out": average_precision(ood_scores, id_scores),
        "fpr95": brute_fpr95(id_scores, ood_scores),
    }
    assert result == pytest.approx(expected, abs=1e-9)
    assert all(type(value) is float for value in result.values())


@settings(max_examples=50, deadline=None)
@given(score_lists, score_lists)
def test_exchanging_the_sets_and_the_sign_exchanges_the_precisions(id_scores, ood_scores):
    result = metrics.ood_metrics(id_scores, ood_scores)
    mirrored = metrics.ood_metrics([-s for s in ood_scores], [-s for s in id_scores])
    assert mirrored["auroc"] == pytest.approx(result["auroc"])
    assert mirrored["aupr_in"] == pytest.approx(result["aupr_out"])
    assert mirrored["aupr_out"] == pytest.approx(result["aupr_in"])


def test_separated_and_reversed_scores():
    apart = metrics.ood_metrics([0.0, 1.0, 2.0], [3.0, 4.0])
    assert apart == {"auroc": 1.0, "aupr_in": 1.0, "aupr_out": 1.0, "fpr95": 0.0}
    reverse = metrics.ood_metrics([3.0, 4.0], [0.0, 1.0, 2.0])
    assert reverse["auroc"] == 0.0
    assert reverse["fpr95"] == 1.0


@pytest.mark.parametrize("count", [1, 19, 20, 21, 40, 99, 100, 140, 1000])
def test_fpr95_accepts_the_fewest_that_make_95_percent(count):
    id_scores = np.arange(count)
    accepted = next(n for n in range(count + 1) if 100 * n >= 95 * count)
    ood_scores = id_scores + 0.5
    # Exactly the OOD scores below the last accepted in-distribution score pass.
    expected = (accepted - 1) / count
    assert metrics.ood_metrics(id_scores, ood_scores)["fpr95"] == pytest.approx(expected)


def test_fpr95_takes_in_distribution_as_positives():
    id_scores = np.arange(100.0)  # 95 are accepted up to 94
    ood_scores = [10.0, 200.0, 300.0, 400.0]
    # At 95 % of OOD flagged instead, 90 of 100 normal images would be: another number.
    assert metrics.ood_metrics(id_scores, ood_scores)["fpr95"] == 0.25


def test_fpr95_counts_ties_with_the_threshold_as_accepted():
    id_scores = [0.0] * 90 + [1.0] * 10
    assert metrics.ood_metrics(id_scores, [1.0, 1.0, 1.0, 2.0])["fpr95"] == 0.75


def test_tensors_and_half_precision_are_accepted():
    id_scores, ood_scores = [0.5, 1.0, 1.5], [1.0, 2.0]
    expected = metrics.ood_metrics(id_scores, ood_scores)
    for dtype in ("float16", "bfloat16", "float32", "float64"):
        tensors = tf.constant(id_scores, dtype), tf.constant(ood_scores, dtype)
        assert metrics.ood_metrics(*tensors) == expected


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "at least one score. Received: an empty array"),
        ([0.0, math.nan], "finite. Received: 1 NaN or infinite of 2"),
        ([-math.inf, math.inf, 1.0], "finite. Received: 2 NaN or infinite of 3"),
        ([[0.0, 1.0]], r"shape \(N,\).*Received: shape \(1, 2\)"),
        (3.0, r"shape \(N,\).*Received: shape \(\)"),
    ],
)
def test_bad_scores_are_named(bad, message):
    with pytest.raises(ValueError, match="`id_scores`.*" + message):
        metrics.ood_metrics(bad, [1.0])
    with pytest.raises(ValueError, match="`ood_scores`.*" + message):
        metrics.ood_metrics([1.0], bad)


def photograph_features():
    """Mean colors of crops of five photographs: features with real classes, not all easy."""
    photographs = [
        skimage.data.astronaut(),
        skimage.data.coffee(),
        skimage.data.chelsea(),
        skimage.data.rocket(),
        np.repeat(skimage.data.grass()[..., None], 3, axis=-1),
    ]
    rng = np.random.default_rng(7)
    features, labels = [], []
    for label, photograph in enumerate(photographs):
        for _ in range(40):
            top, left = (rng.integers(0, size - 48) for size in photograph.shape[:2])
            crop = photograph[top : top + 48, left : left + 48].astype("float32")
            features.append(crop.reshape(4, 12, 4, 12, 3).mean(axis=(1, 3)).ravel() - 100)
            labels.append(10 * label + 3)
    order = rng.permutation(len(labels))
    features, labels = np.stack(features)[order], np.array(labels)[order]
    return (features[:120], labels[:120]), (features[120:], labels[120:])


def brute_knn_accuracy(bank, bank_labels, features, labels, k, temperature):
    correct = 0
    for feature, label in zip(features.astype("float64"), labels, strict=True):
        cosines = [
            float(feature @ row) / math.sqrt(float(feature @ feature) * float(row @ row))
            for row in bank.astype("float64")
        ]
        votes = {}
        for index in sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]:
            weight = math.exp(cosines[index] / temperature)
            votes[bank_labels[index]] = votes.get(bank_labels[index], 0.0) + weight
        correct += max(votes, key=votes.get) == label
    return correct / len(labels)


@pytest.mark.parametrize(("k", "temperature"), [(1, 0.04), (10, 0.04), (20, 0.04), (120, 1.0)])
def test_knn_accuracy_matches_a_loop(k, temperature, monkeypatch):
    known, asked = photograph_features()
    expected = brute_knn_accuracy(*known, *asked, k, temperature)
    result = metrics.knn_accuracy(*known, *asked, k=k, temperature=temperature)
    assert type(result) is float
    assert result == expected
    assert 0.3 < result < 1.0  # neither chance nor so easy that nothing is tested
    # The same in blocks of 7 images, the last one smaller, and of 1.
    for elements in (7 * 120, 1):
        monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", elements)
        blocks = metrics.knn_accuracy(*known, *asked, k=k, temperature=temperature)
        assert blocks == expected


def test_knn_accuracy_never_holds_more_than_a_block(monkeypatch):
    known, asked = photograph_features()
    held = []
    original = np.argpartition
    monkeypatch.setattr(metrics, "BLOCK_ELEMENTS", 1000)
    monkeypatch.setattr(
        np,
        "argpartition",
        lambda values, *a, **k: held.append(values.size) or original(values, *a, **k),
    )
    metrics.knn_accuracy(*known, *asked)
    assert len(held) == 10
    assert max(held) <= 1000


def test_knn_accuracy_defaults_are_those_of_the_method():
    known, asked = photograph_features()
    assert metrics.knn_accuracy(*known, *asked) == brute_knn_accuracy(*known, *asked, 20, 0.04)


def test_knn_accuracy_ignores_the_length_of_features():
    (bank, bank_labels), (features, labels) = photograph_features()
    scales = np.geomspace(1e-3, 1e3, len(features))[:, None]
    expected = metrics.knn_accuracy(bank, bank_labels, features, labels)
    assert metrics.knn_accuracy(bank * 50, bank_labels, features * scales, labels) == expected


def test_temperature_decides_between_the_near_and_the_many():
    angles = np.radians([5.0, 40.0, 42.0])
    bank = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    query = [[1.0, 0.0]]
    for temperature, winner in [(1e-4, 9), (0.04, 9), (10.0, 4)]:
        assert metrics.knn_accuracy(bank, [9, 4, 4], query, [winner], 3, temperature) == 1.0
        assert metrics.knn_accuracy(bank, [9, 4, 4], query, [13 - winner], 3, temperature) == 0.0


def test_a_label_that_the_bank_lacks_is_a_miss():
    assert metrics.knn_accuracy(np.eye(2), [0, 1], np.eye(2), [0, 7], k=1) == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bank_features": np.ones(4)}, r"`bank_features`.*\(N, D\).*Received: shape \(4,\)"),
        ({"features": np.ones((0, 3))}, r"`features`.*Received: shape \(0, 3\)"),
        ({"features": np.full((2, 3), np.nan)}, "`features` must be finite"),
        ({"features": np.ones((2, 5))}, "same width. Received: 5 and 3"),
        ({"bank_labels": np.zeros((4, 1), int)}, r"`bank_labels`.*\(4,\).*Received.*\(4, 1\)"),
        ({"labels": [0.0, 1.0]}, "`labels` must be integers.*Received: float64"),
        ({"labels": [0]}, r"`labels`.*\(2,\).*Received.*\(1,\)"),
        ({"k": 0}, "`k` must be from 1 to the size of the bank, 4. Received: 0"),
        ({"k": 5}, "`k` must be from 1 to the size of the bank, 4. Received: 5"),
        ({"temperature": 0.0}, "`temperature` must be positive. Received: 0.0"),
    ],
)
def test_bad_knn_arguments_are_named(change, message):
    arguments = {
        "bank_features": np.ones((4, 3)),
        "bank_labels": [0, 0, 1, 1],
        "features": np.ones((2, 3)),
        "labels": [0, 1],
        "k": 2,
    }
    with pytest.raises(ValueError, match=message):
        metrics.knn_accuracy(**(arguments | change))


# --- Intervals ----------------------------------------------------------------------------------


def test_intervals_are_those_of_resampled_metrics():
    generator = np.random.default_rng(1)
    # Rounded, so that scores tie within and between the sets.
    normal = np.round(generator.normal(0, 1, 80), 1)
    ood = np.round(generator.normal(1, 1, 50), 1)
    draws = np.random.default_rng(7)
    drawn = []
    for _ in range(25):
        rows = draws.integers(0, 80, 80)
        drawn.append(metrics.ood_metrics(normal[rows], ood[draws.integers(0, 50, 50)]))
    found = metrics.ood_metric_intervals(normal, ood, confidence=0.8, resamples=25, seed=7)
    for name in drawn[0]:
        expected = np.quantile([one[name] for one in drawn], [0.1, 0.9])
        np.testing.assert_allclose(found[name], expected, rtol=1e-9)


def test_interval_holds_the_truth_about_as_often_as_it_says():
    generator = np.random.default_rng(0)
    truth = 0.7602499  # of two normal distributions one standard deviation apart: Phi(1 / sqrt 2)
    hits = 0
    for seed in range(100):
        normal, ood = generator.normal(0, 1, 100), generator.normal(1, 1, 100)
        options = {"resamples": 200, "seed": seed, "confidence": 0.8}
        low, high = metrics.ood_metric_intervals(normal, ood, **options)["auroc"]
        hits += low <= truth <= high
    assert 68 <= hits <= 92
    options["confidence"] = 0.95  # the default
    found = metrics.ood_metric_intervals(normal, ood, **options)
    del options["confidence"]
    assert found == metrics.ood_metric_intervals(normal, ood, **options)


@pytest.mark.parametrize(("hits", "count"), [(0, 10), (10, 10), (3, 20), (50, 1000)])
def test_share_interval_holds_the_shares_that_a_score_test_does_not_refuse(hits, count):
    low, high = metrics.share_interval(hits / count, count)
    assert 0 <= low < high <= 1
    # At either limit p the share lies 1.96 standard deviations of p from it (Wilson, 1927).
    for limit in {low, high} - {0.0, 1.0}:
        deviations = abs(hits / count - limit) / np.sqrt(limit * (1 - limit) / count)
        assert deviations == pytest.approx(1.959964, abs=1e-5)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.share_interval(1.5, 10), r"`share` must be in 0-1. Received: 1.5"),
        (lambda: metrics.share_interval(0.5, 0), "At least one draw"),
        (lambda: metrics.ood_metric_intervals([0.0], [1.0], confidence=1), "`confidence`"),
        (lambda: metrics.ood_metric_intervals([0.0], [1.0], resamples=0), "At least one draw"),
        (lambda: metrics.ood_metric_intervals([0.0], []), "`ood_scores`"),
    ],
)
def test_intervals_refuse(call, message):
    with pytest.raises(ValueError, match=message):
        call()
