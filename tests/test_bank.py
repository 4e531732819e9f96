import keras
import numpy as np
import pytest
import skimage.data
import tensorflow as tf
from hypothesis import given, settings
from hypothesis import strategies as st

from sddns_tf import bank as bank_lib
from sddns_tf import image_ops
from sddns_tf.bank import compress, ood_score
from sddns_tf.features import FeatureExtractor, extract_features
from sddns_tf.vit import VisionTransformer


@pytest.fixture(autouse=True)
def seeded():
    keras.utils.set_random_seed(0)


def unit_rows(seed, rows, dim=16, spread=1.0):
    """Random unit vectors; a small spread puts them close to one direction."""
    rng = np.random.default_rng(seed)
    vectors = np.eye(dim)[0] + spread * rng.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def formula(features, bank, temperature=0.04, offset=0.1, k=None, weights=None):
    """The score in float64, as the paper writes it."""
    cosines = features.astype(np.float64) @ bank.astype(np.float64).T
    weights = np.ones(len(bank)) if weights is None else np.asarray(weights, np.float64)
    scores = []
    for row in cosines:
        near = np.argsort(-row)[:k]
        terms = np.exp((row[near] - offset) / temperature)
        scores.append(-np.log(np.sum(weights[near] * terms) / np.sum(weights[near])))
    return np.array(scores)


def conv_backbone(dtype=None):
    inputs = keras.Input((32, 32, 3))
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", dtype=dtype)(inputs)
    return keras.Model(inputs, keras.layers.GlobalAveragePooling2D(dtype=dtype)(x))


def photographs(size=64):
    """24 different square crops of real photographs."""
    images = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    corners = [(y, x) for y in (0, 80) for x in (0, 70, 140, 210)]
    return np.stack([i[y : y + size, x : x + size] for i in images for y, x in corners])


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.integers(1, 40),
    k=st.one_of(st.none(), st.integers(1, 40)),
    block_size=st.integers(1, 50),
    weighted=st.booleans(),
    spread=st.sampled_from([0.05, 1.0]),
    temperature=st.sampled_from([0.04, 0.5]),
)
def test_score_is_the_formula_in_any_blocks(
    seed, rows, k, block_size, weighted, spread, temperature
):
    bank = unit_rows(seed, rows, spread=spread)
    features = unit_rows(seed + 1, 5, spread=spread)
    k = None if k is None else min(k, rows)
    weights = np.random.default_rng(seed).uniform(0.1, 3.0, rows) if weighted else None
    score = ood_score(features, bank, temperature, 0.2, k, weights=weights, block_size=block_size)
    expected = formula(features, bank, temperature, 0.2, k, weights)
    assert score.dtype == tf.float32
    np.testing.assert_allclose(score, expected, rtol=1e-5, atol=2e-5)


def test_score_ranks_outliers_higher():
    bank = unit_rows(0, 200, spread=0.1)
    normal, outlier = unit_rows(1, 20, spread=0.1), unit_rows(2, 20, spread=20.0)
    assert np.max(ood_score(normal, bank)) < np.min(ood_score(outlier, bank))


@pytest.mark.parametrize("cosine", [1.0, -1.0])
def test_score_is_exact_where_exponentials_overflow_or_vanish(cosine):
    feature = np.eye(4, dtype=np.float32)[:1]
    bank = np.repeat(cosine * feature, 7, axis=0)
    for block_size in (2, 100):
        score = ood_score(feature, bank, temperature=1e-3, offset=0.0, block_size=block_size)
        np.testing.assert_allclose(score, [-1000.0 * cosine], rtol=1e-6)


def test_low_precision_features_are_scored_in_float32():
    features, bank = unit_rows(0, 6), unit_rows(1, 50)
    low = tf.cast(features, tf.bfloat16), tf.cast(bank, tf.bfloat16)
    exact = ood_score(tf.cast(low[0], tf.float32), tf.cast(low[1], tf.float32))
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        np.testing.assert_array_equal(ood_score(*low), exact)
    finally:
        keras.config.set_dtype_policy("float32")
    np.testing.assert_allclose(exact, formula(*(t.numpy() for t in low)), rtol=1e-5)


def test_a_feature_that_is_not_a_number_spoils_only_its_own_score():
    features, bank = unit_rows(0, 3), unit_rows(1, 9)
    expected = ood_score(features, bank).numpy()
    features[1, 2] = np.nan
    for options in ({}, {"k": 2}, {"block_size": 2}):
        assert np.isnan(ood_score(features, bank, **options)).tolist() == [False, True, False]
    np.testing.assert_allclose(ood_score(features, bank)[::2], expected[::2], rtol=1e-6)


