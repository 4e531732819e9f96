"""Recipes, `--set` and the schedules that recipes write."""

import json

import keras
import numpy as np
import pytest

import sddns_tf
from sddns_tf.cli import configuration, training
from sddns_tf.cli.errors import UsageError
from sddns_tf.cli.schedule_forms import Length, value_of


def resolve(recipe=None, **settings):
    settings = {key.replace("__", "."): value for key, value in settings.items()}
    return configuration.resolve(recipe or {}, list(settings.items()))


@pytest.mark.parametrize("name", configuration.recipe_names())
def test_recipes_make_a_model(name):
    config = configuration.resolve(
        configuration.read_recipe(name),
        [("data.source", "npz:x.npz"), ("data.auxiliary", "npz:y.npz")],
    )
    assert configuration.resolve(config, []) == config
    assert json.loads(json.dumps(config)) == config
    training.check(config)


def test_the_papers_recipe_is_the_papers():
    """METHOD: both sources, all 50,000 images in 390 steps of 128, 500 epochs."""
    config = configuration.resolve(configuration.read_recipe("paper_cifar10"), [])
    assert config["negatives"] == {"shift": "rot90", "source": "both"}
    data = config["data"]
    assert (data["source"], data["calibration"]) == ("tfds:cifar10", "tfds:cifar10@test[:5000]")
    assert data["limit"] is None
    length = Length(config["epochs"], 50_000 // config["batch_size"], config["batch_size"])
    assert (length.steps_per_epoch, length.epochs) == (390, 500)
    rate = value_of("optimizer.learning_rate", config["optimizer"]["learning_rate"], length)
    assert float(rate(30 * 390)) == pytest.approx(0.002)
    assert float(rate(500 * 390)) == pytest.approx(1e-6)
    assert float(rate(15 * 390)) == pytest.approx(0.001)
    temperature = value_of("model.x", config["model"]["teacher_temperature"], length)
    assert float(temperature(250 * 390)) == pytest.approx(0.025)
    assert value_of("x", config["model"]["frozen_last_layer_steps"], length) == 390


def test_what_is_set_comes_before_the_recipe_and_that_before_defaults():
    config = resolve({"views": {"hue": 0.3, "flip": 0.0}, "epochs": 7}, views__hue=0.2, seed=3)
    views = sddns_tf.MultiCrop(8)
    assert (config["views"]["hue"], config["views"]["flip"]) == (0.2, 0.0)
    assert config["views"]["contrast"] == views.contrast
    assert (config["epochs"], config["seed"]) == (7, 3)


def test_features_are_compared_as_the_heads_see_them():
    assert resolve()["detector"]["standardize"] is True
    assert resolve(model__teacher_temperature=0.04)["detector"]["standardize"] is False
    assert resolve({"detector": {"standardize": False}})["detector"]["standardize"] is False
    cpu_small = configuration.resolve(configuration.read_recipe("cpu_small"), [])
    assert cpu_small["detector"]["standardize"] is False


def test_source_follows_the_auxiliary_images():
    assert resolve()["negatives"]["source"] == "in_distribution"
    assert resolve(data__auxiliary="npz:x.npz")["negatives"]["source"] == "auxiliary"
    assert resolve(negatives=None)["negatives"] is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("views.hue=0.2", ("views.hue", 0.2)),
        ("head.norm_last_layer=false", ("head.norm_last_layer", False)),
        ("negatives=null", ("negatives", None)),
        ("optimizer.type=SGD", ("optimizer.type", "SGD")),
        ('model.x={"linear": [1, 0]}', ("model.x", {"linear": [1, 0]})),
    ],
)
def test_settings_are_json_or_text(text, expected):
    assert configuration.parse_setting(text) == expected


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("views.hu", 0.2, r"an option of MultiCrop.* views.hue.*Received: views.hu=0.2"),
        ("view.hue", 0.2, "one of the sections data,.*Received: view.hue=0.2"),
        ("epoch", 3, "an option of a run.*epochs.*Received: epoch=3"),
        ("views.hue", "much", 'views.hue must be a number. Received: "much"'),
        ("views.local_views", True, "views.local_views must be a number. Received: true"),
        ("views.local_views", 1.5, "must be an int. Received: 1.5"),
        ("head.norm_last_layer", 1, "must be true or false. Received: 1"),
        ("views.blur", 0.5, "views.blur must be a list"),
        ("negatives.shift", 4, "negatives.shift must be a string"),
        ("views", 3, "views must be an object"),
        ("model.backbone", "x", "an option of SelfDistillation.*Received: model.backbone="),
        ("backbone.depth", 3, "an option of ConvNet.*backbone.stages.*Received: backbone.depth=3"),
        ("detector.mean", [0, 0, 0], "Expected an option of.*Received: detector.mean="),
    ],
)
def test_wrong_keys_and_types_are_named(key, value, message):
    with pytest.raises(UsageError, match=message):
        configuration.resolve({}, [(key, value)])


