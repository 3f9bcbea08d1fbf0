"""The benchmarks run at tiny sizes and print their tables; no timing is asserted."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from benchmarks import common, loader, loss, step, traffic
from datasets.samplers import ClassAwareSampler
from models.moco import SplitBatchNorm
from models.preprocess import normalize
from tests.helpers import assert_mistake, forkserver
from utils.train_state import TrainState

TINY = "--arch resnet8 --size 32 --batch 8 --classes 5 --queue 16"
VARIANTS = "--variants float32 channels_last bf16 bn_splits_4"
FLAGS = {
    "loss": "--batch 4 --queue 32 --dim 8 --classes 5 --scaling-queues 16 --scaling-batches 8 --repeats 1",
    "step": f"{TINY} --scaling-batches 8 --repeats 1 {VARIANTS}",
    "drift": f"{TINY} --drift --steps 12 --variants float32 channels_last bf16",
    "loader": "--images 8 --size 72 --batch 4 --workers 0 --scaling-workers 1 --repeats 1",
}
MAINS = {"loss": loss.main, "step": step.main, "drift": step.main, "loader": loader.main}


def run(name, *flags) -> int:
    return MAINS[name]([*FLAGS[name].split(), "--device", "cpu", "--no-memory", *flags])


def arguments():
    return step.get_parser().parse_args([*FLAGS["step"].split(), "--device", "cpu"])


def table_rows(text) -> int:
    """The number of table rows, without headers."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return len(lines) - 2 * sum(line.startswith("| ---") for line in lines)


@pytest.mark.parametrize("name, rows", [("loss", 2 + 4), ("step", 15 + 15), ("loader", 6 + 3), ("drift", 3)])
def test_each_benchmark_prints_its_tables(name, rows, capsys):
    assert run(name, *([] if name == "drift" else ["--scaling"])) == 0
    output = capsys.readouterr().out
    assert table_rows(output) == rows
    assert f"python -m benchmarks.{'step' if name == 'drift' else name} " in output and torch.__version__ in output


@pytest.mark.parametrize("version", ["iii:bf16", "i:baseline"])
def test_measure_prints_a_plausible_number_of_bytes(version, capsys):
    assert run("step", "--measure", version) == 0
    assert 50 * common.MIB < int(capsys.readouterr().out) < 8192 * common.MIB


def test_the_formulas_count_what_a_rank_receives_on_average():
    """In 2,000 permutations of 24 images on 4 ranks; tests/test_moco.py counts the bytes of real steps."""
    received = traffic.received("i", 6, 24, trained=100, args=SimpleNamespace(size=2, dim=3))
    torch.manual_seed(0)
    strangers = sum(int((torch.randperm(24)[:6] >= 6).sum()) for _ in range(2000)) / 2000
    assert received["key images"] == pytest.approx(strangers * 3 * 2 * 2 * 4, rel=0.02)
    assert received["keys of own images"] == pytest.approx(strangers * 3 * 4, rel=0.02)
    assert received["keys and labels for the queue"] == 18 * (3 * 4 + 8)
    assert (received["gradients"], received["order of the shuffle"]) == (2 * 3 / 4 * 400, 18 * 8)
    assert sum(traffic.received("i", 24, 24, 100, SimpleNamespace(size=2, dim=3)).values()) == 0


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
    if stage == "i":  # which images stay at their rank is chance; their mean is expected
        images, keys = found.pop("key images"), found.pop("keys of own images")
        assert images / keys == 3 * 16 * 16 / 128 and 0 < images <= 32 / world_size * 3 * 16 * 16 * 4
        assert images == pytest.approx(expected.pop("key images"), rel=0.5) and expected.pop("keys of own images")
    assert found == pytest.approx(expected)


def test_traffic_writes_its_tables(tmp_path, capsys, cheap_processes):
    file = tmp_path / "scaling.md"
    file.write_text("".join(f"<!-- table: {name} -->\n<!-- end -->\n" for name in ("traffic", "traffic by ranks")))
    flags = "--arch resnet8 --size 16 --classes 5 --queue 64 --batch 4 --stages ii --processes 1 2 --ranks 1 2"
    assert traffic.main([*flags.split(), "--write", str(file)]) == 0
    rows = [line for line in file.read_text().splitlines() if line.startswith("| II")]
    assert "| II, 1 | all | 0 B | 0 B |" in rows and "| II, 2 | flags | 12 B | 12 B |" in rows
    assert "| II | gradients | 0 B | 20 B |" in rows  # 5 scales of 4 bytes, 2 x 1/2 times


