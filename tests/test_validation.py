"""One rule for images at every door, and one for arguments."""

import inspect
import math
import warnings

import keras
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image
from tiny import Brightness, conv

import sddns_tf
from sddns_tf import bank, calibration, callbacks, data, export, heads, losses, schedules, vit
from sddns_tf.features import extract_features

# --- Arguments ----------------------------------------------------------------------------------

NO_INT = (True, 2.0, "2", -1, math.nan)
NO_POSITIVE_INT = (*NO_INT, 0)
NO_NUMBER = (True, "0.5", math.nan, math.inf)
NO_PROBABILITY = (*NO_NUMBER, -0.1, 1.1)
NO_BOOL = (1, "no", None)


def numbers(count, *wrong):
    """What is no `count` ascending numbers: too few, one that is none, and what else is wrong."""
    return (0.5, "ab", (0.5,) * (count - 1), (True,) * count, (math.nan,) * count, *wrong)


FEATURES = np.eye(3, dtype=np.float32)
LOGITS = np.zeros((2, 4, 8), np.float32)
PHOTOS = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3)).astype(np.uint8)

MULTI_CROP = {
    "image_size": NO_POSITIVE_INT,
    "local_views": NO_INT,
    "local_size": NO_POSITIVE_INT,
    "global_area": numbers(2, (0.0, 1.0), (0.5, 1.1), (0.9, 0.4)),
    "local_area": numbers(2, (-0.1, 0.4), (0.4, 0.1)),
    "aspect_ratio": numbers(2, (0.0, 1.0), (2.0, 1.0)),
    "blur": numbers(3, (0.0, 0.0, 1.1), (-0.1, 0.0, 0.0)),
    "blur_sigma": numbers(2, (-1.0, 1.0), (2.0, 1.0)),
    "solarize": numbers(3, (0.0, 2.0, 0.0)),
    **dict.fromkeys(("flip", "color_jitter", "grayscale"), NO_PROBABILITY),
    **dict.fromkeys(("brightness", "contrast", "saturation"), (*NO_NUMBER, -0.1)),
    "hue": (*NO_NUMBER, -0.1, 0.6),
}
DROP_PATH = (*NO_PROBABILITY, 1.0)
NO_POSITIVE = (*NO_NUMBER, 0.0, -1.0)

