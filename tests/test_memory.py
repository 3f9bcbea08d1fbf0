"""The memory check before the first step: what it counts, what it prints, and that it changes nothing."""

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.memory import main as measure_memory
from models import SDL, SLG, SSFL
from tests.helpers import LAST, TWO, checkpoint, limited_memory, log_of, on_ranks, results_of, run_stage, same, train
from utils import memory
from utils.distributed import DistInfo, set_dist_info
from utils.errors import UserError
from utils.memory import StepMemory, available_memory, check_memory, free_in_cgroups, largest_batches, step_memory

CPU = torch.device("cpu")
MIB, GIB = 2**20, 2**30
BACKBONES = ("resnet8", "resnet18", "resnext50_32x4d")
HUGE = ("--image-size", 1024, "-b", 100)


def arguments(**changed):
    """The arguments of a run that the check reads."""
    values = {
        "amp": "none", "image_size": 32, "momentum": 0.9, "batch_size": 4, "evaluate": False, "memory_check": True,
        "compile": False, "accum_steps": 1,
    }  # fmt: skip
    return SimpleNamespace(**values | changed)


def build(stage, arch, **options):
    """A stage's network filled with zeros, which is fast."""
    with torch.device("meta"):
        if stage == "i":
            model = SSFL(arch, 7, dim=16, queue_size=50, **options)
        else:
            model = SLG(arch, 7, **options) if stage == "ii" else SDL(arch, 7, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    return model.train()


def saved_by_a_real_step(stage, model, batch_size, args) -> int:
    """Bytes of the storages that autograd saves in a step of a stage's script, without those that existed before."""
    views = [torch.zeros(batch_size, 3, args.image_size, args.image_size) for _ in range(2 if stage == "i" else 1)]
    labels = torch.zeros(batch_size, dtype=torch.long)
    kept = []
    dtype = torch.bfloat16 if args.amp == "bf16" else None
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.detach()), lambda x: x)
    with hooks, torch.autocast("cpu", dtype, enabled=args.amp != "none"):
        if stage == "i":
            logits, contrastive_loss = model(*views, labels=labels)
            loss = F.cross_entropy(logits, labels) + 1.0 * contrastive_loss
        elif stage == "ii":
            loss = F.cross_entropy(model(*views), labels)
        else:
            hard, _, kd_loss = model(*views)
            loss = F.cross_entropy(hard, labels) + 1.0 * kd_loss
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in (*views, labels, *model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    return sum(storages.values())


# ---- what is counted


@pytest.mark.parametrize("arch", BACKBONES)
@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_the_check_counts_to_the_byte_what_a_real_step_saves(stage, arch):
    model = build(stage, arch)
    counted = step_memory(model, 3, arguments(), CPU).saved
    assert counted == saved_by_a_real_step(stage, model, 3, arguments()) > 0
    args = arguments(amp="bf16")
    counted, real = step_memory(model, 3, args, CPU).saved, saved_by_a_real_step(stage, model, 3, args)
    # BatchNorm saves mean and deviation of a channel in float32 under autocast; torch 2.14's fake ones are in bfloat16.
    channels = (
        sum(m.num_features for m in model.encoder_q.modules() if hasattr(m, "running_mean")) if stage != "ii" else 0
    )
    assert real - counted in (0, 4 * channels)


def test_stage_i_without_contrast_saves_as_much_as_stage_iii_without_teacher():
    baseline, student = build("i", "resnet8", contrast=False), build("iii", "resnet8", distill=False)
    counted = step_memory(baseline, 4, arguments(), CPU)
    assert counted.saved == saved_by_a_real_step("iii", student, 4, arguments())
    assert counted.images == 4 * 4 * 3 * 32 * 32 + 8 * 4  # one view


@pytest.mark.parametrize("stage", ["ii", "iii"])
def test_the_check_counts_to_the_byte_with_a_frozen_batchnorm(stage):
    model = build(stage, "resnet8", freeze_bn=True)
    assert step_memory(model, 4, arguments(), CPU).saved == saved_by_a_real_step(stage, model, 4, arguments())


def test_parameters_gradients_and_momentum_are_those_computed_by_hand():
    backbone = sum(p.numel() for p in build("ii", "resnet8").encoder.parameters())
    statistics = sum(b.numel() * b.element_size() for b in build("ii", "resnet8").encoder.buffers())
    head, projection = 64 * 7 + 7, 64 * 64 + 64 + 64 * 16 + 16
    queue = 4 * 16 * 50 + 8 * 50 + 8
    one = step_memory(build("i", "resnet8"), 4, arguments(), CPU)
    assert one.model == 4 * (2 * backbone + head + 2 * projection) + 2 * statistics + queue
    assert one.gradients == one.momentum == 4 * (backbone + head + projection)
    assert one.images == 2 * 4 * 4 * 3 * 32 * 32 + 8 * 4
    two = step_memory(build("ii", "resnet8"), 4, arguments(), CPU)
    assert two.model == 4 * (backbone + head + 7) + statistics
    assert two.gradients == two.momentum == 4 * 7
    three = step_memory(build("iii", "resnet8"), 4, arguments(momentum=0.0), CPU)
    assert three.model == 4 * (2 * backbone + 3 * head + 7) + 2 * statistics
    assert three.gradients == 4 * (backbone + 2 * head) and three.momentum == 0


def test_stage_ii_needs_the_input_and_output_of_its_widest_module():
    step = step_memory(build("ii", "resnet18"), 4, arguments(image_size=64), CPU)
    assert step.widest == 2 * 4 * 64 * 32 * 32 * 4  # the first BatchNorm's
    assert step.total() == step.constant + step.images + step.widest > step.constant + step.images + step.saved


def test_several_processes_need_the_buckets_of_the_gradients():
    assert (
        on_ranks(2, lambda rank: step_memory(build("i", "resnet8"), 4, arguments(), CPU)._asdict(), method="fork")
        == [
            step_memory(build("i", "resnet8"), 4, arguments(), CPU)._asdict()
            | {"buckets": one_of(build("i", "resnet8"))}
        ]
        * 2
    )


def one_of(model) -> int:
    return sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_a_compiled_model_is_counted_as_it_is_written():
    model = build("i", "resnet8")
    expected = step_memory(model, 4, arguments(), CPU)
    model.encoder_q.compile()
    assert step_memory(model, 4, arguments(), CPU) == expected


def test_a_real_process_needs_more_than_the_lower_bound(capsys):
    assert measure_memory(["--stages", "i", "--settings", "resnet8:64:64", "--amp", "none"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| stage I,"))
    assert float(row.split("|")[-2]) > 1, row


# ---- nothing changes


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_the_model_and_the_random_numbers_stay_as_they_are(stage):
    model = build(stage, "resnet8").eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    largest_batches(model, arguments(), CPU, [GIB])
    check_memory(model, 4, arguments(), CPU)
    assert same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), random)
    assert not any(module.training or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert getattr(model, "pending", []) == []


def test_a_run_has_the_same_result_with_and_without_the_check(plain_tree, trained, tmp_path):
    run = train("i", plain_tree, tmp_path / "run", "--cos", "--no-memory-check")
    with_check, without = checkpoint(trained["i"]), checkpoint(run)
    assert same(without, with_check) and (run / LAST).exists()
    assert log_of(run, timed=False) == log_of(trained["i"], timed=False)
    assert results_of(run) == results_of(trained["i"])


# ---- what is printed


def offer(monkeypatch, size):
    """Makes the system offer `size` bytes; None: it does not say."""
    found = None if size is None else (int(size), "MemAvailable")
    monkeypatch.setattr(memory, "available_memory", lambda *_: found)


@pytest.mark.parametrize(("stage", "amp"), [("i", "none"), ("ii", "none"), ("iii", "none"), ("i", "bf16")])
def test_the_batch_size_in_the_message_is_the_largest_that_fits(stage, amp, monkeypatch):
    model, args = build(stage, "resnet8"), arguments(amp=amp, image_size=64, batch_size=10**6)
    for limit in (300 * MIB, 33 * GIB + 7):
        offer(monkeypatch, limit - step_memory(model, 2, args, CPU).model)
        with pytest.raises(UserError) as error:
            check_memory(model, 10**6, args, CPU)
        found = re.search(r"at most (\d+) can fit, (\d+) leaves room; ", str(error.value))
        for size, share in zip(map(int, found.groups()), (1, 0.7), strict=True):
            assert step_memory(model, size, args, CPU).total() <= share * limit
            assert step_memory(model, size + 1, args, CPU).total() > int(share * limit)


def test_the_message_names_needed_and_available_memory_and_what_helps(monkeypatch):
    offer(monkeypatch, 20 * GIB)
    with pytest.raises(UserError) as error:
        check_memory(build("i", "resnext50_32x4d"), 256, arguments(image_size=224, batch_size=256), CPU)
    assert error.value.on_all_ranks
    assert re.fullmatch(
        r"--batch-size 256: a training step needs at least 27\.\d GiB per process, 20\.2 GiB are available "
        r"\(MemAvailable\); at most 1[89]\d can fit, 13\d leaves room; --accum-steps 2 fits this batch; smaller "
        r"--image-size, smaller --arch and "
        r"--amp bf16 need less; --no-memory-check skips this check",
        str(error.value),
    )


@pytest.mark.parametrize("batch_size, accum_steps", [(256, 1), (250, 1), (251, 1), (64, 4)])
def test_the_advised_accum_steps_are_the_fewest_that_fit_with_room(batch_size, accum_steps, monkeypatch):
    """batch_size: of a micro-batch; 251 is prime, so that a step loses images; gradients are held throughout a step."""
    model = build("i", "resnet8")
    limit = 1 + step_memory(model, 20, arguments(accum_steps=2), CPU).total() / 0.7
    offer(monkeypatch, limit - step_memory(model, 2, arguments(), CPU).model)
    with pytest.raises(UserError) as error:
        check_memory(model, batch_size, arguments(batch_size=batch_size * accum_steps, accum_steps=accum_steps), CPU)
    advised = int(re.search(r"; --accum-steps (\d+) fits this batch; ", str(error.value))[1])
    assert advised == {256: 16, 250: 25, 251: 12, 64: 16}[batch_size]


def test_accumulated_gradients_are_counted_beside_the_activations():
    one, several = (step_memory(build("i", "resnet8"), 64, arguments(accum_steps=n), CPU) for n in (1, 4))
    assert several.total() - one.total() == one.gradients == several.gradients > 0


def test_the_message_says_if_no_batch_fits(monkeypatch):
    offer(monkeypatch, 0)
    with pytest.raises(UserError, match=r"0\.0 GiB are available .*; none can fit; "):
        check_memory(build("i", "resnet8"), 4, arguments(), CPU)


def test_nothing_is_printed_if_there_is_enough_memory_or_the_check_is_off(monkeypatch, capsys):
    model = build("i", "resnet8")
    offer(monkeypatch, 100 * GIB)
    check_memory(model, 4, arguments(), CPU)
    offer(monkeypatch, None)
    check_memory(model, 10**7, arguments(), CPU)
    offer(monkeypatch, 0)
    check_memory(model, 4, arguments(evaluate=True), CPU)
    check_memory(model, 4, arguments(memory_check=False), CPU)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("share, warns", [(0.69, False), (0.71, True), (0.99, True)])
def test_a_step_that_needs_more_than_seventy_per_cent_gives_a_warning(share, warns, monkeypatch, capsys):
    model = build("i", "resnet8")
    step = step_memory(model, 64, arguments(), CPU)
    offer(monkeypatch, step.total() / share - step.model)
    check_memory(model, 64, arguments(), CPU)
    said = capsys.readouterr().out
    assert said.startswith("warning: a training step needs at least ") and said.count("\n") == 1 if warns else not said


def test_compiled_backbones_give_a_warning_instead_of_an_error(monkeypatch, capsys):
    """They save less than the check counts."""
    offer(monkeypatch, 0)
    check_memory(build("i", "resnet8"), 64, arguments(compile=True), CPU)
    assert capsys.readouterr().out.startswith("warning: ")


def check_on_rank(rank, sizes):
    """The check in one of two processes of a node; sizes: what the system offers each."""
    set_dist_info(DistInfo(rank, 2, rank, 2))
    memory.available_memory = lambda *_: (sizes[rank], "MemAvailable")
    try:
        check_memory(build("i", "resnet8"), 64, arguments(batch_size=128), CPU)
    except UserError as error:
        return [str(error), error.on_all_ranks]


def test_all_ranks_raise_the_same_if_one_has_too_little():
    first, second = on_ranks(2, check_on_rank, [GIB, 10 * MIB], method="fork")
    assert first == second and first[1]
    most = int(re.search(r"at most (\d+) can fit", first[0])[1])
    assert 0 < most < 128 and most % 2 == 0  # images per step of the node


# ---- from the command line


@pytest.mark.parametrize(
    "stage, flags", [("i", ["--moco-k", 200]), ("iii", ["--kd-weight", 0]), ("i", ["--moco-k", 200, *TWO])]
)
def test_a_step_that_the_address_space_cannot_hold_is_refused_in_one_line(plain_tree, tmp_path, stage, flags):
    with limited_memory(GIB):
        outcome = run_stage(stage, plain_tree, tmp_path / "run", *HUGE, *flags)
    assert outcome.status == 2 and outcome.err.count("\n") == 1
    assert re.search(r": --batch-size 100: a training step needs .*ulimit -v\).*--no-memory-check", outcome.err)
    assert not (tmp_path / "run" / "args.json").exists()


def test_without_the_check_the_run_starts(plain_tree, tmp_path):
    with limited_memory(GIB):
        outcome = run_stage(
            "iii", plain_tree, tmp_path / "run", "--kd-weight", 0, "--jitter", 0, *HUGE, "--no-memory-check"
        )
    assert outcome.status == 2 and "out of memory" in outcome.err and "--no-memory-check" not in outcome.err
    assert (tmp_path / "run" / "args.json").exists()


def test_a_refused_run_leaves_an_earlier_one_as_it_was(plain_tree, tmp_path, monkeypatch):
    run = train("i", plain_tree, tmp_path / "run", "--epochs", 1)
    offer(monkeypatch, 0)
    outcome = run_stage("i", plain_tree, run, "--overwrite")
    assert outcome.status == 2 and "are available" in outcome.err
    assert checkpoint(run)["epoch"] == 1 and results_of(run)
    assert run_stage("i", plain_tree, tmp_path / "e", "--evaluate", "--resume", run / LAST).status == 0


# ---- what is available


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_limits_of_control_groups_version_2_are_read_along_the_path(tmp_path):
    write(tmp_path / "proc/self", cgroup="0::/user/job/step")
    root = tmp_path / "cgroup"
    write(root, memory__stat="anon 5")  # the root has no limit
    write(root / "user", memory__max="max", memory__current=500)
    write(
        root / "user/job",
        memory__max=1000,
        memory__current=700,
        memory__stat="anon 400\nactive_file 50\ninactive_file 150",
    )
    write(root / "user/job/step", memory__max=900, memory__current=100)
    assert [size for size, _ in free_in_cgroups(tmp_path / "proc", root)] == [800, 500]


def test_limits_of_control_groups_version_1_are_read(tmp_path):
    write(tmp_path / "proc/self", cgroup="5:cpu,cpuacct:/a\n4:memory:/a/b\n0::/")
    root = tmp_path / "cgroup"
    write(root / "memory/a/b", memory__limit_in_bytes=1000, memory__usage_in_bytes=1200)
    write(
        root / "memory", memory__limit_in_bytes=2000, memory__usage_in_bytes=1500,
        memory__stat="inactive_file 7\ntotal_active_file 100\ntotal_inactive_file 200",
    )  # fmt: skip
    assert [size for size, _ in free_in_cgroups(tmp_path / "proc", root)] == [0, 800]


def test_a_system_without_these_files_gives_no_limit(tmp_path):
    assert list(free_in_cgroups(tmp_path, tmp_path)) == []
    assert list(memory.free_memory(tmp_path)) == list(memory.free_address_space(tmp_path)) == []


def test_available_memory_is_the_smallest_limit_of_which_processes_share_all_but_the_address_space(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: [(1000, "MemAvailable")])
    monkeypatch.setattr(memory, "free_in_cgroups", lambda: [(900, "group"), (2000, "group")])
    monkeypatch.setattr(memory, "free_address_space", lambda: [(400, "ulimit")])
    assert available_memory(CPU, 1) == (400, "ulimit")
    assert available_memory(CPU, 3) == (300, "group")
    for name in ("free_memory", "free_in_cgroups", "free_address_space"):
        monkeypatch.setattr(memory, name, list)
    assert available_memory(CPU) is None


def test_the_limit_of_the_address_space_is_counted():
    with limited_memory(GIB):
        ((size, _),) = memory.free_address_space()
    assert GIB - 200 * MIB < size <= GIB


def test_the_larger_of_activations_and_gradients_counts():
    step = StepMemory(model=10, momentum=3, gradients=4, buckets=2, accumulated=0, images=1, saved=1, widest=2)
    assert step.total() == 10 + 3 + 2 + 4
    assert step._replace(saved=9).total() == 10 + 3 + 2 + 1 + 9
