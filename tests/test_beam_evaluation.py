"""Sketches of scores and p-values against the exact figures of all of them."""

import math

import numpy as np
import pytest

pytest.importorskip("apache_beam")
import apache_beam as beam
from apache_beam.testing.util import assert_that
from scipy.stats import ks_2samp
from sklearn.metrics import roc_auc_score

from sddns_tf.beam import CheckDrift, ScoreSketch, SketchScores, Thresholds, sketched_metrics
from sddns_tf.metrics import ood_metrics


def scores(seed, count, mean):
    return np.random.default_rng(seed).normal(mean, 1.5, count).astype(np.float32)


def sketched(values, width, shards=10):
    whole = ScoreSketch(width)
    for part in np.array_split(values, shards):
        sketch = ScoreSketch(width)
        for start in range(0, len(part), 333):
            sketch.add(part[start : start + 333])
        whole.merge(sketch)
    return whole


@pytest.mark.parametrize("width", [0.001, 0.3])
@pytest.mark.parametrize("seed", range(3))
def test_exact_metrics_lie_within_those_of_ten_merged_sketches(width, seed):
    normal, other = scores(seed, 5000, -20.0), scores(seed + 10, 3000, -18.0)
    other[:200] = normal[:200]  # Ties.
    found = sketched_metrics(sketched(normal, width), sketched(other, width))
    labels = np.repeat([0, 1], [5000, 3000])
    exact = {
        "auroc": roc_auc_score(labels, np.concatenate([normal, other])),
        "fpr95": ood_metrics(normal, other)["fpr95"],
    }
    for name, (low, high) in found.items():
        assert low - 1e-12 <= exact[name] <= high + 1e-12
    bins = [np.floor(values.astype(np.float64) / width) for values in (normal, other)]
    in_one_bin = np.mean(bins[0][:, None] == bins[1][None])
    assert found["auroc"][1] - found["auroc"][0] == pytest.approx(in_one_bin, rel=1e-9)
    assert in_one_bin < (0.001 if width == 0.001 else 0.1)


def test_a_histogram_counts_every_score_once_and_memory_is_that_of_the_bins():
    values = scores(0, 20_000, -10.0)
    sketch = sketched(values, 0.5)
    edges, counts = sketch.histogram()
    expected = np.histogram(values.astype(np.float64), np.append(edges, edges[-1] + 0.5))[0]
    np.testing.assert_array_equal(counts, expected)
    assert sketch.count == 20_000 and len(edges) < 40
    sketch.add([math.nan, math.inf, -math.inf])
    edges, counts = sketch.histogram()
    assert edges[0] == -math.inf and counts[0] == 1
    assert edges[-1] == math.inf and counts[-1] == 2
    with pytest.raises(ValueError, match="bins of one width"):
        sketch.merge(ScoreSketch(0.25))
    with pytest.raises(ValueError, match="neither of them empty"):
        sketched_metrics(sketch, ScoreSketch(0.5))


@pytest.mark.parametrize("rate", [0.05, 0.013])
def test_thresholds_of_groups_keep_the_promise_and_miss_by_a_bin_at_most(rate):
    groups = {"left": scores(1, 400, -20.0), "right": scores(2, 99, -15.0), "few": scores(3, 10, 0)}
    exact = {}
    for name, values in groups.items():
        rank = math.floor(rate * (len(values) + 1) + 1e-9)
        exact[name] = np.sort(values)[-rank] if rank else math.inf

    def check(found):
        found = dict(found)
        assert found["few"] == math.inf
        for name in ("left", "right"):
            assert exact[name] <= found[name] <= exact[name] + 0.01 + 1e-6

    with beam.Pipeline("FnApiRunner") as pipeline:
        pairs = [(name, value) for name, values in groups.items() for value in values.tolist()]
        assert_that(pipeline | beam.Create(pairs) | Thresholds(rate, width=0.01), check)


def test_drift_of_groups_is_the_two_sample_test():
    size, generator = 199, np.random.default_rng(0)
    ranks = {
        "monday": generator.integers(1, size + 2, 3000),
        "tuesday": np.minimum(generator.integers(1, size + 2, 2000), 150),
    }
    p_values = {name: (rank / (size + 1)).astype(np.float32) for name, rank in ranks.items()}

    def check(found):
        found = dict(found)
        for name, rank in ranks.items():
            expected = ks_2samp(rank, np.arange(1, size + 2)).statistic
            assert found[name].distance == pytest.approx(expected, abs=1e-9)
            assert found[name].total == len(rank)
        assert not found["monday"].has_drifted and found["tuesday"].has_drifted
        # At the limit the chance is the one that was chosen.
        limit, count = found["monday"].limit, found["monday"].total
        x = limit / math.sqrt(1 / count + 1 / size)
        chance = 2 * sum((-1) ** (j - 1) * math.exp(-2 * j * j * x * x) for j in range(1, 50))
        assert chance == pytest.approx(0.001, rel=1e-6)

    with beam.Pipeline("FnApiRunner") as pipeline:
        pairs = [(name, p) for name, ps in p_values.items() for p in ps.tolist()]
        assert_that(pipeline | beam.Create(pairs) | CheckDrift(size), check)


def test_a_combine_fn_merges_what_bundles_counted():
    values = scores(4, 5000, -20.0)
    expected = sketched(values, 0.1).histogram()

    def check(found):
        (sketch,) = found
        for left, right in zip(sketch.histogram(), expected, strict=True):
            np.testing.assert_array_equal(left, right)

    with beam.Pipeline("FnApiRunner") as pipeline:
        parts = pipeline | beam.Create(np.array_split(values, 20)) | beam.Reshuffle()
        assert_that(parts | beam.CombineGlobally(SketchScores(0.1)), check)
