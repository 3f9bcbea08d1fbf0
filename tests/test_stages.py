"""The stages from the command line to their files, on image trees in every layout, with every launcher."""

import inspect

import numpy as np
import pytest
import torch

from models import SDL, SLG, SSFL
from models import STAGES as NETWORKS
from models.moco import SplitBatchNorm
from models.state_dicts import strip_module, strip_prefix
from tests.helpers import (
    BEST,
    CLASSES,
    COUNTS,
    IMAGES,
    LAST,
    PARSERS,
    PREVIOUS,
    SCRIPTS,
    STAGES,
    TORCHRUN,
    TWO,
    args_of,
    call,
    checkpoint,
    log_of,
    results_of,
    run_shell,
    run_stage,
    same,
    source,
    stage_flags,
    train,
    train_ranks,
    write_tree,
)
from tests.helpers_processes import free_port
from utils import log, metrics, run_folder, train_state
from utils.arguments import settle_defaults
from utils.command_line import __version__
from utils.errors import UserError
from utils.train_state import prepare_model

CLASSIFIERS = {"i": ["linear"], "ii": ["lws"], "iii": ["hard", "soft"], "tuned": ["lws"]}
RUNS = tuple(CLASSIFIERS)
TEST_IMAGES = sum(COUNTS["test"])


EACH_RUN = pytest.mark.parametrize("run", RUNS)
EACH_STAGE = pytest.mark.parametrize("stage", STAGES)


def script(run):
    """The stage whose script made a run of the fixture `trained`."""
    return "ii" if run == "tuned" else run


def weights_of(folder):
    return strip_module(checkpoint(folder)["state_dict"])


# ---- layouts, and prepared data


