"""Chapter 3: mixture and stick-breaking latents (Nalisnick, Hertel and Smyth 2016; Nalisnick and Smyth 2017).

The posterior and the prior of a deep latent Gaussian model become mixtures of C normals. The weights of the mixture are
broken off a stick of length one; the fractions broken off follow Kumaraswamy laws, whose quantiles are explicit.

Shapes: u [S, B, C-1] uniform noise of the sticks, eps [S, B, C, K] normal noise of the components. All C components
are decoded at once, as one product with S B C rows. Every bound is per example, in nats.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from scipy import special
from torch import nn
from torch.distributions import Beta, kl_divergence

from dlgm_tutorial.distributions import Kumaraswamy
from dlgm_tutorial.evaluation import Estimate, log_likelihood_is
from dlgm_tutorial.likelihoods import Bernoulli, Gaussian
from dlgm_tutorial.networks import ACTIVATIONS, mlp

__all__ = [
    "KINDS",
    "Kumaraswamy",
    "MixtureDLGM",
    "MixtureNormal",
    "MixturePrior",
    "SemiSupervisedVAE",
    "StickBreakingVAE",
    "beta_rsample",
    "expected_log1m",
    "factor_mixture_log_likelihood",
    "kl_kumaraswamy_beta",
    "mixture_bound",
    "stick_breaking",
    "stick_mean_log_weights",
    "stick_prior",
]

KINDS = ("paper", "indicator", "mixture", "collapsed", "siw")
LOG_2PI = math.log(2 * math.pi)


def _require(ok, message):
    """Raise ValueError unless ok; a message that costs something to write is given as a function."""
    if not ok:
        raise ValueError(message() if callable(message) else message)


def _integer(value, least, name):
    _require(
        isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value >= least,
        f"{name} must be an integer of at least {least}, got {value!r}",
    )
    return int(value)


def _positive(value, name):
    _require(
        isinstance(value, (int, float)) and 0 < value < math.inf, f"{name} must be a positive number, got {value!r}"
    )
    return float(value)


# --- The KL of a Kumaraswamy to a Beta law


def _log1mexp(y):
    """log(1 - exp(y)) for y < 0, without cancellation at either end; the unused branch sees a harmless number."""
    near = y > -math.log(2)
    return torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, y, torch.full_like(y, -1.0)))),
        torch.log1p(-torch.exp(torch.where(near, torch.full_like(y, -1.0), y))),
    )


def _log1m_v(log_t, a):
    """log(1 - v) of v = (1 - t)^(1/a), float64; where t underflows, 1 - v is t / a."""
    tiny = log_t < -300
    log_v = _log1mexp(torch.where(tiny, torch.full_like(log_t, -1.0), log_t)) / a
    return torch.where(tiny, log_t - a.log(), _log1mexp(log_v))


def _smooth_step_rule(num_nodes):
    """log s and weights on (0, 1): Gauss-Legendre in r, with s = r^3 (10 - 15 r + 6 r^2), flat at both ends."""
    r, w = np.polynomial.legendre.leggauss(num_nodes)
    r, w = (r + 1) / 2, w / 2
    step = lambda r: r**3 * (10 - 15 * r + 6 * r**2)
    s, rest = step(r), step(1 - r)
    return np.where(s < 0.5, np.log(s), np.log1p(-rest)), w * 30 * (r * (1 - r)) ** 2


def _double_exponential_rule(num_nodes, reach=100.0):
    """log s and weights on (0, 1): the trapezoidal rule in x, with s the logistic function of pi sinh(x)."""
    x = np.linspace(-np.arcsinh(reach / np.pi), np.arcsinh(reach / np.pi), num_nodes)
    y = np.pi * np.sinh(x)
    log_s, log_rest = -np.logaddexp(0, -y), -np.logaddexp(0, y)
    return log_s, np.exp(log_s + log_rest) * np.pi * np.cosh(x) * (x[1] - x[0])


_RULES = {"inside": _smooth_step_rule(32), "outside": _double_exponential_rule(320)}
INSIDE = (0.1, 20.0), (0.1, 30.0)  # where 32 nodes are exact to 2e-9


@functools.lru_cache(maxsize=16)
def _rule(name, device):
    return tuple(torch.from_numpy(part).to(device) for part in _RULES[name])


def expected_log1m(a, b):
    """Integrate E log(1 - v) for v Kumaraswamy, by the quadrature of eq-mx-quadrature: [...] -> [...], float64.

    a, b: positive float64 tensors of one shape. On [0.1, 20] x [0.1, 30] 32 nodes after the singular part is
    subtracted, absolute error below 2e-9; elsewhere 320 double-exponential nodes, relative error below 1e-6 for a and b
    from 1e-6 to 1e6. Differentiable in a and b.

    >>> bool(abs(expected_log1m(torch.ones(1).double(), 4 * torch.ones(1).double()) + 0.25) < 1e-9)  # -1 / b at a = 1
    True
    """
    inside = (a >= INSIDE[0][0]) & (a <= INSIDE[0][1]) & (b >= INSIDE[1][0]) & (b <= INSIDE[1][1])
    everywhere = bool(inside.all())
    one = torch.ones_like(a)
    a_in, b_in = (a, b) if everywhere else (torch.where(inside, a, one), torch.where(inside, b, one))
    log_s, weight = _rule("inside", a.device)
    log_t = log_s / b_in[..., None]  # above -180: t does not underflow
    rest = -torch.expm1(torch.log1p(-log_t.exp()) / a_in[..., None])  # 1 - v
    value = ((rest.log() - log_t) * weight).sum(-1) - 1 / b_in
    if everywhere:
        return value
    log_s, weight = _rule("outside", a.device)
    outer = (_log1m_v(log_s / b[~inside][..., None], a[~inside][..., None]) * weight).sum(-1)
    return value.masked_scatter(~inside, outer)


def _series_log1m(a, b, num_terms):
    """E log(1 - v) by the first terms of the published series (Nalisnick and Smyth 2017, supplement)."""
    m = torch.arange(1, num_terms + 1, dtype=a.dtype, device=a.device)
    a, b = a[..., None], b[..., None]
    log_beta = torch.lgamma(m / a) + torch.lgamma(b) - torch.lgamma(m / a + b)
    return -(b / (m + a * b) * log_beta.exp()).sum(-1)


def kl_kumaraswamy_beta(a, b, alpha, beta, *, method="quadrature", num_terms=10):
    """KL(Kumaraswamy(a, b) || Beta(alpha, beta)) in nats, elementwise: eq-mx-kl, [...] -> [...].

    a, b: positive tensors of one shape; alpha, beta: positive numbers or tensors that broadcast against them.
    method: "quadrature" (see `expected_log1m`), or "series", cut after num_terms as in the papers, for comparison
    only: with ten terms it is wrong by whole nats for b below 1 and can be negative.
    Computed in float64, returned in the precision of a. Raises ValueError for parameters that are not positive.

    >>> kl_kumaraswamy_beta(torch.ones(1), 3 * torch.ones(1), 1.0, 3.0).abs() < 1e-6   # Kumaraswamy(1, b) is Beta(1, b)
    tensor([True])
    """
    _require(method in ("quadrature", "series"), f"method must be 'quadrature' or 'series', got {method!r}")
    _require(a.shape == b.shape, f"b must have the shape of a, {list(a.shape)}, got {list(b.shape)}")
    dtype, a, b = a.dtype, a.double(), b.double()
    alpha, beta = (torch.as_tensor(n, dtype=a.dtype, device=a.device) for n in (alpha, beta))
    for name, n in (("a", a), ("b", b), ("alpha", alpha), ("beta", beta)):
        _require(
            bool(((n > 0) & n.isfinite()).all()),
            lambda name=name, n=n: f"{name} must be positive and finite, got a minimum of {n.min().item():g}",
        )
    log1m = expected_log1m(a, b) if method == "quadrature" else _series_log1m(a, b, _integer(num_terms, 1, "num_terms"))
    harmonic = torch.digamma(b + 1) + np.euler_gamma  # -a E log v
    log_beta = torch.lgamma(alpha) + torch.lgamma(beta) - torch.lgamma(alpha + beta)
    return (a.log() + b.log() - (a - alpha) / a * harmonic - 1 + 1 / b - (beta - 1) * log1m + log_beta).to(dtype)


# --- Sticks


def stick_breaking(log_v, log1m_v):
    """Turn C - 1 fractions of a stick into C log-weights: pi_k = v_k prod_{j<k} (1 - v_j), def-mx-sticks.

    log_v, log1m_v: log v and log(1 - v), [..., C-1] -> log pi [..., C]; the last weight is what remains.

    >>> stick_breaking(torch.log(torch.tensor([0.5, 0.5])), torch.log(torch.tensor([0.5, 0.5]))).exp()
    tensor([0.5000, 0.2500, 0.2500])
    """
    _require(
        log_v.shape == log1m_v.shape,
        f"log1m_v must have the shape of log_v, {list(log_v.shape)}, got {list(log1m_v.shape)}",
    )
    zero = log_v.new_zeros((*log_v.shape[:-1], 1))
    rest = torch.cat([zero, torch.cumsum(log1m_v, -1)], -1)
    return torch.cat([log_v, zero], -1) + rest


def stick_prior(kind, concentration, num_components):
    """Return (alpha, beta), each [C-1], of the Beta laws of the prior's sticks, eq-mx-dirichlet-sticks.

    kind: "dirichlet", symmetric Dirichlet(concentration): Beta(concentration, (C - k) concentration); or "gem", the
    weights of a Dirichlet process truncated at C: Beta(1, concentration). num_components: C. Float64 tensors.

    >>> stick_prior("dirichlet", 1.0, 3)
    (tensor([1., 1.], dtype=torch.float64), tensor([2., 1.], dtype=torch.float64))
    """
    _require(kind in ("dirichlet", "gem"), f"prior must be 'dirichlet' or 'gem', got {kind!r}")
    concentration = _positive(concentration, "concentration")
    if kind == "gem":
        num_components = _integer(num_components, 2, "num_components (the truncation of a Dirichlet process)")
        ones = torch.ones(num_components - 1, dtype=torch.float64)
        return ones, concentration * ones
    num_components = _integer(num_components, 1, "num_components")
    after = torch.arange(num_components - 1, 0, -1, dtype=torch.float64)
    return concentration * torch.ones_like(after), concentration * after


def _kumaraswamy_log_mean(a, b):
    """log E v = log(b B(1 + 1/a, b)), float64; a difference of log-gammas that float32 could not hold."""
    value = torch.lgamma(1 + 1 / a) + torch.lgamma(1 + b) - torch.lgamma(1 + 1 / a + b)
    return value.clamp(max=-1e-15)


def _log_mean_fractions(log_a, log_b, family):
    """(log E v, log E(1 - v)) of each stick, float64."""
    if family == "beta":
        log_sum = torch.logaddexp(log_a.double(), log_b.double())
        return log_a.double() - log_sum, log_b.double() - log_sum
    log_mean = _kumaraswamy_log_mean(log_a.double().exp(), log_b.double().exp())
    return log_mean, _log1mexp(log_mean)


def stick_mean_log_weights(log_a, log_b, *, family="kumaraswamy"):
    """Return log E pi of independent sticks, eq-mx-mean-weights: log_a, log_b [..., C-1] -> [..., C].

    family: law of a fraction, "kumaraswamy" or "beta", with parameters exp(log_a), exp(log_b). The fractions are
    independent, so the mean of the product is the product of the means.

    >>> stick_mean_log_weights(torch.zeros(2), torch.zeros(2)).exp()
    tensor([0.5000, 0.2500, 0.2500])
    """
    return stick_breaking(*_log_mean_fractions(log_a, log_b, family)).to(log_a.dtype)


class _BetaQuantile(torch.autograd.Function):
    """v = F^-1(u; a, b); backward by implicit differentiation, dv = -(dF / dtheta) / f."""

    @staticmethod
    def forward(ctx, a, b, u):
        v = special.betaincinv(*(n.detach().cpu().double().numpy() for n in (a, b, u)))
        limits = torch.finfo(a.dtype)
        v = torch.as_tensor(v).to(a).clamp(limits.tiny, 1 - limits.eps / 2)
        ctx.save_for_backward(a, b, v)
        return v

    @staticmethod
    def backward(ctx, grad):
        a, b, v = ctx.saved_tensors
        total = a + b  # torch's own routine gives (dv / dalpha) / (1 - v) of a Dirichlet coordinate
        da = torch._dirichlet_grad(v, a, total) * (1 - v)
        db = -torch._dirichlet_grad(1 - v, b, total) * v
        return grad * da, grad * db, None


def beta_rsample(a, b, noise):
    """Draw v ~ Beta(a, b) as a differentiable function of uniform noise: [...], [...], [...] -> [...].

    The value is the quantile of the noise, computed by SciPy on the CPU; the gradient is the implicit one,
    -(dF/dtheta)/f (Figurnov, Mohamed and Mnih 2018), as in torch's own Beta.rsample, whose noise cannot be given.

    >>> beta_rsample(torch.ones(1), torch.ones(1), torch.tensor([0.3]))   # uniform
    tensor([0.3000])
    """
    return _BetaQuantile.apply(a, b, noise)


def _draw_log_weights(log_a, log_b, u, family):
    """log pi [S, B, C] from uniform noise [S, B, C-1]."""
    a, b = log_a.exp().expand(u.shape), log_b.exp().expand(u.shape)
    if family == "kumaraswamy":
        return stick_breaking(*Kumaraswamy(a, b, validate_args=False).rsample_log(noise=u))
    v = beta_rsample(a, b, u)
    return stick_breaking(v.log(), torch.log1p(-v))


def _stick_kl(log_a, log_b, prior, family):
    """KL(q(pi) || p(pi)), summed over the C - 1 sticks: [..., C-1] -> [...]."""
    if log_a.shape[-1] == 0:  # one component: no stick
        return log_a.sum(-1)
    alpha, beta = prior.alpha.to(log_a), prior.beta.to(log_a)
    if family == "beta":
        q = Beta(log_a.double().exp(), log_b.double().exp(), validate_args=False)
        p = Beta(alpha.double(), beta.double(), validate_args=False)
        return kl_divergence(q, p).sum(-1).to(log_a.dtype)
    return kl_kumaraswamy_beta(log_a.exp(), log_b.exp(), alpha, beta).sum(-1)


# --- Mixtures of normals


class MixturePrior(NamedTuple):
    """The prior of a mixture model: components loc, log_scale [C, K] (or [..., C, K]), sticks alpha, beta [C-1]."""

    loc: torch.Tensor
    log_scale: torch.Tensor
    alpha: torch.Tensor
    beta: torch.Tensor

    def log_weights(self):
        """log E pi, [C]: the weights of p(z) once pi is integrated out, eq-mx-prior-collapsed."""
        mean = self.alpha / (self.alpha + self.beta)
        return stick_breaking(mean.log(), torch.log1p(-mean))


def _log_normal(z, loc, log_scale):
    """log N(z; loc, exp(log_scale)^2) summed over the last dimension."""
    return -(0.5 * ((z - loc) * torch.exp(-log_scale)).square() + log_scale + 0.5 * LOG_2PI).sum(-1)


def _pairwise_log_normal(z, loc, log_scale):
    """log q_k(z_j): z [..., J, K], components [..., C, K] -> [..., J, C]."""
    return _log_normal(z[..., :, None, :], loc[..., None, :, :], log_scale[..., None, :, :])


def _cross_term(loc, log_scale, prior):
    """C_k = E_{q_k} log p_k(z), closed form: [..., C, K] -> [..., C]."""
    square = (loc - prior.loc).square() + torch.exp(2 * log_scale)
    return -(0.5 * square * torch.exp(-2 * prior.log_scale) + prior.log_scale + 0.5 * LOG_2PI).sum(-1)


def _entropy(log_scale):
    """H_k, entropy of each component: [..., C, K] -> [..., C]."""
    return (log_scale + 0.5 * (LOG_2PI + 1)).sum(-1)


class MixtureNormal:
    """A mixture of C diagonal normals over z.

    log_weights [..., C], loc and log_scale [..., C, K]. `sample` and `log_prob` carry S leading sample dimensions.

    >>> q = MixtureNormal(torch.zeros(3, 1), torch.zeros(3, 1, 2), torch.zeros(3, 1, 2))
    >>> q.sample((5,)).shape, q.mean.shape
    (torch.Size([5, 3, 2]), torch.Size([3, 2]))
    """

    def __init__(self, log_weights, loc, log_scale):
        _require(
            loc.shape == log_scale.shape,
            f"log_scale must have the shape of loc, {list(loc.shape)}, got {list(log_scale.shape)}",
        )
        total = torch.logsumexp(log_weights, -1)
        _require(
            bool((total.abs() < 1e-3).all()),
            lambda: f"weights must sum to one, got a sum of {total.reshape(-1)[total.abs().argmax()].exp().item():g}",
        )
        self.log_weights, self.loc, self.log_scale = log_weights, loc, log_scale

    @property
    def mean(self):
        """E z, [..., K]."""
        return (self.log_weights.exp()[..., None] * self.loc).sum(-2)

    def log_prob(self, z):
        """log sum_k w_k N(z; loc_k, scale_k^2), in nats: z [S, ..., K] -> [S, ...]."""
        log_density = _log_normal(z[..., None, :], self.loc, self.log_scale)
        return torch.logsumexp(self.log_weights + log_density, -1)

    def noise_shapes(self, sample_shape=()):
        """{"component": shape of the uniforms, "normal": shape of the normals} that `sample` takes."""
        batch = (*sample_shape, *self.loc.shape[:-2])
        return {"component": batch, "normal": (*batch, self.loc.shape[-1])}

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw z, sample_shape + [..., K]; noise: {"component": uniform, "normal": normal}, see `noise_shapes`.

        Differentiable in loc and log_scale of the component drawn, not in the weights: the choice is discrete.
        """
        shapes, like = self.noise_shapes(sample_shape), dict(dtype=self.loc.dtype, device=self.loc.device)
        if noise is None:
            noise = {
                "component": torch.rand(shapes["component"], generator=generator, **like),
                "normal": torch.randn(shapes["normal"], generator=generator, **like),
            }
        for name, shape in shapes.items():
            _require(
                noise[name].shape == torch.Size(shape),
                f"noise[{name!r}] must have shape {list(shape)}, got {list(noise[name].shape)}",
            )
        edges = torch.cumsum(self.log_weights.exp(), -1)[..., :-1]
        index = (noise["component"][..., None] > edges).sum(-1)[..., None, None]
        expand = (*index.shape[:-2], *self.loc.shape[-2:])
        pick = lambda part: torch.gather(part.expand(expand), -2, index.expand(*index.shape[:-1], expand[-1]))[
            ..., 0, :
        ]
        return pick(self.loc) + pick(self.log_scale).exp() * noise["normal"]

    def sample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw as `rsample`, without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, noise=noise, generator=generator)


