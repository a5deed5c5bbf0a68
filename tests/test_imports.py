"""The direction of imports: chapters import shared modules, never each other; oracles and scratch never torch."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dlgm_tutorial"
CHAPTERS = {"exact_inference", "stochastic_backprop", "mixture_latents", "gp_random_inference", "analytic_em", "short_run_mcmc"}
MODULES = sorted(PACKAGE.glob("*.py"))
SCRATCH = sorted(PACKAGE.glob("scratch/*.py"))
NUMERICS = {"likelihoods", "objectives", "distributions", "networks", "mcmc", "evaluation", "training", "datasets"} | CHAPTERS


def imported(path):
    """Every module that the file imports, at any depth; ours as dlgm_tutorial.name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = "dlgm_tutorial" if node.level else None
            base = ".".join(filter(None, [package, node.module]))
            names |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return names


def ours(path):
    parts = [name.split(".") for name in imported(path)]
    return {p[1] for p in parts if p[0] == "dlgm_tutorial" and len(p) > 1}


def outside(path):
    return {name.split(".")[0] for name in imported(path)} - {"dlgm_tutorial"}


each_module = pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)


@each_module
def test_chapters_never_import_each_other_and_shared_modules_no_chapter(path):
    if path.stem != "reproduce":
        assert not (ours(path) & CHAPTERS) - {path.stem}


@each_module
def test_numerics_do_not_import_plotting_or_scratch(path):
    if path.stem in NUMERICS:
        assert not ours(path) & {"plotting", "scratch", "oracles", "reproduce"}
        assert "matplotlib" not in outside(path)


def test_oracles_import_nothing_of_ours_and_never_torch():
    allowed = {"numpy", "scipy", "mpmath", "autograd", "itertools", "math", "functools"}
    assert outside(PACKAGE / "oracles.py") <= allowed and not ours(PACKAGE / "oracles.py")


@pytest.mark.parametrize("path", SCRATCH, ids=lambda p: p.stem)
def test_scratch_is_numpy_scipy_and_autograd(path):
    assert outside(path) <= {"numpy", "scipy", "autograd", "itertools", "math", "functools"}
    assert ours(path) <= {"scratch"}


def test_the_package_itself_exports_nothing_but_its_modules():
    assert not imported(PACKAGE / "__init__.py")


def test_the_reader_of_imports_sees_every_form(tmp_path):
    file = tmp_path / "x.py"
    file.write_text("import dlgm_tutorial.training\nfrom dlgm_tutorial import mcmc as m\ndef f():\n    from .evaluation import g\n")
    assert {"training", "mcmc", "evaluation"} <= ours(file)
