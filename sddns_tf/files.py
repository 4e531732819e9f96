"""Files written whole or not at all: under another name first, then renamed."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import uuid
from collections.abc import Iterator
from typing import Any

# In bytes, on Linux and macOS.
_LONGEST_NAME = 255


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path beside `path`, renamed to it at the end of the block.

    A process killed at any moment leaves the old file or the new one. After an error the old file
    is unchanged and nothing is left behind.

    Args:
        path: Path of the file to write; its folder is created if needed.

    Yields:
        `pathlib.Path` to write to, in the same folder, with the same suffixes.

    Example:
        >>> with replacing("detector.keras") as unfinished:
        ...     detector.save(unfinished)
    """
    path = pathlib.Path(path).expanduser()
    if path.is_symlink():  # What it points to is replaced.
        path = path.resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{uuid.uuid4().hex[:12]}.{path.name}")
    if len(os.fsencode(unfinished.name)) > _LONGEST_NAME:
        unfinished = path.with_name(unfinished.name[:14] + path.suffix)
    try:
        yield unfinished
        _sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def lock(descriptor: int) -> bool:
    """Keep an open file or folder to this process, until it is closed.

    The lock leaves nothing behind and ends with the process, however it ends. Windows and some
    network file systems have none; there it is always this process's.

    Args:
        descriptor: Number of an open file: its `fileno()`.

    Returns:
        Whether no other process has it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write a text file, whole or not at all.

    Args:
        path: Path of the file.
        text: String; written as UTF-8.
    """
    with replacing(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write a value as JSON, whole or not at all.

    Args:
        path: Path of the file.
        value: What `json.dumps` takes.
    """
    write_text(path, json.dumps(value, indent=2) + "\n")


def save_keras(save: Any, filepath: str | os.PathLike, *args, **kwargs) -> None:
    """Save a Keras model whole or not at all.

    Args:
        save: Keras' own `save` of the model.
        filepath: Path of a `.keras` file. Anything else, such as an open file, is left to Keras, as
            is a save that must not overwrite.
        *args: As for Keras.
        **kwargs: As for Keras.
    """
    overwrite = args[0] if args else kwargs.get("overwrite", True)
    is_path = isinstance(filepath, (str, os.PathLike)) and str(filepath).endswith(".keras")
    if not is_path or not overwrite:
        save(filepath, *args, **kwargs)
        return
    with replacing(filepath) as unfinished:
        save(unfinished, *args, **kwargs)


def sha256(path: str | os.PathLike) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path):
    """Flush a file to disk, so that it survives a power failure."""
    with open(path, "r+b") as file:  # Windows flushes only what may be written.
        os.fsync(file.fileno())