def _check_bound_shapes(loc, log_scale, log_a, log_b, prior, eps):
    S, B, C, K = eps.shape if eps.ndim == 4 else (None,) * 4
    _require(eps.ndim == 4, f"eps must have shape [S, B, C, K], got {list(eps.shape)}")
    want = {
        "loc": (loc, (B, C, K)),
        "log_scale": (log_scale, (B, C, K)),
        "log_a": (log_a, (B, C - 1)),
        "log_b": (log_b, (B, C - 1)),
        "prior.loc": (prior.loc, (C, K)),
        "prior.log_scale": (prior.log_scale, (C, K)),
        "prior.alpha": (prior.alpha, (C - 1,)),
        "prior.beta": (prior.beta, (C - 1,)),
    }
    for name, (value, shape) in want.items():
        _require(
            value is None or tuple(value.shape) == shape,
            f"{name} must have shape {list(shape)}, got {None if value is None else list(value.shape)}",
        )


def mixture_bound(kind, log_px, loc, log_scale, log_a, log_b, prior, u, eps, *, family="kumaraswamy", log_rho=None):
    """One of five lower bounds of log p(x) for a mixture posterior q(z | x) = sum_k pi_k q_k(z | x), in nats: [B].

    kind      "paper" (eq-mx-paper): equation 1 of Nalisnick, Hertel and Smyth 2016 as printed;
              "indicator" (eq-mx-indicator): all in closed form but the reconstruction; "mixture" (eq-mx-mixture): the
              densities of the mixtures; "collapsed" (eq-mx-collapsed): pi integrated out, categorical responsibilities;
              "siw" (eq-mx-siw): stratified importance weights. In expectation
              paper <= indicator <= mixture <= log p(x), and collapsed <= siw <= log p(x)
    log_px    log p(x | z) of the draws z = loc + exp(log_scale) eps, [S, B, C], or a function that gives it from z
    loc, log_scale   components of the posterior, [B, C, K]
    log_a, log_b     sticks of the posterior, [B, C-1]
    prior     MixturePrior
    u, eps    uniform noise [S, B, C-1] (None where the kind draws no weights) and normal noise [S, B, C, K]
    family    law of the sticks, "kumaraswamy" or "beta"
    log_rho   "collapsed" and "siw": log-responsibilities [B, C]; default: the mean weights of the sticks

    Raises ValueError for another kind, for shapes that do not fit and for responsibilities that do not sum to one.
    """
    _require(kind in KINDS, f"kind must be one of {KINDS}, got {kind!r}")
    _require(family in ("kumaraswamy", "beta"), f"family must be 'kumaraswamy' or 'beta', got {family!r}")
    _check_bound_shapes(loc, log_scale, log_a, log_b, prior, eps)
    prior = MixturePrior(*(part.to(loc) for part in prior))
    z = loc + log_scale.exp() * eps
    log_px = log_px(z) if callable(log_px) else log_px
    _require(log_px.shape == eps.shape[:-1], f"log_px must have shape {list(eps.shape[:-1])}, got {list(log_px.shape)}")
    log_mean = stick_mean_log_weights(log_a, log_b, family=family) if log_rho is None else log_rho
    if log_rho is not None:
        _require(kind in ("collapsed", "siw"), f"log_rho belongs to 'collapsed' and 'siw', got kind {kind!r}")
        _require(bool((torch.logsumexp(log_rho, -1).abs() < 1e-3).all()), "exp(log_rho) must sum to one")
    mean = log_mean.exp()

    if kind == "siw":
        log_prior = torch.logsumexp(prior.log_weights() + _pairwise_log_normal(z, prior.loc, prior.log_scale), -1)
        log_q = torch.logsumexp(log_mean[:, None] + _pairwise_log_normal(z, loc, log_scale), -1)
        log_w = log_mean + log_px + log_prior - log_q
        return torch.logsumexp(log_w, (0, 2)) - math.log(len(eps))
    paired = log_px.mean(0) + _cross_term(loc, log_scale, prior)
    if kind == "collapsed":
        return (mean * (paired + _entropy(log_scale) + prior.log_weights() - log_mean)).sum(-1)
    kl = _stick_kl(log_a, log_b, prior, family)
    if kind == "indicator":
        return (mean * (paired + _entropy(log_scale))).sum(-1) - kl

    _require(
        u is not None and u.shape == (*eps.shape[:2], eps.shape[2] - 1),
        f"u must have shape {[*eps.shape[:2], eps.shape[2] - 1]}, got {None if u is None else list(u.shape)}",
    )
    log_pi = _draw_log_weights(log_a, log_b, u, family)
    if kind == "paper":  # each component's density at its own draw: not an entropy, and below one
        own = log_pi + _log_normal(z, loc, log_scale)
        return (mean * paired).sum(-1) - torch.logsumexp(own, -1).mean(0) - kl
    # The weights outside the logarithms are the ones inside: one draw of pi, one density.
    log_prior = torch.logsumexp(log_pi[:, :, None] + _pairwise_log_normal(z, prior.loc, prior.log_scale), -1)
    log_q = torch.logsumexp(log_pi[:, :, None] + _pairwise_log_normal(z, loc, log_scale), -1)
    return (mean * log_px.mean(0)).sum(-1) + (log_pi.exp() * (log_prior - log_q)).sum(-1).mean(0) - kl


