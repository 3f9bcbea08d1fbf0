"""The data set of a list's images: reads, decodes and transforms one image at a time."""

import ctypes
import errno
import os
import stat
import traceback
import warnings
from contextlib import contextmanager

import torch
from PIL import Image, UnidentifiedImageError

from models.preprocess import to_rgb
from utils.errors import UserError, one_line

from .layout import as_listed
from .list_file import ImageList

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it is a program that Ghostscript would run
warnings.filterwarnings("ignore", module=r"PIL\.")  # palettes with transparency, odd EXIF data: read anyway
if hasattr(libraries := ctypes.CDLL(Image.core.__file__), "TIFFSetErrorHandler"):
    libraries.TIFFSetErrorHandler(None)  # libtiff would print errors, which Pillow raises as exceptions


def load_rgb(file) -> Image.Image:
    """The image as RGB, 8 bits per channel, whatever its mode: gray, palette, CMYK, 16 bits.

    Raises UserError naming the file if it is missing, not a regular file, damaged, not an image, or has more pixels
    than twice Image.MAX_IMAGE_PIXELS, Pillow's limit against decompression bombs. Raises MemoryError, or an OSError
    that says that there is no memory.
    """
    try:
        if not stat.S_ISREG(os.stat(file).st_mode):  # opening a FIFO would wait for a writer
            raise UserError(f"{file}: not a regular file; replace it")
        with Image.open(file, formats=FORMATS) as image:
            return to_rgb(image)
    except (UserError, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such image") from None
    except UnidentifiedImageError:
        raise UserError(f"{file}: not an image that can be read; convert it to JPEG or replace the file") from None
    except Image.DecompressionBombError:
        raise UserError(f"{file}: a decompression bomb, over {2 * Image.MAX_IMAGE_PIXELS} pixels") from None
    except Exception as error:  # damaged files make the decoders raise nearly anything
        number = getattr(error, "errno", None)  # of the system's errors
        if number == errno.ENOMEM:
            raise
        what, hint = ("decoded", "; replace the file") if number is None else ("read", "")
        raise UserError(f"{file}: cannot be {what} ({one_line(error)}){hint}") from None


@contextmanager
def memory_errors():
    """Turns the errors of a system that has no more memory, or threads, into a UserError."""
    try:
        yield
    except (MemoryError, OSError, RuntimeError) as error:  # the latter two from torch's allocators and multiprocessing
        words = "allocate memory", "start new thread"
        if not isinstance(error, MemoryError) and not any(word in str(error) for word in words):
            raise
        traceback.clear_frames(error.__traceback__)  # frees the memory that they hold
        raise UserError(
            "loading the images ran out of memory: lower -j/--workers, --batch-size or --image-size"
        ) from None


class ListFileDataset(torch.utils.data.Dataset):
    """Images of a list below a root folder.

    Indexed by (epoch, draw, index), which the samplers yield: draw counts how often the index has come before in the
    epoch. An item is (views, label, index); views is what transform(image, (epoch, index, draw)) returns, a tuple of
    uint8 tensors (3, S, S). Raises UserError, naming file and list line, for an image that cannot be read.
    """

    def __init__(self, images: ImageList, root, transform, layout=as_listed, split="train"):
        self.images, self.root, self.transform = images, os.fspath(root), transform
        self.layout, self.split = layout, split

    def __len__(self):
        return len(self.images)

    def file(self, i: int) -> str:
        """The file of entry i."""
        return os.path.join(self.root, self.layout(self.images.path(i), self.split))

    def __getitem__(self, item):
        epoch, draw, i = item
        try:
            image = load_rgb(self.file(i))
        except UserError as error:
            raise UserError(self.images.with_line(str(error), i)) from None
        return self.transform(image, (epoch, i, draw)), int(self.images.labels[i]), i

    def __getitems__(self, items):
        """The items of a batch, or the UserError of one of them: raised in a worker, it would print a traceback."""
        try:
            with memory_errors():
                return [self[item] for item in items]
        except UserError as error:
            return error
