"""Plain versions of the three stages, written like their published formulas, to compare with.

The backbones and heads are the same; float32, NCHW. Nothing is done to save memory, or to wait less for the device.
"""

import torch
import torch.nn.functional as F
from torch import nn

from models import build_backbone, contrastive_loss_plain
from models.heads import LWS, projection_head


def distillation_loss(student, teacher, temperature):
    """T^2 KL( softmax(teacher / T) || softmax(student / T) ), averaged over the batch."""
    p = torch.softmax(teacher / temperature, dim=1)
    return temperature**2 * (p * (p.log() - torch.log_softmax(student / temperature, dim=1))).sum(dim=1).mean()


class StageI(nn.Module):
    """Momentum contrast as it is usually written (He et al., 2020), with a classifier and labeled keys."""

    views = 2

    def __init__(self, arch, num_classes, queue_size, dim=128, momentum=0.999, temperature=0.2):
        super().__init__()
        self.size = queue_size
        self.m = momentum
        self.temperature = temperature
        self.encoder_q = build_backbone(arch)
        self.encoder_k = build_backbone(arch)
        num_features = self.encoder_q.num_features
        self.q_fc = projection_head(num_features, dim)
        self.k_fc = projection_head(num_features, dim)
        self.classifier = nn.Linear(num_features, num_classes)
        for param_q, param_k in self.pairs():
            param_k.data.copy_(param_q.data)
            param_k.requires_grad = False
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue_size), dim=0))
        self.register_buffer("label_queue", torch.zeros(queue_size, dtype=torch.long))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def pairs(self):
        yield from zip(self.encoder_q.parameters(), self.encoder_k.parameters(), strict=True)
        yield from zip(self.q_fc.parameters(), self.k_fc.parameters(), strict=True)

    @torch.no_grad()
    def update_key_encoder(self):
        for param_q, param_k in self.pairs():
            param_k.data = param_k.data * self.m + param_q.data * (1.0 - self.m)

    @torch.no_grad()
    def enqueue(self, keys, labels):
        pointer = int(self.queue_ptr)
        count = len(keys)
        if pointer + count > self.size:
            pointer = 0
        self.queue[:, pointer : pointer + count] = keys.T
        self.label_queue[pointer : pointer + count] = labels
        self.queue_ptr[0] = (pointer + count) % self.size

    def forward(self, im_q, im_k, labels):
        features = self.encoder_q(im_q)
        logits = self.classifier(features)
        q = F.normalize(self.q_fc(features), dim=1)
        with torch.no_grad():
            self.update_key_encoder()
            k = F.normalize(self.k_fc(self.encoder_k(im_k)), dim=1)
        contrast = contrastive_loss_plain(q, k, labels, self.queue.clone(), self.label_queue, self.temperature)
        self.enqueue(k, labels)
        return {"linear": logits}, [F.cross_entropy(logits, labels), contrast]


class StageII(nn.Module):
    """A frozen encoder with learnable weight scaling of its classifier."""

    views = 1

    def __init__(self, arch, num_classes, queue_size=None):
        super().__init__()
        self.encoder = build_backbone(arch).requires_grad_(False)
        self.classifier = LWS(self.encoder.num_features, num_classes)

    def forward(self, im, labels):
        logits = self.classifier(self.encoder(im))
        return {"lws": logits}, [F.cross_entropy(logits, labels)]


class StageIII(nn.Module):
    """A student with two classifiers and a frozen teacher."""

    views = 1

    def __init__(self, arch, num_classes, queue_size=None, temperature=2.0):
        super().__init__()
        self.temperature = temperature
        self.encoder_q = build_backbone(arch)
        self.encoder_t = build_backbone(arch)
        num_features = self.encoder_q.num_features
        self.classifier = nn.Linear(num_features, num_classes)
        self.classifier_kd = nn.Linear(num_features, num_classes)
        self.classifier_t = LWS(num_features, num_classes)
        for module in (self.encoder_t, self.classifier_t):
            module.requires_grad_(False)

    def forward(self, im, labels):
        features = self.encoder_q(im)
        hard = self.classifier(features)
        soft = self.classifier_kd(features)
        teacher = self.classifier_t(self.encoder_t(im))
        losses = [F.cross_entropy(hard, labels), distillation_loss(soft, teacher.detach(), self.temperature)]
        return {"hard": hard, "soft": soft}, losses


STAGES = {"i": StageI, "ii": StageII, "iii": StageIII}


def accuracy(logits, labels, k):
    """Top-k accuracy in percent, as in PyTorch's ImageNet example."""
    _, predicted = logits.topk(min(k, logits.shape[1]), 1, True, True)
    correct = predicted.t().eq(labels.view(1, -1).expand_as(predicted.t()))
    return correct.reshape(-1).float().sum() * 100 / len(labels)


def step(model, optimizer, images, labels) -> list[float]:
    """A training step that reads every loss and accuracy; images: the model's views, normalized floats."""
    logits, losses = model(*images, labels)
    loss = sum(losses)
    read = [part.item() for part in (loss, *losses)]
    read += [accuracy(scores, labels, k).item() for scores in logits.values() for k in (1, 5)]
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return read