def factor_mixture_log_likelihood(x, weight, bias, noise_var, log_weights, prior_loc, prior_scale):
    """Log-likelihood of factor mixture analysis, eq-mx-fma: a linear decoder under a mixture prior, exact.

    x [B, D], weight [D, K], bias [D], noise_var [D]; log_weights [C], prior_loc and prior_scale [C, K].
    Returns (log p(x) [B], responsibilities [B, C]) (Montanari and Viroli 2010). Raises ValueError for weights that do
    not sum to one and for variances or scales that are not positive.
    """
    total = torch.logsumexp(log_weights, -1)
    _require(bool(total.abs() < 1e-3), lambda: f"weights must sum to one, got a sum of {total.exp().item():g}")
    for name, value in (("noise_var", noise_var), ("prior_scale", prior_scale)):
        _require(bool((value > 0).all()), lambda n=name, v=value: f"{n} must be positive, got {v.min().item():g}")
    scaled = weight * prior_scale[:, None, :]  # [C, D, K]
    cov = scaled @ scaled.mT + torch.diag(noise_var)
    law = torch.distributions.MultivariateNormal(prior_loc @ weight.T + bias, cov)
    joint = log_weights + law.log_prob(x[:, None])
    log_px = torch.logsumexp(joint, -1)
    return log_px, (joint - log_px[:, None]).exp()


