"""python -m utils.predict, and the transform and class names of networks from models.load."""

import copy
import csv
import pickle
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import models
from datasets.lists import ImageList
from models.preprocess import MEAN, STD, EvalTransform, normalize
from tests.helpers import CLASSES, COUNTS, LAST, ROOT, assert_mistake, outcome_of, results_of
from utils import predict
from utils.images import load_rgb

NAMES = ["ant", "bee", "cat", "dog, brown", "eel", "fox"]
SIZE = 32


@pytest.fixture
def rewritten(trained, tmp_path):
    """rewritten(stage, name=value, ...): a file with a trained stage's checkpoint and these entries changed."""

    def write(stage="iii", **entries):
        file = tmp_path / "checkpoint.pth.tar"
        torch.save(torch.load(trained[stage] / LAST, weights_only=True) | entries, file)
        return file

    return write


@pytest.fixture
def run(capfd):
    """run(word, ...) -> (status, stdout, stderr) of the command."""
    return partial(outcome_of, predict.main, capfd)


# ---- transform and classes


def test_the_transform_is_that_of_the_evaluation(plain_tree, tmp_path):
    file = next((plain_tree / "train").rglob("*.png"))
    transform = EvalTransform(SIZE)
    pixels = np.asarray(Image.open(file).convert("RGB")) / 255
    expected = torch.tensor((pixels - np.array(MEAN)) / np.array(STD), dtype=torch.float32).permute(2, 0, 1)
    with Image.open(file) as image:
        torch.testing.assert_close(transform(image), expected)
    for mode in ("L", "P", "CMYK", "RGBA", "1"):
        image = Image.new("RGB", (90, 50), (200, 30, 60)).convert(mode)
        assert transform(image).shape == (3, SIZE, SIZE)
    deep = np.arange(SIZE * SIZE, dtype=np.uint16).reshape(SIZE, SIZE) * 64  # 16 bits, scaled as in training
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert torch.equal(transform(Image.open(tmp_path / "deep.png")), transform(load_rgb(tmp_path / "deep.png")))


@pytest.mark.parametrize("stage", ["i", "ii", "iii"])
def test_a_network_carries_the_size_it_was_trained_at(trained, stage):
    model = models.load(trained[stage] / LAST)
    assert (model.transform.size, model.transform.mean, model.transform.std) == (SIZE, MEAN, STD)
    assert models.SLG("resnet8", 2).transform is None and models.SLG("resnet8", 2).classes is None


def test_image_size_statistics_and_class_names_come_from_the_checkpoint(rewritten):
    args = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
    model = models.load(rewritten(args=args, run={"image_size": 40}, classes=NAMES))
    assert model.classes == NAMES
    pixels = model.transform(Image.new("RGB", (40, 40), (255, 0, 51)))
    assert pixels.shape == (3, 40, 40)
    torch.testing.assert_close(pixels[:, 7, 7], torch.tensor([0.5 / 0.2, -0.4 / 0.2, (0.2 - 0.3) / 0.1]))


def test_without_a_saved_image_size_it_is_224(trained, tmp_path):
    content = torch.load(trained["ii"] / LAST, weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, tmp_path / "bare")
    model = models.load(tmp_path / "bare")
    assert model.transform.size == 224 and model.classes is None
    assert model.transform(Image.new("L", (300, 200))).shape == (3, 224, 224)


def test_copies_and_pickles_keep_transform_and_class_names(rewritten):
    model = models.load(rewritten(classes=NAMES))
    image = Image.new("RGB", (50, 40), (9, 99, 199))
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.classes == NAMES and torch.equal(other.transform(image), model.transform(image))
        assert other.state_dict().keys() == model.state_dict().keys()
    assert not [name for name in model.state_dict() if "transform" in name or "classes" in name]


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"run": {"image_size": 10**9}}, "image_size"),
        ({"run": {}, "args": {"image_size": "large"}}, "image_size"),
        ({"args": {"mean": [0.5, 0.5]}}, "mean"),
        ({"args": {"mean": [0.5, 0.5, float("nan")]}}, "mean"),
        ({"args": {"mean": [0.5, 0.5, "x"]}}, "mean"),
        ({"args": {"std": [0.2, 0.2, 0.0]}}, "std"),
        ({"args": {"std": 3}}, "std"),
        ({"args": [1]}, "args"),
        ({"classes": ["one"]}, "names 1 classes"),
        ({"classes": [1] * CLASSES}, "classes"),
    ],
)
def test_invalid_entries_of_a_checkpoint_are_named(rewritten, entries, reason):
    file = rewritten(**entries)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(file))}[^\n]*{reason}[^\n]*$"):
        models.load(file)


# ---- the command


