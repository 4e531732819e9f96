"""Registers the classes of `sddns_tf` with Keras without importing Keras.

`import sddns_tf` must be enough for `keras.saving.load_model` to know our classes, but must not
import TensorFlow where nothing needs it. So the classes are registered as soon as Keras is there:
at once if it is already imported, otherwise right after its import.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Mapping
from typing import Any

_REGISTERED = (
    "callbacks",
    "convnet",
    "detector",
    "self_distillation",
    "views",
    "vit",
)


def when_keras_is_imported(modules: Mapping[str, Any]) -> None:
    """Register the classes of the package now if Keras is among `modules`, else once it is."""
    if modules.get("keras") is not None:
        register()
    else:
        sys.meta_path.insert(0, _AfterKeras())


def register() -> None:
    """Import all modules that define what `.keras` files hold."""
    _check_backend()
    for name in _REGISTERED:
        importlib.import_module(f"sddns_tf.{name}")


def _check_backend():
    import keras

    if keras.backend.backend() != "tensorflow":
        raise ImportError(_wrong_backend(keras.backend.backend()))


def _wrong_backend(name):
    return (
        "sddns_tf needs Keras' TensorFlow backend: set the environment variable "
        f'KERAS_BACKEND="tensorflow" before importing keras. Received: KERAS_BACKEND="{name}"'
    )


class _AfterKeras(importlib.abc.MetaPathFinder):
    """Finds Keras as Python would, and registers our classes once it is imported."""

    def find_spec(self, fullname, path=None, target=None):
        del path, target
        if fullname != "keras":
            return None
        # Taken out for this call only: TensorFlow looks Keras up without importing it.
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__spec__.loader = self._loader
        try:
            self._loader.exec_module(module)
        except ImportError as error:
            backend = os.environ.get("KERAS_BACKEND", "tensorflow")
            if backend == "tensorflow":
                raise
            raise ImportError(_wrong_backend(backend)) from error
        register_or_wait()


class _WhenAllIsImported(importlib.abc.MetaPathFinder):
    """Registers at the next import of another package, once no module of ours is half imported."""

    def find_spec(self, fullname, path=None, target=None):
        del path, target
        if not fullname.startswith("sddns_tf"):
            complete()
        return None


_waiting = _WhenAllIsImported()


def register_or_wait() -> None:
    """Register now or, if one of our modules is importing Keras, once that module is imported."""
    _check_backend()
    if _is_importing():
        sys.meta_path.insert(0, _waiting)
    else:
        register()


def complete() -> None:
    """Register if that was put off and none of our modules is still being imported."""
    if _waiting in sys.meta_path and not _is_importing():
        sys.meta_path.remove(_waiting)
        register()


def _is_importing():
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("sddns_tf.")]
    specs = [getattr(module, "__spec__", None) for module in ours]
    return any(getattr(spec, "_initializing", False) for spec in specs)
