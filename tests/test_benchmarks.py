"""The benchmarks run at tiny sizes and print their tables; no timing is asserted."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import all as everything
from benchmarks import arithmetic, baseline, common, step, traffic
from benchmarks.all import MAINS, QUICK
from datasets.samplers import ClassAwareSampler
from models import distillation_loss
from tests.helpers import forkserver
from utils.errors import UserError

CPU = ["--device", "cpu"]
ROWS = {"loss": 2, "step": 12, "drift": 3, "loader": 6, "evaluate": 4, "arithmetic": 12}
VARIANTS = ["--variants", "float32", "channels_last", "bf16"]


def options(name):
    flags = [] if name == "arithmetic" else [*CPU, "--no-memory"]  # it measures nothing
    return [*QUICK[name].split(), *flags, *(VARIANTS if name in ("step", "drift", "evaluate") else [])]


def table_rows(text) -> int:
    """The number of table rows, without headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return len(lines) - 2 * sum(line.startswith("| ---") for line in lines)


@pytest.mark.parametrize("name", MAINS)
def test_each_benchmark_prints_its_table(name, capsys):
    assert MAINS[name](options(name)) == 0
    output = capsys.readouterr().out
    assert table_rows(output) == ROWS[name]
    assert f"python -m benchmarks.{'step' if name == 'drift' else name} " in output
    assert torch.__version__ in output or name == "arithmetic"


@pytest.mark.parametrize("name, more", [("loss", 4), ("step", 12), ("loader", 3), ("evaluate", 2)])
def test_scaling_adds_tables(name, more, capsys):
    assert MAINS[name]([*options(name), "--scaling"]) == 0
    assert table_rows(capsys.readouterr().out) == ROWS[name] + more


@pytest.mark.parametrize("name, version", [("step", "iii:bf16"), ("step", "i:baseline"), ("evaluate", "baseline")])
def test_measure_prints_a_plausible_number_of_bytes(name, version, capsys):
    assert MAINS[name]([*options(name), "--measure", version]) == 0
    assert 50 * common.MIB < int(capsys.readouterr().out) < 8192 * common.MIB


def test_the_arithmetic_counts_what_a_rank_receives_on_average():
    """In 2,000 permutations of 24 images on 4 ranks; tests/test_moco.py counts the bytes of real steps."""
    received = arithmetic.received("i", 6, 24, trained=100, args=SimpleNamespace(size=2, dim=3))
    torch.manual_seed(0)
    strangers = sum(int((torch.randperm(24)[:6] >= 6).sum()) for _ in range(2000)) / 2000
    assert received["key images"] == pytest.approx(strangers * 3 * 2 * 2 * 4, rel=0.02)
    assert received["keys of own images"] == pytest.approx(strangers * 3 * 4, rel=0.02)
    assert received["keys and labels for the queue"] == 18 * (3 * 4 + 8)
    assert (received["gradients"], received["order of the shuffle"]) == (2 * 3 / 4 * 400, 18 * 8)
    assert sum(arithmetic.received("i", 24, 24, 100, SimpleNamespace(size=2, dim=3)).values()) == 0


@pytest.fixture
def cheap_processes(monkeypatch):
    """The processes of benchmarks.traffic are forked from one that has imported everything."""
    start, method = traffic.mp.start_processes, forkserver().get_start_method()
    monkeypatch.setattr(traffic.mp, "start_processes", lambda *a, **k: start(*a, **k | {"start_method": method}))


@pytest.mark.parametrize("stage", ["i", "iii"])
def test_the_bytes_of_real_steps_are_those_of_the_formulas(stage, cheap_processes, world_size=4):
    sizes = "--arch resnet8 --size 16 --classes 5 --queue 64 --batch 32 --steps 3"
    args = traffic.get_parser().parse_args(sizes.split())
    found, expected = traffic.measured(stage, world_size, args), traffic.calculated(stage, world_size, 32, args)
    by_chance = ("key images", "keys of own images")  # which images stay at their rank; their mean is expected
    assert {name: size for name, size in found.items() if name not in by_chance} == {
        name: pytest.approx(size) for name, size in expected.items() if name not in by_chance
    }
    if stage == "i":
        assert found["key images"] / found["keys of own images"] == 3 * 16 * 16 / 128
        strangers = found["key images"] / (3 * 16 * 16 * 4)  # per rank and step, of 32 / world_size images
        assert 0 < strangers <= 32 / world_size and found["key images"] == pytest.approx(
            expected["key images"], rel=0.5
        )


def test_traffic_writes_its_tables(tmp_path, capsys, cheap_processes):
    file = tmp_path / "scaling.md"
    names = ("traffic", "traffic by ranks", "large batches", "class-aware sampling by ranks")
    file.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in names))
    flags = "--arch resnet8 --size 16 --classes 5 --queue 64 --batch 4 --stages ii --processes 1 2 --ranks 1 2"
    assert traffic.main([*flags.split(), "--write", str(file)]) == 0
    rows = [line for line in file.read_text().splitlines() if line.startswith("| II")]
    assert "| II, 1 | all | 0 B | 0 B |" in rows and "| II, 2 | flags | 8 B | 8 B |" in rows
    assert "| II | gradients | 0 B | 20 B |" in rows  # 5 scales of 4 bytes, 2 x 1/2 times