@pytest.mark.parametrize("k", [None, 3])
@pytest.mark.parametrize("jit_compile", [False, True])
def test_score_compiles_with_an_unknown_batch(k, jit_compile):
    bank, weights = unit_rows(0, 23), np.linspace(1, 2, 23)

    @tf.function(input_signature=[tf.TensorSpec([None, 16])], jit_compile=jit_compile)
    def score(features):
        return ood_score(features, bank, k=k, weights=weights, block_size=5)

    for batch in (1, 4):
        features = unit_rows(1, batch)
        expected = formula(features, bank, k=k, weights=weights)
        np.testing.assert_allclose(score(features), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "`k` must be a positive int. Received: k=0"),
        ({"k": 10}, "between 1 and the bank's 9 rows. Received: k=10"),
        ({"temperature": 0.0}, "`temperature` must be a number above 0"),
        ({"weights": np.ones(4)}, r"shape \(9,\)"),
        ({"block_size": 0}, "`block_size` must be a positive int"),
        ({"features": np.ones(16, np.float32)}, r"features \(B, D\)"),
        ({"features": np.ones((2, 5), np.float32)}, "one dimension"),
        ({"bank": np.ones((0, 16), np.float32)}, r"bank \(M, D\)"),
    ],
)
def test_score_names_what_does_not_fit(options, message):
    with pytest.raises(ValueError, match=message):
        ood_score(**{"features": unit_rows(0, 2), "bank": unit_rows(1, 9), **options})


@pytest.mark.parametrize("method", ["kmeans", "kcenter"])
def test_compressed_duplicates_score_as_the_whole_bank(method):
    distinct = unit_rows(0, 6)
    bank = np.repeat(distinct, [1, 2, 3, 4, 5, 35], axis=0)
    centers, weights = compress(bank, 6, method)
    np.testing.assert_allclose(sorted(weights), np.array([1, 2, 3, 4, 5, 35]) / 50, rtol=1e-6)
    features = unit_rows(1, 8)
    np.testing.assert_allclose(
        ood_score(features, centers, weights=weights), ood_score(features, bank), rtol=1e-4
    )


@pytest.mark.parametrize("method", ["kmeans", "kcenter"])
def test_compression_keeps_the_order_of_scores(method, monkeypatch):
    bank = np.concatenate([np.roll(unit_rows(i, 80, spread=0.1), i, axis=1) for i in range(5)])
    features = np.concatenate([bank[::20], unit_rows(9, 20, spread=20.0)])
    for full_kmeans in (True, False):  # Mini-batches are for sets too large to test with.
        monkeypatch.setattr(bank_lib, "_FULL_KMEANS_DISTANCES", 1e9 if full_kmeans else 0)
        centers, weights = compress(bank, 40, method, seed=3)
        assert len(centers) <= 40
        np.testing.assert_allclose(np.linalg.norm(centers, axis=1), 1.0, rtol=1e-5)
        np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-5)
        assert weights.min() > 0.0
        both = np.stack([ood_score(features, centers, weights=weights), formula(features, bank)])
        assert np.corrcoef(both)[0, 1] > 0.97
        again = compress(bank, 40, method, seed=3)
        np.testing.assert_array_equal(again[0], centers)


def test_kcenter_takes_features_that_cover_the_set():
    bank = unit_rows(0, 200)
    centers, _ = compress(bank, 30, "kcenter")
    assert {row.tobytes() for row in centers} <= {row.tobytes() for row in bank}
    gap = 1.0 - (bank @ centers.T).max(axis=1).max()
    closest = (centers @ centers.T)[np.triu_indices(len(centers), 1)].max()
    # Greedy k-center: no feature is farther from the centers than these are from one another.
    assert gap <= 1.0 - closest + 1e-6


def test_a_bank_no_larger_than_its_size_stays():
    bank = unit_rows(0, 5)
    centers, weights = compress(bank, 5)
    np.testing.assert_array_equal(centers, bank)
    np.testing.assert_allclose(weights, 0.2)


def test_compress_names_what_is_wrong():
    bank = unit_rows(0, 5)
    for arguments, message in [
        ((bank, 0), "`size` must be a positive int"),
        ((bank, 3, "random"), "'kcenter', 'kmeans'"),
        ((bank[0], 3), r"shape \(M, D\)"),
        ((np.where(bank > 0.5, np.nan, bank), 3), "not finite"),
    ]:
        with pytest.raises(ValueError, match=message):
            compress(*arguments)


