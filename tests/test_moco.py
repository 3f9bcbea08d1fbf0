"""Queue, momentum encoder and shuffling BN; what each network runs, trains and leaves unchanged."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import models
from models.moco import concat_all_gather, dequeue_and_enqueue, forward_shuffle_bn, init_queue, momentum_update
from tests.helpers import on_ranks

pytestmark = pytest.mark.method

DIM, CLASSES = 4, 5


def numbered(first, count):
    """Keys and labels whose values are their numbers."""
    numbers = torch.arange(first, first + count)
    return numbers.float()[:, None].expand(count, DIM), numbers


@pytest.mark.parametrize(("size", "batch"), [(10, 3), (10, 4), (3, 3), (10, 1), (7, 6)])
def test_the_queue_replaces_its_oldest_keys_and_wraps_around(size, batch):
    state = init_queue(DIM, size)
    expected, given = [-1] * size, 0
    for _ in range(2 * size + 1):
        keys, labels = numbered(given, batch)
        dequeue_and_enqueue(**state, keys=keys, labels=labels)
        for number in range(given, given + batch):
            expected[number % size] = number
        given += batch
        assert state["label_queue"].tolist() == expected
        assert state["queue_ptr"].tolist() == [given % size]
        filled = state["label_queue"] >= 0
        assert torch.equal(state["queue"][:, filled], state["label_queue"][filled].float().expand(DIM, -1))


def test_a_batch_larger_than_the_queue_is_refused():
    state = init_queue(DIM, 3)
    before = {name: value.clone() for name, value in state.items()}
    with pytest.raises(ValueError, match="--moco-k"):
        dequeue_and_enqueue(**state, keys=torch.ones(4, DIM), labels=torch.arange(4))
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_a_fresh_queue_holds_unit_keys_of_no_class():
    state = init_queue(DIM, 9)
    torch.testing.assert_close(state["queue"].norm(dim=0), torch.ones(9))
    assert state["label_queue"].tolist() == [-1] * 9 and state["queue_ptr"].tolist() == [0]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_keys_that_are_not_finite_never_enter(bad):
    state = init_queue(DIM, 5)
    dequeue_and_enqueue(**state, keys=torch.full((5, DIM), 9.0), labels=torch.full((5,), 9))
    keys, labels = numbered(1, 3)
    keys = keys.clone()
    keys[1, 2] = bad
    dequeue_and_enqueue(**state, keys=keys, labels=labels)
    assert state["label_queue"].tolist() == [1, 9, 3, 9, 9]
    assert state["queue"][0].tolist() == [1, 9, 3, 9, 9]
    assert state["queue_ptr"].tolist() == [3]


def test_momentum_update_averages_parameters_not_statistics():
    encoder_q, encoder_k = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    with torch.no_grad():
        encoder_q.weight.copy_(torch.tensor([2.0, -1.0]))
        encoder_q.running_mean.fill_(7)
    momentum_update(encoder_q, encoder_k, 0.9)
    torch.testing.assert_close(encoder_k.weight.detach(), torch.tensor([1.1, 0.8]))
    assert encoder_k.running_mean.tolist() == [0, 0] and encoder_k.num_batches_tracked == 0
    assert encoder_q.weight.tolist() == [2, -1]
    momentum_update(encoder_q, encoder_k, 0.9)
    torch.testing.assert_close(encoder_k.weight.detach(), torch.tensor([1.19, 0.62]))


class Pixels(nn.Module):
    """An encoder without parameters, from images to their first 64 values."""

    def forward(self, images):
        return images.flatten(1)[:, :64]


def ssfl(**options):
    torch.manual_seed(0)
    return models.SSFL("resnet8", CLASSES, **{"dim": DIM, "queue_size": 10, "momentum": 0.9} | options)


def views(n=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    im_q, im_k = torch.randn(2, n, 3, 16, 16, generator=generator, dtype=dtype)
    return im_q, im_k, torch.arange(n) % CLASSES


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("encoder", [Pixels, lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, 64))])
def test_any_module_may_be_the_encoder(encoder, dtype):
    im_q, im_k, labels = views(dtype=dtype)
    one = ssfl()
    one.encoder_q, one.encoder_k = encoder(), encoder()
    logits, loss = one.to(dtype)(im_q, im_k, labels)
    assert logits.shape == (6, CLASSES) and logits.dtype == loss.dtype == dtype and loss.isfinite()
    two = models.SLG("resnet8", CLASSES)
    two.encoder = encoder()
    assert two.to(dtype)(im_q).dtype == dtype
    three = models.SDL("resnet8", CLASSES)
    three.encoder_q, three.encoder_t = encoder(), encoder()
    hard, soft, distillation = three.to(dtype)(im_q)
    assert hard.shape == soft.shape == (6, CLASSES) and distillation.dtype == dtype


def test_encoders_without_parameters_give_the_formula():
    """With pixels as features, the complete forward pass can be written down."""
    model, (im_q, im_k, labels) = ssfl().double(), views(dtype=torch.float64)
    model.encoder_q, model.encoder_k = Pixels(), Pixels()
    head = {name: value.clone() for name, value in model.k_fc.state_dict().items()}
    with torch.no_grad():
        model.q_fc[0].weight.mul_(2)
    queue, label_queue = model.queue.clone(), torch.arange(10) % CLASSES
    model.label_queue.copy_(label_queue)
    logits, loss = model(im_q, im_k, labels)

    pixels = [im.flatten(1)[:, :64] for im in (im_q, im_k)]
    head["0.weight"] *= 1.1  # 0.9 + 0.1 * 2
    q = F.normalize(model.q_fc(pixels[0]), dim=1)
    k = F.linear(F.linear(pixels[1], head["0.weight"], head["0.bias"]).relu(), head["2.weight"], head["2.bias"])
    k = F.normalize(k, dim=1)
    negatives = (q @ queue / 0.2).masked_fill(labels[:, None] == label_queue, -torch.inf)
    scores = torch.cat([(q * k).sum(1, keepdim=True) / 0.2, negatives], dim=1)
    torch.testing.assert_close(loss, F.cross_entropy(scores, torch.zeros(6, dtype=torch.long)))
    torch.testing.assert_close(logits, model.classifier(pixels[0]))
    torch.testing.assert_close(model.queue[:, :6], k.T)
    assert torch.equal(model.queue[:, 6:], queue[:, 6:])
    assert model.label_queue.tolist() == labels.tolist() + label_queue[6:].tolist()


def test_forward_returns_fresh_tensors_and_reads_the_position_from_its_buffer():
    model, (im_q, im_k, labels) = ssfl(), views()
    first = model(im_q, im_k, labels)
    kept = [value.detach().clone() for value in first]
    model.queue_ptr.fill_(2)
    before = model.queue.clone()
    second = model(im_q * 2, im_k, labels)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))
    assert not {value.data_ptr() for value in first} & {value.data_ptr() for value in second}
    changed = (model.queue != before).any(dim=0)
    assert changed.tolist() == [False] * 2 + [True] * 6 + [False] * 2


def test_the_key_view_trains_nothing():
    model, (im_q, im_k, labels) = ssfl().train(), views()
    im_k.requires_grad_()
    logits, loss = model(im_q, im_k, labels)
    (F.cross_entropy(logits, labels) + loss).backward()
    assert im_k.grad is None
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == name.startswith(("encoder_k.", "k_fc.")), name
    assert model.encoder_k.bn1.num_batches_tracked == 1  # it runs in train mode nevertheless


def test_the_key_encoder_starts_as_a_copy_and_follows_in_calls_that_update():
    model, (im_q, im_k, labels) = ssfl(momentum=0.75), views()
    for query, key in ((model.encoder_q, model.encoder_k), (model.q_fc, model.k_fc)):
        for a, b in zip(query.state_dict().values(), key.state_dict().values(), strict=True):
            assert torch.equal(a, b)
    with torch.no_grad():
        model.encoder_q.conv1.weight.add_(1)
    start = model.encoder_k.conv1.weight.clone()
    model(im_q, im_k, labels, update=False)
    assert torch.equal(model.encoder_k.conv1.weight, start)
    model(im_q, im_k, labels)
    torch.testing.assert_close(model.encoder_k.conv1.weight, start + 0.25)


def test_keys_wait_until_they_may_enter_the_queue():
    model, (im_q, im_k, labels) = ssfl().train(), views(n=3)
    names, queue = model.state_dict().keys(), model.queue.clone()
    for _ in range(2):
        model(im_q, im_k, labels, enqueue=False)
        assert torch.equal(model.queue, queue) and model.queue_ptr == 0
        assert model.state_dict().keys() == names
    model(im_q, im_k, labels)
    assert model.label_queue.tolist() == labels.tolist() * 3 + [-1] and model.queue_ptr == 9
    model(im_q, im_k, labels)
    assert model.queue_ptr == 2  # nothing enters twice


class Forbidden(nn.Module):
    """A module that must not run."""

    def forward(self, *_):
        raise AssertionError("this must not run")


def test_parts_that_are_switched_off_do_not_run():
    im_q, _, labels = views()
    one, three = ssfl(contrast=False), models.SDL("resnet8", CLASSES, distill=False)
    one.encoder_k = one.k_fc = one.q_fc = three.encoder_t = three.classifier_t = Forbidden()
    before = one.queue.clone()
    logits, contrastive = one(im_q, None, labels)
    hard, _, distillation = three(im_q)
    for scores, loss in ((logits, contrastive), (hard, distillation)):
        (F.cross_entropy(scores, labels) + loss).backward()
        assert loss == 0
    assert torch.equal(one.queue, before) and one.queue_ptr == 0 and three.classifier_kd.weight.grad is None


@pytest.mark.parametrize("mode", [False, True])
def test_only_training_changes_the_state(mode):
    im_q, im_k, labels = views()
    for model in (ssfl(), models.SLG("resnet8", CLASSES), models.SDL("resnet8", CLASSES)):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        model.train(mode)
        model(im_q, im_k, labels) if mode and isinstance(model, models.SSFL) else model(im_q)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert bool(changed) == mode


@pytest.mark.parametrize("freeze_bn", [False, True])
def test_statistics_of_a_frozen_encoder_move_unless_frozen_too(freeze_bn):
    images = views()[0]
    for model, name in ((models.SLG, "encoder"), (models.SDL, "encoder_t")):
        model = model("resnet8", CLASSES, freeze_bn=freeze_bn)  # in train mode, as every new module
        encoder = getattr(model, name)
        model(images)
        assert (encoder.bn1.num_batches_tracked == 0) == freeze_bn
        assert torch.equal(encoder.bn1.running_mean, torch.zeros(16)) == freeze_bn
        assert model.training and not model.eval().training and not encoder.training


def test_a_frozen_batchnorm_uses_its_running_statistics():
    images = views()[0]
    model = models.SLG("resnet8", CLASSES, freeze_bn=True)
    assert torch.equal(model.train()(images), model.eval()(images))
    model = models.SLG("resnet8", CLASSES)
    assert not torch.allclose(model.train()(images), model.eval()(images))


BACKBONE = r"(conv1|bn1|layer[123]\.\d\.(conv|bn)[12])\.(weight|bias)"
LINEAR = r"(weight|bias)"
TRAINED = {  # the parameters that train, by stage and loss
    "i": (lambda: ssfl(), rf"encoder_q\.{BACKBONE}|q_fc\.[02]\.{LINEAR}|classifier\.{LINEAR}"),
    "i, cross entropy": (lambda: ssfl(contrast=False), rf"encoder_q\.{BACKBONE}|classifier\.{LINEAR}"),
    "ii": (lambda: models.SLG("resnet8", CLASSES), r"classifier\.scales"),
    "iii": (lambda: models.SDL("resnet8", CLASSES), rf"encoder_q\.{BACKBONE}|classifier(_kd)?\.{LINEAR}"),
    "iii, cross entropy": (
        lambda: models.SDL("resnet8", CLASSES, distill=False), rf"encoder_q\.{BACKBONE}|classifier\.{LINEAR}",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TRAINED)
def test_exactly_the_trained_parameters_take_a_gradient(case):
    """DistributedDataParallel refuses a parameter that should train and takes no gradient."""
    build, pattern = TRAINED[case]
    model, (im_q, im_k, labels) = build().train(), views()
    if isinstance(model, models.SSFL):
        logits, loss = model(im_q, im_k, labels)
    elif isinstance(model, models.SDL):
        logits, _, loss = model(im_q)
    else:
        logits, loss = model(im_q), 0.0
    (F.cross_entropy(logits, labels) + loss).backward()
    expected = [name for name, _ in model.named_parameters() if re.fullmatch(pattern, name)]
    assert expected
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected
    assert [name for name, p in model.named_parameters() if p.grad is not None] == expected


def test_stage_two_takes_the_named_classifier():
    student = models.SDL("resnet8", CLASSES)
    published = {f"module.{name}": value for name, value in student.state_dict().items()}
    for name, source in (("hard", student.classifier), ("soft", student.classifier_kd)):
        two = models.SLG("resnet8", CLASSES)
        with torch.no_grad():
            two.classifier.scales.fill_(3)
        two.load_pretrained(published, name)
        assert torch.equal(two.classifier.fc.weight, source.weight) and torch.all(two.classifier.scales == 1)
        assert torch.equal(two.encoder.conv1.weight, student.encoder_q.conv1.weight)


def shuffle_by_all_gather(encoder, images):
    """forward_shuffle_bn in its plain form, in which every rank receives the images of all ranks."""
    everything, local = (
        concat_all_gather(images),
        slice(dist.get_rank() * len(images), (dist.get_rank() + 1) * len(images)),
    )
    order = torch.randperm(len(everything))
    dist.broadcast(order, src=0)
    return concat_all_gather(encoder(everything[order[local]]))[order.argsort()[local]]


def shuffled_both_ways(rank, layout):
    """Whether both forms give the same keys and running statistics, and whether these are the layout's."""
    model = ssfl().train()
    images = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(rank)).to(memory_format=layout)
    layouts = []
    model.encoder_k.register_forward_pre_hook(
        lambda _, given: layouts.append(given[0].is_contiguous(memory_format=layout))
    )
    found = []
    for shuffle in (shuffle_by_all_gather, forward_shuffle_bn):
        encoder = copy.deepcopy(model)
        torch.manual_seed(20 + rank)
        found.append([shuffle(encoder._keys, images), encoder.encoder_k.bn1.running_mean])
    return [all(map(torch.equal, *found)), all(layouts)]


