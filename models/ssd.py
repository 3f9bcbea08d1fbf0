"""The networks of the three stages, SSFL (I), SLG (II) and SDL (III), and what one stage takes from another.

Notation of the paper, as far as the comments use it: x an image, f a backbone, h = f(x) its features, g a projection,
W h + b a linear classifier, s the scales of LWS; q and k: query and key of momentum contrast; T: a temperature.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .backbones import build_backbone
from .heads import LWS, projection_head
from .losses import contrastive_loss, distillation_loss
from .moco import (
    concat_all_gather,
    dequeue_and_enqueue,
    forward_shuffle_bn,
    init_queue,
    momentum_update,
    split_batchnorm,
)
from .state_dicts import load_entries


class Stage(nn.Module):
    """Base class of the networks, with the facts in which stages differ, each stated once.

    stage: its number in the names of scripts and files. number, title: how messages name it. classifiers: the names of
    the logits that it returns, in order. Prefixes in the state dict: backbone; mark, which no other stage has; linear,
    that of W (C, d). takes: the stages whose checkpoints it can start from. preferred: the classifier that classify
    uses, by default the last one, which in stage III is the soft one. passes: passes through backbones per trained
    image, for estimates of time; a backward pass counts as two. classes: names, or None. trained_on: digests of the
    images that the weights were trained on, those of earlier stages included (ListFileDataset.digests), or None.
    """

    stage = number = title = backbone = mark = linear = ""
    classifiers: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    passes = 4
    transform = preferred = None  # set by models.load, as classes is
    classes = trained_on = None

    def classify(self, images) -> torch.Tensor:
        """The logits (N, C) of the classifier `preferred`, in eval mode; images: (N, 3, H, W)."""
        logits = self(images)
        preferred = self.preferred or self.classifiers[-1]
        return logits[self.classifiers.index(preferred)] if isinstance(logits, tuple) else logits

    @staticmethod
    def sizes(state_dict: dict) -> dict:
        """Returns the constructor arguments, besides arch and num_classes, that the shapes in a state dict tell."""
        return {}


class SSFL(Stage):
    """Stage I, self-supervised guided feature learning (paper, section 3.1).

    A linear classifier and momentum contrast on one backbone: L = CE(W h + b, y) + L_con, see contrastive_loss.
    In train mode `logits, contrastive_loss = model(im_q, im_k, labels)` for the two views (N, 3, H, W) and labels (N,);
    in eval mode `logits = model(im)`, (N, num_classes).

    contrast=False is the paper's baseline, cross entropy alone: no key encoder runs, no projection trains, and the
    contrastive loss is 0. bn_splits: number of pieces of a batch that BatchNorm normalizes separately, as that many
    processes would. image_size: as in build_backbone.
    """

    stage = "i"
    number = "I"
    title = "self-supervised guided feature learning"
    classifiers = ("linear",)
    backbone = "encoder_q."
    mark = "encoder_k."
    linear = "classifier."

    def __init__(
        self, arch, num_classes, dim=128, queue_size=115712, momentum=0.999, temperature=0.2, contrast=True,
        bn_splits=1, image_size=224,
    ):  # fmt: skip
        super().__init__()
        self.momentum = momentum
        self.temperature = temperature
        self.contrast = contrast
        self.bn_splits = bn_splits
        self.encoder_q = build_backbone(arch, image_size)  # f_q
        self.encoder_k = build_backbone(arch, image_size)  # f_k
        num_features = self.encoder_q.num_features
        self.q_fc = projection_head(num_features, dim)  # g_q
        self.k_fc = projection_head(num_features, dim)  # g_k
        self.classifier = nn.Linear(num_features, num_classes)  # W, b
        self.encoder_k.load_state_dict(self.encoder_q.state_dict())
        self.k_fc.load_state_dict(self.q_fc.state_dict())
        for module in (self.encoder_k, self.k_fc):
            module.requires_grad_(False)
        self.q_fc.requires_grad_(contrast)
        for name, value in init_queue(dim, queue_size).items():
            self.register_buffer(name, value)
        self.pending = []  # (keys, labels) of this rank that are not in the queue yet
        split_batchnorm(self, bn_splits)

    @staticmethod
    def sizes(state_dict):
        queue = state_dict.get("queue")
        if queue is None or queue.dim() != 2:
            return {}
        return {"dim": queue.shape[0], "queue_size": queue.shape[1]}

    def load_backbone(self, state_dict):
        """Loads the weights of both backbones, to start from; state_dict: of a backbone, without a prefix.

        Raises ValueError, naming the entry, if one is missing or has a wrong shape.
        """
        load_entries(self.encoder_q, state_dict, "")
        load_entries(self.encoder_k, state_dict, "")

    def forward(self, im_q, im_k=None, labels=None, update=True, enqueue=True):
        """Forward pass of a micro-batch; a step passes update=True with its first, and enqueue=True with its last.

        update: whether the momentum encoder moves, before the keys are computed. enqueue: whether the keys of this call
        enter the queue, after those of earlier calls with enqueue=False.
        """
        contrast = self.training and self.contrast
        if contrast:  # before the query's forward pass, whose activations stay in memory
            if update:
                self._update_key_encoder()
            k = forward_shuffle_bn(self._keys, im_k, self.bn_splits)
        features = self.encoder_q(im_q)  # h = f_q(x_q)
        logits = full_precision(self.classifier(features))  # W h + b
        if not self.training:
            return logits
        if not contrast:
            return logits, logits.new_zeros(())
        q = F.normalize(full_precision(self.q_fc(features)), dim=1)  # q = g_q(h) / |g_q(h)|
        # The queue is overwritten below, before backward: a loss that needs autograd must take self.queue.clone().
        loss = contrastive_loss(q, k, labels, self.queue, self.label_queue, self.temperature)
        self.pending.append((k, labels))
        if enqueue:
            self._enqueue_pending()
        return logits, loss

    def _update_key_encoder(self):
        """theta_k <- m theta_k + (1 - m) theta_q, for f and g."""
        momentum_update(self.encoder_q, self.encoder_k, self.momentum)
        momentum_update(self.q_fc, self.k_fc, self.momentum)

    @torch.no_grad()
    def _keys(self, images):
        """k = g_k(f_k(x_k)) / |g_k(f_k(x_k))|, (N, dim)."""
        return F.normalize(full_precision(self.k_fc(self.encoder_k(images))), dim=1)

    def _enqueue_pending(self):
        """Moves the pending keys and labels of all ranks into the queue: rank by rank, each rank's in call order."""
        keys, labels = zip(*self.pending, strict=True)
        keys = concat_all_gather(torch.cat(keys))
        labels = concat_all_gather(torch.cat(labels))
        self.pending = []
        dequeue_and_enqueue(self.queue, self.label_queue, self.queue_ptr, keys, labels)


