"""The command line: run benchmarks by name and write their records to a JSON file."""

import argparse
import dataclasses
import importlib
import os
import pathlib
import platform
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before TensorFlow is imported

# Each is a module of this package with a function `run(settings)` that yields records.
ROOT = pathlib.Path(__file__).resolve().parents[2]
BENCHMARKS = (
    "views", "train_step", "features", "score", "places", "growth", "startup", "input",
    "saved_model", "tflite", "precision", "onednn",
)  # fmt: skip


class NoPartnerError(Exception):
    """The library to compare with is not installed."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """How to run the benchmarks.

    Attributes:
        quick: Whether to use small networks, so that a benchmark takes less than a minute.
        threads: Number of threads on both sides.
        rounds: Number of rounds; in each one both sides run once.
    """

    quick: bool = False
    threads: int = 1
    rounds: int = 7


def seconds(function):
    """Return the duration of a call in seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def take_turns(ours, theirs, rounds, warm_up=True, measure=seconds):
    """Return the seconds of both sides in each round, after one round to warm up.

    Args:
        ours: What is measured: a function without arguments.
        theirs: The same for the alternative.
        rounds: Number of rounds; in each one both sides run once.
        warm_up: Whether a round that does not count goes before.
        measure: Function from a side to its seconds.

    Returns:
        Pair of tuples, our seconds and theirs.
    """
    if warm_up:
        measure(ours), measure(theirs)
    pairs = []
    for index in range(rounds):
        order = (ours, theirs) if index % 2 else (theirs, ours)
        times = {side: measure(side) for side in order}
        pairs.append((times[ours], times[theirs]))
    return tuple(zip(*pairs, strict=True))


def rates(name, partner, times, amount, their_amount=None, unit="images/s"):
    """Return a record of rates; higher is better.

    Args:
        name: Name of the measurement.
        partner: Name of the alternative.
        times: Seconds of our rounds and of theirs, from `take_turns`.
        amount: Number of items, such as images, that our side processes in a round.
        their_amount: The same for the other side; defaults to `amount`.
        unit: Unit of the rates.

    Returns:
        Dict for the JSON file.
    """
    ours = [amount / each for each in times[0]]
    theirs = [(their_amount or amount) / each for each in times[1]]
    low, _, high = statistics.quantiles([a / b for a, b in zip(ours, theirs, strict=True)], n=4)
    own, other = statistics.median(ours), statistics.median(theirs)
    return {
        "name": name,
        "partner": partner,
        "unit": unit,
        "ours": own,
        "theirs": other,
        "ratio": own / other,
        "spread": [low, high],
    }


def durations(name, partner, times):
    """Return a record of seconds; lower is better. The arguments are those of `rates`."""
    found = rates(name, partner, times, 1, unit="s")
    return {**found, "ours": 1 / found["ours"], "theirs": 1 / found["theirs"]}


def fastest(candidates):
    """Return the name and function of the fastest candidate: best of two calls after a warm-up."""
    times = {}
    for name, function in candidates.items():
        try:
            times[name] = min([seconds(function) for _ in range(3)][1:])
        except Exception as error:  # A library or processor may lack a mode.
            print(f"{name}: left out. {type(error).__name__}: {str(error)[:100]}", flush=True)
    name = min(times, key=times.get)
    return name, candidates[name]


def machine(threads):
    """Return the processor, the threads used and the versions."""
    import keras
    import tensorflow as tf

    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            models = [line.partition(":")[2].strip() for line in lines if "model name" in line]
        processor = models[0] if models else processor
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": threads,
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "tensorflow": tf.__version__,
        "keras": keras.__version__,
    }


def pin_threads(threads):
    """Set the number of TensorFlow's threads; call it before the first operation."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)


def records_of(name, settings):
    """Yield the records of a benchmark, until the library of an alternative is missing."""
    try:
        for record in importlib.import_module(f"tools.benchmark.{name}").run(settings):
            print(
                "{name}: {ours:.4g} {unit}, {partner}: {theirs:.4g}, ratio {ratio:.2f} "
                "({spread[0]:.2f} to {spread[1]:.2f})".format(**record),
                flush=True,
            )
            yield {**record, "machine": machine(settings.threads)}
    except NoPartnerError as error:
        print(f"{name}: left out. {error}", flush=True)


def parse(argv):
    """Return the names of benchmarks, the file to write, and the `Settings` of a command line."""
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__)
    parser.add_argument(
        "--benchmarks",
        default="all",
        help=f"all, or some separated by commas: {', '.join(BENCHMARKS)}",
    )
    parser.add_argument("--json", metavar="PATH", help="file to write the records to")
    parser.add_argument("--quick", action="store_true", help="small networks, three rounds")
    parser.add_argument("--threads", type=int, default=1, help="threads of each side")
    parser.add_argument(
        "--rounds", type=int, default=7, help="rounds; in each one both sides run once"
    )
    options = parser.parse_args(argv)
    names = BENCHMARKS if options.benchmarks == "all" else options.benchmarks.split(",")
    for name in names:
        if name not in BENCHMARKS:
            parser.error(f"--benchmarks takes all or {', '.join(BENCHMARKS)}. Received: {name}")
    if options.rounds < 3 or options.threads < 1:
        parser.error(
            "--rounds must be at least 3 and --threads at least 1. "
            f"Received: --rounds={options.rounds} --threads={options.threads}"
        )
    rounds = 3 if options.quick else options.rounds
    return names, options.json, Settings(options.quick, options.threads, rounds)


def main(argv=None):
    """Run the named benchmarks, print one line per record and write all records."""
    names, path, settings = parse(argv)
    pin_threads(settings.threads)
    from sddns_tf import files

    records = []
    for name in names:
        for record in records_of(name, settings):
            records.append(record)
            if path:  # Each at once: a later one may fail.
                files.write_json(path, records)
    if path:
        files.write_json(path, records)
