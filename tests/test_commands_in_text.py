"""Every command that a text tells people to type is known to its program, and runs at toy size.

The commands are taken out of the texts themselves (`texts.all_commands`), so that an option that
is renamed, or a page that names one that there never was, fails here.
"""

import argparse
import configparser
import contextlib
import importlib
import importlib.util
import inspect
import io
import pathlib
import re
import shutil
import sys
from unittest import mock

import export_checks
import keras
import numpy as np
import pytest
import skimage.data
from absl import flags
from texts import PAGES, ROOT, Command, all_commands, commands_of_markdown
from tiny import no_pictures
from toy_sets import tiles, write_tfds

from sddns_tf.cli import configuration, sources
from sddns_tf.cli import main as cli

FLAGS = flags.FLAGS
COMMANDS = list({command.words: command for command in all_commands()}.values())

# Programs of others; what is said of the first group is looked at, of the second it is not.
CHECKED = {"pip", "mkdocs", "ruff"}
UNCHECKED = {".", "cd", "curl", "docker", "export", "find", "lint-imports", "mypy", "tensorboard"}


class Parsed(BaseException):
    """The options of a program were understood; it need not go on."""


# --- Programs -----------------------------------------------------------------------------------


def own_program(words):
    """What of ours a command starts, such as `sddns train` or `examples/quickstart.py`, or None."""
    if words[0] == "sddns":
        return " ".join(words[:2])
    if words[:3] == ("python", "-m", "sddns_tf"):
        return " ".join(["sddns", *words[3:4]])
    if words[0] not in ("python", "python3"):
        return None
    if words[1] == "-m":
        return words[2] if "".join(words[2:3]).startswith("tools.") else None
    for folder in (ROOT, ROOT / "examples" / "serving", ROOT / "examples"):
        if (folder / words[1]).exists():
            return str((folder / words[1]).resolve().relative_to(ROOT))
    return words[1]


def own_arguments(words):
    """The arguments that the program of ours gets."""
    first = 2
    if words[1] == "-m":
        first = 4 if words[2] == "sddns_tf" else 3
    return list(words[first:])


@contextlib.contextmanager
def loaded(program):
    """The module of an example or a tool; the absl flags that it defines go afterward."""
    before = set(FLAGS)
    if program.startswith("tools."):
        try:
            module = importlib.import_module(program)
        except ModuleNotFoundError as error:
            raise AssertionError(f"There is no {program}") from error
        yield module if hasattr(module, "main") else importlib.import_module(f"{program}.harness")
        return
    path = ROOT / program
    path = path / "harness.py" if path.is_dir() else path
    assert path.exists(), f"There is no {program}"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    try:
        yield module
    finally:
        for name in set(FLAGS) - before:
            delattr(FLAGS, name)
        FLAGS.unparse_flags()


def takes_absl_flags(module):
    """Whether a program's options are absl's, which are defined when it is imported."""
    return isinstance(getattr(module, "FLAGS", None), flags.FlagValues)


def run_argparse_until_parsed(main, arguments):
    """Call a program whose options argparse takes, and stop it when it has them."""
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Parsed

    with mock.patch.object(argparse.ArgumentParser, "parse_args", parse_and_stop):
        try:
            main(arguments)
        except Parsed:
            return
    raise AssertionError("The program read no options")


def understand(command):
    """Raise an error if the program of a command does not know an option of it."""
    words = command.words
    program, arguments = own_program(words), None
    if program is None:
        understand_of_others(words)
        return
    arguments = own_arguments(words)
    if "--help" in arguments or program in ("sddns", "sddns --help"):
        return
    if program.startswith("sddns "):
        understand_sddns(program.removeprefix("sddns "), arguments)
        return
    with loaded(program) as module:
        if takes_absl_flags(module):
            FLAGS([program, *arguments])
        elif arguments or inspect.signature(module.main).parameters:
            run_argparse_until_parsed(module.main, arguments)


def understand_sddns(name, arguments):
    """Options, recipes, settings and sources of images of `sddns NAME`."""
    assert name in cli.COMMANDS, f"There is no sddns {name}"
    module = importlib.import_module(f"sddns_tf.cli.{name.replace('-', '_')}")
    if not arguments and name != "info":
        return  # a command that is talked of
    options = module.parser().parse_args(arguments)
    if getattr(options, "recipe", None) or getattr(options, "set", None):
        settings = [configuration.parse_setting(text) for text in options.set]
        configuration.resolve(configuration.read_recipe(options.recipe), settings)
    for option in ("data", "auxiliary", "calibration", "test", "representative"):
        if getattr(options, option, None):
            sources.parse(option, getattr(options, option), "test")
    if getattr(options, "ood", None):
        sources.parse_list("ood", options.ood, "test")


