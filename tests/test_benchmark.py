"""The benchmark tool's door: names, records, and the arithmetic of ratios."""

import contextlib
import importlib.util
import json
import pathlib

import pytest
from absl import app, flags

TOOL = pathlib.Path(__file__).parents[1] / "tools" / "benchmark.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    # A module of flags may be loaded once a process; other tools share some of their names.
    own = flags.FlagValues()
    shared, flags.FLAGS = flags.FLAGS, own
    define = {name: getattr(flags, name) for name in dir(flags) if name.startswith("DEFINE_")}
    for name, function in define.items():
        setattr(flags, name, _defining_in(function, own))
    try:
        spec.loader.exec_module(module)
    finally:
        flags.FLAGS = shared
        for name, function in define.items():
            setattr(flags, name, function)
    own(["benchmark"])
    module.pin_threads = lambda: None  # TensorFlow takes it before its first operation only
    return module


@contextlib.contextmanager
def quick(benchmark):
    benchmark.FLAGS.quick = True
    yield
    benchmark.FLAGS.quick = False


def _defining_in(define, values):
    return lambda *args, **kwargs: define(*args, **kwargs, flag_values=values)


def test_a_record_compares_rates_and_gives_quartiles_of_rounds(benchmark):
    found = benchmark.record("x", "other", "images/s", 10, [1.0, 2.0, 2.0], [4.0, 4.0, 6.0])
    assert (found["ours"], found["theirs"], found["ratio"]) == (5.0, 2.5, 2.0)
    assert found["spread"] == [2.0, 4.0]
    assert {"name", "partner", "unit", "machine"} < set(found)
    assert found["machine"]["threads"] == 1


def test_both_sides_take_turns_after_a_round_that_does_not_count(benchmark):
    calls = []
    with quick(benchmark):
        ours, theirs = benchmark.take_turns(lambda: calls.append("o"), lambda: calls.append("t"))
    assert "".join(calls) == "ot" + "to" + "ot" + "to"
    assert len(ours) == len(theirs) == 3


def test_views_are_measured_and_written(benchmark, tmp_path, capsys):
    path = tmp_path / "records.json"
    with quick(benchmark):
        benchmark.FLAGS.benchmarks, benchmark.FLAGS.json = ["views"], str(path)
        benchmark.main(["benchmark"])
    (record,) = json.loads(path.read_text())
    assert record["name"] == "views"
    assert record["ratio"] == pytest.approx(record["ours"] / record["theirs"])
    assert "image pairs/s" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["records.json"]


def test_a_missing_partner_is_said_and_an_unknown_benchmark_is_an_error(benchmark, capsys):
    def without():
        raise benchmark.NoPartnerError("PyTorch is not installed: pip install torch")

    benchmark.FLAGS.json = None
    benchmark.FLAGS.benchmarks = ["features"]
    original, benchmark.BENCHMARKS["features"] = benchmark.BENCHMARKS["features"], without
    try:
        benchmark.main(["benchmark"])
    finally:
        benchmark.BENCHMARKS["features"] = original
    assert "features: left out. PyTorch is not installed" in capsys.readouterr().out
    benchmark.FLAGS.benchmarks = ["speed"]
    with pytest.raises(app.UsageError, match="Received: speed"):
        benchmark.main(["benchmark"])
