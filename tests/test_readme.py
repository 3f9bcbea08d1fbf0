"""What the documents mention exists: links, modules, functions, files and flags; their commands and code run."""

import importlib.util
import re
import shlex

import numpy as np
import pytest
from PIL import Image

from benchmarks import gpu_check, probe, study, traffic
from datasets.prepare import cli, verify
from scripts import check_recipes
from tests.helpers import PARSERS, ROOT
from utils import export, predict, report
from weights import download

PATTERNS = ("*.md", "[a-z]*/README.md", "docs/*.md", "tests/*/README.md")
DOCUMENTS = sorted(path for pattern in PATTERNS for path in ROOT.glob(pattern))
TEXTS = {str(path.relative_to(ROOT)): path.read_text() for path in DOCUMENTS}
MODULES = {  # whose commands in the documents are parsed
    "datasets.prepare": cli.build_parser(),
    "datasets.verify": verify.build_parser(),
    "utils.report": report.get_parser(),
    "utils.predict": predict.get_parser(),
    "utils.export": export.get_parser(),
    "weights.download": download.build_parser(),
    "benchmarks.study": study.get_parser(),
    "benchmarks.traffic": traffic.get_parser(),
    "benchmarks.probe": probe.get_parser(),
}
FOREIGN_FLAGS = {  # of docs/extending.md, benchmarks, other programs and scripts/test.sh
    "--index-url", "--nnodes", "--nproc-per-node", "--rdzv-backend", "--rdzv-endpoint", "--standalone",
    "--ntasks-per-node", "--gpus-per-node", "--gpus-per-task", "--signal", "--full",
    "--max-restarts", "--rdzv-conf", "--local-addr", "--partition", "--time", "--open-mode", "--kill-on-bad-exit",
    "--wait", "--variants", "--help", "--no-", "--logit-adjustment", "--student-ckpt",
    "--no-memory", "--repeats", "--check", "--shm-size", "--flag",
}  # fmt: skip


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
    if (match := re.search(r"\bssd_stage_(i+)\.py +([-@].*?)'?$", line)) and "--help" not in line
]


MODULE_COMMANDS = [
    (name, match[1], match[2])
    for name, line in commands()
    if (match := re.search(r"python -m ([\w.]+) +(\S.*)$", line)) and match[1] in MODULES and "..." not in line
]
TRAIN_COMMANDS = [(name, m[1]) for name, line in commands() if (m := re.search(r"bash scripts/train\.sh (.+)$", line))]


def defined_in(file: str, name: str) -> bool:
    """Whether a file defines a function, class or constant; of a dotted name, every part."""
    text = (ROOT / file).read_text()
    return all(
        re.search(rf"^\s*(def|class) {part}\b", text, flags=re.M) or re.search(rf"^{part} = ", text, flags=re.M)
        for part in name.split(".")
    )


@pytest.mark.parametrize("document", DOCUMENTS, ids=list(TEXTS))
def test_links_modules_functions_and_tests_named_in_a_document_exist(document):
    text = document.read_text()
    for link in re.findall(r"\]\(([^):]+)\)", text):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), flags=re.M)
            assert anchor in [re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings], link
    for module in re.findall(r"python -m ([a-z_.]+[a-z])", text):
        assert module in ("venv", "pip", "pytest") or importlib.util.find_spec(module), module
    for file, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", text):
        assert (ROOT / file).is_file() and defined_in(file, name), f"{file}:{name}"
    for file in re.findall(r"tests/[\w/]*test_\w+\.py", text):
        assert (ROOT / file).is_file(), file


def test_every_flag_of_the_documents_exists():
    """Everything that looks like a flag, except in docs/benchmarks.md, is a flag of a command line of this project."""
    parsers = [*(get_parser() for get_parser in PARSERS.values()), *MODULES.values(), gpu_check.get_parser()]
    parsers += MODULES["datasets.prepare"]._subparsers._group_actions[0].choices.values()
    known = {option.replace("_", "-") for parser in parsers for option in parser._option_string_actions}
    for name, text in TEXTS.items():
        if name != "docs/benchmarks.md":
            text = re.sub(r"<!--.*?-->|^\|[-:| ]+\|$", "", text, flags=re.M)
            flags = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text)}
            assert flags - known - FOREIGN_FLAGS == set(), name