@pytest.mark.parametrize(
    ("stage", "classifier", "flags"),
    [
        ("i", "linear", []),
        ("iii", "hard", ["--classifier", "hard"]),
        ("iii", "soft", ["--classifier", "soft"]),
        ("iii", "soft", []),
        ("tuned", "lws", []),
    ],
)
def test_predictions_are_those_of_the_evaluation(trained, plain_tree, run, stage, classifier, flags):
    lines = [line.rsplit(" ", 1) for line in (plain_tree / "test.txt").read_text().splitlines()]
    labels = {str(plain_tree / path): int(label) for path, label in lines}
    status, out, err = run(trained[stage] / LAST, *labels, "--csv", "--batch-size", 16, "--device", "cpu", *flags)
    assert status == 0 and err.count("\n") == (1 if stage == "iii" and not flags else 0)
    assert "the soft classifier is used" in err or not err
    right = [0] * CLASSES
    rows = list(csv.DictReader(out.splitlines()))
    assert [row["path"] for row in rows] == list(labels)
    for row in rows:
        right[labels[row["path"]]] += int(row["label_1"]) == labels[row["path"]]
    (record,) = [record for record in results_of(trained[stage]) if record["classifier"] == classifier]
    assert right == [round(a * n) for a, n in zip(record["per_class"], COUNTS["test"], strict=True)]
    assert sum(right) == round(record["overall"] * record["count"])


def test_names_and_probabilities_are_printed(rewritten, plain_tree, run):
    """Those of the checkpoint's network, for an image that is normalized by the checkpoint's statistics."""
    image = next((plain_tree / "train" / "class3").glob("*.png"))
    file = rewritten("i", classes=NAMES, args={"mean": [0.1] * 3})
    status, out, err = run(file, image, "--topk", 99)
    assert (status, err) == (0, "") and out.count("\n") == 1
    assert out.startswith(f"{image}: ") and all(name in out for name in NAMES)
    status, out, _ = run(file, image, "--topk", 2, "--csv")
    (row,) = csv.DictReader(out.splitlines())
    assert row["name_1"] == NAMES[int(row["label_1"])] and "label_3" not in row
    model = models.load(file)
    with torch.no_grad():
        probabilities = model(model.transform(Image.open(image))[None])[0].softmax(0)
    assert float(row["probability_1"]) == pytest.approx(probabilities.max().item(), abs=1e-5)


def test_folders_are_searched_in_sorted_order_and_what_cannot_be_read_is_named(trained, tmp_path, run):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("z.png", "a/y.PNG", "a/b/x.jpg"):
        Image.new("RGB", (40, 40)).save(tmp_path / name)
    for name in ("b.HEIC", "c.heic", "notes.txt", "Thumbs.db", "._z.png", "d\n.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "cut.png").write_bytes((tmp_path / "z.png").read_bytes()[:60])
    status, out, err = run(trained["i"] / LAST, tmp_path, "--batch-size", 1, "-j", 1, "--topk", 1)
    assert status == 1
    assert [line.split(": ")[0] for line in out.splitlines()] == [
        str(tmp_path / name) for name in ("a/b/x.jpg", "a/y.PNG", "z.png")
    ]
    *lines, last = err.splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"skipped {tmp_path}/{name}" for name in ("b.HEIC", "c.heic", "cut.png", "d\\n.png")
    ]
    assert last == "4 of 7 images could not be read"


def test_a_folder_of_photos_that_are_not_read_alone_gives_status_1(trained, tmp_path, run):
    (tmp_path / "b.HEIC").touch()
    assert run(trained["i"] / LAST, tmp_path)[0] == 1


@pytest.mark.parametrize("names", [None, NAMES])
def test_the_misclassified_images_of_a_list(rewritten, plain_tree, tmp_path, run, names):
    entries = [line.rsplit(" ", 1) for line in (plain_tree / "test.txt").read_text().splitlines()]
    file = rewritten(classes=names, args={})
    status, out, _ = run(file, plain_tree / "test.txt", "--csv", "--topk", 1, "--wrong", tmp_path / "wrong.csv")
    rows = list(csv.DictReader(out.splitlines()))
    assert status == 0 and [row["path"] for row in rows] == [str(plain_tree / path) for path, _ in entries]
    shown = names or list(map(str, range(CLASSES)))
    wrong = [
        [row["path"], shown[int(label)], shown[int(row["label_1"])], row["probability_1"]]
        for row, (_, label) in zip(rows, entries, strict=True)
        if row["label_1"] != label
    ]
    found = list(csv.reader((tmp_path / "wrong.csv").open()))
    assert found[0] == ["path", "label", "prediction", "confidence"] and wrong
    assert sorted(found[1:]) == sorted(wrong)
    assert [row[3] for row in found[1:]] == sorted((row[3] for row in wrong), reverse=True)

    moved = tmp_path / "test.txt"
    moved.write_bytes((plain_tree / "test.txt").read_bytes())
    assert run(file, moved, "--root", plain_tree, "--csv", "--topk", 1)[1] == out
    assert_mistake(run(file, moved), moved, "--root")
    photo = plain_tree / entries[0][0]
    assert_mistake(run(file, photo, "--wrong", tmp_path / "w.csv"), "--wrong", "list")
    assert_mistake(run(file, plain_tree / "test.txt", "--wrong", tmp_path / "no" / "w.csv"), "--wrong", "no/w.csv")
    to_moved = file, moved, "--root", plain_tree, "--wrong"
    (tmp_path / "w.csv").mkdir()
    for wrong in (moved, file, plain_tree, tmp_path / "w", tmp_path / "w.csv"):
        assert_mistake(run(*to_moved, wrong), f"--wrong {wrong}", ".csv", "name another file")
    named = tmp_path / "names.csv"
    named.write_text("".join(f"{name}\n" for name in NAMES))
    assert_mistake(run(*to_moved, named, "--classes", named), f"--wrong {named}", "an input")
    (tmp_path / "classes.txt").write_text(named.read_text().replace("bee", "eagle"))
    status, again, err = run(*to_moved, tmp_path / "wrong.csv", "--csv", "--topk", 1)
    warning = f"warning: class 1 is 'bee' in {file}, and 'eagle' in the data" if names else ""
    assert (status, again) == (0, out) and warning in err and ("warning" in err) == bool(names)
    moved.write_text(f"{entries[0][0]} 0\n{entries[0][0]} {CLASSES}\n")
    assert_mistake(run(*to_moved, tmp_path / "w too.csv"), f"{moved}, line 2", f"label {CLASSES}", file)
    moved.write_text("no list")
    assert_mistake(run(file, moved), f"{moved}, line 1")


