"""The distributions of the book that torch.distributions lacks, or computes less carefully.

All are batched over leading dimensions, with events over the last: parameters [..., K], samples S + [..., K],
densities S + [...]. `rsample` is a differentiable function of explicit noise, so that two implementations can be
compared number by number.
"""

import math

import torch
from torch.distributions import Distribution, constraints

__all__ = ["DiagonalNormal", "FullNormal", "Kumaraswamy", "LowRankPrecisionNormal", "RankOnePrecisionNormal"]

LOG_2PI = math.log(2 * math.pi)


def _require(ok, message):
    if not ok:
        raise ValueError(message)


def _all_finite(value):
    """True without NaN or infinity. One of them makes the sum not finite, so that one pass settles most cases."""
    return math.isfinite(value.detach().sum()) or bool(torch.isfinite(value).all())


def _shape(tensor):
    return list(tensor.shape)


class _Reparameterised(Distribution):
    """What the distributions share: parameters checked at construction, noise checked or drawn in `rsample`."""

    has_rsample = True
    _draw = staticmethod(torch.randn)  # the law of the noise

    def _initialise(self, validate_args, **parameters):
        first_name, first = next(iter(parameters.items()))
        for name, value in parameters.items():
            if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
                kind = value.dtype if isinstance(value, torch.Tensor) else type(value).__name__
                raise TypeError(f"{name} must be a tensor of floats, got {kind}")
            _require(value.ndim >= 1, f"{name} must have shape [..., K], got a scalar")
            if (value.dtype, value.device) != (first.dtype, first.device):
                raise TypeError(f"{name} is {value.dtype} on {value.device}, "
                                f"{first_name} is {first.dtype} on {first.device}")
            setattr(self, name, value)
        super().__init__(first.shape[:-1], first.shape[-1:], validate_args=False)
        if validate_args is not False:  # checked here, so that the message names the argument
            self._validate_args = validate_args or Distribution._validate_args
        # A check reads the values back from the device, so it is left out where a graph is captured or compiled.
        if self._validate_args and not torch.compiler.is_compiling() and not (
                first.is_cuda and torch.cuda.is_current_stream_capturing()):
            for name, value in parameters.items():
                _require(_all_finite(value), f"{name} must be finite, got NaN or infinity")
            self._check_parameters()

    def _check_parameters(self):
        pass

    def _noise(self, sample_shape, noise, generator):
        like = self._like
        shape = torch.Size(sample_shape) + like.shape
        if noise is None:
            return self._draw(shape, generator=generator, dtype=like.dtype, device=like.device)
        _require(noise.shape == shape,
                 f"noise must have shape sample_shape + {_shape(like)} = {list(shape)}, got {_shape(noise)}")
        if (noise.dtype, noise.device) != (like.dtype, like.device):
            raise TypeError(f"noise is {noise.dtype} on {noise.device}, expected {like.dtype} on {like.device}")
        return noise

    def _check_value(self, z):
        like = self._like
        _require(z.ndim >= 1 and z.shape[-1] == like.shape[-1],
                 f"the value must have shape [..., {like.shape[-1]}], got {_shape(z)}")


