"""--tensorboard writes the figures of log.txt; without the package the run ends in one line."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import log_of, train


def test_events_hold_the_figures_of_the_log(plain_tree, tmp_path):
    records = log_of(train("i", plain_tree, tmp_path, "--tensorboard", "--con-weight", 0))
    events = EventAccumulator(str(tmp_path)).Reload()
    for name, values in (
        ("loss", [record["loss"] for record in records]),
        ("val/linear/overall", [record["val"]["linear"]["overall"] for record in records]),
    ):
        written = events.Scalars(name)
        assert [event.step for event in written] == [0, 1]
        assert [event.value for event in written] == pytest.approx(values, rel=1e-6)  # stored as float32


def test_a_resumed_run_writes_every_epoch_once(plain_tree, tmp_path):
    for flags in (["--epochs", 2], ["--epochs", 3, "--resume", "auto"]):
        train("i", plain_tree, tmp_path, "--tensorboard", "--con-weight", 0, *flags)
    assert [event.step for event in EventAccumulator(str(tmp_path)).Reload().Scalars("loss")] == [0, 1, 2]
