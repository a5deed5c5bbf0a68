"""The experiment command line, on a tiny experiment: the file it writes, resumption, merging, bad input."""

import getpass
import io
import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch

from dlgm_tutorial import reproduce
from dlgm_tutorial.training import fit

X = np.arange(12.0).reshape(6, 2) / 12


class Mean(torch.nn.Module):
    """The mean of a unit Gaussian, trained: the smallest model there is."""

    def __init__(self):
        super().__init__()
        self.loc = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def bound(self, x):
        return -0.5 * ((x - self.loc)**2).sum(-1)


@pytest.fixture
def tiny(monkeypatch):
    """Register one experiment, 99 tiny-mean, instead of those of the package."""
    monkeypatch.setattr(reproduce, "_REGISTRY", {})
    monkeypatch.setattr(reproduce, "experiments", lambda: dict(sorted(reproduce._REGISTRY.items())))
    calls = []

    @reproduce.experiment("99", "tiny-mean", paper="A paper 2014", table="Table 1", hours=0.001, steps=8)
    def tiny_mean(run):
        """Fit a mean.

        And nothing more.
        """
        calls.append(run)
        model = Mean()
        history = fit(model, X, batch_size=3, lr=0.1, record_every=4, **run.fit_options("mean"))
        figures = {"bound": np.float64(history[-1]["bound"]), "loc": {"first": model.loc[0], "all": model.loc},
                   "seed squared": run.seed**2, "steps": run.steps, "note": "tiny"}
        return figures, {"loc": model.loc}
    return calls


def written(folder):
    return json.loads((folder / "99-tiny-mean.json").read_text())


def test_results_file_holds_what_was_run(tiny, tmp_path, capsys):
    arguments = ["99", "tiny-mean", "--seeds", "0-2", "--out", str(tmp_path / "out"), "--device", "cpu",
                 "--checkpoint-dir", str(tmp_path / "kept"), "--data-dir", str(tmp_path)]
    assert reproduce.main(arguments) == 0
    contents = written(tmp_path / "out")
    assert contents["command"] == "python -m dlgm_tutorial.reproduce 99 tiny-mean --seeds 0-2 --device cpu"
    assert [run["seed"] for run in contents["runs"]] == contents["seeds"] == [0, 1, 2]
    assert contents["steps"] == 8 and contents["title"] == "Fit a mean." and contents["tf32"] is False
    assert contents["versions"]["torch"] == str(torch.__version__) and contents["device"]["type"] == "cpu"
    squares = contents["summary"]["seed squared"]
    assert squares == {"mean": 5 / 3, "seeds": 3, "standard_error": pytest.approx(np.std([0, 1, 4], ddof=1) / 3**0.5)}
    assert "loc.first" in contents["summary"] and "note" not in contents["summary"]
    assert contents["rows"][0]["figure"] == "bound"
    with np.load(tmp_path / "out" / "99-tiny-mean.npz") as arrays:  # of the first seed
        np.testing.assert_array_equal(arrays["loc"], contents["runs"][0]["figures"]["loc"]["all"])
    progress = capsys.readouterr().err.splitlines()
    assert len(progress) == 6 and re.match(r"99-tiny-mean seed 0 mean: step 4/8, bound -\d", progress[0])
    text = (tmp_path / "out" / "99-tiny-mean.json").read_text()
    for private in (socket.gethostname(), str(tmp_path), os.path.expanduser("~"), os.getcwd(), f"/{getpass.getuser()}"):
        assert private not in text
    assert sorted(p.name for p in (tmp_path / "kept").iterdir()) == [f"99-tiny-mean-seed{s}-mean.pt" for s in range(3)]


