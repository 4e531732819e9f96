"""Local detectors: feature maps, banks of places, and the one promise for a whole map."""

import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from PIL import Image
from scipy import ndimage
from scipy.spatial import distance

from sddns_tf import bank, local
from sddns_tf.convnet import ConvNet
from sddns_tf.detector import Detector
from sddns_tf.features import FeatureExtractor, extract_features
from sddns_tf.vit import VisionTransformer

BRICK = np.repeat(skimage.data.brick()[..., np.newaxis], 3, axis=-1)


def bricks(count, seed, size=64):
    rng = np.random.default_rng(seed)
    corners = rng.integers(0, BRICK.shape[0] - size, (count, 2))
    return np.stack([BRICK[y : y + size, x : x + size] for y, x in corners])


def damaged(count, seed):
    images = bricks(count, seed)
    images[:, 20:36, 36:52] = [250, 0, 0]
    return images


def convnet(**kwargs):
    """Strides 2, 4, 8 and 16, with random weights."""
    keras.utils.set_random_seed(0)
    x = images = keras.Input((None, None, 3))
    for name, width in (("two", 16), ("four", 24), ("eight", 32), ("sixteen", 48)):
        x = keras.layers.Conv2D(
            width, 3, 2, padding="same", activation="relu", name=name, **kwargs
        )(x)
    return keras.Model(images, keras.layers.GlobalAveragePooling2D(**kwargs)(x), name="convnet")


@pytest.fixture(scope="module")
def detector():
    return Detector.from_images(
        convnet(), bricks(60, 0), bricks(59, 1), layers="auto", bank_size=300, verbose=0
    )


# --- Feature maps ------------------------------------------------------------------------------


def naive_maps(first, second):
    """Averaged over neighbors inside the image, on one grid, channels in a row."""
    pooled = []
    for one in (first, second):
        one = np.asarray(one, np.float64)
        around = ndimage.uniform_filter(one, (1, 3, 3, 1), mode="constant")
        inside = ndimage.uniform_filter(np.ones_like(one), (1, 3, 3, 1), mode="constant")
        pooled.append(around / inside)
    factors = np.array(first.shape[1:3]) / np.array(second.shape[1:3])
    zoomed = ndimage.zoom(pooled[1], (1, *factors, 1), order=1, mode="nearest", grid_mode=True)
    return np.concatenate([pooled[0], zoomed], axis=-1)


def test_maps_are_those_of_an_independent_computation():
    network, images = convnet(), bricks(3, 0)
    extractor = FeatureExtractor(network, 64, 64, layers=("eight", "sixteen"))
    taps = keras.Model(network.input, [network.get_layer(n).output for n in ("eight", "sixteen")])
    expected = naive_maps(*[m.numpy() for m in taps(extractor.preprocess(images))])
    found = extractor(images)
    assert found.shape == (3, 8, 8, 80) == (3, *extractor.map_size, extractor.feature_dim)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    extractor.standardize(expected.mean((0, 1, 2)), expected.std((0, 1, 2)) + 1e-3)
    again = (expected - expected.mean((0, 1, 2))) / (expected.std((0, 1, 2)) + 1e-3)
    np.testing.assert_allclose(extractor(images), again, atol=1e-3)


def test_auto_takes_the_ends_of_blocks_at_strides_8_and_16():
    network = keras.applications.MobileNetV2((64, 64, 3), 0.35, weights=None, include_top=False)
    pooled = keras.layers.GlobalAveragePooling2D()(network.output)
    extractor = FeatureExtractor(keras.Model(network.input, pooled), 64, layers="auto")
    assert extractor.layer_names == ("block_5_add", "block_12_add")
    assert extractor.map_size == (8, 8)
    assert FeatureExtractor(convnet(), 64, layers="auto").layer_names == ("eight", "sixteen")


def test_auto_takes_no_padding_and_nothing_narrow_inside_a_block():
    network = keras.applications.ResNet50V2(
        weights=None, include_top=False, input_shape=(64, 64, 3)
    )
    extractor = FeatureExtractor(network, 64, layers="auto")
    assert extractor.map_size == (8, 8)
    found = [network.get_layer(name).output.shape[1:] for name in extractor.layer_names]
    assert found == [(8, 8, 512), (4, 4, 1024)]


