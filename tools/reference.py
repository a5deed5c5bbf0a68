"""The generated parts of the book, made before each build: the equation ledger, the run times and the benchmarks.

Written to book/_generated/, which pages include. The ledger joins three things: the labelled equations of the pages,
the checks that name a label (as the pages last ran, book/results/pages), and the docstrings that name it.
"""

import ast
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from notebooks import ROOT, pages

LABEL = re.compile(r"(?m)^\$\$ \((\S+)\)$")  # $$ ... $$ (eq-name)
NAMED = re.compile(r"\beq-[a-z0-9]+(?:-[a-z0-9]+)*")
OUT = ROOT / "book" / "_generated"


def equations():
    """{label: page} of every numbered equation; "eq-..." is verified by a check, "def-..." defines and needs none."""
    found = {}
    for source in pages():
        for label in LABEL.findall(source.read_text()):
            if label in found:
                raise SystemExit(f"{source.relative_to(ROOT)}: the label {label} is taken")
            found[label] = source
    return found


def checks():
    """{label: [check as it was recorded when its page last ran]}."""
    found = {}
    for source in pages():
        record = recorded(source)
        for check in record["checks"] if record else []:
            found.setdefault(check["label"], []).append(check)
    return found


def recorded(source):
    path = ROOT / "book" / "results" / "pages" / source.parent.name / f"{source.stem}.json"
    return json.loads(path.read_text()) if path.exists() else None


def implementations():
    """{label: ["module.function", ...]}: the docstrings of the package that name the label."""
    found = {}
    for path in sorted(ROOT.glob("dlgm_tutorial/**/*.py")):
        module = path.relative_to(ROOT / "dlgm_tutorial").with_suffix("").as_posix().replace("/", ".")
        for owner, node in _definitions(ast.parse(path.read_text())):
            for label in sorted(set(NAMED.findall(ast.get_docstring(node) or ""))):
                found.setdefault(label, []).append(f"{module}.{owner}")
    return found


def _definitions(tree, prefix=""):
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node, f"{prefix}{node.name}.")


def ledger():
    by_label, made_by = checks(), implementations()
    lines = ["| equation | label | implemented by | checked | tolerance | difference found |", "|---|---|---|---|---|---|"]
    for label in equations():
        if label.startswith("def-"):
            lines.append(f"| {{eq}}`{label}` | `{label}` | | a definition | | |")
            continue
        code = ", ".join(f"`{name}`" for name in made_by.get(label, []))
        for i, check in enumerate(by_label.get(label, [{}])):
            head = f"| {{eq}}`{label}` | `{label}` | {code}" if i == 0 else "| | | "
            found = f"{check['z']:.1f} standard errors" if "z" in check else f"{max(check.get('difference', 0.0), 0.0):.1e}"
            # A bar in a cell would end it.
            rule = check.get("rule", "").replace("|difference|", "difference").replace("|want|", "want")
            lines.append(f"{head} | {check.get('what', '')} | {rule} | {found if check else ''} |")
    return "\n".join(lines)


def run_times():
    lines = ["| page | seconds |", "|---|---|"]
    for source in pages():
        record = recorded(source)
        title = re.search(r"(?m)^# (.*)$", source.read_text()).group(1)
        link = f"[{title}]({source.relative_to(ROOT / 'book').with_suffix('.ipynb').as_posix()})"
        lines.append(f"| {link} | {record['seconds'] if record else '—'} |")
    return "\n".join(lines)


def benchmarks():
    """A section for each file that `make bench` wrote: its table, its aim, and what it ran on."""
    parts = []
    for path in sorted((ROOT / "benchmarks" / "results").glob("*.json")):
        record = json.loads(path.read_text())
        parts += [f"## {record['title']}", "", f"Aim: {record['aim']}.", ""]
        parts += [record["note"], ""] if record.get("note") else []
        for unit, report in record["reports"].items():
            parts += [f"| {unit} | ratio | quartiles | seconds |", "|---|---|---|---|"]
            parts += [f"| {name} | {row['ratio']:.2f} | [{row['low']:.2f}, {row['high']:.2f}] | {row['seconds']:.3g} |"
                      for name, row in report.items()]
            parts.append("")
        machine, versions = record["machine"], record["versions"]
        parts += [f"{len(next(iter(report.values()))['ratios'])} rounds on {machine['gpu'] or machine['processor']}, "
                  f"{machine['threads']} thread, load {machine['load'][0]:.1f} of {machine['cores']} cores; "
                  f"torch {versions['torch']}; {record['date'][:10]}; `{record['command']}`", ""]
    return "\n".join(parts)


def main():
    OUT.mkdir(exist_ok=True)
    (OUT / "benchmarks.md").write_text(benchmarks() + "\n")
    (OUT / "ledger.md").write_text(ledger() + "\n")
    (OUT / "run_times.md").write_text(run_times() + "\n")


if __name__ == "__main__":
    main()
