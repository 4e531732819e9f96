"""Training on several devices, as the commands that the documentation gives."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from tensorflow.python.util._pywrap_util_port import IsMklEnabled
from tiny import no_pictures

import sddns_tf
from sddns_tf.cli.main import main

pytestmark = pytest.mark.slow
ROOT = pathlib.Path(sddns_tf.__file__).parents[1]
OPTIONS = (
    "--set=backbone.stages=[8]", "--set=views.local_views=0", "--set=head.num_prototypes=16",
    "--set=head.hidden_dim=16", "--set=head.bottleneck_dim=8", "--batch_size=16",
    "--set=optimizer.type=SGD", "--set=model.negative_weight=1", "--calibration_share=0.2",
    "--checkpoint_every=1",
)  # fmt: skip


def data_of(image_sets):
    return f"--data=npz:{image_sets}/grass.npz", f"--auxiliary=npz:{image_sets}/coffee.npz"


def command(image_sets, output_dir, arguments):
    return ["train", *data_of(image_sets), f"--output_dir={output_dir}", *OPTIONS, *arguments]


@pytest.fixture
def start(image_sets, fork):
    """A function that starts `sddns train` in a process."""

    def start(output_dir, *arguments, run=main, **environment):
        return fork(run, command(image_sets, output_dir, arguments), **environment)

    return start


def without_pictures(arguments):
    """The command for what is not kept."""
    with no_pictures():
        return main(arguments)


def finish(process):
    assert process.wait() == 0, process.errors[-4000:]
    return process.errors


def as_a_user_starts_it(image_sets, output_dir, *arguments):
    """What `python -m sddns_tf train` writes to stdout and stderr."""
    # Without what silences TensorFlow, but with as many threads as the forks have, and with oneDNN
    # only if they have it: both change sums in the last bit.
    inherited = {k: v for k, v in os.environ.items() if k != "TF_CPP_MIN_LOG_LEVEL"}
    inherited["TF_ENABLE_ONEDNN_OPTS"] = str(int(IsMklEnabled()))
    done = subprocess.run(
        [sys.executable, "-m", "sddns_tf", *command(image_sets, output_dir, arguments)],
        capture_output=True,
        text=True,
        env={**inherited, "PYTHONPATH": str(ROOT)},
        timeout=400,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout, done.stderr


def weights(folder):
    return keras.saving.load_model(folder / "model.keras").get_weights()


def assert_equal_runs(one, other, tolerance):
    for old, new in zip(weights(one), weights(other), strict=True):
        np.testing.assert_allclose(old, new, rtol=0, atol=tolerance)


def steps_saved(folder):
    return {path.name for path in (folder / "checkpoint").glob("step-*.npz")}


def wait_for_step(folder, process, step, seconds=300):
    limit = time.monotonic() + seconds
    while not any(name >= f"step-{step:08d}.npz" for name in steps_saved(folder)):
        assert process.poll() is None, process.errors[-4000:]
        assert time.monotonic() < limit
        time.sleep(0.02)


LENGTH = ("--epochs=4", "--steps_per_epoch=3")
TWO_DEVICES = ("--logical_devices=2", *LENGTH)


@pytest.fixture(scope="module")
def one_device(image_sets, tmp_path_factory):
    """Folder of a run on one device that nothing stops, in this process."""
    folder = tmp_path_factory.mktemp("one_device")
    assert without_pictures(command(image_sets, folder, ("--strategy=none", *LENGTH))) == 0
    return folder


def test_two_devices_killed_and_resumed_end_as_an_unbroken_run(
    start, one_device, image_sets, tmp_path
):
    """And as one device does."""
    process = start(tmp_path / "run", *TWO_DEVICES, run=without_pictures)
    wait_for_step(tmp_path / "run", process, 4)
    process.kill()
    errors = finish(start(tmp_path / "run", *TWO_DEVICES, run=without_pictures))
    assert "from step 0" not in errors and "from step" in errors
    out, errors = as_a_user_starts_it(image_sets, tmp_path / "unbroken", *TWO_DEVICES)
    assert "detector.keras" in out
    assert "Traceback" not in errors and "absl::InitializeLog" not in errors
    assert_equal_runs(tmp_path / "unbroken", tmp_path / "run", 0)
    assert_equal_runs(one_device, tmp_path / "unbroken", 1e-4)
    log = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert len(log) >= 5


def workers(start, folder, *arguments, **options):
    """Two processes that train together."""
    sockets = [socket.socket() for _ in range(2)]
    for one in sockets:
        one.bind(("localhost", 0))
    addresses = [f"localhost:{one.getsockname()[1]}" for one in sockets]
    for one in sockets:
        one.close()
    started = []
    for index in range(2):
        task = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}}
        options["TF_CONFIG"] = json.dumps(task)
        started.append(start(folder, "--strategy=multi_worker", *arguments, **options))
    return started


def test_two_processes_killed_and_resumed_equal_one(start, one_device, tmp_path):
    first, second = workers(start, tmp_path / "two", *LENGTH, run=without_pictures)
    wait_for_step(tmp_path / "two", first, 2)
    for process in (first, second):
        process.kill()
    assert not (tmp_path / "two" / "detector.keras").exists()
    for process in workers(start, tmp_path / "two", *LENGTH):
        finish(process)
    assert_equal_runs(one_device, tmp_path / "two", 1e-4)
    assert (tmp_path / "two" / "detector.keras").is_file()
