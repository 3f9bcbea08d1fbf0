"""List files: one line `<path> <label>` per image, kept in a few arrays."""

import io
import os
import zlib
from array import array
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from utils.errors import UserError, retry
from utils.files import is_file, lexists

MAX_LABEL = 2**31 - 1
MAX_CLASSES = 10**6  # a larger label is taken for a mistake; it could use up all memory


def parse_line(line: bytes) -> tuple[bytes, int] | None:
    """(path, label) of a line, None for a blank one. Raises ValueError saying what is wrong.

    The label is the last word. The path is everything before it, stripped of white space; it may contain spaces.
    """
    words = line.rsplit(None, 1)
    if not words:
        return None
    if len(words) == 1:
        raise ValueError("no label: a line is '<path> <label>'")
    path = words[0].strip()
    label = words[1]
    if not label.isdigit():
        raise ValueError(f"the label {label.decode(errors='replace')!r} is not a whole number of at least 0")
    if len(label) > 10 or int(label) > MAX_LABEL:
        raise ValueError(f"the label {label[:20].decode()} is too large")
    try:
        path.decode()
    except UnicodeDecodeError:
        raise ValueError("the path is not UTF-8 text") from None
    if b"\0" in path:
        raise ValueError("the path holds a NUL byte")
    if b"\n" in path:
        raise ValueError(f"the path {path.decode()!r} holds a line break")
    if path.startswith((b"/", b"\\")) or path[1:3] in (b":/", b":\\"):
        raise ValueError("the path is absolute; paths are relative to the image root")
    if b".." in path and b".." in path.replace(b"\\", b"/").split(b"/"):
        raise ValueError("the path leaves the image root through '..'")
    return path, int(label)


class ImageList:
    """Paths and labels of a list: its bytes, and the start and the label of every entry.

    There is no Python object per entry, and the arrays are tensors, so that worker processes, forked or spawned, share
    them. name: the list's file, for messages. labels: int32 (entries,). notes: lines on what else class folders hold.
    """

    notes: tuple[str, ...] = ()

    def __init__(self, name: str, content: bytes, lines):
        """lines: those of content. Raises UserError if one is malformed, with file and line, or if all are blank."""
        starts = array("q")
        labels = array("i")
        position = 0
        for number, line in enumerate(lines, 1):
            start = position
            position += len(line)
            if number == 1 and line.startswith(b"\xef\xbb\xbf"):
                start = 3
                line = line[3:]
            try:
                entry = parse_line(line)
            except ValueError as error:
                where = f"{name}, line {number}"
                hint = ""
                if os.path.isdir(name):  # class folders: the lines were made from their files
                    file = os.fsdecode(line.rsplit(None, 1)[0])
                    where = os.path.join(os.path.dirname(name), file)
                    hint = "; rename the file or folder"
                raise UserError(f"{where}: {error}{hint}") from None
            if entry is not None:
                starts.append(start)
                labels.append(entry[1])
        if not starts:
            raise UserError(f"{name}: the list is empty; name another")
        self.name = name
        self.content = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        self.starts = torch.frombuffer(starts, dtype=torch.int64)
        self.labels = torch.frombuffer(labels, dtype=torch.int32)

    @classmethod
    def from_file(cls, file) -> "ImageList":
        """Reads a list file: UTF-8, LF or CRLF; a BOM, blank lines and a missing last newline are allowed."""
        if lexists(file) and not is_file(file):  # opening a FIFO would wait for a writer
            raise UserError(f"{file}: not a regular file; name a list file")
        try:
            return cls.from_bytes(str(file), retry(Path.read_bytes, Path(file)))
        except OSError as error:
            raise UserError(
                f"{file}: cannot read the list ({error.strerror}); correct the path or its permissions"
            ) from None

    @classmethod
    def from_bytes(cls, name: str, content: bytes) -> "ImageList":
        """As from_file, for the content of a list; name: its name in messages."""
        return cls(name, content, io.BytesIO(content))

    @classmethod
    def from_entries(cls, name: str, entries) -> "ImageList":
        """The list of an iterable of (path, label), such as ImageFolder's listing."""
        lines = [os.fsencode(f"{path} {label}\n") for path, label in entries]
        return cls(name, b"".join(lines), lines)

    def __len__(self):
        return len(self.labels)

    def path(self, i: int) -> str:
        """The path of entry i, as written in the list."""
        starts = self.starts.numpy()  # the same memory, and faster to index
        content = self.content.numpy()
        end = starts[i + 1] if i + 1 < len(starts) else len(content)
        line = content[starts[i] : end].tobytes().split(b"\n", 1)[0]
        return os.fsdecode(line.rsplit(None, 1)[0].strip())

    def line(self, i: int) -> int:
        """The line number of entry i in the list file, starting at 1."""
        before = self.content[: int(self.starts[i])].numpy()
        return int(np.count_nonzero(before == ord("\n"))) + 1

    @property
    def has_list_file(self) -> bool:
        """Whether the entries are the lines of a list, not the files of class folders."""
        return not os.path.isdir(self.name)

    def locate(self, entries) -> str:
        """Entries for messages: the list with their lines or, from class folders, the first of their paths."""
        if self.has_list_file:
            lines = ", ".join(str(self.line(i)) for i in entries)
            return f"{self.name}, line{'s' if len(entries) > 1 else ''} {lines}"
        return ", ".join(self.path(i) for i in entries[:3]) + (", ..." if len(entries) > 3 else "")

    @cached_property
    def checksum(self) -> int:
        """The CRC-32 of the list's bytes."""
        return zlib.crc32(self.content.numpy())

    def with_line(self, text: str, i: int) -> str:
        """A text followed by the list and the line of entry i, if it is from a list."""
        return f"{text} ({self.locate([i])})" if self.has_list_file else text

    @property
    def num_classes(self) -> int:
        """The largest label plus one."""
        return int(self.labels.max()) + 1

    def check_num_classes(self, hint: str = ""):
        """Raises UserError, which ends with the hint, if the largest label means more classes than MAX_CLASSES."""
        if self.num_classes > MAX_CLASSES:
            where = self.locate([int(self.labels.argmax())])
            number = self.num_classes
            hint = self.label_hint() + hint
            raise UserError(f"{where}: the label {number - 1} would mean {number} classes; correct the list{hint}")

    def label_hint(self) -> str:
        """What may be wrong with labels that do not number the classes from 0, or an empty text."""
        labels = self.labels.unique()
        if 2 * len(labels) < self.num_classes:
            return f"; its {len(labels)} labels look like ids: number the classes from 0 to {len(labels) - 1}"
        return "; its labels start at 1: subtract 1 from each" if int(labels[0]) == 1 else ""

    def counts(self, num_classes: int) -> torch.Tensor:
        """The number of images per class, int64 (num_classes,)."""
        return torch.bincount(self.labels, minlength=num_classes)
