"""--tensorboard writes the figures of log.txt."""

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers import log_of, train


def test_events_hold_the_figures_of_the_log_also_of_a_resumed_run(plain_tree, tmp_path):
    for flags in (["--epochs", 2], ["--epochs", 3, "--resume", "auto"]):
        train("i", plain_tree, tmp_path, "--tensorboard", "--con-weight", 0, *flags)
    records, events = log_of(tmp_path), EventAccumulator(str(tmp_path)).Reload()
    for name, values in (
        ("loss", [record["loss"] for record in records]),
        ("val/linear/overall", [record["val"]["linear"]["overall"] for record in records]),
    ):
        assert [event.step for event in events.Scalars(name)] == [0, 1, 2]  # every epoch once
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values, rel=1e-6)  # float32
