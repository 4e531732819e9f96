"""What the annotations of the package mean."""

from typing import Any, TypeAlias

# An array or a tensor of any number type: TensorFlow tells type checkers nothing about its own.
Array: TypeAlias = Any
