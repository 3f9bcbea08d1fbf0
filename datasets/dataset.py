"""The data set of a list's images: reads, decodes and transforms one image at a time."""

import hashlib
import os

import torch

from utils.errors import EndOfRun
from utils.images import load_rgb

from .lists import ImageList


class ListFileDataset(torch.utils.data.Dataset):
    """Images of a list; layout(path in the list, split) is where the file of an entry lies below root.

    Indexed by (epoch, draw, index), which the samplers yield: draw counts how often the index has come before in the
    epoch. An item is (views, label, index); views is what transform(image, (epoch, index, draw)) returns, a tuple of
    uint8 tensors (3, S, S). Raises UserError or Unavailable, with file and list line, for an image that cannot be read.
    """

    def __init__(self, images: ImageList, root: str, transform, layout, split: str):
        self.images, self.root, self.transform = images, root, transform
        self.layout, self.split = layout, split

    def __len__(self):
        return len(self.images)

    def file(self, i: int) -> str:
        """The file of entry i."""
        return os.path.join(self.root, self.layout(self.images.path(i), self.split))

    def digests(self) -> torch.Tensor:
        """8 bytes of a hash of each image's path below root, int64 (images,); they tell which images lists share."""
        paths = (self.layout(self.images.path(i), self.split) for i in range(len(self)))
        hashes = [hashlib.blake2b(os.fsencode(os.path.normpath(path)), digest_size=8).digest() for path in paths]
        return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.int64)

    def __getitem__(self, item):
        epoch, draw, i = item
        try:
            image = load_rgb(self.file(i))
        except EndOfRun as error:
            raise type(error)(self.images.with_line(str(error), i)) from None
        return self.transform(image, (epoch, i, draw)), int(self.images.labels[i]), i

    def __getitems__(self, items):
        """The items of a batch, or the EndOfRun of one of them: raised in a worker, it would print a traceback."""
        try:
            return [self[item] for item in items]
        except EndOfRun as error:
            return error
