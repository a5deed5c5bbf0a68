"""Grades a folder of notebooks with the hidden tests of one assignment.

    python assignments/grade.py AUTOGRADER.zip SUBMISSIONS OUT

SUBMISSIONS holds NAME.ipynb or NAME/anything.ipynb. OUT/grades.csv gets one row a notebook, OUT/NAME.md the feedback
for its author (failure messages, never a test), OUT/NAME.txt the details for the instructor.

The notebook runs in `worker.py`, inside a sandbox. The tests run here: a test that asks for `posterior` gets a stand-in
that sends the arguments to the worker and hands back the values it returns. Tests, reference values and comparisons
never enter the author's process.
"""

import argparse
import builtins
import csv
import functools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings
import zipfile
from pathlib import Path

import nbformat

with warnings.catch_warnings():  # ipylab, which otter imports, uses what traitlets has deprecated
    warnings.simplefilter("ignore", DeprecationWarning)
    from otter.test_files import ExceptionTestFile

import worker

NOTEBOOK_SECONDS, CELL_SECONDS, CALL_SECONDS = 120, 30, 10
LIMITS = dict(memory_gib=4, processes=64, file_mib=256)
MAX_REPLY_BYTES = 2**26


class SubmissionError(Exception):
    """The author's code raised, died, or did not answer in time."""


class Function(str):
    """Source of a function to be passed to the author's function: Function("lambda z: -z")."""


# --- the sandbox -----------------------------------------------------------------------------------------------------

@functools.cache
def sandbox_works():
    try:
        trial = ["bwrap", "--unshare-all", "--ro-bind", "/", "/", "true"]
        return subprocess.run(trial, capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def sandbox():
    """Command of a sandboxed worker: no network, no home, no tests; a read-only system; nobody's rights."""
    command = ["bwrap", "--unshare-all", "--uid", "65534", "--gid", "65534", "--die-with-parent", "--new-session",
               "--clearenv", "--proc", "/proc", "--dev", "/dev", "--size", str(2**28), "--tmpfs", "/tmp"]
    for name, value in {"HOME": "/tmp", "MPLBACKEND": "agg", "OMP_NUM_THREADS": "1"}.items():
        command += ["--setenv", name, value]
    for path in dict.fromkeys(["/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", sys.base_prefix, sys.prefix]):
        if os.path.exists(path):
            command += ["--ro-bind", path, path]
    return [*command, "--ro-bind", worker.__file__, "/worker.py", "--chdir", "/tmp", sys.executable, "-I", "/worker.py"]


# --- one submission --------------------------------------------------------------------------------------------------

class Submission:
    """A worker that has run the notebook; started again after the author's code killed or hung it."""

    def __init__(self, cells, unsafe=False):
        self.cells, self.process, self.errors, self.raised = cells, None, [], {}
        self.command = [sys.executable, "-I", worker.__file__] if unsafe else sandbox()
        # outside the sandbox the count would include everything else that the user runs
        self.limits = LIMITS | ({"processes": None} if unsafe else {})
        self.hopeless = False

    def start(self):
        """Start a worker and let it run the notebook."""
        if self.hopeless:
            raise SubmissionError("the notebook could not be run")
        self.process = subprocess.Popen(self.command, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL, start_new_session=True)
        self.hopeless = True  # until it has run once
        self.run()
        self.hopeless = False

    def run(self):
        """Let the worker execute the cells."""
        answer = self.ask(NOTEBOOK_SECONDS, cells=self.cells, limits=self.limits, cell_seconds=CELL_SECONDS)
        self.errors = self.errors or [str(error)[:300] for error in list(answer.get("errors") or [])[:50]]
        hung = list(answer.get("hung") or [])  # a cell that ran out of time is left out of the next start
        self.cells = ["" if number in hung else cell for number, cell in enumerate(self.cells, 1)]

    def ask(self, seconds, **message):
        """Send a request, return the reply. A worker that is silent, dead or unreadable is killed."""
        watchdog = threading.Timer(seconds, self.kill)  # writes need it too: a worker may stop reading
        watchdog.start()
        try:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline(MAX_REPLY_BYTES))
            if not isinstance(answer, dict):
                raise ValueError("not an object")
            return answer
        except (OSError, ValueError, RecursionError) as error:
            late = not watchdog.is_alive()
            self.stop()
            raise SubmissionError(f"no answer within {seconds} s" if late else
                                  "the program ended (exit, crash, out of memory)") from error
        finally:
            watchdog.cancel()

    def kill(self):
        os.killpg(self.process.pid, signal.SIGKILL)

    def stop(self):
        """End the worker and all that it started."""
        if self.process is not None:
            self.kill()
            self.process.wait()
            self.process.stdout.close()
            try:
                self.process.stdin.close()
            except OSError:
                pass
            self.process = None

    def stand_in(self, name):
        """Return a function that calls the author's function of this name, over there."""
        def call(*args, **kwargs):
            if self.process is None:
                self.start()
            try:
                answer = self.ask(CALL_SECONDS, name=name, args=to_wire(args), kwargs=to_wire(kwargs))
            except SubmissionError as error:
                self.raised.setdefault(name, str(error))
                raise
            if "error" in answer:
                # The kind of exception goes into the feedback, not its message, which could carry a test's arguments.
                kind = str(answer["error"]).split(":")[0]
                self.raised.setdefault(name, f"it raised {kind if hasattr(builtins, kind) else 'an exception'}")
                raise SubmissionError(str(answer["error"])[:500])
            return worker.decode(answer.get("value"))
        return call


