"""The probe: how well a linear classifier can tell classes apart by a trained backbone's features of the test images.

    python -m benchmarks.probe runs/stage_i/last_checkpoint.pth.tar DIR [--json docs/study/GROUP/CELL/seed_0/probe.json]

The backbone is frozen, in eval mode. Each of three splits (seeds 0, 1, 2) halves the images of every class at random; a
classifier is trained on either half and tested on the other. It minimizes cross entropy + 0.005 |W|^2 on features that
are standardized over all test images, in float64 (LBFGS). Shown are means and sample standard deviations over the
splits, in percent: of all images, and of the mean accuracies of the many-, medium- and few-shot classes.
"""

import sys
from contextlib import closing
from statistics import mean, stdev

import torch
import torch.nn.functional as F

from datasets.loaders import Loader
from datasets.samplers import eval_batches
from datasets.splits import find_splits
from datasets.transforms import Views
from utils.command_line import ArgumentParser, run_command
from utils.distributed import num_cores
from utils.errors import UserError
from utils.log import write_json
from utils.metrics import ShotAccuracy
from utils.predict import load_network
from utils.results.tables import format_accuracy
from utils.train_state import set_numerics

DECAY = 0.01
SEEDS = (0, 1, 2)
ACCURACIES = ("overall", "many", "medium", "few")


@torch.no_grad()
def extract_features(model, split, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(standardized features, float64 (N, d), labels (N,)) of a split's images; model: of any stage, in eval mode."""
    backbone = getattr(model, model.backbone.removesuffix(".")).to(device)
    view = model.transform
    dataset = split.dataset(Views(("eval",), view.size))
    batches = eval_batches(len(split.image_list), 128)
    with closing(Loader(split.name, dataset, batches, num_cores(), device, mean=view.mean, std=view.std)) as loader:
        parts = [(backbone(images).double(), labels) for (images,), labels, _ in loader]
    features, labels = map(torch.cat, zip(*parts, strict=True))
    return (features - features.mean(dim=0)) / features.std(dim=0).clamp_min(1e-12), labels


def train_classifier(features, labels, num_classes: int) -> torch.nn.Linear:
    """A linear classifier of features (N, d)."""
    classifier = torch.nn.Linear(features.shape[1], num_classes).to(features)
    optimizer = torch.optim.LBFGS(classifier.parameters(), max_iter=500, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(classifier(features), labels) + DECAY / 2 * classifier.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return classifier


def split_accuracies(features, labels, train_counts, seed: int) -> dict:
    """ShotAccuracy's results over all images, each classified by what was trained on the other half of its class."""
    torch.manual_seed(seed)
    order = torch.randperm(len(labels)).to(labels.device)
    order = order[labels[order].argsort(stable=True)]  # by class, at random within a class
    counts = ShotAccuracy(train_counts, labels.device)
    for trained, tested in ((order[::2], order[1::2]), (order[1::2], order[::2])):
        classifier = train_classifier(features[trained], labels[trained], len(train_counts))
        counts.update(classifier(features[tested]), labels[tested])
    return counts.results()


def probe(args):
    """Prints the accuracies, and writes them to the file of --json."""
    set_numerics(tf32=False, deterministic=True)
    model, _ = load_network(args.checkpoint)
    train, test = find_splits(args.data, vars(args), ("train", "test"), check=("test",)).values()
    test.require()
    features, labels = extract_features(model, test, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if 1 in (test_counts := labels.bincount().tolist()):
        raise UserError(
            f"{test.image_list.name}: one image of class {test_counts.index(1)}; the probe halves each class"
        )
    train_counts = train.image_list.counts(len(test_counts))
    found = [split_accuracies(features, labels, train_counts, seed) for seed in SEEDS]
    record = {"checkpoint": args.checkpoint, "images": len(labels), "weight_decay": DECAY, "seeds": list(SEEDS)}
    for name in ACCURACIES:
        values = [result[name] for result in found if result[name] is not None]
        record |= {name: mean(values), f"{name}_std": stdev(values)} if values else {name: None}
    print(", ".join(f"{name} {format_accuracy(record, name)}" for name in ACCURACIES))
    if args.json:
        write_json(args.json, record)


def get_parser() -> ArgumentParser:
    parser = ArgumentParser(__doc__, prog="python -m benchmarks.probe")
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of any stage")
    parser.add_argument("data", metavar="DIR", help="image folder of the lists, or a tree of class folders")
    parser.add_argument("--train-list", dest="train", metavar="FILE", help="as in training; only counted")
    parser.add_argument("--test-list", dest="test", metavar="FILE", help="as in training")
    parser.add_argument("--json", metavar="FILE", help="also write the accuracies, in [0, 1], to this file")
    return parser


def main(argv=None) -> int:
    return run_command(probe, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
