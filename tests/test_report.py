"""The report: what it says, that it asks nothing of the network, and how it fits a screen."""

import base64
import html
import html.parser
import io
import pathlib
import re
import shutil
import subprocess
import types

import numpy as np
import pytest
from PIL import Image

from sddns_tf import evaluation, report
from sddns_tf.report import charts

VOID = {"meta", "img", "br"}
NAUGHTY = '<b>"naughty" & co'


class FakeDetector:
    """Scores an image by its mean; has a backbone that attends to the brightest patch."""

    threshold = 100.0
    false_positive_rate = 0.1
    is_local = False

    def __init__(self, attends):
        self.extractor = types.SimpleNamespace(
            backbone=types.SimpleNamespace(patch_size=4),
            image_size=(8, 16),
            resolution=(8, 16),
            preprocess=lambda images: np.asarray(images, "float32") / 255.0,
        )
        if attends:
            self.extractor.backbone.attention_weights = self.attention_weights

    def attention_weights(self, images):
        """Class token to the patches of 8 x 16 pixels: 2 rows of 4."""
        patches = np.asarray(images).reshape(-1, 2, 4, 4, 4, 3).mean((2, 4, 5)).reshape(-1, 8)
        weights = np.zeros((len(patches), 2, 9, 9), "float32")
        weights[:, :, 0, 1:] = (patches / patches.sum(1, keepdims=True))[:, None]
        return weights


def found(count=40):
    """An evaluation with two sets of images of 8 x 16 pixels."""
    generator = np.random.default_rng(0)
    means = {"bright": 150, NAUGHTY: 110, evaluation.FRESH: 80}
    images, answers, rows, features = {}, {}, {}, {}
    for name, mean in means.items():
        level = generator.normal(mean, 20, (count, 1, 1, 1))
        images[name] = np.clip(level + np.zeros((1, 8, 16, 3)), 0, 255).astype("uint8")
        scores = images[name].mean((1, 2, 3)).astype("float32")
        answers[name] = {
            "ood_score": scores,
            "p_value": np.linspace(0.01, 1, count)[np.argsort(np.argsort(-scores))],
            "is_ood": scores > 100,
        }
        features[name] = generator.normal(size=(count, 5))
    for name in means:
        rows[name] = evaluation.table_row(
            answers[evaluation.FRESH]["ood_score"], answers[name], name == evaluation.FRESH, 20, 0
        )
    return evaluation.Evaluation(rows, images, answers, 100.0, 0.1, (0.9, 0.85, 0.95), features)


class Page(html.parser.HTMLParser):
    """Tags that are open, addresses, and the text of each kind of element."""

    def __init__(self, text):
        super().__init__()
        self.open, self.addresses, self.texts = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        if tag not in VOID:
            self.open.append(tag)
        self.addresses += [v for k, v in attributes if k in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)


@pytest.fixture(scope="module")
def text():
    return report.html(found(), FakeDetector(True), "Parts & more", {"seed": 0, "x": "<i>"})


def test_page_is_whole_and_asks_nothing_of_the_network(text):
    page = Page(text)
    assert page.open == []
    assert len(page.addresses) > 20
    assert all(address.startswith("data:image/png;base64,") for address in page.addresses)
    assert not re.search(r"url\(|@import|<script|https?:", text)
    assert NAUGHTY not in text
    assert NAUGHTY in "".join(page.texts["td"])
    assert "Parts & more" in page.texts["h1"]
    assert "<i>" in "".join(page.texts["dd"])


def test_page_tells_the_table(text):
    one = found()
    rows = [
        " ".join(Page(row).texts.get("td", []))
        for row in re.findall(r"<tr>.*?</tr>", text, re.DOTALL)
    ]
    for name, row in one.rows.items():
        (cells,) = (cells for cells in rows if cells.startswith(name))
        for value, low, high in row.values():
            assert f"{value:.3f} {low:.3f}\u2013{high:.3f}" in cells


def test_galleries_show_what_they_say(text):
    one = found()
    parts = dict(re.findall(r"<h2>([^<]+)</h2>(.*?)(?=<h2>|</body>)", text, re.S))
    scores = {name: answer["ood_score"] for name, answer in one.answers.items()}
    assert f"bright #{scores['bright'].argmax()}<br>" in parts["Most anomalous"]
    assert "accepted" in parts["Missed"]
    assert "flagged" not in parts["Missed"].partition("</p>")[2]
    shown = re.findall(r"fresh normal images #(\d+)<br>", parts["False alarms"])
    alarms = np.flatnonzero(scores[evaluation.FRESH] > 100)
    highest = alarms[np.argsort(-scores[evaluation.FRESH][alarms])][:12]
    assert {int(index) for index in shown} == set(highest)
    nearest = np.abs(scores["bright"] - 100).argmin()
    assert f"bright #{nearest}<br>" in parts["Borderline"]


