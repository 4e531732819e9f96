"""Pictures show what they say, and are written whole or not at all."""

import itertools
import stat

import matplotlib
import numpy as np
import pytest
import skimage.data
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from sddns_tf import plots

LONG_NAMES = [f"Out-of-distribution photographs number {i}, test split, 32 px" for i in range(8)]


def photographs(count, height=32, width=32):
    """Crops of color photographs, uint8 `(count, height, width, 3)`."""
    sources = [skimage.data.astronaut(), skimage.data.coffee(), skimage.data.chelsea()]
    rng = np.random.default_rng(0)
    crops = []
    for source, _ in zip(itertools.cycle(sources), range(count), strict=False):
        top = rng.integers(0, source.shape[0] - 4 * height + 1)
        left = rng.integers(0, source.shape[1] - 4 * width + 1)
        crops.append(source[top : top + 4 * height : 4, left : left + 4 * width : 4])
    return np.stack(crops)


def normal_scores(mean, size=400, seed=0):
    return np.random.default_rng(seed).normal(mean, 0.5, size)


def rendered(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3]


def drawn_texts(figure):
    """Every text that is drawn, with its box in pixels."""
    every_axes = figure.findobj(matplotlib.axes.Axes)
    axises = [axis for axes in every_axes for axis in (axes.xaxis, axes.yaxis)]
    of_axises = {id(text) for axis in axises for text in axis.findobj(Text)}
    texts = [text for text in figure.findobj(Text) if id(text) not in of_axises]
    for axis in axises:
        if not axis.axes.axison:
            continue
        low, high = sorted(axis.get_view_interval())
        ticks = axis.get_major_ticks()
        texts += [tick.label1 for tick in ticks if low <= tick.get_loc() <= high]
        texts += [axis.label, axis.get_offset_text()]
    texts = [text for text in texts if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in texts]


def overlap(first, second):
    """Whether two boxes share more than a pixel of rounding."""
    width = min(first.x1, second.x1) - max(first.x0, second.x0)
    height = min(first.y1, second.y1) - max(first.y0, second.y0)
    return width > 1 and height > 1


def assert_readable(figure, titles_on_images=False):
    """No two texts overlap, none leaves the figure, and none lies on an image."""
    rendered(figure)
    texts = drawn_texts(figure)
    assert texts
    for (a, first), (b, second) in itertools.combinations(texts, 2):
        assert not overlap(first, second), f"{a!r} overlaps {b!r}"
    for text, box in texts:
        assert box.x0 >= -1 and box.y0 >= -1, f"{text!r} leaves the figure"
        assert box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1, f"{text!r} leaves"
    for axes in figure.findobj(matplotlib.axes.Axes):
        assert axes.bbox.width > 10 and axes.bbox.height > 40, "an axes has no room"
        if axes.images:
            for text, box in texts:
                assert not overlap(box, axes.get_window_extent()), f"{text!r} lies on an image"


def test_the_readability_check_sees_overlaps_and_cut_texts():
    figure = Figure(figsize=(3, 3))
    figure.text(0.3, 0.5, "one text")
    assert_readable(figure)
    second = figure.text(0.35, 0.51, "another")
    with pytest.raises(AssertionError, match="overlaps"):
        assert_readable(figure)
    second.set_position((0.95, 0.1))
    with pytest.raises(AssertionError, match="leaves"):
        assert_readable(figure)
    axes = Figure(figsize=(3, 3)).subplots()
    axes.set(xlim=(0, 1), xticks=[0.5, 0.51], xticklabels=["tick", "other"])
    with pytest.raises(AssertionError, match="overlaps"):
        assert_readable(axes.figure)


# save


@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.SVG", b"<?xml")]
)
def test_save_writes_the_format_of_the_suffix(tmp_path, name, start):
    figure = plots.contact_sheet(photographs(2))
    path = plots.save(figure, str(tmp_path / "new folder" / name))
    assert path == tmp_path / "new folder" / name
    assert path.read_bytes().startswith(start)
    assert list(path.parent.iterdir()) == [path]
    if name.endswith("png"):
        size = figure.get_size_inches() * 150
        assert Image.open(path).size == pytest.approx(tuple(size), abs=1)


