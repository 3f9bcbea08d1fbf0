"""The memory check before the first step: what it counts, what it says, and that it changes nothing."""

import copy
import math
import re

import pytest
import torch
import torch.nn.functional as F

from models import SDL, SLG, SSFL
from tests.helpers import LAST, STAGES, assert_mistake, assert_same_run, on_ranks, run_stage, same, source, train
from utils import memory
from utils.distributed import DistInfo, set_dist_info
from utils.errors import UserError
from utils.memory import activation_memory, available_memory, check_memory, step_memory

CPU = torch.device("cpu")
MIB, GIB = 2**20, 2**30
NETWORKS = {"i": lambda *args, **options: SSFL(*args, 16, 50, **options), "ii": SLG, "iii": SDL}


def build(stage="i", arch="resnet8", **options):
    """A stage's network filled with zeros, which is fast."""
    with torch.device("meta"):
        model = NETWORKS[stage](arch, 7, **options)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            tensor.zero_()
    return model.train()


def needs(model, batch_size=4, **options) -> int:
    return step_memory(model, batch_size, 32, device=CPU, **options)


def held_by(model) -> int:
    return sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])


def gradients_of(model) -> int:
    return sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)


# ---- what is counted


def held_by_a_real_step(stage, model, dtype) -> int:
    """Bytes of four images and of what autograd saves in a step of a stage's script, beside the model."""
    views = [torch.zeros(4, 3, 32, 32) for _ in range(2 if stage == "i" and model.contrast else 1)]
    labels = torch.zeros(4, dtype=torch.long)
    kept = [*views, labels]
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.detach()), lambda x: x)
    with hooks, torch.autocast("cpu", dtype, enabled=dtype is not None):
        if stage == "i":
            logits, second_loss = model(*views, labels=labels)
        else:
            logits, _, second_loss = model(*views)
        loss = F.cross_entropy(logits, labels) + 1.0 * second_loss
    assert loss.requires_grad
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    for tensor in (*model.parameters(), *model.buffers()):
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values())


@pytest.mark.parametrize(
    "stage, arch, options, dtype",
    [
        ("i", "resnet8", {}, torch.bfloat16), ("i", "resnet8", {"bn_splits": 2}, torch.bfloat16),
        ("i", "resnet18", {"bn_splits": 2}, None), ("i", "resnext50_32x4d", {"contrast": False}, None),
        ("iii", "resnet18", {}, torch.bfloat16), ("iii", "resnet8", {"freeze_bn": True}, None),
        ("iii", "resnet8", {"distill": False}, None),
    ],
)  # fmt: skip
def test_the_check_counts_to_the_byte_what_a_real_step_holds(stage, arch, options, dtype):
    model = build(stage, arch, **options)
    counted, real = activation_memory(model, 4, 32, dtype, CPU), held_by_a_real_step(stage, model, dtype)
    # BatchNorm saves mean and deviation of a channel in float32 under autocast; torch 2.14's fake ones are in bfloat16.
    channels = sum(module.num_features for module in model.encoder_q.modules() if hasattr(module, "running_mean"))
    assert real - counted in (0, 4 * channels * options.get("bn_splits", 1) if dtype else 0)


def test_stage_ii_counts_the_input_and_output_of_its_widest_module():
    images, widest = 4 * 4 * 3 * 64 * 64 + 8 * 4, 2 * 4 * 64 * 32 * 32 * 4  # the first BatchNorm's
    assert activation_memory(build("ii", "resnet18"), 4, 64, None, CPU) == images + widest


def test_parameters_gradients_and_momentum_are_those_computed_by_hand():
    encoder = build("ii").encoder
    backbone, statistics = sum(p.numel() for p in encoder.parameters()), sum(b.nbytes for b in encoder.buffers())
    head, projection, queue = 64 * 7 + 7, 64 * 64 + 64 + 64 * 16 + 16, 4 * 16 * 50 + 8 * 50 + 8
    for stage, held, gradients in [
        ("i", 4 * (2 * backbone + head + 2 * projection) + 2 * statistics + queue, 4 * (backbone + head + projection)),
        ("ii", 4 * (backbone + head + 7) + statistics, 4 * 7),
        ("iii", 4 * (2 * backbone + 3 * head + 7) + 2 * statistics, 4 * (backbone + 2 * head)),
    ]:
        model = build(stage)
        activations = activation_memory(model, 64, 32, None, CPU)
        assert needs(model, 64) == held + gradients + activations  # momentum
        assert needs(model, 64, momentum=False) == held + activations
        assert needs(model, 64, accum_steps=3) == held + 2 * gradients + activations  # of earlier micro-batches


