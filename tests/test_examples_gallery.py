"""Every script of the gallery, on tiny settings, as a user starts it."""

import inspect
import json
import os
import subprocess
import sys

import pytest
from scripts import EXAMPLES, example

# Script, arguments, what it must print, files it must leave.
RUNS = [
    ("custom_shift", ["--steps=10", "--output_dir=out"], "AUROC", ["out/*.png"]),
    (
        "folder_of_parts",
        ["--steps=10", "--image_size=32", "--output_dir=out"],
        "flagged",
        ["out/scores.csv", "out/most_suspicious.png", "out/detector.keras"],
    ),
    ("pretrained_dino", ["--preset=vit_tiny", "--image_size=32", "--count=20"], "AUROC", []),
    (
        "tensorboard",
        ["--epochs=1", "--steps=2", "--output_dir=out"],
        "tensorboard",
        ["out/**/*tfevents*"],
    ),
]
PROCESS = ("custom_backbone", ["--backbones=own", "--steps=2"], "own")
# It makes devices, which TensorFlow does before its first operation only.
DEVICES = ("multi_gpu", ["--virtual_cpus=2", "--steps=2", "--batch_size=32"], "images")


# The functions of scripts that cut up a photograph; `count` of them is how many pieces.
CUTTING = {"custom_shift": "pieces", "tensorboard": "crops"}


def cut_fewer(monkeypatch, module, name):
    """Let a function of a script cut a tenth of the pieces."""
    cut = getattr(module, name)

    def fewer(*arguments):
        bound = inspect.signature(cut).bind(*arguments)
        bound.arguments["count"] //= 10
        return cut(*bound.args)

    monkeypatch.setattr(module, name, fewer)


@pytest.mark.slow
@pytest.mark.parametrize(("script", "arguments", "said", "files"), RUNS, ids=lambda x: str(x)[:16])
def test_example(tmp_path, monkeypatch, capsys, script, arguments, said, files):
    monkeypatch.chdir(tmp_path)
    with example(script) as module:
        if script in CUTTING:
            cut_fewer(monkeypatch, module, CUTTING[script])
        module.FLAGS([script, *arguments])
        module.main([script])
    assert said.lower() in capsys.readouterr().out.lower()
    for pattern in files:
        assert any(path.stat().st_size for path in tmp_path.glob(pattern)), pattern


@pytest.mark.slow
def test_example_as_a_process(tmp_path):
    """One of them shows that a script starts as one."""
    script, arguments, said = PROCESS
    result = subprocess.run(
        [sys.executable, EXAMPLES / f"{script}.py", *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert said.lower() in result.stdout.lower()


def run_example(folder, script, arguments):
    os.chdir(folder)
    with example(script) as module:
        module.FLAGS([script, *arguments])
        module.main([script])


@pytest.mark.slow
def test_example_of_several_devices(fork, tmp_path):
    script, arguments, said = DEVICES
    process = fork(run_example, tmp_path, script, arguments)
    assert process.wait() == 0, process.errors[-3000:]
    assert said.lower() in process.out.lower()


def test_each_script_says_what_it_shows():
    scripts = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    for script in scripts:
        text = (EXAMPLES / f"{script}.py").read_text()
        assert f"{script}.py" in text.split('"""')[1]
    tested_elsewhere = {
        "quickstart", "cifar10", "serving_client", "edge_inference", "solar_cells",
    }  # fmt: skip
    assert {run[0] for run in [*RUNS, PROCESS, DEVICES]} | tested_elsewhere == set(scripts)


def run_code(folder, code):
    os.chdir(folder)
    exec(code, {"__name__": "__main__"})


@pytest.mark.slow
def test_the_notebook_runs(fork, tmp_path):
    """Its code as one script, with fewer images and steps."""
    cells = json.loads((EXAMPLES / "story.ipynb").read_text())["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    for long, short in (
        ("%matplotlib inline", ""),
        ("3000, 0)", "200, 0)"),
        ("1000, i)", "1000, i)[:80]"),
        ("auxiliary[::1500]", "auxiliary[::120]"),
        ("[0, 1, 1000, 1001, 2000, 2001]", "[0, 1, 2, 80, 81, 160]"),
        ("steps, batch = 300, 64", "steps, batch = 20, 32"),
    ):
        assert long in code
        code = code.replace(long, short)
    process = fork(run_code, tmp_path, code, MPLBACKEND="Agg")
    assert process.wait() == 0, process.errors[-3000:]
    assert process.out.count("AUROC") == 3
