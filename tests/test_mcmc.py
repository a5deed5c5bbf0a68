"""Chains against the law of the linear chain, detailed balance, invariance and the known bias of unadjusted steps."""

import numpy as np
import pytest
import torch

from dlgm_tutorial import oracles
from dlgm_tutorial.checks import check_close, check_mc
from dlgm_tutorial.mcmc import Info, State, fresh_noise, hmc_step, init, langevin_step, mala_step

S, B, K = 5, 3, 2
GPU = pytest.param("cuda", marks=[pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")])
devices = pytest.mark.parametrize("device", ["cpu", GPU])
MEAN = torch.tensor([0.5, -1.0], dtype=torch.float64)
PRECISION = torch.tensor([[2.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
STEPS = [mala_step, lambda *args, **kw: hmc_step(*args, num_leapfrog=3, **kw)]
adjusted = pytest.mark.parametrize("step", STEPS, ids=["mala", "hmc"])


def normal(z):
    delta = z - MEAN.to(z)
    return -0.5 * ((delta @ PRECISION.to(z)) * delta).sum(-1)


def bent(z):
    """A curved density with a quartic tail."""
    return -0.5 * z[..., 0] ** 2 - 2 * (z[..., 1] - z[..., 0] ** 2) ** 2


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@devices
def test_langevin_trajectory_matches_numpy(device):
    z = torch.randn(S, B, K, generator=seeded(), dtype=torch.float64)
    noise = torch.randn(4, S, B, K, generator=seeded(1), dtype=torch.float64)
    state, want = init(normal, z.to(device)), z.numpy()
    for n in noise:
        state, info = langevin_step(state, n.to(device), log_density=normal, step_size=0.3)
        want = want - 0.045 * (want - MEAN.numpy()) @ PRECISION.numpy() + 0.3 * n.numpy()
    check_close(state.z, want, 1e-12)
    check_close(state.log_prob, normal(torch.from_numpy(want)), 1e-12)
    assert isinstance(state, State) and isinstance(info, Info)
    assert bool(info.accepted.all()) and state.z.device.type == device


@devices
@adjusted
def test_the_state_caches_what_it_would_compute(step, device):
    state = init(bent, torch.randn(S, B, K, generator=seeded(), dtype=torch.float64).to(device))
    for seed in range(3):
        noise = {k: v.to(device) for k, v in fresh_noise(state.z.cpu(), seeded(seed)).items()}
        state, _ = step(state, noise, log_density=bent, step_size=0.7)
    again = init(bent, state.z)
    check_close(state.log_prob, again.log_prob, 1e-14)
    check_close(state.gradient, again.gradient, 1e-14)


def test_langevin_has_the_law_of_the_linear_chain():
    state = init(normal, torch.zeros(20_000, K, dtype=torch.float64))
    generator = seeded(2)
    for _ in range(6):
        noise = torch.randn(state.z.shape, generator=generator, dtype=torch.float64)
        state, _ = langevin_step(state, noise, log_density=normal, step_size=0.5)
    mean, cov = oracles.langevin_chain_law(MEAN.numpy(), PRECISION.numpy(), 0.5, 6, np.zeros(K), np.zeros((K, K)))
    check_mc(state.z, mean)
    delta = state.z - torch.from_numpy(mean)
    check_mc(delta[:, :, None] * delta[:, None, :], cov)


@adjusted
def test_adjusted_steps_leave_the_normal_invariant_and_unadjusted_ones_do_not(step):
    """Started at the law itself, its covariance stays; a Langevin step at the same size inflates it visibly."""
    chol = torch.linalg.cholesky(torch.linalg.inv(PRECISION))
    z = MEAN + torch.randn(40_000, K, generator=seeded(3), dtype=torch.float64) @ chol.mT
    exact, biased = init(normal, z), init(normal, z)
    generator = seeded(4)
    for _ in range(8):
        noise = fresh_noise(z, generator)
        exact, info = step(exact, noise, log_density=normal, step_size=0.8)
        biased, _ = langevin_step(biased, noise["normal"], log_density=normal, step_size=0.8)
    outer = lambda state: (state.z - MEAN)[:, :, None] * (state.z - MEAN)[:, None, :]
    check_mc(exact.z, MEAN)
    check_mc(outer(exact), torch.linalg.inv(PRECISION))
    assert 0.5 < info.acceptance.mean() < 0.98
    with pytest.raises(AssertionError):
        check_mc(outer(biased), torch.linalg.inv(PRECISION))


@adjusted
def test_adjusted_steps_leave_a_curved_density_invariant(step):
    z = torch.randn(20_000, K, generator=seeded(6), dtype=torch.float64)
    state = init(bent, torch.stack([z[:, 0], z[:, 0] ** 2 + 0.5 * z[:, 1]], -1))  # exact draws
    generator = seeded(5)
    for _ in range(20):
        state, _ = step(state, fresh_noise(state.z, generator), log_density=bent, step_size=0.45)
    # z_0 is standard normal; z_1 given z_0 is normal around z_0^2 with variance 1/4.
    check_mc(torch.stack([state.z[:, 0], state.z[:, 0] ** 2, state.z[:, 1], (state.z[:, 1] - state.z[:, 0] ** 2) ** 2], -1),
             [0.0, 1.0, 1.0, 0.25])


def test_acceptance_is_the_metropolis_ratio_by_hand():
    """p(z') q(z | z') / (p(z) q(z' | z)) with the proposal densities written out."""
    state, s = init(bent, torch.randn(B, K, generator=seeded(), dtype=torch.float64)), 0.6
    noise = fresh_noise(state.z, seeded(1))
    drift = lambda z: z + 0.5 * s**2 * init(bent, z).gradient
    proposal = drift(state.z) + s * noise["normal"]
    log_q = lambda to, start: -0.5 * ((to - drift(start)) / s).square().sum(-1)
    ratio = bent(proposal) - bent(state.z) + log_q(state.z, proposal) - log_q(proposal, state.z)
    new, info = mala_step(state, noise, log_density=bent, step_size=s)
    check_close(info.acceptance, ratio.clamp(max=0).exp(), 1e-12)
    check_close(new.z, torch.where((noise["uniform"] < info.acceptance)[:, None], proposal, state.z), 1e-14)


def test_one_leapfrog_step_is_mala():
    state = init(bent, torch.randn(S, B, K, generator=seeded(), dtype=torch.float64))
    noise = fresh_noise(state.z, seeded(1))
    one, mala = hmc_step(state, noise, log_density=bent, step_size=0.4, num_leapfrog=1), mala_step(state, noise, log_density=bent, step_size=0.4)
    check_close(one[0].z, mala[0].z, 1e-13)
    check_close(one[1].acceptance, mala[1].acceptance, 1e-12)


def test_leapfrog_is_reversible():
    """From the end, with the momentum turned round, the path leads back."""
    z = torch.randn(B, K, generator=seeded(), dtype=torch.float64)
    noise = fresh_noise(z, seeded(1)) | {"uniform": torch.zeros(B, dtype=torch.float64)}  # always accept
    there, _ = hmc_step(init(bent, z), noise, log_density=bent, step_size=0.1, num_leapfrog=7)
    momentum, position = noise["normal"], init(bent, z)
    for _ in range(7):
        momentum = momentum + 0.05 * position.gradient
        position = init(bent, position.z + 0.1 * momentum)
        momentum = momentum + 0.05 * position.gradient
    back, _ = hmc_step(there, noise | {"normal": -momentum}, log_density=bent, step_size=0.1, num_leapfrog=7)
    check_close(back.z, z, 1e-12)


@adjusted
def test_tiny_steps_are_accepted_and_huge_ones_are_not(step):
    state = init(bent, torch.randn(1000, K, generator=seeded(), dtype=torch.float64))
    for step_size, low, high in ((1e-3, 0.999, 1), (50.0, 0, 0.001)):
        _, info = step(state, fresh_noise(state.z, seeded(1)), log_density=bent, step_size=step_size)
        assert low <= info.accepted.double().mean() <= high


def test_a_proposal_without_a_density_is_rejected():
    half = lambda z: torch.where(z[..., 0] > 0, -0.5 * z.square().sum(-1), torch.nan)
    state = init(half, torch.full((500, K), 0.1))
    new, info = mala_step(state, fresh_noise(state.z, seeded()), log_density=half, step_size=1.0)
    assert bool((new.z[:, 0] > 0).all()) and not bool(info.acceptance.isnan().any())
    assert 0.2 < info.accepted.double().mean() < 0.9


def test_a_step_size_per_coordinate_or_per_chain():
    state = init(normal, torch.zeros(S, B, K, dtype=torch.float64))
    noise = torch.ones(S, B, K, dtype=torch.float64)
    for step_size in (torch.tensor([0.1, 0.2]), torch.rand(B, 1, generator=seeded()), 0.3):
        new, _ = langevin_step(state, noise, log_density=normal, step_size=step_size)
        s = torch.as_tensor(step_size, dtype=torch.float64)
        check_close(new.z, (0.5 * s**2 * state.gradient + s).expand(S, B, K), 1e-14)


@pytest.mark.parametrize(("call", "message"), [
    (lambda: init(lambda z: z, torch.zeros(B, K)), r"log_density must map z \[3, 2\] to \[3\], got \[3, 2\]"),
    (lambda: langevin_step(init(normal, torch.zeros(B, K)), torch.zeros(B, K), log_density=normal, step_size=torch.ones(5, 1, 1)), "step_size must broadcast"),
    (lambda: hmc_step(init(normal, torch.zeros(B, K)), {}, log_density=normal, step_size=1.0, num_leapfrog=0), "num_leapfrog must be at least 1, got 0"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