# --- Models


def _draw(kind, shape, like, generator):
    options = dict(generator=generator, dtype=like.dtype, device=like.device)
    if kind == "normal":
        return torch.randn(shape, **options)
    limits = torch.finfo(like.dtype)
    return torch.rand(shape, **options).clamp(limits.tiny, 1 - limits.eps / 2)


def _zero_linear(num_inputs, num_outputs):
    layer = nn.Linear(num_inputs, num_outputs)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def _soft_limit(raw, limit):
    """raw near zero, never beyond +-limit: an exponential link that one large step cannot blow up."""
    return limit * torch.tanh(raw / limit)


def _start_of_sticks(alpha, beta, family):
    """log a, log b [C-1] at which q(pi) starts: the prior, or Beta(1, beta / alpha), a Kumaraswamy of the same mean."""
    if family == "beta":
        return alpha.log(), beta.log()
    return torch.zeros_like(alpha), (beta / alpha).log()


class _Sticks(nn.Module):
    """Heads for log a, log b [..., C-1]; at the start q(pi) is the prior, or has its means, for every input."""

    def __init__(self, num_inputs, alpha, beta, family):
        super().__init__()
        self.head = _zero_linear(num_inputs, 2 * len(alpha)) if len(alpha) else None  # one component: no stick
        log_a, log_b = _start_of_sticks(alpha, beta, family)
        self.register_buffer("start", torch.stack([log_a, log_b]).to(torch.get_default_dtype()))

    def forward(self, h):
        if self.head is None:
            return h.new_zeros((*h.shape[:-1], 0)), h.new_zeros((*h.shape[:-1], 0))
        raw = _soft_limit(self.head(h), 4.0).unflatten(-1, self.start.shape) + self.start
        return raw[..., 0, :], raw[..., 1, :]


class _Components(nn.Module):
    """Heads for loc and log_scale of C normals, [..., C, K] each; log_scale starts at zero."""

    def __init__(self, num_inputs, num_components, latent_dim):
        super().__init__()
        self.shape = (num_components, latent_dim)
        self.loc, self.log_scale = (nn.Linear(num_inputs, num_components * latent_dim) for _ in range(2))
        for head in (self.loc, self.log_scale):
            nn.init.normal_(head.weight, 0, 1 / math.sqrt(num_inputs))
            nn.init.zeros_(head.bias)
        nn.init.zeros_(self.log_scale.weight)

    def forward(self, h):
        return (self.loc(h).unflatten(-1, self.shape), _soft_limit(self.log_scale(h), 5.0).unflatten(-1, self.shape))


def _body(num_inputs, hidden_dims, activation):
    """A perceptron whose last layer has its activation too."""
    return nn.Sequential(mlp([num_inputs, *hidden_dims], activation), ACTIVATIONS[activation]())


