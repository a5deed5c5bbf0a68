"""Two cold executions of a page give the same text, byte for byte (nightly)."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import notebooks  # noqa: E402

PAGES = notebooks.pages()


def texts(nb):
    """Everything a cell printed or showed as text, in order; pictures left out."""
    shown = []
    for i, cell in enumerate(nb.cells):
        for out in cell.get("outputs", []):
            data = {kind: value for kind, value in out.get("data", {}).items() if kind.startswith("text/")}
            shown.append((i, out.output_type, out.get("text", ""), data))
    return shown


def executed(source):
    nb = notebooks.from_source(source)
    notebooks.execute(nb, source.parent)
    return texts(nb)


@pytest.mark.slow
@pytest.mark.parametrize("source", PAGES, ids=[f"{path.parent.name}/{path.stem}" for path in PAGES])
def test_two_executions_give_the_same_text(source, monkeypatch):
    monkeypatch.setenv("PYTHONHASHSEED", "1")
    first = executed(source)
    monkeypatch.setenv("PYTHONHASHSEED", "2")  # nor does it hang on the order of a set
    assert first == executed(source)