# A function, arguments that are right, and wrong values of each argument.
ARGUMENTS = [
    (sddns_tf.MultiCrop, {"image_size": 16}, MULTI_CROP),
    (sddns_tf.Negatives, {}, {"source": ("web", 3, None)}),
    (heads.WeightNormDense, {"units": 2}, {"units": NO_POSITIVE_INT, "trainable_gain": NO_BOOL}),
    (
        sddns_tf.ProjectionHead,
        {"num_prototypes": 4, "hidden_dim": 4, "bottleneck_dim": 4},
        {
            **dict.fromkeys(
                ("num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers"), NO_POSITIVE_INT
            ),
            "norm_last_layer": NO_BOOL,
        },
    ),
    (
        sddns_tf.VisionTransformer,
        {"image_size": 8, "patch_size": 4, "hidden_dim": 4, "depth": 1, "num_heads": 1},
        {
            "image_size": (*NO_POSITIVE_INT, (8, True), (8, 8, 8)),
            **dict.fromkeys(("patch_size", "hidden_dim", "depth", "num_heads"), NO_POSITIVE_INT),
            "mlp_ratio": (*NO_POSITIVE, 0.1),
            "drop_path_rate": DROP_PATH,
            "layer_norm_epsilon": NO_POSITIVE,
            "qkv_bias": NO_BOOL,
            "recompute": NO_BOOL,
        },
    ),
    (
        vit.PatchEmbedding,
        {"patch_size": 4, "hidden_dim": 4},
        {"patch_size": NO_POSITIVE_INT, "hidden_dim": NO_POSITIVE_INT},
    ),
    (vit.SelfAttention, {"num_heads": 1}, {"num_heads": NO_POSITIVE_INT, "qkv_bias": NO_BOOL}),
    (vit.StochasticDepth, {"rate": 0.1}, {"rate": DROP_PATH}),
    (
        vit.TransformerBlock,
        {"num_heads": 1, "mlp_dim": 4},
        {
            "mlp_dim": NO_POSITIVE_INT,
            "drop_path_rate": DROP_PATH,
            "layer_norm_epsilon": NO_POSITIVE,
        },
    ),
    (schedules.Constant, {"value": 1.0}, {"value": NO_NUMBER}),
    (
        schedules.Linear,
        {"start": 0.0, "end": 1.0, "end_step": 9},
        {"start": NO_NUMBER, "end": NO_NUMBER, "start_step": NO_INT, "end_step": NO_INT},
    ),
    (
        schedules.WarmupCosine,
        {"start": 0.0, "end": 1.0, "total_steps": 9},
        {
            "start": NO_NUMBER,
            "end": NO_NUMBER,
            "total_steps": NO_POSITIVE_INT,
            "warmup_steps": NO_INT,
        },
    ),
    (
        losses.distillation_loss,
        {
            "teacher_logits": LOGITS,
            "student_logits": LOGITS,
            "center": np.zeros(8, np.float32),
            "teacher_temperature": 0.04,
        },
        {"teacher_temperature": NO_POSITIVE, "student_temperature": NO_POSITIVE},
    ),
    (losses.uniformity_loss, {"student_logits": LOGITS}, {"student_temperature": NO_POSITIVE}),
    (
        losses.updated_center,
        {"center": np.zeros(8, np.float32), "teacher_logits": LOGITS},
        {"momentum": NO_PROBABILITY},
    ),
    (
        bank.ood_score,
        {"features": FEATURES, "bank": FEATURES},
        {
            "temperature": NO_POSITIVE,
            "offset": NO_NUMBER,
            "k": (*NO_POSITIVE_INT, 4),
            "block_size": NO_POSITIVE_INT,
        },
    ),
    (
        bank.compress,
        {"features": FEATURES, "size": 2},
        {"size": NO_POSITIVE_INT, "method": ("mean", None), "seed": NO_INT},
    ),
    (
        calibration.largest_flagged_rank,
        {"calibration_size": 99, "false_positive_rate": 0.1},
        {"false_positive_rate": (*NO_PROBABILITY, 0.0, 1.0)},
    ),
    (
        callbacks.CollapseMonitor,
        {},
        {
            "window": NO_POSITIVE_INT,
            "patience": NO_POSITIVE_INT,
            "uniform_above": NO_PROBABILITY,
            "one_prototype_below": NO_PROBABILITY,
            "constant_below": NO_PROBABILITY,
            "stop_training": NO_BOOL,
        },
    ),
    (
        callbacks.OODProbe,
        {"bank_images": PHOTOS, "held_out": PHOTOS},
        {"every": NO_POSITIVE_INT, "batch_size": NO_POSITIVE_INT},
    ),
    (
        callbacks.TrainingPictures,
        {"log_dir": "logs", "bank_images": PHOTOS, "held_out": PHOTOS},
        {"every": NO_POSITIVE_INT},
    ),
    (callbacks.NotFinite, {}, {"rollbacks": NO_INT}),
    (
        callbacks.Checkpoint,
        {"folder": "states"},
        {"every": NO_POSITIVE_INT, "keep": NO_POSITIVE_INT},
    ),
    (
        data.load,
        {"source": PHOTOS, "batch_size": 2},
        {
            "batch_size": NO_POSITIVE_INT,
            "image_size": (*NO_POSITIVE_INT, (8, 0), (8, 8, 8)),
            "resize": ("stretch", None),
            "exif_orientation": NO_BOOL,
            "min_size": NO_POSITIVE_INT,
            "max_pixels": NO_POSITIVE_INT,
            "on_error": ("ignore", None),
            "shuffle": NO_BOOL,
            "seed": NO_INT,
            "drop_remainder": NO_BOOL,
            "first_batch": NO_INT,
        },
    ),
    (data.load_arrays, {"source": PHOTOS}, {"limit": NO_POSITIVE_INT, "with_labels": NO_BOOL}),
]


@pytest.mark.parametrize(
    ("function", "right", "name"),
    [
        pytest.param(function, right, name, id=f"{function.__name__}-{name}")
        for function, right, wrong in ARGUMENTS
        for name in wrong
    ],
)
def test_a_wrong_argument_is_named(function, right, name):
    wrong = next(wrong for other, _, wrong in ARGUMENTS if other is function)
    for value in wrong[name]:
        with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: .*{name}="):
            function(**{**right, name: value})


