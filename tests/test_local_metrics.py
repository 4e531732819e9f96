"""Metrics of maps against brute force, masks in `evaluate`, MVTec AD's layout, pictures of maps."""

import keras
import numpy as np
import pytest
import skimage.data
from PIL import Image
from scipy import ndimage
from test_local import bricks, convnet, damaged

import sddns_tf
from sddns_tf import evaluation, metrics, plots, report, shifts
from sddns_tf.data import mvtec
from sddns_tf.detector import Detector


@pytest.fixture(scope="module")
def maps_and_masks():
    """Six maps with two damaged regions in each of four; scores tie often."""
    rng = np.random.default_rng(0)
    masks = np.zeros((6, 24, 20), bool)
    for mask in masks[:4]:
        for _ in range(2):
            y, x, height, width = rng.integers([0, 0, 1, 1], [18, 14, 6, 6])
            mask[y : y + height, x : x + width] = True
    maps = np.round(rng.normal(size=masks.shape) + 0.9 * masks, 1)
    return maps, masks


def regions_of(masks):
    """Pixels of each region, with neighbors on diagonals."""
    for index, mask in enumerate(masks):
        labels, count = ndimage.label(mask, np.ones((3, 3)))
        for number in range(1, count + 1):
            region = np.zeros(masks.shape, bool)
            region[index] = labels == number
            yield region


def test_pixel_auroc_is_the_share_of_pairs(maps_and_masks):
    maps, masks = maps_and_masks
    high, low = maps[masks][:, np.newaxis], maps[~masks]
    expected = np.mean((high > low) + 0.5 * (high == low))
    assert metrics.pixel_auroc(maps, masks) == pytest.approx(expected)


@pytest.mark.parametrize("limit", [0.05, 0.3, 1.0])
def test_aupro_is_that_of_one_threshold_after_another(maps_and_masks, limit):
    maps, masks = maps_and_masks
    rates, overlaps = [0.0], [0.0]
    for threshold in np.unique(maps)[::-1]:
        flagged = maps >= threshold
        rates.append(flagged[~masks].mean())
        overlaps.append(np.mean([flagged[region].mean() for region in regions_of(masks)]))
    # The area under straight lines, on a grid so fine that where it is cut does not matter.
    grid = np.linspace(0, limit, 200_001)
    values = np.interp(grid, rates, overlaps)
    expected = np.mean((values[1:] + values[:-1]) / 2)
    assert metrics.aupro(maps, masks, limit) == pytest.approx(expected, abs=1e-5)


def test_perfect_maps_and_those_of_chance():
    rng = np.random.default_rng(0)
    masks = np.zeros((10, 50, 50), bool)
    masks[:5, 10:20, 10:20] = True
    assert metrics.aupro(masks.astype(float), masks) == pytest.approx(1.0)
    # At chance the overlap is the false positive rate, and the area half of the limit.
    assert metrics.aupro(rng.random(masks.shape), masks) == pytest.approx(0.15, abs=0.02)


def test_region_recall_counts_small_regions_as_much(maps_and_masks):
    maps, masks = maps_and_masks
    expected = np.mean([(maps[region] > 0.5).mean() for region in regions_of(masks)])
    assert metrics.region_recall(maps, masks, 0.5) == pytest.approx(expected)


def test_maps_at_the_size_of_masks_are_bilinear():
    maps = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    image = Image.fromarray(maps[1]).resize((20, 15), Image.Resampling.BILINEAR)
    np.testing.assert_allclose(metrics.at_size(maps, (15, 20))[1], image, atol=1e-5)


def test_wrong_maps_are_named(maps_and_masks):
    maps, masks = maps_and_masks
    for wrong, message in (
        ((maps[:, :3], masks), "bring maps to the size of masks with `at_size`"),
        ((maps, masks.astype(int)), "`masks` be bool"),
        ((maps * np.nan, masks), "`maps` must be finite"),
        ((maps, masks & False), "damaged and sound pixels. Received: 0 of"),
    ):
        for metric in (metrics.pixel_auroc, metrics.aupro):
            with pytest.raises(ValueError, match=message):
                metric(*wrong)
    with pytest.raises(ValueError, match="`limit` must be above 0"):
        metrics.aupro(maps, masks, 0.0)


def test_aupro_does_not_count_what_rises_at_the_limit_itself():
    # Three of ten sound pixels score above the damage, so nothing is found below a rate of 0.3.
    maps = np.float32([[[3, 3, 3, 2, 1, 1, 1, 1, 1, 1, 1]]])
    masks = maps == 2
    assert metrics.aupro(maps, masks, 0.3) == 0.0
    assert metrics.aupro(maps, masks, 0.2999) == 0.0
    assert metrics.aupro(maps, masks, 0.6) == pytest.approx(0.5)


# --- Evaluation --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def detector():
    return Detector.from_images(
        convnet(), bricks(60, 0), bricks(59, 1), layers="auto", bank_size=300, verbose=0
    )


