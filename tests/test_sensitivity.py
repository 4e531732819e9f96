"""Sensitivity on a detector whose scores are known."""

import itertools

import numpy as np
import pytest
from scipy import stats

from sddns_tf.sensitivity import (
    PROBES,
    bar_chart,
    compare,
    permutation_test,
    rank_correlation,
    sensitivity,
    untouched,
)


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


def test_draws_of_a_probe_do_not_depend_on_what_is_left_out(images):
    whole = sensitivity(TopIsBright(), images, probes=("rot90", "perm4"))
    part = sensitivity(TopIsBright(), images, trained_on="rot90", probes=("rot90", "perm4"))
    assert part["perm4"] == whole["perm4"]


def test_rank_correlation_is_that_of_ranks():
    sensitivities, aurocs = [0.9, 0.7, 0.8, 0.6, 0.5], [0.95, 0.7, 0.6, 0.65, 0.5]
    # Ranks 5 3 4 2 1 and 5 4 2 3 1: 1 - 6 * (0 + 1 + 4 + 1 + 0) / (5 * 24)
    value, low, high = rank_correlation(sensitivities, aurocs)
    assert value == pytest.approx(0.7)
    assert -1 <= low < value < high <= 1
    exact = rank_correlation([1, 2, 3], [3, 2, 1], resamples=50)
    assert exact == pytest.approx((-1.0, -1.0, -1.0))
    for wrong in ([1, 2], [1, 1, 1]):
        with pytest.raises(ValueError, match="at least 3 strategies that differ"):
            rank_correlation(wrong, list(range(len(wrong))))
    with pytest.raises(ValueError, match="one entry per strategy"):
        rank_correlation([1, 2, 3], [1, 2])


def test_bar_chart_puts_the_highest_on_top():
    figure = bar_chart({"b": 0.9, "a": 0.6}, {"a": 0.7, "b": 0.8})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert not axes.yaxis_inverted()
    widths = [[bar.get_width() for bar in bars] for bars in axes.containers]
    assert widths == [[0.6, 0.9], [0.7, 0.8]]


def test_probes_that_resemble_what_is_trained_on_are_left_out():
    assert untouched([None, "rot90"]) == ("perm4", "perm16", "pixel_perm", "cut_paste")
    assert untouched(["pixel_perm"]) == ("rot90", "rot360", "cut_paste")
    assert untouched(["identity", None]) == PROBES
    assert untouched(["rot360", "perm4", "cut_paste"]) == ()

    def mine(images, seed):
        del seed
        return images

    assert untouched([mine], ("rot90", mine)) == ("rot90",)


def runs(*values):
    return [{"perm4": value, "perm16": value, "rot90": 1.0} for value in values]


def test_strategies_are_compared_by_the_same_probes_and_seeds():
    none, rotated = [0.50, 0.53, 0.47], [0.60, 0.64, 0.58]
    found = compare({"none": runs(*none), "rot": runs(*rotated)}, ["perm4", "perm16"])
    assert found.means == pytest.approx({"rot": np.mean(rotated), "none": np.mean(none)})
    interval = stats.ttest_rel(rotated, none).confidence_interval(0.95)
    assert found.differences["none"][1:] == pytest.approx(tuple(interval))
    assert (found.chosen, found.doubts) == ("rot", [])

    # Of three strategies there are three pairs, so each interval is wider.
    other = [0.40, 0.41, 0.39]
    found = compare(
        {"none": runs(*none), "rot": runs(*rotated), "other": runs(*other)}, ["perm4", "perm16"]
    )
    interval = stats.ttest_rel(rotated, none).confidence_interval(1 - 0.05 / 3)
    assert found.differences["none"][1:] == pytest.approx(tuple(interval))


def test_thin_evidence_chooses_nothing():
    found = {"none": runs(0.5, 0.7, 0.5), "rot": runs(0.7, 0.6, 0.6)}
    assert compare(found, ["perm4", "perm16"]).chosen is None
    sure = {"none": runs(0.5, 0.5), "rot": runs(0.7, 0.701)}
    assert compare(sure, ["perm4", "perm16"]).chosen == "rot"
    (doubt,) = compare(sure, ["perm4"]).doubts
    assert "only one probe, perm4" in doubt
    once = compare({"none": runs(0.5), "rot": runs(0.9)}, ["perm4", "perm16"])
    assert (once.chosen, once.differences) == (None, {})
    with pytest.raises(ValueError, match="two strategies or more"):
        compare({"none": runs(0.5, 0.5), "rot": runs(0.7)}, ["perm4"])
    with pytest.raises(ValueError, match=r"measured with, \['perm16', 'perm4', 'rot90'\]"):
        compare(sure, ["rot360"])


def test_the_best_of_many_definitions_is_tested_as_the_best_of_many():
    generator = np.random.default_rng(0)
    definitions = {str(index): generator.normal(size=5) for index in range(4)}
    definitions["partial"] = np.array([0.1, np.nan, 0.4, 0.3, 0.2])
    aurocs = generator.normal(size=5)

    def best(order):
        order = np.asarray(order)
        return max(
            stats.spearmanr(values[np.isfinite(values)], order[np.isfinite(values)]).statistic
            for values in definitions.values()
        )

    # Every order of five strategies, by hand.
    at_least = [best(order) >= best(aurocs) - 1e-9 for order in itertools.permutations(aurocs)]
    name, value, p_value = permutation_test(definitions, aurocs)
    assert value == pytest.approx(best(aurocs))
    assert p_value == pytest.approx(np.mean(at_least))
    alone = permutation_test({name: definitions[name]}, aurocs)
    assert alone[:2] == (name, pytest.approx(value))
    assert alone[2] < p_value  # four others tried make it less remarkable
    with pytest.raises(ValueError, match="tell 3 of 5"):
        permutation_test({"flat": np.ones(5)}, aurocs)
    with pytest.raises(ValueError, match="tell 3 of 5"):
        permutation_test({"short": [1.0, 2.0]}, aurocs)