def test_class_aware_sampling_on_several_ranks_draws_a_small_class_on_the_share_that_the_formula_says():
    labels, ranks = [0] * 4 + [c for c in range(1, 6) for _ in range(80)], 8
    drawn = torch.zeros(6)
    for epoch, rank in itertools.product(range(60), range(ranks)):
        _, indices = ClassAwareSampler(labels, 1, seed=0, rank=rank, world_size=ranks).epoch(epoch)
        drawn += torch.bincount(torch.tensor(labels)[indices], minlength=6)
    share = traffic.share_of_shards(4, ranks)
    others = share / 6 + (1 - share) / 5  # where it is missing, they take its turns
    assert drawn[0] / drawn[1:].mean() == pytest.approx(share / 6 / others, rel=0.1)


def test_the_streamed_loss_needs_less_than_half_the_memory_of_the_baseline():
    large = ["--queue", "65536", "--dim", "8", "--batch", "64", *CPU]  # 64 x 65,536 scores are 16 MiB
    ours, plain = (common.in_fresh_process("benchmarks.loss", large, name) for name in ("ours", "baseline"))
    assert 2 * ours < plain and plain > 32 * common.MIB


def test_all_writes_its_tables_at_their_marks(tmp_path, capsys):
    file = tmp_path / "benchmarks.md"
    file.write_text("Before.\n<!-- table: loss -->\nold\n<!-- end -->\nAfter.\n")
    flags = ["--quick", "--only", "loss", *CPU, "--no-memory", "--write", str(file)]
    assert everything.main(flags) == 0
    text = file.read_text()
    assert text.startswith("Before.\n<!-- table: loss -->\n`") and text.endswith("<!-- end -->\nAfter.\n")
    assert "python -m benchmarks.loss" in text.splitlines()[2]  # after the environment that the command needs, if any
    assert "old" not in text and "--write" not in text and table_rows(text) == ROWS["loss"]
    assert everything.main(flags) == 0
    assert table_rows(file.read_text()) == ROWS["loss"]
    with pytest.raises(UserError, match="no mark"):
        common.insert("nothing here", common.Table("loss", "", ("a",), []))


def test_baseline_distillation_loss_equals_the_models():
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 8, generator=generator).double()
    expected = distillation_loss(student, teacher, 2.0)
    torch.testing.assert_close(baseline.distillation_loss(student, teacher, 2.0), expected)


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_baseline_step_equals_the_scripts_step(stage):
    """Three steps of both give the same losses and parameters, once both start from the same weights and labels."""
    args = step.get_parser().parse_args([*options("step"), "--stages", stage])
    ours, plain = step.Ours(stage, "float32", args), step.Baseline(stage, args)
    plain.model.load_state_dict(ours.model.state_dict())
    views, labels = step.batch_of(stage, args.batch, args)
    for _ in range(3):
        loss = ours.loss(views, labels)
        read = plain([step.normalize(view) for view in views], labels)
        assert loss == pytest.approx(read[0], rel=1e-4)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, ours.model.state_dict()[name], rtol=1e-3, atol=1e-4)


def test_no_share_of_the_peak_exceeds_one(monkeypatch, capsys):
    """The peak rate includes that of the step itself, so a slow matrix product gives no share above 100 %."""
    durations = {"matmul": 3.0, "conv2d": 2.0, "step": 1e-9}

    def alternate(functions, repeats, device):
        return {key: [durations[key[1]] * factor for factor in (2, 1, 3)] for key in functions}

    monkeypatch.setattr(common, "alternate", alternate)
    assert step.main(options("step")) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("| I")]
    assert len(rows) == ROWS["step"] and all(float(row[-1].rstrip("% |")) <= 100 for row in rows)


def test_tf32_is_on_for_its_own_steps_and_products_alone(monkeypatch, capsys):
    seen = []

    def alternate(functions, repeats, device):
        for (version, _), function in functions.items():
            function()
            flags = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
            seen.append((version, *flags))
        return {key: [1.0] for key in functions}

    monkeypatch.setattr(common, "alternate", alternate)
    flags = [*QUICK["step"].split(), *CPU, "--no-memory", "--stages", "ii", "--variants", "tf32", "float32"]
    assert step.main(flags) == 0
    assert set(seen) == {("baseline", False, False), ("tf32", True, True), ("float32", False, False)}


def test_nothing_is_printed_between_timed_steps(capsys):
    args = step.get_parser().parse_args([*options("step"), "--stages", "ii"])
    ours, (views, labels) = step.Ours("ii", "float32", args), step.batch_of("ii", args.batch, args)
    for _ in range(12):  # the scripts print every 10 steps
        ours(views, labels)
    assert ours.state.step == 12
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags", [["--batch", "0"], ["--repeats", "x"], ["--arch", "resnet9"], ["--btach", "4"]])
def test_a_wrong_flag_ends_in_one_line_and_status_2(flags, capsys):
    assert step.main(flags) == 2
    assert capsys.readouterr().err.startswith("error: ")
