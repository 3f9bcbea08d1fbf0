"""What the documents mention exists: links, modules, functions, files and flags; their commands and code run."""

import argparse
import importlib.util
import re
import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import models
import ssd_stage_i
import ssd_stage_ii
import ssd_stage_iii
from benchmarks import gpu_check, study, traffic
from datasets.prepare import cli, verify
from tests.helpers import ROOT
from utils import export, predict, report
from weights import download

PATTERNS = ("*.md", "[a-z]*/README.md", "docs/*.md", "tests/*/README.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
PARSERS = {"i": ssd_stage_i.get_parser(), "ii": ssd_stage_ii.get_parser(), "iii": ssd_stage_iii.get_parser()}
FOREIGN_FLAGS = {  # of docs/extending.md, benchmarks, pip, torchrun, srun, sbatch, scripts/test.sh and scripts/demo.sh
    "--index-url", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--standalone",
    "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--signal", "--requeue", "--nodes", "--full", "--smoke",
    "--max-restarts", "--rdzv-conf", "--local-addr", "--partition", "--time", "--open-mode", "--kill-on-bad-exit",
    "--wait", "--variants",
    "--kill-on-invalid-dep", "--help", "--no-", "--logit-adjustment", "--student-ckpt",
    "--no-memory", "--repeats",
}  # fmt: skip

each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=list(TEXTS))


def commands() -> list[tuple[str, str]]:
    """(document, command) for every line of a code block, with lines that end in a backslash joined."""
    found = []
    for name, text in TEXTS.items():
        fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S)
        blocks = [block for language, block in fenced if language in ("", "bash", "sh")]
        blocks += re.findall(r"`([^`\n]*python [^`\n]*)`", text) + re.findall(r"^    (.*)$", text, flags=re.M)
        for block in blocks:
            found += [(name, line.strip()) for line in block.replace("\\\n", " ").splitlines()]
    return found


STAGE_COMMANDS = [
    (name, *match.groups())
    for name, line in commands()
    if (match := re.search(r"\bssd_stage_(i+)\.py +([-@].*)$", line)) and "--help" not in line
]


def defined_in(file: str, name: str) -> bool:
    """Whether a file defines a function, class or constant; of a dotted name, every part."""
    text = (ROOT / file).read_text()
    return all(
        re.search(rf"^\s*(def|class) {part}\b", text, flags=re.M) or re.search(rf"^{part} = ", text, flags=re.M)
        for part in name.split(".")
    )


def test_the_readme_has_at_most_180_lines():
    assert len(TEXTS["README.md"].splitlines()) <= 180


@each_document
def test_relative_links_resolve(document):
    for link in re.findall(r"\]\(([^)#:]+)\)", document.read_text()):
        assert (document.parent / link).exists(), link


@each_document
def test_modules_named_in_commands_exist(document):
    for module in re.findall(r"python -m ([a-z_.]+[a-z])", document.read_text()):
        if module.split(".")[0] not in ("venv", "pip", "pytest"):
            assert importlib.util.find_spec(module), module


@each_document
def test_functions_named_with_their_file_exist(document):
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", document.read_text()):
        assert (ROOT / file).is_file() and defined_in(file, name), f"{file}:{name}"


@pytest.mark.parametrize("name", ["README.md", *(name for name in TEXTS if name.startswith("docs/"))])
def test_test_files_named_in_documents_exist(name):
    for file in re.findall(r"tests/(?:\w+/)?(test_\w+\.py)", TEXTS[name]):
        assert list(ROOT.glob(f"tests/**/{file}")), file


def test_every_flag_of_the_documents_exists():
    """Everything that looks like a flag, except in docs/benchmarks.md, is a flag of a command line of this project."""
    parsers = [
        *PARSERS.values(),
        cli.build_parser(),
        verify.build_parser(),
        download.build_parser(),
        report.get_parser(),
        predict.get_parser(),
        export.get_parser(),
        study.get_parser(),
        gpu_check.get_parser(),
        traffic.get_parser(),
    ]
    parsers += parsers[3]._subparsers._group_actions[0].choices.values()
    known = {option.replace("_", "-") for parser in parsers for option in parser._option_string_actions}
    for name, text in TEXTS.items():
        if name != "docs/benchmarks.md":
            text = re.sub(r"<!--.*?-->|^\|[-:| ]+\|$", "", text, flags=re.M)
            flags = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)}
            assert flags - known - FOREIGN_FLAGS == set(), name


def test_the_documents_mention_every_flag():
    text = TEXTS["README.md"] + TEXTS["docs/usage.md"]
    mentioned = set(re.findall(r"(?<![\w-])--?[a-zA-Z][\w-]*", text))
    for parser in PARSERS.values():
        for action in parser._actions:
            if action.dest not in ("help", "data", argparse.SUPPRESS):
                assert mentioned & set(action.option_strings), action.option_strings


@pytest.mark.parametrize(("name", "stage", "words"), STAGE_COMMANDS)
def test_stage_commands_parse(name, stage, words, tmp_path):
    PARSERS[stage].parse_args([str(tmp_path) if word in ("DIR", "photos") else word for word in shlex.split(words)])


def test_the_readme_has_the_commands_of_every_stage():
    stages = [stage for name, stage, _ in STAGE_COMMANDS if name == "README.md"]
    assert {stage: stages.count(stage) for stage in PARSERS} == {"i": 3, "ii": 2, "iii": 3}


def test_prepare_commands_in_documents_parse(tmp_path):
    parser, found = cli.build_parser(), 0
    for _, line in commands():
        match = re.search(r"python -m datasets\.prepare (.*)$", line)
        if match:
            parser.parse_args(shlex.split(match[1]))
            found += 1
    assert found >= 9


def test_verify_commands_in_documents_parse():
    lines = [match[1] for _, line in commands() if (match := re.search(r"python -m datasets\.verify (.*)$", line))]
    for line in lines:
        verify.build_parser().parse_args(shlex.split(line))
    assert len(lines) >= 2


def test_the_python_example_runs(trained, tmp_path, monkeypatch, capsys):
    (code,) = re.findall(r"^```python\n(.*?)^```$", TEXTS["docs/usage.md"], flags=re.M | re.S)
    folder = tmp_path / "weights" / "stage_iii"
    folder.mkdir(parents=True)
    (folder / "last_checkpoint.pth.tar").symlink_to(trained["iii"] / "last_checkpoint.pth.tar")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    scope = {"models": models, "torch": torch}
    exec(code, scope)
    assert scope["soft"].shape == (1, 6) and "indices" in capsys.readouterr().out