@pytest.fixture(scope="module")
def found(detector):
    masks = np.zeros((12, 64, 64), bool)
    masks[:, 20:36, 36:52] = True
    return evaluation.evaluate(
        detector,
        bricks(30, 2),
        {"checks": damaged(12, 3)},
        masks={"checks": masks},
        files={"checks": [f"part_{index}.png" for index in range(12)]},
        resamples=20,
        verbose=0,
    )


def test_features_of_a_local_detector_are_means_over_places_where_there_are_labels(detector):
    normal, labels = bricks(20, 5), np.arange(20) % 2
    normal[labels == 1] //= 4  # A class that differs by its brightness.
    found = evaluation.evaluate(
        detector,
        normal,
        {"checks": damaged(4, 3)},
        labels,
        (normal, labels),
        resamples=10,
        verbose=0,
    )
    assert found.knn_accuracy[0] > 0.9
    assert found.features["checks"].shape == (4, detector.bank.shape[1])


def test_evaluate_measures_maps_where_there_are_masks(detector, found):
    row = found.pixels["checks"]
    assert row["pixel_auroc"] > 0.9 and 0.6 < row["aupro"] <= 1 and 0.5 < row["region_recall"] <= 1
    maps = [found.answers[name]["anomaly_map"] for name in ("checks", evaluation.FRESH)]
    masks = np.zeros((42, 64, 64), bool)
    masks[:12, 20:36, 36:52] = True
    scores = metrics.at_size(np.concatenate(maps), (64, 64))
    assert row["aupro"] == pytest.approx(metrics.aupro(scores, masks))
    assert f"| checks | {row['pixel_auroc']:.3f} | {row['aupro']:.3f} |" in evaluation.markdown(
        found
    )
    assert found.as_dict()["pixels"]["checks"] == row


def test_the_report_shows_overlays_and_names_files(detector, found):
    page = report.html(found, detector)
    for text in (
        "Least anomalous",
        "part_3.png",
        "region_recall",
        "all images have the same scale",
    ):
        assert text in page
    assert "checks #" not in page and f"{evaluation.FRESH} #" in page


def test_masks_that_do_not_fit_are_named(detector):
    arguments = (detector, bricks(30, 2), {"checks": damaged(12, 3)})
    for masks in (np.zeros((12, 32, 32), bool), np.zeros((12, 64, 64), "uint8")):
        with pytest.raises(ValueError, match="`masks` must be bool, of the shape of the set"):
            evaluation.evaluate(*arguments, masks={"checks": masks})
    with pytest.raises(ValueError, match="Received: 'others' of shape"):
        evaluation.evaluate(*arguments, masks={"others": np.zeros((12, 64, 64), bool)})
    whole = Detector.from_images(convnet(), bricks(20, 0), bricks(19, 1), verbose=0)
    with pytest.raises(ValueError, match="compared with anomaly maps"):
        evaluation.evaluate(whole, *arguments[1:], masks={"checks": np.zeros((12, 64, 64), bool)})


def test_the_layout_of_mvtec_ad_is_read(tmp_path):
    parts = damaged(3, 0)
    mask = np.zeros((64, 64), "uint8")
    mask[20:36, 36:52] = 255
    for folder, images in {
        "train/good": parts[:2],
        "test/good": parts[:1],
        "test/scratch": parts,
    }.items():
        (tmp_path / folder).mkdir(parents=True)
        for index, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{index:03}.png")
    (tmp_path / "ground_truth" / "scratch").mkdir(parents=True)
    for index in range(3):
        Image.fromarray(mask).save(tmp_path / "ground_truth/scratch" / f"{index:03}_mask.png")
    read = mvtec.load(tmp_path, 64)
    np.testing.assert_array_equal(read.train, parts[:2])
    np.testing.assert_array_equal(read.test["scratch"], parts)
    np.testing.assert_array_equal(read.masks["scratch"], np.stack([mask > 0] * 3))
    assert not read.masks["good"].any() and list(read.test) == ["good", "scratch"]
    assert [path.name for path in read.files["scratch"]] == ["000.png", "001.png", "002.png"]
    small = mvtec.load(tmp_path, (32, 16))
    np.testing.assert_array_equal(small.masks["scratch"][0], (mask > 0)[::2, ::4])
    Image.fromarray(mask[:32]).save(tmp_path / "ground_truth/scratch/001_mask.png")
    with pytest.raises(ValueError, match=r"A mask must have its image's size.*\(64, 32\)"):
        mvtec.load(tmp_path, 64)
    (tmp_path / "ground_truth/scratch/001_mask.png").unlink()
    with pytest.raises(ValueError, match=r"The mask of .*001.png is missing"):
        mvtec.load(tmp_path, 64)
    with pytest.raises(ValueError, match="which is not a folder"):
        mvtec.load(tmp_path / "nowhere", 64)


