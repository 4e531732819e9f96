"""How a recipe writes values that change during training.

| form | value |
|---|---|
| `0.04` | the same at every step |
| `{"linear": [0.04, 0.01]}` | linear from the first number to the second over the run |
| `{"cosine": [0.996, 1.0]}` | the same, along half a cosine |
| `{"warmup_cosine": [0.004, 1e-6], "warmup_epochs": 30}` | from 0 to the first, then cosine |

`linear` takes `"from_epoch"` and `"to_epoch"`, between which the value changes. Each form takes
`"for_batch_size": 256`: the first number is then meant for steps of 256 images and is scaled in
proportion to `batch_size`. A number of steps may be written as `{"epochs": 1.5}`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from sddns_tf.cli.errors import UsageError

_KEYS = {
    "linear": ("from_epoch", "to_epoch", "for_batch_size"),
    "cosine": ("for_batch_size",),
    "warmup_cosine": ("warmup_epochs", "for_batch_size"),
}


class Length(NamedTuple):
    """Length of a run.

    Attributes:
        epochs: Epochs of the whole run.
        steps_per_epoch: Steps per epoch.
        batch_size: Images per step, over all devices.
    """

    epochs: int
    steps_per_epoch: int
    batch_size: int

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    def steps_in(self, epochs: float) -> int:
        """Return the steps in a number of epochs, which may be fractional, up to the whole run."""
        return min(round(epochs * self.steps_per_epoch), self.steps)


def value_of(key: str, form: Any, length: Length) -> Any:
    """Return the value that a form stands for in a run of the given length.

    Args:
        key: Name of the argument, such as `"model.teacher_temperature"`, for error messages.
        form: Value in the recipe. Anything but a dictionary is returned as it is.
        length: `Length` of the run.

    Returns:
        A schedule, a number of steps, or `form` itself.

    Raises:
        UsageError: If the dictionary has none of the forms above.

    Example:
    >>> value_of("model.weight_decay", {"cosine": [0.04, 0.4]}, Length(10, 100, 64))
    WarmupCosine(0.04, 0.4, total_steps=1000)
    """
    if not isinstance(form, dict):
        return form
    _check(key, form)
    if "epochs" in form:
        return length.steps_in(form["epochs"])

    from sddns_tf import schedules

    (kind,) = _KEYS.keys() & form.keys()
    start, end = form[kind]
    if "for_batch_size" in form:
        start *= length.batch_size / form["for_batch_size"]
    if kind == "linear":
        first = length.steps_in(form.get("from_epoch", 0))
        return schedules.Linear(
            start, end, length.steps_in(form.get("to_epoch", length.epochs)), first
        )
    warmup = length.steps_in(form.get("warmup_epochs", 0))
    return schedules.WarmupCosine(start, end, length.steps, warmup)


def _check(key: str, form: dict[str, Any]) -> None:
    numbers = [value for value in form.values() if not isinstance(value, list)]
    if set(form) == {"epochs"} and all(map(_is_number, numbers)):
        return
    kinds = _KEYS.keys() & form.keys()
    if len(kinds) == 1:
        (kind,) = kinds
        ends = form[kind]
        if (
            isinstance(ends, list)
            and len(ends) == 2
            and all(map(_is_number, ends + numbers))
            and set(form) <= {kind, *_KEYS[kind]}
            and form.get("for_batch_size", 1) > 0
            and form.get("from_epoch", 0) <= form.get("to_epoch", math.inf)
        ):
            return
    raise UsageError(
        f'{key} must be a number, {{"epochs": N}}, or one of {", ".join(_KEYS)} with two numbers, '
        f'such as {{"linear": [0.04, 0.01]}}. Received: {form}'
    )


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and value >= 0
