"""The views of DESIGN section 1: PIL image in, uint8 tensor (3, S, S) out; the device normalises."""

import numpy as np
import torch
from PIL import ImageFilter
from torchvision import transforms as T
from torchvision.transforms import functional as TF

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SMALL = 64  # images up to this size are cropped with padding instead of being resized and cropped


class GaussianBlur:
    """SimCLR's blur (Chen et al., 2020): a Gaussian whose radius in pixels is drawn from `radius`."""

    def __init__(self, radius=(0.1, 2.0)):
        self.radius = radius

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(torch.empty(1).uniform_(*self.radius).item()))


class ResizeTo:
    """Brings an image to size x size; one that has the size is left as it is."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        return image if image.size == (self.size, self.size) else TF.resize(image, [self.size, self.size])


def query_geometry(size: int) -> list:
    """Crop of the query view, which is also the view of stages II and III."""
    if size <= SMALL:
        return [ResizeTo(size), T.RandomCrop(size, padding=size // 8)]
    return [T.RandomResizedCrop(size)]


def key_geometry(size: int) -> list:
    """Crop of the key view."""
    return ([ResizeTo(size)] if size <= SMALL else []) + [T.RandomResizedCrop(size, scale=(0.2, 1.0))]


def query_view(size: int) -> T.Compose:
    """Query view: crop, colour jitter, flip."""
    return T.Compose([*query_geometry(size), T.ColorJitter(0.4, 0.4, 0.4, 0), T.RandomHorizontalFlip()])


def key_view(size: int) -> T.Compose:
    """Key view: crop, colour jitter, grayscale, blur (not at small sizes), flip."""
    blur = [T.RandomApply([GaussianBlur()], p=0.5)] if size > SMALL else []
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    return T.Compose([*key_geometry(size), jitter, T.RandomGrayscale(p=0.2), *blur, T.RandomHorizontalFlip()])


def eval_view(size: int) -> T.Compose:
    """Evaluation: resize the shorter side to 256/224 of the size, central crop; small images as a whole."""
    if size <= SMALL:
        return T.Compose([ResizeTo(size)])
    return T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])


VIEWS = {"query": query_view, "key": key_view, "eval": eval_view}


class Views:
    """Several random views of an image, each a function of (seed, epoch, index, draw, number of the view) alone.

    names: of VIEWS. Called with (image, (epoch, index, draw)); returns a tuple of uint8 tensors (3, S, S). torch's global generator,
    which torchvision's transforms draw from, is left as it was found.
    """

    def __init__(self, names, size: int, seed: int = 0):
        self.views, self.seed = [VIEWS[name](size) for name in names], seed

    def __call__(self, image, place):
        generator = torch.default_generator
        state = generator.get_state()
        try:
            return tuple(self._view(number, view, image, place) for number, view in enumerate(self.views))
        finally:
            generator.set_state(state)

    def _view(self, number, view, image, place):
        entropy = np.random.SeedSequence((self.seed, *place, number)).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(entropy[0]))
        return TF.pil_to_tensor(view(image))


def normalize(images: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """uint8 (N, 3, H, W) to ImageNet-normalised floats, on whichever device the images are."""
    mean = torch.tensor(MEAN, dtype=dtype, device=images.device).view(3, 1, 1)
    std = torch.tensor(STD, dtype=dtype, device=images.device).view(3, 1, 1)
    return images.to(dtype).div_(255).sub_(mean).div_(std)