def understand_of_others(words):
    """What a command says of our own files to a program that is not ours."""
    program, arguments = words[0], words[1:]
    if program in ("python", "python3"):
        assert arguments[:1] == ("-m",)
        if arguments[1:]:
            assert arguments[1] in ("pytest", "venv"), f"Unknown module {arguments[1]}"
        return
    assert program in CHECKED | UNCHECKED, f"Unknown program {program}"
    if program == "pip":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg")
        extras = re.findall(r"\[([\w,-]+)\]", " ".join(arguments))
        assert arguments[0] == "install"
        assert set(",".join(extras).split(",")) <= {"", *setup["options.extras_require"]}
    elif program == "mkdocs":
        mkdocs = pytest.importorskip("mkdocs.__main__")
        found = mkdocs.cli.commands[arguments[0]]
        found.make_context(arguments[0], list(arguments[1:]))
    elif program == "ruff":
        assert arguments[0] in ("check", "format")
    if program == "cd":
        assert (ROOT / arguments[0]).is_dir()


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_a_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        understand(command)
    except (Exception, SystemExit) as error:
        pytest.fail(f"{command.place}: {command}\n{type(error).__name__}: {error}")


@pytest.mark.parametrize(
    "text",
    [
        "```bash\nsddns train --data=folder:x --learning_pace=3 --output_dir=y\n```",
        "```bash\nsddns train --data=folder:x --set views.hew=0.2 --output_dir=y\n```",
        "```bash\nsddns train --recipe=cpu_tiny --output_dir=y\n```",
        "```bash\nsddns train --data=x.npz --output_dir=y\n```",
        "Type `sddns rate --model=x.keras`.",
        "```bash\npython examples/multi_gpu.py --devices=2\n```",
        "```bash\npython examples/two_gpus.py\n```",
        "```bash\npython examples/edge_inference.py \\\n    p.tflite --recalibration x.png\n```",
        "```bash\nX=1 python -m tools.benchmark --bench=all && echo ok\n```",
        "```bash\npython tools/train.py\n```",
        'Install it by `pip install -e ".[gpu]"`.',
        "```bash\nmake install\n```",
    ],
)
def test_a_wrong_command_fails(text, monkeypatch):
    monkeypatch.chdir(ROOT)
    commands = commands_of_markdown(text, "made up")
    assert commands
    with pytest.raises((Exception, SystemExit)):
        for command in commands:
            understand(command)


def test_commands_are_found_where_they_stand():
    text = (
        "Type `sddns info\nparts.keras`, or:\n\n```bash\n# a comment\nA=1 sddns score \\\n"
        "  --model=m.keras --images=- > x.csv && sddns info m.keras | less\n```\n"
        "```python\nsddns = 3\n```\n"
    )
    assert [command.words for command in commands_of_markdown(text, "made up")] == [
        ("sddns", "score", "--model=m.keras", "--images=-"),
        ("sddns", "info", "m.keras"),
        ("less",),
        ("sddns", "info", "parts.keras"),
    ]


# --- Options and sets of images in running text -------------------------------------------------


def options_of_ours():
    """All options of all programs of ours."""
    found = set()
    for name in cli.COMMANDS:
        module = importlib.import_module(f"sddns_tf.cli.{name.replace('-', '_')}")
        found |= set(re.findall(r"--\w[\w-]*", module.parser().format_help()))
    programs = {own_program(command.words) for command in COMMANDS} - {None}
    for program in programs:
        if program.startswith("sddns"):
            continue
        with loaded(program) as module:
            found |= {f"--{name}" for name in FLAGS}
            if not takes_absl_flags(module) and inspect.signature(module.main).parameters:
                with (
                    contextlib.redirect_stdout(io.StringIO()) as shown,
                    contextlib.suppress(SystemExit),
                ):
                    module.main(["--help"])
                found |= set(re.findall(r"--\w[\w-]*", shown.getvalue()))
    return found


def test_options_in_running_text_are_those_of_a_program():
    known = options_of_ours()
    served = (ROOT / "examples" / "serving" / "docker-compose.yml").read_text()
    known |= set(re.findall(r"--\w[\w-]*", served))
    for page in PAGES:
        for option in re.findall(r"`[^`\n]*?(--[\w-]+)", page.read_text()):
            assert option in known | {"--help"}, f"{page.name}: {option}"


