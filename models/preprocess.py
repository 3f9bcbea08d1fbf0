"""What evaluation does to an image before the network sees it: resize, crop, normalize."""

import functools

import numpy as np
import torch
from PIL import Image
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

# Of ImageNet.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
MIN_STD = 1e-4
# Sides of a view in pixels.
MIN_SIZE = 8
MAX_SIZE = 4096
SMALL = 64  # images of at most this size are resized without a central crop
MAX_ASPECT_RATIO = 20


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a PIL image of any mode (gray, palette, CMYK, 16 or 32 bits, floats) to RGB with 8 bits per channel.

    Images with more than 8 bits are scaled from the range of their values: 0 to 1 (floats), to 255, to 4,095 (TIFFs
    with 12 bits) or to 65,535. Raises ValueError for other values, and for floats in less than an eighth of the range.
    """
    if image.mode.startswith(("I", "F")):  # convert() would clip, not scale
        values = np.asarray(image)
        low = values.min()
        high = values.max()
        floats = image.mode == "F"
        twelve_bits = getattr(image, "tag_v2", {}).get(258) == (12,)  # TIFF's BitsPerSample
        top = 1 if floats and high <= 1 else 255 if high <= 255 else 4095 if twelve_bits else 65535
        if not 0 <= low <= high <= top or (floats and 0 < high < top / 8):
            raise ValueError(f"mode {image.mode}, values from {low:g} to {high:g}, of no known range; convert it")
        levels = values // 257 if top == 65535 else np.rint(values * np.float32(255 / top))
        image = Image.fromarray(levels.astype(np.uint8))
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # convert() would copy an RGB image


def resize_to(size: int):
    """A transform that resizes images to size x size; one that has this size already stays as it is."""
    return functools.partial(v2.functional.resize, size=[size, size])


class CropEnds:
    """Cuts off the ends of an image whose longer side is over MAX_ASPECT_RATIO times the shorter one.

    The central crop does not reach them, and resizing 60,000 x 1 pixels to a shorter side of 256 would take over 14 GB.
    """

    def __call__(self, image):
        width, height = TF.get_image_size(image)
        longest = MAX_ASPECT_RATIO * min(width, height)
        if max(width, height) <= longest:
            return image
        return TF.center_crop(image, [min(height, longest), min(width, longest)])


def eval_view(size: int) -> T.Compose:
    """The evaluation view at size x size: the shorter side resized to 256/224 of the size, then the central crop.

    If size is at most SMALL, the whole image is resized instead.
    """
    if size <= SMALL:
        return T.Compose([resize_to(size)])
    return T.Compose([CropEnds(), T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])


def normalize(images: torch.Tensor, mean=MEAN, std=STD) -> torch.Tensor:
    """Images (..., 3, H, W), uint8 or floats in [0, 1], minus the mean, divided by the standard deviation.

    mean, std: three numbers each, for red, green and blue in [0, 1]. The result is float32, on the images' device.
    """
    mean, std = _statistics(tuple(mean), tuple(std), images.device)
    images = images.float().div_(255).sub_(mean) if images.dtype == torch.uint8 else images.float().sub(mean)
    return images.div_(std)


@functools.lru_cache(maxsize=16)
def _statistics(mean, std, device):
    """Mean and standard deviation, (3, 1, 1) each; cached, since every copy to a GPU makes the host wait for it."""
    return tuple(torch.tensor(values, device=device).view(3, 1, 1) for values in (mean, std))


class EvalTransform:
    """The transform of evaluation: called with a PIL image, it returns normalized floats (3, size, size).

    The image becomes RGB, is resized and cropped as eval_view says, and is normalized with mean and std.
    """

    def __init__(self, size: int = 224, mean=MEAN, std=STD):
        self.size = size
        self.mean = tuple(mean)
        self.std = tuple(std)
        self.view = eval_view(size)

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return normalize(TF.pil_to_tensor(self.view(to_rgb(image))), self.mean, self.std)

    def __repr__(self):
        return f"EvalTransform(size={self.size}, mean={self.mean}, std={self.std})"
