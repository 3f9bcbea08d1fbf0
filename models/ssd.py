"""The networks of the three stages: SSFL (I), SLG (II), SDL (III). Forward passes and stage hand-over, no files."""

import torch
import torch.nn.functional as F
from torch import nn

from .backbones import build_backbone, identify_backbone
from .heads import LWS, projection_head
from .losses import contrastive_loss, distillation_loss
from .moco import all_gather, enqueue, momentum_update, new_queue, shuffled


def full_precision(x: torch.Tensor) -> torch.Tensor:
    """x in float32 where it came in half precision, as it is otherwise."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def submodule(state_dict: dict, prefix: str) -> dict:
    """The entries below `prefix`, without it."""
    return {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}


def strip_module(state_dict: dict) -> dict:
    """The state dict without the `module.` that DistributedDataParallel puts before every name."""
    return {k.removeprefix("module."): v for k, v in state_dict.items()}


class SSFL(nn.Module):
    """Stage I, self-supervised guided feature learning (paper, section 3.1).

    A backbone with a linear classifier, and momentum contrast beside it over a queue of labelled keys.
    In train mode `logits, contrastive_loss = model(im_q, im_k, labels)` for the two views (N, 3, H, W) and labels (N,);
    in eval mode `logits = model(im)`, (N, num_classes).
    """

    def __init__(self, arch, num_classes, dim=128, queue_size=115712, momentum=0.999, temperature=0.2):
        super().__init__()
        self.momentum, self.temperature, self.contrast = momentum, temperature, True
        self.encoder_q, self.encoder_k = build_backbone(arch), build_backbone(arch)
        width = self.encoder_q.width
        self.q_fc, self.k_fc = projection_head(width, dim), projection_head(width, dim)
        self.classifier = nn.Linear(width, num_classes)
        for online, key in ((self.encoder_q, self.encoder_k), (self.q_fc, self.k_fc)):
            key.load_state_dict(online.state_dict())
            key.requires_grad_(False)
        for name, value in new_queue(dim, queue_size).items():
            self.register_buffer(name, value)

    def disable_contrast(self):
        """Trains by cross entropy alone, the paper's baseline: no key encoder runs, no projection is trained."""
        self.contrast = False
        self.q_fc.requires_grad_(False)

    @torch.no_grad()
    def _keys(self, images):
        """Normalised keys (N, dim) of the momentum encoder, after its update."""
        momentum_update(self.encoder_q, self.encoder_k, self.momentum)
        momentum_update(self.q_fc, self.k_fc, self.momentum)
        return shuffled(lambda x: F.normalize(full_precision(self.k_fc(self.encoder_k(x))), dim=1), images)

    def forward(self, im_q, im_k=None, labels=None):
        contrast = self.training and self.contrast
        k = self._keys(im_k) if contrast else None  # first, while no activations of the query are kept
        features = self.encoder_q(im_q)
        logits = full_precision(self.classifier(features))
        if not self.training:
            return logits
        if not contrast:
            return logits, logits.new_zeros(())
        q = F.normalize(full_precision(self.q_fc(features)), dim=1)
        loss = contrastive_loss(q, k, labels, self.queue, self.label_queue, self.temperature)
        enqueue(self.queue, self.label_queue, self.queue_ptr, all_gather(k), all_gather(labels))
        return logits, loss


class SLG(nn.Module):
    """Stage II, soft label generation (paper, section 3.2): stage I's frozen network with learnable weight scaling.

    logits = model(im), (N, num_classes), in both modes. The frozen encoder stays in train mode while training, so its
    BatchNorm uses batch statistics and their running averages move, as the published numbers have it; freeze_bn
    keeps it in eval mode.
    """

    def __init__(self, arch, num_classes, freeze_bn=False):
        super().__init__()
        self.freeze_bn = freeze_bn
        self.encoder = build_backbone(arch).requires_grad_(False)
        self.classifier = LWS(self.encoder.width, num_classes)

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_bn:
            self.encoder.eval()
        return self

    def load_stage_i(self, state_dict, classifier="hard"):
        """Takes backbone and linear classifier of stage I, or of stage III's student with the classifier named.

        state_dict: with or without `module.`; classifier: "hard" or "soft" (stage III only). The scales start at one.
        Raises ValueError where stage I is asked for a soft classifier, RuntimeError where shapes or names disagree.
        """
        state_dict = strip_module(state_dict)
        name = {"hard": "classifier.", "soft": "classifier_kd."}[classifier]
        if not any(k.startswith(name) for k in state_dict):
            raise ValueError(f"the checkpoint has no {classifier} classifier; only stage III has both")
        self.encoder.load_state_dict(submodule(state_dict, "encoder_q."))
        self.classifier.fc.load_state_dict(submodule(state_dict, name))
        nn.init.ones_(self.classifier.scales)

    def forward(self, im):
        with torch.no_grad():
            features = self.encoder(im)
        return full_precision(self.classifier(features))