@pytest.mark.parametrize(("stages", "found"), [(3, ["stage_3"]), (5, ["stage_4", "stage_5"])])
def test_auto_takes_the_last_stages_of_a_convnet(stages, found):
    network = ConvNet((8,) * stages)
    extractor = FeatureExtractor(network, 64, layers="auto")
    assert list(extractor.layer_names) == found
    assert extractor.map_size == ((16, 16) if stages == 3 else (8, 8))
    last = FeatureExtractor(network, 64, layers=f"stage_{stages}")
    pooled = last.preprocess(bricks(2, 0))
    tap = keras.Model(network.input, network.get_layer(f"stage_{stages}").output)
    np.testing.assert_allclose(network(pooled), np.mean(tap(pooled), axis=(1, 2)), atol=1e-6)


def test_layers_of_nested_models_are_found_and_give_what_they_give_there():
    network = convnet()
    images = keras.Input((64, 64, 3))
    scaled = keras.layers.Rescaling(0.5)(images)
    outer = keras.Model(images, network(scaled))
    found = FeatureExtractor(outer, layers=("convnet/eight",))
    assert found.layer_names == FeatureExtractor(outer, layers="eight").layer_names
    direct = FeatureExtractor(network, 64, 64, layers="eight")
    tap = keras.Model(network.input, network.get_layer("eight").output)
    expected = local.combined([tap(0.5 * found.preprocess(bricks(2, 0)))])
    np.testing.assert_allclose(found(bricks(2, 0)), expected, atol=1e-5)
    sequential = keras.Sequential([keras.Input((64, 64, 3)), network])
    np.testing.assert_allclose(
        FeatureExtractor(sequential, layers="eight")(bricks(2, 0)), direct(bricks(2, 0)), atol=1e-5
    )


def small_vit():
    keras.utils.set_random_seed(0)
    return VisionTransformer(64, patch_size=8, hidden_dim=32, depth=3, num_heads=2)


def test_tokens_are_those_that_enter_the_last_block():
    network = small_vit()
    extractor = FeatureExtractor(network, layers="tokens")
    assert extractor.layer_names == ("blocks_1",) and extractor.map_size == (8, 8)
    images = extractor.preprocess(bricks(2, 0))
    (tokens,) = network.token_maps(images)
    seen = []
    last = network.blocks[-1]
    call, last.call = last.call, lambda x, **kwargs: (seen.append(x), call(x, **kwargs))[1]
    network(images)
    last.call = call
    np.testing.assert_allclose(tokens, tf.reshape(seen[0][:, 1:], tokens.shape), atol=1e-5)
    np.testing.assert_allclose(extractor(bricks(2, 0)), local.combined([tokens]), atol=1e-5)
    both = FeatureExtractor(network, layers=("blocks_0", "blocks_1"))
    assert both(bricks(2, 0)).shape == (2, 8, 8, 64)


def test_tokens_of_a_functional_transformer_leave_out_what_is_no_patch():
    images = keras.Input((64, 64, 3))
    patches = keras.layers.Reshape((64, 6))(keras.layers.Conv2D(6, 8, 8, name="patches")(images))
    first = keras.layers.Lambda(lambda x: 0.0 * x[:, :5] + 7.0, output_shape=(5, 6))(patches)
    tokens = keras.layers.Concatenate(axis=1, name="tokens")([first, patches])
    network = keras.Model(images, keras.layers.GlobalAveragePooling1D()(tokens))
    extractor = FeatureExtractor(network, layers="tokens")
    assert extractor.layer_names == ("tokens",)
    same = FeatureExtractor(network, layers="patches")
    np.testing.assert_array_equal(extractor(bricks(2, 0)), same(bricks(2, 0)))


def test_a_network_with_named_inputs_that_ends_in_tokens_is_taken(tmp_path):
    """As KerasHub's: `{"images": ...}` to tokens, one of the class and four registers first."""
    keras.utils.set_random_seed(0)
    images = keras.Input((64, 64, 3), name="images")
    patches = keras.layers.Reshape((64, 12))(keras.layers.Conv2D(12, 8, 8)(images))
    tokens = keras.layers.ZeroPadding1D((5, 0))(patches)
    tokens = keras.layers.LayerNormalization(name="tokens")(tokens)
    network = keras.Model({"images": images}, tokens)
    extractor = FeatureExtractor(network, layers="tokens")
    assert extractor.map_size == (8, 8) and extractor.layer_names == ("tokens",)
    expected = np.asarray(network({"images": extractor.preprocess(bricks(2, 0))}))[:, 5:]
    expected = local.combined([tf.constant(expected.reshape(2, 8, 8, 12))])
    np.testing.assert_allclose(extractor(bricks(2, 0)), expected, atol=1e-5)
    one = Detector.from_images(
        network, bricks(40, 0), bricks(39, 1), layers="tokens", bank_size=100, verbose=0
    )
    answers = one.predict(damaged(4, 3), verbose=0)
    assert answers["anomaly_map"].shape == (4, 8, 8) and answers["is_ood"].all()
    one.save(tmp_path / "tokens.keras")
    again = keras.saving.load_model(tmp_path / "tokens.keras")
    np.testing.assert_array_equal(
        again(damaged(4, 3))["ood_score"], one(damaged(4, 3))["ood_score"]
    )


