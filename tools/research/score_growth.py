"""Time and peak memory of `sddns score --runner=DirectRunner` as the number of images grows.

    python -m tools.research.score_growth --counts=10000,100000 --json=growth.json

Images are PNG files of 32 px in TFRecord files of 2,500. The network is tiny, so that the overhead
around it shows. Each run is a separate process, timed as a whole. The partner is a plain loop on
one core: a `tf.data` pipeline, the SavedModel's `serving_bytes`, rows to a CSV file.
"""

import argparse
import io
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parents[2]
DISTINCT = 5_000
IMAGES_PER_FILE = 2_500
PLAIN = """
import csv, glob, sys
import tensorflow as tf
model, pattern, output, batch_size = sys.argv[1:]
call = tf.saved_model.load(model).signatures["serving_bytes"]
names = ("ood_score", "p_value", "is_ood", "status")
with open(output, "w", newline="") as file:
    writer = csv.writer(file)
    for path in sorted(glob.glob(pattern)):
        number = 0
        for batch in tf.data.TFRecordDataset(path).batch(int(batch_size)):
            found = call(image_bytes=batch)
            columns = [found[name].numpy().tolist() for name in names]
            for row in zip(*columns):
                writer.writerow([f"{path}#{number}", *row])
                number += 1
"""


def files():
    """Return PNG files of smooth noise, which compress like photographs."""
    from PIL import Image

    generator, made = np.random.default_rng(0), []
    for _ in range(DISTINCT):
        small = Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8))
        file = io.BytesIO()
        small.resize((32, 32), Image.Resampling.BICUBIC).save(file, "png")
        made.append(file.getvalue())
    return made


def detector():
    """Return an untrained detector; training does not affect its speed."""
    import sddns_tf
    from sddns_tf.features import FeatureExtractor, extract_features

    extractor = FeatureExtractor(
        sddns_tf.ConvNet((8, 16), convolutions=2, activation="gelu"), 32, 32
    )
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (1_200, 32, 32, 3), dtype=np.uint8)
    features = extract_features(extractor, images, verbose=0)
    return sddns_tf.Detector.from_features(extractor, features[:1_000], features[1_000:])


def write_records(folder, count):
    """Write TFRecord files with `count` images in all, if they are not there."""
    import tensorflow as tf

    if folder.is_dir():
        return
    made = files()
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True, exist_ok=True)
    for start in range(0, count, IMAGES_PER_FILE):
        path = unfinished / f"{start // IMAGES_PER_FILE:05}.tfrecord"
        with tf.io.TFRecordWriter(str(path)) as writer:
            for number in range(start, min(start + IMAGES_PER_FILE, count)):
                writer.write(made[number % DISTINCT])
    unfinished.rename(folder)


def measured(command, cores):
    """Return seconds and peak memory of the largest process of a command, on `cores` cores."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_NUM_INTEROP_THREADS": "1",
    }
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=ROOT,
        preexec_fn=lambda: os.sched_setaffinity(0, range(cores)),
    )
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"Failed with status {status}: {command}")
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_memory_mb": usage.ru_maxrss // 1024,
    }


def command_of(kind, model, records, output, batch_size):
    """Return the command line of a kind of run."""
    if kind == "plain":
        return [sys.executable, "-c", PLAIN, model, f"{records}/*", f"{output}.csv", batch_size]
    workers = kind.partition(" ")[2]
    several = f"--direct_num_workers={workers} --direct_running_mode=multi_processing"
    return [
        sys.executable,
        "-m",
        "sddns_tf",
        "score",
        f"--model={model}",
        f"--images={records}/*",
        f"--output={output}",
        "--format=csv",
        f"--batch_size={batch_size}",
        "--runner=DirectRunner",
        "--threads=1",
        f"--runner_options={several if int(workers) > 1 else ''}",
    ]


def main(argv=None):
    """Measure all kinds of run for all counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", default="10000,100000", help="numbers of images")
    parser.add_argument("--kinds", default="plain,beam 1,beam 2", help="plain, beam PROCESSES")
    parser.add_argument("--batch_size", default="64", help="images per batch")
    parser.add_argument("--folder", type=pathlib.Path, default=pathlib.Path("score_growth"))
    parser.add_argument("--json", metavar="PATH", help="file to add the records to")
    options = parser.parse_args(argv)
    folder = options.folder.absolute()

    import sddns_tf
    from sddns_tf import files as storage

    if not (folder / "model").is_dir():
        sddns_tf.export.saved_model(detector(), folder / "model")
    records = []
    if options.json and pathlib.Path(options.json).is_file():
        records = json.loads(pathlib.Path(options.json).read_text())
    for count in map(int, options.counts.split(",")):
        source = folder / f"records-{count}"
        write_records(source, count)
        for kind in options.kinds.split(","):
            output = folder / f"scores-{count}-{kind.replace(' ', '-')}-{int(time.time())}"
            model = str(folder / "model" / "1")
            cores = int(kind.partition(" ")[2] or 1)
            load = os.getloadavg()[0]
            command = command_of(kind, model, source, output, options.batch_size)
            found = measured(command, cores)
            record = {
                "images": count,
                "kind": kind,
                "cores": cores,
                "batch_size": int(options.batch_size),
                **found,
                "images_per_second_and_core": round(count / found["seconds"] / cores, 1),
                "images_per_processor_second": round(count / found["processor_seconds"], 1),
                "load_before": round(load, 2),
            }
            print(json.dumps(record), flush=True)
            records.append(record)
            if options.json:
                storage.write_json(options.json, records)


if __name__ == "__main__":
    main()
