"""Backbones: a network from images (N, 3, H, W) to features (N, num_features)."""

import functools

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

TORCHVISION = tuple(torchvision.models.list_models(include=["resnet*", "resnext*", "wide_resnet*"]))
CIFAR = {"resnet8": 1, "resnet20": 3, "resnet32": 5, "resnet44": 7, "resnet56": 9}  # blocks per layer
ARCHS = tuple(sorted(TORCHVISION + tuple(CIFAR)))


class PaddedShortcut(nn.Module):
    """Parameter-free shortcut of CIFAR's residual networks (He et al., 2016, option A).

    Halves height and width by taking every second pixel, and pads the channels with zeros.
    """

    def __init__(self, padding: int):
        super().__init__()
        self.padding = padding

    def forward(self, x):
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.padding, self.padding))


class CifarResNet(nn.Module):
    """The residual networks of He et al. (2016), section 4.2, for small images: 6 * blocks + 2 layers, 64 features."""

    num_features = 64

    def __init__(self, blocks: int):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._make_layer(16, 16, blocks)
        self.layer2 = self._make_layer(16, 32, blocks)
        self.layer3 = self._make_layer(32, 64, blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    @staticmethod
    def _make_layer(in_dim, out_dim, blocks):
        if in_dim == out_dim:
            first = BasicBlock(in_dim, out_dim)
        else:
            first = BasicBlock(in_dim, out_dim, stride=2, downsample=PaddedShortcut((out_dim - in_dim) // 2))
        return nn.Sequential(first, *(BasicBlock(out_dim, out_dim) for _ in range(blocks - 1)))

    def forward(self, x):
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return x.mean(dim=(2, 3))


def build_backbone(arch: str, image_size: int = 224) -> nn.Module:
    """Builds a randomly initialized backbone without a classifier.

    arch: a name in ARCHS: those of torchvision's ResNet, ResNeXt and Wide ResNet models, which keep torchvision's
    parameter names, and resnet8, 20, 32, 44 and 56 for small images. image_size: side of the images; it matters only to
    a backbone whose parameters depend on it, which none of these do. The result maps (N, 3, H, W) to
    (N, backbone.num_features). Raises ValueError for any other name.
    """
    if arch in CIFAR:
        return CifarResNet(CIFAR[arch])
    if arch not in TORCHVISION:
        raise ValueError(f"unknown arch {arch!r}; choose one of {', '.join(ARCHS)}")
    backbone = torchvision.models.get_model(arch, weights=None)
    backbone.num_features = backbone.fc.in_features
    backbone.fc = nn.Identity()
    return backbone


@functools.cache
def backbone_shapes(arch: str, image_size: int) -> dict[str, tuple[int, ...]] | None:
    """Returns {name: shape} of a backbone's parameters and buffers, or None if it cannot take images of this size."""
    with torch.device("meta"):  # nothing is allocated
        try:
            backbone = build_backbone(arch, image_size)
        except (AssertionError, ValueError):
            return None
    return {name: tuple(value.shape) for name, value in backbone.state_dict().items()}


def infer_arch(state_dict: dict, image_size: int = 224) -> str | None:
    """The arch whose parameters and buffers have exactly the names and shapes of a backbone's state dict, or None."""
    shapes = {name: tuple(value.shape) for name, value in state_dict.items()}
    return next((arch for arch in ARCHS if backbone_shapes(arch, image_size) == shapes), None)


@functools.cache
def check_backbone(arch: str, image_size: int):
    """Raises ValueError, in one line, if a backbone does not take images of this size; nothing is allocated."""
    with torch.device("meta"):
        try:
            build_backbone(arch, image_size).eval()(torch.empty(2, 3, image_size, image_size))
        except Exception as error:  # a backbone may raise anything
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ValueError(f"{arch} does not take images of {image_size} x {image_size} pixels ({reason})") from None
