"""--bn-splits: one process with N pieces computes what N processes compute that are given these pieces."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from models import SDL, SLG, SSFL, split_batchnorm
from models.moco import SplitBatchNorm, forward_shuffle_bn
from tests.helpers import LAST, STAGES, checkpoint, on_ranks, same, source, train

pytestmark = pytest.mark.method

CLASSES, IMAGES, STEPS = 5, 16, 3


def network(stage, splits=1, **options):
    torch.manual_seed(0)
    if stage == "i":
        options = {"dim": 8, "queue_size": 40, "momentum": 0.9} | options
        return SSFL("resnet8", CLASSES, bn_splits=splits, **options)
    return (SLG if stage == "ii" else SDL)("resnet8", CLASSES, bn_splits=splits, **options)


def batch(step):
    generator = torch.Generator().manual_seed(100 + step)
    images = torch.randn(2, IMAGES, 3, 16, 16, generator=generator)
    return images, torch.randint(CLASSES, (IMAGES,), generator=generator)


def losses(model, images, labels):
    outputs = model(*images, labels) if isinstance(model, SSFL) else model(images[0])
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return F.cross_entropy(outputs[0], labels) + sum(value for value in outputs if value.dim() == 0)


def average(tensors):
    """Averages tensors over the ranks, in place."""
    for tensor in tensors:
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()


def trained(rank, stage, splits):
    """Losses, last gradients, weights and buffers after STEPS steps on this rank's part of each batch."""
    model, world = network(stage, splits).double().train(), dist.get_world_size()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
    found = []
    for step in range(STEPS):
        images, labels = batch(step)
        images = images.double()
        torch.manual_seed(1000 * rank + step)  # the permutation of the keys is rank 0's
        optimizer.zero_grad()
        loss = losses(model, images.chunk(world, dim=1)[rank], labels.chunk(world)[rank])
        loss.backward()
        found.append(loss.detach())
        average([found[-1], *(p.grad for p in parameters)])
        optimizer.step()
    state = {name: value.double() for name, value in model.state_dict().items()}
    average(value for name, value in state.items() if "running" in name)
    return [torch.stack(found), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}, state]


@pytest.mark.parametrize("stage", STAGES)
def test_pieces_of_one_process_are_as_many_processes(stage):
    results = {
        (world, splits): on_ranks(world, trained, stage, splits)[0]
        for world, splits in ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))
    }
    for world, splits in results:
        reference = results[world * splits, 1]
        torch.testing.assert_close(results[world, splits], reference, rtol=1e-10, atol=1e-12)
    unsplit, split = results[1, 1][0], results[1, 4][0]
    assert (unsplit - split).abs().max() > 1e-3  # the pieces have statistics of their own


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_each_piece_is_normalized_by_batchnorm_itself(layout, momentum):
    torch.manual_seed(1)
    images = torch.randn(3, 12, 4, 5, 5).to(torch.float64) * 3 + 2
    plain = [nn.BatchNorm2d(4, momentum=momentum).double() for _ in range(3)]
    split = split_batchnorm(nn.BatchNorm2d(4, momentum=momentum).double(), 3)
    for x in images:
        x = x.contiguous(memory_format=layout)
        y = split(x)
        assert y.is_contiguous(memory_format=layout)
        torch.testing.assert_close(y, torch.cat([norm(piece) for norm, piece in zip(plain, x.chunk(3), strict=True)]))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(split, name), torch.stack([getattr(norm, name) for norm in plain]).mean(0))
    assert split.num_batches_tracked == len(images)
    reference = nn.BatchNorm2d(4).double().eval()
    reference.load_state_dict(split.state_dict())
    assert torch.equal(split.eval()(x), reference(x))


