"""Checks a reader can see: one line printed, an exception when two numbers are too far apart.

`check_close` compares with a closed form or a second implementation, `check_mc` a Monte Carlo estimate with the
truth in standard errors, `check_below` an inequality. Each names the label of the equation that it verifies, so that
the equation ledger can be made from the checks. What is printed holds no measured difference (its last digits differ
between machines); differences go to the file that the environment variable DLGM_LEDGER names, one JSON line a check.
"""

import json
import os

import numpy as np

__all__ = ["CheckError", "check_below", "check_close", "check_mc"]


class CheckError(AssertionError):
    """A check that failed; the message says what was compared and by how much it missed."""


def _array(value, name):
    if hasattr(value, "detach"):  # a tensor, without importing torch
        value = value.detach().cpu().resolve_conj().numpy()
    array = np.asarray(value)
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of real numbers, got dtype {array.dtype}")
    if array.size == 0:
        raise ValueError(f"{name} is empty: nothing would be compared")
    return array.astype(np.float64)


def _same_shape(got, want):
    got, want = _array(got, "got"), _array(want, "want")
    if want.ndim and got.shape != want.shape:
        raise ValueError(f"got has shape {got.shape}, want has shape {want.shape}")
    return got, want


def _conclude(ok, label, what, rule, **record):
    title = " · ".join(filter(None, (label, what)))
    if not ok:
        raise CheckError(f"{title}: expected {rule}; {record}")
    path = os.environ.get("DLGM_LEDGER")
    if path:  # only what held: a mistake made on purpose is no witness
        with open(path, "a") as file:
            file.write(json.dumps({"label": label, "what": what, "rule": rule, **record}) + "\n")
    print(f"ok   {title} · {rule}")


def check_close(got, want, atol=0.0, label="", *, rtol=0.0, what=""):
    """Check |got - want| <= atol + rtol |want| in every entry.

    got, want: arrays or tensors of one shape (want may be a scalar); atol, rtol: tolerances; label: the equation
    verified, such as "eq-fa-posterior"; what: a few words on what was compared.
    Raises CheckError where an entry is too far away or not finite, ValueError where the shapes differ.

    >>> check_close([1.0, 2.0], [1.0, 2.0], 1e-12, "eq-example", what="two numbers")
    ok   eq-example · two numbers · |difference| <= 1e-12
    """
    got, want = _same_shape(got, want)
    if atol <= 0 and rtol <= 0:
        raise ValueError("atol or rtol must be positive")
    with np.errstate(invalid="ignore"):  # inf - inf is not a number, and fails below
        difference = np.abs(got - want)
    allowed = atol + rtol * np.abs(want)
    parts = [f"{atol:g}"] * (atol > 0) + [f"{rtol:g} |want|"] * (rtol > 0)
    ok = bool(np.all((difference <= allowed) & np.isfinite(difference)))  # an infinite `want` allows nothing
    _conclude(ok, label, what, f"|difference| <= {' + '.join(parts)}",
              difference=float(np.max(difference)), comparisons=int(got.size))


def check_mc(samples, want, label="", *, z=5.0, what="", standard_error=None):
    """Check that a Monte Carlo mean lies within z standard errors of `want`, entry by entry.

    samples: [S, ...] independent draws, averaged over the first axis; with `standard_error` given (for draws that
    depend on each other) `samples` is the estimate itself. want: [...] or a scalar. z: how many standard errors;
    a correct estimator fails with probability 5.7e-7 an entry at z = 5. label, what: as in `check_close`.
    Raises CheckError where the estimate is too far away, ValueError for fewer than two samples.

    >>> check_mc(np.random.default_rng(0).standard_normal(1000), 0.0, "eq-example", what="mean of a normal")
    ok   eq-example · mean of a normal · within 5 standard errors
    """
    samples = _array(samples, "samples")
    if standard_error is None:
        if samples.ndim == 0 or len(samples) < 2:
            raise ValueError(f"samples must hold at least two draws along its first axis, got shape {samples.shape}")
        estimate, error = samples.mean(0), samples.std(0, ddof=1) / np.sqrt(len(samples))
    else:
        estimate, error = _same_shape(samples, standard_error)
    estimate, want = _same_shape(estimate, want)
    with np.errstate(invalid="ignore"):
        difference = np.abs(estimate - want)
    # Equal to rounding counts as equal: a constant estimator has no standard error.
    allowed = z * error + 1e-12 * np.abs(want)
    ok = bool(np.all((difference <= allowed) & np.isfinite(allowed)))
    largest = np.max(np.divide(difference, error, out=np.zeros_like(difference), where=error > 0))
    _conclude(ok, label, what, f"within {z:g} standard errors", z=float(largest), limit=float(z),
              standard_error=float(np.max(error)), comparisons=int(estimate.size))


def check_below(lower, upper, label="", *, slack=0.0, what=""):
    """Check lower <= upper + slack in every entry: a bound below what it bounds, a likelihood that never falls.

    lower, upper: arrays or tensors of one shape (upper may be a scalar); slack >= 0 for rounding;
    label, what: as in `check_close`.
    Raises CheckError where the order is violated or an entry is not a number.

    >>> check_below([0.0, 1.0], [0.5, 1.0], "eq-example", what="a bound")
    ok   eq-example · a bound · never above
    """
    lower, upper = _same_shape(lower, upper)
    excess = lower - upper
    ok = bool(np.all(excess <= slack))
    rule = "never above" + (f" by more than {slack:g}" if slack else "")
    _conclude(ok, label, what, rule, difference=float(np.max(excess)), comparisons=int(lower.size))