class SLG(Stage):
    """Stage II, soft label generation (paper, section 3.2): stage I's frozen network under learnable weight scaling.

    `logits = model(im)`, (W h + b) * s, of shape (N, num_classes), in both modes; L = CE(logits, y) under class-aware
    sampling. Only the scales s train. While training, the frozen encoder stays in train mode, as for the published
    numbers: its BatchNorm uses batch statistics, and its running statistics move. freeze_bn keeps it in eval mode.
    bn_splits, image_size: as in SSFL.
    """

    stage = "ii"
    number = "II"
    title = "soft label generation"
    classifiers = ("lws",)
    backbone = "encoder."
    mark = "encoder."
    linear = "classifier.fc."
    takes = ("i", "iii")
    passes = 1

    def __init__(self, arch, num_classes, freeze_bn=False, bn_splits=1, image_size=224):
        super().__init__()
        self.freeze_bn = freeze_bn
        self.encoder = build_backbone(arch, image_size).requires_grad_(False)
        self.classifier = LWS(self.encoder.num_features, num_classes)
        split_batchnorm(self, bn_splits)
        self.train()  # applies freeze_bn

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_bn:
            self.encoder.eval()
        return self

    def load_pretrained(self, state_dict, classifier="hard"):
        """Loads backbone and linear classifier from stage I, or from the student of stage III; the scales become 1.

        state_dict: with or without `module.`; classifier: "hard" or "soft" (stage III only). Raises ValueError, naming
        the entry, if one is missing or has a wrong shape.
        """
        prefix = {"hard": SDL.linear, "soft": "classifier_kd."}[classifier]  # stage I's has the hard one's name
        load_entries(self.encoder, state_dict, SDL.backbone)
        load_entries(self.classifier.fc, state_dict, prefix)
        nn.init.ones_(self.classifier.scales)

    load_previous = load_pretrained  # the same name in every stage that starts from another

    def forward(self, im):
        with torch.no_grad():
            features = self.encoder(im)  # h = f(x)
        return full_precision(self.classifier(features))  # (W h + b) * s


