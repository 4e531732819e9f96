"""Splits of the solar cells, put together by `tools.research.inspection_table`."""

import json

import numpy as np
import pytest
from scipy import stats

from tools.research import inspection_table, with_labels


@pytest.fixture
def splits(tmp_path):
    """Folders of two splits: a network beside the frozen one, and PatchCore in one of them."""
    for split, (frozen, other) in enumerate(((0.94, 0.95), (0.90, 0.93))):
        folder = tmp_path / str(split)
        folder.mkdir()

        def figures(auroc, flagged):
            row = {"auroc": auroc, "fresh_flagged": flagged, "images": [20, 40, 50]}
            return {"mono": row}

        found = {"frozen": figures(frozen, 0.05), "fine_tuned": figures(other, 0.1)}
        (folder / "results.json").write_text(json.dumps(found))
    (tmp_path / "0" / "patchcore_mono.json").write_text(json.dumps({"auroc": [0.94, 0.96]}))
    (tmp_path / "1" / "labels_mono.json").write_text(json.dumps({"auroc": 0.97}))
    return f"{tmp_path}/0,{tmp_path}/1"


def test_differences_are_paired_by_split(splits, capsys):
    inspection_table.main([f"--runs={splits}"])
    told = capsys.readouterr().out
    gains = [0.95 - 0.94, 0.93 - 0.90]
    half = stats.ttest_1samp(gains, 0.0).confidence_interval(0.95)
    width = (half.high - half.low) / 2
    assert f"| {np.mean(gains):+.3f} ± {width:.3f} | 10.0% of 80 |" in told
    assert "| mono | frozen | 2 | 0.920 | 0.940, 0.900 |  | 5.0% of 80 |" in told
    # In one split only: no interval, and nothing is known of what it flags.
    assert "| mono | PatchCore | 1 | 0.960 | 0.960 | +0.020 |  |" in told
    assert "| mono | with labels | 1 | 0.970 | 0.970 | +0.070 |  |" in told


def test_another_reference(splits, capsys):
    inspection_table.main([f"--runs={splits}", "--reference=fine_tuned"])
    assert "| mono | frozen | 2 | 0.920 | 0.940, 0.900 | -0.020 ±" in capsys.readouterr().out


def test_labels_help_with_damage_of_a_kind_that_was_labeled():
    generator = np.random.default_rng(0)

    def cells(count, *raised):
        features = generator.normal(size=(count, 10))
        features[:, raised] += 4.0
        return features

    known, fresh = cells(60), cells(40)
    # Each fifth of the broken cells is broken in its own way.
    broken = np.concatenate([cells(12, kind) for kind in range(5)])
    mixed = generator.permutation(broken)
    assert with_labels.auroc_with_labels(known, fresh, mixed) > 0.9
    assert with_labels.auroc_with_labels(known, fresh, broken) < 0.8
    assert 0.3 < with_labels.auroc_with_labels(known, fresh, cells(60)) < 0.7
