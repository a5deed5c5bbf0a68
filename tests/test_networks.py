"""Networks: their shapes, their forward pass by hand, how they start, what they refuse."""

import numpy as np
import pytest
import torch
from torch import nn

from dlgm_tutorial.checks import check_close, check_mc
from dlgm_tutorial.networks import (
    ACTIVATIONS,
    conv_decoder,
    conv_encoder,
    initialise,
    mlp,
    mlp_from_weights,
    weights_of,
)

S, B = 5, 3


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mlp_is_affine_relu_affine():
    net = initialise(mlp([2, 6, 4, 7], dtype=torch.float64), bias=1.0, generator=seeded())
    z = torch.randn(S, B, 2, generator=seeded(1), dtype=torch.float64)
    h = z.numpy()
    weights = weights_of(net)
    for W, b in weights[:-1]:
        h = np.maximum(h @ W.T + b, 0)
    W, b = weights[-1]
    check_close(net(z), h @ W.T + b, 1e-13)
    check_close(mlp_from_weights(weights)(z), net(z), 1e-15)
    assert [W.shape for W, _ in weights] == [(6, 2), (4, 6), (7, 4)]


@pytest.mark.parametrize("activation", [*ACTIVATIONS, nn.GELU])
def test_activations(activation):
    assert mlp([2, 5, 3], activation)(torch.zeros(B, 2)).shape == (B, 3)


@pytest.mark.parametrize("image_shape", [(1, 28, 28), (1, 8, 8), (3, 32, 32)])
@pytest.mark.parametrize("leading", [(), (B,), (S, B)])
def test_convolutional_nets_take_any_leading_dimensions(image_shape, leading):
    D = int(np.prod(image_shape))
    encoder, decoder = conv_encoder(image_shape, 11, (4, 6)), conv_decoder(2, image_shape, (6, 4))
    x = torch.randn(*leading, D, generator=seeded())
    assert encoder(x).shape == (*leading, 11) and decoder(torch.zeros(*leading, 2)).shape == (*leading, D)
    if leading == (S, B):
        check_close(encoder(x)[1, 2], encoder(x[1, 2]), 1e-5)


@pytest.mark.parametrize(("weight", "variance"), [("glorot", 2 / 700), ("he", 2 / 300), (0.05, 0.0025)])
def test_weights_start_with_the_stated_variance(weight, variance):
    layer = initialise(nn.Linear(300, 400), weight=weight, bias=0.5, generator=seeded())
    check_mc(layer.weight.flatten().square(), variance)
    check_mc(layer.bias.square(), 0.25)


def test_a_generator_makes_the_start_reproducible():
    first, second = (conv_decoder(2, (1, 8, 8), generator=seeded(3)) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert not mlp([2, 3])[0].bias.any()


@pytest.mark.parametrize(("call", "message"), [
    (lambda: mlp([3]), r"sizes must be at least two positive integers, got \[3\]"),
    (lambda: mlp([3, 0, 2]), "sizes must be at least two positive integers"),
    (lambda: mlp([3, 2], "rely"), "activation must be a class or one of .*, got 'rely'"),
    (lambda: conv_encoder((1, 10, 10), 3), "image_shape must have a height and width that 2 halvings divide, got"),
    (lambda: initialise(mlp([3, 2]), weight="xavier"), "weight must be 'glorot', 'he' or a standard deviation, got 'xavier'"),
])
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
