"""Cells tagged `scratch` of book/NN_name/*.md -> dlgm_tutorial/scratch/name.py (--check: compare only)."""

import ast
import sys

from notebooks import ROOT, from_source, pages

PURE = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)


def scratch_cells(source):
    """[(cell id, text)] of one page; stops at a cell that does more than import and define."""
    cells = []
    for cell in from_source(source).cells:
        if cell.cell_type != "code" or "scratch" not in cell.metadata.get("tags", []):
            continue
        for node in ast.parse(cell.source).body:
            is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if not (isinstance(node, PURE) or is_docstring):
                raise SystemExit(f"{source.name}: a scratch cell only imports and defines: {ast.unparse(node)[:60]}")
        cells.append((cell.id, cell.source.strip()))
    return cells


def export(sources):
    """The module text of one chapter's pages, or None where no cell is tagged. The same cell on two pages enters once."""
    parts, seen = [], set()
    for source in sources:
        for number, text in scratch_cells(source):
            if text not in seen:
                parts.append(f"# --- {source.relative_to(ROOT).with_suffix('.ipynb').as_posix()}, cell {number}\n{text}\n")
            seen.add(text)
    if not parts:
        return None
    chapter = sources[0].parent.relative_to(ROOT).as_posix()
    return f'"""The from-scratch code of {chapter}. Written by `make scratch`; edit the chapter."""\n\n' + "\n\n".join(parts)


def main(check):
    chapters = {}
    for source in pages():
        chapters.setdefault(source.parent.name[3:], []).append(source)
    stale = 0
    for name, sources in chapters.items():
        target, text = ROOT / "dlgm_tutorial" / "scratch" / f"{name}.py", export(sources)
        old = target.read_text() if target.exists() else None
        if old == text:
            continue
        stale += 1
        if check:
            print(f"{target.relative_to(ROOT)} differs from its chapter; run `make scratch`")
        elif text is None:
            target.unlink()
        else:
            compile(text, str(target), "exec")
            target.write_text(text)
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv) > 0)
