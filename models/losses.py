"""The two losses of SSD-LT, as pure functions."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


class _ContrastiveLoss(torch.autograd.Function):
    """Streams over the queue in blocks, so that nothing of size batch x queue is kept for the backward call.

    The loss is a mean and only the queries take a gradient, hence the gradient is a weighted sum of keys that can be
    accumulated in the forward call, next to the running log-sum-exp that normalises its weights.
    """

    @staticmethod
    def forward(ctx, q, k, labels, queue, label_queue, temperature, block):
        with torch.autocast(q.device.type, enabled=False):
            scaled = q / temperature
            positive = (scaled * k).sum(dim=1)
            top, total, weighted = positive, torch.ones_like(positive), k
            for start in range(0, queue.shape[1], block):
                keys = queue[:, start : start + block]
                scores = scaled @ keys
                scores.masked_fill_(labels[:, None] == label_queue[start : start + block], -torch.inf)
                higher = torch.maximum(top, scores.amax(dim=1))
                weights = scores.sub_(higher[:, None]).exp_()
                shrink = (top - higher).exp()
                total = total * shrink + weights.sum(dim=1)
                weighted = torch.addmm(weighted * shrink[:, None], weights, keys.T)
                top = higher
            ctx.save_for_backward((weighted / total[:, None] - k) / (temperature * len(q)))
            return (top + total.log() - positive).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None, None, None, None


def contrastive_loss(q, k, labels, queue, label_queue, temperature: float, block: int | None = None):
    """Class-masked InfoNCE of stage I (paper, section 3.1): the negatives of a query are the keys of other classes.

    q, k (N, dim): queries and their keys, normalised; labels (N,); queue (dim, K), label_queue (K,): earlier keys and
    their classes, -1 for none. Returns the mean over the batch of
    -log( e^{q_i k_i / T} / (e^{q_i k_i / T} + sum_{j: y_j != y_i} e^{q_i n_j / T}) ), a scalar in the type of q.
    Only q takes a gradient. block: keys a step; by default what fits the device's cache and launch overhead.
    """
    if block is None:
        elements = 2**20 if q.device.type == "cpu" else 2**24
        block = max(256, elements // len(q))
    return _ContrastiveLoss.apply(q, k.detach(), labels, queue, label_queue, temperature, block)


def distillation_loss(student, teacher, temperature: float):
    """T^2 KL( softmax(teacher / T) || softmax(student / T) ), averaged over the batch (paper, section 3.3).

    student, teacher: logits (N, num_classes); the teacher takes no gradient.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
