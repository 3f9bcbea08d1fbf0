"""The views of DESIGN section 1: PIL image in, uint8 tensor (3, S, S) out; the device normalises.

Colours are changed here, on PIL images, or only drawn here and changed on the training device (device_augment).
"""

import functools

import numpy as np
import torch
from PIL import ImageFilter
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

from . import device_augment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SMALL = 64  # images up to this size are cropped with padding instead of being resized and cropped


class GaussianBlur:
    """SimCLR's blur (Chen et al., 2020): a Gaussian whose radius in pixels is drawn from `radius`."""

    def __init__(self, radius=(0.1, 2.0)):
        self.radius = radius

    def draw(self) -> float:
        return torch.empty(1).uniform_(*self.radius).item()

    def __call__(self, image):
        return image.filter(ImageFilter.GaussianBlur(self.draw()))


class Colours:
    """Colour jitter, grayscale and blur of a view, each with its probability.

    Called with a PIL image it applies them; draw says what it would apply, and uses up the same random numbers.
    """

    def __init__(self, jitter: T.ColorJitter, jitter_p=1.0, grayscale_p=0.0, blur_p=0.0):
        self.jitter, self.jitter_p, self.grayscale_p, self.blur_p = jitter, jitter_p, grayscale_p, blur_p
        self.blur = GaussianBlur()
        operations = [jitter if jitter_p == 1 else T.RandomApply([jitter], jitter_p)]
        operations += [T.RandomGrayscale(grayscale_p)] if grayscale_p else []
        operations += [T.RandomApply([self.blur], blur_p)] if blur_p else []
        self.apply = T.Compose(operations)

    def __call__(self, image):
        return self.apply(image)

    def draw(self) -> torch.Tensor:
        """A row of device_augment's parameters."""
        order, factors, grayscale, radius = range(4), device_augment.NEUTRAL, False, 0.0
        if self.jitter_p == 1 or torch.rand(1).item() <= self.jitter_p:
            ranges = self.jitter.brightness, self.jitter.contrast, self.jitter.saturation, self.jitter.hue
            order, *drawn = self.jitter.get_params(*ranges)
            factors = [neutral if f is None else f for f, neutral in zip(drawn, device_augment.NEUTRAL, strict=True)]
        if self.grayscale_p:
            grayscale = torch.rand(1).item() < self.grayscale_p
        if self.blur_p and torch.rand(1).item() <= self.blur_p:
            radius = self.blur.draw()
        return torch.tensor([*factors, *order, grayscale, radius], dtype=torch.float32)


class ResizeTo:
    """Brings an image to size x size; one that has the size is left as it is."""

    def __init__(self, size):
        self.size = size

    def __call__(self, image):
        size = [self.size, self.size]
        return image if TF.get_image_size(image) == size else v2.functional.resize(image, size)


class RandomView:
    """Crop, colours, flip. Called with a PIL image it returns one."""

    def __init__(self, crop, colours: Colours):
        self.crop, self.colours, self.flip = T.Compose(crop), colours, T.RandomHorizontalFlip()

    def __call__(self, image):
        return self.flip(self.colours(self.crop(image)))

    def deferred(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The view of a uint8 tensor (3, H, W) with its colours as they were, and the parameters that change them."""
        image = self.crop(image)
        parameters = self.colours.draw()
        return self.flip(image), parameters


def query_view(size: int) -> RandomView:
    """Query view, which is also the view of stages II and III: crop, colour jitter, flip."""
    small = [ResizeTo(size), T.RandomCrop(size, padding=size // 8)]
    crop = small if size <= SMALL else [v2.RandomResizedCrop(size)]
    return RandomView(crop, Colours(T.ColorJitter(0.4, 0.4, 0.4, 0)))


def key_view(size: int) -> RandomView:
    """Key view: crop, colour jitter, grayscale, blur (not at small sizes), flip."""
    crop = ([ResizeTo(size)] if size <= SMALL else []) + [v2.RandomResizedCrop(size, scale=(0.2, 1.0))]
    jitter = T.ColorJitter(0.4, 0.4, 0.4, 0.1)
    return RandomView(crop, Colours(jitter, jitter_p=0.8, grayscale_p=0.2, blur_p=0.5 if size > SMALL else 0))


def eval_view(size: int) -> T.Compose:
    """Evaluation: resize the shorter side to 256/224 of the size, central crop; small images as a whole."""
    if size <= SMALL:
        return T.Compose([ResizeTo(size)])
    return T.Compose([T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])


VIEWS = {"query": query_view, "key": key_view, "eval": eval_view}


class Views:
    """Several random views of an image, each a function of (seed, epoch, index, draw, number of the view) alone.

    names: of VIEWS. Called with (image, (epoch, index, draw)); returns a tuple of uint8 tensors (3, S, S), or with
    augment="device" of pairs, such a tensor and the parameters of its colours, which normalize then applies; for one
    seed both take the same random decisions. torch's global generator, which torchvision's transforms draw from, is
    left as it was found.
    """

    def __init__(self, names, size: int, seed: int = 0, augment: str = "pil"):
        self.views, self.seed, self.augment = [VIEWS[name](size) for name in names], seed, augment

    def __call__(self, image, place):
        if self.augment == "device":  # resizing such a tensor takes half the time of resizing a PIL image
            image = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        generator = torch.default_generator
        state = generator.get_state()
        try:
            return tuple(self._view(number, view, image, place) for number, view in enumerate(self.views))
        finally:
            generator.set_state(state)

    def _view(self, number, view, image, place):
        entropy = np.random.SeedSequence((self.seed, *place, number)).generate_state(1, np.uint64)
        torch.default_generator.manual_seed(int(entropy[0]))
        return view.deferred(image) if self.augment == "device" else TF.pil_to_tensor(view(image))


@functools.cache
def _statistics(dtype, device):
    """Mean and standard deviation on the device, (3, 1, 1) each; copied there once, for a copy waits for a GPU."""
    return tuple(torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1) for values in (MEAN, STD))


def normalize(images: torch.Tensor, parameters: torch.Tensor | None = None, dtype=torch.float32) -> torch.Tensor:
    """uint8 (N, 3, H, W) to ImageNet-normalised floats, on whichever device the images are.

    parameters: of their colours (device_augment), on the CPU, if those are still to be changed.
    """
    mean, std = _statistics(dtype, images.device)
    images = images.to(dtype).div_(255)
    if parameters is not None:
        images = device_augment.recolour(images, parameters)
    return images.sub_(mean).div_(std)