class SDL(nn.Module):
    """Stage III, joint training with self-distillation (paper, section 3.3).

    A student with a hard and a soft classifier; the frozen teacher is stage II's network. In train mode
    `hard, soft, kd_loss = model(im)`, in eval mode `hard, soft = model(im)`, logits (N, num_classes). The teacher stays
    in train mode while training (see SLG); freeze_bn keeps it in eval mode.
    """

    def __init__(self, arch, num_classes, temperature=2.0, freeze_bn=False):
        super().__init__()
        self.temperature, self.freeze_bn, self.distill = temperature, freeze_bn, True
        self.encoder_q, self.encoder_t = build_backbone(arch), build_backbone(arch)
        width = self.encoder_q.width
        self.classifier = nn.Linear(width, num_classes)
        self.classifier_kd = nn.Linear(width, num_classes)
        self.classifier_t = LWS(width, num_classes)
        for teacher in (self.encoder_t, self.classifier_t):
            teacher.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.freeze_bn:
            self.encoder_t.eval()
        return self

    def load_teacher(self, state_dict):
        """Takes stage II's backbone and classifier; state_dict with or without `module.`."""
        state_dict = strip_module(state_dict)
        self.encoder_t.load_state_dict(submodule(state_dict, "encoder."))
        self.classifier_t.load_state_dict(submodule(state_dict, "classifier."))

    def disable_distillation(self):
        """Trains the hard classifier alone: no teacher is run, the soft classifier takes no gradient."""
        self.distill = False
        self.classifier_kd.requires_grad_(False)

    def forward(self, im):
        distill = self.training and self.distill
        if distill:  # first, while no activations of the student are kept
            with torch.no_grad():
                teacher = self.classifier_t(self.encoder_t(im))
        features = self.encoder_q(im)
        hard, soft = full_precision(self.classifier(features)), full_precision(self.classifier_kd(features))
        if not self.training:
            return hard, soft
        if not distill:
            return hard, soft, hard.new_zeros(())
        return hard, soft, distillation_loss(soft, full_precision(teacher), self.temperature)


def identify(state_dict: dict) -> dict | None:
    """What a state dict holds, read from names and shapes: stage ("i", "ii", "iii"), arch, num_classes.

    Of stage I, if the queue is there, dim and queue_size too. The arch is None where the backbone is none of ARCHS; all
    is None where the names are of no stage.
    """
    state_dict = strip_module(state_dict)
    signs = {"i": "encoder_k.", "ii": "encoder.", "iii": "encoder_t."}
    stage = next((s for s, prefix in signs.items() if any(k.startswith(prefix) for k in state_dict)), None)
    bias = state_dict.get("classifier.fc.bias" if stage == "ii" else "classifier.bias")
    if stage is None or bias is None or bias.dim() != 1:
        return None
    encoder = submodule(state_dict, "encoder." if stage == "ii" else "encoder_q.")
    found = {"stage": stage, "arch": identify_backbone(encoder), "num_classes": len(bias)}
    queue = state_dict.get("queue")
    if stage == "i" and queue is not None and queue.dim() == 2:
        found["dim"], found["queue_size"] = queue.shape
    return found


def misfits(model: nn.Module, state_dict: dict) -> list[str]:
    """The sorted names that a model and a state dict, without `module.`, do not share, or not with the same shape."""
    here, there = ({name: value.shape for name, value in d.items()} for d in (model.state_dict(), state_dict))
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def from_state_dict(state_dict: dict) -> nn.Module:
    """The network of whichever stage the state dict is of, with its weights, in eval mode.

    Momentum and temperatures, which no state dict holds and only training uses, are the defaults. Raises ValueError,
    in one line, where names or shapes are of no stage or of an unknown backbone.
    """
    found = identify(state_dict)
    if found is None or found["arch"] is None:
        raise ValueError("the names and shapes in it are of no stage of SSD-LT with a known backbone")
    stage = found.pop("stage")
    if stage == "i" and "queue_size" not in found:
        raise ValueError("it is of stage I, but has no queue of (dim, K)")
    model = {"i": SSFL, "ii": SLG, "iii": SDL}[stage](**found)
    state_dict = strip_module(state_dict)
    wrong = misfits(model, state_dict)
    if wrong:
        raise ValueError(f"it does not fit stage {stage.upper()} at {wrong[0]}")
    model.load_state_dict(state_dict)
    return model.eval()
