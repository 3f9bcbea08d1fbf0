"""The training views: PIL image in, uint8 tensor (3, S, S) out; the device normalizes (models/preprocess.py).

Colors are changed here, on PIL images, or their changes are drawn here and made on the training device
(device_augment).
"""

import numpy as np
import torch
from PIL import ImageFilter
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from models.preprocess import SMALL, eval_view, resize_to

from .device_augment import NEUTRAL


class GaussianBlur:
    """SimCLR's blur (Chen et al., 2020): a Gaussian of a radius from 0.1 to 2 pixels."""

    def draw(self) -> float:
        return torch.empty(1).uniform_(0.1, 2.0).item()

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(self.draw()))


class ColorAugment:
    """Color jitter (None for none), grayscale and blur of a view, each with its probability.

    Called with a PIL image, it applies them; draw returns what it would apply, from the same random numbers.
    """

    def __init__(self, jitter: T.ColorJitter | None, jitter_p=1.0, grayscale_p=0.0, blur_p=0.0):
        self.jitter = jitter
        self.jitter_p = jitter_p
        self.grayscale_p = grayscale_p
        self.blur_p = blur_p
        self.blur = GaussianBlur()
        operations = []
        if jitter is not None:
            operations += [jitter if jitter_p == 1 else T.RandomApply([jitter], jitter_p)]
        if grayscale_p:
            operations += [T.RandomGrayscale(grayscale_p)]
        if blur_p:
            operations += [T.RandomApply([self.blur], blur_p)]
        self.apply = T.Compose(operations)

    def __call__(self, image):
        return self.apply(image)

    def draw(self) -> torch.Tensor:
        """One row of device_augment's parameters."""
        order = range(4)
        factors = NEUTRAL
        grayscale = False
        radius = 0.0
        if self.jitter is not None and (self.jitter_p == 1 or torch.rand(1).item() <= self.jitter_p):
            ranges = self.jitter.brightness, self.jitter.contrast, self.jitter.saturation, self.jitter.hue
            order, *drawn = self.jitter.get_params(*ranges)
            factors = [neutral if f is None else f for f, neutral in zip(drawn, NEUTRAL, strict=True)]
        if self.grayscale_p:
            grayscale = torch.rand(1).item() < self.grayscale_p
        if self.blur_p and torch.rand(1).item() <= self.blur_p:
            radius = self.blur.draw()
        return torch.tensor([*factors, *order, grayscale, radius], dtype=torch.float32)


class RandomView:
    """Crop, color changes, flip; called with a PIL image, it returns one."""

    def __init__(self, crop, color: ColorAugment):
        self.crop = T.Compose(crop)
        self.color = color
        self.flip = T.RandomHorizontalFlip()

    def __call__(self, image):
        return self.flip(self.color(self.crop(image)))

    def deferred(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The view of a uint8 tensor (3, H, W) before its colors change, and the parameters that apply_color needs."""
        image = self.crop(image)
        parameters = self.color.draw()
        return self.flip(image), parameters


def query_view(size: int, jitter: float = 0.4) -> RandomView:
    """Query view of stage I, and the only view of stages II and III: crop, color jitter (0: none), flip."""
    small = [resize_to(size), T.RandomCrop(size, padding=size // 8)]
    crop = small if size <= SMALL else [v2.RandomResizedCrop(size)]
    return RandomView(crop, ColorAugment(T.ColorJitter(jitter, jitter, jitter, 0) if jitter else None))


def key_view(size: int) -> RandomView:
    """Key view: crop, color jitter, grayscale, blur (not at small sizes), flip."""
    crop = [v2.RandomResizedCrop(size, scale=(0.2, 1.0))]
    if size <= SMALL:
        crop = [resize_to(size), *crop]
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1)
    return RandomView(crop, ColorAugment(jitter, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5 if size > SMALL else 0))


VIEWS = {"query": query_view, "key": key_view, "eval": eval_view}


class Views:
    """Several views of an image; each depends on (seed, epoch, index, draw, number of the view) alone.

    names: keys of VIEWS; jitter: of the query view. Called with (image, sample_key), where sample_key is (epoch, index,
    draw); returns a tuple of uint8 tensors (3, S, S). With augment="device", a tuple of pairs: such a tensor, and its
    color parameters for device_augment.to_float. With the same seed, both take the same random decisions.
    """

    def __init__(self, names, size: int, seed: int = 0, augment: str = "pil", jitter: float = 0.4):
        options = {"query": {"jitter": jitter}}
        self.views = [VIEWS[name](size, **options.get(name, {})) for name in names]
        self.seed = seed
        self.augment = augment

    def __call__(self, image, sample_key):
        if self.augment == "device":  # resizing such a tensor takes half the time of resizing a PIL image
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        views = []
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from the global generator
            for number, view in enumerate(self.views):
                entropy = np.random.SeedSequence((self.seed, *sample_key, number)).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(entropy[0]))
                views.append(view.deferred(image) if self.augment == "device" else TF.pil_to_tensor(view(image)))
        return tuple(views)
