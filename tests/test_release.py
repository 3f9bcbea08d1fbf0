"""What a release consists of besides its code: one version, a changelog, a citation, a workflow, a picture."""

import importlib
import re
import xml.etree.ElementTree as ElementTree

import pytest

from tests.helpers import ROOT, args_of
from utils.command_line import __version__

MAINS = sorted(
    str(file.relative_to(ROOT).with_suffix("")).replace("/", ".")
    for pattern in ("*.py", "benchmarks/*.py", "datasets/**/*.py", "scripts/*.py", "utils/*.py", "weights/*.py")
    for file in ROOT.glob(pattern)
    if "def main(argv=None)" in file.read_text()
)
REFERENCE = {"type", "title", "authors", "collection-title", "year", "start", "end", "url"}


def read_cff(text: str):
    """What a CFF file of nested mappings and lists of mappings holds: values are str, dict or list of dict."""

    def read(lines):
        if lines[0].startswith("- "):
            entries = re.split(r"^- ", "\n".join(lines), flags=re.M)[1:]
            return [read([line.removeprefix("  ") for line in entry.splitlines()]) for entry in entries]
        found, name = {}, None
        for line in lines:
            if line.startswith("  "):
                found[name].append(line[2:])
            else:
                name, colon, value = line.partition(":")
                assert colon and re.fullmatch(r"[a-z-]+", name) and name not in found, line
                found[name] = value.strip().strip('"') or []
                assert value.startswith('"', 1) or ": " not in value, f"{line}: needs quotation marks"
        return {name: read(value) if isinstance(value, list) else value for name, value in found.items()}

    return read(text.splitlines())


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


def test_a_run_records_the_version(trained):
    assert args_of(trained["i"])["environment"]["version"] == __version__


def test_the_changelog_has_the_version_in_its_usual_form():
    text = (ROOT / "CHANGELOG.md").read_text()
    first, *releases = re.findall(r"^## (.*)$", text, flags=re.M)
    assert first == "Unreleased" and re.fullmatch(rf"{re.escape(__version__)} - \d{{4}}-\d\d-\d\d", releases[0])
    assert set(re.findall(r"^### (.*)$", text, flags=re.M)) <= {
        "Added", "Changed", "Deprecated", "Removed", "Fixed", "Security",
    }  # fmt: skip


def test_the_citation_file_has_what_cff_1_2_requires():
    cff = read_cff((ROOT / "CITATION.cff").read_text())
    assert cff["cff-version"] == "1.2.0" and {"message", "title", "authors"} <= set(cff)
    assert (cff["type"], cff["version"], cff["license"]) == ("software", __version__, "MIT")
    released = re.search(r"^## [\d.]+ - (.*)$", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)[1]
    assert cff["date-released"] == released
    for authors in (cff["authors"], cff["preferred-citation"]["authors"]):
        assert all(set(author) in ({"name"}, {"family-names", "given-names"}) for author in authors)


def test_the_citation_is_the_paper():
    paper = read_cff((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    assert set(paper) == REFERENCE and paper["type"] == "conference-paper"
    names = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in paper["authors"])
    bibtex = dict(re.findall(r"^  (\w+)=\{(.*)\},?$", (ROOT / "README.md").read_text(), flags=re.M))
    assert names == bibtex["author"] and paper["title"].lower() == bibtex["title"].lower()
    assert (f"{paper['start']}--{paper['end']}", paper["year"]) == (bibtex["pages"], bibtex["year"])
    assert paper["collection-title"].startswith(bibtex["booktitle"])


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