def test_conversion_keeps_parameters_and_names_and_takes_every_batchnorm():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sequential(nn.BatchNorm1d(4, affine=False)))
    module[2][0] = nn.BatchNorm1d(4, affine=False, track_running_stats=False)
    before, names = list(module.parameters()), list(module.state_dict())
    assert split_batchnorm(module, 2) is module and list(module.state_dict()) == names
    assert all(a is b for a, b in zip(before, module.parameters(), strict=True))
    x = torch.randn(8, 3)
    expected = torch.cat([F.batch_norm(module[:2](x).chunk(2)[i], None, None, training=True) for i in range(2)])
    torch.testing.assert_close(module(x), expected)
    with pytest.raises(ValueError, match="7 images cannot be split into 2"):
        module(torch.randn(7, 3))
    assert type(split_batchnorm(nn.BatchNorm1d(4), 1)) is nn.BatchNorm1d
    with pytest.raises(ValueError, match="SyncBatchNorm cannot be split"):
        split_batchnorm(nn.Sequential(nn.SyncBatchNorm(4)), 2)


@pytest.mark.parametrize("stage", STAGES)
def test_all_backbones_of_a_network_are_split_and_its_state_dict_stays(stage):
    plain, split = network(stage), network(stage, 4)
    assert same(dict(plain.state_dict()), dict(split.state_dict()))
    norms = [m for m in split.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert norms and all(isinstance(m, SplitBatchNorm) and m.splits == 4 for m in norms)
    images = batch(0)[0][0]
    assert same(plain.eval()(images), split.eval()(images))


@pytest.mark.parametrize("network", [SLG, SDL])
def test_a_frozen_network_in_eval_mode_has_nothing_to_split(network):
    torch.manual_seed(0)
    model = network("resnet8", CLASSES, freeze_bn=True, bn_splits=4).train()
    encoder = model.encoder if network is SLG else model.encoder_t
    assert encoder(torch.randn(3, 3, 16, 16)).shape == (3, 64)  # 3 images have no 4 pieces


@pytest.mark.parametrize("stage", ["ii", "iii"])
def test_micro_batches_of_stages_two_and_three_are_pieces(stage):
    images, labels = batch(0)
    whole, parts = network(stage, 4).train(), network(stage).train()
    losses(whole, images, labels).backward()
    for part in range(4):
        (losses(parts, images.chunk(4, dim=1)[part], labels.chunk(4)[part]) / 4).backward()
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        if p.requires_grad:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_keys_come_back_in_order_and_share_a_piece_with_their_query_no_more_than_chance():
    images, splits, shared = torch.arange(32.0)[:, None], 4, 0
    for seed in range(200):
        torch.manual_seed(seed)
        seen = []
        assert torch.equal(forward_shuffle_bn(lambda x, seen=seen: seen.append(x) or x, images, splits), images)
        pieces = seen[0].flatten().long() // 8  # whose query is in which piece
        shared += int((pieces == torch.arange(32) // 8).sum())
    expected = 200 * 32 / splits
    assert abs(shared - expected) < 4 * expected**0.5, (shared, expected)  # four standard deviations of a Poisson count


# ---- the flag


def test_runs_with_pieces_hand_on_and_the_flag_is_saved(plain_tree, tmp_path):
    flags = ["--bn-splits", 4, "--epochs", 1]
    runs = {"i": train("i", plain_tree, tmp_path / "i", *flags, "--accum-steps", 2, "--channels-last")}
    runs["ii"] = train("ii", plain_tree, tmp_path / "ii", *flags, *source("ii", runs))
    more = ["--amp", "bf16", "--freeze-bn", *source("iii", runs)]
    runs["iii"] = train("iii", plain_tree, tmp_path / "iii", *flags, *more)
    assert all(checkpoint(folder)["args"]["bn_splits"] == 4 for folder in runs.values())


def test_a_resumed_run_with_pieces_ends_as_an_uninterrupted_one(plain_tree, tmp_path):
    flags = ["--bn-splits", 4, "--lr", 0.02, "--cos", "--accum-steps", 2]
    whole = train("i", plain_tree, tmp_path / "whole", *flags)
    train("i", plain_tree, tmp_path / "cut", *flags, "--epochs", 1, "--save-every-steps", 2)
    resumed = train("i", plain_tree, tmp_path / "cut", "--resume", tmp_path / "cut" / LAST, "--epochs", 2)
    other = train("i", plain_tree, tmp_path / "other", *flags, "--bn-splits", 1)
    a, b, c = (checkpoint(folder)["state_dict"] for folder in (whole, resumed, other))
    assert same(a, b) and not same(a, c)