def test_images_of_that_layout_are_read_like_those_of_any_folder(tmp_path):
    """16 bits, turned by EXIF data, of any format; masks show them turned."""
    turned = Image.Exif()
    turned[0x0112] = 6
    deep = np.arange(48 * 32, dtype=np.uint16).reshape(48, 32) * 42
    for folder in ("train/good", "test/good", "test/crack", "ground_truth/crack"):
        (tmp_path / folder).mkdir(parents=True)
    Image.fromarray(deep).save(tmp_path / "train/good/0.png")
    Image.fromarray(deep).save(tmp_path / "test/good/0.png")
    wide = skimage.data.astronaut()[::8, ::16]
    Image.fromarray(wide).save(tmp_path / "test/crack/0.jpg", exif=turned)
    Image.fromarray(wide).save(tmp_path / "test/crack/1.webp")
    Image.fromarray(wide).save(tmp_path / "test/crack/2.tif", exif=turned)
    for number, shape in enumerate([(32, 64), (64, 32), (32, 64)]):
        Image.fromarray(np.full(shape, 255, np.uint8)).save(
            tmp_path / f"ground_truth/crack/{number}_mask.png"
        )
    read = sddns_tf.data.mvtec.load(tmp_path, 32)
    for folder, images in (("train/good", read.train), ("test/crack", read.test["crack"])):
        expected = sddns_tf.data.load_arrays(f"folder:{tmp_path / folder}", image_size=32)
        np.testing.assert_array_equal(images, expected)
    assert read.masks["crack"].all() and read.masks["crack"].shape == (3, 32, 32)
    with pytest.raises(ValueError, match=r"a mask of its own. Received: .*0_mask\.png"):
        mvtec.masks_of(["a/0.jpg", "b/0.jpg"], tmp_path / "ground_truth/crack", (32, 32))


# --- Pictures ----------------------------------------------------------------------------------


def test_a_picture_shows_only_what_lies_above_the_threshold():
    image = bricks(1, 0)[0]
    quiet = np.full((8, 8), -10.0)
    np.testing.assert_array_equal(plots.overlay(image, quiet, -5.0), image)
    # However far below it lies: nothing is scaled to a map's own range.
    quiet[2, 3] = -5.0
    np.testing.assert_array_equal(plots.overlay(image, quiet, -5.0), image)
    loud = quiet.copy()
    loud[2, 3] = 20.0
    painted = plots.overlay(image, loud, -5.0)
    changed = (painted != image).any(-1)
    assert changed[16:24, 24:32].all() and not changed[:4].any() and not changed[40:].any()
    # The same place of the same score looks the same beside a louder one.
    loud[7, 7] = 500.0
    np.testing.assert_array_equal(plots.overlay(image, loud, -5.0)[:40, :40], painted[:40, :40])


def test_maps_of_different_figures_share_one_scale():
    images, maps = bricks(2, 0), np.random.default_rng(0).normal(-10, 1, (2, 8, 8))
    figures = [plots.anomaly_map(images, scale * maps, -5.0) for scale in (1.0, 0.1)]
    shown = [figure.axes[1].images[0] for figure in figures]
    assert [one.get_clim() for one in shown] == [(0.0, 2.0)] * 2
    np.testing.assert_allclose(shown[0].get_array(), (maps[0] + 22.5) / 17.5, rtol=1e-5)
    masks = np.zeros((2, 64, 64), bool)
    assert len(plots.anomaly_map(images, maps, -5.0, masks=masks, titles=["a", "b"]).axes) == 9
    for wrong, message in (
        ((images, maps[:1], -5.0), "one map, and one mask, for each image"),
        ((images, maps[0], -5.0), "`maps` must be scores of places"),
        ((images, maps, -30.0), "`threshold` must be a number above `lowest`"),
    ):
        with pytest.raises(ValueError, match=message):
            plots.anomaly_map(*wrong)


# --- Local damage as a negative ----------------------------------------------------------------


def test_cut_paste_pastes_a_piece_of_the_image():
    assert "cut_paste" in shifts.BEYOND_THE_PAPER and "cut_paste" not in shifts.NAMES
    keras.utils.set_random_seed(0)
    rng = np.random.default_rng(0)
    images = rng.integers(60, 200, (300, 32, 32, 3)).astype("uint8")
    pasted = shifts.get("cut_paste")(images, seed=[0, 1]).numpy()
    assert pasted.dtype == np.uint8
    changed = (pasted != images).any(-1)
    shares = []
    for index in range(300):
        rows, columns = np.flatnonzero(changed[index].any(1)), np.flatnonzero(changed[index].any(0))
        height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
        shares.append(height * width / 1024)
        # What was pasted is some other place of the image, darker or brighter.
        piece = pasted[index][rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].astype(float)
        if index < 10 and min(height, width) > 3:
            windows = np.lib.stride_tricks.sliding_window_view(
                images[index].astype(float), (height, width, 3)
            )[:, :, 0].reshape(-1, height * width * 3)
            centered = windows - windows.mean(1, keepdims=True)
            own = piece.ravel() - piece.mean()
            cosines = centered @ own / np.linalg.norm(centered, axis=1) / np.linalg.norm(own)
            assert cosines.max() > 0.99
    assert min(shares) > 0.01 and max(shares) < 0.18 and 0.03 < np.mean(shares) < 0.09
    again = shifts.get("cut_paste")(images, seed=[0, 1]).numpy()
    np.testing.assert_array_equal(again, pasted)
    assert (shifts.get("cut_paste")(images, seed=[0, 2]).numpy() != pasted).any()
