"""Tests that need a CUDA device: pytest -m gpu."""

import math

import pytest
import torch

from models import SSFL, contrastive_loss
from tests.helpers import LAST, call, log_of, run_shell, stage_flags
from utils.memory import available_memory, step_loss, step_memory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def run(stage, data, out, *flags):
    outcome = call(stage, stage_flags(stage, data, out, ["--device", "cuda", *flags]))
    assert outcome.status == 0, outcome.err
    return torch.load(out / LAST, weights_only=True)


@pytest.mark.parametrize("numerics", ["--amp bf16", "--amp fp16", "--channels-last --tf32", "--augment device -j 2"])
def test_all_stages_train_on_a_gpu(plain_tree, tmp_path, numerics):
    flags = numerics.split()
    run("i", plain_tree, tmp_path / "i", *flags)
    run("ii", plain_tree, tmp_path / "ii", *flags, "--last_stage_ckpt", tmp_path / "i" / LAST)
    run("iii", plain_tree, tmp_path / "iii", *flags, "--teacher_ckpt", tmp_path / "ii" / LAST)


def test_a_run_with_sync_bn_keeps_the_names_of_the_weights(plain_tree, tmp_path):
    plain, synchronized = (
        run("i", plain_tree, tmp_path / flag, "--epochs", 1, flag) for flag in ("--no-sync-bn", "--sync-bn")
    )
    assert plain["state_dict"].keys() == synchronized["state_dict"].keys() and synchronized["args"]["sync_bn"]


def test_the_published_command_trains_on_every_gpu(plain_tree, tmp_path):
    flags = ["--device", "cuda", "--multiprocessing-distributed", "--world-size", 1, "--rank", 0, "--sync-bn"]
    flags += ["--dist-url", "tcp://localhost:10712", "-b", 4 * torch.cuda.device_count()]
    flags += ["--moco-k", 6 * torch.cuda.device_count()]
    outcome = run_shell("i", plain_tree, tmp_path / "run", *flags)
    assert outcome.status == 0, outcome.err
    log = log_of(tmp_path / "run")
    assert len(log) == 2 and all(math.isfinite(record["loss"]) for record in log)


def test_a_compiled_run_resumes_and_keeps_plain_names(plain_tree, tmp_path):
    first = run("i", plain_tree, tmp_path, "--compile", "--epochs", 1)
    second = run("i", plain_tree, tmp_path, "--compile", "--epochs", 2, "--resume", "auto")
    assert first["state_dict"].keys() == second["state_dict"].keys()
    assert not any("_orig_mod" in name for name in second["state_dict"])


def test_resume_is_exact_with_deterministic_algorithms(plain_tree, tmp_path):
    whole = run("i", plain_tree, tmp_path / "whole", "--epochs", 2, "--cos")
    for epochs in (1, 2):
        flags = ["--schedule", 1, "--no-cos"] if epochs == 1 else ["--cos", "--resume", "auto"]
        parts = run("i", plain_tree, tmp_path / "parts", "--epochs", epochs, *flags)
    for name, value in whole["state_dict"].items():
        assert torch.equal(value, parts["state_dict"][name]), name


def test_the_contrastive_loss_equals_that_on_the_cpu():
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(16, 32), dim=1) for _ in range(2))
    queue = torch.nn.functional.normalize(torch.randn(32, 5000), dim=0)
    labels, label_queue = torch.randint(0, 7, (16,)), torch.randint(0, 7, (5000,))
    arguments = (q, k, labels, queue, label_queue)
    expected = contrastive_loss(*arguments, 0.2)
    actual = contrastive_loss(*(value.cuda() for value in arguments), 0.2)
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_step_needs_at_least_what_the_memory_check_counts(dtype):
    device = torch.device("cuda", 0)
    before = torch.cuda.memory_allocated()
    model = SSFL("resnet18", 5, dim=16, queue_size=640).to(device).train()
    bound = step_memory(model, 64, 64, dtype=dtype, device=device)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        images, labels = torch.randn(2, 64, 3, 64, 64, device=device), torch.randint(0, 5, (64,), device=device)
        optimizer.zero_grad()
        step_loss(model, list(images), labels, dtype).backward()
        optimizer.step()
    assert bound <= torch.cuda.max_memory_allocated() - before < 3 * bound
    assert available_memory(device)[0] > 0


def test_a_step_never_waits_for_the_device():
    model = SSFL("resnet8", 5, dim=16, queue_size=64).cuda().train()
    images, labels = torch.randn(2, 8, 3, 32, 32, device="cuda"), torch.randint(0, 5, (8,), device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits, contrastive = model(images[0], images[1], labels)
        (torch.nn.functional.cross_entropy(logits, labels) + contrastive).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