def _check_array(value, shape, name):
    value = torch.as_tensor(value, dtype=torch.get_default_dtype())
    _require(tuple(value.shape) == shape, f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    _require(bool(value.isfinite().all()), f"{name} must be finite")
    return value.clone(memory_format=torch.contiguous_format)  # the model's own: not the caller's memory


class _LatentModel(nn.Module):
    """What the chapter's models share: likelihood, noise, estimates of log p(x)."""

    def _set_likelihood(self, data_dim, likelihood, noise_var):
        self.data_dim = _integer(data_dim, 1, "data_dim")
        _require(
            likelihood in ("bernoulli", "gaussian"), f"likelihood must be 'bernoulli' or 'gaussian', got {likelihood!r}"
        )
        self.likelihood = likelihood
        noise_var = torch.as_tensor(noise_var, dtype=torch.get_default_dtype())
        _require(
            bool(((noise_var > 0) & noise_var.isfinite()).all()),
            f"noise_var must be positive and finite, got {noise_var.tolist()}",
        )
        self.register_buffer("noise_var", noise_var)

    def _checked(self, x):
        _require(
            x.ndim == 2 and x.shape[1] == self.data_dim,
            f"x must have shape [B, {self.data_dim}], got {list(x.shape)}",
        )
        if self.likelihood == "gaussian":
            _require(bool(x.isfinite().all()), "x must be finite, got NaN or infinity")
        elif not bool(((x == 0) | (x == 1)).all()):
            raise ValueError(
                "x must be 0 or 1 for a Bernoulli likelihood, got values from "
                f"{x.min().item():g} to {x.max().item():g}: binarise the data"
            )
        return x

    def observation(self, output):
        """p(x | z) of the decoder's output [..., D], as a `likelihoods` object."""
        if self.likelihood == "bernoulli":
            return Bernoulli(output, validate=False)
        return Gaussian(output, self.noise_var, validate=False)

    def _log_px(self, x):
        """The function z [S, B, ..., K] -> log p(x | z) [S, B, ...] of a batch: one decode of all draws."""

        def log_px(z):
            between = (None,) * (z.ndim - 3)
            return self.observation(self.decoder(z)).log_prob(x[(slice(None), *between)])

        return log_px

    def _noise(self, batch_size, num_samples, noise, generator, like, spec=None):
        """The noise as a dict of arrays of the shapes that noise_spec names; drawn where it is not given."""
        spec = spec or self.noise_spec(batch_size, num_samples)
        if noise is None:
            return {name: _draw(kind, shape, like, generator) for name, (kind, shape, _) in spec.items()}
        if torch.is_tensor(noise):
            _require(len(spec) == 1, f"noise must be a dict with the arrays {sorted(spec)}, got one tensor")
            noise = {next(iter(spec)): noise}
        for name, (_, shape, _) in spec.items():
            _require(name in noise, f"noise lacks {name!r}: expected {sorted(spec)}, got {sorted(noise)}")
            _require(
                noise[name].shape == torch.Size(shape),
                f"noise[{name!r}] must have shape {list(shape)}, got {list(noise[name].shape)}",
            )
        return noise

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None):
        """Estimate log p(x) by importance sampling from the posterior.

        x [B, D]; num_samples: draws each (default 1000); proposal: maps x to a distribution with rsample and log_prob
        (default: `posterior`); chunk: pairs of draw and datum in memory at once (default 10 000).
        Returns evaluation.Estimate(value [B], standard_error [B], ess [B]); on average value is below log p(x).
        """
        x = self._checked(x)
        num_samples = _integer(1000 if num_samples is None else num_samples, 1, "num_samples")
        chunk = _integer(10_000 if chunk is None else chunk, 1, "chunk")
        found = log_likelihood_is(self, x, num_samples, proposal=proposal, generator=generator, chunk=chunk)
        return Estimate(*(part.to(x) for part in found))

    def sample(self, num, *, generator=None):
        """Draw data from the model: [num, D]."""
        with torch.no_grad():
            z = self.sample_latents(num, generator=generator)
            output = self._decode(z)
            if self.likelihood == "bernoulli":
                return self.observation(output).sample(noise=_draw("uniform", output.shape, output, generator))
            return self.observation(output).sample(noise=_draw("normal", output.shape, output, generator))

    def _decode(self, z):
        return self.decoder(z[0] if isinstance(z, tuple) else z)

    def reconstruct(self, x, *, num_samples=1, generator=None):
        """Mean of p(x' | z) over draws of the posterior: x [B, D] -> [B, D]."""
        with torch.no_grad():
            z = self.posterior(self._checked(x)).rsample((num_samples,), generator=generator)
            return self.observation(self._decode(z)).mean.mean(0)


