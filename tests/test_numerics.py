"""Mixed precision: a step whose gradients overflow changes nothing."""

from types import SimpleNamespace

import torch

from utils.train_state import TrainState


def train_state(model):
    args = SimpleNamespace(amp="fp16", accum_steps=1, start_epoch=0)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1, fused=True)
    model.classifiers = ()
    return TrainState(model, optimizer, torch.device("cpu"), args)


def take_step(state, gradient):
    """A step whose scaled loss has this gradient, for every weight."""
    state.optimizer.zero_grad()
    state.scaler.scale(gradient * state.model.weight.sum()).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()


def test_a_first_step_that_overflows_leaves_weights_and_momentum_as_they_were(monkeypatch):
    monkeypatch.setattr(torch, "empty_like", lambda value: torch.full_like(value, 7.0))  # what memory may hold
    model = torch.nn.Linear(3, 2, bias=False)
    before, state = model.weight.detach().clone(), train_state(model)
    take_step(state, 1e36)  # overflows in float32 once it is scaled
    assert torch.equal(model.weight, before)
    assert torch.equal(state.optimizer.state[model.weight]["momentum_buffer"], torch.zeros(2, 3))
    take_step(state, 1.0)
    torch.testing.assert_close(model.weight.detach(), before - 0.1 * (1 + 0.1 * before))


def test_parameters_that_do_not_train_get_no_momentum():
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    model[1].requires_grad_(False)
    assert set(train_state(model).optimizer.state) == set(model[0].parameters())