def test_checkpoints_are_resumed_and_runs_with_equal_seeds_agree(tiny, tmp_path):
    kept = ["--checkpoint-dir", str(tmp_path / "kept"), "--device", "cpu", "--out"]
    reproduce.main(["99", "tiny-mean", "--steps", "4", *kept, str(tmp_path / "half")])
    reproduce.main(["99", "tiny-mean", *kept, str(tmp_path / "resumed")])
    reproduce.main(["99", "tiny-mean", "--device", "cpu", "--out", str(tmp_path / "whole")])
    half, resumed, whole = (written(tmp_path / name)["runs"][0]["figures"] for name in ("half", "resumed", "whole"))
    assert resumed == whole and half["steps"] == 4 and half["loc"] != whole["loc"]


def test_merge_joins_seeds_and_equals_one_sweep(tiny, tmp_path):
    run = lambda seeds, out: reproduce.main(["99", "tiny-mean", "--device", "cpu", "--seeds", seeds, "--out",
                                             str(tmp_path / out)])
    for seeds, out in (("1-2", "b"), ("0", "a"), ("0-2", "all")):
        run(seeds, out)
    assert reproduce.main(["99", "tiny-mean", "--merge", str(tmp_path / "b"), str(tmp_path / "a"),
                           "--out", str(tmp_path / "joined")]) == 0
    joined, whole = written(tmp_path / "joined"), written(tmp_path / "all")
    assert joined["summary"] == whole["summary"] and joined["seeds"] == whole["seeds"]
    assert (tmp_path / "joined" / "99-tiny-mean.npz").read_bytes() == (tmp_path / "all/99-tiny-mean.npz").read_bytes()


@pytest.mark.parametrize("change, message", [(None, "hold the same seed twice: \\[0, 0\\]"),
                                             ({"steps": 9}, "is of another run: steps is 9, expected 8"),
                                             ("absent", "nothing to merge: no .*b/99-tiny-mean.json")])
def test_merge_refuses_parts_that_do_not_belong_together(tiny, tmp_path, capsys, change, message):
    for out in ("a", "b"):
        reproduce.main(["99", "tiny-mean", "--device", "cpu", "--out", str(tmp_path / out)])
    file = tmp_path / "b" / "99-tiny-mean.json"
    if change == "absent":
        file.unlink()
    else:
        file.write_text(json.dumps({**json.loads(file.read_text()), **(change or {})}))
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["99", "tiny-mean", "--merge", *(str(tmp_path / part) for part in "ab"), "--out", str(tmp_path)])
    assert stop.value.code == 2 and re.search(message, capsys.readouterr().err)
    assert not (tmp_path / "99-tiny-mean.json").exists()


def test_list_names_paper_table_and_hours(tiny, capsys):
    assert reproduce.main(["--list"]) == 0
    assert re.fullmatch(r"99 tiny-mean +Fit a mean\. · A paper 2014, Table 1 · 0\.001 h\n", capsys.readouterr().out)


@pytest.mark.parametrize("arguments", [["99", "no-such"], ["99"], ["42", "tiny-mean"], []])
def test_unknown_names_exit_2_with_the_list(tiny, capsys, arguments):
    assert reproduce.main(arguments) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"no experiment {' '.join(arguments) or 'nothing'!r}; there are:\n99 tiny-mean")


@pytest.mark.parametrize("arguments, message", [
    (["--seeds", "0-"], "expected different seeds such as 3, 0-4 or 0,2,5-7, got '0-'"),
    (["--seeds", "4-2"], "got '4-2'"), (["--seeds", "1,0-2"], "got '1,0-2'"),
    (["--steps", "0"], "--steps must be at least 1"),
    (["--steps", "many"], "invalid int value: 'many'")])
