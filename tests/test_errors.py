"""Errors have one form: what was expected, then "Received: " and what came instead."""

import ast
import pathlib

import pytest

import sddns_tf
from sddns_tf.cli import main as cli

PACKAGE = pathlib.Path(sddns_tf.__file__).parent
KINDS = {"ValueError", "TypeError", "UsageError", "ArgumentTypeError", "NoLabelsError"}
# Messages without it: the module, how the message begins, and why.
EXCEPTIONS = {
    ("cli/console.py", ""): "argparse's own message, or one brought into the form by a pattern",
    ("cli/errors.py", ""): "the message of another error, with the option's name before it",
    ("building.py", "The backbone gives features that are not finite"): "nothing was passed",
}


def texts(node, definitions):
    """All strings in an expression, and in what the module defines under the names it uses."""
    found = ""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Constant) and isinstance(inner.value, str):
            found += inner.value
        elif isinstance(inner, ast.Name) and inner.id in definitions:
            found += texts(definitions[inner.id], {})
    return found


def messages(path):
    """Pairs of a line and the text of what is raised there, of the kinds of error above."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            definitions[node.targets[0].id] = node.value
        elif isinstance(node, ast.FunctionDef):
            definitions[node.name] = node
    for node in ast.walk(tree):
        if not (isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call)):
            continue
        function = node.exc.func
        name = function.attr if isinstance(function, ast.Attribute) else function.id
        if name in KINDS:
            text = "".join(texts(argument, definitions) for argument in node.exc.args)
            yield node.lineno, text


def is_exception(module, text):
    return any(
        module == where and (text.startswith(start) if start else "Received" not in text)
        for where, start in EXCEPTIONS
    )


def test_errors_say_what_was_received():
    wrong, count = [], 0
    for path in sorted(PACKAGE.rglob("*.py")):
        module = path.relative_to(PACKAGE).as_posix()
        for line, text in messages(path):
            count += 1
            if "Received: " not in text and not is_exception(module, text):
                wrong.append(f"{module}:{line}: {text}")
    assert count > 150
    assert not wrong, "\n".join(wrong)


def test_an_error_without_it_would_be_found(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        "HINT = 'Received: {}'\n"
        "def f(x):\n"
        "    if x: raise ValueError(f'`x` must be 0: {x}')\n"
        "    raise errors.UsageError(HINT.format(x))\n"
    )
    assert sorted((line, "Received: " in text) for line, text in messages(module)) == [
        (3, False),
        (4, True),
    ]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["train", "--epochs=0"], "train: --epochs must be a positive int. Received: 0"),
        (["train", "--epochs"], "train: --epochs needs a value. Received: none"),
        (["train", "--seed=a"], "train: --seed must be of type int. Received: 'a'"),
        (["train", "--noresume=1"], "train: --noresume takes no value. Received: '1'"),
        (["info"], "info: FILE is needed. Received: none"),
        (
            ["train", "--data=npz:x.npz", "--output_dir=o", "--recipe=tiny"],
            "Received: tiny",
        ),
        (
            ["train", "--data=npz:x.npz", "--output_dir=o", "--recipe={here}/broken.json"],
            "broken.json (Expecting value: line 1 column 1 (char 0))",
        ),
        (
            ["train", "--data={here}", "--output_dir=o"],
            "npz:PATH. Received: {here} (did you mean folder:{here}?)",
        ),
        (
            ["score", "--model={here}/no.tflite", "--images=-"],
            "score: --model must be an existing .tflite file, .keras file or folder of a SavedModel"
            ". Received: {here}/no.tflite",
        ),
        (["score", "--model=m", "--images=there"], "or list:FILE, or -. Received: there"),
        (
            ["info", "{here}/broken.tflite"],
            "info: FILE must be a .tflite file",
        ),
        (
            ["info", "{here}/broken.keras"],
            "info: FILE must be a model that Keras can load.",
        ),
        (
            ["convert-dino", "--checkpoint={here}/no.pth", "--output=x.weights.h5"],
            "--checkpoint must be an existing file. Received: {here}/no.pth",
        ),
        (
            ["convert-dino", "--checkpoint={here}", "--output=x.weights.h5"],
            "--checkpoint must be a file that can be read. Received: {here} (",
        ),
        (
            ["train", "--data=npz:x.npz", "--recipe={here}/seed.json", "--output_dir=o"],
            "--recipe must hold valid JSON. Received: {here}/seed.json (",
        ),
        (
            ["convert-efficientnet-lite", "--output=x.h5"],
            "--output must end in .weights.h5. Received: x.h5",
        ),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_at_a_command_is_one_line_in_that_form(arguments, line, capsys, tmp_path):
    for name in ("broken.tflite", "broken.keras", "broken.json"):
        (tmp_path / name).write_text("no such thing")
    (tmp_path / "seed.json").write_text('{"seed": Infinity}')
    if arguments[0] == "convert-dino":
        pytest.importorskip("torch")
    assert cli.main([argument.format(here=tmp_path) for argument in arguments]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (only,) = told.err.splitlines()
    assert only.startswith("sddns ") and "Received: " in only
    assert line.format(here=tmp_path) in only
