"""The home page's figure tells the truth: its answers are checked where an independent answer is to be had."""

import sys
from pathlib import Path

import numpy as np
from scipy.integrate import quad
from scipy.special import logsumexp

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tools"))
import home_figure as figure  # noqa: E402


def test_decoder_has_the_slopes_that_it_names():
    middles = np.array([-2.0, -0.9, 0.1, 0.8, 2.0])
    slopes = (figure.decoder(middles + 1e-4) - figure.decoder(middles - 1e-4)) / 2e-4
    np.testing.assert_allclose(slopes, figure.SLOPES, atol=1e-9)


def test_masses_of_the_pieces_are_the_integrals_over_them():
    for low, high, _, _, log_mass in figure.pieces():
        integral = quad(lambda z: np.exp(figure.log_joint(z)), max(low, -12), min(high, 12), epsabs=1e-14)[0]
        np.testing.assert_allclose(np.exp(log_mass), integral, rtol=1e-9)


def test_grid_evidence_is_the_sum_of_the_pieces():
    _, log_evidence = figure.exact()
    np.testing.assert_allclose(log_evidence, logsumexp([piece[-1] for piece in figure.pieces()]), atol=1e-4)


def test_short_run_propagated_on_the_grid_agrees_with_chains():
    rng, step = np.random.default_rng(0), 0.2
    z = rng.standard_normal(20_000)
    for _ in range(20):
        score = (figure.log_joint(z + 1e-5) - figure.log_joint(z - 1e-5)) / 2e-5
        z = z + 0.5 * step**2 * score + step * rng.standard_normal(len(z))
    q = figure.short_run(step=step)
    left = q[figure.Z < 0].sum() * figure.DZ
    np.testing.assert_allclose(np.mean(z < 0), left, atol=5 * np.sqrt(0.25 / len(z)))


def test_committed_pictures_are_there():
    for name in ("decoder", "posterior", *"123456"):
        assert (figure.OUT / f"{name}.svg").stat().st_size < 150_000
