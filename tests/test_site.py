"""The site: formulas become MathML, and the reference holds every public name."""

import importlib
import importlib.util
import re

import pytest
from texts import ROOT

import sddns_tf

REFERENCE = "\n".join(path.read_text() for path in (ROOT / "docs" / "reference").glob("*.md"))


@pytest.fixture(scope="module")
def formulas():
    pytest.importorskip("latex2mathml")
    path = ROOT / "docs" / "_hooks" / "formulas.py"
    spec = importlib.util.spec_from_file_location("formulas", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_formulas_become_mathml(formulas):
    page = (
        r'<p>With <span class="arithmatex">\(p \le \alpha\)</span> and</p>'
        r'<div class="arithmatex">\[ 1 &lt; \frac{a}{b} \]</div> <code>\(x\)</code>'
    )
    shown = formulas.on_page_content(page, page=None, config=None, files=None)
    assert shown.count("<math") == 2
    assert 'display="inline"' in shown
    assert 'display="block"' in shown
    assert "<mfrac>" in shown
    assert "arithmatex" not in shown
    assert r"<code>\(x\)</code>" in shown  # code is left alone


def test_every_formula_of_the_pages_can_be_shown(formulas):
    found = []
    for path in (ROOT / "docs").glob("*.md"):
        found += re.findall(r"\\\((.+?)\\\)|\\\[(.+?)\\\]", path.read_text(), re.DOTALL)
    assert len(found) > 20
    for inline, block in found:
        marked = f'<span class="arithmatex">\\({inline or block}\\)</span>'
        shown = formulas.on_page_content(marked)
        assert shown.startswith("<math"), inline or block
        assert "\\" not in shown, inline or block


def public_names():
    """Names that `import sddns_tf` gives, those of its packages one by one."""
    for name in sorted(set(sddns_tf.__all__) - {"__version__"}):
        thing = getattr(sddns_tf, name)
        if not hasattr(thing, "__path__"):
            yield f"sddns_tf.{name}"
            continue
        inner = importlib.import_module(f"sddns_tf.{name}").__all__
        yield from (f"sddns_tf.{name}.{one}" for one in inner if not one.isupper())


@pytest.mark.parametrize("name", public_names())
def test_the_reference_has_every_public_name(name):
    module, _, attribute = name.rpartition(".")
    whole = (f"::: {name}\n", f"::: {name}.", f"heading: {name}}}", f"::: {module}\n")
    assert any(text in REFERENCE + "\n" for text in whole), f"{attribute} of {module}"


def test_the_reference_names_what_there_is():
    has_beam = importlib.util.find_spec("apache_beam") is not None
    for path in re.findall(r"^::: (\S+)", REFERENCE, re.MULTILINE):
        if path.startswith("sddns_tf.beam.") and not has_beam:
            continue  # `.ci/run` builds the site and runs the tests of Beam where it is installed.
        module, _, attribute = path.rpartition(".")
        try:
            importlib.import_module(path)
        except ImportError:
            assert hasattr(importlib.import_module(module), attribute), path
