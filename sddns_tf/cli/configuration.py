"""The configuration of a training run: a recipe, plus what the command line overrides.

A recipe is a JSON file with the constructor arguments that differ from their defaults:

    {"about": "What this recipe is for and how long it takes.",
     "data": {"source": "folder:photos/good", "resize": "crop"},
     "backbone": {"type": "convnet", "stages": [32, 64]},
     "views": {"local_views": 2},
     "negatives": {"shift": "rot90"},
     "head": {"num_prototypes": 1024},
     "model": {"teacher_temperature": {"linear": [0.04, 0.01]}},
     "optimizer": {"type": "Adam", "learning_rate": {"cosine": [0.004, 1e-6]}},
     "detector": {"false_positive_rate": 0.01},
     "epochs": 20}

The sections hold the arguments of `DataOptions`, the backbone, `MultiCrop`, `Negatives` (null for
no negatives), `ProjectionHead`, `SelfDistillation`, the Keras optimizer and `Detector.from_images`.
The fields of `RunOptions` are at the top level. `schedule_forms` describes how to write values
that change during training.

The resolved configuration has every default filled in. It can be used as a recipe itself.
"""

from __future__ import annotations

import dataclasses
import importlib.resources
import inspect
import json
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from sddns_tf.cli.errors import UsageError, user_input

