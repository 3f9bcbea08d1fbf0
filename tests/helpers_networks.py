"""Networks in the size of the tests: this project's, and a replacement of the published scripts'."""

import re

import torch
from torch import nn

import models
from tests.helpers import CLASSES, QUEUE

KEYS, DIM = (int(re.search(f"--moco-{name} (\\d+)", QUEUE)[1]) for name in ("k", "dim"))
BUILD = {  # arch -> a network with five classes
    "i": lambda arch: models.SSFL(arch, 5, dim=8, queue_size=32),
    "ii": lambda arch: models.SLG(arch, 5),
    "iii": lambda arch: models.SDL(arch, 5),
}


def with_module(state_dict: dict) -> dict:
    """The state dict with the names that DistributedDataParallel gives, as in checkpoints."""
    return {f"module.{name}": value for name, value in state_dict.items()}


def mlp(num_features):
    return nn.Sequential(nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, DIM))


class Scaled(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.fc = nn.Linear(num_features, CLASSES).requires_grad_(False)
        self.scales = nn.Parameter(torch.ones(CLASSES))


class Published(nn.Module):
    """The networks of the published scripts, in the size of the tests."""

    def __init__(self, stage):
        super().__init__()
        backbone = models.build_backbone("resnet8")
        num_features = backbone.num_features
        if stage == "ii":
            self.encoder = backbone.requires_grad_(False)
            self.classifier = Scaled(num_features)
            return
        self.encoder_q = backbone
        other = models.build_backbone("resnet8").requires_grad_(False)
        if stage == "i":
            self.encoder_k = other
            self.q_fc, self.k_fc = mlp(num_features), mlp(num_features).requires_grad_(False)
            self.classifier = nn.Linear(num_features, CLASSES)
            self.register_buffer("queue", nn.functional.normalize(torch.randn(DIM, KEYS), dim=0))
            self.register_buffer("label_queue", torch.zeros(KEYS))
            self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))
        else:
            self.encoder_t = other
            self.classifier = nn.Linear(num_features, CLASSES)
            self.classifier_kd = nn.Linear(num_features, CLASSES)
            self.classifier_t = Scaled(num_features).requires_grad_(False)


class PublishedRun:
    """Network (wrapped as by DistributedDataParallel), optimizer and checkpoint of a published script."""

    def __init__(self, stage):
        self.stage = stage
        self.model = nn.Module()
        self.model.module = Published(stage)
        parameters = [p for p in self.model.parameters() if p.requires_grad or stage == "i"]
        self.optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=5e-4)

    def step(self):
        """A step with some loss that gives every trained parameter a gradient."""
        self.optimizer.zero_grad()
        sum(p.square().sum() for p in self.model.parameters() if p.requires_grad).backward()
        self.optimizer.step()

    def checkpoint(self, best_acc1=0.25) -> dict:
        return {
            "epoch": 1,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best_acc1": best_acc1,
        }

    def resume(self, path):
        """As the published scripts do, with the defaults of torch.load."""
        content = torch.load(path, map_location="cpu")
        self.model.load_state_dict(content["state_dict"], strict=True)
        self.optimizer.load_state_dict(content["optimizer"])
        return content["epoch"], content["best_acc1"].to("cpu")