@pytest.mark.parametrize(("function", "right", "wrong"), ARGUMENTS)
def test_the_right_arguments_pass(function, right, wrong):
    assert set(right) | set(wrong) <= set(inspect.signature(function).parameters)
    function(**right)


def test_wrong_arguments_of_exports_and_detectors_are_named(grass_detector, tmp_path):
    for name, function in (
        ("version", export.saved_model),
        ("max_pixels", export.saved_model),
        ("bank_size", export.tflite),
        ("batch_size", export.tflite),
    ):
        for value in NO_POSITIVE_INT:
            with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: {name}="):
                function(grass_detector, tmp_path / "new", **{name: value})
    for name, values in (
        ("bank_size", NO_POSITIVE_INT),
        ("calibration_size", NO_POSITIVE_INT),
        ("temperature", NO_POSITIVE),
        ("offset", NO_NUMBER),
        ("k", NO_POSITIVE_INT),
    ):
        for value in values:
            arguments = {"bank_size": 3, "calibration_size": 3, name: value}
            with pytest.raises(ValueError, match=rf"`{name}` must be .*Received: {name}="):
                sddns_tf.Detector(grass_detector.extractor, **arguments)
    assert not list(tmp_path.iterdir())


# --- Images -------------------------------------------------------------------------------------


class Batches(keras.utils.PyDataset):
    def __init__(self, *batches):
        super().__init__()
        self.batches = batches

    def __getitem__(self, index):
        return self.batches[index]

    @property
    def num_batches(self):
        return len(self.batches)


def dataset(images):
    return tf.data.Dataset.from_tensor_slices(images).batch(2)


GOOD = {
    "uint16": lambda images: images.astype(np.uint16),
    "int32": lambda images: images.astype(np.int32),
    "float32": lambda images: images.astype(np.float32),
    "float64": lambda images: images.astype(np.float64),
    "tensor": tf.constant,
    "list": list,
    "pictures": lambda images: [Image.fromarray(image) for image in images],
    "dataset of uint8": dataset,
    "dataset of int32": lambda images: dataset(images.astype(np.int32)),
    "dataset of float32": lambda images: dataset(images.astype(np.float32)),
    "generator": lambda images: (images[i : i + 2] for i in range(0, len(images), 2)),
    "iterator": lambda images: iter([images.astype(np.int64)]),
    "PyDataset": lambda images: Batches(images[:2].astype(np.int32), images[2:]),
}

WIDE = PHOTOS.astype(np.uint16) * 257
NAN = PHOTOS.astype(np.float32)
NAN[1, 2, 3] = np.nan
BAD = {
    "wide uint16": WIDE,
    "wide float": WIDE.astype(np.float32),
    "negative": PHOTOS.astype(np.int16) - 128,
    "normalized": PHOTOS / 127.5 - 1.0,
    "infinite": np.where(PHOTOS.max() == PHOTOS, np.inf, PHOTOS),
    "bool": PHOTOS > 100,
    "text": PHOTOS.astype(str),
    "one image": PHOTOS[0],
    "gray": PHOTOS[..., :1],
    "none": PHOTOS[:0],
    "empty list": [],
    "sizes": [PHOTOS[0], PHOTOS[1, :8]],
    "wide list": list(WIDE),
    "dataset of wide": dataset(WIDE),
    "dataset of normalized": dataset(PHOTOS / 127.5 - 1.0),
    "dataset of bool": dataset(PHOTOS > 100),
    "dataset of single images": tf.data.Dataset.from_tensor_slices(PHOTOS),
    "name": "photos",
    "nothing": None,
}
REFUSED = (ValueError, tf.errors.InvalidArgumentError)
MESSAGE = "must hold values in 0-255|must be |must have one size|At least one image"


@pytest.fixture(scope="module")
def model():
    model = sddns_tf.SelfDistillation(
        conv(8),
        Brightness(8),
        head=sddns_tf.ProjectionHead(8, hidden_dim=8, bottleneck_dim=4),
    )
    model.compile("sgd")
    return model