SECTIONS = (
    "data", "backbone", "views", "negatives", "head", "model", "optimizer", "detector",
)  # fmt: skip
BACKBONES = ("convnet", "vit_tiny", "vit_small", "vit_base")
# Arguments that are set by another section or by the run itself.
_GIVEN = {
    "backbone": ("name", "image_size"),
    "optimizer": ("name",),
    "model": ("backbone", "views", "negatives", "head", "seed"),
    "detector": (
        "backbone", "bank_images", "calibration_images", "auxiliary_images", "image_size",
        "resolution", "resize", "mean", "std", "batch_size", "seed", "verbose",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Where images come from and how they are read.

    Attributes:
        source: Source of the normal images to train on (split: train).
        auxiliary: Source of unrelated images to make negatives from (split: train), or None.
        auxiliary_exclude: File with names of classes to leave out of a TFDS auxiliary set, one per
            line, or None.
        calibration: Source of normal images that are not trained on and that set the threshold
            (split: test), or None to hold out a part of `source`.
        calibration_share: Share of `source` to hold out if there is no `calibration`. None for a
            tenth, or for as many images as the detector's false positive rate needs.
        limit: Largest number of images to use from `source`, or None.
        resolution: Side, or height and width, to which images are resized when they are read. None
            keeps their size.
        resize: How an image of another aspect ratio is resized: `"squash"` or `"crop"`.
        on_error: `"raise"`, or `"skip"` to leave out the files of folders that cannot be read.
        in_memory: Whether to hold all images in memory instead of reading them in every epoch.
    """

    source: str | None = None
    auxiliary: str | None = None
    auxiliary_exclude: str | None = None
    calibration: str | None = None
    calibration_share: float | None = None
    limit: int | None = None
    resolution: int | list | None = None
    resize: str = "squash"
    on_error: str = "raise"
    in_memory: bool = True


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Length, seed and precision of a run.

    Attributes:
        epochs: Number of epochs, or None for as many as make some 2,000 steps, at most 100.
        steps_per_epoch: Steps per epoch, or None for one pass through the images.
        batch_size: Images per step, over all devices, or None for 64, or for all images where there
            are fewer.
        seed: Random seed.
        precision: Keras dtype policy.
    """

    epochs: int | None = None
    steps_per_epoch: int | None = None
    batch_size: int | None = None
    seed: int = 0
    precision: str = "float32"


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the package."""
    folder = importlib.resources.files("sddns_tf.cli") / "recipes"
    return sorted(file.name[:-5] for file in folder.iterdir() if file.name.endswith(".json"))


def read_recipe(name: str) -> dict[str, Any]:
    """Return a recipe that comes with the package, or one from a JSON file.

    Args:
        name: Name of the recipe, or path of the file.

    Returns:
        Dictionary.

    Raises:
        UsageError: If there is no such recipe, or the file does not hold a JSON object.
    """
    path: Any = pathlib.Path(name).expanduser()
    if name in recipe_names():
        path = importlib.resources.files("sddns_tf.cli") / "recipes" / f"{name}.json"
    elif not (path.suffix == ".json" and path.is_file()):
        raise UsageError(
            f"--recipe must be one of {recipe_names()} or a JSON file. Received: {name}"
        )
    with user_input("recipe"):
        try:
            recipe = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refused)
        except ValueError as error:
            raise UsageError(
                f"--recipe must hold valid JSON. Received: {path} ({error})"
            ) from error
    if not isinstance(recipe, dict):
        raise UsageError(
            f"--recipe must hold a JSON object. Received: {path}, which holds {recipe!r}"
        )
    recipe.pop("derived", None)  # notes about its run in a config.json
    return recipe


def parse_setting(text: str) -> tuple[str, Any]:
    """Return key and value of `--set KEY=VALUE`; a value that is not JSON is taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UsageError(f"--set must be KEY=VALUE, such as views.hue=0.2. Received: {text}")
    try:
        return key, json.loads(value, parse_constant=_refused)
    except ValueError:
        return key, value


def _refused(constant: str) -> Any:
    """Raise a `ValueError` for Infinity and NaN, which are not JSON."""
    raise ValueError(f"Expected JSON. Received: {constant}")


def resolve(recipe: dict[str, Any], settings: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the complete, checked configuration of a run, with all defaults filled in.

    Args:
        recipe: Dictionary of a recipe.
        settings: List of pairs of a key, such as `"views.hue"` or `"epochs"`, and a value. They
            override the recipe.

    Returns:
        JSON-serializable dictionary of all sections and options.

    Raises:
        UsageError: If a key does not exist or a value has the wrong type.
    """
    config = {
        key: dict(value) if isinstance(value, dict) else value for key, value in recipe.items()
    }
    for key, value in settings:
        _put(config, key, value)
    about = config.pop("about", None)
    options = {field.name: field.default for field in dataclasses.fields(RunOptions)}
    _check_keys("", config, {*options, *SECTIONS}, "a run")
    resolved = {} if about is None else {"about": about}
    for section in SECTIONS:
        resolved[section] = _resolved_section(section, config)
    for key, default in options.items():
        resolved[key] = _checked(key, config.get(key, default), default)
    from sddns_tf.validation import check_int

    for key in ("epochs", "steps_per_epoch", "batch_size"):
        if resolved[key] is not None:
            with user_input():
                check_int(key, resolved[key])
    return resolved


def flat(config: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration as a flat dictionary with keys such as `"views.hue"`."""
    found = {}
    for key, value in config.items():
        if key in SECTIONS and isinstance(value, dict):
            found.update({f"{key}.{name}": inner for name, inner in value.items()})
        elif key != "about":
            found[key] = value
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """List the differences of two configurations: triples of a key and both values."""
    one, other = flat(one), flat(other)
    return [
        (key, one.get(key), other.get(key))
        for key in dict.fromkeys([*one, *other])
        if one.get(key) != other.get(key)
    ]


def _put(config: dict[str, Any], key: str, value: Any) -> None:
    section, dot, name = key.partition(".")
    if not dot:
        config[key] = value
        return
    if section not in SECTIONS:
        raise UsageError(
            f"--set must name one of the sections {', '.join(SECTIONS)}. Received: {key}={value!r}"
        )
    if not isinstance(config.get(section), dict):
        config[section] = {}
    config[section][name] = value


def _resolved_section(section: str, config: dict[str, Any]) -> dict[str, Any] | None:
    given = config.get(section, {})
    if section == "negatives" and given is None:
        return None
    if not isinstance(given, dict):
        raise UsageError(f"{section} must be an object of arguments. Received: {given!r}")
    if section == "negatives" and "source" not in given:
        auxiliary = (config.get("data") or {}).get("auxiliary")
        given = {**given, "source": "auxiliary" if auxiliary else "in_distribution"}
    if section == "detector" and "standardize" not in given:
        # Features are compared as the heads see them.
        balanced = (config.get("model") or {}).get("teacher_temperature") is None
        given = {**given, "standardize": balanced}
    constructor, fixed = _constructor(section, given)
    defaults = {**fixed, **_defaults(section, constructor)}
    _check_keys(f"{section}.", given, defaults, constructor.__name__)
    return {
        key: _checked(f"{section}.{key}", given.get(key, default), default)
        for key, default in defaults.items()
    }


def constructor(section: str, type_name: str | None = None) -> Callable:
    """Return the class or function whose arguments a section holds.

    Args:
        section: One of `SECTIONS`.
        type_name: Type of the backbone or optimizer; ignored for other sections.

    Returns:
        A callable.
    """
    import keras

    import sddns_tf

    if section == "data":
        return DataOptions
    if section == "backbone":
        return sddns_tf.ConvNet if type_name == "convnet" else getattr(sddns_tf, str(type_name))
    if section == "optimizer":
        found = getattr(keras.optimizers, str(type_name), None)
        if not (inspect.isclass(found) and issubclass(found, keras.optimizers.Optimizer)):
            raise UsageError(
                "optimizer.type must be the name of a Keras optimizer, such as Adam. "
                f"Received: {type_name!r}"
            )
        return found
    constructors: dict[str, Callable] = {
        "views": sddns_tf.MultiCrop,
        "negatives": sddns_tf.Negatives,
        "head": sddns_tf.ProjectionHead,
        "model": sddns_tf.SelfDistillation,
        "detector": sddns_tf.Detector.from_images,
    }
    return constructors[section]


def _constructor(section: str, given: dict[str, Any]) -> tuple[Callable, dict[str, Any]]:
    """Return the constructor of a section, and defaults of the keys that it does not take."""
    if section == "optimizer":
        name = given.get("type", "Adam")
        return constructor(section, name), {"type": name}
    if section != "backbone":
        return constructor(section), {}
    name = given.get("type", "convnet")
    if str(name).endswith(".keras"):
        return (lambda: None), {"type": name}
    if name not in BACKBONES:
        raise UsageError(
            f"backbone.type must be one of {', '.join(BACKBONES)} or a .keras file. "
            f"Received: {name!r}"
        )
    return constructor(section, name), {"type": name, "weights": None}


def _defaults(section: str, constructor: Callable) -> dict[str, Any]:
    """Return the arguments that a section may hold, with their defaults."""
    parameters = dict(inspect.signature(constructor).parameters)
    if any(one.kind == one.VAR_KEYWORD for one in parameters.values()) and section == "backbone":
        import sddns_tf

        if constructor is not sddns_tf.ConvNet:  # presets pass keyword arguments on
            parent = inspect.signature(sddns_tf.VisionTransformer).parameters
            parameters = {**_without_preset_defaults(parent), **parameters}
    return {
        name: None if one.default is one.empty else _as_json(one.default)
        for name, one in parameters.items()
        if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        and name not in _GIVEN.get(section, ())
    }


def _without_preset_defaults(
    parameters: Mapping[str, inspect.Parameter],
) -> dict[str, inspect.Parameter]:
    """Replace the defaults of the sizes that a preset chooses itself with None."""
    sizes = ("hidden_dim", "depth", "num_heads")
    return {
        name: one.replace(default=None) if name in sizes else one
        for name, one in parameters.items()
    }


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _check_keys(prefix: str, given: dict[str, Any], known: Iterable[str], owner: str) -> None:
    for key in given:
        if key not in known:
            names = ", ".join(prefix + name for name in sorted(known))
            raise UsageError(
                f"Expected an option of {owner}, one of {names}. "
                f"Received: {prefix}{key}={given[key]!r}"
            )


def _checked(key: str, value: Any, default: Any) -> Any:
    """Return the value if it has the type of the default.

    Everything else is checked by the constructor.
    """
    section = key.partition(".")[0]
    if isinstance(value, dict) and section in ("model", "optimizer"):
        return value  # see `schedule_forms`
    expected = None
    if isinstance(default, bool):
        expected = None if isinstance(value, bool) else "true or false"
    elif isinstance(default, (int, float)):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        expected = None if is_number else "a number"
        if isinstance(default, int) and is_number and value != int(value):
            expected = "an int"
    elif isinstance(default, str):
        expected = None if isinstance(value, str) else "a string"
    elif isinstance(default, list):
        expected = None if isinstance(value, list) else "a list, such as " + json.dumps(default)
    if expected:
        raise UsageError(f"{key} must be {expected}. Received: {json.dumps(value)}")
    return value
