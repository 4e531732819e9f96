"""The benchmark tool's door: names, records, and the arithmetic of ratios."""

import json

import export_checks
import pytest

from tools.benchmark import growth, harness, models, places, score
from tools.benchmark.partners import pytorch


@pytest.fixture(autouse=True)
def threads_as_they_are(monkeypatch):
    """TensorFlow takes their number before its first operation only."""
    monkeypatch.setattr(harness, "pin_threads", lambda threads: None)


def test_a_record_compares_rates_and_gives_quartiles_of_rounds():
    found = harness.rates("x", "other", ([1.0, 2.0, 2.0], [4.0, 4.0, 6.0]), 10)
    assert (found["ours"], found["theirs"], found["ratio"]) == (5.0, 2.5, 2.0)
    assert found["spread"] == [2.0, 4.0]
    assert harness.rates("x", "other", ([1.0] * 3, [1.0] * 3), 10, 5)["ratio"] == 2.0


def test_a_record_of_seconds_is_better_where_they_are_fewer():
    found = harness.durations("x", "other", ([1.0, 2.0, 2.0], [4.0, 4.0, 6.0]))
    assert (found["ours"], found["theirs"], found["ratio"]) == (2.0, 4.0, 2.0)


def test_both_sides_take_turns_after_a_round_that_does_not_count():
    calls = []
    times = harness.take_turns(lambda: calls.append("o"), lambda: calls.append("t"), rounds=3)
    assert "".join(calls) == "ot" + "to" + "ot" + "to"
    assert [len(side) for side in times] == [3, 3]


def test_the_fastest_is_found_and_what_fails_is_left_out(capsys):
    def fails():
        raise RuntimeError("no such mode")

    slow = [0] * 1_000_000
    name, function = harness.fastest(
        {"fails": fails, "quick": lambda: "quick", "slow": lambda: sorted(slow)}
    )
    assert (name, function()) == ("quick", "quick")
    assert "fails: left out. RuntimeError: no such mode" in capsys.readouterr().out


def test_the_score_is_measured_and_written(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "scoring_shape", lambda settings: (16, 8, 16, 1, 1))
    path = tmp_path / "records.json"
    harness.main(["--quick", "--benchmarks=score", f"--json={path}"])
    (record,) = json.loads(path.read_text())
    assert (record["name"], record["partner"]) == ("score", "features alone")
    assert record["ratio"] == pytest.approx(record["ours"] / record["theirs"])
    assert record["machine"]["threads"] == 1
    assert "images/s" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["records.json"]


def test_a_missing_partner_is_said_and_leaves_what_was_measured(monkeypatch, tmp_path, capsys):
    def without(settings):
        yield harness.durations("startup", "import tensorflow", ([1.0] * 3, [1.0] * 3))
        raise harness.NoPartnerError("PyTorch is not installed: pip install torch")

    monkeypatch.setattr(score, "run", without)
    harness.main(["--benchmarks=score", f"--json={tmp_path / 'records.json'}"])
    assert "score: left out. PyTorch is not installed" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "records.json").read_text())) == 1


@pytest.mark.parametrize(
    ("argument", "received"),
    [("--benchmarks=speed", "Received: speed"), ("--rounds=2", "--rounds=2")],
)
def test_a_wrong_argument_is_told(argument, received, capsys):
    with pytest.raises(SystemExit):
        harness.main([argument])
    assert received in capsys.readouterr().err


def no_larger(shape):
    """A function that gives the shape of a network, with nothing in it larger than here."""
    return lambda settings: tuple(map(min, shape(settings), (16, 8, 16, 1, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", harness.BENCHMARKS)
def test_each_benchmark_is_measured(name, tmp_path, monkeypatch, capsys):
    def one_turn(ours, theirs, rounds, warm_up=True, measure=harness.seconds):
        del rounds, warm_up
        return [[measure(side)] * 2 for side in (ours, theirs)]

    monkeypatch.setattr(harness, "take_turns", one_turn)
    # Compilations take minutes; how the fastest mode is found has a test of its own.
    monkeypatch.setattr(harness, "fastest", lambda candidates: next(iter(candidates.items())))
    monkeypatch.setattr(pytorch, "MODES", {})
    for function in (models.training_shape, models.scoring_shape):
        monkeypatch.setattr(models, function.__name__, no_larger(function))
    monkeypatch.setattr("tools.benchmark.input.BATCH", 8)
    # `places` starts a process, which is enough to show that this works.
    monkeypatch.setattr(growth, "measured_apart", growth.measure)
    apart = {16: places.measured_apart, 32: places.measure}
    monkeypatch.setattr(places, "measured_apart", lambda count, *rest: apart[count](count, *rest))
    path = tmp_path / "records.json"
    with export_checks.in_this_process():
        harness.main(["--quick", f"--benchmarks={name}", f"--json={path}"])
    records = json.loads(path.read_text())
    if not records and "left out" in capsys.readouterr().out:
        pytest.skip("a partner is missing")
    assert records
    assert all(record["ours"] > 0 for record in records)
