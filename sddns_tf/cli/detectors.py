"""The detector of a training run: its options are checked before, it is made and written after."""

from __future__ import annotations

import inspect
import json
import math
import pathlib
from typing import Any

from sddns_tf import files
from sddns_tf.cli import images
from sddns_tf.cli.console import verbose
from sddns_tf.cli.errors import user_input


def check(config: dict[str, Any]) -> None:
    """Raise a `ValueError` unless all that can be told without images is right.

    Args:
        config: Resolved configuration: see `configuration.resolve`.
    """
    from sddns_tf import building

    options = config["detector"]
    known = inspect.signature(building.check_options).parameters
    building.check_options(
        options["layers"] is not None,
        **{name: value for name, value in options.items() if name in known},
    )


def check_layers(config: dict[str, Any], model: Any, resolution: tuple[int, int]) -> None:
    """Raise a `UsageError` unless the backbone has what the detector will compare."""
    import sddns_tf
    from sddns_tf import local

    options = config["detector"]
    if options["layers"] is None and not options["aligned"]:
        return
    with user_input(kinds=(ValueError, OSError)):
        extractor = sddns_tf.FeatureExtractor(
            model.teacher_backbone,
            input_size(model, resolution),
            resolution,
            layers=options["layers"],
            aligned=options["aligned"],
            components=options["components"],
        )
        if options["ignore"] is not None:
            local.counted_places(options["ignore"], extractor)


def input_size(model: Any, resolution: tuple[int, int]) -> tuple[int, ...]:
    """Return the detector's input size: the area of a view, in the aspect ratio of the images."""
    side = model.views.image_size
    if resolution[0] == resolution[1]:
        return side, side
    unit = getattr(model.teacher_backbone, "patch_size", 1)
    scale = side / math.sqrt(math.prod(resolution))
    return tuple(max(unit, round(scale * length / unit) * unit) for length in resolution)


def write(
    config: dict[str, Any], model: Any, bank: Any, found: images.Images, output_dir: pathlib.Path
) -> Any:
    """Write the model and its backbone, make the detector, write and return it."""
    import sddns_tf

    # First, so that what was trained is there whatever may be wrong with the detector.
    _save(output_dir / "model.keras", model)
    _save(output_dir / "backbone.keras", model.teacher_backbone)
    with user_input():
        detector = sddns_tf.Detector.from_images(
            model.teacher_backbone,
            bank_images=bank,
            calibration_images=found.calibration,
            auxiliary_images=found.auxiliary if images.compares_auxiliary(config) else None,
            image_size=input_size(model, found.resolution),
            resolution=found.resolution,
            resize=config["data"]["resize"],
            mean=model.mean,
            std=model.std,
            seed=config["seed"],
            verbose=verbose(),
            **config["detector"],
        )
    _save(output_dir / "detector.keras", detector)
    _sign(output_dir)
    return detector


def _sign(output_dir: pathlib.Path) -> None:
    """Note in `config.json` which files are of its run."""
    path = output_dir / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    names = ("model.keras", "backbone.keras", "detector.keras")
    config["derived"]["files"] = {name: files.sha256(output_dir / name) for name in names}
    files.write_json(path, config)


def configuration_beside(path: pathlib.Path) -> dict[str, Any] | None:
    """Return the configuration of the run that wrote a model, without what was derived from it.

    Args:
        path: `model.keras`, `backbone.keras` or `detector.keras` of a run, under any name.

    Returns:
        Dictionary from `config.json` in its folder, or None if that is missing or not of the run
        that wrote this file: another program's, or of a run that has not ended yet.
    """
    try:
        config = json.loads(path.with_name("config.json").read_text(encoding="utf-8"))
        written = config.pop("derived")["files"].values()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return config if files.sha256(path) in written else None


def _save(path: pathlib.Path, model: Any) -> None:
    with files.replacing(path) as unfinished:
        model.save(unfinished)
