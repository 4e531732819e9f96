"""On which devices a training runs."""

import json
import os

from sddns_tf.cli.console import say
from sddns_tf.cli.errors import UsageError

STRATEGIES = ("auto", "none", "mirrored", "multi_worker")


def strategy(name, logical_devices=None):
    """Return the distribution strategy, to be made before anything else of TensorFlow is used.

    Args:
        name: One of `STRATEGIES`.
        logical_devices: None, or into how many devices to divide the CPU, to try out on one
            machine what will run on several GPUs.

    Returns:
        `tf.distribute.Strategy`, or None for one device.

    Raises:
        UsageError: If the environment does not fit.
    """
    import tensorflow as tf

    if logical_devices is not None:
        parts = [tf.config.LogicalDeviceConfiguration()] * logical_devices
        cpu = tf.config.list_physical_devices("CPU")[0]
        try:
            tf.config.set_logical_device_configuration(cpu, parts)
        except RuntimeError as error:
            raise UsageError(f"--logical_devices comes too late: {error}") from error
    if name == "multi_worker":
        if "TF_CONFIG" not in os.environ:
            raise UsageError(
                "--strategy=multi_worker needs the environment variable TF_CONFIG. Received: none"
            )
        return _several(tf.distribute.MultiWorkerMirroredStrategy())
    if name != "none" and (logical_devices or 0) > 1:
        devices = [f"CPU:{index}" for index in range(logical_devices)]
        return _several(tf.distribute.MirroredStrategy(devices))
    several = len(tf.config.list_physical_devices("GPU")) > 1
    if name == "mirrored" or (name == "auto" and several):
        return _several(tf.distribute.MirroredStrategy())
    return None


def worker_index(name):
    """Tell which of several machines this is. The first one writes the results.

    Args:
        name: One of `STRATEGIES`.

    Returns:
        Int, 0 for the first and for the only one.
    """
    if name != "multi_worker":
        return 0
    try:
        return int(json.loads(os.environ["TF_CONFIG"]).get("task", {}).get("index", 0))
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"TF_CONFIG must be JSON, as TensorFlow wants it. Received: {os.environ['TF_CONFIG']}"
        ) from error


def _several(strategy):
    """Return the strategy, or None where it has one replica and nothing is to be distributed."""
    if strategy.num_replicas_in_sync == 1:
        say("One device only: training without a strategy")
        return None
    return strategy
