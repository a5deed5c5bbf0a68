"""Text source -> notebook: `python tools/notebooks.py [--check | --text] [book/.../01_x.md ...]`.

Each source becomes an executed notebook beside it, with the Colab badge under its title and the cell that installs the
package where it is missing. Without sources: every page whose notebook is not in step with its text.
With --check nothing is executed or written; notebooks out of step are reported.
With --text nothing is executed: only prose may have changed, the outputs stay.

Executing a page also writes book/results/pages/CHAPTER/PAGE.json: how long it took and what its checks found.
"""

import argparse
import base64
import hashlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
URL = re.search(r"(?m)^Source = \"(.*)\"$", (ROOT / "pyproject.toml").read_text()).group(1)
# The badge travels inside each notebook: a relative path would break on Colab, a remote one when read offline.
BADGE = base64.b64encode((ROOT / "tools" / "colab_badge.png").read_bytes()).decode()
BOOTSTRAP = f"try:\n    import dlgm_tutorial\nexcept ImportError:\n    %pip install -q git+{URL}"


def pages():
    """The text sources of all notebooks, in reading order."""
    return sorted(ROOT.glob("book/[0-9][0-9]_*/[0-9][0-9]_*.md"))


def colab_badge(source):
    notebook = source.relative_to(ROOT).with_suffix(".ipynb").as_posix()
    address = f"{URL.replace('https://github.com', 'https://colab.research.google.com/github')}/blob/main/{notebook}"
    return f'[<img alt="Open in Colab" width="117" height="20" src="data:image/png;base64,{BADGE}">]({address})'


def from_source(source):
    """The notebook that a text source stands for: no outputs, ids that depend on the cell's text alone."""
    nb = jupytext.read(source)
    nb.metadata = nbformat.from_dict(METADATA)
    nb.nbformat, nb.nbformat_minor = 4, 5
    first = nb.cells[0]
    first.source, found = re.subn(r"(?m)^# .*$", lambda m: f"{m.group()}\n\n{colab_badge(source)}", first.source, count=1)
    if first.cell_type != "markdown" or not found:
        raise SystemExit(f"{source.relative_to(ROOT)}: the first cell must be text with a title")
    nb.cells.insert(1, nbformat.v4.new_code_cell(BOOTSTRAP, metadata={"tags": ["remove-cell", "passport"]}))
    seen = {}
    for cell in nb.cells:
        digest = hashlib.sha1(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:8]
        seen[digest] = seen.get(digest, 0) + 1
        cell.id = digest if seen[digest] == 1 else f"{digest}-{seen[digest]}"
    return nb


def execute(nb, folder):
    """Run top to bottom from the notebook's own folder, as Jupyter does; what its checks found, and the seconds."""
    with tempfile.TemporaryDirectory() as tmp:
        ledger = Path(tmp, "checks")
        ledger.touch()
        start = time.perf_counter()
        NotebookClient(nb, timeout=600, kernel_name="python3", record_timing=False, coalesce_streams=True,
                       resources={"metadata": {"path": str(folder)}}).execute(env={**os.environ, "DLGM_LEDGER": str(ledger)})
        seconds = time.perf_counter() - start
        checks = [json.loads(line) for line in ledger.read_text().splitlines()]
    for cell in nb.cells:
        cell.metadata.pop("execution", None)
        for out in cell.get("outputs", []):
            if out.get("name") == "stderr":
                raise SystemExit(f"{folder.name}: a cell wrote to stderr:\n{out['text']}")
            if "metadata" in out:
                out.metadata.pop("execution", None)
    return {"seconds": round(seconds, 1), "checks": checks}


def skeleton(nb):
    return [(c.cell_type, c.id, c.source, dict(c.metadata)) for c in nb.cells]


def with_outputs_of(nb, old):
    """The notebook with the outputs of an older one whose code cells are the same, else None."""
    new_code, old_code = ([c for c in n.cells if c.cell_type == "code"] for n in (nb, old))
    if [c.source for c in new_code] != [c.source for c in old_code]:
        return None
    for cell, before in zip(new_code, old_code, strict=True):
        cell.outputs, cell.execution_count = before.outputs, before.execution_count
    return nb


def in_step(source):
    target = source.with_suffix(".ipynb")
    return target.exists() and skeleton(nbformat.read(target, 4)) == skeleton(from_source(source))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true")
    mode.add_argument("--text", action="store_true")
    parser.add_argument("sources", nargs="*", type=Path)
    args = parser.parse_args()
    sources = [s.resolve() for s in args.sources] or [s for s in pages() if not in_step(s)]
    if args.check:
        stale = [s for s in sources if not in_step(s)]
        for source in stale:
            print(f"{source.relative_to(ROOT)}: not the notebook beside it; run `make notebooks`")
        return len(stale) > 0
    for source in sources:
        nb, target = from_source(source), source.with_suffix(".ipynb")
        if args.text:
            if not target.exists() or with_outputs_of(nb, nbformat.read(target, 4)) is None:
                raise SystemExit(f"{source.relative_to(ROOT)}: code changed; leave out --text")
            nbformat.write(nb, target)
            continue
        record = execute(nb, source.parent)
        nb.metadata = nbformat.from_dict(METADATA)  # without the version of Python that the kernel adds
        nbformat.write(nb, target)
        found = ROOT / "book" / "results" / "pages" / source.parent.name / f"{source.stem}.json"
        found.parent.mkdir(parents=True, exist_ok=True)
        found.write_text(json.dumps(record, indent=1) + "\n")
        print(f"{target.relative_to(ROOT)}: {record['seconds']} s, {target.stat().st_size / 1024:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
