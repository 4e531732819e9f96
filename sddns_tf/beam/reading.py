"""Image files from any file system as keys and bytes: single files, TFRecord or Parquet of bytes.

A file that cannot be read becomes an `Unreadable` instead of bytes. It passes through the pipeline
like any other and ends up among the dead letters, and the other files are still read.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import apache_beam as beam
from apache_beam.io.filesystem import CompressionTypes
from apache_beam.io.filesystems import FileSystems

# Files of a folder or entries of a container that are held in memory at once.
_AT_ONCE = 64
_THREADS = 8  # An object store takes a while to answer, however small the file.


class Unreadable(str):
    """The reason why a file could not be read."""


File = bytes | Unreadable


def matching(pattern: str) -> list[str]:
    """List the files that a pattern names, on any file system that Beam knows.

    Args:
        pattern: Such as `/path/*.png`, `/path/**` or `gs://bucket/part-*.tfrecord`.

    Returns:
        Sorted list of paths.

    Raises:
        ValueError: If there are none.
    """
    (match,) = FileSystems.match([str(pattern)])
    paths = sorted(found.path for found in match.metadata_list)
    if not paths:
        raise ValueError(f"`images` must match at least one file. Received: {pattern}")
    return paths


def is_container(path: str) -> bool:
    """Return whether a file, judging by its name, holds many image files: TFRecord or Parquet."""
    name = path.rpartition("/")[2].lower()
    return ".tfrecord" in name or name.endswith(".parquet")


def read(paths: Iterable[str]) -> Iterator[tuple[str, File]]:
    """Yield the files at these paths in order, including those inside containers.

    - An image file has its path as its key.
    - A `.tfrecord` file (also `.tfrecord.gz`, `.tfrecord-00000-of-00010`) holds one image file in
      each record; keys are `PATH#0`, `PATH#1` and so on.
    - A `.parquet` file has one column of bytes, an image file in each row; keys come from the
      column `path` if there is one, otherwise they are as for TFRecord.

    Args:
        paths: Paths on any file system that Beam knows.

    Yields:
        Key, and bytes or `Unreadable`.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        for together, some in itertools.groupby(paths, is_container):
            if together:
                for path in some:
                    yield from _entries(path)
                continue
            while chunk := list(itertools.islice(some, _AT_ONCE)):
                yield from zip(chunk, pool.map(_contents, chunk), strict=True)


class ReadFiles(beam.PTransform):
    """Maps patterns to keys and bytes: see `read` for the supported files.

    Example:
        >>> with beam.Pipeline() as pipeline:
        ...     files = pipeline | beam.Create(["gs://bucket/*.tfrecord"]) | ReadFiles()
    """

    def expand(self, patterns: Any) -> Any:
        """Map patterns, strings, to pairs of a key and bytes or `Unreadable`."""
        return (
            patterns
            | "Match" >> beam.FlatMap(matching)
            | "Spread" >> beam.Reshuffle()
            | "Read" >> beam.FlatMap(lambda path: read([path]))
        )


def _contents(path: str) -> File:
    try:
        with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
            return file.read()
    except Exception as error:  # Each file system has errors of its own.
        return _reason(error)


def _entries(path: str) -> Iterator[tuple[str, File]]:
    """Yield the files inside a container; if it is damaged, those before the damage."""
    entries = _rows if path.lower().endswith(".parquet") else _records
    count = 0
    try:
        for key, file in entries(path):
            count += 1
            yield key, file
        if not count:
            yield path, Unreadable("holds no entries")
    except Exception as error:  # TensorFlow's, PyArrow's, or those of a file system.
        yield f"{path}#{count}", Unreadable(f"from this entry on: {_reason(error)}")


def _records(path: str) -> Iterator[tuple[str, bytes]]:
    import tensorflow as tf

    records = tf.data.TFRecordDataset(path, "GZIP" if path.endswith(".gz") else "")
    done = 0
    try:
        for batch in records.batch(_AT_ONCE).as_numpy_iterator():
            for number, record in enumerate(batch, done):
                yield f"{path}#{number}", record
            done += len(batch)
    except tf.errors.OpError:
        # Read the damaged batch again, record by record; the damage raises again.
        for number, record in enumerate(records.skip(done).as_numpy_iterator(), done):
            yield f"{path}#{number}", record


def _rows(path: str) -> Iterator[tuple[str, File]]:
    import pyarrow
    import pyarrow.parquet

    with FileSystems.open(path, compression_type=CompressionTypes.UNCOMPRESSED) as file:
        table = pyarrow.parquet.ParquetFile(file)
        types = dict(zip(table.schema_arrow.names, table.schema_arrow.types, strict=True))
        kinds = (pyarrow.types.is_binary, pyarrow.types.is_large_binary)
        binary = [name for name, type in types.items() if any(is_kind(type) for is_kind in kinds)]
        if len(binary) != 1:
            raise ValueError(f"must have one column of bytes. Received: columns {sorted(types)}")
        columns = binary + (["path"] if "path" in types else [])
        numbers = itertools.count()
        for batch in table.iter_batches(_AT_ONCE, columns=columns):
            files = batch.column(binary[0]).to_pylist()
            keys = [f"{path}#{next(numbers)}" for _ in files]
            if "path" in types:
                named = batch.column("path").to_pylist()
                keys = [name or key for name, key in zip(named, keys, strict=True)]
            for key, contents in zip(keys, files, strict=True):
                yield key, Unreadable("is null") if contents is None else contents


def _reason(error: Exception) -> Unreadable:
    return Unreadable(f"{type(error).__name__}: {error}".replace("\n", " "))