@pytest.mark.parametrize(("world", "layout"), [(2, torch.contiguous_format), (4, torch.channels_last)])
def test_shuffling_gives_bit_for_bit_what_a_gather_of_all_images_gives(world, layout):
    assert on_ranks(world, shuffled_both_ways, layout) == [[True, True]] * world


def bytes_of_a_step(rank):
    """(bytes that arrive from other ranks by exchanges and by gathers, the same counted from the permutation)."""
    world, (im_q, im_k, labels), counts = dist.get_world_size(), views(n=5), [0, 0]
    to_all, gather = dist.all_to_all_single, dist.all_gather

    def all_to_all_single(output, tensor, received, sent):
        counts[0] += sum(n for source, n in enumerate(received) if source != rank) * output[0].nbytes
        return to_all(output, tensor, received, sent)

    def all_gather(outputs, tensor):
        counts[1] += sum(output.nbytes for source, output in enumerate(outputs) if source != rank)
        return gather(outputs, tensor)

    model = ssfl(queue_size=20).train()
    torch.manual_seed(7)
    order = torch.randperm(5 * world)
    torch.manual_seed(7)
    dist.all_to_all_single, dist.all_gather = all_to_all_single, all_gather  # in this forked process alone
    model(im_q, im_k, labels)
    strangers = int((order[5 * rank : 5 * rank + 5] // 5 != rank).sum())
    expected = [strangers * (im_k[0].nbytes + DIM * 4), 5 * (world - 1) * (DIM * 4 + 8)]
    return [counts, expected, strangers]


def test_a_rank_receives_only_the_images_that_it_encodes_and_one_gather_of_keys_and_labels():
    outcomes = on_ranks(4, bytes_of_a_step)
    assert [counts for counts, _, _ in outcomes] == [expected for _, expected, _ in outcomes]
    assert all(0 < strangers <= 5 for _, _, strangers in outcomes)


def trained_queues(rank):
    """The queue after one step, and after another model's step of two micro-batches."""
    one, (im_q, im_k, labels) = ssfl().train(), views(n=3)
    one(im_q + rank, im_k - rank, (labels + rank) % CLASSES)
    two, (im_q, im_k, labels) = ssfl().train(), views(n=4)
    for part, enqueue in ((slice(0, 2), False), (slice(2, 4), True)):
        two(im_q[part], im_k[part], (labels[part] + rank) % CLASSES, update=not enqueue, enqueue=enqueue)
    return [[model.queue, model.label_queue, model.queue_ptr] for model in (one, two)]


def test_the_queue_of_every_rank_holds_the_keys_of_all_ranks_in_the_order_of_one_large_batch():
    first, second = on_ranks(2, trained_queues)
    assert all(map(torch.equal, first[0] + first[1], second[0] + second[1]))
    (queue, labels, position), (_, of_parts, after_parts) = first
    assert labels.tolist() == [0, 1, 2, 1, 2, 3, -1, -1, -1, -1] and position == 6
    torch.testing.assert_close(queue.norm(dim=0), torch.ones(10))
    assert len(queue[:, :6].unique(dim=1).T) == 6
    assert of_parts.tolist() == [0, 1, 2, 3, 1, 2, 3, 4, -1, -1] and after_parts == 8


def test_classify_takes_the_soft_classifier():
    model, images = models.SDL("resnet8", 5).eval(), torch.randn(2, 3, 16, 16)
    assert torch.equal(model.classify(images), model(images)[1])