# --- The score ---------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [None, 1, 3])
@pytest.mark.parametrize("block_size", [7, 1000])
def test_euclidean_score_is_a_parzen_window_estimate(k, block_size):
    rng = np.random.default_rng(0)
    features, rows = rng.normal(size=(9, 12)), rng.normal(size=(40, 12))
    squares = ((features[:, np.newaxis] - rows) ** 2).sum(-1)
    kept = np.sort(squares, axis=1)[:, :k]
    expected = -np.log(np.mean(np.exp((1 - kept / 24 - 0.2) / 0.1), axis=1))
    found = bank.ood_score(
        features.astype("float32"),
        rows.astype("float32"),
        0.1,
        0.2,
        k,
        metric="euclidean",
        block_size=block_size,
    )
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_euclidean_score_of_features_of_one_length_is_the_cosine_one():
    rng = np.random.default_rng(0)
    features, rows = (rng.normal(size=(n, 12)).astype("float32") for n in (9, 40))
    features, rows = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, rows))
    long = np.float32(np.sqrt(12))
    np.testing.assert_allclose(
        bank.ood_score(long * features, long * rows, k=1, metric="euclidean"),
        bank.ood_score(features, rows, k=1),
        atol=1e-3,
    )


def test_coreset_is_the_greedy_one():
    places = np.random.default_rng(0).normal(size=(900, 8)).astype("float32")
    chosen = bank.coreset(places, 400, seed=3)
    expected = [int(np.random.default_rng(3).integers(900))]
    nearest = np.full(900, np.inf)
    while len(expected) < 400:
        nearest = np.minimum(nearest, ((places - places[expected[-1]]) ** 2).sum(1))
        expected.append(int(nearest.argmax()))
    np.testing.assert_array_equal(chosen, places[expected])
    assert len(bank.coreset(places, 5000)) == 900


