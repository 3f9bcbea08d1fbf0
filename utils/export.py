r"""Exports a checkpoint of any stage to a file that other programs read.

    python -m utils.export weights/stage_iii/last_checkpoint.pth.tar model.pth
    python -m utils.export weights/stage_iii/last_checkpoint.pth.tar model.onnx --format onnx
    python -m utils.export weights/stage_i/last_checkpoint.pth.tar old.pth.tar --format published
    python -m utils.export weights/stage_iii/last_checkpoint.pth.tar small.pth.tar --format network

torchvision: a plain state dict, which torchvision's network of the same arch loads with strict=True. Stage II's scales
are folded into its classifier. onnx: the same network, images (N, 3, S, S) to logits (N, classes), for any N; needs
the packages onnx and onnxscript. published: the whole network and its optimizer, as the published scripts resume
them, in the file format before PyTorch 1.6. network: the checkpoint without what only further training needs, to
predict, evaluate and start the next stage from: both classifiers of stage III, and its teacher.
"""

import copy
import json
import logging
import os
import sys
import warnings
from collections import OrderedDict
from pathlib import Path

import torch
from torch import nn

from models.backbones import TORCHVISION
from models.heads import LWS

from .checkpoint import LoadedCheckpoint
from .command_line import ArgumentParser, run_command
from .errors import UserError, optional_package
from .files import atomic_write, lexists, name_failure
from .predict import add_network_flags, load_network

WHOLE = ("published", "network")  # formats that keep all classifiers
OF_NETWORK = (  # all of a checkpoint but optimizer, gradient scaler and position in an epoch
    "epoch", "stage", "arch", "state_dict", "best_acc1", "best_metric", "classes", "trained_on", "args", "run",
)  # fmt: skip


def get_parser():
    parser = ArgumentParser(__doc__, prog="python -m utils.export")
    # fmt: off
    parser.add_argument("checkpoint", metavar="CKPT", help="checkpoint of any stage")
    parser.add_argument("out", metavar="OUT", type=Path, help="file to write")
    add_network_flags(parser)  # the formats published and network have both classifiers
    parser.add_argument("--format", default="torchvision", choices=("torchvision", "onnx", "published", "network"),
        help="see above (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    # fmt: on
    return parser


def plain_network(model, arch: str, classifier: str) -> nn.Module:
    """Backbone and linear classifier `fc` of a network of any stage, one module from images to logits, in eval mode.

    It is a copy: the network stays as it is. For torchvision's archs it is torchvision's network. The scales s of stage
    II are folded in: (W h + b) * s = (s W) h + s b.
    """
    model = copy.deepcopy(model)
    backbone = model.get_submodule(model.backbone.rstrip("."))
    fc = model.classifier_kd if classifier == "soft" else model.get_submodule(model.linear.rstrip("."))
    if not (isinstance(fc, nn.Linear) and isinstance(model.classifier, nn.Linear | LWS)):
        raise UserError(f"--format: the classifier of stage {model.number} is no linear layer; take --format network")
    if isinstance(model.classifier, LWS):
        with torch.no_grad():
            fc.weight *= model.classifier.scales[:, None]
            fc.bias *= model.classifier.scales
    if arch in TORCHVISION:
        network = backbone
        network.fc = fc
    else:
        network = nn.Sequential(OrderedDict(backbone=backbone, fc=fc))
    return network.requires_grad_(False).eval()


def preprocessing(transform) -> dict:
    """What models.load's transform does, in this order, as docs/usage.md explains it."""
    steps = {type(step).__name__: step.size for step in transform.view.transforms if hasattr(step, "size")}
    return {
        "color": "RGB",
        "resize": steps.get("Resize", [transform.size, transform.size]),
        "interpolation": "bilinear",
        "antialias": True,
        "center_crop": transform.size if "CenterCrop" in steps else None,
        "scale": 1 / 255,
        "mean": transform.mean,
        "std": transform.std,
        "layout": "NCHW",
    }


def onnx_model(network: nn.Module, transform, classes) -> bytes:
    """An ONNX file of a network with the input `images` and the output `logits`, for any batch size.

    transform, classes: models.load's; they are in its metadata as JSON (image_size, mean, std, classes). Raises
    UserError if a package is missing.
    """
    with optional_package("--format onnx", "onnx onnxscript"):
        import onnx
        import onnxscript  # noqa: F401
    values = {"image_size": transform.size, "mean": transform.mean, "std": transform.std, "classes": classes}
    values |= {"preprocessing": preprocessing(transform)}
    example = torch.zeros(2, 3, transform.size, transform.size)  # a batch of one would be taken as fixed
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    too_old = optional_package("--format onnx", "onnx onnxscript", (ImportError, AttributeError))
    with too_old, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are about PyTorch's own code
        program = torch.onnx.export(
            network, (example,), dynamo=True, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},), verbose=False,
        )  # fmt: skip
        proto = program.model_proto
        onnx.helper.set_model_props(proto, {name: json.dumps(value) for name, value in values.items()})
    return proto.SerializeToString()


