"""The views: their sizes, what they are made of, and that each follows from its place alone."""

import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from datasets.dataset import ListFileDataset
from datasets.list_file import ListIndex
from datasets.loaders import batches, build_loader
from datasets.samplers import BatchSampler, ShuffledSampler
from datasets.transforms import VIEWS, Views, key_view, query_view
from models.preprocess import MEAN, STD, eval_view, normalize
from tests.helpers import class_image

SIZES = (224, 96, 64, 32)
PLACE = (3, 17, 1)  # epoch, index, draw


def image(width=70, height=50, label=1) -> Image.Image:
    return class_image(np.random.default_rng(0), label, max(width, height)).crop((0, 0, width, height))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("given", [(70, 50), (32, 32), (300, 260), (20, 400)])
def test_sizes(size, given):
    views = Views(VIEWS, size)(image(*given), PLACE)
    assert [view.shape for view in views] == [(3, size, size)] * 3
    assert {view.dtype for view in views} == {torch.uint8}


@pytest.mark.parametrize("size", [224, 32])
def test_a_view_follows_from_its_place_alone(size):
    picture, names = image(), ("query", "key")
    reference = Views(names, size, seed=5)(picture, PLACE)
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)
    views = Views(names, size, seed=5)
    views(picture, (0, 0, 0))
    again = views(picture, PLACE)
    assert all(map(torch.equal, again, reference))
    assert torch.equal(
        Views(("query",), size, seed=5)(picture, PLACE)[0], reference[0]
    )  # whatever other views there are

    others = {(seed, place): Views(names, size, seed)(picture, place) for seed, place in [
        (6, PLACE), (5, (4, 17, 1)), (5, (3, 18, 1)), (5, (3, 17, 2)),
    ]}  # fmt: skip
    for changed in others.values():
        assert not any(map(torch.equal, changed, reference))
    twice = Views(("query", "query"), size, seed=5)(picture, PLACE)
    assert torch.equal(twice[0], reference[0]) and not torch.equal(*twice)


def test_global_generators_are_left_as_found():
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    Views(("query", "key"), 96)(image(), PLACE)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


def test_the_generator_is_left_as_found_after_an_error():
    def fail(_):
        raise OSError

    views = Views(("query",), 32)
    views.views = [fail]
    before = torch.get_rng_state()
    with pytest.raises(OSError):
        views(image(), PLACE)
    assert torch.equal(torch.get_rng_state(), before)


class BlurByTorch:
    """PIL's blur of radius U(.1, 2), drawn from the generator that torchvision draws from."""

    def __call__(self, picture):
        return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def jittered(size, crop):
    return T.Compose([*crop, T.ColorJitter(0.4, 0.4, 0.4, 0), T.RandomHorizontalFlip()])


def contrasted(size, crop, blur):
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    return T.Compose([*crop, jitter, T.RandomGrayscale(p=0.2), *blur, T.RandomHorizontalFlip()])


def compositions(size):
    """What the method's views are in torchvision's words: (query, key, evaluation)."""
    if size > 64:
        query = jittered(size, [T.RandomResizedCrop(size)])
        blur = [T.RandomApply([BlurByTorch()], p=0.5)]
        key = contrasted(size, [T.RandomResizedCrop(size, scale=(0.2, 1.0))], blur)
        return query, key, T.Compose([T.Resize({224: 256, 96: 110}[size]), T.CenterCrop(size)])
    query = jittered(size, [T.Resize((size, size)), T.RandomCrop(size, padding={64: 8, 32: 4}[size])])
    key = contrasted(size, [T.Resize((size, size)), T.RandomResizedCrop(size, scale=(0.2, 1.0))], [])
    return query, key, T.Resize((size, size))


@pytest.mark.parametrize("size", SIZES)
def test_views_are_torchvisions_compositions(size):
    picture = image(130, 90)
    for made, reference in zip((query_view, key_view, eval_view), compositions(size), strict=True):
        for seed in range(8):
            torch.manual_seed(seed)
            ours = made(size)(picture)
            torch.manual_seed(seed)
            assert np.array_equal(np.asarray(ours), np.asarray(reference(picture))), (made.__name__, seed)


@pytest.mark.parametrize("size", SIZES)
def test_only_large_key_views_are_blurred(size, monkeypatch):
    radii = []
    monkeypatch.setattr(ImageFilter, "GaussianBlur", lambda radius: radii.append(radius) or ImageFilter.BoxBlur(0))
    for seed in range(40):
        for name in VIEWS:
            Views((name,), size, seed)(image(), PLACE)
    if size <= 64:
        assert not radii
    else:
        assert 10 <= len(radii) <= 30 and all(0.1 <= radius <= 2 for radius in radii)
        assert len(set(radii)) == len(radii)


def test_evaluation_is_not_random():
    picture = image()
    for size in SIZES:
        first = Views(("eval",), size, seed=0)(picture, (0, 0, 0))[0]
        assert torch.equal(first, Views(("eval",), size, seed=9)(picture, (8, 7, 6))[0])


def test_a_small_image_of_the_right_size_is_evaluated_as_it_is():
    picture = image(32, 32)
    assert np.array_equal(np.asarray(eval_view(32)(picture)), np.asarray(picture))


def test_normalize_is_torchvisions():
    picture = image(32, 32)
    raw = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
    expected = T.Compose([T.ToTensor(), T.Normalize(MEAN, STD)])(picture)
    torch.testing.assert_close(normalize(raw[None])[0], expected, rtol=0, atol=1e-6)
    levels = torch.arange(256, dtype=torch.uint8).expand(1, 3, 1, 256)
    by_hand = (levels.double() / 255 - torch.tensor(MEAN).double().view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(normalize(levels, dtype=torch.float64), by_hand, rtol=1e-6, atol=1e-6)
    assert levels[0, 0, 0, 255] == 255  # the input is left alone


@pytest.fixture(scope="module")
def loaded(plain_tree):
    """Two epochs of batches by number of workers."""

    def epochs(workers):
        dataset = ListFileDataset(
            ListIndex.from_file(plain_tree / "train.txt"), plain_tree, Views(("query", "key"), 32, 7)
        )
        order = BatchSampler(ShuffledSampler(len(dataset), 7), 32)
        loader = build_loader(dataset, order, workers)
        given = []
        for epoch in range(2):
            order.start_at(epoch)
            given.append(list(batches(loader)))
        return given

    return {workers: epochs(workers) for workers in (0, 1, 2)}


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_the_batches(loaded, workers):
    for ours, reference in zip(loaded[workers], loaded[0], strict=True):
        assert len(ours) == len(reference) == 4
        for (views, labels, indices), expected in zip(ours, reference, strict=True):
            assert all(map(torch.equal, views, expected[0]))
            assert torch.equal(labels, expected[1]) and indices == expected[2]


def test_an_image_is_augmented_anew_in_every_epoch(loaded):
    """Persistent workers, too, hear of the new epoch."""
    for given in loaded.values():
        first, second = ({i: v for views, _, numbers in epoch for i, v in zip(numbers, views[0], strict=True)}
                         for epoch in given)  # fmt: skip
        common = first.keys() & second.keys()
        assert common and not any(torch.equal(first[i], second[i]) for i in common)
