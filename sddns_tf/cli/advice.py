"""What a step of a training run is spent on, and what would make a long run shorter."""

from __future__ import annotations

import pathlib
from typing import Any

from sddns_tf.cli.schedule_forms import Length

# A pass forward and backward takes about three times as long as one forward.
_BACKWARD = 3.0
_LONG = 3600.0
# Linux' names for what multiplies in bfloat16: AVX-512 BF16 and AMX.
_BFLOAT16_UNITS = {"avx512_bf16", "amx_bf16"}


def shares(model: Any) -> dict[str, float]:
    """Return the share of a step that each setting takes, counted in pixels.

    Args:
        model: `SelfDistillation`.

    Returns:
        Dictionary from the setting, as an option names it, to a number from 0 to 1, the largest
        first. What is left is for the two global views, which cannot be switched off.
    """
    views, negatives = model.views, model.negatives
    local = views.local_views * (views.local_size / views.image_size) ** 2
    sources = 0 if negatives is None else 2 if negatives.source == "both" else 1
    costs = {
        f"views.local_views={views.local_views}": _BACKWARD * local,
        f"negatives.source={getattr(negatives, 'source', None)}": _BACKWARD * sources * (1 + local),
    }
    whole = 2 * (1 + _BACKWARD) + sum(costs.values())
    ordered = sorted(costs.items(), key=lambda item: -item[1])
    return {setting: cost / whole for setting, cost in ordered if cost}


def multiplies_in_bfloat16() -> bool:
    """Return whether the processor has units for bfloat16, as far as Linux tells."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return not _BFLOAT16_UNITS.isdisjoint(text.split())


def lines(model: Any, config: dict[str, Any], length: Length, seconds: float) -> list[str]:
    """Return what to say of a run once the time of its steps is known.

    Args:
        model: `SelfDistillation`.
        config: Resolved configuration of the run.
        length: Length of the whole run.
        seconds: Seconds that a step takes.

    Returns:
        Lines of text: what takes most of a step and, where the run would take more than an hour,
        what would make it shorter.
    """
    import tensorflow as tf

    found = [f"{share:.0%} for {setting}" for setting, share in shares(model).items()]
    said = [f"Of a step, about {', '.join(found)}"] if found else []
    if seconds * length.steps <= _LONG:
        return said
    shorter = []
    if not tf.config.list_physical_devices("GPU"):
        if config["backbone"]["type"] != "convnet":
            shorter.append("--backbone=convnet, which suits a CPU")
        if config["precision"] == "float32" and multiplies_in_bfloat16():
            shorter.append("--precision=mixed_bfloat16, for which this processor has units")
    if model.views.local_views:
        shorter.append("--set=views.local_views=0")
    in_an_hour = max(1, int(_LONG / seconds))
    epochs = in_an_hour // length.steps_per_epoch
    if epochs:
        shorter.append(f"--epochs={epochs}")
    else:
        shorter.append(f"--epochs=1 --steps_per_epoch={in_an_hour}")
    return [*said, f"This takes more than an hour on this machine. Shorter: {'; '.join(shorter)}"]