def test_gradients_count_where_they_are_more_than_the_activations_and_a_compiled_model_as_it_is_written():
    model = build("i", "resnet18")
    assert needs(model, 2) == held_by(model) + 2 * gradients_of(model)
    counted = needs(model, 64)
    model.encoder_q.compile()
    assert needs(model, 64) == counted


# ---- what is said


def offer(monkeypatch, size):
    """Makes the system offer `size` bytes."""
    monkeypatch.setattr(memory, "available_memory", lambda device: (size, "MemAvailable"))


def refuse(monkeypatch, model, batch_size, limit, **options) -> tuple[str, int, int]:
    """(message, advised batch size, advised --accum-steps), 0 for no advice; limit: bytes for model and step."""
    offer(monkeypatch, limit - held_by(model))
    with pytest.raises(UserError) as error:
        check_memory(model, batch_size, 32, device=CPU, **options)
    assert error.value.on_all_ranks
    message = str(error.value)
    advised = [re.search(rf"[;r] {flag} (\d+)", message) for flag in ("--batch-size", "--accum-steps")]
    return message, *(int(found[1]) if found else 0 for found in advised)


def test_the_message_names_needed_and_available_memory_and_what_helps(monkeypatch):
    model = build("i", "resnext50_32x4d")
    message, *advised = refuse(monkeypatch, model, 1024, GIB)
    assert re.match(r"--batch-size 1024: .* 2\.\d GiB per process, 1\.0 GiB are available \(MemAvailable\); ", message)
    assert all(advised) and "\n" not in message
    for flag in ("--image-size", "--arch", "--amp bf16", "--no-memory-check"):
        assert flag in message
    assert "; no batch can fit; " in refuse(monkeypatch, model, 1024, 0)[0]