def test_pictures_are_of_the_images_that_captions_name():
    one = found()
    page = report.html(one, FakeDetector(False))
    figures = re.findall(
        r'<figure><div class="[^"]+"><span><img src="data:image/png;base64,([^"]+)".*?'
        r"<figcaption>(.+?) #(\d+)<br>",
        page,
    )
    assert len(figures) > 20
    for png, name, index in figures:
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB"))
        expected = one.images[html.unescape(name)][int(index)]
        np.testing.assert_array_equal(shown, expected)


def test_attention_is_bright_where_the_network_looks():
    image = np.full((8, 16, 3), 50, "uint8")
    image[4:, 8:12] = 250
    (attended,) = evaluation.attention_maps(FakeDetector(True), image[None])
    assert attended.shape == (2, 4)
    assert np.unravel_index(attended.argmax(), (2, 4)) == (1, 2)
    assert evaluation.attention_maps(FakeDetector(False), image[None]) is None
    without = report.html(found(), FakeDetector(False))
    assert 'class="attention"' not in without


def test_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = report.write(tmp_path / "new" / "report.html", found(), FakeDetector(False))
    before = path.read_text()

    def fail(unfinished, text, encoding):
        unfinished.write_bytes(text[:100].encode(encoding))
        raise OSError("full")

    monkeypatch.setattr(pathlib.Path, "write_text", fail)
    with pytest.raises(OSError, match="full"):
        report.write(path, found(), FakeDetector(False))
    assert path.read_text() == before
    assert [one.name for one in path.parent.iterdir()] == ["report.html"]


def test_histogram_has_its_peak_where_scores_are():
    chart = charts.histograms(np.full(9, 0.2), np.full(9, 0.8), 1, 0.5, (0.0, 1.0))
    peaks = []
    for d in re.findall(r'class="area s\d" d="M([^"]*)Z"', chart):
        points = [tuple(map(float, point.split())) for point in d.split("L")]
        top = min(y for _, y in points)
        peaks.append(np.mean([x for x, y in points if y == top]))
    low, high = 54, 340 - 12
    np.testing.assert_allclose((np.array(peaks) - low) / (high - low), [0.2, 0.8], atol=0.02)


def test_evaluate_refuses_what_it_cannot_name():
    with pytest.raises(ValueError, match="`ood` must hold at least one set"):
        evaluation.evaluate(None, None, {})


def test_markdown_and_csv_agree():
    one = found()
    rows = [line.split(",") for line in evaluation.csv(one).splitlines()]
    assert rows[0][:4] == ["set", "images", "auroc", "auroc_low"]
    bright = next(row for row in rows if row[0] == "bright")
    assert f"| bright | 40 | {float(bright[2]):.3f} (" in evaluation.markdown(one)


# --- In a browser ------------------------------------------------------------------------------


def browser():
    path = shutil.which("chromium") or shutil.which("google-chrome")
    if path is None:
        pytest.skip("there is no chromium")
    return path


def in_browser(text, folder, *options):
    """The page after it was laid out."""
    (folder / "page.html").write_text(text)
    command = [
        browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", *options, f"file://{folder / 'page.html'}",
    ]  # fmt: skip
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout


MEASURE = """<script>const e=document.documentElement;if(WIDTH)e.style.width=WIDTH+"px";
const wide=[...document.querySelectorAll("body *")].filter(x=>x.getBoundingClientRect().right>
e.getBoundingClientRect().right+1).length;const s=getComputedStyle(document.body);
document.title=[wide,s.backgroundColor,s.color,e.getBoundingClientRect().width,
getComputedStyle(document.querySelector("thead")).display].join("|")</script>"""


def laid_out(text, folder, width, *options):
    # Chromium has no window of less than 500 pixels: a phone is a narrower page in it.
    narrow = width if width < 500 else 0
    text = text.replace("</body>", MEASURE.replace("WIDTH", str(narrow)) + "</body>")
    size = f"--window-size={max(width, 500)},900"
    dumped = in_browser(text, folder, "--dump-dom", size, *options)
    return re.search("<title>(.*?)</title>", dumped)[1].split("|")


def brightness(color):
    """Of `rgb(r, g, b)`: the sum of the channels."""
    return sum(map(int, re.findall(r"\d+", color)))


def test_nothing_sticks_out_on_phone_or_desktop(text, tmp_path):
    wide, light, ink, width, head = laid_out(text, tmp_path, 1200)
    assert (wide, width) == ("0", "1200")
    assert light == "rgb(255, 255, 255)"
    assert head == "table-header-group"
    dark_mode = "--blink-settings=preferredColorScheme=0"
    wide, dark, dark_ink, width, head = laid_out(text, tmp_path, 360, dark_mode)
    assert (wide, width, head) == ("0", "360", "none")
    assert brightness(dark) < 150 < brightness(dark_ink)
    assert brightness(ink) < 150


def test_prints(text, tmp_path):
    in_browser(text, tmp_path, f"--print-to-pdf={tmp_path / 'page.pdf'}")
    assert (tmp_path / "page.pdf").read_bytes()[:4] == b"%PDF"
