"""Every assignment proved: what students get, that the hidden tests tell right from wrong, and that attacks score nothing.

Where bubblewrap does not run, a plain process still proves the scores, but not the containment.
"""

import csv
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "assignments"
sys.path.insert(0, str(FOLDER))
import grade  # noqa: E402
import worker  # noqa: E402

NAMES = sorted(path.parent.name for path in FOLDER.glob("*/assignment.md"))
ATTACKED = "01_exact_inference"
UNSAFE = not grade.sandbox_works()
each_assignment = pytest.mark.parametrize("name", NAMES)
contained = pytest.mark.skipif(UNSAFE, reason="bubblewrap does not run here: scores are proved, containment is not")


def cells_of(path):
    """[(title, source)] of the `# %% title` cells of a Python file; the imports at its top belong to every cell."""
    top, *parts = re.split(r"(?m)^# %% (.*)\n", path.read_text())
    return [(title, top + source) for title, source in zip(parts[::2], parts[1::2], strict=True)]


WRONG = [(name, *cell) for name in NAMES for cell in cells_of(FOLDER / name / "wrong_solutions.py")]
VARIANTS = [(name, *cell) for name in NAMES for cell in cells_of(FOLDER / name / "variant_solutions.py")]
ATTACKS = cells_of(FOLDER / "attacks.py")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{name: tests, cells of the instructor, path of the student's notebook, path of the zip}."""
    out = tmp_path_factory.mktemp("assignments")
    subprocess.run([sys.executable, FOLDER / "build.py", "--out", out], check=True, capture_output=True)
    found = {}
    for name in NAMES:
        archive = out / name / "autograder" / f"{name}-autograder.zip"
        instructor = grade.code_cells(out / name / "autograder" / f"{name}.ipynb")
        found[name] = dict(tests=grade.load_tests(archive), instructor=instructor, zip=archive,
                           student=out / name / "student" / f"{name}.ipynb")
    return found


def points_of(files):
    return {file.name: (file.score, file.possible) for file in files}


def scores(cells, tests):
    files, errors, _ = grade.grade(cells, tests, UNSAFE)
    return points_of(files), files, errors


def defined_in(source):
    """Names of the functions that a cell defines."""
    return set(re.findall(r"(?m)^def (\w+)", source))


@pytest.fixture(scope="module")
def graded(built):
    """{(name, title): (points, files)} of the instructor's notebook with one function replaced, all in one worker.

    Only the tests that call a replaced function are run: no other function of the instructor's calls it (tested below).
    """
    found = {}
    for name in NAMES:
        submission = grade.Submission(built[name]["instructor"], UNSAFE)
        submission.start()
        for owner, title, source in [*WRONG, *VARIANTS]:
            if owner == name:
                submission.cells = [*built[name]["instructor"], source]
                submission.run()
                concerned = {file: test for file, test in built[name]["tests"].items()
                             if defined_in(source) & set(re.findall(r"\w+", test))}
                files = grade.run_tests(concerned, submission)
                found[name, title] = points_of(files), files
        submission.stop()
    return found


# --- what students get -----------------------------------------------------------------------------------------------

@each_assignment
def test_student_version_holds_neither_solutions_nor_hidden_tests(built, name):
    text = built[name]["student"].read_text()
    nbformat.validate(nbformat.read(built[name]["student"], as_version=4))
    shown = {line.strip() for cell in grade.code_cells(built[name]["student"]) for line in cell.splitlines()}
    source = (FOLDER / name / "assignment.md").read_text()
    for solution in re.findall(r"(?ms)^ +# BEGIN SOLUTION\n(.*?)^ +# END SOLUTION", source):
        assert not {line.strip() for line in solution.splitlines() if line.strip()} & shown
    for test in re.findall(r"def (test_\w+)", source):
        assert test not in text
    assert "failure_message" not in text and "import otter" not in text and "SOLUTION" not in text


@each_assignment
def test_student_version_needs_nothing_but_its_requirements(built, name):
    wanted = set((FOLDER / name / "requirements.txt").read_text().split())
    code = "\n".join(grade.code_cells(built[name]["student"]))
    assert set(re.findall(r"(?m)^\s*(?:import|from) (\w+)", code)) <= wanted


def test_the_built_book_shows_no_solution():
    pages = sorted((ROOT / "_build" / "html").rglob("*.html"))
    if not pages:
        pytest.skip("no built book: run `make book`")
    tests = {test for name in NAMES for test in re.findall(r"def (test_\w+)", (FOLDER / name / "assignment.md").read_text())}
    for page in pages:
        if page.parent.name != "_modules":
            text = page.read_text()
            assert "BEGIN SOLUTION" not in text and "failure_message:" not in text, page
            assert not [test for test in tests if f"def {test}(" in text], page


# --- the hidden tests tell right from wrong ----------------------------------------------------------------------------

@each_assignment
def test_instructor_gets_everything_and_runs_without_an_error(built, name):
    points, _, errors = scores(built[name]["instructor"], built[name]["tests"])
    assert errors == []
    assert all(score == possible > 0 for score, possible in points.values())


@each_assignment
def test_the_points_are_those_that_the_text_promises(built, name):
    points, _, _ = scores([], built[name]["tests"])
    text = (FOLDER / name / "assignment.md").read_text()
    promised = [int(number) for number in re.findall(r"(?m)^## Exercise \d+ \((\d+) points?\)", text)]
    assert [possible for _, possible in points.values()] == promised
    assert f"There are {sum(promised)} points" in text


@each_assignment
def test_empty_version_gets_nothing_and_its_checks_say_why(built, name):
    points, _, errors = scores(grade.code_cells(built[name]["student"]), built[name]["tests"])
    assert all(score == 0 for score, _ in points.values())
    assert len(errors) == len(points) and all("AssertionError: " in error for error in errors)


@each_assignment
def test_the_solutions_of_the_questions_do_not_call_each_other(built, name):
    """So a mistake costs points in its own question only, whatever a student's functions do among themselves."""
    solutions = [cell for cell in built[name]["instructor"] if defined_in(cell)]
    for cell in solutions:
        others = set().union(*(defined_in(other) for other in solutions if other != cell))
        assert not others & set(re.findall(r"\w+", cell))


@pytest.mark.parametrize("name, title", [cell[:2] for cell in WRONG])
def test_wrong_solution_loses_points_in_its_question_only(graded, name, title):
    points, _ = graded[name, title]
    assert {question for question, (score, possible) in points.items() if score < possible} == {title.split(":")[0]}


@pytest.mark.parametrize("name, title", [cell[:2] for cell in VARIANTS])
def test_right_solution_by_another_road_gets_everything(graded, name, title):
    points, _ = graded[name, title]
    assert title.split(":")[0] in points
    assert all(score == possible for score, possible in points.values())


@each_assignment
def test_every_question_has_a_wrong_and_a_variant_solution(built, name):
    questions = {Path(test).stem for test in built[name]["tests"]}
    for cells in (WRONG, VARIANTS):
        assert {title.split(":")[0] for owner, title, _ in cells if owner == name} == questions


@each_assignment
def test_every_hidden_test_rejects_something(built, graded, name):
    wrong = [cell[:2] for cell in WRONG if cell[0] == name]
    results = [(file.name, result) for key in wrong for file in graded[key][1] for result in file.test_case_results]
    rejected = {(file, result.test_case.name) for file, result in results if not result.passed}
    _, files, _ = scores([], built[name]["tests"])
    assert rejected == {(file.name, case.name) for file in files for case in file.test_cases}


@each_assignment
def test_every_case_is_hidden_and_says_what_is_wrong(built, name):
    _, files, _ = scores([], built[name]["tests"])
    cases = [case for file in files for case in file.test_cases]
    assert cases and all(case.hidden and case.points > 0 and len(case.failure_message or "") > 30 for case in cases)


# --- attacks -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("title, source", ATTACKS, ids=[title for title, _ in ATTACKS])
def test_attack_scores_nothing(built, title, source, monkeypatch):
    if UNSAFE and re.search("disk|files", title):
        pytest.skip("without bubblewrap this would really happen")
    monkeypatch.setattr(grade, "CELL_SECONDS", 1)
    monkeypatch.setattr(grade, "CALL_SECONDS", 1)
    assignment = built[ATTACKED]
    points, _, errors = scores([*grade.code_cells(assignment["student"]), source], assignment["tests"])
    assert all(score == 0 for score, _ in points.values())
    assert UNSAFE or not any("LEAK" in error for error in errors)


@contained
def test_a_folder_with_hostile_notebooks_is_graded_as_an_instructor_would(built, tmp_path):
    assignment = built[ATTACKED]
    blank = nbformat.read(assignment["student"], as_version=4)
    hostile = nbformat.read(assignment["student"], as_version=4)
    hostile.cells.append(nbformat.v4.new_code_cell("import os\nos._exit(0)"))
    nosy = nbformat.read(assignment["student"], as_version=4)
    nosy.cells.append(nbformat.v4.new_code_cell("def log_mean_exp(log_w):\n    raise ValueError(f'ARGUMENTS {log_w}')"))
    (tmp_path / "in" / "ada").mkdir(parents=True)
    shutil.copy(assignment["zip"].with_name(f"{ATTACKED}.ipynb"), tmp_path / "in" / "ada" / "final.ipynb")
    nbformat.write(blank, tmp_path / "in" / "blank.ipynb")
    nbformat.write(hostile, tmp_path / "in" / "hostile.ipynb")
    nbformat.write(nosy, tmp_path / "in" / "nosy.ipynb")
    (tmp_path / "in" / "torn.ipynb").write_text('{"cells": [')
    run = subprocess.run([sys.executable, FOLDER / "grade.py", assignment["zip"], tmp_path / "in", tmp_path / "out"],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    table = (tmp_path / "out" / "grades.csv").read_text().splitlines()
    rows = {row["name"]: row for row in csv.DictReader(table)}
    assert list(rows) == ["ada_final", "blank", "hostile", "nosy", "torn"]
    assert rows["ada_final"]["score"] == rows["ada_final"]["possible"]
    assert all(float(rows[name]["score"]) == 0 for name in ("blank", "hostile", "nosy", "torn"))
    for name in rows:
        text = (tmp_path / "out" / f"{name}.md").read_text()
        assert "assert_allclose" not in text and "def test_" not in text
    assert "did not run to its end" in (tmp_path / "out" / "hostile.md").read_text()
    assert "not a notebook" in (tmp_path / "out" / "torn.md").read_text()
    assert "`log_mean_exp`: it raised ValueError" in (tmp_path / "out" / "nosy.md").read_text()
    assert "ARGUMENTS" not in (tmp_path / "out" / "nosy.md").read_text()
    assert "lost 2: The conditional mean is wrong" in (tmp_path / "out" / "blank.md").read_text()


def test_grading_refuses_an_empty_folder_and_two_notebooks_of_one_name(tmp_path):
    with pytest.raises(SystemExit, match="share the name a_b"):
        (tmp_path / "a").mkdir()
        for path in ("a/b.ipynb", "a_b.ipynb"):
            (tmp_path / path).write_text("{}")
        grade.find_notebooks(tmp_path)
    assert grade.find_notebooks(tmp_path / "a") == {"b": tmp_path / "a" / "b.ipynb"}


def test_values_survive_the_wire_and_objects_do_not():
    import numpy as np
    value = {"a": [1, 2.5, None, True], "b": (np.arange(6.0).reshape(2, 3), np.float32(1.5)), "c": np.array([True, False])}
    got = worker.decode(json.loads(json.dumps(grade.to_wire(value))))
    assert got["a"] == value["a"] and got["b"][1] == 1.5 and got["b"][1].dtype == np.float32
    np.testing.assert_array_equal(got["b"][0], value["b"][0])
    np.testing.assert_array_equal(got["c"], value["c"])
    with pytest.raises(TypeError, match="numbers and arrays are expected"):
        worker.encode(object())
    with pytest.raises(ValueError, match="unknown kind 'function'"):  # only the worker turns source into functions
        worker.decode({"function": "lambda: 0"})
    with pytest.raises(ValueError, match="dtype"):
        worker.decode({"array": ["|O", [1], ""]})
