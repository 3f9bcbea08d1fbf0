"""The documents speak of what is there: links, flags and modules."""

import importlib.util
import re

import pytest

import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from tests.helpers import ROOT

DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")])
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_resolve(document):
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / link).exists(), link


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_named_in_commands_exist(document):
    for module in re.findall(r"python -m ([a-z_.]+)", document.read_text()):
        if module.split(".")[0] in ("datasets", "utils", "weights", "benchmarks"):
            assert importlib.util.find_spec(module), module


def test_stage_commands_parse():
    """Every flag in a command line that the README gives is one of that stage's."""
    parsers = {"i": ssd_stage_i.get_parser(), "ii": ssd_stage_ii.get_parser(), "iii": ssd_stage_iii.get_parser()}
    lines = re.findall(r"^.*?python ssd_stage_(i+)\.py (.*)$", README, flags=re.M)
    assert len(lines) >= 8
    for stage, rest in lines:
        known = parsers[stage]._option_string_actions
        for word in rest.split("`")[0].split():
            assert not word.startswith("-") or word in known, word


def test_readme_or_documents_mention_every_flag():
    texts = " ".join(document.read_text() for document in DOCUMENTS)
    for script in (ssd_stage_i, ssd_stage_ii, ssd_stage_iii):
        for action in script.get_parser()._actions:
            if action.dest not in ("help", "data"):
                assert any(option in texts for option in action.option_strings), action.option_strings
