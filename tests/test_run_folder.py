"""What a run folder keeps: of a finished run, of a resumed one, and when a run starts over."""

import json
import shutil

from tests.helpers import LAST, results_of, run_stage, train
from tests.robustness.test_mistakes import assert_mistake


def args_of(folder) -> dict:
    return json.loads((folder / "args.json").read_text())


def copied(run, to):
    shutil.copytree(run, to)
    return to


def test_a_resumed_run_still_names_the_checkpoint_that_it_started_from(trained, plain_tree, tmp_path):
    folder = copied(trained["iii"], tmp_path / "iii")
    train("iii", plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto")
    args = args_of(folder)
    assert args["teacher_ckpt"] == args_of(trained["iii"])["teacher_ckpt"] == str(trained["ii"] / LAST)
    assert (args["epochs"], args_of(trained["iii"])["epochs"]) == (3, 2)


def test_a_damaged_args_json_does_not_keep_a_run_from_being_resumed(trained, plain_tree, tmp_path):
    folder = copied(trained["iii"], tmp_path / "iii")
    (folder / "args.json").write_text("{")
    train("iii", plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto")
    assert args_of(folder)["epochs"] == 3


def test_resuming_a_finished_run_keeps_its_arguments(trained, plain_tree, tmp_path):
    folder = copied(trained["i"], tmp_path / "i")
    train("i", plain_tree, folder, "--cos", "--lr", 9, "--moco-m", 0.9, "--resume", "auto")
    assert args_of(folder) == args_of(trained["i"]) and results_of(folder) == results_of(trained["i"])


def test_starting_over_removes_the_results_of_the_earlier_run(trained, plain_tree, tmp_path):
    folder = copied(trained["i"], tmp_path / "i")
    outcome = run_stage("i", plain_tree, folder, "--overwrite", "--lr", "1e6")  # its loss is not finite
    assert outcome.status == 2 and not (folder / "results.json").exists()


def test_an_evaluation_does_not_replace_the_results_of_a_training(trained, plain_tree, tmp_path):
    folder = copied(trained["i"], tmp_path / "i")
    flags = ["--evaluate", "--resume", trained["i"] / LAST, "--test-list", plain_tree / "val.txt"]
    assert_mistake(run_stage("i", plain_tree, folder, *flags), str(folder), "--overwrite", "another folder")
    assert results_of(folder) == results_of(trained["i"])
    train("i", plain_tree, folder, *flags, "--overwrite")
    assert results_of(folder) != results_of(trained["i"]) and (folder / LAST).exists()


def test_the_untrained_soft_classifier_of_a_run_without_a_teacher_is_refused(trained, plain_tree, tmp_path):
    alone = train("iii", plain_tree, tmp_path / "alone", "--kd-weight", 0, "--epochs", 1)
    flags = ["--last_stage_ckpt", alone / LAST, "--classifier", "soft"]
    assert_mistake(run_stage("ii", plain_tree, tmp_path / "ii", *flags), "--classifier soft", "--kd-weight 0")


def test_the_next_command_keeps_freeze_bn(trained, plain_tree, tmp_path):
    flags = ["--freeze-bn", "--epochs", 1]
    outcome = run_stage("ii", plain_tree, tmp_path / "ii", "--last_stage_ckpt", trained["i"] / LAST, *flags)
    assert "--freeze-bn" in outcome.out.split("next:")[1]