def test_class_aware_sampling_on_several_ranks_draws_a_small_class_as_docs_scaling_says():
    labels, ranks = [0] * 4 + [c for c in range(1, 6) for _ in range(80)], 8
    drawn = torch.zeros(6)
    for epoch, rank in itertools.product(range(60), range(ranks)):
        _, indices = ClassAwareSampler(labels, 1, seed=0, rank=rank, world_size=ranks).epoch(epoch)
        drawn += torch.bincount(torch.tensor(labels)[indices], minlength=6)
    share = 1 - (1 - 1 / ranks) ** 4  # of the shards that have one of its 4 images
    others = share / 6 + (1 - share) / 5  # where it is missing, they take its turns
    assert drawn[0] / drawn[1:].mean() == pytest.approx(share / 6 / others, rel=0.1)


def test_the_streamed_loss_needs_less_than_half_the_memory_of_the_baseline():
    large = ["--queue", "65536", "--dim", "8", "--batch", "64", "--device", "cpu"]  # 64 x 65,536 scores are 16 MiB
    ours, plain = (common.in_fresh_process("benchmarks.loss", large, name) for name in ("ours", "baseline"))
    assert 2 * ours < plain and plain > 32 * common.MIB


def test_tables_are_written_at_their_marks(tmp_path, capsys):
    file = tmp_path / "benchmarks.md"
    file.write_text("Before.\n<!-- table: loss -->\nold\n<!-- end -->\nAfter.\n")
    for _ in range(2):
        assert run("loss", "--write", str(file)) == 0
        text = file.read_text()
        assert text.startswith("Before.\n<!-- table: loss -->\n`") and text.endswith("<!-- end -->\nAfter.\n")
        assert "python -m benchmarks.loss" in text.splitlines()[2]  # after the environment that it needs, if any
        assert "\nold\n" not in text and "--write" not in text and table_rows(text) == 2
    file.write_text("no marks")
    capsys.readouterr()
    assert run("loss", "--scaling", "--write", str(file)) == 2 and file.read_text() == "no marks"
    output = capsys.readouterr()
    assert "<!-- table: loss -->" in output.err and table_rows(output.out) == 2 + 4  # nothing that was measured is lost


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_baseline_step_equals_the_scripts_step(stage):
    """Three steps of both give the same losses and parameters, once both start from the same weights and labels."""
    args = arguments()
    ours, plain = step.Ours(stage, "float32", args), step.Baseline(stage, args)
    plain.model.load_state_dict(ours.model.state_dict())
    views, labels = step.make_batch(stage, args.batch, args)
    for _ in range(3):
        loss = ours.loss(views, labels)
        read = plain([normalize(view) for view in views], labels)
        assert loss == pytest.approx(read[0], rel=1e-4)
    for name, value in plain.model.state_dict().items():
        torch.testing.assert_close(value, ours.model.state_dict()[name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_variants_by_parts_split_batchnorm(stage):
    modules = step.Ours(stage, "bn_splits_4", arguments()).model.modules()
    assert {module.splits for module in modules if isinstance(module, SplitBatchNorm)} == {step.SPLITS}


def test_tf32_is_on_for_its_own_steps_alone(monkeypatch):
    seen = {}

    def note(version, function):
        function()
        seen[version] = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        return 1.0

    monkeypatch.setattr(
        common, "medians", lambda functions, *_: {name: note(name, function) for name, function in functions.items()}
    )
    assert run("step", "--stages", "ii", "--variants", "tf32", "float32") == 0
    assert seen == {"baseline": (False, False), "tf32": (True, True), "float32": (False, False)}


def test_nothing_is_read_or_printed_between_timed_steps(monkeypatch, capsys):
    monkeypatch.setattr(TrainState, "_line_text", None)  # it would wait for the device
    args = arguments()
    ours = step.Ours("ii", "float32", args)
    for _ in range(12):  # the scripts print every 10 steps
        ours(*step.make_batch("ii", args.batch, args))
    assert ours.state.step == 12 and capsys.readouterr() == ("", "")


@pytest.mark.parametrize("flags, named", [
    ("--batch 0", "--batch"), ("--repeats x", "--repeats"), ("--arch resnet9", "--arch"), ("--btach 4", "--batch"),
    ("--batch 6", "--batch 6"), ("--scaling --scaling-batches 8 4", "--batch 4"),
])  # fmt: skip
def test_a_wrong_flag_ends_in_one_line_and_status_2(flags, named, capsys):
    assert_mistake((run("step", *flags.split()), *capsys.readouterr()), named)