class SDL(Stage):
    """Stage III, joint training with self-distillation (paper, section 3.3).

    A student with a hard and a soft classifier; the frozen teacher is stage II's network.
    L = CE(hard, y) + L_kd, see distillation_loss. In train mode `hard, soft, kd_loss = model(im)`, in eval mode
    `hard, soft = model(im)`, logits (N, num_classes). freeze_bn: as in SLG, here for the teacher;
    bn_splits, image_size: as in SSFL.

    distill=False trains the hard classifier alone: no teacher runs, the soft classifier stays as it is, kd_loss is 0.
    """

    stage = "iii"
    number = "III"
    title = "joint training with self-distillation"
    classifiers = ("hard", "soft")
    backbone = "encoder_q."
    mark = "encoder_t."
    linear = "classifier."
    takes = ("ii",)

    def __init__(self, arch, num_classes, temperature=2.0, freeze_bn=False, distill=True, bn_splits=1, image_size=224):
        super().__init__()
        self.temperature = temperature
        self.freeze_bn = freeze_bn
        self.distill = distill
        if not distill:
            self.classifiers = ("hard",)
        self.encoder_q = build_backbone(arch, image_size)
        self.encoder_t = build_backbone(arch, image_size)
        num_features = self.encoder_q.num_features
        self.classifier = nn.Linear(num_features, num_classes)
        self.classifier_kd = nn.Linear(num_features, num_classes).requires_grad_(distill)
        self.classifier_t = LWS(num_features, num_classes)
        for teacher in (self.encoder_t, self.classifier_t):
            teacher.requires_grad_(False)
        split_batchnorm(self, bn_splits)
        self.train()  # applies freeze_bn

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_bn:
            self.encoder_t.eval()
        return self

    def load_backbone(self, state_dict):
        """Loads the weights that the student's backbone starts from; state_dict: of a backbone, without a prefix.

        Raises ValueError, naming the entry, if one is missing or has a wrong shape.
        """
        load_entries(self.encoder_q, state_dict, "")

    def load_teacher(self, state_dict):
        """Loads the teacher's backbone and classifier from stage II; state_dict: with or without `module.`.

        Raises ValueError, naming the entry, if one is missing or has a wrong shape.
        """
        load_entries(self.encoder_t, state_dict, SLG.backbone)
        load_entries(self.classifier_t, state_dict, "classifier.")

    load_previous = load_teacher

    def forward(self, im):
        distill = self.training and self.distill
        if distill:  # before the student's forward pass, whose activations stay in memory
            with torch.no_grad():
                teacher = full_precision(self.classifier_t(self.encoder_t(im)))  # (W_t f_t(x) + b_t) * s_t
        features = self.encoder_q(im)  # h = f(x)
        hard = full_precision(self.classifier(features))
        soft = full_precision(self.classifier_kd(features))
        if not self.training:
            return hard, soft
        if not distill:
            return hard, soft, hard.new_zeros(())
        return hard, soft, distillation_loss(soft, teacher, self.temperature)


STAGES = {network.stage: network for network in (SSFL, SLG, SDL)}


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """x in float32 if it is in half precision, else x itself."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
