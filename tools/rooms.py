"""The levels of the package: one list that says which module may import which.

    python tools/rooms.py

Writes `.importlinter`, the contracts that `lint-imports` checks, and the table of modules ("rooms")
in CONTRIBUTING.md. The descriptions in the table are the first lines of the modules' docstrings.
"""

import ast
import pathlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "sddns_tf"

# Lowest level first. A room imports only rooms of lower levels, and none of its own level.
LEVELS = (
    ("types", "version", "pictures"),
    ("keras_private", "files", "validation", "replicas", "image_ops", "tracing"),
    ("freezing", "batches", "optimization"),
    (
        "networks",
        "losses",
        "schedules",
        "metrics",
        "calibration",
        "image_sources",
        "gelu",
        "group_normalization",
    ),
    ("vit", "convnet", "efficientnet_lite", "heads", "shifts", "bank", "local"),
    ("aligned", "components"),
    ("backbones", "dino_weights", "views", "features", "data"),
    ("building", "second_voice"),
    ("self_distillation", "detector"),
    ("evaluation", "plots"),
    ("callbacks", "report", "sensitivity", "export", "beam"),
    ("_registration",),
    ("cli",),
    ("__main__",),
)
# Training code never reaches a served graph.
SERVED = (
    "bank",
    "local",
    "aligned",
    "components",
    "second_voice",
    "calibration",
    "features",
    "building",
    "detector",
    "export",
)
TRAINING = (
    "batches",
    "optimization",
    "views",
    "shifts",
    "losses",
    "schedules",
    "self_distillation",
    "callbacks",
)

BEGIN, END = "<!-- rooms: made by tools/rooms.py -->", "<!-- end of rooms -->"


def existing():
    """Return the levels, without rooms that do not exist."""
    there = {path.stem for path in PACKAGE.glob("*.py")} | {
        path.parent.name for path in PACKAGE.glob("*/__init__.py")
    }
    return [[room for room in level if room in there] for level in LEVELS]


def contracts():
    """Return the text of `.importlinter`."""
    layers = "\n".join(f"    {' | '.join(level)}" for level in reversed(existing()))
    there = {room for level in existing() for room in level}

    def listed(rooms):
        return "\n".join(f"    sddns_tf.{room}" for room in rooms if room in there)

    return f"""# Made by tools/rooms.py; change the list there.
[importlinter]
root_package = sddns_tf

[importlinter:contract:levels]
name = Rooms import lower rooms only
type = layers
containers = sddns_tf
exhaustive = true
layers =
{layers}

[importlinter:contract:served]
name = Training code never reaches a served graph
type = forbidden
source_modules =
{listed(SERVED)}
forbidden_modules =
{listed(TRAINING)}
"""


def first_line(room):
    """Return the first line of a room's docstring."""
    path = PACKAGE / f"{room}.py"
    path = path if path.is_file() else PACKAGE / room / "__init__.py"
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    line = docstring.partition("\n\n")[0].replace("\n", " ")
    return line.replace("|", "\\|").removesuffix(".")


def table():
    """Return the table of rooms in Markdown, from the lowest level up."""
    lines = ["| level | room | holds |", "|---|---|---|"]
    for number, level in enumerate(existing()):
        for room in level:
            is_package = (PACKAGE / room).is_dir()
            name = f"`{room}/`" if is_package else f"`{room}`"
            lines.append(f"| {number} | {name} | {first_line(room)} |")
    return "\n".join(lines)


def contributing(text):
    """Return the text of CONTRIBUTING.md with the current table."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


def main():
    """Write both files."""
    (ROOT / ".importlinter").write_text(contracts(), encoding="utf-8")
    path = ROOT / "CONTRIBUTING.md"
    path.write_text(contributing(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