def test_save_replaces_a_file_and_keeps_ordinary_permissions(tmp_path):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"earlier")
    ordinary = tmp_path / "ordinary"
    ordinary.touch()
    earlier = path.stat().st_ino
    plots.save(plots.contact_sheet(photographs(1)), path)
    assert path.stat().st_ino != earlier  # renamed into place, not written over
    assert np.asarray(Image.open(path).convert("RGB")).std() > 10
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE(ordinary.stat().st_mode)


def test_save_that_fails_leaves_the_earlier_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "sheet.png"
    path.write_bytes(b"earlier")
    figure = plots.contact_sheet(photographs(1))

    def interrupted(target, **_):
        with open(target, "wb") as file:
            file.write(b"half a pic")
        raise KeyboardInterrupt

    monkeypatch.setattr(figure, "savefig", interrupted)
    with pytest.raises(KeyboardInterrupt):
        plots.save(figure, path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["picture", "picture.doc"])
def test_save_names_the_formats_it_knows(tmp_path, name):
    with pytest.raises(ValueError, match=rf"\.png.*Received: '.*{name}'"):
        plots.save(plots.contact_sheet(photographs(1)), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_figures_touch_no_global_state(tmp_path):
    from matplotlib import pyplot

    settings, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    figures = pyplot.get_fignums()
    figure = plots.roc_curves(normal_scores(0), {"far": normal_scores(1)})
    plots.save(figure, tmp_path / "roc.png")
    assert type(figure) is Figure
    assert figure.dpi == 150
    assert pyplot.get_fignums() == figures
    assert dict(matplotlib.rcParams) == settings
    assert matplotlib.get_backend() == backend


# score_histograms


def bars(axes):
    """The outlines of the in-distribution and the out-of-distribution histogram."""
    outlines = [p for p in axes.patches if isinstance(p, matplotlib.patches.StepPatch)]
    return [patch.get_data() for patch in outlines if not patch.get_fill()]


def test_score_histograms_show_each_set_beside_the_normal_images():
    normal = normal_scores(-5)
    sets = {"near": normal_scores(-4.5, seed=1), "far": normal_scores(-2, 100, seed=2)}
    figure = plots.score_histograms(normal, sets, threshold=-4.0)
    near, far = figure.axes
    assert near.get_title("left").startswith("near  (AUROC 0.7")
    assert far.get_title("left") == "far  (AUROC 1.000, 100% flagged)"
    for axes, scores in ((near, sets["near"]), (far, sets["far"])):
        for drawn, values in zip(bars(axes), (normal, scores), strict=True):
            heights = [
                np.sum((values >= a) & (values < b))
                for a, b in itertools.pairwise([*drawn.edges[:-1], np.inf])
            ]
            assert sum(heights) == len(values)
            np.testing.assert_allclose(drawn.values, heights / np.max(heights))
        lines = [line for line in axes.lines if line.get_label() == "threshold"]
        assert [list(line.get_xdata()) for line in lines] == [[-4.0, -4.0]]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["in-distribution", "out-of-distribution", "threshold"]
    flagged = np.mean(normal > -4.0)
    assert f"-4 flags {flagged:.1%} of in-distribution" in figure.get_supxlabel()
    assert "beyond" not in figure.get_supxlabel()  # normal distributions fit whole
    assert near.get_xlim() == (min(normal.min(), sets["near"].min()), sets["far"].max())
    assert_readable(figure)


def test_score_histograms_stretch_the_axis_where_normal_scores_would_be_one_bar():
    rng = np.random.default_rng(0)
    normal, near = rng.normal(-20, 0.5, 1000), rng.normal(-19, 0.5, 500)
    far = rng.uniform(0, 350, 500)
    figure = plots.score_histograms(normal, {"near": near, "far": far}, threshold=-19.0)
    for scores, drawn in zip((normal, near), bars(figure.axes[0]), strict=True):
        assert np.count_nonzero(drawn.values) > 8
        counts, _ = np.histogram(scores, drawn.edges)
        np.testing.assert_allclose(drawn.values, counts / counts.max())
        assert counts.sum() == len(scores)
    assert figure.axes[0].get_xlim() == (normal.min(), far.max())
    ticks = figure.axes[1].get_xticks()
    assert len(ticks) >= 6
    assert np.sum(ticks < -15) >= 2
    assert "stretched around the in-distribution scores" in figure.get_supxlabel()
    assert_readable(figure)


def test_score_histograms_of_long_tails_stop_short_and_say_so():
    rng = np.random.default_rng(3)
    normal = rng.normal(size=1000)
    tail = np.concatenate([rng.normal(2, 1, 990), np.full(10, 1e6)])
    figure = plots.score_histograms(normal, {"tail": tail}, threshold=500.0)
    low, high = figure.axes[0].get_xlim()
    assert low == normal.min()
    assert tail[:990].max() < high < 20
    note = " ".join(figure.get_supxlabel().split())
    assert "10 of 2000 scores lie beyond the axis and are counted in its outermost bins" in note
    assert "It lies right of the axis" in note
    assert not figure.axes[0].lines
    shares = bars(figure.axes[0])[1].values
    assert shares[-1] / shares.sum() == pytest.approx(10 / 1000)
    assert_readable(figure)


def test_score_histograms_flag_what_the_detector_flags(grass_detector, grass_and_person):
    # Among them are the calibration images, one of which has the score of the threshold.
    images = np.concatenate([grass_and_person(49, 2)[:49], grass_and_person(20, 7)])
    found = grass_detector.predict(images, verbose=0)
    scores, threshold = found["ood_score"], grass_detector.threshold
    assert (scores == np.float32(threshold)).any()
    figure = plots.score_histograms(scores, {"mixed": scores}, threshold)
    assert f"{found['is_ood'].mean():.0%} flagged" in figure.axes[0].get_title("left")
    assert f"flags {found['is_ood'].mean():.1%} of" in " ".join(figure.get_supxlabel().split())


@pytest.mark.parametrize("value", [0.0, -7.25, 1e9, 1e-9])
def test_score_histograms_of_one_value(value):
    figure = plots.score_histograms([value], {"same": [value, value]}, threshold=value)
    low, high = figure.axes[0].get_xlim()
    assert low < value < high
    # An image at the threshold is not flagged, as `Detector` has it.
    assert "AUROC 0.500, 0% flagged" in figure.axes[0].get_title("left")
    assert_readable(figure)


@pytest.mark.parametrize("plot", [plots.score_histograms, plots.roc_curves])
@pytest.mark.parametrize("count", [1, 8])
def test_long_names_stay_readable(plot, count):
    sets = {name: normal_scores(i, seed=i) for i, name in enumerate(LONG_NAMES[:count])}
    figure = plot(normal_scores(0), sets)
    assert_readable(figure)
    shown = " ".join(" ".join(text for text, _ in drawn_texts(figure)).split())
    assert all(name in shown for name in sets)


@pytest.mark.parametrize("plot", [plots.score_histograms, plots.roc_curves])
def test_bad_scores_are_named(plot):
    with pytest.raises(ValueError, match=r"`ood_scores` must be a dict.*Received: dict"):
        plot([0.0], {})
    with pytest.raises(ValueError, match=r"`ood_scores` must be a dict.*Received: list"):
        plot([0.0], [1.0])
    with pytest.raises(ValueError, match=r"`ood_scores\['far'\]` must be finite"):
        plot([0.0], {"far": [np.nan]})
    with pytest.raises(ValueError, match=r"`id_scores` must have shape \(N,\)"):
        plot([[0.0]], {"far": [1.0]})


def test_a_bad_threshold_is_named():
    with pytest.raises(ValueError, match=r"`threshold` must be a finite number. Received: nan"):
        plots.score_histograms([0.0], {"far": [1.0]}, threshold=np.nan)


# roc_curves


def test_roc_curves_are_the_rates_at_every_threshold():
    normal = np.round(normal_scores(0), 1)
    sets = {"near": np.round(normal_scores(0.3, 100, seed=1), 1), "below": normal_scores(-1, 50)}
    figure = plots.roc_curves(normal, sets)
    axes = figure.axes[0]
    chance, *curves = axes.lines
    assert chance.get_label() == "0.500  chance"
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    for line, (name, scores) in zip(curves, sets.items(), strict=True):
        pairs = (scores[:, None] > normal) + 0.5 * (scores[:, None] == normal)
        assert line.get_label() == f"{pairs.mean():.3f}  {name}"
        assert line.get_label() in legend
        thresholds = np.unique([*normal, *scores])
        rates = {(np.mean(normal >= t), np.mean(scores >= t)) for t in thresholds} | {(0.0, 0.0)}
        drawn = np.stack(line.get_data(), axis=1)
        assert {tuple(point) for point in drawn} <= rates
        assert np.trapezoid(drawn[:, 1], drawn[:, 0]) == pytest.approx(pairs.mean())
    assert legend[-1] == "0.500  chance"
    assert_readable(figure)


def test_many_roc_curves_can_be_told_apart():
    sets = {str(i): normal_scores(i / 4, 20, seed=i) for i in range(20)}
    figure = plots.roc_curves(normal_scores(0), sets)
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines}
    assert len(looks) == 21
    assert_readable(figure)