class _Normal(_Reparameterised):
    """A normal law as loc + R noise: what differs is R, kept as the function `_scale(noise)`."""

    support = constraints.real_vector

    @property
    def _like(self):
        return self.loc

    @property
    def mean(self):
        return self.loc

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Return loc + R noise, sample_shape + [..., K]; noise: standard normal, of that shape."""
        return self.loc + self._scale(self._noise(sample_shape, noise, generator))

    def log_prob(self, z):
        """Log-density in nats, summed over the last dimension: [..., K] -> [...]."""
        self._check_value(z)
        return -0.5 * (self._quadratic(z - self.loc) + self._log_det() + self.loc.shape[-1] * LOG_2PI)

    def entropy(self):
        """Entropy in nats, [...]."""
        return 0.5 * (self._log_det() + self.loc.shape[-1] * (1 + LOG_2PI))


class DiagonalNormal(_Normal):
    """Normal with independent coordinates, N(loc, diag(exp(log_var))).

    loc, log_var: [..., K].

    >>> q = DiagonalNormal(torch.zeros(3, 2), torch.zeros(3, 2))
    >>> q.rsample((5,)).shape, q.kl_to_standard()
    (torch.Size([5, 3, 2]), tensor([0., 0., 0.]))
    """

    arg_constraints = {"loc": constraints.real_vector, "log_var": constraints.real_vector}

    def __init__(self, loc, log_var, validate_args=None):
        _require(loc.shape == log_var.shape,
                 f"log_var must have the shape of loc, {_shape(loc)}, got {_shape(log_var)}")
        self._initialise(validate_args, loc=loc, log_var=log_var)

    def _scale(self, noise):
        return torch.exp(0.5 * self.log_var) * noise

    def _quadratic(self, delta):
        return (delta.square() * torch.exp(-self.log_var)).sum(-1)

    def _log_det(self):
        return self.log_var.sum(-1)

    @property
    def variance(self):
        return self.log_var.exp()

    @property
    def covariance_matrix(self):
        return torch.diag_embed(self.variance)

    def kl_to_standard(self):
        """KL(q || N(0, I)) = 1/2 sum(loc^2 + exp(log_var) - 1 - log_var) in nats, [...]."""
        return 0.5 * (self.loc.square() + torch.expm1(self.log_var) - self.log_var).sum(-1)


def _sum_of_others(x):
    """sum_{j != i} x_j for each i of the last dimension, without subtracting: [..., K] -> [..., K]."""
    before = torch.cumsum(x, -1).roll(1, -1)
    after = torch.cumsum(x.flip(-1), -1).roll(1, -1)
    keep = torch.arange(x.shape[-1], device=x.device) > 0
    return before * keep + (after * keep).flip(-1)


class RankOnePrecisionNormal(_Normal):
    """Normal whose precision is a diagonal plus a rank-one term, diag(d) + u u^T with d = exp(log_d).

    loc, log_d, u: [..., K]. With s = d^(-1/2), w = s u, t = w^T w, a factor of the covariance is
    R = diag(s) (I - c w w^T) with c = 1 / (1 + t + sqrt(1 + t)): this is (1 - sqrt(1 / (1 + t))) / t without its 0 / 0.
    Everything costs O(K); no K x K matrix is formed (except by `covariance_matrix`, for looking at).
    Source: Rezende, Mohamed and Wierstra 2014, eq. 19 to 21. The gradient in u is zero at u = 0: start elsewhere.

    >>> one = torch.ones(1, 2, dtype=torch.float64)
    >>> q = RankOnePrecisionNormal(0 * one, 0 * one, one)
    >>> q.covariance_matrix
    tensor([[[ 0.6667, -0.3333],
             [-0.3333,  0.6667]]], dtype=torch.float64)
    """

    arg_constraints = {name: constraints.real_vector for name in ("loc", "log_d", "u")}

    def __init__(self, loc, log_d, u, validate_args=None):
        _require(loc.shape == log_d.shape, f"log_d must have the shape of loc, {_shape(loc)}, got {_shape(log_d)}")
        _require(loc.shape == u.shape, f"u must have the shape of loc, {_shape(loc)}, got {_shape(u)}")
        self._initialise(validate_args, loc=loc, log_d=log_d, u=u)
        self._s = torch.exp(-0.5 * log_d)
        self._w = self._s * u
        self._t = self._w.square().sum(-1)

    def _scale(self, noise):
        c = 1 / (1 + self._t + torch.sqrt(1 + self._t))
        along = (self._w * noise).sum(-1, keepdim=True)
        return self._s * (noise - c[..., None] * along * self._w)

    def _quadratic(self, delta):
        return (delta.square() * self.log_d.exp()).sum(-1) + (delta * self.u).sum(-1).square()

    def _log_det(self):
        return -self.log_d.sum(-1) - torch.log1p(self._t)

    @property
    def variance(self):
        others = _sum_of_others(self._w.square())  # 1 - w_i^2 / (1 + t) cancels where w_i dominates
        return self._s.square() * (1 + others) / (1 + self._t)[..., None]

    @property
    def covariance_matrix(self):
        p = self._s * self._w
        return torch.diag_embed(self._s.square()) - p[..., :, None] * p[..., None, :] / (1 + self._t)[..., None, None]

    def kl_to_standard(self):
        """KL(q || N(0, I)) in nats, [...]."""
        diagonal = (self.loc.square() + torch.expm1(-self.log_d) + self.log_d).sum(-1)
        removed = (self._s * self._w).square().sum(-1) / (1 + self._t)
        return 0.5 * (diagonal - removed + torch.log1p(self._t))


class LowRankPrecisionNormal(_Normal):
    """Normal whose precision is a diagonal plus a term of rank r, diag(d) + U U^T with d = exp(log_d).

    loc, log_d: [..., K]; U: [..., K, r]. With s = d^(-1/2), W = diag(s) U and the Cholesky factor L L^T = I + W^T W,
    a factor of the covariance is R = diag(s) (I - W L^-T (I + L)^-1 W^T): multiply out R R^T to see it. It needs no
    eigenvectors, whose gradients fail where eigenvalues coincide, and for r = 1 it is the rank-one factor.
    Cost O(K r^2 + r^3).
    """

    arg_constraints = {"loc": constraints.real_vector, "log_d": constraints.real_vector, "U": constraints.real}

    def __init__(self, loc, log_d, U, validate_args=None):
        _require(loc.shape == log_d.shape, f"log_d must have the shape of loc, {_shape(loc)}, got {_shape(log_d)}")
        _require(U.shape[:-1] == loc.shape, f"U must have shape {_shape(loc)} + [r], got {_shape(U)}")
        self._initialise(validate_args, loc=loc, log_d=log_d, U=U)
        self._s = torch.exp(-0.5 * log_d)
        self._W = self._s[..., None] * U
        eye = torch.eye(U.shape[-1], dtype=U.dtype, device=U.device)
        self._L = torch.linalg.cholesky(eye + self._W.mT @ self._W)
        self._I_plus_L = eye + self._L

    def _scale(self, noise):
        a = (self._W * noise[..., None]).sum(-2)[..., None]  # W^T noise, [..., r, 1]
        a = torch.linalg.solve_triangular(self._I_plus_L, a, upper=False)
        a = torch.linalg.solve_triangular(self._L.mT, a, upper=True)
        return self._s * (noise - (self._W @ a).squeeze(-1))

    def _quadratic(self, delta):
        return (delta.square() * self.log_d.exp()).sum(-1) + (self.U * delta[..., None]).sum(-2).square().sum(-1)

    def _log_det(self):
        return -self.log_d.sum(-1) - 2 * torch.diagonal(self._L, dim1=-2, dim2=-1).log().sum(-1)

    def _removed(self):
        """A matrix [..., r, K] with covariance = diag(1 / d) - A^T A."""
        return torch.linalg.solve_triangular(self._L, (self._s[..., None] * self._W).mT, upper=False)

    @property
    def variance(self):
        return self._s.square() - self._removed().square().sum(-2)

    @property
    def covariance_matrix(self):
        removed = self._removed()
        return torch.diag_embed(self._s.square()) - removed.mT @ removed

    def kl_to_standard(self):
        """KL(q || N(0, I)) in nats, [...]."""
        diagonal = (self.loc.square() + torch.expm1(-self.log_d)).sum(-1)
        return 0.5 * (diagonal - self._removed().square().sum((-2, -1)) - self._log_det())


class FullNormal(_Normal):
    """Normal with a full covariance, N(loc, L L^T) with L = scale_tril lower triangular, its diagonal positive.

    loc: [..., K]; scale_tril: [..., K, K]; entries above the diagonal must be zero.
    """

    arg_constraints = {"loc": constraints.real_vector, "scale_tril": constraints.lower_cholesky}

    def __init__(self, loc, scale_tril, validate_args=None):
        _require(scale_tril.shape == loc.shape + loc.shape[-1:],
                 f"scale_tril must have shape {_shape(loc) + _shape(loc)[-1:]}, got {_shape(scale_tril)}")
        self._initialise(validate_args, loc=loc, scale_tril=scale_tril)

    def _check_parameters(self):
        _require(bool((self._diagonal > 0).all()), "scale_tril must have a positive diagonal")
        _require(not bool(self.scale_tril.triu(1).any()), "scale_tril must be zero above its diagonal")

    @property
    def _diagonal(self):
        return torch.diagonal(self.scale_tril, dim1=-2, dim2=-1)

    def _scale(self, noise):
        return (self.scale_tril @ noise[..., None]).squeeze(-1)

    def _quadratic(self, delta):
        return torch.linalg.solve_triangular(self.scale_tril, delta[..., None], upper=False).square().sum((-2, -1))

    def _log_det(self):
        return 2 * self._diagonal.log().sum(-1)

    @property
    def variance(self):
        return self.scale_tril.square().sum(-1)

    @property
    def covariance_matrix(self):
        return self.scale_tril @ self.scale_tril.mT

    def kl_to_standard(self):
        """KL(q || N(0, I)) = 1/2 (|loc|^2 + |L|_F^2 - K - log |L L^T|) in nats, [...]."""
        squares = self.loc.square().sum(-1) + self.scale_tril.square().sum((-2, -1))
        return 0.5 * (squares - self.loc.shape[-1] - self._log_det())


def _log1mexp(y):
    """log(1 - exp(y)) for y < 0, to full relative precision at both ends."""
    near = y > -math.log(2)
    safe = torch.where(near, y, torch.full_like(y, -1.0))  # the branch not taken must not yield a NaN gradient
    other = torch.where(near, torch.full_like(y, -1.0), y)
    return torch.where(near, torch.log(-torch.expm1(safe)), torch.log1p(-torch.exp(other)))


def _log_prob_from_loglog(l):
    """log(1 - exp(-exp(l))): the logarithm of a probability from its complementary log-log. Tends to l as l -> -inf."""
    small = l < (-17 if l.dtype == torch.float32 else -37)
    return torch.where(small, l, _log1mexp(-torch.exp(torch.where(small, torch.zeros_like(l), l))))


def _loglog_from_log_prob(log_t):
    """log(-log(1 - exp(log_t))), the inverse of the function above. Tends to log_t as log_t -> -inf."""
    small = log_t < (-17 if log_t.dtype == torch.float32 else -37)
    return torch.where(small, log_t, torch.log(-_log1mexp(torch.where(small, torch.full_like(log_t, -1.0), log_t))))


class Kumaraswamy(_Reparameterised):
    """Independent Kumaraswamy variables on (0, 1), density a b v^(a-1) (1 - v^a)^(b-1) each.

    a, b: [..., K], positive. A draw is v = (1 - noise^(1/b))^(1/a), noise uniform (Nalisnick and Smyth 2017, eq. 6).
    Computed through log(-log v), where the power 1/a is a subtraction of log a: nothing rounds to 0 or 1 for a and b
    from 1e-6 to 1e6, also in float32. `rsample_log` gives log v and log(1 - v), which keep what v itself cannot hold.

    >>> Kumaraswamy(torch.tensor([2.0]), torch.tensor([1.0])).mean  # the density 2 v
    tensor([0.6667])
    """

    support = constraints.independent(constraints.unit_interval, 1)
    arg_constraints = {"a": constraints.positive, "b": constraints.positive}
    _draw = staticmethod(torch.rand)

    def __init__(self, a, b, validate_args=None):
        _require(a.shape == b.shape, f"b must have the shape of a, {_shape(a)}, got {_shape(b)}")
        self._initialise(validate_args, a=a, b=b)

    def _check_parameters(self):
        for name, value in (("a", self.a), ("b", self.b)):
            if not bool((value > 0).all()):
                raise ValueError(f"{name} must be positive, got a minimum of {value.min().item():g}")

    @property
    def _like(self):
        return self.a

    def rsample_log(self, sample_shape=(), *, noise=None, generator=None):
        """Draw (log v, log(1 - v)), each sample_shape + [..., K]; noise: uniform on (0, 1), of that shape."""
        noise = self._noise(sample_shape, noise, generator)
        limits = torch.finfo(noise.dtype)
        log_t = noise.clamp(limits.tiny, 1 - limits.eps / 2).log() / self.b  # t = 1 - v^a
        loglog = _loglog_from_log_prob(log_t) - self.a.log()  # log(-log v)
        return -loglog.exp(), _log_prob_from_loglog(loglog)

    def rsample(self, sample_shape=(), *, noise=None, generator=None):
        """Draw v, sample_shape + [..., K], rounded into the open interval; noise: uniform, of that shape."""
        limits = torch.finfo(self.a.dtype)
        log_v, _ = self.rsample_log(sample_shape, noise=noise, generator=generator)
        return log_v.exp().clamp(limits.tiny, 1 - limits.eps / 2)

    def log_prob(self, v):
        """Log-density in nats at v in (0, 1), summed over the last dimension: [..., K] -> [...]."""
        self._check_value(v)
        if self._validate_args and not bool(((v > 0) & (v < 1)).all()):
            raise ValueError("v must lie strictly between 0 and 1, "
                             f"got values from {v.min().item():g} to {v.max().item():g}")
        return self.log_prob_log(v.log(), torch.log1p(-v))

    def log_prob_log(self, log_v, log1m_v):
        """Log-density of v in nats from log v and log(1 - v), as `rsample_log` returns them: [..., K] -> [...]."""
        near_one = log_v > -math.log(2)
        half = torch.full_like(log_v, -math.log(2))
        loglog = torch.where(near_one, _loglog_from_log_prob(torch.where(near_one, log1m_v, half)),
                             torch.log(-torch.where(near_one, half, log_v)))
        log1m_va = _log_prob_from_loglog(loglog + self.a.log())  # log(1 - v^a)
        return (self.a.log() + self.b.log() + (self.a - 1) * log_v + (self.b - 1) * log1m_va).sum(-1)

    def _moment(self, n):
        a, b = self.a.double(), self.b.double()  # differences of log-gamma functions lose many digits
        return torch.exp(b.log() + torch.lgamma(1 + n / a) + torch.lgamma(b) - torch.lgamma(1 + n / a + b))

    @property
    def mean(self):
        return self._moment(1).to(self.a.dtype)

    @property
    def variance(self):
        return (self._moment(2) - self._moment(1).square()).to(self.a.dtype)

    def entropy(self):
        """Entropy in nats, sum of -log(a b) + (1 - 1/a) (psi(b + 1) - psi(1)) + 1 - 1/b: [...]."""
        a, b = self.a.double(), self.b.double()
        harmonic = torch.digamma(b + 1) - torch.digamma(torch.ones_like(b))
        return (-a.log() - b.log() + (1 - 1 / a) * harmonic + 1 - 1 / b).sum(-1).to(self.a.dtype)

    def kl_to_standard(self):
        """KL to the uniform law on (0, 1), which is the case a = b = 1: minus the entropy, in nats, [...]."""
        return -self.entropy()
