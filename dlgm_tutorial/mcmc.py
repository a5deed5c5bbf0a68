"""Markov chains in continuous spaces: Langevin, MALA and HMC as pure steps (state, noise) -> (state, info).

A step touches nothing but its arguments; loops and noise live outside. All chains advance together: positions [..., K]
with any leading dimensions. One convention of the step size s in the whole book: z' = z + s^2/2 grad + s noise, the
Euler-Maruyama step of the Langevin equation over a time s^2. One leapfrog step of HMC proposes the same point.
"""

from typing import NamedTuple

import torch

__all__ = ["Info", "State", "fresh_noise", "hmc_step", "init", "langevin_step", "mala_step"]


class State(NamedTuple):
    """Where the chains are, with what was computed there: z [..., K], log_prob [...] in nats, gradient [..., K]."""

    z: torch.Tensor
    log_prob: torch.Tensor
    gradient: torch.Tensor


class Info(NamedTuple):
    """What happened to each proposal: its acceptance probability [...] and whether it was accepted [...]."""

    acceptance: torch.Tensor
    accepted: torch.Tensor


def init(log_density, z):
    """Evaluate log_density and its gradient at z [..., K] -> State.

    log_density: maps [..., K] to [...], in nats, up to a constant.

    >>> init(lambda z: -0.5 * z.square().sum(-1), torch.tensor([[1.0, 2.0]]))
    State(z=tensor([[1., 2.]]), log_prob=tensor([-2.5000]), gradient=tensor([[-1., -2.]]))
    """
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        log_prob = log_density(z)
        if log_prob.shape != z.shape[:-1]:
            raise ValueError(f"log_density must map z {list(z.shape)} to {list(z.shape[:-1])}, "
                             f"got {list(log_prob.shape)}")
        gradient, = torch.autograd.grad(log_prob.sum(), z)
    return State(z.detach(), log_prob.detach(), gradient)


def fresh_noise(z, generator=None):
    """Draw the noise of one `mala_step` or `hmc_step` at z from generator: {"normal": [..., K], "uniform": [...]}."""
    kind = {"dtype": z.dtype, "device": z.device, "generator": generator}
    return {"normal": torch.randn(z.shape, **kind), "uniform": torch.rand(z.shape[:-1], **kind)}


def _step_size(step_size, z):
    step_size = torch.as_tensor(step_size, dtype=z.dtype, device=z.device)
    if torch.broadcast_shapes(step_size.shape, z.shape) != z.shape:
        raise ValueError(f"step_size must broadcast against z {list(z.shape)}, got {list(step_size.shape)}")
    return step_size


def langevin_step(state, noise, *, log_density, step_size):
    """Move by z' = z + s^2/2 grad + s noise, without an accept-reject step: the law it settles at is off by O(s^2).

    state: as from `init`; noise: standard normal [..., K]; log_density: as in `init`; step_size: s, a number, [K], or
    anything that broadcasts against z. Returns (State, Info).
    """
    s = _step_size(step_size, state.z)
    new = init(log_density, state.z + 0.5 * s.square() * state.gradient + s * noise)
    one = torch.ones_like(state.log_prob)
    return new, Info(one, one.bool())


def mala_step(state, noise, *, log_density, step_size):
    """Propose a Langevin step and accept or reject it (Metropolis-adjusted Langevin): log_density is left invariant.

    noise: {"normal": [..., K], "uniform": [...]} as from `fresh_noise`; state, log_density, step_size as in
    `langevin_step`. Returns (State, Info).
    """
    s, forward = _step_size(step_size, state.z), noise["normal"]
    new = init(log_density, state.z + 0.5 * s.square() * state.gradient + s * forward)
    backward = forward + 0.5 * s * (state.gradient + new.gradient)  # minus the noise that would lead back
    log_ratio = new.log_prob - state.log_prob + 0.5 * (forward.square() - backward.square()).sum(-1)
    return _accept(state, new, log_ratio, noise["uniform"])


def hmc_step(state, noise, *, log_density, step_size, num_leapfrog=5):
    """Propose the end of a Hamiltonian path and accept or reject it: log_density is left invariant.

    num_leapfrog: leapfrog steps of size s; noise["normal"] is the starting momentum, unit mass. One leapfrog step is
    `mala_step`. state, noise, log_density, step_size as there. Returns (State, Info).
    """
    if num_leapfrog < 1:
        raise ValueError(f"num_leapfrog must be at least 1, got {num_leapfrog}")
    s = _step_size(step_size, state.z)
    new, momentum = state, noise["normal"]
    for _ in range(num_leapfrog):
        momentum = momentum + 0.5 * s * new.gradient
        new = init(log_density, new.z + s * momentum)
        momentum = momentum + 0.5 * s * new.gradient
    kinetic = 0.5 * (noise["normal"].square() - momentum.square()).sum(-1)
    return _accept(state, new, new.log_prob - state.log_prob + kinetic, noise["uniform"])


def _accept(old, new, log_ratio, uniform):
    accepted = uniform.log() < log_ratio  # False for a NaN: a chain never moves where the density is undefined
    choose = lambda a, b: torch.where(accepted if a.ndim == accepted.ndim else accepted[..., None], a, b)
    acceptance = torch.nan_to_num(log_ratio, nan=-torch.inf, posinf=0.0).clamp(max=0).exp()
    return State(*map(choose, new, old)), Info(acceptance, accepted)
