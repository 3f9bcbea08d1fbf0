r"""Predicts the classes of images with a checkpoint of any stage.

    python -m utils.predict weights/stage_iii/last_checkpoint.pth.tar photo.jpg
    python -m utils.predict weights/stage_iii/last_checkpoint.pth.tar --classifier soft --csv photos/ > classes.csv

Folders are searched for image files, in sorted order. Image size, mean, standard deviation and the names of the
classes come from the checkpoint; without names the class numbers are printed. An image that cannot be read is named on
stderr and skipped; the exit status is then 1.
"""

import csv
import itertools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import nn
from torchvision.transforms import functional as TF
from tqdm import tqdm

from models import STAGES
from models.loading import network_of
from models.preprocess import normalize

from . import checkpoint
from .arguments import MAX_PROCESSES
from .command_line import ArgumentParser, run_command, whole_number
from .distributed import num_cores
from .errors import UserError, printable
from .files import is_folder, mode_of, name_refused, walk
from .groups import tell_names_apart
from .images import is_image_file, load_rgb


def get_parser():
    parser = ArgumentParser(__doc__, intermixed=True, prog="python -m utils.predict")
    # fmt: off
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of any stage")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_DIR", help="image files, and folders of them")
    parser.add_argument("--classifier", default="hard", choices=("hard", "soft"),
        help="which classifier of a stage III checkpoint (default: %(default)s)")
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


def load_network(path, classifier: str) -> tuple[nn.Module, checkpoint.LoadedCheckpoint]:
    """The network in a checkpoint of any stage, on the CPU, in eval mode, and the checkpoint; for export too.

    classifier: "hard" or "soft". Raises UserError if the network does not have it, or cannot be read.
    """
    loaded = checkpoint.read_stage(path, "CKPT", list(STAGES))
    try:
        model = network_of(path, loaded.content)
    except ValueError as error:
        raise UserError(str(error)) from None
    if classifier == "soft":
        if classifier not in model.classifiers:
            raise UserError(
                f"--classifier soft: {path} is of stage {model.number}, which has one classifier; leave it out"
            )
        checkpoint.check_trained(path, loaded.content)
    return model, loaded


def find_images(paths) -> list[str]:
    """The files among the paths, and the image files in and below the folders among the paths.

    Raises UserError for a path that does not exist, and for a folder that cannot be read or has no images.
    """
    files = []
    for path in paths:
        with name_refused():
            searched = is_folder(path)
        if searched:
            tree, left_out = walk(path, is_image_file)
            below = (os.path.join(folder, name) for folder, names in tree for name in names)
            found = sorted(filter(is_image_file, below))
            for line in left_out:
                print(f"{printable(path)}: {line}", file=sys.stderr)
            if not found:
                raise UserError(f"{path}: no images in this folder or below; image files end in .jpg, .png, ...")
            files += found
        elif mode_of(path):
            files.append(path)
        else:
            raise UserError(f"{path}: no such file or folder; correct the path")
    return files


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
            current, following = following, [pool.submit(read, file) for file in files[start : start + batch_size]]
            if current:
                yield [future.result() for future in current]
    finally:
        pool.shutdown(cancel_futures=True)


@torch.no_grad()
def predict(model, images, classifier: str, topk: int, device) -> list[list[tuple[int, float]]]:
    """(label, probability) of each image's topk most probable classes; images: uint8 (N, 3, S, S)."""
    logits = model(normalize(images.to(device), model.transform.mean, model.transform.std))
    if len(model.classifiers) > 1:
        logits = logits[model.classifiers.index(classifier)]
    probabilities, labels = logits.softmax(dim=1).topk(topk, dim=1)
    return [list(zip(*row, strict=True)) for row in zip(labels.tolist(), probabilities.tolist(), strict=True)]


def predictions(model, files: list[str], args, topk: int, device):
    """Yields what predict finds in each file, or a UserError if it cannot be read."""
    try:
        for batch in read_batches(files, model.transform.view, args.batch_size, args.workers):
            images = [image for image in batch if not isinstance(image, UserError)]
            found = iter(predict(model, torch.stack(images), args.classifier, topk, device) if images else [])
            for image in batch:
                yield image if isinstance(image, UserError) else next(found)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise UserError(f"--batch-size {args.batch_size}: out of memory; lower it, or --workers") from None
        raise


def run(args) -> int:
    """Prints the classes of all images; returns the exit status, 1 if one of them could not be read."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is available here; use --device cpu")
    device = torch.device("cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = False  # as in evaluation
    model, loaded = load_network(args.checkpoint, args.classifier)
    model.to(device)
    files, unreadable = find_images(args.images), 0
    num_classes = loaded.found["num_classes"]
    topk, names = min(args.topk, num_classes), [printable(name) for name in model.classes or [""] * num_classes]
    shown = tell_names_apart(names) if model.classes else range(num_classes)
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(["path", *(f"{of}_{k}" for k in range(1, topk + 1) for of in ("label", "name", "probability"))])
    with tqdm(total=len(files), desc="predicting", unit="img", leave=False, dynamic_ncols=True, disable=None) as bar:
        for file, found in zip(files, predictions(model, files, args, topk, device), strict=True):
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
            bar.update()
    if unreadable:
        print(f"{unreadable} of {len(files)} images could not be read", file=sys.stderr)
    return 1 if unreadable else 0


def main(argv=None) -> int:
    """Returns the exit status: 0, 1 if an image could not be read, 2 after a mistake that one line on stderr names."""
    return run_command(run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
