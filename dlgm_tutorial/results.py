"""Figures of book/results on a page: `table` and `say` show what commands wrote; nothing is typed in by hand."""

import json
from importlib import resources
from pathlib import Path

__all__ = ["Markdown", "load", "path", "say", "table"]


class Markdown:
    """Text that Jupyter, Colab and the book show as Markdown, and a terminal as it is."""

    def __init__(self, text):
        self.text = text

    def _repr_markdown_(self):
        return self.text

    def __repr__(self):
        return self.text


def path(name):
    """Where the file `name` of book/results is: in the checkout where there is one, else in the installed package.

    Raises FileNotFoundError with the name where there is none.
    """
    checkout = Path(__file__).parents[1] / "book" / "results"
    found = (checkout if checkout.is_dir() else resources.files("dlgm_tutorial._results")).joinpath(name)
    if not found.is_file():
        raise FileNotFoundError(
            f"no results file {name!r}; `python -m dlgm_tutorial.reproduce --list` names them")
    return found


def load(name):
    """Read book/results/`name`.json into a dict (`reproduce` says what it holds)."""
    return json.loads(path(f"{name}.json").read_text())


def _cell(value, digits):
    if value is None:
        return "—"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def table(rows, columns=None, *, digits=2):
    """Rows as a Markdown table.

    rows: the name of a results file that has "rows", or a list of dicts; columns: {key: heading} in the order shown
    (default: the keys of the first row); digits: of floats. None is shown as a dash: not run, or not published.

    >>> table([{"model": "FA", "nats": 106.0}, {"model": "DLGM", "nats": None}])
    | model | nats |
    |---|---|
    | FA | 106.00 |
    | DLGM | — |
    """
    rows = load(rows)["rows"] if isinstance(rows, str) else rows
    columns = columns or {key: key for key in rows[0]}
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row.get(key), digits) for key in columns) + " |" for row in rows]
    return Markdown("\n".join(lines))


def say(template, **values):
    """Fill `values` into `template`, a sentence with figures from a results file or from the cells above.

    >>> say("The bound is {gap:.2f} nats below.", gap=1.25)
    The bound is 1.25 nats below.
    """
    return Markdown(template.format(**values))
