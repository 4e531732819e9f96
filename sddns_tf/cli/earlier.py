"""What another run does or has left in a folder: whether this one may go on, and from where."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

from sddns_tf import files
from sddns_tf.cli import configuration, images
from sddns_tf.cli.errors import UsageError


@contextlib.contextmanager
def alone(output_dir: str | pathlib.Path) -> Iterator[None]:
    """Keep a folder to this process, so that no two runs write to it at once.

    Args:
        output_dir: An existing folder.

    Raises:
        UsageError: If another process has the folder.
    """
    if os.name == "nt":  # Folders cannot be opened there.
        yield
        return
    folder = os.open(output_dir, os.O_RDONLY)
    try:
        if not files.lock(folder):
            raise UsageError(
                "--output_dir must be a folder that no other run is writing to. Wait for that one "
                f"to end, stop it, or choose another folder. Received: {output_dir}"
            )
        yield
    finally:
        os.close(folder)


def check_same_run(config: dict[str, Any], output_dir: str | pathlib.Path) -> None:
    """Check that a folder holds no run with another configuration.

    Only the detector's may differ: it is made after training, whatever was there before.

    Args:
        config: Resolved configuration.
        output_dir: Folder of the run.

    Raises:
        UsageError: If it does.
    """
    before = _earlier(output_dir)
    if before is None:
        return
    before.pop("derived", None)
    try:
        before = configuration.resolve(before, [])  # An earlier version may have had fewer keys.
    except UsageError as error:
        raise UsageError(
            "--output_dir must be a folder of its own, and not one with another program's "
            f"config.json. Received: {output_dir} ({error})"
        ) from error
    for key, old, new in configuration.differences(before, json.loads(json.dumps(config))):
        if key.startswith("detector."):
            continue
        raise UsageError(
            f"--output_dir={output_dir} holds a run with {key}={json.dumps(old)}; choose another "
            f"folder, or start over with --noresume. Received: {key}={json.dumps(new)}"
        )


def _earlier(output_dir: str | pathlib.Path) -> dict[str, Any] | None:
    """Return the configuration of the run in a folder, or None if there is none."""
    path = pathlib.Path(output_dir) / "config.json"
    if not path.exists():
        return None
    with contextlib.suppress(ValueError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    raise UsageError(
        "--output_dir must be a folder of its own, and not one with another program's "
        f"config.json. Received: {output_dir}"
    )


def check_same_images(found: images.Images, output_dir: pathlib.Path) -> None:
    """Check that a folder holds no run that trained on other images.

    With other images others are held out, and the network may have been trained on these: a
    detector calibrated with them would flag too many. Images that are streamed are not compared;
    they are calibrated with others.

    Args:
        found: Images of this run.
        output_dir: Folder of the run.

    Raises:
        UsageError: If it does.
    """
    before = (_earlier(output_dir) or {}).get("derived", {})
    fingerprint = images.fingerprint(found.training)
    if before.get("training_fingerprint", fingerprint) != fingerprint:
        raise UsageError(
            f"--output_dir={output_dir} holds a run that trained on {before['training_images']} "
            "other images: --data has changed since, or how many of it are held out to calibrate "
            "with. Choose another folder, or start over with --noresume. "
            f"Received: {images.number_of(found.training)} images to train on"
        )


def forget(output_dir: pathlib.Path) -> None:
    """Remove the files from which a run would continue."""
    for name in ("checkpoint", "tensorboard"):
        if (folder := pathlib.Path(output_dir) / name).exists():
            shutil.rmtree(folder)
    for name in ("config.json", "log.csv"):
        (pathlib.Path(output_dir) / name).unlink(missing_ok=True)


def cut_log(path: pathlib.Path, epochs: int) -> None:
    """Leave only the first epochs in a `log.csv`: a run that was killed does later ones again."""
    if path.exists():
        header, *rows = path.read_text(encoding="utf-8").splitlines(keepends=True) or [""]
        # A full disk may have cut the last one short.
        whole = [row for row in rows if row.endswith("\n") and row.partition(",")[0].isdecimal()]
        kept = [row for row in whole if int(row.partition(",")[0]) < epochs]
        files.write_text(path, "".join([header, *kept]))