def test_a_list_given_by_flag_comes_first_and_classes_may_be_more_than_in_the_lists(plain_tree, tmp_path):
    lines = (plain_tree / "train.txt").read_text().splitlines(keepends=True)
    (tmp_path / "half.txt").write_text("".join(lines[::2]))
    flags = ["--epochs", 1, "--train-list", tmp_path / "half.txt", "--num-classes", 8]
    (result,) = results_of(train("i", plain_tree, tmp_path / "i", *flags))
    assert sum(result["train_counts"]) == -(-IMAGES // 2) and result["train_counts"][6:] == [0, 0]
    assert result["per_class"][6:] == [None, None]


def test_all_stages_train_on_large_jpegs(tmp_path):
    counts = {"train": (9, 4, 2), "val": (1, 1, 1), "test": (2, 2, 2)}
    data = write_tree(tmp_path / "data", counts, size=260, suffix=".JPEG")
    small, folders = ["--arch", "resnet18", "--image-size", 224, "-b", 4, "--epochs", 1], {}
    for stage in STAGES:
        folders[stage] = tmp_path / stage
        start = run_shell if stage == "i" else run_stage
        outcome = start(stage, data, folders[stage], *small, *source(stage, folders))
        assert (outcome.status, outcome.err) == (0, "")
        results = [(record["classifier"], record["count"]) for record in results_of(folders[stage])]
        assert results == [(name, 6) for name in CLASSIFIERS[stage]]


# ---- what a run leaves behind


@EACH_RUN
def test_results_json_has_one_record_per_classifier_with_exact_counts(trained, run):
    records = results_of(trained[run])
    assert [record["classifier"] for record in records] == CLASSIFIERS[run]
    for record in records:
        assert record["phase"] == "test" and record["count"] == TEST_IMAGES
        assert record["train_counts"] == list(COUNTS["train"])
        assert all(0 <= record[name] <= 1 for name in ("overall", "top5", "many", "medium", "few"))
        assert record["class_mean"] == record["overall"] == pytest.approx(np.mean(record["per_class"]))  # balanced
        assert record["test_counts"] == list(COUNTS["test"]) and record["classes"] is None
        assert np.sum(record["confusion"], axis=1).tolist() == record["test_counts"]
        assert record["many"] == record["per_class"][0] and record["medium"] == record["per_class"][1]
        assert np.sum(record["confusion_groups"], axis=1).tolist() == [5, 5, 20]


@EACH_RUN
def test_log_txt_has_one_record_per_epoch_with_losses_and_accuracies(trained, run):
    parts = {"i": ["cross_entropy", "contrastive"], "ii": [], "iii": ["cross_entropy", "distillation"]}[script(run)]
    accuracies = [f"{top}_{name}" for name in CLASSIFIERS[run] for top in ("top1", "top5")]
    records = log_of(trained[run])
    assert [record["epoch"] for record in records] == [0, 1]
    lr = {"i": 0.1, "ii": 0.2, "iii": 0.1}[script(run)]
    assert [record["lr"] for record in records] == pytest.approx([lr, lr / 2])  # half a cosine over two epochs
    for record in records:
        assert list(record["val"]) == CLASSIFIERS[run]
        for accuracy in record["val"].values():
            assert accuracy.keys() >= {"overall", "class_mean", "top5", "many", "medium", "few"}
        assert all(record[name] > 0 for name in ["loss", *parts, "images_per_second", "seconds"])
        if parts:
            assert record["loss"] == pytest.approx(sum(record[name] for name in parts), rel=1e-5)
        assert all(0 <= record[name] <= 1 for name in accuracies)


def test_stages_i_and_iii_learn_more_than_class_frequencies(trained):
    """They beat the class frequencies. (Stage I's loss may rise nevertheless: the queue fills with negatives.)"""
    shares = np.array(COUNTS["train"]) / IMAGES
    for run in ("i", "iii"):
        _, second = log_of(trained[run])
        assert second["cross_entropy"] < -np.sum(shares * np.log(shares))
        assert second[f"top1_{CLASSIFIERS[run][0]}"] > shares.max()


@EACH_RUN
def test_args_json_has_the_arguments_and_versions(trained, plain_tree, run):
    kept = args_of(trained[run])
    assert kept["data"] == str(plain_tree) and kept["output_dir"] == str(trained[run])
    assert (kept["num_classes"], kept["seed"], kept["batch_size"], kept["lr"]) == (
        CLASSES, 3, 16, 0.2 if script(run) == "ii" else 0.1,
    )  # fmt: skip
    versions = kept["environment"]
    assert (versions["torch"], versions["version"]) == (torch.__version__, __version__)
    assert versions.keys() >= {"commit", "python", "torchvision"}


NAMES = {
    "i": ("encoder_q", "encoder_k", "q_fc", "k_fc", "classifier", "queue", "label_queue", "queue_ptr"),
    "ii": ("encoder", "classifier"),
    "iii": ("encoder_q", "encoder_t", "classifier", "classifier_kd", "classifier_t"),
}


@EACH_RUN
def test_checkpoints_have_the_published_entries_and_the_best_class_mean(trained, run):
    saved = checkpoint(trained[run])  # loads with weights_only
    assert saved["epoch"] == 2 and "optimizer" in saved
    assert {name.split(".")[1] for name in saved["state_dict"]} == set(NAMES[script(run)])
    assert all(name.startswith("module.") for name in saved["state_dict"])
    assert isinstance(saved["best_acc1"], torch.Tensor) and saved["best_acc1"].ndim == 0
    assert saved["best_acc1"].dtype == torch.float64 and saved["best_metric"] == "class_mean"
    accuracies = [record["val"][CLASSIFIERS[run][-1]]["class_mean"] for record in log_of(trained[run])]
    assert float(saved["best_acc1"]) == max(accuracies)
    best = checkpoint(trained[run], BEST)
    assert best["epoch"] == accuracies.index(max(accuracies)) + 1
    assert {file.name for file in trained[run].glob("*.tar")} == {BEST, LAST, PREVIOUS}
    assert checkpoint(trained[run], PREVIOUS)["epoch"] == 1


def test_each_stage_starts_from_the_weights_of_the_one_before(trained):
    states = {run: weights_of(trained[run]) for run in RUNS}

    def parameters(run, prefix):
        state = strip_prefix(states[run], prefix)
        return {name: value for name, value in state.items() if "running_" not in name and "num_batches" not in name}

    assert same(parameters("ii", "encoder."), parameters("i", "encoder_q."))
    assert same(parameters("ii", "classifier.fc."), parameters("i", "classifier."))
    assert not torch.all(states["ii"]["classifier.scales"] == 1)
    assert same(parameters("iii", "encoder_t."), parameters("ii", "encoder."))
    assert same(parameters("iii", "classifier_t."), parameters("ii", "classifier."))
    assert same(parameters("tuned", "encoder."), parameters("iii", "encoder_q."))
    assert same(parameters("tuned", "classifier.fc."), parameters("iii", "classifier."))
    for frozen, given in ((("ii", "encoder."), ("i", "encoder_q.")), (("iii", "encoder_t."), ("ii", "encoder."))):
        before, now = (states[run][f"{prefix}bn1.running_mean"] for run, prefix in (given, frozen))
        assert not torch.equal(now, before)  # frozen, but its statistics moved, as published


# ---- evaluation alone


@EACH_RUN
def test_evaluate_repeats_the_results_of_the_training(trained, plain_tree, tmp_path, run):
    """Whatever the flags of a training are: with these it would be refused."""
    idle = "-b 500 --bn-splits 3 --warmup-epochs 2 --eval-batch-size 16 --schedule 1 --cos"
    flags = ["--resume", trained[run] / LAST, "--evaluate", "--overwrite", *idle.split()]
    outcome = run_stage(script(run), plain_tree, tmp_path / "e", *flags)
    assert (outcome.status, outcome.err) == (0, "") and "not used" not in outcome.out
    assert results_of(tmp_path / "e") == results_of(trained[run])
    rows = [line for line in outcome.out.splitlines() if "classifier |" in line]
    for column, name in ((5, "class_mean"), (6, "overall")):
        expected = [f"{100 * record[name]:.1f}" for record in results_of(trained[run])]
        assert [row.split("|")[column].strip() for row in rows] == expected
    assert sorted(file.name for file in (tmp_path / "e").glob("[!.]*")) == ["results.json"]


def test_evaluate_without_output_dir_writes_nothing(trained, plain_tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--resume", trained["i"] / LAST, "--evaluate", "-j", 0, "--device", "cpu"]
    outcome = call("i", [*flags, plain_tree])
    assert outcome.status == 0 and "drawn" not in outcome.out
    assert list(tmp_path.iterdir()) == []


# ---- switches


def test_con_weight_0_leaves_queue_and_key_encoder_unchanged(plain_tree, tmp_path):
    folder = train("i", plain_tree, tmp_path / "i", "--con-weight", 0, "--moco-k", 10, "--epochs", 1)
    state = weights_of(folder)
    assert all(record["contrastive"] == 0 for record in log_of(folder))
    assert state["queue_ptr"] == 0 and torch.all(state["label_queue"] == -1)
    assert state["encoder_k.bn1.num_batches_tracked"] == 0 < state["encoder_q.bn1.num_batches_tracked"]


def test_con_weight_scales_the_contrastive_loss(plain_tree, tmp_path):
    for record in log_of(train("i", plain_tree, tmp_path / "i", "--con-weight", 0.5, "--epochs", 1)):
        assert record["loss"] == pytest.approx(record["cross_entropy"] + 0.5 * record["contrastive"], rel=1e-5)


def test_kd_weight_0_trains_the_hard_classifier_alone(plain_tree, tmp_path):
    folder = train("iii", plain_tree, tmp_path / "iii", "--kd-weight", 0, "--epochs", 1)
    assert all(record["distillation"] == 0 for record in log_of(folder))
    assert [record["classifier"] for record in results_of(folder)] == ["hard"]
    assert {name for name in log_of(folder)[0] if name.startswith("top")} == {"top1_hard", "top5_hard"}
    train("ii", plain_tree, tmp_path / "ii", "--epochs", 1, "--last_stage_ckpt", folder / LAST)


def test_kd_weight_and_temperature_change_the_distillation_loss(trained, plain_tree, tmp_path):
    flags = ["--epochs", 1, *source("iii", trained)]
    (record,) = log_of(train("iii", plain_tree, tmp_path / "w", *flags, "--kd-weight", 0.5))
    assert record["loss"] == pytest.approx(record["cross_entropy"] + 0.5 * record["distillation"], rel=1e-5)
    (other,) = log_of(train("iii", plain_tree, tmp_path / "t", *flags, "--kd-weight", 0.5, "--kd_t", 4))
    assert other["distillation"] != record["distillation"]


def test_the_soft_classifier_can_be_tuned(trained, plain_tree, tmp_path):
    flags = ["--epochs", 1, "--last_stage_ckpt", trained["iii"] / LAST, "--classifier", "soft"]
    tuned, student = weights_of(train("ii", plain_tree, tmp_path / "soft", *flags)), weights_of(trained["iii"])
    assert same(strip_prefix(tuned, "classifier.fc."), strip_prefix(student, "classifier_kd."))


@pytest.mark.parametrize("stage, before, taken, kept", [
    ("ii", "i", "encoder_q.", "encoder."), ("iii", "ii", "encoder.", "encoder_t."),
])  # fmt: skip
def test_freeze_bn_keeps_the_batchnorm_statistics(trained, plain_tree, tmp_path, stage, before, taken, kept):
    folder = train(stage, plain_tree, tmp_path / stage, *source(stage, trained), "--freeze-bn", "--epochs", 1)
    assert same(strip_prefix(weights_of(folder), kept), strip_prefix(weights_of(trained[before]), taken))


@pytest.mark.parametrize("stage", ["i", "iii"])
def test_bf16_channels_last_and_device_augmentation_change_the_loss_little(trained, plain_tree, tmp_path, stage):
    flags = [*source(stage, trained), "--epochs", 1, "--lr", 1e-3]  # at a large learning rate small differences grow
    reference = train(stage, plain_tree, tmp_path / "reference", *flags)
    (expected,), state = log_of(reference), weights_of(reference)
    for numerics in (["--amp", "bf16"], ["--channels-last", "--augment", "device"]):
        folder = train(stage, plain_tree, tmp_path / numerics[-1], *flags, *numerics)
        (record,) = log_of(folder)
        assert record["loss"] == pytest.approx(expected["loss"], rel=0.02), numerics
        assert [value.dtype for value in weights_of(folder).values()] == [value.dtype for value in state.values()]
        assert not same(weights_of(folder), state)


@EACH_STAGE
def test_channels_last_reaches_the_weights_and_compiling_keeps_their_names(stage):
    model = NETWORKS[stage]("resnet8", 3)
    names = list(model.state_dict())
    args = SCRIPTS[stage].get_parser().parse_args(["--channels-last", "--compile", "--device", "cpu", "."])
    prepare_model(model, torch.device("cpu"), args)
    assert list(model.state_dict()) == names  # nothing is compiled before the first call
    encoders = [module for name, module in model.named_children() if name.startswith("encoder")]
    assert encoders and all(encoder._compiled_call_impl is not None for encoder in encoders)
    weights = [p for encoder in encoders for p in encoder.parameters() if p.dim() == 4 and p.shape[1] > 1 < p.shape[2]]
    assert weights and all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_the_defaults_of_the_models_are_the_published_ones():
    published = {"dim": 128, "queue_size": 115712, "momentum": 0.999, "temperature": 0.2, "contrast": True}
    of_iii = {"temperature": 2.0, "freeze_bn": False, "distill": True}
    for model, defaults in ((SSFL, published), (SLG, {"freeze_bn": False}), (SDL, of_iii)):
        parameters = inspect.signature(model).parameters
        assert {name: parameters[name].default for name in defaults} == defaults


def test_another_seed_gives_another_run(trained, plain_tree, tmp_path):
    """The same seed gives the same: test_resume.test_auto_starts_from_scratch_if_there_is_no_checkpoint."""
    other = train("i", plain_tree, tmp_path / "other", "--cos", "--seed", 4, "--epochs", 1)
    assert not same(checkpoint(other)["state_dict"], checkpoint(trained["i"], PREVIOUS)["state_dict"])


def test_a_seed_is_drawn_printed_and_kept_and_progress_shown_every_print_freq_steps(plain_tree, tmp_path):
    flags = stage_flags("i", plain_tree, tmp_path / "i", ["--epochs", 1, "-p", 4])
    at = flags.index("--seed")
    del flags[at : at + 2]
    outcome, seed = call("i", flags), args_of(tmp_path / "i")["seed"]
    assert f"seed {seed}, drawn" in outcome.out and checkpoint(tmp_path / "i")["run"]["seed"] == seed
    steps = [line.split()[2] for line in outcome.out.splitlines() if line.startswith("epoch 1/1 [")]
    assert steps == ["[4/9]", "[8/9]", "[9/9]"]
    again = PARSERS["i"]().parse_args(flags)
    settle_defaults(again)
    assert again.seed != seed


# ---- more than one process


def test_two_spawned_processes_and_torchrun_give_the_same_run(plain_tree, tmp_path):
    """That two processes compute what one does: test_world_sizes."""
    spawned = train("i", plain_tree, tmp_path / "spawned", "--epochs", 1, *TWO)
    outcome = run_shell("i", plain_tree, tmp_path / "torchrun", "--epochs", 1, launcher=TORCHRUN)
    assert outcome.status == 0, outcome.err
    assert same(checkpoint(tmp_path / "torchrun"), checkpoint(spawned))
    assert checkpoint(spawned)["state_dict"]["module.queue_ptr"].tolist() == [9 * 16 % 50]
    assert log_of(tmp_path / "torchrun", timed=False) == log_of(spawned, timed=False)


@EACH_STAGE
def test_one_process_evaluates_what_two_trained(trained, plain_tree, tmp_path, stage):
    both = train_ranks(stage, plain_tree, tmp_path / "two", *source(stage, trained), "--epochs", 1)
    assert checkpoint(both)["run"]["world_size"] == 2
    assert [record["count"] for record in results_of(both)] == [TEST_IMAGES] * len(CLASSIFIERS[stage])
    train(stage, plain_tree, tmp_path / "one", "--resume", both / LAST, "--evaluate")
    assert results_of(tmp_path / "one") == results_of(both)


def test_the_command_of_the_readme_trains(plain_tree, tmp_path):
    url = f"tcp://localhost:{free_port()}"
    flags = f"--cos --dist-url {url} --multiprocessing-distributed --world-size 1 --rank 0 --epochs 1"
    folder = train("i", plain_tree, tmp_path / "i", *flags.split())
    assert len(log_of(folder)) == 1 and results_of(folder)[0]["count"] == TEST_IMAGES


# None of these has its default; the memory check and the summary of the settings have to know of them too.
WIRED = (
    "--bn-splits 4 --seed 9 --lr 0.07 --momentum 0 --wd 0.1 --schedule 1 --schedule-factor 0.5 --warmup-epochs 1 "
    "--amp fp16 --accum-steps 2 --channels-last --compile --tf32 --mean 0.5 0.4 0.3 --std 0.3 0.2 0.1"
)
SAID = "2 micro-batches", " float16", "0.07, warm-up of 1 epochs, times 0.5 at epochs 1; momentum 0, weight decay 0.1"


@pytest.mark.parametrize(("stage", "flags", "expected"), [
    ("i", "--moco-m 0.7 --moco-t 0.3", {"momentum": 0.7, "temperature": 0.3}),
    ("ii", "--num_samples_cls 3", {"samples_per_class": 3}),
    ("iii", "--kd_t 3", {"temperature": 3.0}),
])  # fmt: skip
def test_flags_and_seed_reach_network_data_and_optimizer(
    stage, flags, expected, trained, plain_tree, tmp_path, monkeypatch
):
    def start(folder, state, data):
        sampler, views = data.train.batch_sampler.sampler, data.train.dataset.transform
        splits = {module.splits for module in state.model.modules() if isinstance(module, SplitBatchNorm)}
        found.update(vars(sampler) | vars(state.model) | {"seeds": (sampler.seed, views.seed), "splits": splits})
        found["loaders"] = [loader.options for loader in (data.train, data.val, data.test)]
        found["sgd"] = [state.optimizer.param_groups[0][name] for name in ("momentum", "weight_decay", "fused")]
        found["summary"] = log.run_summary(state, data)
        found["evaluated"] = data.test.batch_sampler.batch_size
        raise UserError("started")

    found, checked = {}, {}
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(run_folder.RunFolder, "start", start)
    monkeypatch.setattr(train_state, "check_memory", lambda *_, **options: checked.update(options))
    outcome = run_stage(stage, plain_tree, tmp_path / "run", *WIRED.split(), *flags.split(), *source(stage, trained))
    assert "started" in outcome.err
    assert found.items() >= (expected | {"seeds": (9, 9), "splits": {4}}).items()
    options = {"channels_last": True, "mean": [0.5, 0.4, 0.3], "std": [0.3, 0.2, 0.1]}
    assert (found["loaders"], found["sgd"], found["evaluated"]) == ([options] * 3, [0, 0.1, True], 8)
    assert checked.items() >= {"momentum": False, "dtype": torch.float16, "compiled": True, "accum_steps": 2}.items()
    assert all(text in found["summary"] for text in SAID), found["summary"]
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark) == (True, False)
    seed = torch.initial_seed()
    train_state.seed_everything(9)
    assert seed == torch.initial_seed()


@pytest.mark.parametrize("stage", STAGES)
def test_epochs_are_validated_on_the_val_list_and_the_end_is_tested(stage, trained, plain_tree, tmp_path, monkeypatch):
    names, evaluate = [], metrics.evaluate
    monkeypatch.setattr(metrics, "evaluate", lambda *words: names.append(words[1].name) or evaluate(*words))
    train(stage, plain_tree, tmp_path / "run", *source(stage, trained), "--eval-freq", 2)
    assert names == ["val", "test"]
