"""--augment device: the parameters that workers draw, the images that the device computes, and training."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional as TF

from datasets import device_augment
from datasets.device_augment import BLUR, FACTORS, GRAYSCALE, NEUTRAL, ORDER, apply_color, to_float
from datasets.loaders import collate
from datasets.transforms import Views, key_view, query_view
from models.preprocess import SMALL, normalize
from tests.helpers import assert_same_results, log_of, train

DRAWS = 2000


def photograph(height=150, width=200, seed=0) -> Image.Image:
    """Smooth colors with some noise, as in a photograph."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.BICUBIC), dtype=np.int64)
    return Image.fromarray((smooth + generator.integers(-8, 9, smooth.shape)).clip(0, 255).astype(np.uint8))


def row(factors=NEUTRAL, order=range(4), grayscale=0, radius=0.0):
    return torch.tensor([*factors, *order, grayscale, radius], dtype=torch.float32)


def one_by_one(images, parameters):
    """torchvision's functional operations, image by image."""
    changed = []
    for image, values in zip(images, parameters, strict=True):
        brightness, contrast, saturation, hue = values[FACTORS].tolist()
        for operation in values[ORDER].int().tolist():
            if operation == 0:
                image = TF.adjust_brightness(image, brightness)
            elif operation == 1:
                image = TF.adjust_contrast(image, contrast)
            elif operation == 2:
                image = TF.adjust_saturation(image, saturation)
            elif hue:
                image = TF.adjust_hue(image, hue)
        if values[GRAYSCALE]:
            image = TF.rgb_to_grayscale(image, 3)
        if values[BLUR] > 0:
            image = TF.gaussian_blur(image, [2 * device_augment.BLUR_HALF_WIDTH + 1] * 2, [values[BLUR].item()] * 2)
        changed.append(image)
    return torch.stack(changed)


def check(images, parameters):
    torch.testing.assert_close(
        apply_color(images.clone(), parameters), one_by_one(images, parameters), rtol=0, atol=2e-5
    )


@pytest.fixture
def images():
    """24 float images (3, 40, 30), half noise, half photographs; some with gray, black and saturated pixels."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(12, 3, 40, 30, generator=generator)
    noise[:, :, :4] = noise[:, :1, :4]
    noise[:, :, 4:6], noise[:, 0, 6:8], noise[:, 1, 8:10] = 0, 1, noise[:, 2, 8:10]
    photographs = [TF.to_tensor(photograph(40, 30, seed)) for seed in range(12)]
    return torch.cat([noise, torch.stack(photographs)])


def test_every_order_of_operations_equals_torchvision(images):
    """With grayscale and blur of some images."""
    generator = torch.Generator().manual_seed(2)
    low, high = torch.tensor([0.6, 0.6, 0.6, -0.1]), torch.tensor([1.4, 1.4, 1.4, 0.1])
    factors = low + (high - low) * torch.rand(24, 4, generator=generator)
    radii, parameters = [0.1, 0.5, 1.0, 2.0], []
    for i, (f, order) in enumerate(zip(factors, itertools.permutations(range(4)), strict=True)):
        parameters.append(row(f, order, grayscale=i % 2, radius=radii[i % 4] if i % 3 else 0))
    check(images, torch.stack(parameters))


@pytest.mark.parametrize("number, values", [(0, (0.6, 1.4)), (1, (0.6, 1.4)), (2, (0.0, 1.4)), (3, (-0.5, 0.3))])
def test_each_factor_equals_torchvision(images, number, values):
    rows = [row([value if i == number else n for i, n in enumerate(NEUTRAL)]) for value in values] * 12
    check(images, torch.stack(rows))


def test_neutral_parameters_change_nothing(images):
    assert torch.equal(apply_color(images.clone(), torch.stack([row()] * 24)), images)


def test_an_image_does_not_depend_on_its_batch(images):
    views = Views(("key",), 96, 0, "device")
    pairs = [views(photograph(seed=i), (0, i, 0))[0] for i in range(8)]
    seen, parameters = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
    together = normalize(to_float(seen, parameters))
    alone = torch.cat([normalize(to_float(seen[i : i + 1], parameters[i : i + 1])) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", [160, 32])
def test_device_and_pil_augmentation_take_the_same_random_decisions(size):
    """The views are the same up to rounding to whole levels and PIL's approximation of the blur."""
    names = ("query", "key")
    on_pil, on_device = Views(names, size, 7), Views(names, size, 7, "device")
    for i in range(16):
        key, image = (1, i, 0), photograph(seed=i)
        for expected, (seen, parameters) in zip(on_pil(image, key), on_device(image, key), strict=True):
            levels = apply_color(seen[None] / 255, parameters[None])[0] * 255
            assert (levels - expected).abs().mean() < 4