def test_sets_of_images_are_those_of_tfds_or_described():
    tfds = pytest.importorskip("tensorflow_datasets")
    described = {"dtd32", "gtsrb32", "imagenet_aux"}
    page = (ROOT / "docs" / "results.md").read_text()
    assert all(f"`{name}`" in page for name in described)
    public = set(tfds.list_builders(with_community_datasets=False))
    for command in COMMANDS:
        for name in re.findall(r"tfds:(\w+)", str(command)):
            assert name in public | described | {"NAME"}, f"{command.place}: {command}"


# --- At toy size --------------------------------------------------------------------------------

TINY = (
    "--image_size=32",
    "--set=backbone.stages=[8, 16]",
    "--set=views.local_views=0",
    "--set=head.num_prototypes=16",
    "--set=head.hidden_dim=16",
    "--set=head.bottleneck_dim=8",
    "--batch_size=8",
    "--steps_per_epoch=1",
    "--epochs=1",
)
TINY_VIT = (
    *(option for option in TINY if "stages" not in option),
    "--set=backbone.patch_size=8",
    "--set=backbone.hidden_dim=16",
    "--set=backbone.depth=1",
    "--set=backbone.num_heads=2",
)
TOY = {
    "sddns sensitivity": ("--strategies=none,rot90:in_distribution", "--runs=1"),
    "examples/folder_of_parts.py": ("--steps=10", "--image_size=32"),
}
# Examples, benchmarks and experiments have tests of their own, which run them: test_examples,
# test_examples_gallery, test_serving_client, test_benchmark, test_research, test_rooms.
RUN_HERE = ("sddns ", "examples/edge_inference.py", "examples/folder_of_parts.py")
# test_cli_devices runs several machines; test_dino_weights and test_backbones conversions, which
# need PyTorch; test_local_exports what a device does with the file of a local detector;
# test_local_commands MVTec AD's layout; test_beam Apache Beam.
RUN_ELSEWHERE = (
    "--strategy=multi_worker", "convert-", "--maps=overlays", "--extend", "mvtec:", "--runner=",
)  # fmt: skip


def runs_here(command):
    """Whether this module runs a command, rather than looks at its options only."""
    program = None if command.words[0] in CHECKED else own_program(command.words)
    return (
        program is not None
        and program.startswith(RUN_HERE)
        and bool(own_arguments(command.words))
        and not any(word in str(command) for word in ("--help", *RUN_ELSEWHERE))
        # Without a place to write to it is a mention, not a command.
        and (program not in ("sddns train", "sddns sensitivity") or "--output_dir" in str(command))
    )


@pytest.fixture(scope="module")
def toy(trained, tmp_path_factory):
    """A folder that holds all that the texts name: photographs, sets, a detector, its exports."""
    folder = tmp_path_factory.mktemp("toy")
    photographs = {
        "photos/good": ("grass", 100), "photos/other": ("coffee", 30),
        "photos/good_held_out": ("grass", 40), "photos/good_fresh": ("grass", 20),
        "photos/scratched": ("brick", 10), "photos/new": ("brick", 6),
        "camera": ("brick", 6), "normal": ("grass", 40),
    }  # fmt: skip
    for place, (name, count) in photographs.items():
        (folder / place).mkdir(parents=True)
        for index, image in enumerate(tiles(name, count, 32)):
            keras.utils.save_img(folder / place / f"{index:03}.png", image, scale=False)
    np.savez(folder / "photos.npz", images=tiles("coffee", 10, 32))
    for name in ("photo.png", "another.jpg"):
        keras.utils.save_img(folder / name, skimage.data.coffee()[:32, :32], scale=False)
    (folder / "parts").mkdir()
    for name in ("detector", "model", "backbone"):
        shutil.copy(trained / f"{name}.keras", folder / "parts")
    (folder / "sddns_tf" / "trained").mkdir(parents=True)
    shutil.copy(ROOT / "sddns_tf" / "trained" / "cifar10-small.keras", folder / "sddns_tf/trained")
    write_sets(folder / "TFDS")
    return folder


def write_sets(root):
    """Toy sets under the names that the texts use."""
    grass = tiles("grass", 200, 32)
    write_tfds(root, "cifar10", 32, version="3.0.2", train=grass[:100], test=grass[100:])
    coffee = tiles("coffee", 60, 32)
    write_tfds(root, "imagenet_resized", 32, version="0.1.0", config="32x32", train=coffee)
    for name, version in (("cifar100", "3.0.2"), ("dtd32", "1.0.0"), ("gtsrb32", "1.0.0")):
        write_tfds(root, name, 32, version=version, test=tiles("brick", 20, 32))
    write_tfds(root, "mnist", 32, version="3.0.1", test=tiles("brick", 20, 32))


