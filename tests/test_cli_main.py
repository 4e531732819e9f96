"""The command as a whole: its help, its exit codes, what its processes import and say."""

import json
import os
import pathlib
import platform
import re
import subprocess
import sys

import pytest

import sddns_tf
from sddns_tf.cli import main as cli
from sddns_tf.cli.errors import UsageError, user_input

ROOT = pathlib.Path(sddns_tf.__file__).parents[1]


def apart(*arguments, program=None, **environment):
    """Python in a process of its own; the command, if no program is given."""
    start = ["-m", "sddns_tf"] if program is None else ["-c", program]
    environment = {"PYTHONPATH": str(ROOT), **environment}
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TF_")}
    return subprocess.run(
        [sys.executable, *start, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**inherited, **environment},
        timeout=300,
    )


def test_help_names_each_command_in_a_line(capsys):
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name, text in cli.COMMANDS.items():
        assert f"  {name}" in shown and text in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert cli.main([]) == 0
    assert cli.main(["--version"]) == 0
    assert sddns_tf.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_has_its_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"sddns {name}" in shown
    if name != "info":
        first = shown.partition("what most people need:")[2].partition("\n\n")[0]
        # One command has no more than two options.
        assert min(3, shown.count("\n  --")) <= first.count("\n  --") <= 6
        assert "help:" in shown


def test_no_help_needs_tensorflow():
    program = f"""
import sys
sys.modules.update(dict.fromkeys(("tensorflow", "keras")))
from sddns_tf.cli.main import main
for name in {list(cli.COMMANDS)}:
    try:
        main([name, "--help"])
    except SystemExit as ended:
        assert ended.code == 0
"""
    result = apart(program=program)
    assert result.returncode == 0, result.stderr


def test_the_script_is_installed_with_the_package():
    import configparser

    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = setup["options.entry_points"]["console_scripts"].strip().splitlines()
    assert scripts == ["sddns = sddns_tf.cli.main:run"]
    assert "cli/recipes/*.json" in setup["options.package_data"]["sddns_tf"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tain"], "sddns: Expected one of train, evaluate"),
        (
            ["train", "--dat=x"],
            "sddns train: Expected options that --help lists. Received: --dat=x",
        ),
        (["train", "--data=npz:x.npz"], "sddns train: --output_dir is needed"),
        (["evaluate", "--model=m.keras"], "sddns evaluate: --test is needed"),
        (
            ["evaluate", "--model=m", "--test=npz:a.npz", "--output_dir=o", "--ood=npz:a,npz:b/a"],
            "sddns evaluate: --ood must give each set a name of its own",
        ),
        (["export"], "sddns export: --detector is needed"),
        (["export", "--detector=d.keras"], "--saved_model or --tflite is needed"),
        (["export", "--detector=d.keras", "--tflite=x.lite"], "--tflite must end in .tflite"),
        (["export", "--detector=d.keras", "--quantization=int4"], "--quantization"),
        (
            ["export", "--detector=d.keras", "--tflite=x.tflite"],
            "--detector must be an existing .keras file",
        ),
        (["sensitivity", "--strategies=rot90", "--output_dir=o"], "--strategies must be"),
        (
            ["sensitivity", "--data=npz:x", "--output_dir=o", "--strategy=multi_worker"],
            "--strategy must be auto, mirrored or none here",
        ),
        (["train", "--rollbacks=-1"], "--rollbacks must be an int of at least 0. Received: -1"),
        (["evaluate", "--seed=-1"], "--seed must be an int of at least 0. Received: -1"),
        (["sensitivity", "--ood=npz:x.npz", "--output_dir=o"], "--ood needs --test"),
        (["convert-dino", "--checkpoint=x.pth"], "--output is needed"),
        (["convert-dino", "--checkpoint=x.pth", "--output=x.h5"], "must end in .weights.h5"),
        (["info", "nothing.keras"], "FILE must be an existing .keras file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_code_1(arguments, message, capsys):
    assert cli.main(arguments) == 1
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    assert line.startswith("sddns") and message in line


def test_only_expected_errors_are_a_users_mistake():
    with pytest.raises(UsageError, match="--data: no such set"), user_input("data"):
        raise ValueError("no such set")
    with pytest.raises(KeyError), user_input("data"):
        raise KeyError("a bug")


def test_a_process_says_nothing_of_tensorflow(trained):
    """The smoke test: a process as a user starts it, with TensorFlow and without a setting."""
    result = apart("info", trained / "detector.keras", "--json")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert json.loads(result.stdout)["bank_rows"] == 96


@pytest.mark.slow
def test_training_says_nothing_of_tensorflow(image_sets, tmp_path):
    """oneDNN would say that it does not take uint8."""
    sets = f"--data=npz:{image_sets}/grass.npz", f"--auxiliary=npz:{image_sets}/coffee.npz"
    result = apart("train", *sets, f"--output_dir={tmp_path}", "--steps_per_epoch=2", "--epochs=1")
    assert result.returncode == 0, result.stderr
    assert not re.findall(r"^(?:[IWE]\d{4}|WARNING:) .*", result.stderr, re.MULTILINE)


@pytest.mark.slow
def test_a_mistake_ends_a_process_with_one_line(tmp_path):
    result = apart("train", "--data=npz:x.npz", f"--output_dir={tmp_path}", "--set=views.hu=1")
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("sddns train: Expected an option of MultiCrop, one of views.")
    assert line.endswith("Received: views.hu=1")


def test_an_import_of_tensorflow_that_fails_is_shown(tmp_path):
    (tmp_path / "tensorflow.py").write_text(
        "import os\nos.write(2, b'what it said')\nraise ImportError('broken')\n"
    )
    program = "from sddns_tf.cli import starting; starting.import_tensorflow()"
    result = apart(program=program, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert result.returncode == 1
    assert "what it said" in result.stderr and "broken" in result.stderr


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="oneDNN is for x86")
@pytest.mark.parametrize("chosen", [{}, {"TF_ENABLE_ONEDNN_OPTS": "0"}])
def test_commands_use_onednn_unless_told_otherwise(chosen):
    """TensorFlow by itself does so only on processors with AVX-512."""
    program = """
from sddns_tf.cli import starting
starting.import_tensorflow()
from tensorflow.python.util import _pywrap_util_port
print(_pywrap_util_port.IsMklEnabled())
"""
    assert apart(program=program, **chosen).stdout == f"{not chosen}\n"


def test_a_command_leaves_the_environment_of_its_caller_alone(trained, monkeypatch):
    """Or what the caller starts later would compute in another way than the caller."""
    import tensorflow  # noqa: F401 - as in a script or notebook that calls the command

    for name in ("TF_ENABLE_ONEDNN_OPTS", "TF_CPP_MIN_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    before = dict(os.environ)
    assert cli.main(["info", str(trained / "detector.keras")]) == 0
    assert dict(os.environ) == before


def test_classes_are_known_when_tensorflow_is_imported_between():
    """TensorFlow looks for Keras without importing it."""
    program = """
import sddns_tf, tensorflow, keras
print(keras.saving.get_registered_object("sddns_tf>Detector").__name__)
"""
    assert apart(program=program).stdout == "Detector\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_seen_enough_gets_no_traceback(trained, unbuffered):
    """Such as `sddns info FILE | head -1`."""
    command = [sys.executable, "-m", "sddns_tf", "info", str(trained / "detector.keras")]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    )
    process.stdout.close()
    assert process.communicate(timeout=120)[1] == b""
    assert process.returncode == 1
