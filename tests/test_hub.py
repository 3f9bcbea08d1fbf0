"""hubconf.py: torch.hub loads networks from a clone, and leaves the names models, datasets and utils to the user."""

import hashlib
import shutil
import subprocess
import sys

import pytest
import torch
from PIL import Image

import models
from tests.helpers import LAST, ROOT, STAGES, same

OWN = ("models", "datasets", "utils")
LOAD = 'network = torch.hub.load(REPO, "ssd_lt_cifar100_resnet32", source="local")\n'
IMPORT = "import models, datasets, utils, datasets.arrow\n"
CHECK = """
assert [package.OWNER for package in (models, datasets, utils, datasets.arrow)] == ["user"] * 4
assert type(network).__name__ == "SDL"
hard, soft = network(torch.zeros(2, 3, 32, 32))
assert hard.shape == soft.shape == (2, 6)
assert [name for name in sys.modules if name in ("models.ssd", "datasets.splits", "utils.errors")] == []
assert REPO not in sys.path
"""


def load(repo, *words, **options):
    return torch.hub.load(str(repo), *words, source="local", **options)


@pytest.fixture(scope="module")
def clone(trained, tmp_path_factory):
    """A clone in which a checkpoint of stage III is released."""
    repo = tmp_path_factory.mktemp("clone")
    shutil.copy(ROOT / "hubconf.py", repo)
    for name in OWN:
        shutil.copytree(ROOT / name, repo / name, ignore=shutil.ignore_patterns("__pycache__"))
    released = repo / "weights" / "cifar100_lt"
    released.mkdir(parents=True)
    shutil.copy(trained["iii"] / LAST, released / "stage_iii.pth.tar")
    return repo


@pytest.mark.parametrize("lines", [IMPORT + LOAD, LOAD + LOAD + IMPORT], ids=["before", "after and twice"])
def test_the_users_own_packages_stay_what_they_are(lines, clone, tmp_path):
    for name in OWN:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("OWNER = 'user'\n")
    (tmp_path / "datasets" / "arrow.py").write_text("OWNER = 'user'\n")
    code = f"import sys, torch\nREPO = {str(clone)!r}\n{lines}{CHECK}"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_import_that_failed_can_be_repeated(clone, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("ssd_lt_models_")]:
        monkeypatch.delitem(sys.modules, name)
    with monkeypatch.context() as patch, pytest.raises(ImportError):
        patch.setitem(sys.modules, "torchvision.models.resnet", None)
        load(clone, "ssd_lt_untrained", "iii", "resnet8", 7)
    load(clone, "ssd_lt_untrained", "iii", "resnet8", 7)


@pytest.mark.parametrize("stage", STAGES)
def test_a_checkpoint_gives_the_network_that_models_load_gives(stage, trained, clone):
    expected = models.load(trained[stage] / LAST)
    network = load(clone, "ssd_lt", checkpoint=trained[stage] / LAST)
    assert same(dict(network.state_dict()), dict(expected.state_dict())) and not network.training
    image = network.transform(Image.new("RGB", (40, 50), "red"))
    assert torch.equal(image, expected.transform(Image.new("RGB", (40, 50), "red")))
    assert network.classes == expected.classes


def test_a_url_is_downloaded_once_and_distinguished_from_others_of_the_same_name(trained, clone, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "hub"))
    for stage in ("i", "ii"):
        file = tmp_path / stage / LAST
        file.parent.mkdir()
        shutil.copy(trained[stage] / LAST, file)
        for _ in range(2):
            assert type(load(clone, "ssd_lt", f"file://{file}")).__name__ == models.STAGES[stage].__name__
            file.unlink(missing_ok=True)


@pytest.mark.parametrize(("name", "stage"), [("stage_ii", "ii"), ("stage_iii", "iii"), ("stage_iii_tuned", "ii")])
def test_a_released_checkpoint_is_the_one_of_its_readme(name, stage):
    file = ROOT / "weights" / "cifar100_lt" / f"{name}.pth.tar"
    assert hashlib.sha256(file.read_bytes()).hexdigest() in (ROOT / "weights" / "README.md").read_text()
    network = load(ROOT, "ssd_lt_cifar100_resnet32", name)
    assert type(network).__name__ == models.STAGES[stage].__name__ and network.transform.size == 32
    assert len(network.classes) == 100 and network.classes[0] == "apple"
    logits = network.classify(torch.zeros(1, 3, 32, 32))
    assert logits.shape == (1, 100) and logits.isfinite().all()


def test_a_checkpoint_that_is_not_released_is_named_in_one_line(clone):
    with pytest.raises(FileNotFoundError) as caught:
        load(clone, "ssd_lt_cifar100_resnet32", "stage_iv")
    message = str(caught.value)
    assert "\n" not in message and "stage_iv.pth.tar" in message and "weights/README.md" in message


@pytest.mark.parametrize("stage", STAGES)
def test_untrained_networks_by_stage_and_arch(stage, clone):
    options = {"queue_size": 16} if stage == "i" else {}
    network = load(clone, "ssd_lt_untrained", stage, "resnet8", 7, **options)
    assert type(network).__name__ == models.STAGES[stage].__name__
    found = network.eval()(torch.zeros(1, 3, 32, 32))
    assert all(logits.shape == (1, 7) for logits in (found if isinstance(found, tuple) else (found,)))


def test_the_dependencies_are_those_of_models():
    hub = torch.hub._import_module("hubconf", str(ROOT / "hubconf.py"))
    imported = {
        line.split()[1].split(".")[0]
        for file in (ROOT / "models").glob("*.py")
        for line in file.read_text().splitlines()
        if line.startswith(("import ", "from ")) and " ." not in line
    }
    assert imported - set(sys.stdlib_module_names) - {"PIL"} == set(hub.dependencies)  # PIL is torchvision's
