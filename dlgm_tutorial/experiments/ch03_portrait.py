"""Chapter 3: what a recognition network with a mixture makes of the cast's four points."""

import torch

from dlgm_tutorial import cast
from dlgm_tutorial.evaluation import quasi_normal
from dlgm_tutorial.mixture_latents import MixtureDLGM, MixtureNormal
from dlgm_tutorial.reproduce import experiment
from dlgm_tutorial.training import fit

__all__ = ["NUM_COMPONENTS", "best_mixture", "mixture_elbo", "portrait_model"]

NUM_COMPONENTS = 3


def portrait_model(member):
    """The chapter's recognition network for a member of the cast: three components, its decoder fixed."""
    return MixtureDLGM(member.x.shape[1], member.num_latents, NUM_COMPONENTS, hidden_dims=(64, 64), kind="mixture",
                       likelihood="gaussian", noise_var=member.noise_var, decoder=member.decoder,
                       freeze_decoder=True).double()


def mixture_elbo(log_joint, q, noise):
    """E_q[log p(x, z) - log q(z)] of a MixtureNormal [B, C, K], the sum over its components: [B].

    log_joint: maps z [S, B, K] to [S, B]; noise: standard normal points [S, K], the same for every component.
    """
    terms = []
    for k in range(q.loc.shape[-2]):
        z = q.loc[:, k] + q.log_scale[:, k].exp() * noise[:, None]
        terms.append((log_joint(z) - q.log_prob(z)).mean(0))
    return (q.log_weights.exp() * torch.stack(terms, -1)).sum(-1)


def best_mixture(log_joint, starts, *, num_points=1024, num_steps=400, lr=0.1):
    """The largest bound found in the family, datum by datum: Adam from each of the starts -> (mixture, bound [B]).

    The answer is at least as good as every start, judged on the same points.
    """
    noise = quasi_normal(num_points, starts[0].loc.shape[-1])
    best, kept = None, None
    for start in starts:
        free = [part.detach().clone().requires_grad_() for part in (start.log_weights, start.loc, start.log_scale)]
        optimizer = torch.optim.Adam(free, lr)
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 1e-2 ** (1 / num_steps))
        for _ in range(num_steps + 1):
            q = MixtureNormal(torch.log_softmax(free[0], -1), *free[1:])
            value = mixture_elbo(log_joint, q, noise)
            now = [q.log_weights.detach(), *(part.detach().clone() for part in free[1:])]
            if best is None:
                best, kept = value.detach(), now
            better = value.detach() > best
            best = torch.where(better, value.detach(), best)
            pick = lambda new, old, better=better: torch.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
            kept = list(map(pick, now, kept))
            optimizer.zero_grad()
            (-value.sum()).backward()
            optimizer.step()
            schedule.step()
    return MixtureNormal(*kept), best


def spread_start(member):
    """Components at quantiles of the exact posterior's first axis: a start that sees all of its modes."""
    grid = member.posterior_grid()
    points, mass = grid.points.expand(-1, 4, -1), grid.log_prob.exp() * grid.volume
    loc = []
    for i in range(4):
        order = points[:, i, 0].argsort()
        below = torch.cumsum(mass[order, i], 0)
        loc.append(torch.stack([points[order[int((below < share).sum())], i] for share in (0.1, 0.5, 0.9)]))
    loc = torch.stack(loc)
    scale = torch.diagonal(grid.covariance, dim1=-2, dim2=-1).sqrt()[:, None].expand_as(loc)
    return MixtureNormal(torch.full((4, NUM_COMPONENTS), 1 / NUM_COMPONENTS).double().log(), loc, (scale / 3).log())


@experiment("03", "portrait", paper="Nalisnick, Hertel and Smyth 2016", table="true against approximate posterior",
            hours=0.1, steps=3000)
def portrait(run):
    """Recognition networks with three components for the cast's fixed decoders: bounds and gaps."""
    figures, arrays = {}, {}
    for name in ("line", "wave", "digits2"):
        member = cast.load(name)
        torch.manual_seed(run.seed)
        model = portrait_model(member)
        # The stranger is far from anything that the model draws: there the network extrapolates.
        data = model.sample(20_000, generator=torch.Generator().manual_seed(run.seed))
        options = run.fit_options(name)
        steps = options["num_steps"]
        fit(model, data, batch_size=200, lr=lambda step, steps=steps: 2e-3 if step < 0.7 * steps else 2e-4,
            num_samples=4, **options)
        parts = {key: value.half() for key, value in model.state_dict().items()
                 if key.startswith(("encoder", "components", "mixing.head"))}
        model.load_state_dict({key: value.double() for key, value in parts.items()}, strict=False)  # as it ships
        log_joint = lambda z, member=member: member.log_joint(member.x, z)
        with torch.no_grad():
            q = model.posterior(member.x)
            bound = mixture_elbo(log_joint, q, quasi_normal(1024, member.num_latents))
        _, best = best_mixture(log_joint, [q, spread_start(member)])
        figures[name] = {"bound": bound.tolist(), "approximation": (member.log_evidence - best).tolist(),
                         "amortization": (best - bound).tolist()}
        arrays |= {f"{name}/{key}": value for key, value in parts.items()}
    return figures, arrays