# contact_sheet


def shown_images(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_contact_sheet_shows_images_as_they_are():
    images = photographs(11, height=24, width=32)
    scores = np.linspace(-6.2, 3.0, 11)
    titles = [f"image {i}" for i in range(11)]
    figure = plots.contact_sheet(images, scores, titles, columns=4, title="Eleven photographs")
    assert len(figure.axes) == 12
    np.testing.assert_array_equal(shown_images(figure), images)
    captions = [axes.get_title() for axes in figure.axes[:11]]
    assert captions[0] == "image 0\n-6.200"
    assert [caption.split("\n")[0] for caption in captions] == titles
    drawn = [float(caption.split("\n")[1]) for caption in captions]
    np.testing.assert_allclose(drawn, scores, rtol=1e-3, atol=1e-9)
    assert figure.get_suptitle() == "Eleven photographs"
    assert_readable(figure)
    boxes = [axes.get_window_extent() for axes in figure.axes[:11]]
    assert boxes[1].x0 > boxes[0].x1  # from left to right,
    assert boxes[4].y1 < boxes[0].y0  # then downwards
    assert boxes[0].width / boxes[0].height == pytest.approx(32 / 24, rel=0.02)
    assert min(box.width for box in boxes) > 0.9 * 150


def test_contact_sheet_rounds_floats_and_clips_overshoot():
    images = photographs(2).astype("float32")
    figure = plots.contact_sheet(images + 0.3)
    np.testing.assert_array_equal(shown_images(figure), np.clip(images, 0, 255))
    overshoot = np.where(images < 128, -5.0, 260.0)
    figure = plots.contact_sheet(overshoot)
    assert set(np.unique(shown_images(figure))) == {0, 255}
    assert not np.any(shown_images(plots.contact_sheet(np.zeros((1, 4, 4, 3), "float32"))))


def test_contact_sheet_cuts_long_titles():
    titles = ["a photograph of a cat that looks at the camera", "", "x" * 60]
    figure = plots.contact_sheet(photographs(3), titles=titles)
    captions = [axes.get_title() for axes in figure.axes]
    assert captions[0].startswith("a photograph of") and captions[0].endswith("…")
    assert captions[1] == ""
    assert all(caption.count("\n") <= 1 for caption in captions)
    assert_readable(figure)


@pytest.mark.parametrize("count", [1, 9, 21])
def test_contact_sheets_of_any_length_stay_readable(count):
    title = "A title of the sheet that is longer than one image is wide"
    images, titles = photographs(count, 16, 16), ["two lines of a long title"] * count
    figure = plots.contact_sheet(images, np.full(count, -1.5e-7), titles, title=title)
    assert len(shown_images(figure)) == count
    assert_readable(figure)
    width = figure.axes[0].get_window_extent().width
    assert width > 0.85 * 150  # titles take no room from the images


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": np.zeros((4, 4, 3))}, r"\(B, H, W, 3\).*Received: shape \(4, 4, 3\)"),
        ({"images": np.zeros((2, 4, 4, 1))}, r"Received: shape \(2, 4, 4, 1\)"),
        ({"images": np.zeros((0, 4, 4, 3))}, r"Received: shape \(0, 4, 4, 3\)"),
        ({"images": np.full((1, 4, 4, 3), np.nan)}, "0-255. Received: values from nan"),
        ({"images": np.full((1, 4, 4, 3), 1000)}, "0-255. Received: values from 1000 to 1000"),
        ({"images": np.linspace(0, 1, 48).reshape(1, 4, 4, 3)}, "0-255. .* from 0 to 1"),
        ({"images": np.linspace(-2.1, 2.6, 48).reshape(1, 4, 4, 3)}, "0-255. .*-2.1 to 2.6"),
        ({"scores": [1.0]}, "`scores` must have one entry .* 2 images. Received: 1"),
        ({"titles": ["a", "b", "c"]}, "`titles` must have one entry .* 2 images. Received: 3"),
        ({"scores": [1.0, np.inf]}, "`scores` must be finite"),
        ({"columns": 0}, "`columns` must be at least 1. Received: 0"),
    ],
)
def test_bad_contact_sheets_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.contact_sheet(**({"images": photographs(2)} | arguments))