def published_content(loaded: LoadedCheckpoint) -> dict:
    """What the published scripts read from a checkpoint; their label queue is float32.

    Raises UserError if the checkpoint has no optimizer.
    """
    content = loaded.content
    if not isinstance(content.get("optimizer"), dict):
        raise UserError(f"{loaded.path}: has no optimizer, which --format published needs; use another checkpoint")
    state_dict = {f"module.{name}": value for name, value in loaded.state_dict.items()}
    if "module.label_queue" in state_dict:
        state_dict["module.label_queue"] = state_dict["module.label_queue"].float()
    return {
        "epoch": content.get("epoch", 0),
        "arch": loaded.inferred["arch"],
        "state_dict": state_dict,
        "best_acc1": torch.tensor(content.get("best_acc1", 0.0)),
        "optimizer": content["optimizer"],
    }


def check_out(args, arch: str):
    """Raises UserError if OUT cannot be written, exists and may not be replaced, or is not of the format."""
    out = args.out
    file_format = args.format
    if file_format == "torchvision" and arch not in TORCHVISION:
        raise UserError(f"--format torchvision: {arch} is not one of torchvision's ResNets; use --format onnx")
    if file_format != "onnx" and out.suffix == ".onnx":
        raise UserError(f"{out}: --format {file_format} writes no ONNX; add --format onnx, or name another file")
    if out.is_dir() or not out.parent.is_dir():
        problem = "is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise UserError(f"{out}: {problem}; name a file in a folder that exists")
    if lexists(out) and not args.overwrite:
        raise UserError(f"{out}: exists already; name another file, or replace it with --overwrite")
    if out.exists() and os.path.samefile(out, args.checkpoint):
        raise UserError(f"{out}: is the checkpoint itself; name another file")


def write(out, content, **options):
    """Writes bytes, or anything else by torch.save with its options. Raises UserError if that fails."""
    with name_failure(out, "nothing was changed"), atomic_write(out) as file:
        if isinstance(content, bytes):
            file.write(content)
        else:
            torch.save(content, file, **options)


def run(args):
    """Writes the file, and prints what its network takes."""
    if args.format in WHOLE and "classifier" in args.given:
        raise UserError(f"--classifier: --format {args.format} keeps the whole network; leave it out")
    if args.format not in ("onnx", "network") and args.classes:
        raise UserError(f"--classes: a file of --format {args.format} has no names of classes; leave it out")
    model, loaded = load_network(args.checkpoint, args.classifier, args.classes)
    arch = loaded.inferred["arch"]
    classes = loaded.inferred["num_classes"]
    view = model.transform
    check_out(args, arch)
    if args.format == "published":
        write(args.out, published_content(loaded), _use_new_zipfile_serialization=False)
    elif args.format == "network":
        content = {name: value for name, value in loaded.content.items() if name in OF_NETWORK}
        write(args.out, content | {"classes": model.classes})
    else:
        network = plain_network(model, arch, model.preferred)
        onnx = args.format == "onnx"
        write(args.out, onnx_model(network, view, model.classes) if onnx else dict(network.state_dict()))
    head = f", {model.preferred} classifier" if len(model.classifiers) > 1 and args.format not in WHOLE else ""
    print(f"{args.out}: {arch}{head}, {classes} classes; RGB, {view.size} pixels, mean {view.mean}, std {view.std}")
    if args.format == "torchvision":
        load = f"torch.load({str(args.out)!r})"
        print(f"torchvision.models.get_model({arch!r}, num_classes={classes}).load_state_dict({load})")


def main(argv=None) -> int:
    """Returns the exit status: 0, or 2 after a mistake that one line on stderr names."""
    return run_command(run, get_parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
