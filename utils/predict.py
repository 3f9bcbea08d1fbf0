r"""Predicts the classes of images with a checkpoint of any stage.

    python -m utils.predict weights/stage_iii/last_checkpoint.pth.tar photo.jpg
    python -m utils.predict weights/stage_iii/last_checkpoint.pth.tar --csv photos/ > classes.csv
    python -m utils.predict weights/stage_iii/last_checkpoint.pth.tar --wrong wrong.csv photos/test.txt

Folders are searched for image files, in sorted order; the images of a list, a file whose name ends in .txt, come in its
order. Image size, mean, standard deviation and the names of the classes come from the checkpoint; without names the
class numbers are printed. An image that cannot be read, or a photo in a folder that has another ending, is named on
stderr and skipped; the exit status is then 1.
"""

import csv
import io
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout, suppress
from pathlib import Path

import torch
from torch import nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from datasets.lists import ImageList
from datasets.splits import CLASSES_FILE, Split, find_files, split_named
from models import STAGES
from models.loading import build_network
from models.preprocess import normalize

from . import checkpoint
from .arguments import MAX_PROCESSES
from .command_line import ArgumentParser, run_command, whole_number
from .distributed import num_cores
from .errors import UserError, one_line, printable, retry
from .files import atomic_write, check_link, get_mode, is_dir, is_file, walk
from .groups import read_names, tell_names_apart
from .images import UNREAD, is_image_file, load_rgb


def get_parser():
    parser = ArgumentParser(__doc__, intermixed=True, prog="python -m utils.predict")
    # fmt: off
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of any stage")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR", help="image files, folders of them, and lists")
    parser.add_argument("--root", metavar="DIR",
        help="image folder that the paths in lists are relative to (default: the list's own folder)")
    parser.add_argument("--wrong", type=Path, metavar="FILE.csv",
        help="write the misclassified images of the lists there, the most confident first: path, label, prediction, "
        "confidence")
    add_network_flags(parser)
    parser.add_argument("--topk", default=5, type=whole_number(1), metavar="K",
        help="classes per image, the most probable first (default: %(default)s)")
    parser.add_argument("--csv", action="store_true",
        help="comma-separated values with a header: path, then label, name and probability of each class")
    parser.add_argument("--batch-size", "-b", default=32, type=whole_number(1), metavar="N",
        help="images per forward pass (default: %(default)s)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"),
        help="where to compute (default: auto, a GPU if there is one)")
    parser.add_argument("-j", "--workers", default=num_cores(), type=whole_number(1, MAX_PROCESSES), metavar="N",
        help="threads that read images (default: one per core)")
    # fmt: on
    return parser


def add_network_flags(parser):
    """The flags of load_network."""
    parser.add_argument(
        "--classifier", default="auto", choices=("auto", "hard", "soft"),
        help="which classifier of a stage III checkpoint (default: auto, the soft one if it was trained)"
    )  # fmt: skip
    parser.add_argument(
        "--classes", type=Path, metavar="FILE",
        help="names of the classes, one per line, such as classes.txt (default: those in the checkpoint)"
    )  # fmt: skip


def load_network(
    path, classifier: str = "auto", classes: Path | None = None
) -> tuple[nn.Module, checkpoint.LoadedCheckpoint]:
    """The network in a checkpoint of any stage, on the CPU, in eval mode, and the checkpoint; for export too.

    classifier: "auto", "hard" or "soft", becomes the network's `preferred`; classes: a file of their names. Raises
    UserError for "soft" if the network has one classifier ("hard" then means that one) or did not train it, or if one
    of the files cannot be read or does not fit.
    """
    loaded = checkpoint.read_stage(path, "CKPT", list(STAGES))
    try:
        model = build_network(path, loaded.content)
    except ValueError as error:
        raise UserError(str(error)) from None
    if classifier == "soft":
        if classifier not in model.classifiers:
            raise UserError(
                f"--classifier soft: {path} is of stage {model.number}, which has one classifier; leave it out"
            )
        checkpoint.check_trained(path, loaded.content)
    if classifier in model.classifiers:
        model.preferred = classifier
    if classes is not None:
        try:
            model.classes = retry(read_names, classes)
        except (OSError, ValueError) as error:
            raise UserError(f"--classes {classes}: cannot be read ({one_line(error)})") from None
        if len(model.classes) != loaded.inferred["num_classes"]:
            number = f"{len(model.classes)} names for {loaded.inferred['num_classes']} classes"
            raise UserError(f"--classes {classes}: {number} of {path}; write one name per line")
    return model, loaded