def doors(detector, model):
    """Every function that takes whole sets of images, and the name it has for them."""
    return {
        "predict": lambda x: detector.predict(x, verbose=0),
        "extract_features": lambda x: extract_features(detector.extractor, x, verbose=0),
        "bank": lambda x: sddns_tf.Detector.from_images(
            detector.extractor.backbone, x, PHOTOS, 0.5, resolution=32, verbose=0
        ),
        "calibration": lambda x: sddns_tf.Detector.from_images(
            detector.extractor.backbone, PHOTOS, x, 0.5, verbose=0
        ),
        "recalibrate": lambda x: detector.recalibrate(x, 0.5, verbose=0),
        "fit": lambda x: model.fit(x, verbose=0),
        "validation_data": lambda x: model.fit(PHOTOS, validation_data=x, verbose=0),
        "evaluate": lambda x: model.evaluate(x, verbose=0),
        "features of a model": lambda x: model.predict(x, verbose=0),
        "fit with a dictionary": lambda x: model.fit({"images": x}, verbose=0),
        "train_on_batch": model.train_on_batch,
        "test_on_batch": model.test_on_batch,
        "probe": lambda x: callbacks.OODProbe(x, PHOTOS),
        "pictures": lambda x: callbacks.TrainingPictures("logs", PHOTOS, x),
    }