def test_reservoir_keeps_all_alike_however_rows_come():
    rows = np.arange(3000, dtype="float32")[:, np.newaxis]
    kept = []
    for batch in (1, 64, 3000):
        reservoir = bank.Reservoir(50, seed=1)
        for start in range(0, 3000, batch):
            reservoir.offer(rows[start : start + batch])
        kept.append(np.sort(reservoir.rows[:, 0]))
    np.testing.assert_array_equal(kept[0], kept[1])
    np.testing.assert_array_equal(kept[0], kept[2])
    counts = np.zeros(10)
    for seed in range(200):
        reservoir = bank.Reservoir(50, seed)
        for start in range(0, 3000, 100):
            reservoir.offer(rows[start : start + 100])
        counts += np.bincount((reservoir.rows[:, 0] // 300).astype(int), minlength=10)
    # 10,000 draws over ten tenths: 1,000 each, give or take five deviations.
    assert np.abs(counts - 1000).max() < 150


def test_moments_are_those_of_all_rows():
    rows = np.random.default_rng(0).normal(100, [1e-1, 3, 50], (5000, 3)).astype("float32")
    moments = local.Moments(3)
    for part in np.split(rows, [10, 700, 701, 4000]):
        moments.add(part)
    np.testing.assert_allclose(moments.mean, rows.mean(0, dtype="float64"), rtol=1e-6)
    np.testing.assert_allclose(moments.deviation, rows.std(0, dtype="float64"), rtol=1e-4)
    constant = local.Moments(3)
    constant.add(rows * [0, 1, 1])
    assert constant.deviation[0] > 0


# --- The detector ------------------------------------------------------------------------------


def check_promise(detector, answers):
    """One promise for the whole map."""
    above = (answers["anomaly_map"] > detector.threshold).any(axis=(1, 2))
    np.testing.assert_array_equal(answers["is_ood"], above)
    np.testing.assert_array_equal(answers["ood_score"], answers["anomaly_map"].max(axis=(1, 2)))
    scores = detector.calibration_scores.numpy()
    higher = (scores >= answers["ood_score"][:, np.newaxis]).sum(1)
    np.testing.assert_allclose(answers["p_value"], (1 + higher) / (1 + len(scores)), rtol=1e-6)


def test_the_image_is_flagged_where_some_place_is(detector):
    images = np.concatenate([bricks(30, 2), damaged(10, 3)])
    answers = detector.predict(images, verbose=0)
    assert answers["anomaly_map"].shape == (40, 8, 8)
    assert answers["anomaly_map"].dtype == np.float32
    check_promise(detector, answers)
    assert answers["is_ood"][30:].all() and answers["is_ood"][:30].mean() < 0.3
    # The damage is where the map says: its place of the highest score lies on it or beside it.
    rows, columns = np.unravel_index(answers["anomaly_map"][30:].reshape(10, -1).argmax(1), (8, 8))
    assert (abs(rows - 3) <= 2).all() and (abs(columns - 5) <= 2).all()
    # Calibration scores are maxima, so calibration images are flagged at the rate.
    assert detector.predict(bricks(59, 1), verbose=0)["is_ood"].sum() == 2


def test_equal_images_get_equal_answers(detector):
    frames = bricks(59, 1)
    expected = detector.predict(frames, verbose=0)
    for size in (1, 7):
        answers = detector.predict(frames, batch_size=size, verbose=0)
        check_promise(detector, answers)
        np.testing.assert_array_equal(answers["is_ood"], expected["is_ood"])
        np.testing.assert_array_equal(answers["p_value"], expected["p_value"])


def test_bank_rows_are_places_and_the_map_their_distance(detector):
    assert detector.bank.shape == (300, 80) and detector.k == 1
    maps = detector.features(bricks(3, 2)).numpy()
    rows = detector.bank.numpy().astype("float64")
    squares = ((maps[..., np.newaxis, :] - rows) ** 2).mean(-1).min(-1)
    expected = (squares / 2 - 1 + detector.offset) / detector.temperature
    np.testing.assert_allclose(detector(bricks(3, 2))["anomaly_map"], expected, atol=2e-3)


def test_the_feature_level_door_gives_the_same(detector):
    maps = extract_features(detector.extractor, bricks(59, 1), verbose=0)
    again = Detector.from_features(detector.extractor, detector.bank.numpy(), maps)
    assert again.threshold == pytest.approx(detector.threshold, abs=1e-3)
    small = detector.compressed(50)
    assert small.bank.shape == (50, 80) and small.is_local
    fewer, more = (d(bricks(3, 2))["ood_score"].numpy() for d in (small, detector))
    assert (fewer >= more - 1e-3).all()
    with pytest.raises(ValueError, match=r"`calibration_features` must have shape \(N, 8, 8, 80\)"):
        Detector.from_features(detector.extractor, detector.bank.numpy(), maps.reshape(-1, 80))


def test_a_saved_detector_answers_alike(detector, tmp_path):
    detector.save(tmp_path / "local.keras")
    again = keras.saving.load_model(tmp_path / "local.keras")
    images = damaged(4, 5)
    for name, value in detector.predict(images, verbose=0).items():
        np.testing.assert_array_equal(again.predict(images, verbose=0)[name], value)
    assert again.extractor.layer_names == ("eight", "sixteen")


def test_streams_of_any_batches_give_one_detector(detector):
    stream = tf.data.Dataset.from_tensor_slices(bricks(60, 0)).batch(13)
    calibration = tf.data.Dataset.from_tensor_slices(bricks(59, 1)).batch(20)
    again = Detector.from_images(
        convnet(), stream, calibration, layers="auto", bank_size=300, verbose=0
    )
    # Two rows that are all but equally far may change places: features differ in their last bits.
    between = distance.cdist(again.bank, detector.bank)
    assert between.min(axis=0).max() < 1e-2 and between.min(axis=1).max() < 1e-2
    assert again.threshold == pytest.approx(detector.threshold, abs=1e-2)


@pytest.fixture(scope="module")
def everywhere():
    """A detector that ignores no place."""
    return Detector.from_images(
        convnet(), bricks(60, 0), bricks(59, 1), layers=("eight",), bank_size=200, verbose=0
    )


@pytest.mark.parametrize("kind", ["array", "image", "file"])
def test_ignored_places_count_for_nothing(kind, everywhere, tmp_path):
    mask = np.zeros((8, 8), bool)
    mask[0:7, 2:8] = True  # as far as the damage is seen
    if kind != "array":
        mask = np.kron(mask, np.ones((8, 8), bool))
    given = mask
    if kind == "file":
        given = tmp_path / "mask.png"
        Image.fromarray(mask.astype("uint8") * 255).save(given)
    one = Detector.from_images(
        convnet(),
        bricks(60, 0),
        bricks(59, 1),
        layers=("eight",),
        ignore=given,
        bank_size=200,
        verbose=0,
    )
    images = np.concatenate([bricks(30, 2), damaged(30, 2)])
    answers = one.predict(images, verbose=0)
    check_promise(one, answers)
    assert (answers["anomaly_map"][:, 0:7, 2:8] == np.float32(one.lowest_score)).all()
    np.testing.assert_array_equal(*np.split(answers["is_ood"], 2))
    assert everywhere.predict(images, verbose=0)["is_ood"][30:].all()


def test_a_mask_of_images_that_are_cropped_is_cropped_like_them():
    extractor = FeatureExtractor(convnet(), 64, 48, resize="crop", layers=("eight",))
    mask = np.zeros((48, 56), bool)
    mask[:, 40:46] = True  # the image's columns 36 to 42, so the map's sixth
    np.testing.assert_array_equal(np.where(~local.counted_places(mask, extractor))[1], [6] * 8)
    mask[:] = False
    mask[:, :4] = mask[:, -4:] = True  # what is cut off
    squashed = FeatureExtractor(convnet(), 64, (60, 80), layers=("eight",))
    photograph = np.zeros((60, 80), bool)
    photograph[:15, :20] = True
    expected = np.zeros((8, 8), bool)
    expected[:2, :2] = True
    np.testing.assert_array_equal(~local.counted_places(photograph, squashed), expected)
    assert local.counted_places(mask, extractor).all()
    assert (
        ~local.counted_places(np.eye(8, dtype=bool), extractor)
    ).sum() == 8  # places, not an image


@pytest.mark.parametrize("smoothing", [1, 3])
def test_false_alarms_are_accepted_as_normal(smoothing):
    one = Detector.from_images(
        convnet(),
        bricks(60, 0),
        bricks(59, 1),
        layers="auto",
        bank_size=300,
        smoothing=smoothing,
        verbose=0,
    )
    alarms, others = damaged(5, 3), bricks(30, 2)
    before = one.predict(np.concatenate([alarms, others]), verbose=0)
    threshold = one.threshold
    one.extend(alarms)
    after = one.predict(np.concatenate([alarms, others]), verbose=0)
    check_promise(one, after)
    assert before["is_ood"][:5].all() and not after["is_ood"][:5].any()
    assert one.threshold == threshold and one.bank.shape[0] > 300
    # With one nearest row no score rises: the promise holds on.
    assert (after["ood_score"] <= before["ood_score"] + one.rounding).all()
    copy = type(one).from_config(one.get_config())
    copy.set_weights(one.get_weights())
    np.testing.assert_array_equal(copy(alarms)["ood_score"], one(alarms)["ood_score"])


def test_smoothing_is_the_mean_over_neighbors_that_count():
    mask = np.zeros((8, 8), bool)
    mask[:, :3] = mask[7, 7] = True
    options = {"layers": "eight", "ignore": mask, "bank_size": 100, "verbose": 0}
    plain, smooth = (
        Detector.from_images(
            convnet(), bricks(60, 0), bricks(59, 1), 0.1, smoothing=side, **options
        )
        for side in (1, 3)
    )
    images = np.concatenate([bricks(5, 2), damaged(5, 2)])
    each = plain.scores(plain.features(images))["anomaly_map"].numpy()
    around = ndimage.uniform_filter(np.where(mask, 0.0, each), (1, 3, 3), mode="constant")
    counted = ndimage.uniform_filter(np.where(mask, 0.0, 1.0), 3, mode="constant")
    expected = np.where(mask, smooth.lowest_score, around / np.maximum(counted, 1e-9))
    found = smooth.scores(smooth.features(images))["anomaly_map"].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    answers = smooth.predict(images, verbose=0)
    check_promise(smooth, answers)
    assert answers["is_ood"][5:].all()
    copy = smooth.calibrated_on(bricks(59, 1), verbose=0)
    np.testing.assert_array_equal(copy.predict(images, verbose=0)["is_ood"], answers["is_ood"])


def test_wrong_smoothing_is_named(detector):
    arguments = (bricks(20, 0), bricks(19, 1))
    with pytest.raises(ValueError, match=r"`smoothing` must be odd\. Received: 2"):
        Detector.from_images(convnet(), *arguments, layers="eight", smoothing=2, verbose=0)
    with pytest.raises(ValueError, match=r"compares whole images.*Received: smoothing=3"):
        Detector.from_images(convnet(), *arguments, smoothing=3, verbose=0)


def test_half_precision_gives_the_map_of_single_precision(detector):
    for policy in ("mixed_float16", "mixed_bfloat16"):
        half = Detector.from_images(
            convnet(dtype=policy),
            bricks(60, 0),
            bricks(59, 1),
            layers="auto",
            bank_size=300,
            verbose=0,
        )
        answers = half.predict(damaged(4, 3), verbose=0)
        check_promise(half, answers)
        assert answers["anomaly_map"].dtype == np.float32
        maps = detector.predict(damaged(4, 3), verbose=0)["anomaly_map"]
        assert np.corrcoef(answers["anomaly_map"].ravel(), maps.ravel())[0, 1] > 0.98


def test_a_place_that_is_no_number_is_the_worst(detector):
    maps = detector.features(bricks(2, 0)).numpy()
    maps[1, 3, 4, 5] = np.nan
    answers = {name: value.numpy() for name, value in detector.answer(maps).items()}
    check_promise(detector, answers)
    assert answers["ood_score"][1] == np.inf and answers["is_ood"][1]
    assert np.isfinite(answers["ood_score"][0])


# --- Wrong arguments ---------------------------------------------------------------------------


def test_wrong_layers_are_named():
    network = convnet()
    for layers, message in (
        ("nine", "no layer of that name; some that it has: .*'sixteen'.* Received: layers='nine'"),
        (("eight", 3), "names of layers of the backbone"),
        ((), "names of layers of the backbone"),
        ("tokens", "no layer of tokens"),
        (network.layers[-1].name, r"must give maps .*which gives shape \(None, 48\)"),
    ):
        with pytest.raises(ValueError, match=message):
            FeatureExtractor(network, 64, layers=layers)
    with pytest.raises(ValueError, match=r"gives 1 x 1 places for images of 16 x 16 px"):
        FeatureExtractor(network, 16, layers="sixteen")
    with pytest.raises(ValueError, match=r"the maps have strides \[2, 4, 8\]"):
        FeatureExtractor(network, 8, layers="auto")
    with pytest.raises(
        ValueError, match=r"gives maps of .*'blocks_2'.*Received: layers='blocks_3'"
    ):
        FeatureExtractor(small_vit(), layers="blocks_3")


class Subclassed(keras.Model):
    def call(self, images):
        return keras.ops.mean(images, axis=(1, 2))


def test_wrong_backbones_masks_and_sizes_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"functional or sequential .* Received: Subclassed"):
        FeatureExtractor(Subclassed(), 64, layers="auto")
    bank_images, calibration = bricks(10, 0), bricks(19, 1)

    def make(**kwargs):
        kwargs = {"layers": "eight", "bank_size": 50, "verbose": 0, **kwargs}
        return Detector.from_images(convnet(), bank_images, calibration, 0.1, **kwargs)

    for mask in (np.zeros((8, 3), bool), np.zeros((4, 4), bool), np.zeros((8, 8)), np.zeros(8)):
        with pytest.raises(ValueError, match=r"`ignore` must be a bool mask of the map's 8 x 8"):
            make(ignore=mask)
    with pytest.raises(ValueError, match="`ignore` leaves no place that counts"):
        make(ignore=np.ones((64, 64), bool))
    with pytest.raises(ValueError, match=r"`ignore` names places.*pass `layers`"):
        make(layers=None, ignore=np.zeros((8, 8), bool))
    with pytest.raises(ValueError, match="`k` must be between 1 and the bank's 50 rows"):
        make(k=51)
    with pytest.raises(ValueError, match="at least 19 calibration images"):
        Detector.from_images(convnet(), bank_images, calibration[:18], 0.05, layers="eight")
    with pytest.warns(UserWarning, match="are in the bank as well"):
        Detector.from_images(convnet(), calibration, calibration, 0.1, layers="eight", verbose=0)
    # Of a small bank no calibration image has all its places.
    with pytest.warns(UserWarning, match="4 of the 19 calibration images are in the bank as well"):
        mixed = np.concatenate([bank_images[:4], calibration[4:]])
        Detector.from_images(
            convnet(), bank_images, mixed, 0.1, layers="auto", bank_size=50, verbose=0
        )
