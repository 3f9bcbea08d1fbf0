"""scripts/gpu_check.sh reports every part, whatever becomes of it; CI runs it in its quick form on a CPU."""

import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import gpu_check, step
from benchmarks.gpu_check import Part
from tests.helpers import ROOT
from tests.helpers_processes import alive, wait_until

HANG = "trap '' TERM; sleep 600 & echo child $!; wait"  # the child ignores the signal too


def python(code):
    return [sys.executable, "-c", code]


def check(monkeypatch, file, *parts, flags=()):
    """(exit status, report) of a run of these parts."""
    monkeypatch.setattr(gpu_check, "parts", lambda args, work: list(parts))
    monkeypatch.setattr(gpu_check, "GRACE", 0.1)
    return gpu_check.main(["--device", "cpu", "--quick", "--write", str(file), *flags]), file.read_text()


def test_every_part_is_reported_at_once_and_a_failed_or_hanging_one_with_its_last_lines(monkeypatch, tmp_path):
    file = tmp_path / "report.md"
    fails = "import sys; print('| a |'); print(*range(1000), sep='\\n', file=sys.stderr); sys.exit('why it failed')"
    parts = [
        Part("first", 60, python("print('| one | table |')")),
        Part("second", 60, python(fails)),
        Part("hangs", 3, ["bash", "-c", HANG]),
        Part("last", 60, python(f"print(open({str(file)!r}).read().count('passed, '))"), tables=False),
    ]
    status, report = check(monkeypatch, file, *parts)
    assert status == 1
    assert "2 of 4 parts passed" in report and "| second | **failed** with status 1 |" in report
    assert "| one | table |" in report and "\n| a |\n" in report
    assert "```\n2\n```" in report  # the summary's and the first part's, as the last part found it
    assert "\n999\nwhy it failed\n```" in report and "\n970\n" not in report
    assert "**stopped** after its limit of 3 s" in report and torch.__version__ in report
    child = int(re.search(r"^child (\d+)$", report, re.M)[1])
    wait_until(lambda: not alive(child), "the child of the part to end")
    assert check(monkeypatch, file, parts[0])[0] == 0


def test_parts_that_the_time_does_not_suffice_for_are_named_and_are_no_success(monkeypatch, tmp_path):
    runs = python(f"open({str(tmp_path / 'ran')!r}, 'w')")
    parts = [Part("first", 60, runs), Part("second", 60, runs)]
    status, report = check(monkeypatch, tmp_path / "report.md", *parts, flags=["--minutes", "1e-9"])
    assert status == 1 and not (tmp_path / "ran").exists()
    assert report.count("**left out**: no time was left") == 2 + 2  # in the list and in its section


@pytest.mark.parametrize("quick", [True, False])
def test_the_parts_have_the_names_that_only_takes_and_commands_that_parse(tmp_path, quick):
    args = gpu_check.get_parser().parse_args(["--device", "cpu", *(["--quick"] if quick else [])])
    parts = gpu_check.parts(args, tmp_path)
    assert tuple(part.name for part in parts) == gpu_check.PARTS
    assert {word for part in parts for word in part.command if word in step.VARIANTS} == set(step.VARIANTS)
    for part in parts:
        if "benchmarks.step" in part.command:
            words = part.command[3:]
            step.get_parser("--drift" in words).parse_args(words)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device")
def test_without_a_gpu_it_is_one_line_and_status_2(tmp_path):
    command = ["bash", ROOT / "scripts" / "gpu_check.sh"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=os.environ | {"PYTHON": sys.executable}
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --device cuda: no CUDA device") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
