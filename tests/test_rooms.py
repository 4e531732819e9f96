"""Who may import whom, what `import sddns_tf` may cost, and what it shows."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import sddns_tf

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = pathlib.Path(sddns_tf.__file__).parent


@pytest.fixture(scope="module")
def rooms():
    spec = importlib.util.spec_from_file_location("rooms", ROOT / "tools" / "rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lint(folder):
    """`lint-imports` apart: it forks, and a fork of TensorFlow's threads hangs."""
    pytest.importorskip("importlinter")
    program = """
import sys
from importlinter.cli import lint_imports
sys.exit(lint_imports(no_cache=True))
"""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
    )


def test_rooms_import_lower_rooms_only():
    result = lint(ROOT)
    assert result.returncode == 0, result.stdout


def test_contracts_and_table_are_those_of_the_code(rooms):
    assert (ROOT / ".importlinter").read_text() == rooms.contracts()
    text = (ROOT / "CONTRIBUTING.md").read_text()
    assert rooms.contributing(text) == text


def test_every_room_says_what_it_holds(rooms):
    listed = {room for level in rooms.LEVELS for room in level}
    there = {room for level in rooms.existing() for room in level}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    packages = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert modules | packages == there <= listed
    assert all(len(rooms.first_line(room)) > 10 for room in there)


def run(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, *arguments, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


def test_importing_the_package_imports_neither_tensorflow_nor_keras():
    result = run("import sddns_tf, sys; print({'tensorflow', 'keras'} & set(sys.modules))")
    assert result.stdout.strip() == "set()", result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("order", ["import sddns_tf, keras", "import keras, sddns_tf"])
def test_importing_the_package_is_enough_for_keras_to_know_its_classes(order):
    code = f"""
{order}
for name in ("Detector", "FeatureExtractor", "SelfDistillation", "MultiCrop", "OODProbe", "rot90"):
    assert keras.saving.get_registered_object(f"sddns_tf>{{name}}"), name
"""
    result = run(code)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "from sddns_tf import evaluation, report",
        "from sddns_tf.features import FeatureExtractor",
        "from sddns_tf.detector import Detector",
        "import sddns_tf.bank",
    ],
)
def test_a_module_of_ours_may_be_what_imports_keras_first(first):
    path = PACKAGE / "trained" / "cifar10-small.keras"
    result = run(f"{first}\nimport keras\nprint(keras.saving.load_model({str(path)!r}).name)")
    assert result.returncode == 0 and result.stdout.strip(), result.stderr[-2000:]


def test_only_public_names_are_shown():
    assert set(dir(sddns_tf)) == set(sddns_tf.__all__)
    for name in sddns_tf.__all__:
        assert getattr(sddns_tf, name) is not None
        assert name == "__version__" or not name.startswith("_")
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = sddns_tf.nothing


OPTIONAL = (
    "matplotlib", "sklearn", "tensorflow_datasets", "keras_cv", "torch", "skimage", "pyarrow",
    "apache_beam",
)  # fmt: skip


def test_the_package_can_be_imported_where_these_libraries_cannot():
    # Keras itself imports some of them where it finds them, so that `sys.modules` tells nothing.
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import importlib, pkgutil, sddns_tf
for module in pkgutil.walk_packages(sddns_tf.__path__, "sddns_tf."):
    # All of `sddns_tf.beam` is made of Beam's classes.
    if not module.name.endswith("__main__") and not module.name.startswith("sddns_tf.beam"):
        importlib.import_module(module.name)
try:
    import sddns_tf.beam
except ImportError as error:
    print(error)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr[-2000:]
    needed = 'sddns_tf.beam needs Apache Beam: pip install "sddns_tf[beam]"'
    assert result.stdout.splitlines() == [needed]


def assert_says_what_to_do(result, backend):
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: sddns_tf needs Keras' TensorFlow backend: set ")
    assert 'KERAS_BACKEND="tensorflow"' in last_line
    assert last_line.endswith(f'Received: KERAS_BACKEND="{backend}"')


# A stand-in for Keras, since its other backends are not installed with the package.
OTHER_BACKEND = """
import sys, types
keras = types.ModuleType("keras")
keras.backend = types.SimpleNamespace(backend=lambda: "jax")
sys.modules["keras"] = keras
import sddns_tf
"""


def test_another_backend_is_refused_in_one_line():
    assert_says_what_to_do(run(OTHER_BACKEND), "jax")


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["torch", "jax"])
@pytest.mark.parametrize("code", ["import sddns_tf; sddns_tf.Detector", "import sddns_tf, keras"])
def test_an_installed_other_backend_is_refused_in_one_line(backend, code):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    assert_says_what_to_do(run(code, KERAS_BACKEND=backend), backend)


def public_functions(path):
    """Functions and methods of a module that others may call."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    yield inner.name, inner


def test_what_is_public_has_type_hints():
    without, count = [], 0
    for path in PACKAGE.rglob("*.py"):
        for name, node in public_functions(path):
            if name.startswith("_") and name != "__init__":
                continue
            count += 1
            arguments = [
                one
                for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                if one.arg not in ("self", "cls")
            ]
            if node.returns is None or any(one.annotation is None for one in arguments):
                without.append(f"{path.name}: {name}")
    assert count > 500
    assert not without


def test_configurations_hold_all_arguments_of_the_constructor():
    """A key that `get_config` forgets is forgotten by a file, too."""
    count, forgotten = 0, []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            methods = {one.name: one for one in getattr(node, "body", []) if hasattr(one, "args")}
            if not isinstance(node, ast.ClassDef) or not {"__init__", "get_config"} <= set(methods):
                continue
            count += 1
            arguments = methods["__init__"].args
            named = {one.arg for one in (*arguments.args, *arguments.kwonlyargs)} - {"self"}
            inside = ast.walk(methods["get_config"])
            texts = {one.value for one in inside if isinstance(one, ast.Constant)}
            forgotten += [f"{node.name}: {name}" for name in named - texts]
    assert count > 20
    assert not forgotten
