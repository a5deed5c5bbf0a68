"""The checks themselves: they pass what is right, and each way of being wrong is caught."""

import json

import numpy as np
import pytest
import torch

from dlgm_tutorial.checks import CheckError, check_below, check_close, check_mc


def test_close_prints_label_tolerance_and_verdict(capsys):
    check_close(torch.tensor([1.0, 2.0]), np.array([1.0, 2.0 + 1e-9]), 1e-8, "eq-x", what="numbers")
    assert capsys.readouterr().out == "ok   eq-x · numbers · |difference| <= 1e-08\n"


@pytest.mark.parametrize("got", [[1.0, 2.1], [1.0, np.nan], [1.0, np.inf]])
def test_close_refuses_what_is_wrong(got):
    with pytest.raises(CheckError, match="eq-x"):
        check_close(got, [1.0, 2.0], 1e-3, "eq-x")


@pytest.mark.parametrize("got", [1.0, np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("want", [np.inf, -np.inf, np.nan])
def test_an_infinite_truth_allows_nothing(got, want):
    with pytest.raises(CheckError):
        check_close(got, want, rtol=1e-3, label="eq-x")
    with pytest.raises(CheckError):
        check_mc(got, want, "eq-x", standard_error=1.0)


def test_mc_refuses_an_infinite_error_bar():
    with pytest.raises(CheckError):
        check_mc(3.0, 1.0, "eq-x", standard_error=np.inf)


def test_close_compares_shapes_before_numbers():
    with pytest.raises(ValueError, match=r"got has shape \(3,\), want has shape \(3, 1\)"):
        check_close(np.ones(3), np.ones((3, 1)), 1e-3)
    with pytest.raises(ValueError, match="got is empty"):
        check_close(np.ones(0), np.ones(0), 1e-3)
    with pytest.raises(ValueError, match="atol or rtol"):
        check_close(np.ones(3), np.ones(3))


def test_mc_accepts_the_truth_and_refuses_a_bias():
    draws = np.random.default_rng(0).standard_normal((10_000, 3))
    check_mc(draws, np.zeros(3), "eq-x")
    with pytest.raises(CheckError):
        check_mc(draws, np.array([0.0, 0.0, 0.1]), "eq-x")
    with pytest.raises(CheckError):
        check_mc(np.ones(100), 1.1, "eq-x")
    check_mc(0.3, 0.0, "eq-x", standard_error=0.1)
    with pytest.raises(ValueError, match="at least two draws"):
        check_mc(np.ones(1), 1.0)


def test_below_refuses_a_bound_that_is_none():
    check_below([1.0, 2.0], [1.0, 2.5], "eq-x")
    for lower in ([1.0, 2.6], [np.nan, 0.0]):
        with pytest.raises(CheckError):
            check_below(lower, [1.0, 2.5], "eq-x")


def test_differences_go_to_the_ledger_file(tmp_path, monkeypatch):
    monkeypatch.setenv("DLGM_LEDGER", str(tmp_path / "ledger"))
    check_close(np.ones(3), np.ones(3) + 1e-4, 1e-3, "eq-x")
    check_mc(np.random.default_rng(0).standard_normal((50, 2)), np.zeros(2), "eq-y")
    first, second = map(json.loads, (tmp_path / "ledger").read_text().splitlines())
    assert first["label"] == "eq-x" and first["difference"] == pytest.approx(1e-4)
    assert second["comparisons"] == 2 and second["limit"] == 5


def test_a_check_that_fails_is_no_entry_of_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("DLGM_LEDGER", str(tmp_path / "ledger"))
    with pytest.raises(CheckError):
        check_close(1.0, 2.0, 1e-3, "eq-x")
    assert not (tmp_path / "ledger").exists()