class MixtureDLGM(_LatentModel):
    """A deep latent Gaussian mixture: z ~ sum_k pi_k N(loc_k, scale_k^2), x ~ p(x | decoder(z)).

    data_dim D, latent_dim K, num_components C (for two layers: pairs, index 0 nearest the data);
    hidden_dims      widths of the encoder, in reverse of the decoder
    prior            "dirichlet": pi ~ Dirichlet(concentration, ...); "gem": weights of a Dirichlet process, truncated
    prior_loc, prior_scale   components of the prior [C, K], default N(0, I) for each; learn_prior: learned from there
    weights          "sticks": q(pi | x) of stick fractions; "softmax": pi integrated out, q(c | x) categorical
    sticks           law of a fraction under q, "kumaraswamy" or "beta" (implicit reparameterisation)
    num_layers       2: a second mixture layer above, with its own sticks (bounds "indicator" and "collapsed")
    kind             the bound, see `mixture_bound`; default "indicator", and "collapsed" with softmax weights
    decoder          an nn.Module [..., K] -> [..., D] (logits or mean), used as is; freeze_decoder: not trained
    likelihood       "bernoulli" or "gaussian" with noise_var

    pi belongs to one datum: integrating it out leaves p(z) = sum_k w_k N(loc_k, scale_k^2) with fixed w = E pi
    (eq-mx-prior-collapsed), which log_joint uses. With C = 1 the model is the plain VAE.
    Source: Nalisnick, Hertel and Smyth (2016).

    >>> model = MixtureDLGM(7, 2, 3, hidden_dims=(5,))
    >>> model.bound(torch.zeros(4, 7)).shape
    torch.Size([4])
    """

    def __init__(
        self,
        data_dim,
        latent_dim,
        num_components,
        *,
        hidden_dims=(200,),
        prior="dirichlet",
        concentration=1.0,
        prior_loc=None,
        prior_scale=None,
        learn_prior=False,
        weights="sticks",
        sticks="kumaraswamy",
        num_layers=1,
        kind=None,
        likelihood="bernoulli",
        noise_var=1.0,
        decoder=None,
        freeze_decoder=False,
        activation="relu",
    ):
        super().__init__()
        self._set_likelihood(data_dim, likelihood, noise_var)
        _require(num_layers in (1, 2), f"num_layers must be 1 or 2, got {num_layers!r}")
        _require(weights in ("sticks", "softmax"), f"weights must be 'sticks' or 'softmax', got {weights!r}")
        _require(sticks in ("kumaraswamy", "beta"), f"sticks must be 'kumaraswamy' or 'beta', got {sticks!r}")
        kind = kind or ("indicator" if weights == "sticks" else "collapsed")
        self.num_layers, self.weights, self.family = num_layers, weights, sticks
        self.kind = self._checked_kind(kind)
        pair = lambda value, name: tuple(
            _integer(n, 1, name) for n in (value if isinstance(value, (tuple, list)) else (value,) * num_layers)
        )
        self.latent_dims, self.nums = pair(latent_dim, "latent_dim"), pair(num_components, "num_components")
        _require(
            len(self.latent_dims) == num_layers and len(self.nums) == num_layers,
            f"latent_dim and num_components must be a number or {num_layers} of them, "
            f"got {latent_dim!r}, {num_components!r}",
        )

        K, C = self.latent_dims[-1], self.nums[-1]  # the top layer carries the prior
        loc = torch.zeros(C, K) if prior_loc is None else _check_array(prior_loc, (C, K), "prior_loc")
        scale = torch.ones(C, K) if prior_scale is None else _check_array(prior_scale, (C, K), "prior_scale")
        _require(bool((scale > 0).all()), f"prior_scale must be positive, got a minimum of {scale.min().item():g}")
        for name, value in (("prior_loc", loc), ("prior_log_scale", scale.log())):
            self.register_parameter(name, nn.Parameter(value)) if learn_prior else self.register_buffer(name, value)
        for layer, num in enumerate(self.nums):
            alpha, beta = stick_prior(prior, concentration, num)
            self.register_buffer(f"alpha_{layer + 1}", alpha)
            self.register_buffer(f"beta_{layer + 1}", beta)

        H = hidden_dims[-1]
        self.encoder = _body(data_dim, hidden_dims, activation)
        self.components = _Components(H, C, K)
        self.mixing = self._mixing_head(H, num_layers)
        if num_layers == 2:
            self.lower_body = _body(H + K, (H,), activation)
            self.lower_components = _Components(H, self.nums[0], self.latent_dims[0])
            self.lower_mixing = self._mixing_head(H, 1)
            self.prior_body = _body(K, (H,), activation)
            self.prior_components = _Components(H, self.nums[0], self.latent_dims[0])
        self.decoder = decoder or mlp([self.latent_dims[0], *reversed(hidden_dims), data_dim], activation)
        if freeze_decoder:
            self.decoder.requires_grad_(False)

    def _mixing_head(self, H, layer):
        alpha, beta = getattr(self, f"alpha_{layer}"), getattr(self, f"beta_{layer}")
        if self.weights == "sticks":
            return _Sticks(H, alpha, beta, self.family)
        head = nn.Linear(H, len(alpha) + 1)
        nn.init.zeros_(head.weight)
        with torch.no_grad():
            mean = alpha / (alpha + beta)
            head.bias.copy_(stick_breaking(mean.log(), torch.log1p(-mean)))
        return head

    def _checked_kind(self, kind):
        _require(kind in KINDS, f"kind must be one of {KINDS}, got {kind!r}")
        if self.weights == "softmax":
            _require(
                kind in ("collapsed", "siw"), f"softmax weights have the bounds 'collapsed' and 'siw', got {kind!r}"
            )
        if self.num_layers == 2:
            _require(
                kind in ("indicator", "collapsed"),
                f"two layers have the bounds 'indicator' and 'collapsed', got {kind!r}",
            )
        return kind

    def prior(self):
        """The MixturePrior of the top layer."""
        top = self.num_layers
        return MixturePrior(
            self.prior_loc, self.prior_log_scale, getattr(self, f"alpha_{top}"), getattr(self, f"beta_{top}")
        )

    def recognise(self, x):
        """Encode x [B, D]: (loc, log_scale [B, C, K], log_a, log_b [B, C-1] or None, log_rho [B, C] or None)."""
        h = self.encoder(x)
        return (*self.components(h), *self._mix(self.mixing, h))

    def _mix(self, head, h):
        if self.weights == "sticks":
            return *head(h), None
        return None, None, torch.log_softmax(head(h), -1)

    def _log_mean(self, log_a, log_b, log_rho):
        return stick_mean_log_weights(log_a, log_b, family=self.family) if log_rho is None else log_rho

    def noise_spec(self, batch_size, num_samples=1, *, kind=None):
        """{name: (kind, shape, batch_axis)} of the noise of `bound`: normals, and uniforms of the sticks."""
        S, C, K = num_samples, self.nums, self.latent_dims
        if self.num_layers == 2:
            return {
                "upper": ("normal", (S, batch_size, C[1], K[1]), 1),
                "lower": ("normal", (S, batch_size, C[1], C[0], K[0]), 1),
            }
        spec = {"components": ("normal", (S, batch_size, C[0], K[0]), 1)}
        if (kind or self.kind) in ("paper", "mixture") and C[0] > 1:
            spec["sticks"] = ("uniform", (S, batch_size, C[0] - 1), 1)
        return spec

    def bound(self, x, *, kind=None, num_samples=1, noise=None, generator=None):
        """The bound of log p(x) in nats: x [B, D] -> [B]. kind: see `mixture_bound`; noise: see `noise_spec`."""
        kind = self._checked_kind(kind or self.kind)
        x = self._checked(x)
        num_samples = _integer(num_samples, 1, "num_samples")
        noise = self._noise(
            len(x), num_samples, noise, generator, self.prior_loc, self.noise_spec(len(x), num_samples, kind=kind)
        )
        if self.num_layers == 2:
            return self._two_layer_bound(x, kind, noise)
        loc, log_scale, log_a, log_b, log_rho = self.recognise(x)
        eps = noise["components"]
        u = noise["sticks"] if "sticks" in noise else eps.new_zeros((*eps.shape[:2], 0))
        return mixture_bound(
            kind,
            self._log_px(x),
            loc,
            log_scale,
            log_a,
            log_b,
            self.prior(),
            u,
            eps,
            family=self.family,
            log_rho=log_rho,
        )

    def _price(self, kind, layer, log_a, log_b, log_rho):
        """(mean weights [..., C], what each weight costs [..., C], KL of the sticks [...] or 0) of a layer."""
        alpha, beta = getattr(self, f"alpha_{layer}"), getattr(self, f"beta_{layer}")
        log_mean = self._log_mean(log_a, log_b, log_rho)
        prior = MixturePrior(None, None, alpha, beta)
        if kind == "collapsed":
            return log_mean.exp(), prior.log_weights().to(log_mean) - log_mean, 0.0
        return log_mean.exp(), torch.zeros_like(log_mean), _stick_kl(log_a, log_b, prior, self.family)

    def _two_layer_bound(self, x, kind, noise):
        """The bound for two mixture layers, eq-mx-two-layers: the top's K samples each meet all lower components."""
        h = self.encoder(x)
        loc2, log_scale2 = self.components(h)
        mean2, price2, kl2 = self._price(kind, 2, *self._mix(self.mixing, h))
        z2 = loc2 + log_scale2.exp() * noise["upper"]  # [S, B, C2, K2]
        lower = self._lower_recognition(h, z2)
        loc1, log_scale1 = lower[:2]  # [S, B, C2, C1, K1]
        mean1, price1, kl1 = self._price(kind, 1, *lower[2:])
        z1 = loc1 + log_scale1.exp() * noise["lower"]
        conditional = MixturePrior(*self._conditional(z2), None, None)
        f1 = self._log_px(x)(z1) + _cross_term(loc1, log_scale1, conditional) + _entropy(log_scale1) + price1
        f2 = ((mean1 * f1).sum(-1) - kl1).mean(0)
        f2 = f2 + _cross_term(loc2, log_scale2, self.prior()) + _entropy(log_scale2) + price2
        return (mean2 * f2).sum(-1) - kl2

    def _lower_recognition(self, h, z2):
        """q(z_1 | x, z_2): z2 [S, B, ..., K2] -> loc, log_scale [S, B, ..., C1, K1], log_a, log_b, log_rho."""
        h = h[(slice(None), *(None,) * (z2.ndim - 3))].expand(*z2.shape[:-1], h.shape[-1])
        g = self.lower_body(torch.cat([h, z2], -1))
        return (*self.lower_components(g), *self._mix(self.lower_mixing, g))

    def _conditional(self, z2):
        """p(z_1 | z_2, c_1): loc, log_scale [..., C1, K1]."""
        return self.prior_components(self.prior_body(z2))

    def _conditional_mixture(self, z2):
        log_w = MixturePrior(None, None, self.alpha_1, self.beta_1).log_weights().to(z2)
        return MixtureNormal(log_w, *self._conditional(z2))

    def log_joint(self, x, z, *, coordinates="state"):
        """log p(x, z) with the weights integrated out, in nats: x [B, D], z [S, B, K] (two layers: a pair) -> [S, B].

        coordinates: "state" only; a mixture prior has no noise coordinates.
        """
        _require(coordinates == "state", f"coordinates must be 'state' for a mixture prior, got {coordinates!r}")
        x = self._checked(x)
        lower, top = z if self.num_layers == 2 else (z, z)
        value = self._log_px(x)(lower) + self._top().log_prob(top)
        return value + self._conditional_mixture(top).log_prob(lower) if self.num_layers == 2 else value

    def _top(self):
        prior = self.prior()
        return MixtureNormal(prior.log_weights().to(prior.loc), prior.loc, prior.log_scale)

    def posterior(self, x):
        """q(z | x) with mean weights, a MixtureNormal; for two layers a pair of them, drawn from the top down."""
        loc, log_scale, log_a, log_b, log_rho = self.recognise(self._checked(x))
        top = MixtureNormal(self._log_mean(log_a, log_b, log_rho), loc, log_scale)
        return top if self.num_layers == 1 else _TwoLayerPosterior(self, self.encoder(x), top)

    def component_weights(self, x):
        """Mean weights of the top layer's components under q, [B, C]."""
        return self._log_mean(*self.recognise(self._checked(x))[2:]).exp()

    def log_likelihood(self, x, num_samples=None, *, proposal=None, generator=None, chunk=None):
        """Estimate log p(x) [B]; exact, with standard error 0, for one layer and a linear Gaussian decoder."""
        linear = self.likelihood == "gaussian" and isinstance(self.decoder, nn.Linear) and self.num_layers == 1
        if not linear or num_samples is not None:
            return super().log_likelihood(x, num_samples, proposal=proposal, generator=generator, chunk=chunk)
        prior = self._top()
        with torch.no_grad():
            value, _ = factor_mixture_log_likelihood(
                self._checked(x),
                self.decoder.weight,
                self.decoder.bias,
                self.noise_var.expand(self.data_dim),
                prior.log_weights,
                prior.loc,
                prior.log_scale.exp(),
            )
        return Estimate(value, torch.zeros_like(value), torch.full_like(value, math.inf))

    def sample_latents(self, num, *, component=None, generator=None):
        """Draw z from the prior, [num, K] (two layers: a pair); component: from that one of the top layer alone."""
        num = _integer(num, 1, "num")
        with torch.no_grad():
            prior = self.prior()
            if component is None:
                z = self._top().rsample((num,), generator=generator)
            else:
                _require(
                    0 <= component < self.nums[-1], f"component must be from 0 to {self.nums[-1] - 1}, got {component}"
                )
                noise = _draw("normal", (num, self.latent_dims[-1]), prior.loc, generator)
                z = prior.loc[component] + prior.log_scale[component].exp() * noise
            return z if self.num_layers == 1 else (self._conditional_mixture(z).rsample(generator=generator), z)


