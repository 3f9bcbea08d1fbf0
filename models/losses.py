"""The losses of SSD-LT, as pure functions; the contrastive loss as its formula, and as training computes it."""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def contrastive_loss_plain(q, k, labels, queue, label_queue, temperature: float):
    """Class-masked InfoNCE of stage I (paper, section 3.1): the negatives of a query are the keys of other classes.

        L_con = mean_i -log( e^{q_i k_i / T} / ( e^{q_i k_i / T} + sum_{j: y_j != y_i} e^{q_i n_j / T} ) )

    q, k (N, dim): normalized queries and their keys; labels y (N,); queue (dim, K): earlier keys n_j; label_queue (K,):
    their classes y_j, -1 for none. Returns a scalar in the dtype of q, the only argument that takes a gradient.
    """
    positive = (q * k.detach()).sum(dim=1, keepdim=True)
    negatives = (q @ queue).masked_fill(labels[:, None] == label_queue, -torch.inf)
    logits = torch.cat([positive, negatives], dim=1) / temperature
    return F.cross_entropy(logits, torch.zeros_like(labels, dtype=torch.long))  # the positive is in column 0


class _ContrastiveLoss(torch.autograd.Function):
    """contrastive_loss_plain in one pass over chunks of the queue; keeps nothing of size N x K for the backward pass.

    With the scores s_ij = q_i n_j / T of the negatives, and the positive k_i as one more term of each sum:
        loss_i = log sum_j e^{s_ij} - q_i k_i / T
        d loss_i / d q_i = ( sum_j p_ij n_j - k_i ) / T, where p_ij = e^{s_ij} / sum_j e^{s_ij}
    Both sums are accumulated chunk by chunk, relative to the running maximum of the scores.
    """

    @staticmethod
    def forward(ctx, q, k, labels, queue, label_queue, temperature, chunk_size):
        with torch.autocast(q.device.type, enabled=False):
            scaled = q / temperature
            positive = (scaled * k).sum(dim=1)
            maximum = positive
            total = torch.ones_like(positive)
            weighted_keys = k
            for start in range(0, queue.shape[1], chunk_size):
                keys = queue[:, start : start + chunk_size]
                scores = scaled @ keys
                scores.masked_fill_(labels[:, None] == label_queue[start : start + chunk_size], -torch.inf)
                new_maximum = torch.maximum(maximum, scores.amax(dim=1))
                weights = scores.sub_(new_maximum[:, None]).exp_()
                rescale = (maximum - new_maximum).exp()
                total = total * rescale + weights.sum(dim=1)
                weighted_keys = torch.addmm(weighted_keys * rescale[:, None], weights, keys.T)
                maximum = new_maximum
            ctx.save_for_backward((weighted_keys / total[:, None] - k) / (temperature * len(q)))
            return (maximum + total.log() - positive).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None, None, None, None, None, None


def contrastive_loss(q, k, labels, queue, label_queue, temperature: float, chunk_size: int | None = None):
    """contrastive_loss_plain, streamed over the queue: the same value and gradient to rounding, in far less memory.

    chunk_size: keys per chunk; by default what suits the cache of a CPU, or the launch overhead of a GPU.
    """
    if chunk_size is None:
        elements = 2**20 if q.device.type == "cpu" else 2**24
        chunk_size = max(256, elements // len(q))
    return _ContrastiveLoss.apply(q, k.detach(), labels, queue, label_queue, temperature, chunk_size)


def distillation_loss(student, teacher, temperature: float):
    """Self-distillation of stage III (paper, section 3.3), averaged over the batch.

        L_kd = T^2 KL( softmax(teacher / T) || softmax(student / T) )

    student, teacher: logits (N, num_classes); the teacher takes no gradient.
    """
    log_student = F.log_softmax(student / temperature, dim=1)
    log_teacher = F.log_softmax(teacher.detach() / temperature, dim=1)
    return temperature**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)
