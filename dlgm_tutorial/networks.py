"""The networks of the book: multilayer perceptrons and small convolutional nets, and how their weights start."""

import math

import torch
from torch import nn

__all__ = ["ACTIVATIONS", "conv_decoder", "conv_encoder", "initialise", "mlp", "mlp_from_weights", "weights_of"]

ACTIVATIONS = {"relu": nn.ReLU, "leaky_relu": nn.LeakyReLU, "tanh": nn.Tanh, "softplus": nn.Softplus, "elu": nn.ELU,
               "silu": nn.SiLU, "identity": nn.Identity}


def _activation(activation):
    if callable(activation):
        return activation()
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be a class or one of {sorted(ACTIVATIONS)}, got {activation!r}")
    return ACTIVATIONS[activation]()


def mlp(sizes, activation="relu", *, generator=None, device=None, dtype=None):
    """Build Linear, activation, Linear, ..., Linear as an nn.Sequential; the last layer has no activation.

    sizes: widths from input to output, [..., sizes[0]] -> [..., sizes[-1]]; activation: a name in ACTIVATIONS or a
    class. Weights are drawn by `initialise` from generator; device and dtype as for nn.Linear.

    >>> mlp([2, 5, 3])(torch.zeros(4, 7, 2)).shape
    torch.Size([4, 7, 3])
    """
    sizes = list(sizes)
    if len(sizes) < 2 or any(int(n) != n or n < 1 for n in sizes):
        raise ValueError(f"sizes must be at least two positive integers, got {sizes}")
    layers = []
    for num_in, num_out in zip(sizes[:-1], sizes[1:], strict=True):
        layers += [nn.Linear(num_in, num_out, device=device, dtype=dtype), _activation(activation)]
    return initialise(nn.Sequential(*layers[:-1]), generator=generator)


def initialise(module, *, weight="glorot", bias=0.0, generator=None):
    """Draw the weights of every linear and convolutional layer of module in place, and return module.

    weight: "glorot" (normal, variance 2 / (inputs + outputs)), "he" (2 / inputs), or a standard deviation;
    bias: standard deviation of the biases [out], 0 for zeros; generator: of the draws.
    """
    if not isinstance(weight, (int, float)) and weight not in ("glorot", "he"):
        raise ValueError(f"weight must be 'glorot', 'he' or a standard deviation, got {weight!r}")
    with torch.no_grad():
        for layer in module.modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
                continue
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(layer.weight)
            if isinstance(layer, nn.ConvTranspose2d):
                fan_in, fan_out = fan_out, fan_in
            scale = {"glorot": math.sqrt(2 / (fan_in + fan_out)), "he": math.sqrt(2 / fan_in)}.get(weight, weight)
            layer.weight.normal_(0, scale, generator=generator)
            if layer.bias is not None:
                layer.bias.normal_(0, bias, generator=generator) if bias else layer.bias.zero_()
    return module


class _OverLeadingDimensions(nn.Module):
    """Apply a net that knows one batch dimension to an input [..., num_in] with any number of them."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def _sizes(image_shape, channels):
    num_channels, height, width = image_shape
    shrink = 2 ** len(channels)
    if height % shrink or width % shrink:
        raise ValueError(f"image_shape must have a height and width that {len(channels)} halvings divide, "
                         f"got {tuple(image_shape)}")
    return num_channels, height // shrink, width // shrink


def conv_encoder(image_shape, num_outputs, channels=(32, 64), activation="relu", *, generator=None):
    """Build a convolutional net from flat images to features; each of its stages halves height and width.

    [..., D] -> [..., num_outputs] with D the product of image_shape = (channels, height, width); channels: of each
    stage; activation, generator: as in `mlp`.
    """
    num_channels, height, width = _sizes(image_shape, channels)
    layers = [nn.Unflatten(-1, tuple(image_shape))]
    for num_in, num_out in zip((num_channels, *channels[:-1]), channels, strict=True):
        layers += [nn.Conv2d(num_in, num_out, 4, stride=2, padding=1), _activation(activation)]
    layers += [nn.Flatten(), nn.Linear(channels[-1] * height * width, num_outputs)]
    return initialise(_OverLeadingDimensions(nn.Sequential(*layers)), generator=generator)


def conv_decoder(num_inputs, image_shape, channels=(64, 32), activation="relu", *, generator=None):
    """Build a convolutional net from features to flat images; each of its stages doubles height and width.

    [..., num_inputs] -> [..., D] with D the product of image_shape = (channels, height, width); channels: of each
    stage; activation, generator: as in `mlp`.
    """
    num_channels, height, width = _sizes(image_shape, channels)
    layers = [nn.Linear(num_inputs, channels[0] * height * width), nn.Unflatten(-1, (channels[0], height, width))]
    for num_in, num_out in zip(channels, (*channels[1:], num_channels), strict=True):
        layers += [_activation(activation), nn.ConvTranspose2d(num_in, num_out, 4, stride=2, padding=1)]
    layers.append(nn.Flatten())
    return initialise(_OverLeadingDimensions(nn.Sequential(*layers)), generator=generator)


def weights_of(net):
    """Return the linear layers of net, an nn.Sequential, as NumPy pairs [(W [out, in], b [out]), ...]."""
    return [(layer.weight.detach().cpu().numpy().copy(), layer.bias.detach().cpu().numpy().copy())
            for layer in net if isinstance(layer, nn.Linear)]


def mlp_from_weights(weights, activation="relu", *, device=None, dtype=None):
    """Build the nn.Sequential of `mlp` from weights = [(W [out, in], b [out]), ...]: the way back from `weights_of`.

    activation, device, dtype: as in `mlp`; the dtype is that of the weights where none is given.
    """
    sizes = [weights[0][0].shape[1], *(W.shape[0] for W, _ in weights)]
    weights = [(torch.as_tensor(W), torch.as_tensor(b)) for W, b in weights]
    net = mlp(sizes, activation, device=device, dtype=dtype or weights[0][0].dtype)
    with torch.no_grad():
        for layer, (W, b) in zip([m for m in net if isinstance(m, nn.Linear)], weights, strict=True):
            layer.weight.copy_(W)
            layer.bias.copy_(b)
    return net
