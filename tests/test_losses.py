"""The contrastive loss, plain and streamed, and the distillation loss, compared with their formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from models import contrastive_loss, contrastive_loss_plain, distillation_loss

pytestmark = pytest.mark.method

T, CLASSES = 0.2, 5
TOLERANCE = [(torch.float64, 1e-10), (torch.float32, 1e-6)]
CHUNK_SIZES = [None, 1, 7, 16, 49, 50, 64]  # the queue of `batch` has 50 keys


def batch(n=7, dim=8, size=50, dtype=torch.float64):
    """(q, k, labels, queue, label_queue); some keys in the queue have no class."""
    generator = torch.Generator().manual_seed(0)

    def unit(*shape, dim):
        return F.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=dim).to(dtype)

    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    label_queue = torch.randint(-1, CLASSES, (size,), generator=generator)
    return unit(n, dim, dim=1), unit(n, dim, dim=1), labels, unit(dim, size, dim=0), label_queue


def contrastive_by_loops(q, k, labels, queue, label_queue):
    """The formula, computed with Python floats."""
    losses = []
    for i in range(len(q)):
        positive = math.exp(float(q[i] @ k[i]) / T)
        negatives = [
            math.exp(float(q[i] @ queue[:, j]) / T) for j in range(queue.shape[1]) if label_queue[j] != labels[i]
        ]
        losses.append(-math.log(positive / (positive + sum(negatives))))
    return sum(losses) / len(losses)


def loss_and_gradient(loss_function, given, *options):
    q, *others = given
    q = q.clone().requires_grad_()
    loss = loss_function(q, *others, T, *options)
    return loss.detach(), torch.autograd.grad(loss, q)[0]


@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
def test_the_plain_contrastive_loss_equals_the_formula(dtype, tolerance):
    loss = contrastive_loss_plain(*batch(dtype=dtype), T)
    assert loss.shape == () and loss.dtype == dtype
    assert float(loss) == pytest.approx(contrastive_by_loops(*batch()), rel=tolerance)


@pytest.mark.parametrize("chunk_size", CHUNK_SIZES)
@pytest.mark.parametrize(("dtype", "tolerance"), TOLERANCE)
def test_the_streamed_contrastive_loss_equals_the_plain_one(chunk_size, dtype, tolerance):
    plain = loss_and_gradient(contrastive_loss_plain, batch())
    streamed = loss_and_gradient(contrastive_loss, batch(dtype=dtype), chunk_size)
    for expected, actual in zip(plain, streamed, strict=True):
        assert actual.dtype == dtype
        torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("chunk_size", [None, 7, 50])
def test_the_gradient_is_that_of_finite_differences(chunk_size):
    q, *others = batch()
    assert torch.autograd.gradcheck(lambda q: 3 * contrastive_loss(q, *others, T, chunk_size), q.requires_grad_())


@pytest.mark.parametrize("loss", [contrastive_loss, contrastive_loss_plain])
def test_only_the_query_takes_a_gradient(loss):
    q, k, labels, queue, label_queue = batch()
    q.requires_grad_()
    k.requires_grad_()
    loss(q, k, labels, queue, label_queue, T).backward()
    assert q.grad.abs().sum() > 0 and k.grad is None


def test_keys_of_the_same_class_do_not_count():
    q, k, labels, queue, label_queue = batch()
    labels[:] = 2
    label_queue[::3] = 2
    others = label_queue != 2
    masked = contrastive_loss(q, k, labels, queue, label_queue, T)
    torch.testing.assert_close(masked, contrastive_loss(q, k, labels, queue[:, others], label_queue[others], T))
    moved = queue.clone()
    moved[:, ~others] = q[0][:, None]  # their values do not change the loss
    torch.testing.assert_close(masked, contrastive_loss(q, k, labels, moved, label_queue, T))


@pytest.mark.parametrize("label", range(CLASSES))
def test_a_key_of_no_class_is_a_negative_for_every_query(label):
    q, k, labels, queue, _ = batch()
    labels[:] = label
    unlabeled, foreign = (torch.full((queue.shape[1],), number) for number in (-1, CLASSES + 1))
    loss = contrastive_loss(q, k, labels, queue, unlabeled, T)
    assert loss == contrastive_loss(q, k, labels, queue, foreign, T)
    assert loss > contrastive_loss(q, k, labels, queue, batch()[-1], T)


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_without_any_negative_the_loss_is_zero(chunk_size):
    q, k, labels, queue, label_queue = batch()
    q.requires_grad_()
    labels[:], label_queue[:] = 1, 1
    loss = contrastive_loss(q, k, labels, queue, label_queue, T, chunk_size)
    loss.backward()
    assert loss.item() == 0 and torch.all(q.grad == 0)


@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("towards", [1, -1])
def test_large_scores_do_not_overflow(chunk_size, towards):
    """Scores of up to 1,000, whose exponentials overflow; the positive is the largest or the smallest."""
    q, _, labels, queue, label_queue = batch(dtype=torch.float32)
    given = q, towards * q, labels, queue, label_queue
    loss = contrastive_loss(*given, 1e-3, chunk_size)
    exact = contrastive_loss_plain(*(x.double() if x.is_floating_point() else x for x in given), 1e-3)
    assert loss.isfinite() and float(loss) == pytest.approx(float(exact), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_the_contrastive_loss_stays_in_full_precision_under_autocast(half):
    given = batch(dtype=torch.float32)
    with torch.autocast("cpu", half):
        assert (given[0] @ given[3]).dtype == half
        loss = contrastive_loss(*given, T)
    torch.testing.assert_close(loss, contrastive_loss(*given, T), rtol=0, atol=0)


def test_nothing_of_the_size_batch_times_queue_is_kept_for_the_backward_pass():
    q, k, labels, queue, label_queue = batch(n=16, size=4096)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()), lambda x: x):
        loss = contrastive_loss(q.requires_grad_(), k, labels, queue, label_queue, T, 256)
    assert loss.requires_grad and 0 < sum(kept) <= 3 * q.numel()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 4.0])
def test_the_distillation_loss_equals_the_formula(temperature):
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 6, CLASSES, generator=generator, dtype=torch.float64) * 3
    expected = 0.0
    for s, t in zip((student / temperature).exp(), (teacher / temperature).exp(), strict=True):
        p, r = t / t.sum(), s / s.sum()
        expected += sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, r, strict=True))
    loss = distillation_loss(student, teacher, temperature)
    assert float(loss) == pytest.approx(temperature**2 * expected / 6, rel=1e-10)


def test_the_distillation_loss_has_a_gradient_for_the_student_alone():
    generator = torch.Generator().manual_seed(2)
    student, teacher = torch.randn(2, 4, CLASSES, generator=generator, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda s: distillation_loss(s, teacher, 2.0), student.clone().requires_grad_())
    teacher.requires_grad_()
    student.requires_grad_()
    distillation_loss(student, teacher, 2.0).backward()
    assert teacher.grad is None and student.grad is not None


def test_the_distillation_loss_is_finite_for_a_probability_that_underflows():
    teacher = torch.tensor([[0.0, 0.0, -1e4]])  # a probability that underflows
    assert distillation_loss(torch.zeros(1, 3), teacher, 1.0).item() == pytest.approx(math.log(1.5))