class _TwoLayerPosterior:
    """q(z_2 | x) q(z_1 | x, z_2), as pairs (z_1, z_2)."""

    def __init__(self, model, h, top):
        self.model, self.h, self.top = model, h, top

    def _lower(self, z2):
        loc, log_scale, *mix = self.model._lower_recognition(self.h, z2)
        return MixtureNormal(self.model._log_mean(*mix), loc, log_scale)

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw (z_1, z_2); noise: {"upper": ..., "lower": ...}, each as MixtureNormal takes it."""
        noise = noise or {"upper": None, "lower": None}
        z2 = self.top.rsample(sample_shape, noise=noise["upper"], generator=generator)
        return self._lower(z2).rsample(noise=noise["lower"], generator=generator), z2

    def log_prob(self, z):
        """log q(z_1, z_2 | x) in nats, [S, B]."""
        return self.top.log_prob(z[1]) + self._lower(z[1]).log_prob(z[0])


class _StickPosterior:
    """q(v | x) over the fractions of the stick: draws are (log v, log(1 - v)) pairs, [S, B, C-1, 2].

    Both logarithms are kept because neither can be had from the other near the ends.
    """

    def __init__(self, log_a, log_b, family):
        self.log_a, self.log_b, self.family = log_a, log_b, family

    @property
    def mean(self):
        """E pi, [B, C]."""
        return stick_mean_log_weights(self.log_a, self.log_b, family=self.family).exp()

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw, sample_shape + [B, C-1, 2]; noise: uniform, sample_shape + [B, C-1]."""
        shape = (*sample_shape, *self.log_a.shape)
        u = _draw("uniform", shape, self.log_a, generator) if noise is None else noise
        _require(u.shape == torch.Size(shape), f"noise must have shape {list(shape)}, got {list(u.shape)}")
        a, b = self.log_a.exp().expand(shape), self.log_b.exp().expand(shape)
        if self.family == "kumaraswamy":
            return torch.stack(Kumaraswamy(a, b, validate_args=False).rsample_log(noise=u), -1)
        v = beta_rsample(a, b, u)
        return torch.stack([v.log(), torch.log1p(-v)], -1)

    def log_prob(self, z):
        """Log-density of the fractions in nats, [S, B]."""
        if self.family == "kumaraswamy":
            law = Kumaraswamy(self.log_a.exp(), self.log_b.exp(), validate_args=False)
            return law.log_prob_log(z[..., 0], z[..., 1])
        return _beta_log_density(z, self.log_a.exp(), self.log_b.exp())


def _beta_log_density(z, a, b):
    log_norm = torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    return (log_norm + (a - 1) * z[..., 0] + (b - 1) * z[..., 1]).sum(-1)


class StickBreakingVAE(_LatentModel):
    """A VAE whose latent code is the vector of C weights of a broken stick, eq-mx-sbvae.

    data_dim D, num_components C (the truncation), concentration alpha_0 of the prior Beta(1, alpha_0) sticks;
    sticks: law of a fraction under q, "kumaraswamy" or "beta"; decoder: [..., C] -> [..., D].
    A latent is kept as (log v, log(1 - v)), [S, B, C-1, 2]; `weights` turns it into pi [S, B, C].
    Source: Nalisnick and Smyth (2017), equations 2, 5 to 9.

    >>> StickBreakingVAE(7, 4, hidden_dims=(5,)).bound(torch.zeros(3, 7)).shape
    torch.Size([3])
    """

    def __init__(
        self,
        data_dim,
        num_components,
        *,
        hidden_dims=(200,),
        concentration=1.0,
        sticks="kumaraswamy",
        likelihood="bernoulli",
        noise_var=1.0,
        decoder=None,
        freeze_decoder=False,
        activation="relu",
    ):
        super().__init__()
        self._set_likelihood(data_dim, likelihood, noise_var)
        _require(sticks in ("kumaraswamy", "beta"), f"sticks must be 'kumaraswamy' or 'beta', got {sticks!r}")
        alpha, beta = stick_prior("gem", concentration, num_components)
        self.num_components, self.family = int(num_components), sticks
        self.register_buffer("alpha", alpha)
        self.register_buffer("beta", beta)
        self.encoder = _body(data_dim, hidden_dims, activation)
        self.mixing = _Sticks(hidden_dims[-1], alpha, beta, sticks)
        nn.init.normal_(self.mixing.head.weight, 0, 0.01)  # the code must depend on x from the first step
        self.decoder = decoder or mlp([self.num_components, *reversed(hidden_dims), data_dim], activation)
        if freeze_decoder:
            self.decoder.requires_grad_(False)

    def prior(self):
        """The MixturePrior of the sticks; it has no components."""
        return MixturePrior(None, None, self.alpha, self.beta)

    def weights(self, z):
        """pi of a latent: z [S, B, C-1, 2] -> [S, B, C]."""
        return stick_breaking(z[..., 0], z[..., 1]).exp()

    def _decode(self, z):
        return self.decoder(self.weights(z))

    def noise_spec(self, batch_size, num_samples=1):
        """One array of uniforms, [S, B, C-1]."""
        return {"sticks": ("uniform", (num_samples, batch_size, self.num_components - 1), 1)}

    def posterior(self, x):
        """q over the fractions; its `mean` is that of pi."""
        return _StickPosterior(*self.mixing(self.encoder(self._checked(x))), self.family)

    def bound(self, x, *, num_samples=1, noise=None, generator=None):
        """The evidence lower bound, reconstruction minus the KLs of C - 1 sticks: x [B, D] -> [B], in nats."""
        q = self.posterior(x)
        num_samples = _integer(num_samples, 1, "num_samples")
        u = self._noise(len(x), num_samples, noise, generator, q.log_a)["sticks"]
        log_px = self.observation(self._decode(q.rsample((num_samples,), noise=u))).log_prob(x)
        return log_px.mean(0) - _stick_kl(q.log_a, q.log_b, self.prior(), self.family)

    def log_joint(self, x, z, *, coordinates="state"):
        """log p(x, v) in nats, density over the fractions: z [S, B, C-1, 2] -> [S, B]."""
        _require(coordinates == "state", f"coordinates must be 'state' for sticks, got {coordinates!r}")
        x = self._checked(x)
        return self.observation(self._decode(z)).log_prob(x) + _beta_log_density(z, self.alpha.to(z), self.beta.to(z))

    def sample_latents(self, num, *, generator=None):
        """Draw the prior's fractions, [num, C-1, 2]; Beta(1, beta) is Kumaraswamy(1, beta)."""
        like = self.mixing.start
        u = _draw("uniform", (_integer(num, 1, "num"), len(self.alpha)), like, generator)
        log1m_v = u.log() / self.beta.to(like)
        return torch.stack([_log1mexp(log1m_v), log1m_v], -1)


