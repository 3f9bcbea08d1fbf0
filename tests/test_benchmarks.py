"""The benchmarks run and print their tables, at tiny sizes; no timing is asserted."""

import pytest
import torch

from benchmarks import all as everything
from benchmarks import common, step, textbook
from benchmarks.all import MAINS, QUICK
from models import contrastive_loss, contrastive_loss_plain, distillation_loss

CPU = ["--device", "cpu"]
ROWS = {"loss": 2, "step": 12, "drift": 3, "loader": 6, "evaluate": 4, "arithmetic": 12}
VARIANTS = ["--variants", "float32", "channels_last", "bf16"]


def options(name):
    return [*QUICK[name].split(), *CPU, *(VARIANTS if name in ("step", "drift", "evaluate") else [])]


def table_rows(text) -> int:
    """Lines of tables, without the heads."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return len(lines) - 2 * sum(line.startswith("| ---") for line in lines)


@pytest.mark.parametrize("name", MAINS)
def test_prints_a_table(name, capsys):
    assert MAINS[name]([*options(name), "--no-memory"]) == 0
    output = capsys.readouterr().out
    assert table_rows(output) == ROWS[name]
    assert f"python -m benchmarks.{'step' if name == 'drift' else name} " in output
    assert torch.__version__ in output or name == "arithmetic"


@pytest.mark.parametrize("name, more", [("loss", 4), ("step", 12), ("loader", 3), ("evaluate", 2)])
def test_scaling_adds_tables(name, more, capsys):
    assert MAINS[name]([*options(name), "--no-memory", "--scaling"]) == 0
    assert table_rows(capsys.readouterr().out) == ROWS[name] + more


@pytest.mark.parametrize("name, version", [("step", "iii:bf16"), ("step", "i:textbook"), ("evaluate", "textbook")])
def test_measuring_prints_bytes(name, version, capsys):
    assert MAINS[name]([*options(name), "--measure", version]) == 0
    assert 50 * common.MIB < int(capsys.readouterr().out) < 8192 * common.MIB


def test_peak_memory_of_fresh_processes():
    large = ["--queue", "65536", "--dim", "8", "--batch", "64", *CPU]  # 64 x 65,536 scores are 16 MiB
    ours, whole = (common.in_fresh_process("benchmarks.loss", large, name) for name in ("ours", "textbook"))
    assert 2 * ours < whole and whole > 32 * common.MIB


def test_all_writes_its_tables_at_their_marks(tmp_path, capsys):
    file = tmp_path / "benchmarks.md"
    file.write_text("Before.\n<!-- table: loss -->\nold\n<!-- end -->\nAfter.\n")
    flags = ["--quick", "--only", "loss", *CPU, "--no-memory", "--write", str(file)]
    assert everything.main(flags) == 0
    text = file.read_text()
    assert text.startswith("Before.\n<!-- table: loss -->\n`python -m") and text.endswith("<!-- end -->\nAfter.\n")
    assert "old" not in text and "--write" not in text and table_rows(text) == ROWS["loss"]
    assert everything.main(flags) == 0
    assert table_rows(file.read_text()) == ROWS["loss"]
    with pytest.raises(ValueError, match="no mark"):
        common.insert("nothing here", common.Table("loss", "", ("a",), []))


def test_textbook_losses_are_the_same_losses():
    generator = torch.Generator().manual_seed(0)
    q, k, queue = (torch.randn(6, 8, generator=generator).double() for _ in range(3))
    q, k = torch.nn.functional.normalize(q), torch.nn.functional.normalize(k)
    labels, queue_labels = torch.arange(6) % 3, torch.arange(6) % 2
    arguments = q, k, labels, queue.T.contiguous(), queue_labels, 0.2
    torch.testing.assert_close(contrastive_loss_plain(*arguments), contrastive_loss(*arguments))
    torch.testing.assert_close(textbook.distillation_loss(q, k, 2.0), distillation_loss(q, k, 2.0))


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_textbook_step_is_the_same_step(stage, capsys):
    """Three steps of both give the same losses and parameters, once both start from the same weights and labels."""
    args = step.parse([*options("step"), "--stages", stage])
    ours, plain = step.Ours(stage, "float32", args), step.Textbook(stage, args)
    start = ours.model.state_dict()
    plain.model.load_state_dict(start)
    views, labels = step.batch_of(stage, args.batch, args)
    for _ in range(3):
        loss = ours(views, labels)
        read = plain([step.normalize(view) for view in views], labels)
        assert loss.item() == pytest.approx(read[0], rel=1e-4)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, ours.model.state_dict()[name], rtol=1e-3, atol=1e-4)
