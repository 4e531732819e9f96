"""Types for the package's annotations."""

from typing import Any, TypeAlias

# An array or a tensor of any number type: TensorFlow tells type checkers nothing of its tensors.
Array: TypeAlias = Any
