"""Trees and trained stages that the tests share, and one thread, so that sums have one order."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # whatever proxy leads out of here

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.helpers import LAST, train, write_tree
from tests.helpers_processes import TWO

for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
    del os.environ[name]  # of the job that the tests run in
torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.fixture(scope="session")
def plain_tree(tmp_path_factory):
    """Images at 32 pixels where the lists say, as in ILSVRC2012."""
    return write_tree(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def reorganised_tree(tmp_path_factory):
    """The same images and lists, in one folder a split."""
    return write_tree(tmp_path_factory.mktemp("reorganised"), reorganised=True)


@pytest.fixture(scope="session")
def jpeg_tree(tmp_path_factory):
    """Large JPEG files, few of them."""
    counts = {"train": (9, 4, 2), "val": (1, 1, 1), "test": (2, 2, 2)}
    return write_tree(tmp_path_factory.mktemp("jpeg"), counts, size=260, suffix=".JPEG")


@pytest.fixture(scope="session")
def trained(plain_tree, tmp_path_factory):
    """Run folders, not to be changed, of stages i, ii, iii and the second ii, `tuned`, each on the one before."""
    root = tmp_path_factory.mktemp("trained")
    i = train("i", plain_tree, root / "i", "--cos")
    ii = train("ii", plain_tree, root / "ii", "--cos", "--last_stage_ckpt", i / LAST)
    iii = train("iii", plain_tree, root / "iii", "--cos", "--teacher_ckpt", ii / LAST)
    tuned = train("ii", plain_tree, root / "tuned", "--cos", "--last_stage_ckpt", iii / LAST)
    return {"i": i, "ii": ii, "iii": iii, "tuned": tuned}


@pytest.fixture(scope="session")
def whole_of_two(plain_tree, tmp_path_factory):
    """A run of two processes that nothing disturbed."""
    return train("i", plain_tree, tmp_path_factory.mktemp("two") / "whole", "--cos", *TWO)
