"""Real photographs that all tests share; they come inside scikit-image's wheel."""

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
if "PYTEST_XDIST_WORKER" in os.environ:
    # There is a worker for each core: more threads in each would wait for one another.
    os.environ.setdefault("TF_NUM_INTRAOP_THREADS", "1")
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import skimage.data
from hypothesis import settings

# The same examples on every machine, and no limit that a slow one could miss.
settings.register_profile("sddns_tf", deadline=None, derandomize=True)
settings.load_profile("sddns_tf")


# Files that take longest go first, so that no worker is left alone with one at the end. The cells
# go last of these: what they leave in memory slows down whatever comes after.
LONGEST = (
    "test_commands_in_text", "test_cli_devices", "test_research", "test_self_distillation",
    "test_scale", "test_reliability", "test_examples_gallery", "test_edge", "test_validation",
    "test_benchmark", "test_cli_train", "test_code_in_text", "test_cli_score", "test_callbacks",
    "test_detector", "test_serving", "test_cli_evaluate", "test_local", "test_views",
    "test_local_exports", "test_solar_cells",
)  # fmt: skip


def pytest_collection_modifyitems(items):
    """Order files by `LONGEST`, the others as they come."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


def _collect_and_forget():
    """Free what can be freed, and keep the garbage collector from looking at the rest again."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish():
    """Make the garbage collector look less often, and not at what was imported.

    Tracing makes many objects, and each full collection looked at all of TensorFlow again: a sixth
    of the time of the tests.
    """
    _collect_and_forget()
    gc.set_threshold(20_000, 10, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    """Free what a file's tests have left, so that it does not slow down the next file's."""
    yield
    if nextitem is None or nextitem.path != item.path:
        _collect_and_forget()


def _crops(photograph, count, size, seed):
    """`count` squares of `size` pixels at random places of one photograph."""
    generator = np.random.default_rng(seed)
    tops, lefts = (generator.integers(0, side - size, count) for side in photograph.shape[:2])
    crops = [
        photograph[top : top + size, left : left + size]
        for top, left in zip(tops, lefts, strict=True)
    ]
    return np.stack(crops)


@pytest.fixture(scope="session")
def fork(tmp_path_factory):
    """What starts a function as a process, without the time that importing TensorFlow takes."""
    from forks import Fork

    started = []

    def start(function, *arguments, **environment):
        folder = tmp_path_factory.mktemp("fork")
        started.append(Fork(folder, function, *arguments, **environment))
        return started[-1]

    yield start
    for one in started:
        one.kill()


@pytest.fixture(scope="session")
def photos():
    """Eight color photographs, uint8 (8, 64, 64, 3)."""
    sources = (
        skimage.data.astronaut(),
        skimage.data.chelsea(),
        skimage.data.coffee(),
        skimage.data.rocket(),
    )
    # Every second pixel, so that a crop shows more than one smooth patch.
    photos = np.concatenate(
        [_crops(source[::2, ::2], 2, 64, seed) for seed, source in enumerate(sources)]
    )
    photos.setflags(write=False)
    return photos


@pytest.fixture(scope="session")
def normal():
    """In-distribution images: one texture, uint8 (32, 32, 32, 3)."""
    brick = np.repeat(skimage.data.brick()[..., np.newaxis], 3, axis=-1)
    images = _crops(brick[::2, ::2], 32, 32, seed=0)
    images.setflags(write=False)
    return images


@pytest.fixture(scope="session")
def auxiliary():
    """Unrelated photographs of a higher resolution, uint8 (32, 48, 48, 3)."""
    images = np.concatenate(
        [
            _crops(skimage.data.chelsea(), 16, 48, seed=0),
            _crops(skimage.data.coffee(), 16, 48, seed=1),
        ]
    )
    images.setflags(write=False)
    return images


def _grass_and_person(count, seed, height=32, width=32):
    """As many crops of grass as of a person, uint8 (2 * count, height, width, 3)."""
    grass = np.repeat(skimage.data.grass()[..., np.newaxis], 3, axis=-1)
    generator = np.random.default_rng(seed)
    images = []
    for photograph in (grass, skimage.data.astronaut()):
        tops = generator.integers(0, photograph.shape[0] - height, count)
        lefts = generator.integers(0, photograph.shape[1] - width, count)
        images += [
            photograph[top : top + height, left : left + width]
            for top, left in zip(tops, lefts, strict=True)
        ]
    return np.stack(images)


@pytest.fixture(scope="session")
def grass_and_person():
    """A function that gives images half of which are normal to `grass_detector`."""
    return _grass_and_person


@pytest.fixture(scope="session")
def grass_detector():
    """A detector of what is not grass: a tiny untrained transformer, 49 calibration images."""
    import keras

    from sddns_tf.detector import Detector
    from sddns_tf.vit import VisionTransformer

    keras.utils.set_random_seed(0)
    backbone = VisionTransformer(32, patch_size=8, hidden_dim=32, depth=2, num_heads=2)
    bank, first, last = (
        _grass_and_person(count, seed)[:count] for count, seed in ((60, 0), (39, 1), (49, 2))
    )
    detector = Detector.from_images(backbone, bank, first, 0.1, bank_size=40, verbose=0)
    detector.recalibrate(last, verbose=0)  # The scores are another variable now.
    return detector


@pytest.fixture(scope="session")
def served(grass_detector, tmp_path_factory):
    """Folder of version 1 of `grass_detector`, exported for TensorFlow Serving."""
    from sddns_tf import export

    folder = tmp_path_factory.mktemp("served") / "models" / "grass"
    images = _grass_and_person(8, 3)
    return export.saved_model(grass_detector, folder, images=images, training_data="grass")


TINY = (
    "--set=backbone.stages=[8,16]", "--set=views.local_views=1", "--set=head.num_prototypes=16",
    "--set=head.hidden_dim=16", "--set=head.bottleneck_dim=8", "--batch_size=16", "--epochs=2",
    "--steps_per_epoch=2", "--calibration_share=0.2",
)  # fmt: skip


def _tiles(photograph, count, side=32):
    """Squares of a photograph, in rows."""
    columns = photograph.shape[1] // side
    corners = [(side * (i // columns), side * (i % columns)) for i in range(count)]
    squares = np.stack([photograph[y : y + side, x : x + side] for y, x in corners])
    return squares if squares.ndim == 4 else np.repeat(squares[..., None], 3, axis=-1)


@pytest.fixture(scope="session")
def image_sets(tmp_path_factory):
    """Folder of `.npz` files: grass (120 images), fresh (40), coffee (60), brick (30)."""
    folder = tmp_path_factory.mktemp("image_sets")
    sets = {
        "grass": _tiles(skimage.data.grass(), 120),
        "fresh": _tiles(skimage.data.grass()[256:], 40),
        "coffee": _tiles(skimage.data.coffee(), 60),
        "brick": _tiles(skimage.data.brick(), 30),
    }
    for name, images in sets.items():
        np.savez(folder / name, images=images, labels=np.arange(len(images)) % 2)
    return folder


@pytest.fixture(scope="session")
def train_on(image_sets):
    """A function that runs `sddns train` on grass, tiny, with further options."""
    from sddns_tf.cli import train

    def run(output_dir, *arguments):
        train.main(
            [
                f"--data=npz:{image_sets}/grass.npz",
                f"--auxiliary=npz:{image_sets}/coffee.npz",
                f"--output_dir={output_dir}",
                *TINY,
                *map(str, arguments),
            ]
        )

    return run


@pytest.fixture(scope="session")
def trained(train_on, tmp_path_factory):
    """Folder of a finished `sddns train` on grass."""
    folder = tmp_path_factory.mktemp("trained")
    train_on(folder)
    return folder
