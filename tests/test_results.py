"""Figures on a page come from files, and are shown as they are there."""

import json

import matplotlib as mpl
import pytest

from dlgm_tutorial import plotting, results


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A checkout with one results file."""
    (tmp_path / "book" / "results").mkdir(parents=True)
    (tmp_path / "book" / "results" / "toy.json").write_text(
        json.dumps({"rows": [{"model": "A", "nats": 1.234, "seeds": 3}, {"model": "B", "nats": None, "seeds": 1}]}))
    monkeypatch.setattr(results, "__file__", str(tmp_path / "dlgm_tutorial" / "results.py"))


def test_load_reads_the_file(folder):
    assert results.load("toy")["rows"][0]["nats"] == 1.234


def test_path_names_what_is_missing(folder):
    with pytest.raises(FileNotFoundError, match="no results file 'other.npz'"):
        results.path("other.npz")


def test_table_shows_chosen_columns_and_a_dash_for_what_was_not_run(folder):
    shown = results.table("toy", {"model": "model", "nats": "nats / image"}, digits=1)
    assert isinstance(shown, results.Markdown)
    assert shown._repr_markdown_().splitlines() == ["| model | nats / image |", "|---|---|", "| A | 1.2 |", "| B | — |"]


def test_say_fills_figures_in():
    assert repr(results.say("{v:.1f} nats", v=86.64)) == "86.6 nats"


def test_use_style_changes_size_and_every_color_is_one():
    with mpl.rc_context():
        plotting.use_style()
        assert mpl.rcParams["figure.dpi"] == 100
    assert all(mpl.colors.is_color_like(c) for c in plotting.COLORS.values())
