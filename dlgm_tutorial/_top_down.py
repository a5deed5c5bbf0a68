"""Top-down generators with several layers of latents, in noise coordinates (chapter 6); see `short_run_mcmc`."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from dlgm_tutorial.networks import ACTIVATIONS, initialise, mlp, weights_of

LOG_2PI = math.log(2 * math.pi)
MIN_SCALE = 1e-3  # of a layer's conditional standard deviation
HIERARCHIES = ("conditional", "architectural")
OUTPUTS = {"identity": lambda h: h, "sigmoid": torch.sigmoid, "tanh": torch.tanh}


def choice(name, value, known):
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


class _Block(nn.Module):
    """Features of one layer from its latents z [N, K] and the features of the layer above [N, H] (or None)."""

    def __init__(self, net, activation=None, skip=False):
        super().__init__()
        self.net, self.activation, self.skip = net, activation, skip

    def forward(self, z, above):
        if above is not None and not self.skip:
            z = torch.cat([z, above], -1)
        h = z if self.net is None else self.net(z)
        return h if self.activation is None else self.activation(h)


class _ConvBlock(nn.Module):
    """Feature maps [N, C, s, s]: the projected latents, added to the maps from above after a residual block.

    The maps from above are doubled in size first where this layer's are twice as large.
    """

    def __init__(self, num_latents, channels, size, activation, width=4):
        super().__init__()
        act = ACTIVATIONS[activation]
        self.size = size
        self.project = nn.Sequential(nn.Linear(num_latents, width * size * size), act(),
                                     nn.Unflatten(-1, (width, size, size)), nn.Conv2d(width, channels, 3, padding=1))
        self.residual = nn.Sequential(act(), nn.Conv2d(channels, channels, 3, padding=1), act(),
                                      nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, z, above):
        h = self.project(z)
        if above is not None:
            h = h + (above if above.shape[-1] == self.size else F.interpolate(above, scale_factor=2))
        return h + self.residual(h)


class MultiLayerGenerator(nn.Module):
    """A top-down model with L layers of Gaussian latents and a Gaussian likelihood of fixed variance.

    All chance sits in standard normal noises e_l. With hierarchy "conditional",

        z_L = e_L,    z_l = loc_l(h_{l+1}) + scale_l(h_{l+1}) e_l,    x ~ N(g(h_1), noise_var I),

    and h_l = z_l (MLPs) or feature maps that gather z_L, ..., z_l (convolutional, `MultiLayerGenerator.convolutional`).
    With "architectural" the latents are independent, z_l = e_l, and enter one decoder at different depths:
    h_l = net_l([z_l, h_{l+1}]).

    data_dim: D. latent_dims: (K_1, ..., K_L), layer 1 nearest the data, or one integer. hidden_dims: for each layer the
    hidden widths of the network below it, an integer or a tuple ((200, 200), (50,)); one integer serves all layers.
    noise_var: a positive number; activation: of `networks`; output: "identity", "sigmoid" (data in [0, 1]) or "tanh".
    decoder: a module [..., K] -> [..., D], used as it is (one layer; latent_dims is needed unless it starts with a
    Linear), and not trained with freeze_decoder=True. Scales are softplus + 0.001.
    Raises ValueError for sizes that do not fit or unknown names. Source: paper, section 3; the released program lets
    no conditional standard deviation fall below 1.

    >>> generator = MultiLayerGenerator(6, (3, 2), 8, noise_var=0.1)
    >>> generator.log_joint(torch.zeros(4, 6), torch.zeros(5, 4, 5)).shape
    torch.Size([5, 4])
    """

    def __init__(self, data_dim=None, latent_dims=None, hidden_dims=(), *, noise_var, hierarchy="conditional",
                 activation="leaky_relu", output="identity", decoder=None, freeze_decoder=False):
        super().__init__()
        if decoder is not None and latent_dims is None:
            first = next((m for m in decoder.modules() if isinstance(m, nn.Linear)), None)
            if first is None:
                raise ValueError("latent_dims must be given with a decoder that has no Linear layer to read it from")
            latent_dims = first.in_features
        self._settle(latent_dims, noise_var, hierarchy, output)
        if decoder is not None:
            if self.num_layers > 1:
                raise ValueError(f"decoder is a model with one layer; latent_dims has {self.num_layers}")
            self.blocks, self.heads = nn.ModuleList([_Block(None)]), nn.ModuleList()
            self.readout = decoder.requires_grad_(not freeze_decoder)
            with torch.no_grad():
                like = next(decoder.parameters(), torch.zeros(()))
                got = decoder(torch.zeros(1, self.num_latents, dtype=like.dtype, device=like.device)).shape[-1]
            if data_dim not in (None, got):
                raise ValueError(f"data_dim is {data_dim}, but decoder gives {got} numbers")
            self.data_dim = got
            return
        if not isinstance(data_dim, int) or data_dim < 1:
            raise ValueError(f"data_dim must be a positive integer, got {data_dim!r}")
        self.data_dim = data_dim
        hidden = (hidden_dims,) * self.num_layers if isinstance(hidden_dims, int) else tuple(hidden_dims)
        hidden = tuple((h,) if isinstance(h, int) else tuple(h) for h in hidden)
        if len(hidden) != self.num_layers:
            raise ValueError(f"hidden_dims must have one entry per layer: {self.num_layers} latent_dims, "
                             f"{len(hidden)} hidden_dims")
        dims = self.latent_dims
        if hierarchy == "conditional":
            self.blocks = nn.ModuleList([_Block(None, skip=True) for _ in dims])
            self.heads = nn.ModuleList([mlp([dims[i + 1], *hidden[i + 1], 2 * dims[i]], activation)
                                        for i in range(self.num_layers - 1)])
            self.readout = mlp([dims[0], *hidden[0], data_dim], activation)
        else:
            if any(not h for h in hidden):
                raise ValueError("hidden_dims of an architectural hierarchy must name each layer's width, "
                                 f"got {hidden}")
            above = [h[-1] for h in hidden[1:]] + [0]
            act = ACTIVATIONS[activation]
            self.blocks = nn.ModuleList([_Block(mlp([size + extra, *h], activation), act())
                                         for size, extra, h in zip(dims, above, hidden, strict=True)])
            self.heads = nn.ModuleList()
            self.readout = mlp([hidden[0][-1], data_dim], activation)

    def _settle(self, latent_dims, noise_var, hierarchy, output):
        self.latent_dims = (latent_dims,) if isinstance(latent_dims, int) else tuple(latent_dims)
        if not self.latent_dims or any(not isinstance(k, int) or k < 1 for k in self.latent_dims):
            raise ValueError(f"latent_dims must be one or more positive integers, got {latent_dims!r}")
        self.num_layers, self.num_latents = len(self.latent_dims), sum(self.latent_dims)
        if not (isinstance(noise_var, (int, float)) and 0 < noise_var < math.inf):
            raise ValueError(f"noise_var must be a positive number, got {noise_var!r}")
        self.noise_var = float(noise_var)
        self.hierarchy, self.output = choice("hierarchy", hierarchy, HIERARCHIES), choice("output", output, OUTPUTS)

    @classmethod
    def convolutional(cls, image_shape, latent_dims, channels=32, *, noise_var, sizes=None, hierarchy="conditional",
                      activation="silu", output="sigmoid", generator=None):
        """Build the convolutional top-down model: per layer a projection of the latents and a residual block.

        image_shape: (channels, height, width), square; latent_dims: (K_1, ..., K_L); channels: of the feature maps,
        one number for all layers; sizes: their side at each layer, layer 1 first, each the same as or half of the one
        below it (default: half the image's side, halved once more for the upper half of the layers, where it is
        even); the readout doubles the last one to the image's. Other arguments as for the class; generator: of the
        initial weights. After the released program (section 5.1 of its five-layer model), smaller: the conditional
        location and scale are read from maps averaged over 2 x 2 blocks of places.
        """
        self = cls.__new__(cls)
        nn.Module.__init__(self)
        self._settle(latent_dims, noise_var, hierarchy, output)
        num_planes, height, width = image_shape
        if height != width or height % 2:
            raise ValueError(f"image_shape must be square with an even side, got {tuple(image_shape)}")
        side = height // 2
        if sizes is None:
            upper = side // 2 if side % 2 == 0 else side
            low = (self.num_layers + 1) // 2
            sizes = (side,) * low + (upper,) * (self.num_layers - low)
        sizes = tuple(sizes)
        if len(sizes) != self.num_layers or sizes[0] * 2 != height or any(
                small not in (large, large / 2) for large, small in zip(sizes, sizes[1:], strict=False)):
            raise ValueError(f"sizes must start at {side} and each be the one before or half of it, "
                             f"{self.num_layers} in all, got {sizes}")
        self.data_dim, self.image_shape = num_planes * height * width, tuple(image_shape)
        act = ACTIVATIONS[activation]
        self.blocks = nn.ModuleList([_ConvBlock(k, channels, size, activation)
                                     for k, size in zip(self.latent_dims, sizes, strict=True)])
        self.heads = nn.ModuleList([] if hierarchy == "architectural" else [
            nn.Sequential(act(), nn.Conv2d(channels, 8, 3, padding=1), act(), nn.AdaptiveAvgPool2d(max(1, size // 2)),
                          nn.Flatten(), nn.Linear(8 * max(1, size // 2) ** 2, 2 * k))
            for k, size in zip(self.latent_dims[:-1], sizes[1:], strict=True)])
        self.readout = nn.Sequential(act(), nn.ConvTranspose2d(channels, num_planes, 4, stride=2, padding=1),
                                     nn.Flatten())
        initialise(self, generator=generator)
        return self

    # ---- coordinates
    def split(self, z):
        """Flat latents [..., K] as a tuple, layer 1 first; a tuple stays one."""
        got = [part.shape[-1] for part in z] if isinstance(z, (tuple, list)) else z.shape[-1]
        if got not in (list(self.latent_dims), self.num_latents):
            raise ValueError(f"z must have the layer sizes {self.latent_dims}, flat or as a tuple, got {got}")
        return tuple(z) if isinstance(z, (tuple, list)) else z.split(self.latent_dims, -1)

    def concat(self, z):
        """A tuple of layers as one flat array [..., K], layer 1 first; a flat array stays one."""
        return torch.cat(tuple(z), -1) if isinstance(z, (tuple, list)) else z

    def _descend(self, parts, given=None):
        """From the top down: states z_l, their laws (loc_l, scale_l), and the mean of x.

        A law is None at the top and where the latents are independent: standard normal.

        parts: noises [N, K_l], or, with given="state", the states themselves.
        """
        states, laws, features = [], [], None
        for layer in reversed(range(self.num_layers)):
            z, law = parts[layer], None
            if features is not None and len(self.heads):
                loc, raw = self.heads[layer](features).chunk(2, -1)
                scale = MIN_SCALE + F.softplus(raw)
                law = (loc, scale)
                z = z if given == "state" else loc + scale * z
            states.insert(0, z)
            laws.insert(0, law)
            features = self.blocks[layer](z, features)
        return states, laws, OUTPUTS[self.output](self.readout(features))

    def _flat(self, z):
        """The parts of z as [N, K_l] each, and the leading shape."""
        parts = self.split(z)
        return [part.reshape(-1, part.shape[-1]) for part in parts], parts[0].shape[:-1]

    def states(self, z):
        """The states z_l of the noises z [..., K] (flat or a tuple): a tuple of [..., K_l], layer 1 first."""
        parts, lead = self._flat(z)
        return tuple(state.reshape(*lead, -1) for state in self._descend(parts)[0])

    def noises(self, states):
        """The noises behind the states (flat or a tuple), e_l = (z_l - loc_l) / scale_l: a tuple of [..., K_l]."""
        parts, lead = self._flat(states)
        found = self._descend(parts, "state")[1]
        return tuple((part if pair is None else (part - pair[0]) / pair[1]).reshape(*lead, -1)
                     for part, pair in zip(parts, found, strict=True))

    def mean(self, z):
        """E[x | z]: [..., D] from the noises z [..., K], flat or a tuple."""
        parts, lead = self._flat(z)
        return self._descend(parts)[2].reshape(*lead, -1)

    forward = mean

    # ---- densities
    def _check_x(self, x):
        if x.ndim < 1 or x.shape[-1] != self.data_dim:
            raise ValueError(f"x must have shape [B, {self.data_dim}], got {list(x.shape)}")
        return x

    def log_likelihood_given(self, x, mean, *, observed=None):
        """log N(x; mean, noise_var I) in nats, summed over the data dimension, over the observed entries of a mask.

        x [B, D] and mean [..., B, D] -> [..., B]; observed: bool [B, D] or [D], others of x may be NaN.
        """
        if observed is None:
            num = self.data_dim
            squares = (x - mean).square().sum(-1)
        else:
            observed = observed.expand(x.shape)
            num = observed.sum(-1).to(mean.dtype)
            squares = torch.where(observed, x - mean, torch.zeros_like(mean)).square().sum(-1)
        return -0.5 * (squares / self.noise_var + num * (math.log(self.noise_var) + LOG_2PI))

    def log_joint(self, x, z, *, coordinates="noise", observed=None):
        """log p(x, z) in nats: [S, B] from x [B, D] and z [S, B, K], flat or a tuple of layers.

        coordinates "noise": z holds the noises, log p = sum_l log N(e_l; 0, I) + log p(x | z), no scale anywhere
        (eq-sr-noise-joint);
        "state": z holds the states, sum_l log N(z_l; loc_l, scale_l^2) + log p(x | z) (eq-sr-state-joint), lower by
        the log-scales that
        turn one density into the other. observed: as in `log_likelihood_given`, of p(x_observed, z).
        """
        choice("coordinates", coordinates, ("noise", "state"))
        parts, lead = self._flat(z)
        _, found, mean = self._descend(parts, coordinates)
        volume = 0.0
        if coordinates == "state":
            volume = sum(pair[1].log().sum(-1) for pair in found if pair is not None)
            parts = [part if pair is None else (part - pair[0]) / pair[1]
                     for part, pair in zip(parts, found, strict=True)]
        prior = sum(-0.5 * (part.square().sum(-1) + part.shape[-1] * LOG_2PI) for part in parts) - volume
        likelihood = self.log_likelihood_given(self._check_x(x), mean.reshape(*lead, -1), observed=observed)
        return likelihood + prior.reshape(lead)

    def score(self, x, z, *, coordinates="noise", observed=None):
        """Gradient of log p(x, z) in z, which is that of log p(z | x) (eq-sr-score): [S, B, K], from one pass
        through the decoder.

        For noises it is J^T (x - mean) / noise_var - z, J the Jacobian of the mean: one product with J^T, no density
        needed. Rows are independent, so all chains go through one call. Weights get no gradient. Arguments as in
        `log_joint`, z flat. Raises ValueError for batch normalisation in training mode, which would couple the rows.
        """
        choice("coordinates", coordinates, ("noise", "state"))
        if any(m.training for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)):
            raise ValueError("decoder has batch normalisation in training mode, which couples the chains of a batch: "
                             "call eval() on it, or normalise within one example")
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            if coordinates == "state":
                value = self.log_joint(x, z, coordinates=coordinates, observed=observed).sum()
                return torch.autograd.grad(value, z)[0]
            mean = self.mean(z)
            residual = (self._check_x(x) - mean.detach()) / self.noise_var
            if observed is not None:
                residual = torch.where(observed, residual, torch.zeros_like(residual))
            return torch.autograd.grad(mean, z, residual)[0] - z.detach()

    def as_arrays(self):
        """The weights as `scratch` takes them, {"heads", "blocks", "readout"}: lists of [(W [out, in], b [out]), ...].

        heads[i] gives location and raw scale of layer i + 1; blocks are empty for a conditional hierarchy. MLPs only.
        """
        if hasattr(self, "image_shape"):
            raise ValueError("as_arrays is for generators made of MLPs, this one is convolutional")
        return {"heads": [weights_of(net) for net in self.heads],
                "blocks": [[] if block.net is None else weights_of(block.net) for block in self.blocks],
                "readout": weights_of(self.readout)}

    # ---- draws
    def sample_latents(self, num, *, generator=None):
        """Draw num noises from the prior, flat: [num, K]."""
        like = next(self.parameters(), torch.zeros(()))
        device = like.device if generator is None else generator.device
        return torch.randn(num, self.num_latents, generator=generator, dtype=like.dtype, device=device).to(like.device)

    def sample(self, num, *, generator=None):
        """Draw data from the model: [num, D]."""
        with torch.no_grad():
            mean = self.mean(self.sample_latents(num, generator=generator))
            device = mean.device if generator is None else generator.device
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=device).to(mean.device)
            return mean + math.sqrt(self.noise_var) * noise
