"""Python that the texts show: it parses, calls what there is, and what the pages show runs.

Calls of our own names are bound to the signatures of today, so that a renamed argument fails here.
"""

import ast
import importlib
import inspect
import types

import export_checks
import keras
import numpy as np
import pytest
import tensorflow as tf
from texts import Code, all_code
from toy_sets import tiles

import sddns_tf

CODE = all_code()
# Variables that texts use without making them.
USUAL = {
    "detector": sddns_tf.Detector,
    "model": sddns_tf.SelfDistillation,
    "extractor": sddns_tf.FeatureExtractor,
    "views": sddns_tf.MultiCrop,
    "negatives": sddns_tf.Negatives,
    "head": sddns_tf.ProjectionHead,
    "backbone": sddns_tf.VisionTransformer,
}
UNKNOWN = object()


# --- Names and arguments ------------------------------------------------------------------------


def names_for(code):
    """What names mean where a text shows code: of its module, of the package, of what it uses."""
    names = {name: getattr(sddns_tf, name) for name in sddns_tf.__all__}
    names |= {"keras": keras, "np": np, "tf": tf, "sddns_tf": sddns_tf}
    if code.module:
        names |= vars(importlib.import_module(code.module))
    return names


def check_names_and_arguments(code):
    """Raise an error where code calls something of ours that is not there, or not so."""
    tree = ast.parse(code.source)
    names = names_for(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "sddns_tf":
            module = importlib.import_module(node.module)
            names |= {
                alias.asname or alias.name: getattr(module, alias.name) for alias in node.names
            }
    made = dict(USUAL)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
            kind = kind_of(node.value, names)
            for target in node.targets:
                if isinstance(target, ast.Name):
                    made[target.id] = kind
                    names.pop(target.id, None)
        elif isinstance(node, ast.FunctionDef):
            names.pop(node.name, None)
            made[node.name] = UNKNOWN
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            check_call(node, names, made)


def skip_without_beam(code):
    """Skip a test of code that needs Apache Beam where that is not installed."""
    if "sddns_tf.beam" in f"{code.module} {code.source}":
        pytest.importorskip("apache_beam")


def kind_of(call, names):
    """The class of what a call makes, as far as it can be told."""
    function, owner = resolved(call.func, names, {})
    if inspect.isclass(function):
        return function
    if inspect.ismethod(function) and inspect.isclass(owner):
        return owner
    return {"pretrained": sddns_tf.Detector}.get(getattr(function, "__name__", ""), UNKNOWN)


def resolved(node, names, made):
    """What a name or an attribute is, and what it was taken from; UNKNOWN if it cannot be told."""
    if isinstance(node, ast.Name):
        return made.get(node.id, names.get(node.id, UNKNOWN)), None
    if not isinstance(node, ast.Attribute):
        return UNKNOWN, None
    owner, _ = resolved(node.value, names, made)
    if owner is UNKNOWN or not is_ours(owner):
        return UNKNOWN if owner is UNKNOWN else getattr(owner, node.attr, UNKNOWN), owner
    if isinstance(node.value, ast.Name) and node.value.id in made and not hasattr(owner, node.attr):
        return UNKNOWN, owner  # an attribute that the constructor sets
    assert hasattr(owner, node.attr), f"There is no {ast.unparse(node)}"
    return getattr(owner, node.attr), owner


def is_ours(thing):
    """Whether a module, class or function is of this package."""
    place = getattr(thing, "__module__", None) or getattr(thing, "__name__", "")
    return str(place).partition(".")[0] == "sddns_tf"


def check_call(call, names, made):
    """Bind the arguments of a call of ours to its signature."""
    function, _ = resolved(call.func, names, made)
    if function is UNKNOWN or not callable(function) or not is_ours(function):
        return
    if any(isinstance(a, ast.Starred) for a in call.args) or any(
        k.arg is None for k in call.keywords
    ):
        return
    arguments = list(call.args)
    is_instance = isinstance(call.func, ast.Name) and call.func.id in made
    if is_instance and inspect.isclass(function):
        function = function.__call__ if not issubclass(function, keras.Layer) else function.call
    if inspect.isfunction(function) and "self" in inspect.signature(function).parameters:
        arguments = [None, *arguments]
    try:
        inspect.signature(function).bind(*arguments, **{k.arg: k.value for k in call.keywords})
    except TypeError as error:
        raise AssertionError(f"{ast.unparse(call)}: {error}") from error


@pytest.mark.parametrize("code", CODE, ids=lambda code: code.place)
def test_code_calls_what_there_is(code):
    skip_without_beam(code)
    check_names_and_arguments(code)


@pytest.mark.parametrize(
    "source",
    [
        "import sddns_tf\nsddns_tf.MultiCrops(32)",
        "import sddns_tf\nsddns_tf.MultiCrop(32, local_crops=4)",
        "from sddns_tf import shifts\nshifts.rot45(images, seed)",
        "from sddns_tf.shifts import image_draws",
        "model.compile(keras.optimizers.Adam(1e-3))\nmodel.fit(images)\ndetector.recalibrated()",
        "detector.recalibrate(rate=0.01)",
        "sddns_tf.Detector.from_images(backbone, bank=images, calibration_images=images)",
        "negatives = Negatives('rot90')\nnegatives(views, images)",
        "this is no Python",
    ],
)
def test_wrong_code_fails(source):
    if "recalibrated" in source:
        source = source.replace("detector.", "sddns_tf.Detector.")
    with pytest.raises((AssertionError, AttributeError, ImportError, SyntaxError)):
        check_names_and_arguments(Code("made up", source, None))


def test_the_texts_show_code():
    assert {code.place.partition(":")[0] for code in CODE} >= {
        "README.md", "index.md", "negatives.md", "thresholds.md", "scaling.md", "edge.md",
    }  # fmt: skip
    assert len(CODE) > 40


# --- What the pages show runs -------------------------------------------------------------------

SMALLER = (
    ('efficientnet_lite0("lite0.weights.h5")', "efficientnet_lite0()"),
    ("bank_size=10_000", "bank_size=100"),
    ("components=64", "components=4"),
    ("sddns_tf.vit_small(", "sddns_tf.VisionTransformer(hidden_dim=16, depth=1, num_heads=2, "),
    ("local_views=4", "local_views=0"),
    ("epochs=100", "epochs=1"),
    ("range(50_000)", "range(50)"),
    ("batch_size=64", "batch_size=32"),
    ("batch_size=512", "batch_size=32"),
    ("tf.distribute.MirroredStrategy()", "tf.distribute.MirroredStrategy(['CPU:0'])"),
)
PAGES = [code for code in CODE if not code.module]


@pytest.fixture(scope="module")
def toy(trained, tmp_path_factory):
    """A folder of the photographs and files that the pages name."""
    folder = tmp_path_factory.mktemp("pages")
    photographs = {
        "photos/good": ("grass", 64), "photos/other": ("coffee", 40),
        "photos/good_held_out": ("grass", 40), "photos/new": ("brick", 6),
    }  # fmt: skip
    for place, (name, count) in photographs.items():
        (folder / place).mkdir(parents=True)
        for index, image in enumerate(tiles(name, count, 32)):
            keras.utils.save_img(folder / place / f"{index:03}.png", image, scale=False)
    keras.utils.save_img(folder / "photo.png", tiles("coffee", 1, 40)[0], scale=False)
    detector = keras.saving.load_model(trained / "detector.keras")
    detector.save(folder / "parts" / "detector.keras")
    sddns_tf.export.tflite(detector, str(folder / "parts.tflite"), batch_size=1)
    with export_checks.in_this_process():
        sddns_tf.export.saved_model(detector, folder / "exports" / "parts")
    return folder


@pytest.fixture(scope="module")
def local_names():
    """What docs/local.md takes for granted: a trained model, images, a local detector's answers."""
    images = tiles("grass", 80, 32)
    backbone = sddns_tf.VisionTransformer(32, patch_size=8, hidden_dim=16, depth=2, num_heads=2)
    backbone(np.zeros((1, 32, 32, 3), "float32"))
    detector = sddns_tf.Detector.from_images(
        backbone, images[:40], images[40:], 0.05, layers="auto", bank_size=50, verbose=0
    )
    return {
        "sddns_tf": sddns_tf,
        "model": types.SimpleNamespace(teacher_backbone=backbone),
        "train_images": images[:40],
        "held_out_images": images[40:],
        "images": images,
        "detector": detector,
        "out": detector.predict(images, verbose=0),
    }


@pytest.mark.slow
@pytest.mark.parametrize("code", PAGES, ids=lambda code: code.place)
def test_code_of_a_page_runs(code, toy, local_names, monkeypatch):
    skip_without_beam(code)
    monkeypatch.chdir(toy)
    source = code.source
    for long, short in SMALLER:
        source = source.replace(long, short)
    names = local_names if code.place.startswith("local.md") else {}
    with export_checks.in_this_process():
        exec(compile(source, code.place, "exec"), {**names, "__name__": "page"})
