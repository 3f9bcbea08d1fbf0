"""The views: their sizes, their operations, and that each depends on seed and sample key alone."""

import random
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from datasets.transforms import VIEWS, Views, key_view, query_view
from models.preprocess import eval_view, normalize
from tests.helpers import class_image

SIZES = (224, 96, 64)
SAMPLE_KEY = (3, 17, 1)  # epoch, index, draw


def image(width=70, height=50, label=1) -> Image.Image:
    return class_image(np.random.default_rng(0), label, max(width, height)).crop((0, 0, width, height))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("given", [(70, 50), (64, 64), (20, 400), (1, 600)])
def test_every_view_has_the_asked_size(size, given):
    views = Views(VIEWS, size)(image(*given), SAMPLE_KEY)
    assert [view.shape for view in views] == [(3, size, size)] * 3
    assert {view.dtype for view in views} == {torch.uint8}


@pytest.mark.parametrize(("size", "augment"), [(224, "pil"), (32, "pil"), (96, "device")])
def test_a_view_is_a_function_of_seed_and_sample_key_alone(size, augment):
    picture, names = image(), ("query", "key")

    def tensors(views, key=SAMPLE_KEY):
        """Those of all views; with device augmentation a view has its parameters too."""
        return [tensor for view in views(picture, key) for tensor in (view if augment == "device" else [view])]

    reference = tensors(Views(names, size, 5, augment))
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    views = Views(names, size, 5, augment)
    views(picture, (0, 0, 0))
    assert all(map(torch.equal, tensors(views), reference))
    alone, keys = (tensors(Views(chosen, size, 5, augment)) for chosen in (names[:1], ("key", "key")))
    half = len(reference) // 2  # the query view's tensors
    assert all(map(torch.equal, alone + keys[half:], reference))  # independent of other views
    for seed, key in [(6, SAMPLE_KEY), (5, (4, 17, 1)), (5, (3, 18, 1)), (5, (3, 17, 2))]:
        assert not any(map(torch.equal, tensors(Views(names, size, seed, augment), key), reference))
    twice = tensors(Views(("query", "query"), size, 5, augment))
    assert torch.equal(twice[0], reference[0]) and not torch.equal(twice[0], twice[half])


def test_global_generators_keep_their_state():
    """Also after an error."""

    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    torch.manual_seed(1)
    before, views = state(), Views(("query", "key"), 96)
    views(image(), SAMPLE_KEY)
    assert state() == before
    views.views = [mock.Mock(side_effect=OSError)]
    with pytest.raises(OSError):
        views(image(), SAMPLE_KEY)
    assert state() == before


class BlurByTorch:
    """PIL's blur of radius U(.1, 2), drawn from the generator that torchvision draws from."""

    def __call__(self, picture):
        return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def compositions(size):
    """The views (query, key, evaluation), composed of torchvision's transforms."""
    large = size > 64
    resize = [] if large else [T.Resize((size, size))]
    query = [T.RandomResizedCrop(size)] if large else [*resize, T.RandomCrop(size, padding=size // 8)]
    key = [*resize, T.RandomResizedCrop(size, scale=(0.2, 1.0))]
    evaluated = [T.Resize({224: 256, 96: 110}[size]), T.CenterCrop(size)] if large else resize
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = [T.RandomApply([BlurByTorch()], p=0.5)] if large else []
    return (
        T.Compose([*query, T.ColorJitter(0.4, 0.4, 0.4, 0), T.RandomHorizontalFlip()]),
        T.Compose([*key, jitter, T.RandomGrayscale(p=0.2), *blur, T.RandomHorizontalFlip()]),
        T.Compose(evaluated),
    )


@pytest.mark.parametrize("size", (*SIZES, 32))
def test_views_equal_torchvisions_compositions(size):
    picture = image(130, 90)
    for made, reference in zip((query_view, key_view, eval_view), compositions(size), strict=True):
        for seed in range(8):
            torch.manual_seed(seed)
            ours = made(size)(picture)
            torch.manual_seed(seed)
            assert np.array_equal(np.asarray(ours), np.asarray(reference(picture))), (made.__name__, seed)


def test_a_small_image_of_the_right_size_is_evaluated_unchanged():
    picture = image(32, 32)
    assert np.array_equal(np.asarray(eval_view(32)(picture)), np.asarray(picture))


def test_an_image_far_longer_than_wide_loses_its_ends_before_it_is_resized():
    *before_crop, crop = eval_view(224).transforms
    for shape in ((60000, 1), (1, 60000)):
        resized = T.Compose(before_crop)(Image.new("RGB", shape))
        assert sorted(resized.size) == [256, 20 * 256]
        assert crop(resized).size == (224, 224)
    picture = image(1200, 20)
    expected = T.Compose([T.Resize(256), T.CenterCrop(224)])(picture)
    assert np.array_equal(np.asarray(eval_view(224)(picture)), np.asarray(expected))


def test_normalize_equals_torchvision():
    picture = image(32, 32)
    raw = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    expected = T.Compose([T.ToTensor(), T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))])(picture)
    torch.testing.assert_close(normalize(raw[None])[0], expected, rtol=0, atol=1e-6)
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    floats = levels / 255
    assert torch.equal(normalize(floats), normalize(levels))
    assert levels[0, 0, 0, 255] == 255 and floats[0, 0, 0, 255] == 1  # the input is unchanged