def test_a_preset_keeps_its_widths():
    config = resolve(backbone__type="vit_small", backbone__patch_size=16, backbone__depth=1)
    backbone = training.make_backbone(config, 32)
    assert (backbone.hidden_dim, backbone.depth, backbone.num_heads) == (384, 1, 6)
    assert backbone.count_params() > 384 * 384


def test_a_backbone_of_a_file_is_taken(tmp_path):
    network = sddns_tf.ConvNet(stages=(8,))
    network.save(tmp_path / "network.keras")
    config = resolve(backbone__type=str(tmp_path / "network.keras"))
    images = np.random.default_rng(0).normal(size=(2, 9, 9, 3)).astype("float32")
    loaded = training.make_backbone(config, 9)
    np.testing.assert_array_equal(loaded(images), network(images))


def test_recipes_that_are_none_are_refused(tmp_path):
    path = tmp_path / "mine.json"
    for text, message in (("{", "must hold valid JSON"), ("[1]", "must hold a JSON object")):
        path.write_text(text)
        with pytest.raises(UsageError, match=message):
            configuration.read_recipe(str(path))
    path.write_text('{"dept": 2}')
    with pytest.raises(UsageError, match=r"Expected an option of a run.*Received: dept="):
        configuration.resolve(configuration.read_recipe(str(path)), [])


LENGTH = Length(epochs=10, steps_per_epoch=20, batch_size=64)


@pytest.mark.parametrize(
    ("form", "step", "expected"),
    [
        ({"linear": [0.04, 0.01]}, 100, 0.025),
        ({"linear": [0, 1], "from_epoch": 2, "to_epoch": 4}, 50, 0.25),
        ({"linear": [0, 1], "from_epoch": 2, "to_epoch": 4}, 30, 0.0),
        ({"cosine": [0.0, 1.0]}, 50, 0.5 - 0.5 * np.cos(np.pi / 4)),
        ({"warmup_cosine": [1.0, 0.0], "warmup_epochs": 1}, 5, 0.25),
        ({"warmup_cosine": [1.0, 0.0], "for_batch_size": 256}, 0, 0.25),
    ],
)
def test_forms_of_schedules(form, step, expected):
    assert float(value_of("x", form, LENGTH)(step)) == pytest.approx(expected, abs=1e-6)


def test_what_is_no_form_stands_for_itself():
    assert value_of("x", 0.1, LENGTH) == 0.1
    assert value_of("x", {"epochs": 1.5}, LENGTH) == 30
    assert value_of("x", {"epochs": 99}, LENGTH) == 200


@pytest.mark.parametrize(
    "form",
    [
        {"line": [0, 1]},
        {"linear": [0]},
        {"linear": [0, "1"]},
        {"linear": [0, 1], "warmup_epochs": 1},
        {"linear": [0, 1], "cosine": [0, 1]},
        {"linear": [0, 1], "from_epoch": 3, "to_epoch": 1},
        {"cosine": [0, 1], "for_batch_size": 0},
        {"epochs": "1"},
    ],
)
def test_wrong_forms_are_refused(form):
    with pytest.raises(UsageError, match=r"model.x must be a number.*Received"):
        value_of("model.x", form, LENGTH)


def test_the_model_has_what_the_recipe_says():
    config = resolve(
        views__local_views=0,
        views__image_size=8,
        head__num_prototypes=16,
        backbone__stages=[8],
        model__teacher_temperature={"linear": [0.04, 0.01]},
        optimizer__type="SGD",
        optimizer__learning_rate={"cosine": [0.1, 0.0]},
    )
    model = training.make_model(config, (8, 8), LENGTH)
    assert float(model.teacher_temperature(200)) == pytest.approx(0.01)
    assert isinstance(model.optimizer, keras.optimizers.SGD)
    assert float(model.optimizer.learning_rate) == pytest.approx(0.1)
    assert model.center.shape == (16,)