def test_parameters_have_the_distributions_of_the_views():
    torch.manual_seed(0)
    for view, probabilities, hue in ((query_view(224), (1, 0, 0), 0), (key_view(224), (0.8, 0.2, 0.5), 0.1)):
        drawn = torch.stack([view.color.draw() for _ in range(DRAWS)])
        factors, order = drawn[:, FACTORS], drawn[:, ORDER]
        jittered = (factors != torch.tensor(NEUTRAL)).any(dim=1)
        shares = jittered, drawn[:, GRAYSCALE] == 1, drawn[:, BLUR] > 0
        for share, probability in zip(shares, probabilities, strict=True):
            assert abs(share.float().mean() - probability) < 0.05
        for column, (center, reach) in enumerate([(1, 0.4), (1, 0.4), (1, 0.4), (0, hue)]):
            values = factors[jittered, column] - center
            assert values.abs().max() <= reach + 1e-6
            assert abs(values.mean()) <= 0.05 * reach
            assert values.std() == pytest.approx(reach / 3**0.5, rel=0.05)
        assert (order.sort(dim=1).values == torch.arange(4)).all()
        counts = torch.unique(order[jittered], dim=0, return_counts=True)[1] / jittered.sum()
        assert len(counts) == 24 and (counts - 1 / 24).abs().max() < 0.02
        radii = drawn[drawn[:, BLUR] > 0, BLUR]
        if len(radii):
            assert radii.min() >= 0.1 and radii.max() <= 2 and abs(radii.mean() - 1.05) < 0.05
    assert all(key_view(SMALL).color.draw()[BLUR] == 0 for _ in range(50))


def test_collate_stacks_images_and_parameters():
    views = Views(("query", "key"), 96, 0, "device")
    (query, key), labels, indices = collate([(views(photograph(), (0, i, 0)), i, i) for i in range(3)])
    for seen, parameters in (query, key):
        assert seen.shape == (3, 3, 96, 96) and parameters.shape == (3, device_augment.NUM_PARAMETERS)
        assert seen.dtype == torch.uint8 and parameters.dtype == torch.float32
    assert labels.tolist() == indices == [0, 1, 2]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_equals_cpu_without_synchronizing():
    views = Views(("query", "key"), 160, 0, "device")
    batch = [views(photograph(seed=i), (0, i, 0)) for i in range(16)]
    for pairs in zip(*batch, strict=True):
        seen, parameters = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
        on_cuda = seen.cuda()
        normalize(to_float(on_cuda, parameters.pin_memory()))
        torch.cuda.set_sync_debug_mode("error")
        try:
            result = normalize(to_float(on_cuda, parameters.pin_memory()))
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.testing.assert_close(result.cpu(), normalize(to_float(seen, parameters)), rtol=0, atol=1e-4)


def test_runs_resumed_with_any_number_of_workers_give_the_same_result(trained, plain_tree, tmp_path):
    whole = train("i", plain_tree, tmp_path / "whole", "--augment", "device")
    train("i", plain_tree, tmp_path / "parts", "--augment", "device", "--epochs", 1, "-j", 2)
    train("i", plain_tree, tmp_path / "parts", "--epochs", 2, "--resume", "auto")
    assert_same_results(tmp_path / "parts", whole)
    assert log_of(whole)[0]["loss"] != log_of(trained["i"])[0]["loss"]  # of the same run, but for the augmentation
