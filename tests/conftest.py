"""Trees and trained stages that the tests share; one thread, so that sums are always in the same order."""

import os
import sys

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
os.environ["no_proxy"] = os.environ["NO_PROXY"] = "127.0.0.1"  # local servers are reached without a proxy

import pytest
import torch

try:
    from hypothesis import HealthCheck, settings
except ImportError:  # tests/test_gpu.py needs torch, torchvision and pytest only
    settings = None

from tests.helpers import PARSERS, ROOT, train_all, train_ranks, write_tree
from utils.launch.rendezvous import detect_launcher

for name in [name for name in os.environ if name.startswith(("SLURM_", "TORCHELASTIC_"))]:
    del os.environ[name]  # set by the job that the tests run in
torch.set_num_threads(1)
if settings:
    settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("any machine")


@pytest.fixture(autouse=True)
def default_numerics():
    """Undoes what earlier tests' runs set in this process: with deterministic algorithms, the host waits for a GPU."""
    if torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.deterministic = torch.backends.cudnn.benchmark = False
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture
def interface_is_chosen_by_the_run(monkeypatch):
    """Removes what the tests set for gloo, so that the run chooses as for a user."""
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


@pytest.fixture
def detect(monkeypatch):
    """detect_launcher, given flags and an environment."""

    def detected(env, *flags):
        for name in ("WORLD_SIZE", "RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        return detect_launcher(PARSERS["i"]().parse_args([*map(str, flags), "--device", "cpu", str(ROOT)]))

    return detected


@pytest.fixture(scope="session")
def plain_tree(tmp_path_factory):
    """Images of 32 pixels at the paths in the lists, as in ILSVRC2012."""
    return write_tree(tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="session")
def reorganized_tree(tmp_path_factory):
    """The same images and lists, with one folder per split."""
    return write_tree(tmp_path_factory.mktemp("reorganized"), reorganized=True)


@pytest.fixture(scope="session")
def trained(plain_tree, tmp_path_factory):
    """Folders of stages i, ii, iii and ii again (`tuned`), each on the one before; tests must not change them."""
    return train_all(plain_tree, tmp_path_factory.mktemp("trained"), "--cos")


@pytest.fixture(scope="session")
def run_of_two_processes(plain_tree, tmp_path_factory):
    """A run of two processes that was not interrupted."""
    return train_ranks("i", plain_tree, tmp_path_factory.mktemp("two") / "whole", "--cos")
