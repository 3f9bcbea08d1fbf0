"""docs/look_at_a_run.ipynb: stored without outputs; its cells run as a script."""

import json
import sys

import pytest

from tests.helpers import ROOT

NOTEBOOK = json.loads((ROOT / "docs" / "look_at_a_run.ipynb").read_text())
CODE = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_valid_and_stores_no_outputs():
    assert NOTEBOOK["nbformat"] == 4 and len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    for cell in NOTEBOOK["cells"]:
        own = {"outputs": [], "execution_count": None} if cell["cell_type"] == "code" else {}
        assert cell == {name: cell[name] for name in ("cell_type", "id", "metadata", "source")} | own


def test_the_cells_run_on_the_demos_paths(trained, plain_tree, tmp_path, monkeypatch, capsys):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("agg")
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "docs").mkdir()
    (tmp_path / "runs" / "demo").mkdir(parents=True)
    (tmp_path / "runs" / "demo" / "stage_iii").symlink_to(trained["iii"])
    (tmp_path / "runs" / "fashion-mnist-lt").symlink_to(plain_tree)
    monkeypatch.chdir(tmp_path / "docs")
    scope, figures = {}, []
    for code in CODE:
        exec(compile(code, "look_at_a_run.ipynb", "exec"), scope)
        figures += map(pyplot.figure, pyplot.get_fignums())
    for figure in figures:
        figure.canvas.draw()
    pyplot.close("all")
    out = capsys.readouterr().out
    assert "class_mean" in out and "Most common mistake" in out
    assert scope["record"]["classifier"] == "soft" and len(scope["predicted"]) == 8
    assert len(set(map(id, figures))) == 2
