"""What a release consists of besides its code: one version, a changelog, a citation, a workflow, a picture."""

import importlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.helpers import ROOT
from utils.command_line import __version__

MAINS = sorted(
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for pattern in ("*.py", "benchmarks/*.py", "datasets/**/*.py", "scripts/*.py", "utils/*.py", "weights/*.py")
    for file in ROOT.glob(pattern)
    if "def main(argv=None)" in file.read_text()
)


@pytest.mark.parametrize("module", MAINS)
def test_every_command_prints_the_version(module, capsys):
    with pytest.raises(SystemExit) as caught:
        importlib.import_module(module).main(["--version"])
    assert caught.value.code == 0 and capsys.readouterr().out == f"SSD-LT {__version__}\n"


def test_these_are_all_commands():
    assert {"ssd_stage_i", "ssd_stage_ii", "ssd_stage_iii", "utils.report", "utils.predict", "utils.export"} < set(
        MAINS
    )
    assert {"datasets.prepare.cli", "datasets.prepare.verify", "weights.download", "benchmarks.study"} < set(MAINS)


def test_the_changelog_has_the_version_in_its_usual_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *releases = re.findall(r"^## (.*)$", text, flags=re.M)
    assert first == "Unreleased" and re.fullmatch(rf"{re.escape(__version__)} - \d{{4}}-\d\d-\d\d", releases[0])
    assert set(re.findall(r"^### (.*)$", text, flags=re.M)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


def test_the_citation_has_the_version_its_date_and_the_paper():
    cff, changelog, readme = ((ROOT / name).read_text() for name in ("CITATION.cff", "CHANGELOG.md", "README.md"))
    released = re.search(r"^## [\d.]+ - (.*)$", changelog, flags=re.M)[1]
    bibtex = dict(re.findall(r"^  (\w+)=\{(.*)\},?$", readme, flags=re.M))
    start, end = bibtex["pages"].split("--")
    lines = ["cff-version: 1.2.0", "type: software", f"version: {__version__}", "license: MIT", "authors:"]
    lines += [f'date-released: "{released}"', "preferred-citation:", "  type: conference-paper"]
    lines += [f"  title: {bibtex['title']}", f"  year: {bibtex['year']}", f"  start: {start}", f"  end: {end}"]
    found = cff.lower().splitlines()
    assert [line for line in lines if line.lower() not in found] == []
    assert f"  collection-title: {bibtex['booktitle']}" in cff
    names = re.findall(r"- family-names: (.*)\n +given-names: (.*)$", cff, flags=re.M)
    assert " and ".join(map(", ".join, names)) == bibtex["author"]
    assert not re.search(r'^[ -]*[a-z-]+: [^"\n]*: ', cff, flags=re.M)  # needs quotation marks


def test_the_workflow_calls_ci_on_the_oldest_and_the_newest_python():
    text = (ROOT / ".github" / "workflows" / "test.yml").read_text()
    oldest = re.search(r'target-version = "py3(\d+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f'python: ["3.{oldest}", "3.x"]' in text and "run: bash .ci/run" in text


def test_the_picture_of_the_method_is_valid_and_has_dark_colors():
    text = (ROOT / "docs" / "method.svg").read_text()
    root = ElementTree.fromstring(text)
    classes = {element.get("class") for element in root.iter()} - {None}
    light, dark = text.split("@media (prefers-color-scheme: dark)")
    for name in ("page", "band", "data", "loss", "trains", "frozen", "average", "arrow", "tip"):
        assert any(name in own.split() for own in classes) and f".{name}" in light and f".{name}" in dark
    labels = "".join(root.itertext())
    for word in ("ssd_stage_i.py", "ssd_stage_ii.py", "ssd_stage_iii.py", "--last_stage_ckpt", "--teacher_ckpt"):
        assert word in labels