@pytest.mark.parametrize(
    "stage, options, limit",
    [
        ("i", {}, 300 * MIB), ("ii", {}, 33 * GIB), ("iii", {"accum_steps": 3}, 300 * MIB),
        ("i", {"dtype": torch.bfloat16}, 33 * GIB),
    ],
)  # fmt: skip
def test_the_advised_batch_size_is_about_the_largest_that_fits_with_room(stage, options, limit, monkeypatch):
    model, accum_steps = build(stage), options.get("accum_steps", 1)
    _, advised, _ = refuse(monkeypatch, model, 10**6, limit, **options)
    assert advised % accum_steps == 0
    assert 0.68 * limit < needs(model, advised // accum_steps, **options) <= 0.7 * limit


@pytest.mark.parametrize("batch_size, accum_steps, advised", [(256, 1, 16), (250, 1, 25), (251, 1, 0), (64, 4, 16)])
def test_the_advised_accum_steps_keep_the_batch_and_fit_with_room(batch_size, accum_steps, advised, monkeypatch):
    """batch_size: of a micro-batch; 251 is prime; gradients are held throughout a step of several."""
    model = build()
    limit = math.ceil(needs(model, 20, accum_steps=2) / 0.7) + 1
    message, _, found = refuse(monkeypatch, model, batch_size, limit, accum_steps=accum_steps)
    assert found == advised and message.startswith(f"--batch-size {batch_size * accum_steps}: ")


@pytest.mark.parametrize("batch_size, accum_steps, advised", [(120, 1, 4), (60, 2, 4), (180, 1, 6)])
def test_what_is_advised_for_batchnorm_by_parts_can_be_split(batch_size, accum_steps, advised, monkeypatch):
    model = build(bn_splits=6)
    limit = (needs(model, 30, accum_steps=2) + needs(model, 36)) // 2 / 0.7  # 30 images fit with room, 36 do not
    _, largest, found = refuse(monkeypatch, model, batch_size, limit, accum_steps=accum_steps)
    assert (largest, found) == (30 * accum_steps, advised)
    _, *nothing = refuse(monkeypatch, model, batch_size, int(needs(model, 12) / 0.7))  # 12: two for each piece
    assert nothing == [0, 0]


@pytest.mark.parametrize(
    "offered, compiled, warns",
    [(math.inf, 0, False), (1 / 0.69, 0, False), (1 / 0.71, 0, True), (1.01, 0, True), (0.01, 1, True)],
)
def test_a_step_that_barely_fits_gives_a_warning(offered, compiled, warns, monkeypatch, capsys):
    """offered: times what is needed, infinity if the system does not say; compiled, a step needs less than counted."""
    model = build()
    offer(monkeypatch, needs(model, 64) * offered - held_by(model))
    check_memory(model, 64, 32, compiled=compiled, device=CPU)
    said = capsys.readouterr().out
    assert said.startswith("warning: ") and "--accum-steps" in said and said.count("\n") == 1 if warns else not said


def check_on_rank(rank, sizes):
    """What is needed, and the error, in one of two processes of a node; sizes: what the system offers each."""
    set_dist_info(DistInfo(rank, 2, rank, 2))
    memory.available_memory = lambda device: (sizes[rank], "MemAvailable")
    with pytest.raises(UserError) as error:
        check_memory(build(), 64, 32, device=CPU)
    return [needs(build()), str(error.value), error.value.on_all_ranks]


def test_all_ranks_need_gradient_buckets_and_raise_the_same_if_one_has_too_little():
    first, second = on_ranks(2, check_on_rank, [GIB, 10 * MIB])
    assert first == second and first[0] == needs(build()) + gradients_of(build()) and first[2]
    batch_size, advised = map(int, re.search(r"^--batch-size (\d+): .*; --batch-size (\d+)", first[1]).groups())
    assert 0 < advised < batch_size == 128 and advised % 2 == 0  # images of the node


# ---- nothing changes


@pytest.mark.parametrize("stage, options", [("i", {}), ("i", {"bn_splits": 2}), ("ii", {}), ("iii", {})])
def test_the_model_and_the_random_numbers_stay_as_they_are(stage, options, monkeypatch):
    model = build(stage, **options).eval()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    refuse(monkeypatch, model, 4, 0)
    assert same(model.state_dict(), before) and torch.equal(torch.get_rng_state(), random)
    assert not any(module.training or module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert getattr(model, "pending", []) == []


def test_a_run_has_the_same_result_with_the_check_and_with_no_memory_check(plain_tree, trained, tmp_path, monkeypatch):
    offer(monkeypatch, 0)
    run = train("i", plain_tree, tmp_path / "run", "--cos", "--no-memory-check")
    assert_same_run(run, trained["i"])
    train("i", plain_tree, tmp_path / "e", "--evaluate", "--resume", run / LAST)  # not checked


class Reader(SLG):
    """Its forward pass reads values, which the check does not have."""

    def forward(self, im):
        logits = super().forward(im)
        return logits + (1 if logits.sum() > 0 else 2)


class Masker(SLG):
    """The shapes in its forward pass depend on values."""

    def forward(self, im):
        logits = super().forward(im)
        return logits + logits[logits > 0].sum()


@pytest.mark.parametrize("network", [Reader, Masker])
def test_a_network_that_depends_on_values_is_not_checked(network, capsys):
    check_memory(network("resnet8", 5), 4, 32, device=CPU)
    assert "the memory of a step is not checked" in capsys.readouterr().out


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_that_does_not_fit_is_refused_in_one_line(plain_tree, trained, tmp_path, monkeypatch, stage):
    offer(monkeypatch, GIB)
    huge = ["--image-size", 4096, "-b", 100, *(["--moco-k", 200] if stage == "i" else [])]
    outcome = run_stage(stage, plain_tree, tmp_path / "run", *huge, *source(stage, trained))
    assert_mistake(outcome, "--batch-size 100: ", "are available", "--no-memory-check")
    assert not (tmp_path / "run" / "args.json").exists()


# ---- what is available


def write(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(f"{text}\n")


def test_available_memory_is_the_smallest_of_meminfo_and_the_control_groups_along_the_path(tmp_path, monkeypatch):
    proc, groups = tmp_path / "proc", tmp_path / "groups"
    assert available_memory(CPU, proc, groups) == (math.inf, "")  # such as macOS
    write(proc, meminfo="MemTotal: 9 kB\nMemAvailable: 2 kB")
    assert available_memory(CPU, proc, groups) == (2048, "MemAvailable")
    write(proc / "self", cgroup="4:memory:/elsewhere\n0::/user/job/step")
    write(groups, memory__stat="anon 5")  # the root has no limit
    write(groups / "user", memory__max="max", memory__current=500)
    files = "anon 400\nactive_file 50\ninactive_file 150"  # the kernel can drop cached files
    write(groups / "user/job", memory__max=1000, memory__current=700, memory__stat=files)
    write(groups / "user/job/step", memory__max=900, memory__current=100)
    assert available_memory(CPU, proc, groups) == (500, "limit of the control group")
    monkeypatch.setattr(memory, "get_dist_info", lambda: DistInfo(1, 3, 1, 3))  # the processes of a node share it
    assert available_memory(CPU, proc, groups) == (500 // 3, "limit of the control group")
    write(groups / "user/job/step", memory__max=900, memory__current=1200)
    assert available_memory(CPU, proc, groups) == (0, "limit of the control group")