def to_wire(value):
    """Encode an argument: what `worker.encode` can, and the source of a function."""
    if isinstance(value, Function):
        return {"function": str(value)}
    if isinstance(value, (list, tuple)):
        return {type(value).__name__: [to_wire(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": {k: to_wire(v) for k, v in value.items()}}
    return worker.encode(value)


def run_tests(tests, submission):
    """Run every hidden test on a submission; return otter's test files, which hold the results."""
    files = [ExceptionTestFile.from_string(source, path=name) for name, source in tests.items()]
    names = {name for file in files for case in file.test_cases for name in case.body._get_func_params()}
    for file in files:
        file.run({name: submission.stand_in(name) for name in names})
    return files


def grade(cells, tests, unsafe=False):
    """Run the code cells of a notebook, then every test; return otter's test files with results, errors of the
    notebook, and {function: what went wrong when the tests called it}.
    """
    submission = Submission(cells, unsafe)
    try:
        try:
            submission.start()
        except SubmissionError as error:
            submission.errors = [f"the notebook did not run to its end: {error}"]
        return run_tests(tests, submission), submission.errors, submission.raised
    finally:
        submission.stop()


# --- a folder of them ------------------------------------------------------------------------------------------------

def code_cells(notebook):
    return [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code"]


def load_tests(autograder_zip):
    """Return {file: source} of the hidden tests, q2 before q10."""
    with zipfile.ZipFile(autograder_zip) as archive:
        names = [name for name in archive.namelist() if re.fullmatch(r"tests/\w+\.py", name)]
        names.sort(key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])
        return {name: archive.read(name).decode() for name in names}


def find_notebooks(folder):
    """Return {name: path} of the submissions; the name of NAME/anything.ipynb is NAME_anything."""
    paths = sorted(p for p in folder.rglob("*.ipynb") if ".ipynb_checkpoints" not in p.parts)
    found = {}
    for path in paths:
        name = "_".join(path.relative_to(folder).with_suffix("").parts)
        if name in found:
            raise SystemExit(f"{path} and {found[name]} would share the name {name}: rename one")
        found[name] = path
    return found


def feedback(files, errors, raised):
    """Return the Markdown that the author gets: points and messages, never a test."""
    lines = []
    for file in files:
        lines.append(f"\n## {file.name}: {file.score:g} / {file.possible:g}")
        lost = [result.test_case for result in file.test_case_results if not result.passed]
        lines += [""] * bool(lost) + [f"- lost {case.points:g}: {case.failure_message or case.name}" for case in lost]
    if raised:
        lines += ["\n## When your functions were called\n", *(f"- `{name}`: {what}" for name, what in raised.items())]
    if errors:
        lines += ["\n## While your notebook ran\n", *(f"- {error}" for error in errors)]
    return "\n".join(lines) + "\n"


def grade_notebook(name, path, tests, out, unsafe):
    """Grade one notebook, write its two files, return its row of grades.csv."""
    try:
        cells, unreadable = code_cells(path), []
    except Exception as error:
        cells, unreadable = [], [f"the file is not a notebook: {type(error).__name__}"]
    files, errors, raised = grade(cells, tests, unsafe)
    errors = unreadable + errors
    score, possible = sum(file.score for file in files), sum(file.possible for file in files)
    title = f"{name}: {score:g} / {possible:g}"
    (out / f"{name}.md").write_text(f"# {title}\n{feedback(files, errors, raised)}")
    (out / f"{name}.txt").write_text("\n".join([*errors, *(file.summary() for file in files)]))
    print(title, flush=True)
    points = {file.name: file.score for file in files}
    return {"name": name, **points, "score": score, "possible": possible, "errors": len(errors)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name in ("autograder", "submissions", "out"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--unsafe", action="store_true", help="no sandbox: for notebooks you wrote yourself")
    args = parser.parse_args()
    if not args.unsafe and not sandbox_works():
        raise SystemExit("bubblewrap does not run here (apt install bubblewrap); --unsafe grades without a sandbox")
    if not args.autograder.is_file():
        raise SystemExit(f"no {args.autograder}: build it with `make assignments`")
    notebooks = find_notebooks(args.submissions)
    if not notebooks:
        raise SystemExit(f"no notebook in {args.submissions}")
    if os.geteuid() == 0:
        print("warning: as root the limit on the number of processes does not bind; use an ordinary account",
              file=sys.stderr)
    tests = load_tests(args.autograder)
    args.out.mkdir(parents=True, exist_ok=True)
    rows = [grade_notebook(name, path, tests, args.out, args.unsafe) for name, path in notebooks.items()]
    with open(args.out / "grades.csv", "w", newline="") as handle:
        writer = csv.DictWriter(handle, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
