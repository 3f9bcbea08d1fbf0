"""What evaluation does to an image before the network sees it: resize, crop, normalize (paper, section 4.2)."""

import functools

import torch
from torchvision import transforms as T
from torchvision.transforms import functional as TF
from torchvision.transforms import v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
SMALL = 64  # images of at most this size are used as a whole, without a central crop
MAX_ASPECT_RATIO = 20


class ResizeTo:
    """Resizes an image to size x size; one that has the size stays as it is."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image):
        size = [self.size, self.size]
        return image if TF.get_image_size(image) == size else v2.functional.resize(image, size)


class CropEnds:
    """Cuts the ends off an image that is over MAX_ASPECT_RATIO times as long as wide.

    A central crop takes nothing of them; resizing the shorter side of 60,000 x 1 pixels to 256 would take 12 GB.
    """

    def __call__(self, image):
        width, height = TF.get_image_size(image)
        longest = MAX_ASPECT_RATIO * min(width, height)
        return (
            image
            if max(width, height) <= longest
            else TF.center_crop(image, [min(height, longest), min(width, longest)])
        )


def eval_view(size: int) -> T.Compose:
    """The evaluation view at size x size: the shorter side resized to 256/224 of the size, then the central crop.

    Up to SMALL, the whole image resized.
    """
    if size <= SMALL:
        return T.Compose([ResizeTo(size)])
    return T.Compose([CropEnds(), T.Resize(round(size * 256 / 224)), T.CenterCrop(size)])


def normalize(images: torch.Tensor, dtype=torch.float32) -> torch.Tensor:
    """Images (N, 3, H, W), uint8 or floats in [0, 1], with ImageNet's mean and deviation; on the images' device."""
    mean, std = _statistics(dtype, images.device)
    images = images.to(dtype).div_(255).sub_(mean) if images.dtype == torch.uint8 else images.to(dtype).sub(mean)
    return images.div_(std)


@functools.cache
def _statistics(dtype, device):
    """Mean and standard deviation, (3, 1, 1) each; cached, since every copy to a GPU waits for it."""
    return tuple(torch.tensor(values, dtype=dtype, device=device).view(3, 1, 1) for values in (MEAN, STD))
