r"""Solar cells: our detector of `examples/solar_cells.py` beside PatchCore with the same backbone.

    python examples/solar_cells.py --types=mono --networks=frozen --output_dir=solar_output
    python -m tools.benchmark.inspection --type=mono --output_dir=solar_output

One split, the same photographs on both sides. PatchCore compares places of strides 8 and 16 at the
grid of stride 8, as its paper does. Our `frozen` network compares those of stride 16; both keep as
many rows, of as many places drawn at random. `--network=aligned` takes the detector that compares
each place of stride 8 with the same place of other cells. PatchCore's latency, memory and file are
those of OpenVINO and ours those of TFLite: one photograph with its map, one thread each, in turns.
Memory is what a process has more after it has loaded the file and scored, apart from Python and the
runtime. Needs `pip install -e ".[inspection]" efficientnet-lite-pytorch openvino ai-edge-litert`.
"""

import argparse
import importlib
import json
import pathlib
import resource
import subprocess
import sys
import time

import numpy as np

from sddns_tf import files, metrics
from tools.benchmark import harness
from tools.benchmark.partners import patchcore

ROOT = pathlib.Path(__file__).resolve().parents[2]
ROWS = 10_000


def cells_parser(description):
    """Return a parser with the options that say which cells the example was run on."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = found.add_argument
    add("--output_dir", required=True, help="folder that the example wrote to")
    add("--type", default="mono", choices=("mono", "poly"), help="of the cells")
    add("--split_seed", type=int, default=0, help="that the example was given")
    add("--limit", type=int, help="that the example was given")
    return found


def parser():
    """Return the arguments."""
    found = cells_parser(__doc__)
    add = found.add_argument
    add("--network", default="frozen", help="whose detector the example wrote: frozen or aligned")
    add("--rows", type=int, default=ROWS, help="rows of PatchCore's bank")
    add("--rounds", type=int, default=30, help="calls on each side")
    return found


def cells_of(options):
    """Return the photographs as the example splits them."""
    from examples import solar_cells

    given = {name: getattr(options, name) for name in ("output_dir", "split_seed", "limit")}
    path = pathlib.Path(options.output_dir) / "settings.json"
    if path.exists():
        known = json.loads(path.read_text())
        given["train_images"] = known["train_images"]
        for name in ("split_seed", "limit"):
            if given[name] != known[name]:
                raise ValueError(
                    f"--{name} must be what the example was given, {known[name]}: otherwise images "
                    f"of the bank would be tested. Received: {given[name]}"
                )
    solar_cells.FLAGS(["", *(f"--{k}={v}" for k, v in given.items() if v is not None)])
    return solar_cells.read_cells(options.type)


def tflite_call(path):
    """Return the detector's call on one photograph, in TFLite with one thread."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    run = interpreter.get_signature_runner("serving_default")
    shape = run.get_input_details()["images"]["shape"]
    image = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return lambda: run(images=image)


def call_of(path):
    """Return the call of a file, ours or PatchCore's, on one photograph."""
    return tflite_call(path) if path.suffix == ".tflite" else patchcore.openvino_call(path, 1)


def print_memory(path):
    """Print how much more memory in MB the process has after loading a file and scoring."""
    for runtime in ("ai_edge_litert.interpreter", "openvino"):
        importlib.import_module(runtime)
    before = resident()
    call = call_of(pathlib.Path(path))
    for _ in range(3):
        call()
    print((resident() - before) / 1e6)


def resident():
    """Return the bytes of memory that this process has now (Linux)."""
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def memory(path):
    """Return what `print_memory` prints in a process of its own."""
    code = (
        f"from tools.benchmark import inspection as one; one.print_memory({str(path.resolve())!r})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True
    )
    return float(result.stdout.splitlines()[-1])


def main(argv=None):
    """Print both sides as JSON, and write that to `patchcore_TYPE.json` in the same folder."""
    options = parser().parse_args(argv)
    cells = cells_of(options)
    output = pathlib.Path(options.output_dir)
    results = json.loads((output / "results.json").read_text())[options.network][options.type]
    start = time.process_time()
    theirs = patchcore.patchcore(
        cells.train, options.rows, 10 * options.rows, options.split_seed, threads=2
    )
    seconds = time.process_time() - start
    fresh, broken = (patchcore.scores(theirs, x) for x in (cells.fresh, cells.broken))
    paths = [
        output / f"{options.type}_{options.network}" / "detector.tflite",
        output / f"patchcore_{options.type}.xml",
    ]
    patchcore.write_openvino(theirs, paths[1])
    sizes = [paths[0].stat().st_size, paths[1].with_suffix(".bin").stat().st_size]
    record = harness.durations(
        "one photograph with its map",
        "PatchCore in OpenVINO",
        harness.take_turns(*map(call_of, paths), options.rounds),
    )
    record |= {
        "auroc": [results["auroc"], float(metrics.ood_metrics(fresh, broken)["auroc"])],
        "building_cpu_seconds": [results["cpu_seconds"], round(seconds)],
        "megabytes": [size / 1e6 for size in sizes],
        "memory_megabytes": [round(memory(path)) for path in paths],
    }
    files.write_json(output / f"patchcore_{options.type}.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
