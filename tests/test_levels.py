"""Who may import whom: the package's levels, and what `import sddns_tf` may cost."""

import ast
import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest

import sddns_tf

PACKAGE = pathlib.Path(sddns_tf.__file__).parent

LEVELS = {
    "version": 0,
    "vit": 0,
    "heads": 0,
    "image_draws": 0,
    "image_ops": 0,
    "losses": 0,
    "schedules": 0,
    "metrics": 0,
    "image_folder": 0,
    "data": 1,
    "dino_weights": 1,
    "shifts": 1,
    "views": 1,
    "bank": 1,
    "checkpoint": 1,
    "self_distillation": 2,
    "callbacks": 2,
    "detector": 3,
    "pretrained_models": 4,
    "report_charts": 0,
    "board": 5,
    "evaluation": 3,
    "report": 4,
    "sensitivity": 5,
    "edge_metadata": 0,
    "edge_quantization": 0,
    "export_checks": 4,
    "served_bytes": 1,
    "serving_warmup": 0,
    "serving_signatures": 5,
    "serving": 6,
    "edge": 5,
    "export": 7,
    "plots": 4,
}
WITHIN_A_LEVEL = {("views", "shifts")}
# Training code never reaches a served graph.
SERVED = ("bank", "detector", "serving_signatures", "serving", "edge", "export")
TRAINING_LEVEL = 2


def modules():
    return {path.stem: path.read_text() for path in PACKAGE.glob("*.py") if path.stem != "__init__"}


def imports(source):
    """Names of the package's own modules that a source imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            origin = "." * node.level + (node.module or "")
            names = [f"{origin}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            root, _, rest = name.partition(".")
            if root == "sddns_tf" or name.startswith("."):
                yield rest.lstrip(".").removeprefix("sddns_tf.").partition(".")[0]
            assert root not in ("tools", "examples", "tests"), name


def violations(sources):
    """Sentences about what does not follow the levels."""
    wrong = []
    for name, source in sources.items():
        if name not in LEVELS:
            wrong.append(f"{name} has no level")
            continue
        for imported in imports(source):
            if imported not in LEVELS:
                wrong.append(f"{name} imports {imported!r}, which is no module with a level")
            elif (name, imported) not in WITHIN_A_LEVEL and LEVELS[imported] >= LEVELS[name]:
                wrong.append(f"{name} imports {imported}")
    return wrong


def reached(name, sources):
    """All of the package's modules that importing one imports."""
    found, waiting = set(), [name]
    while waiting:
        new = set(imports(sources[waiting.pop()])) - found
        found |= new
        waiting += new
    return found


def test_imports_go_to_lower_levels_only():
    sources = modules()
    assert len(sources) >= 10
    assert "shifts" in imports(sources["views"])
    assert not violations(sources)


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("vit", "from sddns_tf import heads"),
        ("vit", "from . import views"),
        ("shifts", "from sddns_tf.views import MultiCrop"),
        ("bank", "import sddns_tf.detector as d"),
        ("losses", "def f():\n    from sddns_tf import bank"),
        ("detector", "from sddns_tf import Detector"),
        ("detector", "import sddns_tf"),
        ("helpers", "import os"),
    ],
)
def test_a_wrong_import_is_found(name, source):
    assert len(violations({name: source})) == 1


@pytest.mark.parametrize("name", SERVED)
def test_training_code_does_not_reach_a_served_graph(name):
    sources = modules()
    if name not in sources:
        pytest.skip(f"there is no {name}")
    training = [n for n in reached(name, sources) if LEVELS[n] == TRAINING_LEVEL]
    assert not training


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(PACKAGE.parent), **environment},
        capture_output=True,
        text=True,
    )


OPTIONAL = ("matplotlib", "sklearn", "tensorflow_datasets", "PIL", "keras_cv", "torch", "skimage")


def test_the_package_can_be_imported_where_these_libraries_cannot():
    # Keras itself imports some of them where it finds them, so that `sys.modules` tells nothing.
    code = f"""
import sys
sys.modules.update(dict.fromkeys({OPTIONAL}))
import importlib, pkgutil, sddns_tf
for module in pkgutil.iter_modules(sddns_tf.__path__):
    importlib.import_module("sddns_tf." + module.name)
"""
    result = run(code)
    assert result.returncode == 0, result.stderr[-2000:]


def imported_with_the_module(tree):
    """Roots of what is imported outside functions, inside `try` and `if` too."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").partition(".")[0]
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from imported_with_the_module(node)


def test_optional_libraries_are_imported_where_they_are_used():
    assert "sklearn" in set(imported_with_the_module(ast.parse("try:\n import sklearn\nexcept: 0")))
    for name, source in modules().items():
        eager = set(imported_with_the_module(ast.parse(source)))
        assert not eager.intersection(OPTIONAL), name


def assert_says_what_to_do(result, backend):
    assert result.returncode == 1
    last_line = result.stderr.strip().splitlines()[-1]
    assert last_line.startswith("ImportError: sddns_tf needs Keras' TensorFlow backend: set ")
    assert 'KERAS_BACKEND="tensorflow"' in last_line
    assert last_line.endswith(f'Received: KERAS_BACKEND="{backend}"')


def test_another_backend_is_refused_in_one_line():
    # A stand-in for Keras, since its other backends are not installed with the package.
    code = """
import sys, types
keras = types.ModuleType("keras")
keras.backend = types.SimpleNamespace(backend=lambda: "jax")
sys.modules["keras"] = keras
import sddns_tf
"""
    assert_says_what_to_do(run(code), "jax")


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_an_installed_other_backend_is_refused_in_one_line(backend):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    assert_says_what_to_do(run("import sddns_tf", KERAS_BACKEND=backend), backend)