DOORS = list(doors(None, type("", (), {"train_on_batch": None, "test_on_batch": None})))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.filterwarnings("ignore:.*batches of at least 32")
def test_what_is_no_images_is_refused_at_every_door(grass_detector, model, door):
    ask = doors(grass_detector, model)[door]
    takes_nan = door in ("predict", "features of a model")
    for name, images in BAD.items() if takes_nan else [*BAD.items(), ("NaN", NAN)]:
        if door in ("validation_data", "recalibrate") and images is None:
            continue  # None stands for no validation, and for the calibration there is.
        with pytest.raises(REFUSED, match=MESSAGE):
            ask(images)
            pytest.fail(name)


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.filterwarnings("ignore:.*calibration images are in the bank")
def test_images_of_all_kinds_are_the_same_images(grass_detector, kind):
    expected = grass_detector.predict(PHOTOS, verbose=0)["ood_score"]
    found = grass_detector.predict(GOOD[kind](PHOTOS), verbose=0)["ood_score"]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    features = extract_features(grass_detector.extractor, PHOTOS, verbose=0)
    found = extract_features(grass_detector.extractor, GOOD[kind](PHOTOS), verbose=0)
    np.testing.assert_allclose(found, features, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*batches of at least 32")
def test_a_model_trains_on_images_of_all_kinds(model):
    for make in GOOD.values():
        history = model.fit(make(PHOTOS), validation_data=make(PHOTOS), verbose=0).history
        assert np.isfinite([history["loss"], history["val_loss"]]).all()


@pytest.mark.filterwarnings("ignore:.*batches of at least 32")
def test_auxiliary_images_come_as_arrays_generators_and_datasets():
    seen = []

    def shift(images, seed):
        tf.numpy_function(lambda x: seen.append(x.mean(axis=(1, 2, 3))), [images], [])
        return images

    model = sddns_tf.SelfDistillation(
        conv(8),
        Brightness(8, darkest=1.0),
        sddns_tf.Negatives(shift, "auxiliary"),
        head=sddns_tf.ProjectionHead(8, hidden_dim=8, bottleneck_dim=4),
    )
    model.compile("sgd")
    auxiliary = np.stack([np.full((16, 16, 3), value, np.int32) for value in (10, 20)])
    for x in (
        {"images": PHOTOS, "auxiliary": auxiliary},
        ({"images": PHOTOS[i : i + 3], "auxiliary": auxiliary} for i in (0, 3)),
        Batches({"images": PHOTOS, "auxiliary": list(auxiliary)}),
        dataset({"images": PHOTOS[:2].astype(np.int32), "auxiliary": auxiliary}),
    ):
        seen.clear()
        assert np.isfinite(model.fit(x, verbose=0).history["loss"]).all()
        assert set(np.round(np.concatenate(seen))) == {10, 20}
    for wrong, message in (
        ({"image": PHOTOS}, "the key 'images'.*Received: the keys .'image'"),
        ({"images": PHOTOS, "auxiliary": np.tile(PHOTOS, (2, 1, 1, 1))}, "6 images, 12 auxiliary"),
        ({"images": PHOTOS, "auxiliary": WIDE}, r"`x\['auxiliary'\]` must hold values in 0-255"),
        (iter([PHOTOS]), "with_auxiliary"),
        (iter([(PHOTOS, np.arange(6))]), "without labels"),
        (dataset((PHOTOS, np.arange(6))), "without labels"),
    ):
        with pytest.raises(ValueError, match=message):
            model.fit(wrong, verbose=0)


@pytest.mark.parametrize("name", ["y", "class_weight", "sample_weight"])
def test_there_are_no_labels_and_no_classes(model, name):
    value = {0: 1.0} if name == "class_weight" else np.ones(6)
    doors = [model.fit, model.train_on_batch]
    if name != "class_weight":
        doors += [model.evaluate, model.test_on_batch]
    for door in doors:
        with pytest.raises(ValueError, match=f"no classes.*Received: {name}="):
            door(PHOTOS, **{name: value})
    with pytest.raises(ValueError, match="without labels"):
        model.fit(PHOTOS, validation_data=(PHOTOS, np.ones(6)), verbose=0)


def test_nearly_black_images_are_warned_of_at_every_door(grass_detector, model):
    dark = (PHOTOS / 255.0).astype(np.float32)
    for ask in (
        lambda: grass_detector.predict(dark, verbose=0),
        lambda: extract_features(grass_detector.extractor, list(dark), verbose=0),
        lambda: extract_features(grass_detector.extractor, dataset(dark), verbose=0),
        lambda: callbacks.OODProbe(dark, PHOTOS),
        lambda: model.evaluate(iter([dark]), verbose=0),
        lambda: data.load(dark, batch_size=2),
        lambda: grass_detector(dark),
    ):
        with pytest.warns(UserWarning, match="nearly black: expected values in 0-255"):
            ask()


def test_not_a_number_is_scored_as_such_and_flagged(grass_detector):
    for images in (NAN, dataset(NAN)):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = grass_detector.predict(images, verbose=0)
        assert np.isnan(found["ood_score"]).tolist() == [False, True, *[False] * 4]
        assert found["is_ood"][1]


def test_a_call_outside_of_a_graph_holds_to_the_rule_too(grass_detector):
    expected = grass_detector(PHOTOS)["ood_score"]
    found = grass_detector(tf.constant(PHOTOS, tf.int32))["ood_score"]
    np.testing.assert_allclose(found, expected, atol=1e-3)
    for wide in (WIDE, tf.constant(WIDE, tf.float32)):
        with pytest.raises(ValueError, match="must hold values in 0-255"):
            grass_detector(wide)


def test_one_batch_to_predict_is_checked_like_many(grass_detector, model):
    for network in (grass_detector, model):
        expected = network.predict(PHOTOS, verbose=0)
        tf.nest.map_structure(
            lambda one, other: np.testing.assert_allclose(one, other, atol=1e-3),
            network.predict_on_batch(PHOTOS),
            expected,
        )
        with pytest.raises(ValueError, match="must hold values in 0-255"):
            network.predict_on_batch(WIDE)


def test_a_dataset_without_batches_is_named(grass_detector, model):
    few = tf.data.Dataset.from_tensor_slices(PHOTOS).batch(100, drop_remainder=True)
    for run in (grass_detector.predict, model.predict, model.fit, model.evaluate):
        with pytest.raises(ValueError, match=r"`x` has no batches.*fewer images than a batch"):
            run(few)


def test_a_dataset_of_uint8_is_passed_on_as_it_is():
    from sddns_tf.image_sources import image_source

    given = dataset(PHOTOS)
    assert image_source(given, trains=True) is given
    checked = image_source(dataset(PHOTOS.astype(np.int32)))
    assert checked.cardinality() == given.cardinality()
    assert checked.element_spec.dtype == tf.uint8


def test_datasets_are_checked_on_several_replicas():
    pytest.importorskip("tensorflow")
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    with strategy.scope():
        model = sddns_tf.SelfDistillation(
            conv(8),
            Brightness(8),
            head=sddns_tf.ProjectionHead(8, hidden_dim=8, bottleneck_dim=4),
        )
        model.compile("sgd")
    floats = dataset(PHOTOS.astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.isfinite(model.fit(floats, verbose=0).history["loss"]).all()
        with pytest.raises(REFUSED, match="must hold values in 0-255"):
            model.fit(dataset(WIDE), verbose=0)
