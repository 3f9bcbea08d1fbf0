"""Which lists a run uses, and in which layout their images lie below DIR."""

from pathlib import Path
from typing import NamedTuple

from utils.errors import UserError

from .list_file import ListFileDataset, ListIndex, class_folders, find_place, missing_message, plain_place

SPLITS = ("train", "val", "test")
IMAGENET_LT = Path(__file__).resolve().parent.parent / "data"


class Split(NamedTuple):
    """The entries of a split, and the function that says where below root an entry's file lies."""

    name: str
    root: str
    index: ListIndex
    place: object = plain_place
    missing: tuple[int, ...] = ()

    def dataset(self, transform) -> ListFileDataset:
        return ListFileDataset(self.index, self.root, transform, self.place, self.name)

    def require(self):
        """Raises UserError, naming the first files and their number, where files are missing."""
        if self.missing:
            raise UserError(missing_message(self.index, self.root, self.place, self.name, self.missing))


def choose_lists(root, given: dict[str, str | None], wanted=SPLITS) -> dict[str, Path] | None:
    """The list file of each wanted split, or None where root is to be read as class folders.

    In order: the given ones; root/{train,val,test}.txt; class folders root/{train,val,test}/ where there is no list at
    all; data/ImageNet_LT_{train,val,test}.txt. Raises UserError for a root that is no folder or a list that is no file.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder; DIR is the folder that the list's paths are relative to")
    chosen = {split: Path(given[split]) for split in wanted if given.get(split)}
    rest = [split for split in wanted if split not in chosen]
    own = {split: root / f"{split}.txt" for split in rest}
    if rest and any((root / f"{split}.txt").is_file() for split in SPLITS):
        chosen |= own
    elif rest and not chosen and all((root / split).is_dir() for split in SPLITS):
        return None
    else:
        chosen |= {split: IMAGENET_LT / f"ImageNet_LT_{split}.txt" for split in rest}
    for split, file in chosen.items():
        if not file.is_file():
            if given.get(split):
                raise UserError(f"{file}: no such list; correct --{split}-list")
            raise UserError(
                f"{root}: has neither {split}.txt nor class folders train/, val/ and test/, and {file} is not there; "
                f"make lists with python -m datasets.prepare, or name one with --{split}-list"
            )
    return chosen


def find_splits(root, given: dict[str, str | None], wanted=SPLITS, progress=iter, check=True) -> dict[str, Split]:
    """The wanted splits, each with the layout its files were found in; given: split -> list file, or None.

    progress wraps the iterator over the pool's results. Missing files are noted, not raised (Split.require does that);
    check=False leaves the looking to a neighbour process. Raises UserError for what cannot be read.
    """
    lists = choose_lists(root, given, wanted)
    splits, classes = {}, None
    if lists is None:
        for split in SPLITS:  # train comes first: it numbers the classes
            index, classes = class_folders(root, split, classes)
            splits[split] = Split(split, str(root), index)
        return {split: splits[split] for split in wanted}
    for split, file in lists.items():
        index = ListIndex.read(file)
        place, missing = find_place(index, root, split, progress) if check else (plain_place, [])
        splits[split] = Split(split, str(root), index, place, tuple(missing))
    return splits