def test_bad_options_exit_2(tiny, capsys, arguments, message):
    with pytest.raises(SystemExit) as stop:
        reproduce.main(["99", "tiny-mean", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_unknown_device_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match="device must be 'auto' or a device of this machine"):
        reproduce.main(["99", "tiny-mean", "--device", "abacus", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_seeds_are_ranges_and_lists():
    assert reproduce._seeds("0,2,5-7") == [0, 2, 5, 6, 7]


@pytest.mark.parametrize("figures, message", [({"a": {"b": float("nan")}}, "figure figures.a.b is nan: expected a finite"),
                                              ({"a": [object()]}, r"figure figures.a\[0\] must be a number, text")])
def test_figures_must_be_plain_and_finite(monkeypatch, tiny, tmp_path, figures, message):
    reproduce.experiment("99", "bad")(lambda run: figures)
    with pytest.raises(ValueError, match=message):
        reproduce.main(["99", "bad", "--out", str(tmp_path), "--device", "cpu"])
    assert not list(tmp_path.iterdir())


def test_large_arrays_are_refused(tiny, tmp_path):
    noise = np.random.default_rng(0).standard_normal(2**18)
    reproduce.experiment("99", "large")(lambda run: ({"a": 1}, {"noise": noise}))
    with pytest.raises(ValueError, match=r"arrays of 99-large take \d+ bytes compressed, at most 1048576 are kept"):
        reproduce.main(["99", "large", "--out", str(tmp_path), "--device", "cpu"])


def test_experiment_may_make_its_own_rows(tiny, tmp_path):
    rows = lambda runs: [{"seeds": len(runs), "best": max(run["figures"]["a"] for run in runs)}]
    reproduce.experiment("99", "rows", rows=rows)(lambda run: {"a": run.seed})
    reproduce.main(["99", "rows", "--seeds", "3,5", "--out", str(tmp_path), "--device", "cpu"])
    assert json.loads((tmp_path / "99-rows.json").read_text())["rows"] == [{"seeds": 2, "best": 5}]


def test_fit_options_need_a_number_of_steps(tiny, tmp_path):
    reproduce.experiment("99", "endless")(lambda run: run.fit_options())
    with pytest.raises(ValueError, match="99-endless has no default number of steps: give --steps"):
        reproduce.main(["99", "endless", "--out", str(tmp_path), "--device", "cpu"])


@pytest.mark.parametrize("chapter, name", [("1", "a"), ("01", "Two Words"), ("01", "a_b")])
def test_malformed_names_are_refused(chapter, name):
    with pytest.raises(ValueError, match="an experiment is named by two digits and lower-case words"):
        reproduce.experiment(chapter, name)


def test_two_modules_cannot_register_one_name(tiny):
    def other(run):
        return {}
    other.__module__ = "another"
    with pytest.raises(ValueError, match="99 tiny-mean is registered twice: in .*test_reproduce and in another"):
        reproduce.experiment("99", "tiny-mean")(other)


@pytest.mark.parametrize("terminal, end", [(True, "\r"), (False, "\n")])
def test_progress_line_rewrites_itself_on_a_terminal_only(terminal, end):
    file = io.StringIO()
    file.isatty = lambda: terminal
    line = reproduce.progress_line("a run", file)
    for step in (1, 2):
        line(step, 2, {"bound": -1.0, "seconds": 3.0})
    assert file.getvalue() == (f"a run: step 1/2, bound -1.000 nats, 3 s{end}"
                               "a run: step 2/2, bound -1.000 nats, 3 s\n")


def test_every_experiment_of_the_package_is_found_and_described():
    known = reproduce.experiments()
    for (chapter, name), entry in known.items():
        assert entry.title.endswith("."), f"{chapter} {name}: the docstring's first line is what --list prints"
        assert entry.function.__module__.rsplit(".", 1)[-1].startswith(f"ch{chapter}"), f"{chapter} {name}"


def test_module_runs_as_a_command():
    done = subprocess.run([sys.executable, "-W", "error", "-m", "dlgm_tutorial.reproduce", "00", "no-such"],
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("no experiment '00 no-such'; there are:")


def test_summarise_gives_mean_and_standard_error_over_seeds():
    summary = reproduce.summarise([{"figures": {"nats": v, "part": {"kl": 2 * v}, "list": [v]}} for v in (1.0, 2.0, 6.0)])
    assert set(summary) == {"nats", "part.kl"}
    assert summary["nats"]["mean"] == 3.0 and summary["nats"]["seeds"] == 3
    assert abs(summary["part.kl"]["standard_error"] - 2 * (7 / 3) ** 0.5) < 1e-12
