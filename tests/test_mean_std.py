"""--mean and --std reach training, evaluation and checkpoints."""

import pytest
import torch

import models
import ssd_stage_i
from datasets.loaders import to_device
from models.preprocess import MEAN, STD, normalize
from tests.helpers import LAST, assert_mistake, call, log_of, results_of, run_stage, source, train

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


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--mean 0.5 0.5 1.5", ["--mean 1.5", "at most 1"]),
        ("--mean 0.5 0.5 -0.1", ["--mean", "-0.1"]),
        ("--mean 0.5 0.5 nan", ["--mean nan"]),
        ("--std 0.5 0.5 0", ["--std 0", "above 0"]),
        ("--std 0.5 0.5 1e-9", ["--std 1e-9"]),
        ("--std 0.5 0.5 inf", ["--std inf"]),
        ("--mean 0.5", ["--mean"]),
        ("--std 0.5 0.5", ["--std"]),
    ],
)
def test_invalid_values_of_mean_and_std_are_refused(tmp_path, flags, words):
    assert_mistake(call("i", [*flags.split(), tmp_path]), *words)


def test_mean_and_std_are_parsed_as_three_numbers(tmp_path):
    parse = ssd_stage_i.get_parser().parse_args
    assert (parse([str(tmp_path)]).mean, parse([str(tmp_path)]).std) == (list(MEAN), list(STD))
    args = parse([*FLAGS, str(tmp_path)])
    assert (args.mean, args.std, args.data) == ([0.5, 0.4, 0.3], [0.3, 0.2, 0.1], str(tmp_path))


@pytest.mark.parametrize("mean", [[0.5, 0.5], 0.5, [0.5, 0.5, 3.0], [0.5, 0.5, "x"]])
def test_a_checkpoint_with_an_invalid_mean_is_refused(trained, plain_tree, tmp_path, mean):
    content = torch.load(trained["ii"] / LAST, weights_only=True)
    file = tmp_path / "file"
    torch.save(content | {"args": content["args"] | {"mean": mean}}, file)
    assert_mistake(run_stage("ii", plain_tree, tmp_path / "run", "--resume", file), file, "--mean")