# most_and_least_anomalous


def test_most_and_least_anomalous_show_both_ends_in_order():
    images = photographs(30, 16, 16)
    scores = np.random.default_rng(5).permutation(30) - 40.0
    figure = plots.most_and_least_anomalous(images, scores, count=10)
    ranked = sorted(range(30), key=lambda i: scores[i])
    expected = ranked[:10] + ranked[::-1][:10]
    np.testing.assert_array_equal(shown_images(figure), images[expected])
    captions = [axes.get_title() for axes in figure.axes if axes.images]
    assert [float(caption) for caption in captions] == [scores[i] for i in expected]
    least, most = figure.subfigs
    assert least.get_suptitle() == "Least anomalous (lowest scores)"
    assert most.get_suptitle() == "Most anomalous (highest scores)"
    assert_readable(figure)
    assert least.axes[0].get_window_extent().y0 > most.axes[0].get_window_extent().y1


@pytest.mark.parametrize(("total", "each"), [(2, 1), (5, 2), (20, 8)])
def test_no_image_is_at_both_ends(total, each):
    scores = np.arange(total, dtype="float32")
    figure = plots.most_and_least_anomalous(photographs(total, 8, 8), scores)
    captions = [float(axes.get_title()) for axes in figure.axes if axes.images]
    assert captions == [*range(each), *range(total - 1, total - 1 - each, -1)]
    assert_readable(figure)


