"""Score any number of image files in shards: a killed job resumes where it stopped.

The folder of a job holds `plan/` (the contents of each shard), `scores/` and `errors/` (one file
for each finished shard). The plan is made once. Running the job again scores the shards that have
no file yet. A shard that a lost worker had started is scored again and replaces any file of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import apache_beam as beam
from apache_beam.io.filesystems import FileSystems
from apache_beam.metrics import MetricsFilter
from apache_beam.ml.inference.base import KeyedModelHandler, RunInference
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.portability.api import beam_provision_api_pb2
from apache_beam.runners.portability.fn_api_runner import fn_runner
from apache_beam.runners.portability.portable_runner import JobServiceHandle
from apache_beam.runners.runner import create_runner

from sddns_tf.beam.reading import File, is_container, matching, read
from sddns_tf.beam.scoring import SavedModelHandler
from sddns_tf.beam.writing import FORMATS, Item, WriteShards, replacing
from sddns_tf.validation import check_choice, check_int

# Otherwise workers report every step on the terminal that started the job.
_QUIET = "--default_sdk_harness_log_level=ERROR"


class WorkerLostError(Exception):
    """A worker process of the direct runner ended before its work was done."""


class Totals(NamedTuple):
    """What a run did.

    Attributes:
        images: Images of this run.
        flagged: Images of this run that are out of distribution.
        failed: Images of this run without a score.
        shards: Shards of the job.
        done_before: Shards that earlier runs had done.
        with_errors: Shards, of all runs, that hold images without a score.
    """

    images: int
    flagged: int
    failed: int
    shards: int
    done_before: int
    with_errors: int


class ScoringJob:
    """Scores image files with a SavedModel, on any of Beam's runners.

    A shard is a group of image files, or one TFRecord or Parquet file. As soon as it is finished,
    its scores are written to `output/scores/part-00000.parquet` and so on, and its files without a
    score to `output/errors/`. Memory use does not depend on the number of images, except for the
    list of paths in the process that starts the job. After a failure, create the same job again and
    run it to score the missing shards.

    Args:
        model: Folder of a SavedModel from `export.saved_model`, on a file system that workers can
            read.
        images: Pattern such as `/path/*.png` or `gs://bucket/*.tfrecord`, or paths. See
            `reading.read` for the supported files. A pattern is expanded once, for the plan; paths
            must be the same each time.
        output: Folder of the job, on a file system that workers can write to.
        format: `"parquet"` or `"csv"`.
        batch_size: Files in a batch.
        images_per_shard: Files in a shard; a multiple of `batch_size` keeps batches within a shard.
        threads: CPU cores of each worker process, or None for all.
        runner: Name of a Beam runner.
        options: Beam's options, such as `["--direct_num_workers=4"]`.

    Raises:
        ValueError: If there are no files, the runner is unknown, or the folder holds another job.

    Example:
    >>> job = ScoringJob("exports/parts/1", "/photos/**", "scores")
    >>> job.run()
    Totals(images=100000, flagged=5123, failed=2, shards=25, done_before=0, with_errors=1)
    """

    def __init__(
        self,
        model: str | os.PathLike,
        images: str | Iterable[str],
        output: str | os.PathLike,
        *,
        format: str = "parquet",
        batch_size: int = 32,
        images_per_shard: int = 4096,
        threads: int | None = None,
        runner: str = "DirectRunner",
        options: Sequence[str] = (),
    ) -> None:
        check_choice("format", format, FORMATS)
        check_int("batch_size", batch_size)
        check_int("images_per_shard", images_per_shard)
        self._output, self._format = os.fspath(output), format
        model = os.fspath(model)
        self._handler = SavedModelHandler(
            model, min_batch_size=batch_size, max_batch_size=batch_size, threads=threads
        )
        self._options = PipelineOptions([_QUIET, *options])
        is_direct = runner.lower() in ("direct", "directrunner")
        self._runner = _direct_runner(self._options) if is_direct else create_runner(runner)
        images = images if isinstance(images, str) else list(images)
        named = images if isinstance(images, str) else _digest(images)
        job = {"model": _fingerprint(model), "format": format, "images": named}
        self._shards = _planned(self._output, job, images, images_per_shard)

    def run(self) -> Totals:
        """Score the missing shards, and wait for them.

        Returns:
            `Totals`.

        Raises:
            WorkerLostError: If a process of the direct runner was killed. Finished shards are kept;
                create the same job again and run it.
        """
        scores, errors = (FileSystems.join(self._output, name) for name in ("scores", "errors"))
        done = _names_in(scores)
        missing = [shard for shard in self._shards if shard not in done]
        counts = dict.fromkeys(("images", "flagged", "failed"), 0)
        if missing:
            pipeline = beam.Pipeline(self._runner, self._options)
            _ = (
                pipeline
                | "Shards" >> beam.Create(missing)
                | "Spread" >> beam.Reshuffle()
                | "Read" >> beam.FlatMap(_read_shard, self._output)
                | "Score" >> RunInference(KeyedModelHandler(self._handler))
                | "Write" >> beam.ParDo(WriteShards(scores, errors, self._format))
            )
            with _ending_with_a_lost_worker():
                result = pipeline.run()
                result.wait_until_finish()
            counts |= _counted(result)
        before = len(self._shards) - len(missing)
        return Totals(
            **counts,
            shards=len(self._shards),
            done_before=before,
            with_errors=len(_names_in(errors)),
        )


def _direct_runner(options: PipelineOptions) -> Any:
    """Return the runner that Beam's `DirectRunner` uses without Prism.

    Prism is a program that `DirectRunner` downloads if it can, and that does not support
    `--direct_num_workers`.
    """
    encoded = JobServiceHandle.encode_pipeline_options(options.get_all_options())
    information = beam_provision_api_pb2.ProvisionInfo(pipeline_options=encoded)
    return fn_runner.FnApiRunner(provision_info=fn_runner.ExtendedProvisionInfo(information))


@contextlib.contextmanager
def _ending_with_a_lost_worker() -> Iterator[None]:
    """End the run if a worker is killed; Beam's direct runner would wait for it forever.

    Beam notices this in a thread that it calls `run_worker`, but does not report it.
    """
    lost: list[Any] = []
    main = threading.get_ident()
    if main != threading.main_thread().ident:  # Only the main thread can be interrupted.
        yield
        return
    hook, interrupted = threading.excepthook, signal.getsignal(signal.SIGINT)

    def told(args: Any) -> None:
        if args.thread is None or args.thread.name != "run_worker":
            if not lost:  # Afterwards all of Beam's threads raise errors.
                hook(args)
            return
        lost.append(args.exc_value)
        logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
        if len(lost) == 1:
            signal.pthread_kill(main, signal.SIGINT)

    def woken(number: int, frame: Any) -> None:
        if lost:
            raise WorkerLostError(f"{lost[0]}. Finished shards are kept: run the same job again")
        if callable(interrupted):
            interrupted(number, frame)

    threading.excepthook = told
    signal.signal(signal.SIGINT, woken)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, interrupted)
        threading.excepthook = hook


def _planned(
    output: str, job: dict[str, str], images: str | list[str], images_per_shard: int
) -> list[str]:
    """Return the names of the shards, from the plan of an earlier run or from a new one."""
    folder = FileSystems.join(output, "plan")
    path = FileSystems.join(folder, "plan.json")
    if FileSystems.exists(path):
        with FileSystems.open(path) as file:
            plan = json.load(file)
        count = plan.pop("shards")
        if plan != job:
            raise ValueError(
                "`output` must be a new folder, or one in which this job was started before. "
                f"Received: {output}, where another job was started, {plan}, instead of {job}"
            )
        return [_name(number) for number in range(count)]
    paths, count = matching(images) if isinstance(images, str) else images, 0
    for count, some in enumerate(_cut(paths, images_per_shard), 1):
        _write_json(FileSystems.join(folder, f"{_name(count - 1)}.json"), some)
    if not count:
        raise ValueError("`images` must be at least one path. Received: none")
    # Written last, because it marks the plan as complete.
    _write_json(path, {**job, "shards": count})
    return [_name(number) for number in range(count)]


def _cut(paths: Iterable[str], images_per_shard: int) -> Iterator[list[str]]:
    """Cut paths into shards of `images_per_shard` images or one container."""
    for alone, some in itertools.groupby(paths, is_container):
        while shard := list(itertools.islice(some, 1 if alone else images_per_shard)):
            yield shard


def _read_shard(shard: str, output: str) -> Iterator[tuple[Item, File]]:
    """Yield the files of a shard, the last one marked."""
    with FileSystems.open(FileSystems.join(output, "plan", f"{shard}.json")) as file:
        paths = json.load(file)
    found = read(paths)
    file, place = next(found), 0  # There is at least one, or an error in its place.
    for place, following in enumerate(found, 1):
        yield Item(shard, place - 1, False, file[0]), file[1]
        file = following
    yield Item(shard, place, True, file[0]), file[1]


def _name(number: int) -> str:
    return f"part-{number:05}"


def _names_in(folder: str) -> set[str]:
    """Return the names of the shards that have a file in a folder; none if there is no folder."""
    (match,) = FileSystems.match([FileSystems.join(folder, "part-*")])
    names = (FileSystems.split(found.path)[1] for found in match.metadata_list)
    return {name.partition(".")[0] for name in names}


def _write_json(path: str, value: Any) -> None:
    with replacing(path) as file:
        file.write(json.dumps(value).encode())


def _fingerprint(model: str) -> str:
    """Return what identifies a SavedModel: TensorFlow writes a hash of its contents."""
    with FileSystems.open(FileSystems.join(model, "fingerprint.pb")) as file:
        return hashlib.sha256(file.read()).hexdigest()


def _digest(paths: list[str]) -> str:
    text = "\n".join(paths).encode("utf-8", "surrogateescape")
    return f"{len(paths)} paths of SHA-256 {hashlib.sha256(text).hexdigest()}"


def _counted(result: Any) -> dict[str, int]:
    """Return the counters of a finished run."""
    found = result.metrics().query(MetricsFilter().with_namespace("sddns_tf"))["counters"]
    names = ("images", "flagged", "failed")
    return {m.key.metric.name: m.result for m in found if m.key.metric.name in names}