def test_features_are_those_of_the_preprocessed_images():
    backbone, images = conv_backbone(), photographs()
    extractor = FeatureExtractor(backbone, resolution=(16, 24), mean=(0.1, 0.2, 0.3))
    prepared = image_ops.resize(image_ops.resize(images, 16, 24), 32, 32) / 255.0
    expected = backbone((prepared - [0.1, 0.2, 0.3]) / image_ops.IMAGENET_STD).numpy()
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    features = extract_features(extractor, images, batch_size=7, verbose=0)
    assert features.dtype == np.float32
    np.testing.assert_allclose(features, expected, atol=1e-5)
    dataset = tf.data.Dataset.from_tensor_slices((images, np.arange(24))).batch(5)
    np.testing.assert_allclose(extract_features(extractor, dataset, verbose=0), features, atol=1e-6)


def test_one_trace_serves_all_batches_and_later_training(capsys):
    backbone = VisionTransformer(image_size=16, patch_size=8, hidden_dim=12, depth=1, num_heads=2)
    extractor, images = FeatureExtractor(backbone), photographs()
    before = extract_features(extractor, images, batch_size=10)
    assert "3/3" in capsys.readouterr().out
    backbone.set_weights([-0.5 * w for w in backbone.get_weights()])
    after = extract_features(extractor, images[:20], batch_size=10, verbose=0)
    assert capsys.readouterr().out == ""
    assert extractor.compiled_call.experimental_get_tracing_count() == 1
    np.testing.assert_allclose(np.linalg.norm(after, axis=1), 1.0, rtol=1e-5)
    assert np.abs(after - before[:20]).max() > 0.1


def test_low_precision_backbone_gets_exact_images_and_gives_float32_features():
    images = photographs(size=32).astype(np.float32) + 0.4
    backbone = conv_backbone("mixed_bfloat16")
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        features = extract_features(backbone, images, verbose=0)
    finally:
        keras.config.set_dtype_policy("float32")
    expected = backbone(image_ops.normalize(images)).numpy().astype(np.float32)
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    assert features.dtype == np.float32
    # Rounding 0-255 to bfloat16 before normalizing would be off by more than this.
    np.testing.assert_allclose(features, expected, atol=1e-4)


def test_extractor_survives_saving(tmp_path):
    backbone = VisionTransformer(
        image_size=(16, 24), patch_size=8, hidden_dim=12, depth=1, num_heads=2
    )
    extractor, images = FeatureExtractor(backbone, resolution=20), photographs()
    extractor.save(tmp_path / "extractor.keras")
    loaded = keras.models.load_model(tmp_path / "extractor.keras")
    assert loaded.image_size == (16, 24)
    np.testing.assert_array_equal(loaded(images), extractor(images))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (photographs()[0], r"One image takes a batch axis"),
        (photographs()[:0], "At least one image"),
        (photographs()[..., :1], r"\(batch, height, width, 3\)"),
        (
            (photographs().astype(np.int32) * 257),
            r"`images` must hold values in 0-255.*Received: .*",
        ),
        (
            image_ops.normalize(photographs()).numpy(),
            "0-255. Pass pixels: they are normalized here",
        ),
        (tf.data.Dataset.from_tensor_slices(photographs()), r"One image takes a batch axis"),
        (tf.data.Dataset.from_tensors(photographs()).repeat(), "repeats forever"),
        (tf.data.Dataset.from_tensors({"a": photographs()}), "batches of images"),
    ],
)
def test_extraction_names_wrong_images(images, message):
    with pytest.raises(ValueError, match=message):
        extract_features(conv_backbone(), images, verbose=0)


def test_extractor_names_wrong_backbones():
    free = keras.Sequential([keras.Input((None, None, 3)), keras.layers.Conv2D(4, 3)])
    with pytest.raises(ValueError, match="`image_size` is needed"):
        FeatureExtractor(free)
    with pytest.raises(ValueError, match=r"\(batch, dimension\).*\(None, 30, 30, 4\)"):
        FeatureExtractor(free, image_size=32)
    with pytest.raises(ValueError, match="`image_size` must be a positive int or a pair"):
        FeatureExtractor(free, image_size=-1)


def test_a_compressed_bank_of_standardized_features_scores_like_the_whole_one():
    generator = np.random.default_rng(0)
    kinds = generator.normal(size=(20, 12))
    features = (kinds.repeat(40, axis=0) + 0.1 * generator.normal(size=(800, 12))).astype("float32")
    centers, weights = compress(features, 20, metric="euclidean")
    # The means of clusters, not brought to norm 1.
    nearest = np.linalg.norm(kinds[:, np.newaxis] - centers, axis=-1).min(axis=1)
    assert nearest.max() < 0.1
    probes = generator.normal(size=(50, 12)).astype("float32")
    found = ood_score(probes, centers, metric="euclidean", weights=weights)
    whole = ood_score(probes, features, metric="euclidean")
    np.testing.assert_allclose(found, whole, rtol=0.1, atol=0.5)
    with pytest.raises(ValueError, match=r"metric.*cosines"):
        compress(features, 20, metric="cosines")