def test_bad_ends_are_named():
    with pytest.raises(ValueError, match=r"same length, at least 2. Received: 3 and 2"):
        plots.most_and_least_anomalous(photographs(3), [0.0, 1.0])
    with pytest.raises(ValueError, match=r"same length, at least 2. Received: 1 and 1"):
        plots.most_and_least_anomalous(photographs(1), [0.0])
    with pytest.raises(ValueError, match=r"`count` must be at least 1. Received: 0"):
        plots.most_and_least_anomalous(photographs(2), [0.0, 1.0], count=0)
    with pytest.raises(ValueError, match=r"`images` must have shape \(B, H, W, 3\)"):
        plots.most_and_least_anomalous(np.zeros((2, 4, 4)), [0.0, 1.0])


# attention_overlay


def random_attention(batch, heads, patches):
    logits = np.random.default_rng(1).normal(size=(batch, heads, 1 + patches, 1 + patches))
    weights = np.exp(2 * logits)
    return weights / weights.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(32, 32, 8, 8), (48, 32, 6, 4)])
def test_attention_overlay_maps_are_the_cls_row(height, width, rows, columns):
    images = photographs(2, height, width)
    attention = random_attention(2, 3, rows * columns)
    figure = plots.attention_overlay(images, attention, per_head=True)
    grid = np.array(figure.axes[:-1]).reshape(2, 5)
    names = [axes.get_title() for axes in grid[0]]
    assert names == ["Image", "Mean of heads", "Head 1", "Head 2", "Head 3"]
    for index in range(2):
        np.testing.assert_array_equal(grid[index, 0].images[0].get_array(), images[index])
        cls_row = attention[index, :, 0, 1:].reshape(3, rows, columns)
        for axes, expected in zip(grid[index, 1:], [cls_row.mean(axis=0), *cls_row], strict=True):
            background, overlay = axes.images
            assert background.get_array().shape == (height, width)
            scaled = (expected - expected.min()) / (expected.max() - expected.min())
            np.testing.assert_allclose(overlay.get_array(), scaled, atol=1e-5)
            assert overlay.get_extent() == background.get_extent()
    assert_readable(figure)
    assert len(plots.attention_overlay(images, attention).axes) == 2 * 2 + 1