@pytest.mark.parametrize(("name", "stage", "words"), STAGE_COMMANDS)
def test_stage_commands_parse(name, stage, words, tmp_path):
    folders = ("DIR", "photos", "eight-lt", "cifar100-lt")
    PARSERS[stage]().parse_args([str(tmp_path) if word in folders else word for word in shlex.split(words)])


@pytest.mark.parametrize(("name", "module", "words"), MODULE_COMMANDS)
def test_the_commands_of_modules_parse(name, module, words):
    MODULES[module].parse_args(shlex.split(words.partition(" > ")[0], comments=True))


def test_the_documents_have_commands_of_every_stage_and_module():
    stages = [stage for name, stage, _ in STAGE_COMMANDS if name == "README.md"]
    assert {stage: stages.count(stage) for stage in PARSERS} == {"i": 3, "ii": 2, "iii": 3} and TRAIN_COMMANDS
    found = [module for _, module, _ in MODULE_COMMANDS]
    assert set(found) == set(MODULES) and found.count("datasets.prepare") >= 9 and found.count("datasets.verify") >= 2


@pytest.mark.parametrize(("name", "words"), TRAIN_COMMANDS)
def test_the_recipes_of_train_commands_parse(name, words, plain_tree, tmp_path):
    config, _, out, *flags = shlex.split(words)
    config = "configs/own_photos" if config == "my_recipes" else config  # README.md copies it
    command = map(str, [ROOT / config, plain_tree, tmp_path / out, *flags])
    check_recipes.check_all(check_recipes.get_parser().parse_args(list(command)))


@pytest.mark.parametrize("name", ["README.md", "docs/usage.md", "weights/README.md"])
def test_the_python_examples_run(name, trained, tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    for folder in ("stage_iii", "stage_iii_released"):
        (tmp_path / "weights" / folder).symlink_to(trained["iii"])
    (tmp_path / "hubconf.py").symlink_to(ROOT / "hubconf.py")
    pixels = np.random.default_rng(0).integers(0, 256, (300, 400, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", TEXTS[name], flags=re.M | re.S)
    assert blocks
    for code in blocks:
        exec(code, scope := {})
        assert type(scope["network"]).__name__ == "SDL"


def test_measured_figures_are_those_of_the_study():
    """Every row of a table that links to a cell of the study has the accuracies that docs/study.md has for it."""
    study_rows = {}
    for group in ("100_epochs", "100_epochs_splits_4"):
        mark = f"<!-- table: imbalance_100_{group.removesuffix('_epochs')} -->"
        table = TEXTS["docs/study.md"].partition(mark)[2].partition("<!-- end -->")[0]
        for name, classifier, figures in re.findall(r"^\| ([\w.]+), (\w+) \| \d \| (.*) \|$", table, re.M):
            many, medium, few, _, overall, _ = figures.split(" | ")
            study_rows.setdefault(f"{group}/{name}", []).append((classifier, [many, medium, few, overall]))
    for name, least in (("README.md", 6), ("configs/README.md", 5)):
        rows = re.findall(r"^\|.*imbalance_100/100_epochs.*$", TEXTS[name], re.M)
        assert len(rows) >= least
        for row in rows:
            cell = re.search(r"imbalance_100/([\w./]+)\)", row)[1]
            figures = re.findall(r"\d\d\.\d(?: ± \d\.\d)?", row)
            expected = [own for classifier, own in study_rows[cell] if len(study_rows[cell]) == 1 or classifier in row]
            assert [figures] == expected, row


def test_the_recipes_are_all_in_their_readme():
    recipes = {folder.name for folder in (ROOT / "configs").iterdir() if folder.is_dir()}
    assert set(re.findall(r"\[(\w+)\]\(\1\)", TEXTS["configs/README.md"])) == recipes
