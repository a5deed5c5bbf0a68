"""The passport of the notebooks: does each run on an emulated Colab? The emulation itself nightly, its parts always."""

import re
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import colab  # noqa: E402
from notebooks import BOOTSTRAP  # noqa: E402

NOTEBOOKS = sorted(ROOT.glob("book/[0-9]*/[0-9]*.ipynb"))


def test_changes_names_what_moved_or_went_and_not_what_came():
    before = {"numpy": "2.1.3", "torch": "2.13.0", "tqdm": "4.0"}
    after = {"numpy": "2.4.0", "torch": "2.13.0", "pooch": "1.8.2"}
    assert colab.changes(before, after) == ["numpy 2.1.3 -> 2.4.0", "tqdm 4.0 -> removed"]


def test_what_colab_ships_satisfies_what_the_package_needs():
    needs = re.findall(r'"([a-z-]+)>=([\d.]+)"', (ROOT / "pyproject.toml").read_text().split("[project.urls]")[0])
    shipped = dict(need.split("==") for need in colab.SHIPPED if "==" in need)
    number = lambda version: [int(part) for part in version.split(".")]
    assert {"numpy", "scipy", "autograd", "torch"} <= {name for name, _ in needs}
    for name, version in needs:
        assert name not in shipped or number(shipped[name]) >= number(version), name


def test_emulated_machine_sees_nothing_of_this_one(monkeypatch, tmp_path):
    for name in ("PYTHONPATH", "DLGM_DATA_DIR", "PYTHONWARNINGS"):
        monkeypatch.setenv(name, str(ROOT))
    variables = colab.colab_environment(tmp_path, tmp_path)
    assert {name for name, value in variables.items() if str(ROOT) in value and name != "PATH" and name != "PWD"
            and name != "OLDPWD"} == {"GIT_CONFIG_KEY_0"}
    assert variables["GIT_CONFIG_VALUE_0"] in BOOTSTRAP


def test_packages_are_the_installed_ones_not_those_of_a_path(monkeypatch, tmp_path):
    (tmp_path / "ghost.egg-info").mkdir()
    (tmp_path / "ghost.egg-info" / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: ghost\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    installed = colab.packages(Path(sys.prefix))
    assert "pytest" in installed and "ghost" not in installed


def test_what_is_no_notebook_is_named(capsys):
    with pytest.raises(SystemExit) as stop:
        colab.main(["README.md"])
    assert stop.value.code == 2 and "README.md is not a notebook" in capsys.readouterr().err


def notebook(path, *sources):
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources]), path)
    return path


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sources, message", [
    ([BOOTSTRAP, "%pip install -q tqdm==4.66.1"], "tqdm .* -> 4.66.1"),
    ([BOOTSTRAP, "1 / 0"], "ZeroDivisionError"),
    (["import numpy"], "the package was not installed by the notebook")])
def test_passport_is_refused(tmp_path, sources, message):
    result = colab.passport(notebook(tmp_path / "bad.ipynb", *sources), colab.environment(sys.executable))
    assert not result["ok"] and re.search(message, " ".join(result["changed"]) + result["error"])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=[f"{path.parent.name}/{path.stem}" for path in NOTEBOOKS])
def test_passport(path):
    result = colab.passport(path, colab.environment(sys.executable))
    assert result["ok"], result
