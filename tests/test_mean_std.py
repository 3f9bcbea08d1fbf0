"""--mean and --std reach training, evaluation and checkpoints."""

import pytest
import torch

import models
import ssd_stage_i
from datasets.loaders import to_device
from models.preprocess import MEAN, STD, normalize
from tests.helpers import LAST, call, log_of, results_of, source, train

FLAGS = ["--mean", "0.5", "0.4", "0.3", "--std", "0.3", "0.2", "0.1"]


@pytest.mark.parametrize("as_floats", [False, True])
def test_normalize_subtracts_the_mean_and_divides_by_the_standard_deviation(as_floats):
    images = torch.randint(0, 256, (4, 3, 5, 6), dtype=torch.uint8)
    mean, std = [0.5, 0.25, 0.0], (0.5, 0.1, 2)
    given = images.float() / 255 if as_floats else images
    found = to_device(given, torch.device("cpu"), mean=mean, std=std)
    for channel in range(3):
        expected = (images[:, channel].double() / 255 - mean[channel]) / std[channel]
        torch.testing.assert_close(found[:, channel].double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(normalize(images), normalize(images, list(MEAN), list(STD)))
    assert torch.equal(normalize(images)[0], normalize(images[0]))


def test_mean_and_std_reach_training_and_evaluation(plain_tree, tmp_path):
    plain = ["--kd-weight", 0, "--epochs", 1]
    default = train("iii", plain_tree, tmp_path / "default", *plain)
    other = train("iii", plain_tree, tmp_path / "other", *plain, *FLAGS)
    assert log_of(default)[0]["loss"] != log_of(other)[0]["loss"]
    assert models.load(other / LAST).transform.std == (0.3, 0.2, 0.1)
    resumed = ["--resume", other / LAST, "--evaluate", "-j", 0, "--device", "cpu", plain_tree]
    outcome = call("iii", ["--output_dir", tmp_path / "as saved", *resumed])
    assert outcome.status == 0 and "--mean 0.5 0.4 0.3" in outcome.out
    outcome = call("iii", ["--output_dir", tmp_path / "given", "--mean", 0, 0, 0, "--std", 1, 1, 1, *resumed])
    assert outcome.status == 0 and "warning: --mean 0.0 0.0 0.0" in outcome.out
    assert results_of(tmp_path / "as saved") == results_of(other) != results_of(tmp_path / "given")


def test_the_next_stage_takes_mean_and_std_from_its_checkpoint(plain_tree, tmp_path):
    i = train("i", plain_tree, tmp_path / "i", *FLAGS, "--epochs", 1, "--con-weight", 0)
    train("ii", plain_tree, tmp_path / "ii", *source("ii", {"i": i}), "--epochs", 1)
    assert models.load(tmp_path / "ii" / LAST).transform.mean == (0.5, 0.4, 0.3)


def test_mean_and_std_are_parsed_as_three_numbers(tmp_path):
    parse = ssd_stage_i.get_parser().parse_args
    assert (parse([str(tmp_path)]).mean, parse([str(tmp_path)]).std) == (list(MEAN), list(STD))
    args = parse([*FLAGS, str(tmp_path)])
    assert (args.mean, args.std, args.data) == ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1], str(tmp_path))
