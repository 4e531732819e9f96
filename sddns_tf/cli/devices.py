"""The devices on which training runs."""

from __future__ import annotations

import json
import os
from typing import Any

from sddns_tf.cli.console import say
from sddns_tf.cli.errors import UsageError

STRATEGIES = ("auto", "none", "mirrored", "multi_worker")


def strategy(name: str, logical_devices: int | None = None) -> Any:
    """Return the distribution strategy. Call it before anything else that uses TensorFlow.

    Args:
        name: One of `STRATEGIES`.
        logical_devices: Number of devices into which to divide the CPU, to try out on one machine
            what will later run on several GPUs; None to leave it whole.

    Returns:
        `tf.distribute.Strategy`, or None for one device.

    Raises:
        UsageError: If `TF_CONFIG` is missing or TensorFlow has started already.
    """
    import tensorflow as tf

    if logical_devices is not None:
        parts = [tf.config.LogicalDeviceConfiguration()] * logical_devices
        cpu = tf.config.list_physical_devices("CPU")[0]
        try:
            tf.config.set_logical_device_configuration(cpu, parts)
        except RuntimeError as error:
            raise UsageError(
                "--logical_devices must be set before TensorFlow starts. "
                f"Received: {logical_devices} ({error})"
            ) from error
    if name == "multi_worker":
        if "TF_CONFIG" not in os.environ:
            raise UsageError(
                "--strategy=multi_worker needs the environment variable TF_CONFIG. Received: none"
            )
        return _several(tf.distribute.MultiWorkerMirroredStrategy())
    if name != "none" and logical_devices is not None and logical_devices > 1:
        devices = [f"CPU:{index}" for index in range(logical_devices)]
        return _several(tf.distribute.MirroredStrategy(devices))
    several = len(tf.config.list_physical_devices("GPU")) > 1
    if name == "mirrored" or (name == "auto" and several):
        return _several(tf.distribute.MirroredStrategy())
    return None


def worker_index(name: str) -> int:
    """Return the index of this machine among several. The first one writes the results.

    Args:
        name: One of `STRATEGIES`.

    Returns:
        Int, 0 for the first or only machine.
    """
    if name != "multi_worker":
        return 0
    try:
        config = json.loads(os.environ["TF_CONFIG"])
        task = config.get("task", {})
        # A chief comes before the worker with the index 0.
        after_chief = "chief" in config.get("cluster", {}) and task.get("type") != "chief"
        return int(task.get("index", 0)) + after_chief
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"TF_CONFIG must be JSON as TensorFlow defines it. Received: {os.environ['TF_CONFIG']}"
        ) from error


def _several(strategy: Any) -> Any:
    """Return the strategy, or None if it has only one replica."""
    if strategy.num_replicas_in_sync == 1:
        say("Only one device: training without a distribution strategy")
        return None
    return strategy
