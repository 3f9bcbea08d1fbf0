"""What --resume takes from the checkpoint where the user left it open, and what is said of a difference."""

from tests.helpers import LAST, call, results_of, run_stage


def evaluate(stage, trained, data, *flags):
    return call(stage, ["--resume", trained[stage] / LAST, "--evaluate", "-j", 0, "--device", "cpu", *flags, data])


def test_backbone_size_and_queue_are_as_saved(trained, plain_tree, tmp_path):
    outcome = evaluate("i", trained, plain_tree, "--output_dir", tmp_path)
    assert (outcome.status, outcome.err) == (0, "")
    for flag in ("--arch resnet8", "--image-size 32", "--moco-k 50", "--moco-dim 16"):
        assert f"{flag}, as saved" in outcome.out
    assert results_of(tmp_path) == results_of(trained["i"])


def test_flags_that_are_given_are_held_against_the_checkpoint(trained, plain_tree):
    outcome = evaluate("iii", trained, plain_tree, "--arch", "resnet20")
    assert outcome.status == 2 and "resnet8" in outcome.err and "--arch" in outcome.err


def test_another_image_size_is_said(trained, plain_tree, tmp_path):
    note = "--image-size 24"
    assert note in evaluate("iii", trained, plain_tree, *note.split(), "--arch", "resnet8").out
    outcome = run_stage("ii", plain_tree, tmp_path, *note.split(), "--last_stage_ckpt", trained["i"] / LAST)
    assert outcome.status == 0 and f"warning: {note}" in outcome.out


def test_a_wrong_flag_is_named_and_the_right_one_suggested(plain_tree):
    outcome = call("i", ["--moco-kk", "24", plain_tree])
    assert outcome.status == 2
    assert "--moco-kk; did you mean --moco-k?" in outcome.err and str(plain_tree) not in outcome.err


def test_processes_that_nothing_would_start_are_refused(plain_tree):
    outcome = call("i", ["--nproc", 2, plain_tree])
    assert outcome.status == 2 and "--multiprocessing-distributed" in outcome.err
