"""The timing harness: ratios that are right, a noise floor, a file that says what it ran on."""

import json
from pathlib import Path

import pytest

from benchmarks import harness

RESULTS = sorted((Path(__file__).parents[1] / "benchmarks" / "results").glob("*.json"))


def test_ratios_are_those_of_the_same_round(monkeypatch):
    """A machine that slows down by half in each round: ratios do not see it."""
    now, calls = [0.0], []
    monkeypatch.setattr(harness, "clock", lambda: now[0])

    def work(name, amount):
        def function():
            calls.append(name)
            now[0] += amount * 1.5 ** ((len(calls) - 4) // 8)
        return function
    report = harness.compare({"a": work("a", 2.0), "b": work("b", 5.0), "c": work("c", 1.0)}, reference="a",
                             rounds=6, block=2)
    assert {name: row["ratio"] for name, row in report.items()} == pytest.approx(
        {"a": 1.0, "b": 2.5, "c": 0.5, harness.AGAIN: 1.0})
    assert all(len(row["ratios"]) == 6 and row["low"] <= row["ratio"] <= row["high"] for row in report.values())
    orders = {tuple(calls[4 + 8 * i:12 + 8 * i:2]) for i in range(6)}
    assert len(calls) == 4 + 6 * 8 and len(orders) > 1  # shuffled anew in each round


def test_seconds_are_per_amount_of_work(monkeypatch):
    now = iter(range(1000))
    monkeypatch.setattr(harness, "clock", lambda: float(next(now)))  # one second between any two looks
    report = harness.compare({"a": lambda: None, "b": lambda: None}, reference="a", rounds=3, work={"b": 4})
    assert report["b"]["ratio"] == 0.25 and report["b"]["seconds"] == 0.25 and report[harness.AGAIN]["ratio"] == 1


def test_results_file_says_what_it_ran_on(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    report = harness.compare({"a": lambda: sum(range(1000))}, reference="a", rounds=3)
    harness.write("example", "An example", "none", {"sums": report}, size=1000)
    contents = json.loads((tmp_path / "example.json").read_text())
    assert contents["size"] == 1000 and contents["machine"]["threads"] >= 1 and contents["versions"]["torch"]
    assert harness.AGAIN in capsys.readouterr().out and [p.name for p in tmp_path.iterdir()] == ["example.json"]


@pytest.mark.parametrize("path", RESULTS, ids=[path.stem for path in RESULTS])
def test_kept_results_have_a_noise_floor_near_one(path):
    for report in json.loads(path.read_text())["reports"].values():
        assert 0.9 < report[harness.AGAIN]["ratio"] < 1.1, "measured on a machine that was too busy"