def test_new_names_of_classes_reach_predictions_of_old_checkpoints(rewritten, plain_tree, tmp_path, run):
    image = next((plain_tree / "train").rglob("*.png"))
    file, names = rewritten("i", classes=NAMES), tmp_path / "classes.txt"
    names.write_text("".join(f"{name} too\n" for name in NAMES))
    status, out, _ = run(file, image, "--topk", CLASSES, "--classes", names)
    assert status == 0 and all(f"{name} too " in out for name in NAMES)
    names.write_text("one\n")
    assert_mistake(run(file, image, "--classes", names), "--classes", names, "1 names for 6 classes")
    assert_mistake(run(file, image, "--classes", tmp_path / "none"), "--classes", tmp_path / "none")


def test_a_network_classifies_with_the_preferred_classifier(trained, rewritten):
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        for stage, name in {"i": "linear", "ii": "lws", "iii": "soft"}.items():
            model = models.load(trained[stage] / LAST)
            logits = model(images)[1] if stage == "iii" else model(images)
            assert model.preferred == name and torch.equal(model.classify(images), logits)
        model = models.load(rewritten(args={"kd_weight": 0.0}))
        assert model.preferred == "hard" and torch.equal(model.classify(images), model(images)[0])


def test_mistakes_end_in_one_line(trained, rewritten, plain_tree, tmp_path, run):
    image = next((plain_tree / "train").rglob("*.png"))
    of_i, none, text = trained["i"] / LAST, tmp_path / "none", tmp_path / "text"
    (tmp_path / "empty").mkdir()
    text.write_text("no checkpoint")
    assert_mistake(run(none, image), none, "cannot be opened")
    assert_mistake(run(text, image), text, "damaged")
    assert_mistake(run(of_i, none), none, "no such file")
    assert_mistake(run(of_i, tmp_path / "empty"), tmp_path / "empty", "no images")
    assert_mistake(run(of_i, image, "--classifier", "soft"), "--classifier soft", "stage I")
    assert_mistake(run(rewritten(args={"kd_weight": 0.0}), image, "--classifier", "soft"), "--kd-weight 0")
    if not torch.cuda.is_available():
        assert_mistake(run(of_i, image, "--device", "cuda"), "--device cuda")
    for words in (("--topk", 0), ("--batch-size", 0), ("--workers", 0)):
        assert_mistake(run(of_i, image, *words), " ".join(map(str, words)))
    assert_mistake(run(of_i), "IMAGE_OR_DIR")


def test_a_closed_pipe_ends_the_command_quietly(trained, plain_tree):
    command = [sys.executable, "-m", "utils.predict", trained["i"] / LAST, *[plain_tree / "train"] * 40, "-j", "1"]
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait(60) == 141


def test_images_are_normalized_with_the_statistics_of_the_checkpoint(rewritten):
    mean, std = (0.5, 0.4, 0.3), (0.3, 0.2, 0.1)
    model, seen = models.load(rewritten(args={"mean": list(mean), "std": list(std)})), []
    model.encoder_q.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    predict.predict(model, images, 1, torch.device("cpu"))
    assert torch.equal(seen[0], normalize(images, mean, std))


def test_the_images_of_a_tree_that_is_sorted_by_split_are_found(reorganized_tree):
    files = predict.locate_images(ImageList.from_file(reorganized_tree / "val.txt"), None)
    assert all(Path(file).is_file() for file, _ in files)


def test_predictions_are_those_of_full_precision(trained, plain_tree, monkeypatch, run):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    photo = next((plain_tree / "train").rglob("*.png"))
    assert run(trained["i"] / LAST, photo, "--device", "cpu")[0] == 0 and not torch.backends.cudnn.allow_tf32
