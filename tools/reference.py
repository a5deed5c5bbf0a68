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
    """A table for each page: its equations with the code that implements them, and under each its checks."""
    by_label, made_by, by_page = checks(), implementations(), {}
    for label, source in equations().items():
        by_page.setdefault(source, []).append(label)
    parts = []
    for source, labels in by_page.items():
        parts += [f"## {_link(source)}", ""]
        verified = [label for label in labels if not label.startswith("def-")]
        defined = [label for label in labels if label.startswith("def-")]
        if verified:
            parts += ["| equation and code | checked | demanded | found |", "|---|---|---|---|"]
        for label in verified:
            code = "".join(f"<br>{_code(name)}" for name in _once(made_by.get(label, [])))
            for i, check in enumerate(by_label.get(label, [{}])):
                head = f"{{eq}}`{label}` {_code(label)}{code}" if i == 0 else ""
                parts.append(f"| {head} | {check.get('what', '')} | {_demanded(check)} | {_found(check)} |")
        if defined:
            parts += ["", f"Definitions, without a check: {', '.join(f'{{eq}}`{label}`' for label in defined)}."]
        parts.append("")
    return "\n".join(parts)


def _once(names):
    """Each name once, where the NumPy version in `scratch` and the PyTorch version share it."""
    short = [name.removeprefix("scratch.") for name in names]
    return sorted(set(short), key=short.index)


def _code(name):
    """A name that a narrow table may break after a dot or an underscore."""
    return "<code class='literal'>" + re.sub(r"([._])", r"\1<wbr>", name) + "</code>"


def _demanded(check):
    # A bar in a cell would end it; a plain hyphen in 1e-12 would let it break.
    rule = check.get("rule", "").replace("|difference| <=", "≤").replace("|want|", "of the value")
    return rule.replace("e-", "e\u2011")


def _found(check):
    if "z" in check:
        return f"{check['z']:.1f} standard errors"
    if check.get("difference", 0.0) <= 0.0:
        return "below" if check.get("rule", "").startswith("never above") else "equal" if check else ""
    return f"{check['difference']:.1e}".replace("e-", "e\u2011")


def _link(source):
    title = re.search(r"(?m)^# (.*)$", source.read_text()).group(1)
    return f"[{title}]({source.relative_to(ROOT / 'book').with_suffix('.ipynb').as_posix()})"


def run_times():
    lines = ["| page | seconds |", "|---|---|"]
    for source in pages():
        record = recorded(source)
        lines.append(f"| {_link(source)} | {record['seconds'] if record else '—'} |")
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
        if record.get("growth"):
            keys = list(record["growth"][0])
            parts += ["| " + " | ".join(keys) + " |", "|" + "---|" * len(keys)]
            parts += ["| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()) + " |"
                      for row in record["growth"]]
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
