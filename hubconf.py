"""Networks of SSD-LT by torch.hub.load(REPO, NAME, ...); REPO is a clone (source="local") or GitHub's owner/name.

The package `models` is loaded under a name of its own, so that your `models`, `datasets` and `utils` stay yours.
"""

import hashlib
import importlib.util
import os
import sys
from pathlib import Path
from urllib.parse import urlsplit

import torch

dependencies = ["torch", "torchvision", "numpy"]
ROOT = Path(__file__).resolve().parent


def _models():
    """The package `models` of this clone, imported once, as ssd_lt_models and a number that depends on its folder."""
    name = f"ssd_lt_models_{hashlib.sha256(os.fsencode(ROOT)).hexdigest()[:8]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, ROOT / "models" / "__init__.py")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(sys.modules[name])
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def ssd_lt(checkpoint):
    """The network in a checkpoint of any stage, with `transform` and `classes`, in eval mode; see models.load.

    checkpoint: a path, or a URL, whose file is kept in torch.hub's folder.
    """
    if "://" in str(checkpoint):
        number = hashlib.sha256(checkpoint.encode()).hexdigest()[:8]  # many URLs end in last_checkpoint.pth.tar
        file = Path(torch.hub.get_dir(), "checkpoints", f"{number}-{Path(urlsplit(checkpoint).path).name}")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(checkpoint, str(file))
        checkpoint = file
    return _models().load(checkpoint)


def ssd_lt_cifar100_resnet32(name="stage_iii"):
    """ResNet-32 trained on CIFAR100-LT; weights/README.md has the accuracies.

    name: a file of weights/cifar100_lt, without .pth.tar; stage_iii returns (hard, soft), the others logits.
    """
    file = ROOT / "weights" / "cifar100_lt" / f"{name}.pth.tar"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: not released in this version; weights/README.md says which checkpoints are")
    return _models().load(file)


def ssd_lt_untrained(stage, arch="resnext50_32x4d", num_classes=1000, **options):
    """The network of stage "i", "ii" or "iii" with random weights; options: see models.SSFL, models.SLG, models.SDL."""
    return _models().STAGES[stage](arch, num_classes, **options)