def locate_images(images: ImageList, root: str | None) -> list[tuple[str, int]]:
    """(file, label) of a list's images, found below root, by default the list's folder, as a training finds them.

    Raises UserError if none of them is there.
    """
    root = root or os.path.dirname(images.name)
    split = find_files(Split(split_named(images.name) or "test", root, images))
    if len(split.missing) == len(images):
        raise UserError(f"{images.name}: none of its images is in {root or '.'}; name their folder with --root")
    return [(split.file(i), label) for i, label in enumerate(images.labels.tolist())]


def find_images(paths, root: str | None) -> tuple[list[tuple[str, int | None]], list[str], list[ImageList]]:
    """([(image file, its label)], photos that are left out of folders for their endings, the lists among the paths).

    The files are those among the paths, image files in and below folders, and those of lists, which alone have labels.
    root: as in locate_images. Raises UserError as it does, for a malformed list, for a path that does not exist, and
    for a folder that cannot be read or has no images.
    """
    files = []
    unread = []
    lists = []
    for path in paths:
        check_link(path)
        if is_dir(path):
            tree, left_out = walk(path, is_image_file)
            below = sorted(os.path.join(folder, name) for folder, names in tree for name in names)
            found = [(file, None) for file in below if is_image_file(file)]
            others = [file for file in below if file.lower().endswith(UNREAD)]
            for line in left_out:
                print(f"{printable(path)}: {line}", file=sys.stderr)
            if not found and not others:
                raise UserError(f"{path}: no images in this folder or below; image files end in .jpg, .png, ...")
            files += found
            unread += others
        elif not get_mode(path):
            raise UserError(f"{path}: no such file or folder; correct the path")
        elif path.lower().endswith(".txt"):
            lists.append(ImageList.from_file(path))
            files += locate_images(lists[-1], root)
        else:
            files.append((path, None))
    return files, unread, lists


def read_batches(files: list[str], view, batch_size: int, workers: int):
    """Yields lists of uint8 images (3, S, S), each a UserError instead if it cannot be read, in the order of the files.

    view: a transform of the PIL image. The next batch is read while the current one is used.
    """

    def read(file):
        try:
            return TF.pil_to_tensor(view(load_rgb(file)))
        except UserError as error:
            return error

    pool = ThreadPoolExecutor(workers)
    try:
        following = []
        for start in range(0, len(files) + batch_size, batch_size):
            current = following
            following = [pool.submit(read, file) for file in files[start : start + batch_size]]
            if current:
                yield [future.result() for future in current]
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def predict(model, images, topk: int, device) -> list[list[tuple[int, float]]]:
    """(label, probability) of each image's topk most probable classes; images: uint8 (N, 3, S, S)."""
    logits = model.classify(normalize(images.to(device), model.transform.mean, model.transform.std))
    probabilities, labels = logits.softmax(dim=1).topk(topk, dim=1)
    return [list(zip(*row, strict=True)) for row in zip(labels.tolist(), probabilities.tolist(), strict=True)]


def predictions(model, files: list[str], args, topk: int, device):
    """Yields what predict finds in each file, or a UserError if it cannot be read."""
    try:
        for batch in read_batches(files, model.transform.view, args.batch_size, args.workers):
            images = [image for image in batch if not isinstance(image, UserError)]
            found = iter(predict(model, torch.stack(images), topk, device) if images else [])
            for image in batch:
                yield image if isinstance(image, UserError) else next(found)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"--batch-size {args.batch_size}: out of memory; lower it, or --workers") from None
        raise


