"""What a run folder keeps: of a finished run, of a resumed one, and when a run starts over."""

import json
import shutil

from datasets import splits
from tests.helpers import LAST, log_of, results_of, run_stage, train
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


def test_a_resumed_stage_ii_still_names_the_stage_i_that_it_started_from(trained, plain_tree, tmp_path):
    folder = copied(trained["tuned"], tmp_path / "tuned")
    outcome = run_stage("ii", plain_tree, folder, "--cos", "--epochs", 3, "--resume", "auto")
    assert outcome.status == 0, outcome.err
    assert args_of(folder)["last_stage_ckpt"] == str(trained["iii"] / LAST)
    assert "next:\n  python -m utils.report" in outcome.out  # and not stage III, of which it is the end


def test_the_results_of_fewer_epochs_are_removed_as_a_run_continues(trained, plain_tree, tmp_path):
    folder = copied(trained["i"], tmp_path / "i")
    outcome = run_stage("i", plain_tree, folder, "--epochs", 3, "--resume", "auto", "--lr", "1e6")  # not finite
    assert outcome.status == 2 and not (folder / "results.json").exists()


def test_a_run_that_starts_from_another_folder_s_checkpoint_keeps_no_line_of_the_earlier_run(
    trained, plain_tree, tmp_path
):
    folder = copied(trained["i"], tmp_path / "i")
    train("i", plain_tree, folder, "--cos", "--epochs", 3, "--resume", trained["i"] / LAST, "--overwrite")
    assert [record["epoch"] for record in log_of(folder)] == [2]


def test_a_run_needs_no_git(trained, plain_tree, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert args_of(train("i", plain_tree, tmp_path / "i", "--epochs", 1))["environment"]["commit"] is None


def test_an_evaluation_looks_for_no_training_image(trained, plain_tree, tmp_path, monkeypatch):
    looked_for, find_layout = [], splits.find_layout

    def noting(index, root, split, progress):
        looked_for.append(split)
        return find_layout(index, root, split, progress)

    monkeypatch.setattr(splits, "find_layout", noting)
    train("i", plain_tree, tmp_path / "evaluation", "--evaluate", "--resume", trained["i"] / LAST)
    assert looked_for == ["test"]


def test_epochs_are_checked_if_nothing_is_resumed_after_all(plain_tree, tmp_path):
    flags = ["--resume", "auto", "--epochs", 2, "--warmup-epochs", 2]
    assert_mistake(run_stage("i", plain_tree, tmp_path / "run", *flags), "--warmup-epochs 2", "--epochs 2")


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
