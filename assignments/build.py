"""Builds what students and graders get from the one source of each assignment.

    python assignments/build.py [--out build/assignments] [NAME ...]        # e.g. 01_exact_inference; none: all

assignments/NAME/assignment.md becomes OUT/NAME/student/NAME.ipynb, without solutions and hidden tests, and
OUT/NAME/autograder/: the zip with the hidden tests (for grade.py and for Gradescope) and the instructor's notebook.
"""

import argparse
import contextlib
import io
import shutil
from pathlib import Path

HERE = Path(__file__).resolve().parent


def sources(names=()):
    """Return the folders of the assignments of these names, or of all."""
    known = {path.parent.name: path.parent for path in sorted(HERE.glob("*/assignment.md"))}
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise SystemExit(f"no assignment {', '.join(unknown)}: there are {', '.join(known)}")
    return [known[name] for name in names] if names else list(known.values())


def build(source, out):
    """Write OUT/NAME/{student,autograder} from the folder `source`; what was there goes."""
    import jupytext
    from otter.assign import main as assign

    folder = out / source.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    notebook = folder / f"{source.name}.ipynb"
    jupytext.write(jupytext.read(source / "assignment.md"), notebook)
    shutil.copy(source / "requirements.txt", folder)
    # That the solutions pass their own tests is checked where it counts, in the sandbox (tests/test_assignments.py).
    with contextlib.redirect_stdout(io.StringIO()):
        assign(str(notebook), str(folder), no_run_tests=True, no_pdfs=True)
    [archive] = (folder / "autograder").glob("*.zip")  # otter puts the time into its name
    archive.rename(folder / "autograder" / f"{source.name}-autograder.zip")
    notebook.unlink()
    (folder / "requirements.txt").unlink()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--out", type=Path, default=HERE.parent / "build" / "assignments")
    args = parser.parse_args()
    for source in sources(args.names):
        build(source, args.out.resolve())
        print(f"{source.name}: {args.out / source.name}/student and /autograder")


if __name__ == "__main__":
    main()