class SemiSupervisedVAE(_LatentModel):
    """The M2 model: x ~ p(x | z, y), a label y and a latent z, normal or a broken stick.

    data_dim D, latent_dim: K normals, or C weights of a stick; num_classes; latent "gaussian" | "stick_breaking";
    concentration of the sticks' prior. p(y) is uniform. q(z | x) does not see y (Nalisnick and Smyth 2017, equations
    10 and 11; Kingma and others 2014 let it). The labels are summed out as one more axis of the batch, and the first
    layer's product with z is computed once for all of them.

    >>> model = SemiSupervisedVAE(7, 4, 3, hidden_dims=(5,))
    >>> model.bound(torch.zeros(2, 7)).shape, model.bound(torch.zeros(2, 7), torch.tensor([0, 2])).shape
    (torch.Size([2]), torch.Size([2]))
    """

    def __init__(
        self,
        data_dim,
        latent_dim,
        num_classes,
        *,
        latent="gaussian",
        hidden_dims=(200,),
        concentration=1.0,
        likelihood="bernoulli",
        noise_var=1.0,
        activation="relu",
    ):
        super().__init__()
        self._set_likelihood(data_dim, likelihood, noise_var)
        _require(
            latent in ("gaussian", "stick_breaking"), f"latent must be 'gaussian' or 'stick_breaking', got {latent!r}"
        )
        self.latent, self.num_classes = latent, _integer(num_classes, 2, "num_classes")
        self.latent_dim, self.family = (
            _integer(latent_dim, 1 if latent == "gaussian" else 2, "latent_dim"),
            "kumaraswamy",
        )
        H = hidden_dims[-1]
        self.encoder = _body(data_dim, hidden_dims, activation)
        self.classifier = nn.Linear(H, self.num_classes)
        if latent == "gaussian":
            self.components = _Components(H, 1, self.latent_dim)
        else:
            alpha, beta = stick_prior("gem", concentration, latent_dim)
            self.register_buffer("alpha", alpha)
            self.register_buffer("beta", beta)
            self.mixing = _Sticks(H, alpha, beta, "kumaraswamy")
            nn.init.normal_(self.mixing.head.weight, 0, 0.01)
        self.from_latent = nn.Linear(self.latent_dim, H)
        self.from_label = nn.Linear(self.num_classes, H, bias=False)
        self.tail = nn.Sequential(ACTIVATIONS[activation](), mlp([*reversed(hidden_dims), data_dim], activation))

    def noise_spec(self, batch_size, num_samples=1):
        """One array: normals [S, B, K], or uniforms [S, B, C-1]."""
        if self.latent == "gaussian":
            return {"latent": ("normal", (num_samples, batch_size, self.latent_dim), 1)}
        return {"latent": ("uniform", (num_samples, batch_size, self.latent_dim - 1), 1)}

    def _encode(self, x, noise):
        """(log q(y | x) [B, Y], z [S, B, K], KL of z [B])."""
        h = self.encoder(x)
        log_qy = torch.log_softmax(self.classifier(h), -1)
        if self.latent == "gaussian":
            loc, log_scale = (part[:, 0] for part in self.components(h))
            kl = (0.5 * (loc.square() + torch.expm1(2 * log_scale)) - log_scale).sum(-1)
            return log_qy, loc + log_scale.exp() * noise, kl
        log_a, log_b = self.mixing(h)
        kl = _stick_kl(log_a, log_b, MixturePrior(None, None, self.alpha, self.beta), self.family)
        return log_qy, _draw_log_weights(log_a, log_b, noise, self.family).exp(), kl

    def decode(self, z, labels):
        """Logits or mean of p(x | z, y): z [S, B, K], labels [Y] or [B, 1] -> [S, B, Y or 1, D]."""
        onto = self.from_label.weight.T[labels]  # the first layer's share of a one-hot label is a column
        return self.tail(self.from_latent(z)[:, :, None] + onto)

    def bound(self, x, y=None, *, num_samples=1, noise=None, generator=None):
        """Lower bound in nats, [B]: of log p(x, y) where labels y [B] are given, else of log p(x).

        x [B, D]; noise: see `noise_spec`. log p(y) = -log Y is included. Raises ValueError for labels out of range.
        """
        x = self._checked(x)
        num_samples = _integer(num_samples, 1, "num_samples")
        noise = self._noise(len(x), num_samples, noise, generator, self.from_label.weight)["latent"]
        log_qy, z, kl = self._encode(x, noise)
        if y is not None:
            _require(
                not y.is_floating_point() and y.shape == x.shape[:1],
                f"y must hold {len(x)} integer labels, got {y.dtype} {list(y.shape)}",
            )
            if not bool(((y >= 0) & (y < self.num_classes)).all()):
                raise ValueError(f"y must be labels from 0 to {self.num_classes - 1}, "
                                 f"got values from {y.min().item()} to {y.max().item()}")
            labels = y[:, None]
        else:
            labels = torch.arange(self.num_classes, device=x.device)
        log_px = self.observation(self.decode(z, labels)).log_prob(x[:, None]).mean(0) - math.log(self.num_classes)
        if y is not None:
            return log_px[:, 0] - kl
        return (log_qy.exp() * (log_px - log_qy)).sum(-1) - kl

    def objective(self, x, y, x_unlabelled, *, mixing=0.375, noise=None, noise_unlabelled=None):
        """What training maximises, a number: mixing * labelled + (1 - mixing) * unlabelled, means over their batches.

        x [B, D], y [B]: the labelled part, with log q(y | x) added to its bound; x_unlabelled [B', D].
        mixing: 0.375 in the paper. noise, noise_unlabelled: as `bound` takes them.
        """
        _require(0 <= mixing <= 1, f"mixing must be from 0 to 1, got {mixing!r}")
        labelled = self.bound(x, y, noise=noise) + torch.gather(self.classify(x), 1, y[:, None])[:, 0]
        return mixing * labelled.mean() + (1 - mixing) * self.bound(x_unlabelled, noise=noise_unlabelled).mean()

    def classify(self, x):
        """log q(y | x), [B, Y]."""
        return torch.log_softmax(self.classifier(self.encoder(self._checked(x))), -1)
