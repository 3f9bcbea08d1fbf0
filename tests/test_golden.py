"""SSFL, SLG and SDL, compared with the numbers that the published modules computed (tests/golden/README.md)."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import models
from tests.golden.goldfill import digest, fill, inputs

pytestmark = pytest.mark.method

R = json.loads((Path(__file__).parent / "golden" / "reference.json").read_text())


def sgd(model):
    return torch.optim.SGD(
        [p for p in model.parameters() if p.requires_grad],
        lr=R["lr"], momentum=R["momentum"], weight_decay=R["weight_decay"],
    )  # fmt: skip


def close(actual, expected):
    torch.testing.assert_close(
        torch.as_tensor(actual, dtype=torch.float64), torch.as_tensor(expected, dtype=torch.float64),
        rtol=1e-8, atol=1e-8,
    )  # fmt: skip


def check_digest(model, expected):
    state = model.state_dict()
    for key, value in digest(state, expected).items():
        close(value, expected[key])


def step(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
    norm = torch.stack([g.norm() for g in grads]).norm()
    optimizer.step()
    return norm.item()


@pytest.fixture(scope="module")
def batches():
    return inputs(R["seed"], R["batch"], R["size"], R["num_classes"], R["steps"])


@pytest.fixture(scope="module")
def stage_i(batches):
    model = models.SSFL(R["arch"], R["num_classes"], R["dim"], R["queue"], R["m"], R["T"]).double()
    model.load_state_dict(fill(model.state_dict(), R["seed"], R["num_classes"]))
    optimizer, record = sgd(model.train()), []
    for im_q, im_k, labels in batches:
        logits, contrastive = model(im_q, im_k, labels)
        ce = F.cross_entropy(logits, labels)
        record.append([ce.item(), contrastive.item(), step(optimizer, ce + contrastive)])
    return model, record


@pytest.fixture(scope="module")
def stage_ii(stage_i, batches):
    model = models.SLG(R["arch"], R["num_classes"]).double()
    model.load_pretrained(stage_i[0].state_dict())
    optimizer, record = sgd(model.train()), []
    for im_q, _, labels in batches:
        loss = F.cross_entropy(model(im_q), labels)
        record.append(loss.item())
        step(optimizer, loss)
    return model, record


@pytest.fixture(scope="module")
def stage_iii(stage_ii, batches):
    model = models.SDL(R["arch"], R["num_classes"], R["kd_t"]).double()
    model.load_state_dict(fill(model.state_dict(), 8, R["num_classes"]))
    model.load_teacher(stage_ii[0].state_dict())
    optimizer, record = sgd(model.train()), []
    for im_q, _, labels in batches:
        hard, _, kd = model(im_q)
        ce = F.cross_entropy(hard, labels)
        record.append([ce.item(), kd.item(), step(optimizer, ce + kd)])
    return model, record


def test_stage_i_computes_the_published_numbers(stage_i, batches):
    model, record = stage_i
    expected = R["stage_i"]
    assert sorted(model.state_dict()) == sorted(expected["keys"])
    close(record, expected["ce_con_gradnorm"])
    check_digest(model, expected["digest"])
    model.eval()
    with torch.no_grad():
        close(model(batches[0][0][:4]), expected["eval_logits"])


def test_stage_ii_computes_the_published_numbers(stage_ii, batches):
    model, record = stage_ii
    expected = R["stage_ii"]
    assert sorted(model.state_dict()) == sorted(expected["keys"])
    assert [name for name, p in model.named_parameters() if p.requires_grad] == expected["trainable"]
    close(record, expected["ce"])
    close(model.classifier.scales.detach(), expected["scales"])
    check_digest(model, expected["digest"])
    model.eval()
    with torch.no_grad():
        close(model(batches[0][0][:4]), expected["eval_logits"])


def test_stage_iii_computes_the_published_numbers(stage_iii, batches):
    model, record = stage_iii
    expected = R["stage_iii"]
    assert sorted(model.state_dict()) == sorted(expected["keys"])
    close(record, expected["ce_kd_gradnorm"])
    check_digest(model, expected["digest"])
    model.eval()
    with torch.no_grad():
        hard, soft = model(batches[0][0][:4])
    close(hard, expected["eval_hard"])
    close(soft, expected["eval_soft"])
