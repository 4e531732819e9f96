"""What the project's texts tell people to type: commands and Python, taken out of the texts.

Texts are README, CONTRIBUTING, the pages of the documentation, the docstrings of the package, the
tools and the examples, and what recipes and the files of `examples/serving` say about themselves.
"""

import ast
import inspect
import json
import pathlib
import re
import shlex
import textwrap
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = sorted(
    path for folder in ("sddns_tf", "examples", "tools") for path in (ROOT / folder).rglob("*.py")
)
COMMENTED = sorted(path for path in (ROOT / "examples" / "serving").iterdir() if path.is_file())
RECIPES = sorted((ROOT / "sddns_tf" / "cli" / "recipes").glob("*.json"))

_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
# How a command that stands in running text or in a docstring begins.
_PROGRAM = re.compile(r"(sddns|python3?|pip|mkdocs|ruff|tensorboard|find|docker) +[\w.\-/]")
_ASSIGNMENT = re.compile(r"[A-Za-z_]\w*=")
_OPERATORS = {"&&", "||", "|", ";", "&"}


class Command(NamedTuple):
    """One call of one program.

    Attributes:
        place: Path of the text, and what of it, for messages.
        words: The program and its arguments.
    """

    place: str
    words: tuple

    def __str__(self):
        return shlex.join(self.words)


class Code(NamedTuple):
    """Python that a text shows.

    Attributes:
        place: Path of the text, and what of it.
        source: The code.
        module: Name of the module whose docstring it stands in, or None.
    """

    place: str
    source: str
    module: str | None


def split(line):
    """The simple commands of a line of shell, each a tuple of words without its redirections."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    commands, words, skip = [], [], False
    for word in [*lexer, ";"]:
        if skip:
            skip = False
        elif word in _OPERATORS:
            while words and _ASSIGNMENT.match(words[0]):
                words.pop(0)
            commands += [tuple(words)] if words else []
            words = []
        elif set(word) <= {"<", ">"}:
            skip = True
        else:
            words.append(word)
    return commands


def commands_of_markdown(text, place):
    """Commands of fenced shell blocks, and of code in running text."""
    found = []
    for _, language, block in _FENCE.findall(text):
        if language in ("bash", "sh", "shell", "console"):
            found += _commands_of_lines(block, place)
    return found + _commands_in_backticks(_FENCE.sub("", text), place)


def commands_of_docstring(text, place):
    """Commands of indented lines, and of code in running text."""
    lines = text.replace("\\\n", " ").splitlines()
    shown = "\n".join(line for line in lines if line[:4] == "    " and _PROGRAM.match(line.strip()))
    return _commands_of_lines(shown, place) + _commands_in_backticks(text, place)


def _commands_of_lines(block, place):
    lines = block.replace("\\\n", " ").splitlines()
    return [Command(place, words) for line in lines for words in split(line)]


def _commands_in_backticks(text, place):
    # A span may be broken over two lines.
    spans = re.findall(r"(?<!`)`([^`]+)`(?!`)", text)
    lines = [" ".join(span.split()) for span in spans if _PROGRAM.match(span)]
    return [Command(place, words) for line in lines for words in split(line)]


def docstrings(path):
    """Docstrings of a file, each with a name of where it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node)
            if text:
                yield f"{path.relative_to(ROOT)}:{getattr(node, 'name', '')}".rstrip(":"), text


def all_commands():
    """Commands of all texts."""
    found = []
    for path in PAGES:
        found += commands_of_markdown(path.read_text(encoding="utf-8"), path.name)
    for path in SOURCES:
        for place, text in docstrings(path):
            found += commands_of_docstring(text, place)
    for path in COMMENTED:
        comments = re.findall(r"^ *#(.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
        found += commands_of_docstring("\n".join(comments), path.name)
    for path in RECIPES:
        about = json.loads(path.read_text(encoding="utf-8"))["about"]
        for line in [about] if isinstance(about, str) else about:
            found += commands_of_docstring(f"    {line}", path.name)
            found += _commands_in_backticks(line, path.name)
    cells = json.loads((ROOT / "examples" / "story.ipynb").read_text(encoding="utf-8"))["cells"]
    for cell in cells:
        if cell["cell_type"] == "markdown":
            found += commands_of_markdown("".join(cell["source"]), "story.ipynb")
    return found


def all_code():
    """Python blocks of all pages, and the examples of all docstrings of the package."""
    found = []
    for path in PAGES:
        blocks = _FENCE.findall(path.read_text(encoding="utf-8"))
        for number, (_, language, source) in enumerate(blocks):
            if language == "python":
                found.append(Code(f"{path.name}:{number}", source, None))
    for path in SOURCES:
        if path.is_relative_to(ROOT / "sddns_tf"):
            module = ".".join(path.relative_to(ROOT).with_suffix("").parts)
            for place, text in docstrings(path):
                source = code_of_docstring(text)
                if source:
                    found.append(Code(place, source, module.removesuffix(".__init__")))
    return found


def code_of_docstring(text):
    """What stands behind `>>>` and `...`, and in blocks of Python."""
    text = inspect.cleandoc(text)
    lines = (line.strip() for line in text.splitlines())
    shown = "".join(line[4:] + "\n" for line in lines if line[:3] in (">>>", "...") and line[3:])
    blocks = [textwrap.dedent(block) for _, kind, block in _FENCE.findall(text) if kind == "python"]
    return "\n".join([shown, *blocks]).strip()