def test_attention_is_drawn_where_the_patch_is():
    attention = np.full((1, 2, 17, 17), 1 / 17)
    attention[0, :, 0] = 0.01
    attention[0, :, 0, 1 + 2] = 0.5  # first row, third of four columns
    figure = plots.attention_overlay(np.zeros((1, 32, 32, 3), "uint8"), attention)
    picture = rendered(figure).astype(float).sum(axis=-1)
    box = figure.axes[1].get_window_extent()
    top = round(figure.bbox.height - box.y1)
    shown = picture[top : top + round(box.height), round(box.x0) : round(box.x1)]
    y, x = np.unravel_index(shown.argmax(), shown.shape)
    assert int(4 * y / shown.shape[0]) == 0
    assert int(4 * x / shown.shape[1]) == 2


def test_uniform_attention_is_drawn_without_a_peak():
    figure = plots.attention_overlay(photographs(1), np.full((1, 2, 17, 17), 1 / 17))
    assert not np.any(figure.axes[1].images[1].get_array())
    assert_readable(figure)


@pytest.mark.parametrize(
    ("attention", "message"),
    [
        (np.zeros((2, 17, 17)), r"\(B, heads, 1 \+ N, 1 \+ N\). Received: shape \(2, 17, 17\)"),
        (np.zeros((2, 3, 17, 16)), r"Received: shape \(2, 3, 17, 16\)"),
        (np.zeros((1, 3, 17, 17)), "one entry for each image. Received: 1 for 2 images"),
        (np.zeros((2, 3, 16, 16)), "tile the 32 x 32 image. Received: 15 patches"),
        (np.zeros((2, 3, 1, 1)), "Received: 0 patches"),
        (np.full((2, 3, 17, 17), -1.0), "probabilities.*Received: values from -1 to -1"),
        (np.full((2, 3, 17, 17), np.nan), "probabilities.*Received: values from nan"),
        (np.full((2, 3, 17, 17), 7.0), "probabilities.*Received: values from 7 to 7"),
    ],
)
def test_bad_attention_is_named(attention, message):
    with pytest.raises(ValueError, match=message):
        plots.attention_overlay(photographs(2), attention)


# training_curves


def whole_history(epochs):
    steps = np.arange(epochs)
    return {
        "loss": list(6 * np.exp(-steps / 30)),
        "positive_loss": list(4 * np.exp(-steps / 30)),
        "negative_loss": list(2 * np.exp(-steps / 30)),
        "teacher_entropy": list(8.3 - 0.02 * steps),
        "feature_std": list(0.02 + 4e-4 * steps),
        "learning_rate": list(1e-6 * np.cos(steps / epochs)),
        "weight_decay": [0.04] * epochs,
        "teacher_momentum": list(1 - 4e-3 * np.exp(-steps / 10)),
        "val_loss": list(7 * np.exp(-steps / 30)),
        "val_positive_loss": list(5 * np.exp(-steps / 30)),
        "val_negative_loss": list(3 * np.exp(-steps / 30)),
        "val_teacher_entropy": list(8.4 - 0.02 * steps),
    }


