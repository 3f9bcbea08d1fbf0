"""What a run prints: its settings first, a bar that fits a narrow terminal, its files and the next command last."""

import codecs
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
from types import SimpleNamespace

import pytest

from tests.helpers import LAST, ROOT, args_of, call, run_stage, stage_flags
from tests.helpers_processes import wait_until
from utils.command_line import ArgumentParser, run_command
from utils.errors import UserError
from utils.launch import failures


class Terminal:
    """A run of stage I under a pseudo-terminal of 80 columns; `screen` is all that it has written there."""

    def __init__(self, data, out, *flags):
        self.main, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        os.set_blocking(self.main, False)
        command = [sys.executable, str(ROOT / "ssd_stage_i.py"), *stage_flags("i", data, out, flags)]
        environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command, cwd=ROOT, stdin=other, stdout=other, stderr=other, env=environment, start_new_session=True
        )
        os.close(other)
        self.screen, self.decoder = "", codecs.getincrementaldecoder("utf-8")()  # a read may end within a character

    def read(self) -> bool:
        """Reads what has been written; returns whether the run has ended."""
        ended = self.process.poll() is not None
        try:
            while block := os.read(self.main, 65536):
                self.screen += self.decoder.decode(block)
        except OSError:  # there is nothing to read, or the run has ended
            pass
        return ended

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.process.kill()
        self.process.wait()
        os.close(self.main)


def shown_lines(screen) -> list[str]:
    """Everything that was ever shown on a line, without the commands that move the cursor."""
    return re.split(r"[\r\n]+", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen))


def test_the_bar_fits_eighty_columns_and_is_gone_before_the_table(plain_tree, tmp_path):
    with Terminal(plain_tree, tmp_path / "run", "-p", 1) as terminal:
        wait_until(terminal.read, "the run to end")
        assert terminal.process.returncode == 0, terminal.screen
    bars = [line for line in shown_lines(terminal.screen) if re.match(r"epoch \d/2 \|", line)]
    assert bars and max(map(len, bars)) <= 80
    later = [line for line in bars if "loss" in line]
    assert any(re.search(r"loss [\d.e+-]+, lr 0\.1, \d+ img/s, \w+ left", line) for line in later), later
    assert any("best" in line for line in bars if line.startswith("epoch 2/2"))
    table = terminal.screen[terminal.screen.index("Class mean |") :]
    assert "img/s" not in table


def test_control_c_is_acknowledged_at_once(plain_tree, tmp_path):
    with Terminal(plain_tree, tmp_path / "run", "--epochs", 1000, "-p", 1) as terminal:
        wait_until(lambda: terminal.read() or "img/s" in terminal.screen, "the first steps")
        os.killpg(terminal.process.pid, 2)
        wait_until(terminal.read, "the run to end")
        assert terminal.process.returncode == 75, terminal.screen
    assert terminal.screen.index("stopping after this step") < terminal.screen.index("stopped on request")
    last = [line for line in shown_lines(terminal.screen) if line.strip()][-1]
    assert last.startswith("ssd_stage_i.py: stopped on request")  # the bar is not on that line


def test_a_run_prints_settings_steps_and_a_note_on_a_queue_far_larger_than_the_data(plain_tree, tmp_path):
    flags = ["--cos", "--epochs", 1, "-p", 4, "--moco-k", 5000]
    out = run_stage("i", plain_tree, tmp_path / "run", *flags).out
    assert [line for line in out.splitlines() if line.startswith("--moco-k 5000: ") and line.endswith("take about 154")]
    block = out[: out.index("epoch 1/1")]
    for text in (
        "stage I", "154 training, 30 test, 24 validation images", "6 (1 many, 1 medium, 4 few-shot)",
        "resnet8 at 32 pixels", "of them train", "float32, 1 process", "epochs 1 to 1, 9 steps of 16 images",
        "0.1, cosine", str(tmp_path / "run"),
    ):  # fmt: skip
        assert text in block, text
    lines = [line for line in out.splitlines() if line.startswith("epoch 1/1 [")]
    assert len(lines) == 3
    pattern = r"loss [\d.e+-]+, .*top1_linear [\d.]+ %, .*\d+ images/s, data [\d.]+ of [\d.]+ s per step$"
    assert all(re.search(pattern, line) for line in lines), lines


