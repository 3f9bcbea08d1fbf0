"""Reading images of every mode, and damaged ones."""

import errno
import os
import struct
import unicodedata
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from datasets.lists import ImageList
from datasets.splits import Split, class_folders
from utils.errors import UserError
from utils.images import load_rgb
from utils.launch.failures import describe_failure


def saved(tmp_path, image, name="image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_images_of_every_mode_become_rgb_whatever_their_name_says(tmp_path):
    gray = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    for name, mode in {
        "gray.png": "L", "palette.gif": "P", "transparent.png": "LA", "bilevel.png": "1", "rgba.webp": "RGBA",
    }.items():  # fmt: skip
        loaded = load_rgb(saved(tmp_path, gray.convert(mode), name))
        assert loaded.mode == "RGB" and loaded.size == (16, 16), name
    red = Image.new("RGB", (16, 16), (255, 0, 0))
    pixel = load_rgb(saved(tmp_path, red.convert("CMYK"), "cmyk.jpg")).getpixel((8, 8))
    assert pixel[0] > 240 and max(pixel[1:]) < 15
    assert load_rgb(saved(tmp_path, red, "png.JPEG", format="PNG")).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("levels", "kinds", "expected"),
    [
        ([0, 0.25, 0.5, 1], ["float32"], [0, 64, 128, 255]),
        ([0, 3.6, 128, 255], ["float32"], [0, 4, 128, 255]),
        ([0, 1, 128, 255], ["int32", "uint16"], [0, 1, 128, 255]),
        ([0, 257, 32896, 65535], ["float32", "int32", "uint16"], [0, 1, 128, 255]),
    ],
)
def test_values_of_more_bits_are_scaled_by_their_range(tmp_path, levels, kinds, expected):
    for kind in kinds:
        file = saved(tmp_path, Image.fromarray(np.array([levels], kind)), "image.tif")
        assert np.abs(np.asarray(load_rgb(file))[0].astype(int).T - expected).max() <= (kind == "float32"), kind


@pytest.mark.parametrize(
    ("mode", "levels"),
    [("F", [-1, 1]), ("F", [np.nan, 1]), ("F", [0, 7e4]), ("F", [0, 1.5]), ("I", [0, 65536])],
)
def test_values_of_no_known_range_are_refused_with_file_and_mode(tmp_path, mode, levels):
    file = saved(tmp_path, Image.fromarray(np.array([levels], {"F": np.float32, "I": np.int32}[mode])), "image.tif")
    with pytest.raises(UserError, match=rf"image\.tif: .*mode {mode}, values from {np.min(levels):g} to"):
        load_rgb(file)


def test_twelve_bits_are_scaled(tmp_path):
    pixels = np.array([[0xFFF8, 0x0000, 0x00FF]], ">u2").tobytes()[:6]  # 4095, 2048, 0, 255 packed
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 134), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    head = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    (tmp_path / "image.tif").write_bytes(head.ljust(134, b"\0") + pixels)
    assert np.asarray(load_rgb(tmp_path / "image.tif"))[0, :, 0].tolist() == [255, 128, 0, 16]


@pytest.mark.parametrize("metadata", ["text", "profile", "international text"])
def test_a_png_with_much_metadata_is_read(tmp_path, metadata, size=2**25):
    info = PngImagePlugin.PngInfo()
    if metadata != "profile":
        add = info.add_text if metadata == "text" else info.add_itxt
        add("history", "x" * size, zip=True)
    options = {"icc_profile": bytes(size)} if metadata == "profile" else {}
    file = saved(tmp_path, Image.new("RGB", (5, 4), (1, 2, 3)), pnginfo=info, **options)
    assert load_rgb(file).getpixel((0, 0)) == (1, 2, 3)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EACCES, "Permission denied"), r"cannot be read \(Permission denied\)$"),
        (OSError("image file is truncated"), "cannot be decoded"),
    ],
)
def test_an_error_of_the_file_system_is_not_called_a_damaged_image(tmp_path, monkeypatch, error, message):
    file = saved(tmp_path, Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=error))
    with pytest.raises(UserError, match=message):
        load_rgb(file)


def test_a_system_without_memory_is_not_called_a_damaged_image(tmp_path, monkeypatch):
    dataset = Split("train", tmp_path, ImageList.from_bytes("list", b"image.png 0")).dataset(None)
    saved(tmp_path, Image.new("RGB", (4, 4)))
    monkeypatch.setattr(Image, "open", mock.Mock(side_effect=OSError(errno.ENOMEM, "Cannot allocate memory")))
    with pytest.raises(OSError) as caught:
        dataset.__getitems__([(0, 0, 0)])
    assert describe_failure(caught.value)[0] == 2 and "out of memory" in describe_failure(caught.value)[1]


def test_an_image_of_a_class_folder_is_named_without_a_list_line(tmp_path):
    (tmp_path / "train" / "a").mkdir(parents=True)
    (tmp_path / "train" / "a" / "1.png").write_text("no image")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()  # hidden folders are no classes
    images, classes = class_folders(tmp_path, "train")
    returned = Split("train", tmp_path, images).dataset(None).__getitems__([(0, 0, 0)])
    assert classes == ["a"] and images.locate([0]) == "train/a/1.png"
    assert str(returned).startswith(f"{tmp_path}/train/a/1.png: ") and ", line" not in str(returned)
    (tmp_path / "train" / "a" / "2\n.png").touch()
    with pytest.raises(UserError, match="holds a line break"):
        class_folders(tmp_path, "train")
    os.rename(tmp_path / "train" / "a" / "2\n.png", os.fsencode(tmp_path / "train" / "a") + b"/2\xff.png")
    with pytest.raises(UserError, match=r"/train/a/2.*\.png: the path is not UTF-8 text; rename the file or folder"):
        class_folders(tmp_path, "train")


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "fifo.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    reasons = dict.fromkeys(("fifo.png", "device.png", "folder.png"), "not a regular file")
    for name, reason in (reasons | {"none.png": "no such image"}).items():
        with pytest.raises(UserError, match=reason) as caught:
            load_rgb(tmp_path / name)
        assert name in str(caught.value)


def test_libtiff_prints_nothing_about_a_damaged_tiff(tmp_path, capfd):
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    file = saved(tmp_path, noise, "damaged.tif", compression="tiff_lzw")
    content = bytearray(file.read_bytes())
    content[len(content) // 3 : len(content) // 2] = bytes(len(content) // 2 - len(content) // 3)
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"damaged\.tif: cannot be decoded"):
        load_rgb(file)
    assert capfd.readouterr().err == ""


def test_digests_are_those_of_paths_with_composed_accents():
    digests = []
    for form in ("NFC", "NFD"):
        images = ImageList.from_entries("train.txt", [(unicodedata.normalize(form, "Bär/é 1.jpg"), 0)])
        digests.append(Split("train", "", images).dataset(None).digests())
    assert torch.equal(*digests)


def test_an_image_has_one_digest_however_its_path_is_written():
    lists = [ImageList.from_bytes("list", text) for text in (b"a/b.png 0\n", b"./a//b.png 0\n")]
    assert torch.equal(*(Split("train", "/r", images).dataset(None).digests() for images in lists))
