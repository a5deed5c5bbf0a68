"""Counts every Monte Carlo comparison of a run, in tests and notebooks alike, and holds the total false-alarm probability.

A correct Monte Carlo estimate misses by more than z standard errors with probability 2 (1 - Phi(z)), for the large
samples used here. CONTRIBUTING.md states what the whole suite may add up to; `checks` writes each comparison to the file
named in DLGM_LEDGER, worker processes and notebook kernels inherit the variable, and the sum is taken at the end.
"""

import json
import math
import os
import re
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STATED = float(re.search(r"at most (\S+) for the whole suite", (ROOT / "CONTRIBUTING.md").read_text()).group(1))


def pytest_configure(config):
    if not hasattr(config, "workerinput"):
        handle, name = tempfile.mkstemp(prefix="ledger-")
        os.close(handle)
        os.environ["DLGM_LEDGER"] = config.ledger = name


def false_alarm_probability(lines):
    """Sum over all comparisons of the two-sided normal tail beyond the limit: a union bound."""
    records = map(json.loads, lines)
    return sum(r["comparisons"] * math.erfc(r["limit"] / math.sqrt(2)) for r in records if "limit" in r)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    name = getattr(session.config, "ledger", None)
    if name is None:
        return
    lines = Path(name).read_text().splitlines()
    Path(name).unlink()
    session.config.false_alarm = false_alarm_probability(lines)
    if exitstatus == 0 and session.config.false_alarm > STATED:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config):
    alarm = getattr(config, "false_alarm", None)
    if alarm is not None:
        verdict = "within" if alarm <= STATED else "ABOVE"
        terminalreporter.write_line(f"false-alarm probability of all Monte Carlo checks: {alarm:.1e}, {verdict} the stated {STATED:g}")