def test_the_commands_at_the_end_run(plain_tree, tmp_path):
    """Starting with stage I, the last lines of each run give the command of the next."""
    stages, stage, words = [], "i", stage_flags("i", plain_tree, tmp_path / "stage_i", ["--epochs", 1])
    while stage:
        outcome = call(stage, words)
        assert outcome.status == 0 and "take about" not in outcome.out, outcome
        stages.append(stage)
        following = re.search(r"^next:\n  python (\S+) (.*)$", outcome.out, re.M)
        stage = (re.fullmatch(r"ssd_stage_(i+)\.py", following[1]) or [None, None])[1]
        given = shlex.split(following[2])
        assert ("--classifier" in given) == (stages == ["i", "ii", "iii"])  # the soft one is tuned
        out = [] if "--output_dir" in given else ["--output_dir", str(tmp_path / f"stage_{stage}")]
        words = ["--epochs", "1", "-b", "16", *out, *given]
    assert stages == ["i", "ii", "iii", "ii"]
    assert following[1] == "-m" and following[2].startswith("utils.report ")
    assert (tmp_path / "stage_iii_tuned" / LAST).exists()
    assert args_of(tmp_path / "stage_iii_tuned")["image_size"] == 32  # from checkpoint to checkpoint


def test_a_run_whose_output_is_closed_ends_in_one_line(plain_tree, tmp_path):
    command = [sys.executable, ROOT / "ssd_stage_i.py", *stage_flags("i", plain_tree, tmp_path, ["--epochs", 99])]
    run = subprocess.Popen(list(map(str, command)), cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert run.stdout.readline()
    run.stdout.close()  # as head does
    message = run.stderr.read()
    assert run.wait(300) == 141 and message.count("\n") == 1 and "--resume auto" in message


COMMAND = (
    "import sys; from utils.command_line import ArgumentParser, run_command\n"
    "sys.exit(run_command(lambda args: print({!r}), ArgumentParser(prog='program')))"
)


def run_with_output(file, text="table", **environment):
    """(exit status, stderr) of a small command whose output goes to a file; Python buffers it, as by default."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"} | environment
    command = [sys.executable, "-c", COMMAND.format(text)]
    done = subprocess.run(command, cwd=ROOT, env=variables, stdout=file, stderr=subprocess.PIPE, text=True)
    return done.returncode, done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_a_command_whose_output_cannot_be_written_ends_in_one_line():
    with open("/dev/full", "w") as full:
        assert run_with_output(full) == (2, "error: program: No space left on device\n")


@pytest.mark.parametrize(
    ("error", "status"), [(UserError("--flag: correct it"), 2), (OSError(5, "bad disk"), 2), (KeyboardInterrupt(), 130)]
)
def test_traceback_prints_the_stack_of_a_command_before_the_line(monkeypatch, capsys, error, status):
    def fail(args):
        raise error

    run_command(fail, ArgumentParser(prog="program"), [])
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    monkeypatch.setenv("TRACEBACK", "1")
    assert run_command(fail, ArgumentParser(prog="program"), []) == status
    err = capsys.readouterr().err
    assert err.startswith("Traceback") and "in fail\n" in err and err.endswith(f"\n{line}")


def test_traceback_shows_every_error_that_was_replaced(monkeypatch, capsys):
    """Also on a rank whose line rank 0 prints."""
    try:
        try:
            try:
                1 / 0  # noqa: B018
            except ZeroDivisionError:
                raise ValueError("inner") from None
        except ValueError:
            raise UserError("outer", on_all_ranks=True) from None
    except UserError as error:
        monkeypatch.setenv("TRACEBACK", "1")
        monkeypatch.setattr(failures, "get_dist_info", lambda: SimpleNamespace(rank=1))
        assert failures.describe_failure(error) == (2, "")
    err = capsys.readouterr().err
    assert "ZeroDivisionError" in err and "ValueError: inner" in err and "UserError: outer" in err


def test_a_command_whose_output_is_closed_ends_quietly():
    reader, writer = os.pipe()
    os.close(reader)
    assert run_with_output(writer) == (141, "")
    os.close(writer)


def test_what_a_terminal_cannot_show_is_escaped(tmp_path):
    with (tmp_path / "out").open("w") as file:
        assert run_with_output(file, "café \udcff", PYTHONIOENCODING="ascii:strict") == (0, "")
    assert (tmp_path / "out").read_text() == "caf\\xe9 \\udcff\n"