@pytest.mark.parametrize("epochs", [1, 7, 1000])
def test_training_curves_draw_every_number(epochs):
    history = whole_history(epochs)
    figure = plots.training_curves(history)
    assert_readable(figure)
    losses, entropy, *single = figure.axes
    assert losses.get_legend().get_title().get_text() == "loss"
    labels = [text.get_text() for text in losses.get_legend().get_texts()]
    assert labels == [name for name in history if name.endswith("loss")]
    labels = [text.get_text() for text in entropy.get_legend().get_texts()]
    assert labels == ["teacher_entropy", "val_teacher_entropy"]
    titles = [axes.get_title("left") for axes in single]
    assert titles == ["feature std", "learning rate", "weight decay", "teacher momentum"]
    drawn = {line.get_label(): line for axes in figure.axes for line in axes.lines}
    drawn |= {axes.get_title("left").replace(" ", "_"): axes.lines[0] for axes in single}
    for name, values in history.items():
        np.testing.assert_array_equal(drawn[name].get_xdata(), np.arange(1, epochs + 1))
        np.testing.assert_array_equal(drawn[name].get_ydata(), values)
    assert {axes.get_xlabel() for axes in figure.axes} == {"epoch"}


def test_long_names_of_losses_stay_readable():
    names = [f"term_{i}_of_the_objective_on_auxiliary_images_loss" for i in range(8)]
    figure = plots.training_curves({name: [3.0, 2.0, i] for i, name in enumerate(names)})
    assert_readable(figure)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == names


def test_training_curves_show_where_training_broke():
    history = whole_history(20)
    history["loss"][12:] = [np.nan] * 8
    history["feature_std"][4] = np.inf
    figure = plots.training_curves(history)
    assert_readable(figure)
    assert figure.axes[0].get_xlabel() == "epoch\nloss: not finite from 13"
    assert figure.axes[0].get_xlim()[1] > 20
    spread = next(axes for axes in figure.axes if axes.get_title("left") == "feature std")
    assert spread.get_xlabel() == "epoch\nfeature_std: not finite from 5"
    np.testing.assert_array_equal(np.isnan(spread.lines[0].get_ydata()), np.arange(20) == 4)


def test_one_number_is_seen():
    before = rendered(plots.training_curves({"loss": [np.nan]}))
    after = rendered(plots.training_curves({"loss": [3.0]}))
    assert figure_color_pixels(after) > figure_color_pixels(before) == 0


def figure_color_pixels(picture):
    blue = [int(plots.BLUE[i : i + 2], 16) for i in (1, 3, 5)]
    return np.count_nonzero((picture == blue).all(axis=-1))


def test_a_quantity_measured_less_often_is_not_drawn_against_epochs():
    figure = plots.training_curves({"loss": [3.0, 2.0, 1.0, 0.5], "val_auroc": [0.6, 0.9]})
    losses, auroc = figure.axes
    assert losses.get_xlabel() == "epoch"
    assert auroc.get_xlabel() == "evaluation"
    assert auroc.get_title("left") == "val auroc"
    np.testing.assert_array_equal(auroc.lines[0].get_xdata(), [1, 2])
    assert_readable(figure)


@pytest.mark.parametrize(
    ("history", "message"),
    [
        ({}, "`history` must be a dict.*Received: dict"),
        ([1.0, 2.0], "`history` must be a dict.*Received: list"),
        ({"loss": []}, r"`history\['loss'\]`.*Received: shape \(0,\)"),
        ({"loss": [[1.0]]}, r"`history\['loss'\]`.*Received: shape \(1, 1\)"),
    ],
)
def test_bad_histories_are_named(history, message):
    with pytest.raises(ValueError, match=message):
        plots.training_curves(history)