@pytest.fixture(scope="module")
def exported(toy):
    """The same folder, with the exports that a command of the texts writes."""
    with contextlib.chdir(toy):
        assert run_sddns("export", toy_arguments(EXPORTING, toy)) == 0
    assert (toy / "exports" / "parts" / "1").is_dir() and (toy / "parts.tflite").is_file()
    return toy


def run_sddns(name, arguments):
    """The exit code of a command; `test_cli_train` and `test_export` have what it leaves out."""
    with export_checks.in_this_process(), no_pictures():
        return cli.main([name, *arguments])


def toy_arguments(command, folder):
    """The arguments of a command, with those that make it small."""
    program, arguments = own_program(command.words), own_arguments(command.words)
    more = list(TOY.get(program, ()))
    if program in ("sddns train", "sddns sensitivity"):
        more += TINY_VIT if "--recipe" in str(command) else TINY
        if "--calibration" not in str(command):
            more.append("--calibration_share=0.4")
        if "paper_cifar10" in str(command):
            more.append("--calibration=tfds:cifar10@test[:50]")
    if program == "sddns train":  # texts write different runs to one folder
        more.append("--noresume")
    if any("@test[" in word for word in arguments):  # toy sets are shorter
        arguments = [re.sub(r"(\d)000\b", r"\1", word) for word in arguments]
    return [*_expanded(arguments, folder), *more]


def _expanded(arguments, folder):
    for argument in arguments:
        if "*" in argument:
            yield from sorted(str(path.relative_to(folder)) for path in folder.glob(argument))
        else:
            yield argument


TRAINING = ("sddns train", "sddns sensitivity", "sddns export", "examples/folder_of_parts.py")


def needs_exports(command):
    """Whether a command reads what an export wrote, which takes long."""
    return any(word in str(command) for word in (".tflite", "exports/"))


def is_slow(command):
    """Whether a command trains or needs an export, which takes long."""
    return own_program(command.words) in TRAINING or needs_exports(command)


def kinds_of_options(command):
    """Program and options, each with the kind of source that it names."""
    words = [re.sub(r"=((?:folder|npz|tfds|mvtec):)?.*", r"=\1", w) for w in command.words]
    return own_program(command.words), frozenset(words)


def is_part_of_another(command):
    """Whether a command that trains or exports has options that are all among a longer one's."""
    program, options = kinds_of_options(command)
    longer = [kinds_of_options(other) for other in COMMANDS if runs_here(other)]
    return program in TRAINING and any(program == p and options < more for p, more in longer)


# What writes all that other commands read.
EXPORTING = next(
    command
    for command in COMMANDS
    if own_program(command.words) == "sddns export"
    and all(option in str(command) for option in ("--saved_model", "--tflite"))
)
RUN = [
    pytest.param(command, id=str(command), marks=[pytest.mark.slow] if is_slow(command) else [])
    for command in COMMANDS
    if runs_here(command) and not is_part_of_another(command)
]


@pytest.mark.parametrize("command", RUN)
def test_a_command_runs(command, toy, request, monkeypatch, capsys):
    if needs_exports(command):
        request.getfixturevalue("exported")
    if command == EXPORTING:
        return  # That has run it.
    monkeypatch.chdir(toy)
    files = sorted(map(str, (toy / "camera").iterdir()))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(files)))
    program, arguments = own_program(command.words), toy_arguments(command, toy)
    if program.startswith("sddns "):
        name = program.removeprefix("sddns ")
        assert run_sddns(name, arguments) == 0, capsys.readouterr().err
        return
    with loaded(program) as module:
        if takes_absl_flags(module):
            FLAGS([program, *arguments])
            module.main([program])
        else:
            module.main(arguments)
    assert capsys.readouterr().out


def test_a_command_is_left_out_where_a_longer_one_runs():
    run = [parameter.values[0] for parameter in RUN]
    for command in filter(runs_here, COMMANDS):
        assert command in run or any(
            kinds_of_options(command)[1] < kinds_of_options(other)[1] for other in run
        )
    assert {"sddns train", "sddns export"} <= {own_program(c.words) for c in run}


def test_the_toy_folder_is_asked_for_nothing_that_texts_do_not_name():
    assert {own_program(c.words) for c in COMMANDS if runs_here(c)} >= {
        f"sddns {name}" for name in cli.COMMANDS if not name.startswith("convert-")
    }


def test_a_command_that_does_not_run_would_be_found(toy, monkeypatch, capsys):
    monkeypatch.chdir(toy)
    words = ("sddns", "score", "--model=parts.keras", "--images=folder:camera")
    arguments = toy_arguments(Command("made up", words), toy)
    assert cli.main(["score", *arguments]) == 1
    assert "parts.keras" in capsys.readouterr().err
    assert not pathlib.Path("parts.keras").exists()
