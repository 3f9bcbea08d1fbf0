"""The data set of a list's images: reads, decodes and transforms one image at a time."""

import hashlib
import os
import unicodedata

import torch

from utils.errors import EndOfRun
from utils.images import load_rgb


class ListFileDataset(torch.utils.data.Dataset):
    """Images of a split (splits.Split).

    Indexed by (epoch, draw, index), which the samplers yield: draw counts how often the index has come before in the
    epoch, on this rank. An item is (views, label, index); views is what transform(image, (epoch, index, draw)) returns,
    a tuple of uint8 tensors (3, S, S). Raises UserError or Unavailable, with file and list line, for an image that
    cannot be read.
    """

    def __init__(self, split, transform):
        self.split = split
        self.image_list = split.image_list
        self.transform = transform

    def __len__(self):
        return len(self.image_list)

    def digests(self) -> torch.Tensor:
        """8 bytes of a hash of each image's path below root, int64 (images,); they tell which images lists share.

        The path is taken as NFC: macOS decomposes accents.
        """
        paths = (unicodedata.normalize("NFC", os.path.normpath(self.split.path(i))) for i in range(len(self)))
        hashes = [hashlib.blake2b(os.fsencode(path), digest_size=8).digest() for path in paths]
        return torch.frombuffer(bytearray(b"".join(hashes)), dtype=torch.int64)

    def __getitem__(self, item):
        epoch, draw, i = item
        try:
            image = load_rgb(self.split.file(i))
        except EndOfRun as error:
            raise type(error)(self.image_list.with_line(str(error), i)) from None
        return self.transform(image, (epoch, i, draw)), int(self.image_list.labels[i]), i

    def __getitems__(self, items):
        """The items of a batch, or the EndOfRun of one: if it were raised in a worker, torch would add a traceback."""
        try:
            return [self[item] for item in items]
        except EndOfRun as error:
            return error
