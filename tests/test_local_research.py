"""The networks and experiments behind the figures of docs/local.md."""

import json

import pytest
from test_local import bricks

from tools.benchmark import harness
from tools.research import local_table


def cells(kind, side):
    """Bricks for cells, the defective ones with a red corner."""
    del kind
    defective = bricks(6, 3, side)
    defective[:, : side // 4, : side // 4] = [250, 0, 0]
    return local_table.Cells(
        bricks(40, 0, side), bricks(20, 1, side), bricks(8, 2, side), defective
    )


@pytest.mark.slow
def test_runs_are_measured_once_and_told(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "pin_threads", lambda threads: None)
    monkeypatch.setattr(local_table, "read_cells", cells)
    for name, value in (("ROWS", (50,)), ("KEPT", (200,)), ("DEFAULT", (50, 200))):
        monkeypatch.setattr(local_table, name, value)
    arguments = [f"--runs_dir={tmp_path}", "--train_steps=10"]
    for only in (
        "bank,mono",
        "components-mono-64",
        "aligned-mono-block_4-",
        "standardized,mono",
        "tokens,mono,blocks_1",
        "mono,cut_paste",
    ):
        local_table.main([*arguments, f"--only={only}"])
    found = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert set(found) == {
        "bank-mono-50of200-0",
        "components-mono-64-0",
        "aligned-mono-block_4-0",
        "standardized-mono-raw-0",
        "tokens-mono-blocks_1-0",
        "negatives-mono-in_distribution-cut_paste-0",
    }
    channels = {one["experiment"]: one["channels"] for one in found.values()}
    assert channels["components"] == 64 < channels["bank"]
    aligned = found["aligned-mono-block_4-0"]
    assert aligned["map_size"] == [28, 28] and aligned["channels"] == 40
    assert aligned["auroc"] > 0.9 and "milliseconds" not in aligned
    for one in (one for one in found.values() if one is not aligned):
        # Maps of random weights are so small that all scores are one, unless standardized.
        assert one["auroc"] > 0.9 or one["setting"] == "raw"
        assert one["milliseconds"] > 0
        assert one["megabytes"] == 50 * one["channels"] * 4 / 1e6
        assert ("whole_image_auroc" in one) == (one["experiment"] in ("tokens", "negatives"))
    capsys.readouterr()
    path = tmp_path / "bank-mono-50of200-0.json"
    path.write_text(json.dumps({**found["bank-mono-50of200-0"], "auroc": 0.123}))
    local_table.main([*arguments, "--only=bank,mono"])  # read, not measured again
    told = capsys.readouterr().out
    assert "| mono | 50of200 | 0 | 0.123 |" in told
