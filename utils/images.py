"""Reading image files."""

import ctypes
import errno
import io
import os
import stat
import warnings

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from models.preprocess import to_rgb

from .errors import EndOfRun, UserError, one_line, retry

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # not EPS: it is a program that Ghostscript would run
MAX_BYTES = 2**31  # of a file
UNREAD = (  # endings of photos that folders are not searched for
    ".arw", ".avif", ".cr2", ".cr3", ".dng", ".exr", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jp2", ".jpe", ".jxl",
    ".mpo", ".nef", ".orf", ".pef", ".psd", ".raf", ".rw2", ".srw", ".tga",
)  # fmt: skip
warnings.filterwarnings("ignore", module=r"PIL\.")  # palettes with transparency, odd EXIF data: read anyway
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB for one text or profile too, not 1
if hasattr(libraries := ctypes.CDLL(Image.core.__file__), "TIFFSetErrorHandler"):
    libraries.TIFFSetErrorHandler(None)  # libtiff would print errors, which Pillow raises as exceptions


def decode(file, read):
    """read(image) of an open image. Raises whatever Pillow does."""
    status = os.stat(file)
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO would wait for a writer
        raise UserError(f"{file}: not a regular file; replace it")
    if not 0 < status.st_size <= MAX_BYTES:
        raise UserError(f"{file}: not an image, it has {status.st_size:,} bytes; replace it")
    try:
        with Image.open(file, formats=FORMATS) as image:
            return read(image)
    except Exception as error:
        if isinstance(error, MemoryError) or getattr(error, "errno", None):
            raise
    with open(file, "rb") as stream:  # the TIFF decoder, for one, hides the system's errors; they show here
        content = io.BytesIO(stream.read())
    with Image.open(content, formats=FORMATS) as image:
        return read(image)


def load_rgb(file, read=to_rgb) -> Image.Image:
    """The image as RGB, 8 bits per channel, whatever its mode: gray, palette, CMYK, 16 bits.

    read: what to make of the open image instead. Raises UserError naming the file if it is missing, not a regular file,
    damaged, not an image, or has more pixels than twice Image.MAX_IMAGE_PIXELS, Pillow's limit against decompression
    bombs. Raises MemoryError, or an OSError that says that memory or file descriptors have run out; Unavailable if the
    system cannot read the file now.
    """
    try:
        return retry(decode, file, read)
    except (EndOfRun, MemoryError):
        raise
    except FileNotFoundError:
        raise UserError(f"{file}: no such image; restore it, or remove its line") from None
    except UnidentifiedImageError:
        raise UserError(f"{file}: not an image that can be read; convert it to JPEG or replace the file") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{file}: a decompression bomb, over {2 * Image.MAX_IMAGE_PIXELS} pixels; make it smaller"
        ) from None
    except Exception as error:  # damaged files make the decoders raise nearly anything
        number = getattr(error, "errno", None)  # of the system's errors
        if number in (errno.ENOMEM, errno.EMFILE, errno.ENFILE):
            raise
        what, hint = ("decoded", "; replace the file") if number is None else ("read", "")
        raise UserError(f"{file}: cannot be {what} ({one_line(error)}){hint}") from None


def is_image_file(path) -> bool:
    """Whether a file has an image's ending, as in ImageFolder, and is not hidden: macOS leaves ._NAME beside NAME."""
    name = os.path.basename(path)
    return has_file_allowed_extension(name, IMG_EXTENSIONS) and not name.startswith(".")