def check_wrong(args, loaded, lists: list[ImageList]):
    """Raises UserError if --wrong cannot be written, or would replace an input, or if a label has no class.

    Warns if a list's classes.txt has other names than the checkpoint.
    """
    file = args.wrong
    inputs = [args.checkpoint, *args.images, *([args.classes] if args.classes else [])]
    if not lists or not file.parent.is_dir():
        raise UserError(f"--wrong {file}: needs images of a list, such as test.txt, and an existing folder")
    if file.suffix.lower() != ".csv" or is_dir(file) or (is_file(file) and any(map(file.samefile, inputs))):
        raise UserError(f"--wrong {file}: is a folder, an input, or does not end in .csv; name another file")
    num_classes = loaded.inferred["num_classes"]
    for images in lists:
        if images.num_classes > num_classes:
            where = images.locate([int(images.labels.argmax())])
            label = images.num_classes - 1
            raise UserError(f"{where}: the label {label}, but {args.checkpoint} has {num_classes} classes; correct one")
        if not args.classes:
            with redirect_stdout(sys.stderr), suppress(OSError, ValueError):  # no classes.txt, or of another number
                checkpoint.class_names(loaded, read_names(Path(images.name).with_name(CLASSES_FILE)))


def write_wrong(file: Path, wrong: list[tuple], shown):
    """Writes the misclassified images, the most confident first; wrong: (file, label, prediction, confidence)."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["path", "label", "prediction", "confidence"])
    for path, label, prediction, confidence in sorted(wrong, key=lambda row: -row[3]):
        table.writerow([printable(path), shown[label], shown[prediction], f"{confidence:.6f}"])
    with atomic_write(file) as target:
        target.write(text.getvalue().encode())


def run(args) -> int:
    """Prints the classes of all images; returns the exit status, 1 if one of them could not be read."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # as in evaluation
    model, loaded = load_network(args.checkpoint, args.classifier, args.classes)
    model.to(device)
    labeled, unread, lists = find_images(args.images, args.root)
    files = [file for file, _ in labeled]
    wrong = []
    unreadable = len(unread)
    num_classes = loaded.inferred["num_classes"]
    if args.wrong:
        check_wrong(args, loaded, lists)
    topk = min(args.topk, num_classes)
    names = [printable(name) for name in model.classes or [""] * num_classes]
    shown = tell_names_apart(names) if model.classes else range(num_classes)
    if args.classifier == "auto" and len(model.classifiers) > 1:
        print(f"{args.checkpoint}: the {model.preferred} classifier is used (--classifier)", file=sys.stderr)
    for file in unread:
        print(f"skipped {printable(file)}: such files in folders are not read; convert it to JPEG", file=sys.stderr)
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(["path", *(f"{of}_{k}" for k in range(1, topk + 1) for of in ("label", "name", "probability"))])
    with tqdm(total=len(files), desc="predicting", unit="img", leave=False, dynamic_ncols=True, disable=None) as bar:
        for (file, label), found in zip(labeled, predictions(model, files, args, topk, device), strict=True):
            with bar.external_write_mode(sys.stdout):  # hides the bar while a line is printed
                if isinstance(found, UserError):
                    print(f"skipped {found}", file=sys.stderr)
                    unreadable += 1
                elif args.csv:
                    classes = [(label, names[label], f"{probability:.6f}") for label, probability in found]
                    table.writerow([printable(file), *itertools.chain.from_iterable(classes)])
                else:
                    classes = [f"{shown[label]} {100 * probability:.1f} %" for label, probability in found]
                    print(f"{printable(file)}: {', '.join(classes)}")
            if label is not None and not isinstance(found, UserError) and found[0][0] != label:
                wrong.append((file, label, *found[0]))
            bar.update()
    if args.wrong:
        write_wrong(args.wrong, wrong, shown)
    if unreadable:
        print(f"{unreadable} of {len(files) + len(unread)} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def main(argv=None) -> int:
    """Returns the exit status: 0, 1 if an image could not be read, 2 after a mistake that one line on stderr names."""
    return run_command(run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
