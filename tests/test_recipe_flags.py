"""The flags that recipes use: warm-up and schedule, validation every N epochs, strength of the jitter."""

import numpy as np
import pytest
import torch
from PIL import Image

import ssd_stage_i
from datasets.device_augment import to_float
from datasets.transforms import Views
from tests.helpers import BEST, LAST, assert_mistake, call, checkpoint, log_of, results_of, same, train
from utils.train_state import learning_rate

# ---- warm-up and schedule

RATES = [  # of lr 0.8 in 8 epochs
    ("--schedule 3 6", [0.8] * 3 + [0.08] * 3 + [0.008] * 2),
    ("--schedule 3 6 --schedule-factor 0.5", [0.8] * 3 + [0.4] * 3 + [0.2] * 2),
    ("--schedule 3 --warmup-epochs 4", [0.2, 0.4, 0.6, 0.8, 0.08, 0.08, 0.08, 0.08]),  # the warm-up comes first
    ("--cos", [0.8, 0.7695518, 0.6828427, 0.5530734, 0.4, 0.2469266, 0.1171573, 0.0304482]),
    ("--cos --warmup-epochs 4", [0.2, 0.4, 0.6, 0.8, 0.8, 0.6828427, 0.4, 0.1171573]),
    ("--cos --warmup-epochs 1", [0.8, 0.8, 0.7603875, 0.6493959, 0.4890084, 0.3109916, 0.1506041, 0.0396125]),
]


@pytest.mark.parametrize(("flags", "rates"), RATES)
def test_warmup_and_schedule_give_these_rates(flags, rates, tmp_path):
    parser = ssd_stage_i.get_parser()
    args = parser.parse_args([str(tmp_path), "--lr", "0.8", "--epochs", "8", *flags.split()])
    assert [learning_rate(epoch, args) for epoch in range(8)] == pytest.approx(rates, rel=1e-5)


def test_the_warmup_of_a_resumed_run_is_held_against_its_own_epochs(plain_tree, tmp_path):
    folder = train("i", plain_tree, tmp_path / "run", "--con-weight", 0, "--epochs", 1)
    flags = ["--resume", folder / LAST, "--warmup-epochs", 1]
    given = [plain_tree, "-j", 0, "--device", "cpu", "--output_dir", folder, "--arch", "resnet8", *flags]
    assert_mistake(call("i", given), "--warmup-epochs 1", "below --epochs 1")  # not the default of 135


def test_a_training_uses_the_warmup_and_eval_freq_validates_every_n_epochs_and_after_the_last(plain_tree, tmp_path):
    flags = ["--cos", "--warmup-epochs", 2, "--con-weight", 0, "--epochs", 5]
    every_epoch = train("i", plain_tree, tmp_path / "every", *flags)
    every_second = train("i", plain_tree, tmp_path / "second", *flags, "--eval-freq", 2)
    assert [record["lr"] for record in log_of(every_epoch)] == pytest.approx([0.05, 0.1, 0.1, 0.075, 0.025])
    validated = [bool(record["val"]) for record in log_of(every_second)]
    assert validated == [False, True, False, True, True]
    for one, other, due in zip(log_of(every_epoch), log_of(every_second), validated, strict=True):
        assert not due or one["val"] == other["val"]
        assert one["loss"] == other["loss"]
    assert same(checkpoint(every_epoch)["state_dict"], checkpoint(every_second)["state_dict"])
    assert results_of(every_epoch) == results_of(every_second)
    means = {r["epoch"] + 1: r["val"]["linear"]["class_mean"] for r in log_of(every_second) if r["val"]}
    best = checkpoint(every_second, BEST)
    assert best["epoch"] == min(epoch for epoch in means if means[epoch] == max(means.values()))
    assert float(checkpoint(every_second)["best_acc1"]) == max(means.values())


# ---- --jitter


@pytest.mark.parametrize("augment", ["pil", "device"])
def test_without_jitter_the_query_view_only_crops_and_flips(augment):
    """Each of its pixels has a color that the image has, or the black of the padding."""
    image = Image.fromarray(np.full((32, 32, 3), (10, 120, 240), dtype=np.uint8))
    views = Views(("query",), 32, 0, augment, jitter=0)
    for index in range(20):
        (view,) = views(image, (0, index, 0))
        if augment == "device":
            view = to_float(view[0][None], view[1][None])[0].mul(255).round()
        colors = {tuple(color) for color in view.flatten(1).T.tolist()}
        assert colors <= {(10, 120, 240), (0, 0, 0)}


def test_the_strength_of_the_jitter_is_that_of_the_query_view_alone():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8))
    weak, strong = (Views(("query", "key"), 32, 0, jitter=strength) for strength in (0.1, 0.9))
    (query_1, key_1), (query_2, key_2) = (views(picture, (0, 3, 0)) for views in (weak, strong))
    assert torch.equal(key_1, key_2) and not torch.equal(query_1, query_2)


def test_the_jitter_reaches_the_training_and_comes_back_with_the_checkpoint(plain_tree, tmp_path):
    flags = ["--con-weight", 0, "--epochs", 1]
    default = train("i", plain_tree, tmp_path / "default", *flags)
    none = train("i", plain_tree, tmp_path / "none", *flags, "--jitter", 0)
    assert log_of(default)[0]["loss"] != log_of(none)[0]["loss"]
    assert checkpoint(none)["args"]["jitter"] == 0
