"""--pretrained: the weights that the backbone of stage I, or of stage III's student, starts from."""

import os
from http.client import HTTPException

import torch
import torchvision

import models
from models import backbones
from models.backbones import infer_arch
from models.state_dicts import check_weights, find_mismatch, strip_module, strip_prefix

from .checkpoint import bring_back, read_weights
from .command_line import IDENTITY, RUN_ONLY, add_flag, non_empty
from .distributed import get_dist_info, is_main_process, print_main, raise_on_all_ranks
from .errors import UserError, one_line

TORCHVISION = "torchvision"  # the value that means torchvision's default weights


def add_pretrained_flag(group):
    """Adds --pretrained to a group of flags."""
    # fmt: off
    add_flag(group, "--pretrained", RUN_ONLY, IDENTITY, nargs="?", const=TORCHVISION, type=non_empty, metavar="PATH",
        help="start the backbone from PATH, a torchvision state dict or a checkpoint of any stage, or, without PATH, "
        "from torchvision's default weights for --arch, which are downloaded; a folder after --pretrained is taken "
        f"for DIR, and '--pretrained {TORCHVISION}' always means the download (default: off)")
    add_flag(group, "--no-pretrained", RUN_ONLY, IDENTITY, action="store_const", const=None, dest="pretrained",
        help="start from random weights, after a recipe with --pretrained")
    # fmt: on


def load_backbone(pretrained: str | None, arch: str, image_size: int) -> dict | None:
    """The state dict of the backbone that --pretrained names, without a classifier; None without the flag.

    On every node the first process downloads torchvision's weights, if they are not in its cache yet. Raises UserError,
    on all ranks, if they cannot be obtained or do not fit the arch.
    """
    if pretrained is None:
        return None
    with raise_on_all_ranks():
        wanted = get_dist_info().local_rank == 0
        file = download(arch, wanted) if pretrained == TORCHVISION else pretrained
    bring_back(file)
    with raise_on_all_ranks():
        state_dict = read_backbone(file, arch, image_size)
    print_main(f"the backbone starts from {file}")
    return state_dict


def download(arch: str, wanted: bool = True) -> str:
    """The file of torchvision's default weights in torch's cache, downloaded if it is not there and wanted.

    Raises UserError if there are none for arch, or if the download fails.
    """
    if arch not in backbones.TORCHVISION:
        raise UserError(f"--pretrained: there is no download for {arch}; add a file's PATH, or change --arch")
    url = torchvision.models.get_model_weights(arch).DEFAULT.url
    folder = os.path.join(torch.hub.get_dir(), "checkpoints")  # where torchvision's get_model looks too
    file = os.path.join(folder, os.path.basename(url))
    if wanted and not os.path.exists(file):
        print_main(f"downloading {url} to {file}")
        try:
            os.makedirs(folder, exist_ok=True)
            checksum = torch.hub.HASH_REGEX.search(os.path.basename(url))
            torch.hub.download_url_to_file(url, file, checksum and checksum[1], progress=is_main_process())
        except (OSError, HTTPException, RuntimeError) as error:  # no network, no space; another checksum
            reason = one_line(getattr(error, "reason", None) or error)
            raise UserError(f"--pretrained: {url} cannot be downloaded ({reason}); put it at {file}") from None
    return file


def read_backbone(file, arch: str, image_size: int = 224) -> dict:
    """The weights of a backbone in a file: a torchvision state dict, or a checkpoint of any stage.

    Raises UserError, in one line, if the file cannot be read or its weights are not those of arch.
    """
    state_dict = read_weights(file, "--pretrained")["state_dict"]
    with torch.device("meta"):
        backbone = models.build_backbone(arch, image_size)
    entries, prefix = backbone_entries(file, state_dict, list(backbone.state_dict()))
    found = infer_arch(entries, image_size)
    if found not in (arch, None):
        raise UserError(f"{file}: its backbone is {found}, not {arch}; correct --arch or --pretrained")
    for name, buffer in backbone.named_buffers():  # files from before PyTorch 0.4.1 have no counters
        if name.endswith("num_batches_tracked"):
            entries.setdefault(name, torch.zeros(buffer.shape, dtype=torch.long))
    if problem := find_mismatch(backbone, entries):
        names = f"{prefix}{problem}; its names are such as {min(state_dict, default='none')}"
        raise UserError(f"{file}: does not fit {arch}: {names}; correct --arch or --pretrained")
    try:
        check_weights(entries, backbone)
    except ValueError as error:
        raise UserError(f"{file}: {error}; correct --pretrained") from None
    return entries


def backbone_entries(file, state_dict: dict, expected: list[str]) -> tuple[dict, str]:
    """The backbone's entries in a state dict, without classifier, and the prefix that they had.

    In a file of another program the prefix is the one below which most of the expected names are; of several, as in
    MoCo's files, that of the query encoder. Raises UserError if that leaves more than one.
    """
    state_dict = strip_module(state_dict)
    if found := models.infer_stage_and_arch(state_dict):
        prefix = models.STAGES[found["stage"]].backbone
        return strip_prefix(state_dict, prefix), prefix
    prefixes = ["", *(name[: -len(expected[0])] for name in sorted(state_dict) if name.endswith(f".{expected[0]}"))]
    counts = [sum(prefix + name in state_dict for name in expected) for prefix in prefixes]
    best = [prefix for prefix, count in zip(prefixes, counts, strict=True) if count == max(counts)]
    best = [prefix for prefix in best if prefix.endswith("encoder_q.")] or best
    if len(best) > 1:
        names = " and ".join(best)
        raise UserError(f"{file}: holds several backbones, below {names}; save one alone, or correct --pretrained")
    parts = {name.partition(".")[0] for name in expected}  # besides there may be heads, counters and other networks
    entries = strip_prefix(state_dict, best[0]).items()
    return {name: value for name, value in entries if name.partition(".")[0] in parts}, best[0]
