"""Color operations of the views, for a batch at a time on the training device (`--augment device`).

The workers draw what is to be done to each image (transforms.ColorAugment.draw); here it is done to all of them at
once: each image's factors in their order, then grayscale, then blur. Given equal parameters, the result is that of
torchvision's functional operations on float images. The parameters of one image are a row of NUM_PARAMETERS float32:
FACTORS (brightness, contrast, saturation, hue), ORDER (which of the four comes first, second, ...), GRAYSCALE (0 or
1), BLUR (radius in pixels, 0 for none).
"""

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
NEUTRAL = (1.0, 1.0, 1.0, 0.0)  # the factors that change nothing
FACTORS = slice(0, 4)
ORDER = slice(4, 8)
GRAYSCALE = 8
BLUR = 9
NUM_PARAMETERS = 10
BLUR_HALF_WIDTH = 8  # of the kernel, in pixels: four times the largest radius in use


def to_float(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """uint8 images (N, 3, H, W) as floats in [0, 1], with the colors changed by the parameters (N, NUM_PARAMETERS)."""
    return apply_color(images.float().div_(255), parameters)


def apply_color(images: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """Applies the parameters (N, NUM_PARAMETERS) in place to images (N, 3, H, W), floats in [0, 1]; returns the images.

    The parameters are on the CPU, pinned or not: the images that an operation changes are chosen there, so that nothing
    waits for a GPU.
    """
    device = images.device
    hue_changes = parameters[:, HUE] != 0
    on_device = parameters.to(device, images.dtype, non_blocking=True)
    for turn in range(4):
        operations = parameters[:, ORDER][:, turn]
        _blend(images, on_device[:, ORDER][:, turn], on_device)
        shifted = hue_changes & (operations == HUE)
        _change(images, shifted, lambda subset, index: _shift_hue(subset, on_device[index, HUE]))
    _change(images, parameters[:, GRAYSCALE] != 0, lambda subset, index: TF.rgb_to_grayscale(subset, 3))
    _change(images, parameters[:, BLUR] > 0, lambda subset, index: _blur(subset, on_device[index, BLUR]))
    return images


def _change(images, chosen, operation):
    """Replaces the chosen images with operation(images, their indices). chosen: bool (N,), on the CPU."""
    index = chosen.nonzero()[:, 0]
    if len(index) == 0:
        return
    if images.is_cuda:
        index = index.pin_memory().to(images.device, non_blocking=True)
    images.index_copy_(0, index, operation(images[index], index).contiguous())


def _blend(images, operations, parameters):
    """Brightness, contrast or saturation, in place: f x + (1 - f) r, with r black, the mean gray or the gray image.

    operations (N,): the operation of each image; HUE leaves it as it is.
    """

    def column(values):
        return values.to(images.dtype).view(-1, 1, 1, 1)

    factors = torch.ones_like(operations)
    for operation in (BRIGHTNESS, CONTRAST, SATURATION):
        factors = torch.where(operations == operation, parameters[:, operation], factors)
    gray = TF.rgb_to_grayscale(images)
    mean = gray.mean(dim=(1, 2, 3), keepdim=True)
    reference = gray.mul_(column(operations == SATURATION)).add_(mean * column(operations == CONTRAST))
    factors = column(factors)
    images.mul_(factors).add_(reference.mul_(1 - factors)).clamp_(0, 1)


def _shift_hue(images, shift):
    """Images (N, 3, H, W) with their hue moved by shift (N,), in turns of the color circle; value and chroma stay.

    With h in sixths of the circle, a channel of an HSV color is v - c clip(min(k, 4 - k), 0, 1) with
    k = (n + h) mod 6, and n = 5, 3, 1 for red, green, blue.
    """
    red, green, blue = images.unbind(dim=1)
    value = images.amax(dim=1)
    chroma = value - images.amin(dim=1)
    divisor = torch.where(chroma == 0, 1.0, chroma)
    hue = torch.where(
        value == red,
        (green - blue) / divisor,
        torch.where(value == green, 2 + (blue - red) / divisor, 4 + (red - green) / divisor),
    )
    hue = hue + 6 * shift.view(-1, 1, 1)
    channels = []
    for offset in (5, 3, 1):
        k = (hue + offset).remainder_(6)
        channels.append(value - chroma * torch.minimum(k, 4 - k).clamp_(0, 1))
    return torch.stack(channels, dim=1)


def _blur(images, radius):
    """Images (N, 3, H, W) under Gaussians of standard deviation radius (N,), in pixels; reflected at the borders."""
    count, channels, height, width = images.shape
    offsets = torch.arange(-BLUR_HALF_WIDTH, BLUR_HALF_WIDTH + 1, device=images.device, dtype=images.dtype)
    kernels = torch.softmax(-0.5 * (offsets / radius[:, None]) ** 2, dim=1).repeat_interleave(channels, dim=0)
    planes = images.reshape(1, count * channels, height, width)  # one plane per channel, each with its kernel
    planes = F.pad(planes, (BLUR_HALF_WIDTH,) * 4, mode="reflect")
    planes = F.conv2d(planes, kernels[:, None, None, :], groups=count * channels)
    planes = F.conv2d(planes, kernels[:, None, :, None], groups=count * channels)
    return planes.view_as(images)
