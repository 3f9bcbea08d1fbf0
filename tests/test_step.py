"""One step of each stage, by the stage's own loop, on a loader that this project does not ship: batches in memory."""

import pytest
import torch

from models import STAGES
from tests.helpers import SCRIPTS, stage_flags
from utils.train_state import TrainState

pytestmark = pytest.mark.method
CLASSES, BATCH, STEPS = 5, 8, 2


class InMemory:
    """All that a loop asks of a loader of training images."""

    images_per_step, images_per_epoch = BATCH, BATCH * STEPS

    def __init__(self, views):
        self.views = views

    def __len__(self):
        return STEPS

    def start_at(self, epoch, position):
        assert (epoch, position) == (0, 0)

    def __iter__(self):
        for _ in range(STEPS):
            yield tuple(torch.randn(self.views, BATCH, 3, 16, 16)), torch.arange(BATCH) % CLASSES, list(range(BATCH))


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_moves_exactly_the_parameters_that_train(stage, tmp_path):
    torch.manual_seed(0)
    args = SCRIPTS[stage].get_parser().parse_args(stage_flags(stage, tmp_path, tmp_path / "run", []))
    model = STAGES[stage]("resnet8", CLASSES, **({"dim": 4, "queue_size": 20} if stage == "i" else {}))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    follows = {name for name, _ in model.named_parameters() if name.startswith(("encoder_k.", "k_fc."))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], args.lr, args.momentum)
    state = TrainState(model, optimizer, torch.device("cpu"), args)
    SCRIPTS[stage].train_one_epoch(model, InMemory(2 if stage == "i" else 1), optimizer, state, args)
    assert (state.step, state.images) == (STEPS, BATCH * STEPS)
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert moved == trained | follows
    means = state.metrics.means()
    assert means["loss"] > 0 and {f"top1_{name}" for name in model.classifiers} <= means.keys()
    if stage == "i":
        assert model.queue_ptr == BATCH * STEPS and (model.label_queue >= 0).sum() == BATCH * STEPS
