"""Notebook 09: batch normalisation against PyTorch's, its gradient against finite differences, and what the experiments compute."""

import copy
import itertools
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

SHAPES = [(8, 3), (4, 3, 7), (4, 3, 5, 6), (2, 5, 1, 1), (3, 2, 2, 3, 4)]


def affine_of(channels, dtype=torch.float64):
    return (torch.randn(channels, dtype=dtype, requires_grad=True) for _ in range(2))


@pytest.fixture
def pictures():
    """Random bytes in which the label is the brighter half of the picture."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(100, (300, 3, 16, 16), generator=generator, dtype=torch.uint8)
    labels = torch.randint(2, (300,), generator=generator)
    images[labels == 1, :, :8] += 100
    images[labels == 0, :, 8:] += 100
    return {"train": [images, labels], "judge": [images[:100], labels[:100]]}


@pytest.fixture
def small(nb09):
    return replace(nb09.Config(), widths=(4, 4, 4))


# --- the formulas


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_equals_torch(nb09, shape):
    torch.manual_seed(0)
    x, (gamma, beta) = 5 + 3 * torch.randn(shape, dtype=torch.float64), affine_of(shape[1])
    y, mean, var = nb09.batch_norm(x, gamma, beta, eps=1e-3)
    torch.testing.assert_close(y, F.batch_norm(x, None, None, gamma, beta, training=True, eps=1e-3))
    axes = [n for n in range(len(shape)) if n != 1]
    np.testing.assert_allclose(mean, x.numpy().mean(tuple(axes)))
    np.testing.assert_allclose(var, x.numpy().var(tuple(axes)))
    torch.testing.assert_close(nb09.batch_norm(x, None, None)[0], F.batch_norm(x, None, None, training=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_three_gradients_equal_torch(nb09, shape):
    torch.manual_seed(1)
    x, (gamma, beta) = torch.randn(shape, dtype=torch.float64, requires_grad=True), affine_of(shape[1])
    dy = torch.randn(shape, dtype=torch.float64)
    expected = torch.autograd.grad(F.batch_norm(x, None, None, gamma, beta, training=True), (x, gamma, beta), dy)
    _, mean, var = nb09.batch_norm(x.detach(), gamma.detach(), beta.detach())
    found = nb09.batch_norm_backward(dy, x.detach(), gamma.detach(), mean, var)
    through_function = torch.autograd.grad(nb09.Normalise.apply(x, gamma, beta, 1e-5)[0], (x, gamma, beta), dy)
    for one, other, third in zip(found, expected, through_function, strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(third, other, atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("shape", [(5, 3), (3, 2, 2, 3)])
@pytest.mark.parametrize("affine", [True, False])
def test_gradcheck(nb09, shape, affine):
    torch.manual_seed(2)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    gamma, beta = affine_of(shape[1]) if affine else (None, None)
    assert torch.autograd.gradcheck(lambda *inputs: nb09.Normalise.apply(*inputs)[0], (x, gamma, beta, 1e-5))


def test_the_gradients_of_no_affine_are_none(nb09):
    x = torch.randn(4, 3)
    _, mean, var = nb09.batch_norm(x, None, None)
    assert nb09.batch_norm_backward(torch.randn(4, 3), x, None, mean, var)[1:] == (None, None)


def test_a_second_derivative_is_refused(nb09):
    x = torch.randn(4, 3, requires_grad=True)
    for function in (nb09.Normalise, nb09.NormaliseByConstants):
        with pytest.raises(NotImplementedError, match="not written out"):
            torch.autograd.grad(function.apply(x, None, None, 1e-5)[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("affine", [True, False])
def test_constants_equal_detached_statistics(nb09, affine):
    torch.manual_seed(3)
    x = torch.randn(6, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    gamma, beta = affine_of(3) if affine else (None, None)
    mean, var = x.detach().mean((0, 2, 3), keepdim=True), x.detach().var((0, 2, 3), correction=0, keepdim=True)
    expected = (x - mean) / torch.sqrt(var + 1e-5)
    inputs = [x]
    if affine:
        expected, inputs = expected * gamma.view(1, 3, 1, 1) + beta.view(1, 3, 1, 1), [x, gamma, beta]
    dy = torch.randn_like(x)
    y = nb09.NormaliseByConstants.apply(x, gamma, beta, 1e-5)[0]
    torch.testing.assert_close(y, expected)
    for one, other in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(expected, inputs, dy), strict=True):
        torch.testing.assert_close(one, other)


def test_channels_last_and_half_precision(nb09):
    torch.manual_seed(4)
    x, layer = torch.randn(4, 8, 6, 6), nb09.BatchNorm(8)
    expected = layer(x)
    torch.testing.assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected)
    for dtype in (torch.half, torch.bfloat16):
        y, mean, var = nb09.batch_norm(100 * x.to(dtype), torch.ones(8), torch.zeros(8))
        assert (y.dtype, mean.dtype, var.dtype) == (dtype, torch.float32, torch.float32)
        torch.testing.assert_close(
            y.float(), nb09.batch_norm(100 * x.to(dtype).float(), torch.ones(8), torch.zeros(8))[0], atol=2e-2, rtol=1e-2
        )
        dx, *_ = nb09.batch_norm_backward(y, x.to(dtype), torch.ones(8), mean, var)
        assert dx.dtype == dtype


def test_a_large_mean_does_not_swallow_the_variance(nb09):
    x = 10_000 + torch.randn(512, 4)
    expected = nb09.batch_norm(x.double(), None, None)[0]
    assert (nb09.batch_norm(x, None, None)[0] - expected).abs().max() < 5e-3


# --- the layer


@pytest.mark.parametrize("momentum", [0.1, 0.0, 1.0, None])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 6, 5)])
def test_layer_equals_torch(nb09, momentum, affine, shape):
    """Outputs and gradients while it learns, buffers after every step, and evaluation."""
    torch.manual_seed(5)
    peer = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(3, eps=1e-4, momentum=momentum, affine=affine)
    ours = nb09.BatchNorm(3, eps=1e-4, momentum=momentum, affine=affine)
    if affine:
        nn.init.normal_(peer.weight)
        nn.init.normal_(peer.bias)
    ours.load_state_dict(peer.state_dict())
    for _ in range(4):
        x = (2 + 3 * torch.randn(shape)).requires_grad_()
        dy = torch.randn(shape)
        found, expected = ours(x), peer(x)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        gradients = [torch.autograd.grad(y, [x, *layer.parameters()], dy) for y, layer in ((found, ours), (expected, peer))]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
        for name, value in peer.state_dict().items():
            torch.testing.assert_close(ours.state_dict()[name], value, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(ours.eval()(x), peer.eval()(x), atol=1e-5, rtol=1e-5)
    peer.load_state_dict(ours.state_dict())
    assert set(peer.state_dict()) == set(ours.state_dict())


def test_one_value_per_channel(nb09):
    layer = nb09.BatchNorm(3)
    for shape in ((1, 3), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="one value per channel") as error:
            layer(torch.randn(shape))
        assert "eval()" in str(error.value)
    assert layer.eval()(torch.randn(1, 3)).shape == (1, 3)


@pytest.mark.parametrize("shape", [(4, 2), (3,), (4, 5, 3, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_wrong_channels(nb09, shape, training):
    with pytest.raises(ValueError, match=r"a batch \(N, 3, ...\) is wanted"):
        nb09.BatchNorm(3).train(training)(torch.randn(shape))


@pytest.mark.parametrize("eps", [0, -1e-5, math.nan])
def test_eps_has_to_be_positive(nb09, eps):
    with pytest.raises(ValueError, match="has to be positive"):
        nb09.batch_norm(torch.randn(4, 3), None, None, eps)
    with pytest.raises(ValueError, match="has to be positive"):
        nb09.BatchNorm(3, eps=eps).eval()(torch.randn(4, 3))


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_no_number_poisons_the_running_estimates(nb09, poison):
    layer, x = nb09.BatchNorm(3), torch.randn(4, 3)
    layer(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    bad = x.clone()
    bad[1, 2] = poison
    assert not torch.isfinite(layer(bad)).all()  # the batch itself is not hidden
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name
    with pytest.warns(UserWarning, match="1 batches held nan or infinity"):
        layer.eval()
    fresh = nb09.BatchNorm(3)
    fresh(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fresh.eval()


# --- folding and precise statistics

LAYERS = {
    "linear": lambda bias: nn.Linear(5, 6, bias=bias),
    "convolution": lambda bias: nn.Conv2d(4, 6, 3, padding=1, bias=bias),
    "grouped": lambda bias: nn.Conv2d(4, 6, 3, groups=2, stride=2, bias=bias),
    "one axis": lambda bias: nn.Conv1d(4, 6, 3, bias=bias),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_folding(nb09, name, bias, affine):
    torch.manual_seed(6)
    layer, norm = LAYERS[name](bias), nb09.BatchNorm(6, affine=affine)
    x = torch.randn(8, *((5,) if name == "linear" else (4, 9) if name == "one axis" else (4, 9, 9)))
    for _ in range(3):
        norm(layer(x) * 3 + 1)
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    before = copy.deepcopy(layer.state_dict())
    torch.testing.assert_close(nb09.fold(layer, norm)(x), norm.eval()(layer(x)), atol=1e-5, rtol=1e-5)
    for key, value in layer.state_dict().items():
        assert torch.equal(value, before[key])  # a new layer


def test_folding_takes_torchs_norm_and_refuses_another_width(nb09):
    layer, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    norm(layer(torch.randn(4, 3, 8, 8)))
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(nb09.fold(layer, norm)(x), norm.eval()(layer(x)), atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="gives 4 channels, the norm takes 5"):
        nb09.fold(layer, nn.BatchNorm2d(5))


def test_a_folded_network_is_the_network(nb09, small):
    model = nb09.vgg(nb09.Way("batch"), small.widths, 0)
    for _ in range(3):
        model(torch.randn(8, 3, 16, 16))
    thin = nb09.folded(model.eval())
    assert not any(isinstance(layer, nb09.BatchNorm) for layer in thin)
    x = torch.randn(4, 3, 16, 16)
    torch.testing.assert_close(thin(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_precise_statistics_are_plain_means(nb09, momentum):
    torch.manual_seed(7)
    norm = nb09.BatchNorm(3, momentum=momentum)
    model = nn.Sequential(nn.Linear(4, 3), norm, nn.Dropout(0.0)).eval()
    norm.running_mean.fill_(99)
    norm.num_batches_tracked.fill_(7)  # a network that was trained: what it saw then does not count
    batches = torch.randn(5, 8, 4)
    nb09.precise_statistics(model, batches)
    hidden = torch.stack([model[0](batch) for batch in batches])
    torch.testing.assert_close(norm.running_mean, hidden.mean((0, 1)))
    torch.testing.assert_close(norm.running_var, hidden.var(1).mean(0))
    assert norm.momentum == momentum
    assert not any(module.training for module in model.modules())


# --- gradients through depth


def test_predicted_factors(nb09):
    relu, tanh = nb09.ACTIVATIONS["ReLU"], nb09.ACTIVATIONS["tanh"]
    assert nb09.predicted_factor(relu, True) == pytest.approx(math.sqrt(math.pi / (math.pi - 1)), rel=1e-4)
    assert nb09.predicted_factor(relu, False) == pytest.approx(1, rel=1e-4)
    assert nb09.predicted_factor(tanh, True) == pytest.approx(nb09.predicted_factor(tanh, False), rel=1e-6)
    assert nb09.predicted_factor(lambda z: 3 * z, True) == pytest.approx(1)
    z = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slope = 1 - torch.tanh(z) ** 2
    assert nb09.predicted_factor(tanh, True) == pytest.approx(math.sqrt((slope**2).mean() / torch.tanh(z).var()), rel=2e-3)


def test_measured_factors_agree_with_theory(nb09):
    for kind, centred in (("batch", True), ("layer", False)):
        for name, phi in nb09.ACTIVATIONS.items():
            found = nb09.factor_of(nb09.sizes_through(kind, name, 20, 0)[1])
            assert found == pytest.approx(nb09.predicted_factor(phi, centred), rel=0.04), (kind, name)


def test_factor_of_a_geometric_series(nb09):
    assert nb09.factor_of([1.3 ** (10 - n) for n in range(11)]) == pytest.approx(1.3)
    assert nb09.factor_of([50.0, 9.0, *(0.5 ** (10 - n) for n in range(7)), 7.0, 7.0]) == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["batch", "layer"])
def test_a_norm_hides_the_scale_of_the_weights(nb09, kind):
    sizes = [nb09.sizes_through(kind, "ReLU", 8, 0, scale=scale)[1][1:] for scale in (1.0, 5.0)]
    np.testing.assert_allclose(sizes[0], sizes[1], rtol=1e-2)
    plain = [nb09.sizes_through("none", "ReLU", 8, 0, scale=scale) for scale in (1.0, 2.0)]
    assert plain[1][1][0] / plain[0][1][0] == pytest.approx(2**8, rel=1e-3)
    assert plain[1][0][-1] / plain[0][0][-1] == pytest.approx(2**8, rel=1e-3)


def test_gradient_sizes_by_hand(nb09):
    """One layer without normalisation: the gradient is weights times what ReLU lets through."""
    signal, sizes = nb09.sizes_through("none", "ReLU", 1, 3, width=4, count=5)
    generator = torch.Generator().manual_seed(3)
    h, weights = torch.randn(5, 4, generator=generator), torch.randn(4, 4, generator=generator) * math.sqrt(2) / 2
    direction = torch.randn(5, 4, generator=generator)
    through = (direction * (h @ weights > 0)) @ weights.T
    assert signal == pytest.approx([h.norm().item(), (h @ weights).relu().norm().item()], rel=1e-5)
    assert sizes == pytest.approx([through.norm().item(), direction.norm().item()], rel=1e-5)
    skip = nb09.sizes_through("none + skip", "ReLU", 1, 3, width=4, count=5)
    assert skip[1][0] == pytest.approx((through + direction).norm().item(), rel=1e-5)


def test_halves_of_batch_norm(nb09):
    x = torch.randn(50, 4) * 3 + 1
    centred, scaled = nb09.normalised_by("centring only", x), nb09.normalised_by("scaling only", x)
    torch.testing.assert_close(centred, x - x.mean(0))
    torch.testing.assert_close(scaled, x / x.std(0, correction=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nb09.normalised_by("batch", x), centred / x.std(0, correction=0), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(nb09.normalised_by("layer", x), F.layer_norm(x, (4,)))
    assert nb09.normalised_by("none", x) is x


def test_a_residual_network_normalises_what_it_added_up(nb09):
    x, width = torch.rand(6, 3, 32, 32), 128
    model = nb09.Deep("batch + skip", 4, 0, width)
    h = x.flatten(1) @ model.first
    for weights in model.layers:
        h = h + F.batch_norm(h @ weights, None, None, training=True).relu()
    expected = F.batch_norm(h, None, None, training=True) @ model.last
    torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)


def test_deep_training_is_sgd(nb09, pictures):
    images = F.interpolate(pictures["train"][0].float(), (32, 32)).to(torch.uint8)
    large = {"train": [images, pictures["train"][1]]}
    log = nb09.deep_training("none", 2, 0.05, 0, large, 3, batch_size=16)
    model, generator = nb09.Deep("none", 2, 0), torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(model.parameters(), 0.05)
    for loss_then in log["loss"]:
        batch = torch.randint(300, (16,), generator=generator)
        loss = F.cross_entropy(model(nb09.normalised(images[batch])), large["train"][1][batch])
        assert loss.item() == pytest.approx(loss_then, rel=1e-5)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert len(log["ratio"]) == 3


def test_rates_are_chosen_by_the_loss_at_the_end_on_another_seed(nb09):
    asked = []

    def run(rate, seed):
        asked.append((rate, seed))
        return {"loss": [5.0, math.nan if rate == 3 else abs(rate - 0.1)]}

    best, logs = nb09.best_of(run, (0.01, 0.1, 3), [7, 8])
    assert best == 0.1
    assert len(logs) == 2
    assert asked == [(0.01, 1007), (0.1, 1007), (3, 1007), (0.1, 7), (0.1, 8)]


# --- networks and trainings


def test_networks_of_one_seed_begin_alike(nb09):
    widths = (8, 8, 16)
    models = {norm: nb09.vgg(nb09.Way(norm), widths, 3) for norm in nb09.NORMS}
    plain = [layer.weight for layer in models["none"] if isinstance(layer, (nn.Conv2d, nn.Linear))]
    shapes = [(8, 3, 3, 3), *[(8, 8, 3, 3)] * 3, (16, 8, 3, 3), (16, 16, 3, 3), (10, 16)]
    assert [tuple(weight.shape) for weight in plain] == shapes
    for model in models.values():
        own = [layer.weight for layer in model if isinstance(layer, (nn.Conv2d, nn.Linear))]
        assert all(torch.equal(a, b) for a, b in zip(own, plain, strict=True))
    assert not torch.equal(nb09.vgg(nb09.Way(), widths, 4)[0].weight, plain[0])
    assert isinstance(nb09.vgg(nb09.Way(activation=nn.Sigmoid), widths, 0)[2], nn.Sigmoid)


def test_group_and_layer_norm_see_one_picture_only(nb09):
    x = torch.randn(4, 16, 5, 5)
    for norm in ("group", "layer"):
        layer = nb09.NORMS[norm](16)
        torch.testing.assert_close(layer(x)[:1], layer(x[:1]))
    torch.testing.assert_close(nb09.NORMS["layer"](16)(x), F.layer_norm(x, (16, 5, 5)))


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.5, 1.0), (0.8, 1.0), (0.9, 0.5), (1.0, 0.0)])
def test_rate_with_warm_up(nb09, progress, expected):
    assert nb09.rate_at(nb09.Way(learning_rate=2.0, warm_up=0.1), progress) == pytest.approx(2 * expected)


def test_rate_without_warm_up(nb09):
    assert nb09.rate_at(nb09.Way(learning_rate=2.0), 0.0) == 2


def test_noise_stands_behind_the_normalisation_in_training_only(nb09):
    torch.manual_seed(8)
    noisy, plain = nb09.NoisyBatchNorm(3), nb09.BatchNorm(3)
    x = torch.randn(200, 3, 4, 4)
    first, second = noisy(x).detach(), noisy(x).detach()
    assert not torch.allclose(first.mean((0, 2, 3)), second.mean((0, 2, 3)), atol=1e-3)
    flat = lambda y: y.transpose(0, 1).flatten(1)
    assert torch.corrcoef(torch.stack([flat(first)[0], flat(plain(x).detach())[0]]))[0, 1] == pytest.approx(1, abs=1e-4)
    plain(x)
    torch.testing.assert_close(noisy.eval()(x), plain.eval()(x))


def test_noise_differs_between_layers_and_seeds(nb09, small):
    draws = [
        layer.generator.initial_seed()
        for seed in (0, 1)
        for layer in nb09.vgg(nb09.Way("noisy"), small.widths, seed)
        if isinstance(layer, nb09.NoisyBatchNorm)
    ]
    assert len(set(draws)) == len(draws) == 12


def test_judged_without_noise_is_the_trained_network_by_precise_statistics(nb09, small, pictures, monkeypatch):
    way = nb09.Way("noisy", 0.05, batch_size=20)
    trained = nb09.train(way, small, pictures, 0, 600)[0]
    judged = []
    monkeypatch.setitem(nb09.without_noise.__globals__, "accuracy", lambda model, *_: judged.append(model) or 50.0)
    nb09.without_noise(way, small, pictures, 0, 600)
    quiet = nb09.vgg(replace(way, norm="batch"), small.widths, 0)
    quiet.load_state_dict(trained.state_dict())
    nb09.precise_statistics(quiet, map(nb09.normalised, pictures["train"][0].split(20)))
    for name, value in quiet.state_dict().items():
        torch.testing.assert_close(judged[-1].state_dict()[name], value)


def test_training_learns_and_repeats(nb09, small, pictures):
    way = nb09.Way("batch", 0.1, batch_size=20)
    model, log = nb09.train(way, small, pictures, 0, 1200)
    assert log["accuracy"] > 90
    assert log["accuracy"] == nb09.accuracy(model, *pictures["judge"])
    assert len(log["loss"]) == 60
    assert nb09.train(way, small, pictures, 0, 1200)[1]["loss"] == log["loss"]
    assert nb09.trained(way, small, pictures, 1, 1200)["loss"] != log["loss"]


def test_a_broken_training_has_the_accuracy_of_chance(nb09, small, pictures):
    log = nb09.trained(nb09.Way("none", 1e6, batch_size=20), small, pictures, 0, 1200)
    assert not math.isfinite(log["loss"][-1])
    assert len(log["loss"]) < 60
    assert log["accuracy"] == 10


def test_clipping_bounds_the_step(nb09, small, pictures):
    """One step of rate 1 and clip 0.01 moves the weights by 0.01."""
    way = nb09.Way("none", 1.0, clip=0.01, batch_size=300)
    before = nb09.vgg(way, small.widths, 0).state_dict()
    after = nb09.train(way, small, pictures, 0, 300)[0].state_dict()
    moved = math.sqrt(sum((after[name] - before[name]).square().sum().item() for name in before))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_what_is_measured_during_a_training(nb09, small, pictures):
    log = nb09.trained(nb09.Way("batch", 0.05, batch_size=20), small, pictures, 0, 600, nb09.anatomy)
    assert len(log["measures"]) == 3
    assert log["measures"][0]["bias"] == 0
    assert all(found["cosine"] < 0.02 for found in log["measures"])  # a right angle but for eps
    constant = nb09.trained(nb09.Way("constants", 0.05, batch_size=20), small, pictures, 0, 600, nb09.anatomy)
    assert constant["measures"][0]["cosine"] > 0.02
    assert constant["measures"][-1]["bias"] > 10 * log["measures"][-1]["bias"]


def test_steps_along_the_gradient(nb09, small, pictures):
    torch.manual_seed(9)
    model = nb09.vgg(nb09.Way("batch"), small.widths, 0)
    x, y = nb09.normalised(pictures["train"][0][:50]), pictures["train"][1][:50]
    before = copy.deepcopy(model.state_dict())
    lengths = [0.0, 0.01, 0.1]
    found = nb09.along_gradient(model, x, y, lengths)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert (found["loss"][0], found["slope"][0]) == (0, 0)
    loss, slopes = nb09.loss_and_slopes(copy.deepcopy(model), x, y)
    moved = copy.deepcopy(model)
    with torch.no_grad():
        for weights, slope in zip(moved.parameters(), slopes, strict=True):
            weights -= 0.1 * slope
    there, others = nb09.loss_and_slopes(moved, x, y)
    assert found["loss"][2] == pytest.approx(there - loss, abs=1e-5)
    change = torch.cat([(a - b).flatten() for a, b in zip(others, slopes, strict=True)]).norm()
    assert found["slope"][2] == pytest.approx(float(change / torch.cat([s.flatten() for s in slopes]).norm()), rel=1e-3)
    matrices = [n for n, weights in enumerate(model.parameters()) if weights.dim() > 1]
    assert len(matrices) == 7
    weights = list(model.parameters())
    unit = nb09.norm_of([weights[n] for n in matrices]) / nb09.norm_of([slopes[n] for n in matrices])
    relative = nb09.along_gradient(model, x, y, [0.1 / unit], relative=True)
    assert relative["loss"][0] == pytest.approx(there - loss, abs=1e-5)
    both = nb09.landscape(x, y, lengths, [0.1 / unit], model)
    assert both == {"absolute": found, "relative": relative}


def test_length_until_a_goal(nb09):
    lengths = [100, 200, 400]
    assert nb09.length_until([50.0, 60.0, 70.0], 65, lengths) == pytest.approx(200 * math.sqrt(2))
    assert nb09.length_until([50.0, 60.0, 70.0], 71, lengths) == math.inf
    assert nb09.length_until([50.0, 60.0, 70.0], 40, lengths) == 100
    assert nb09.length_until([50.0, 70.0, 60.0], 70, lengths) == pytest.approx(200)


def test_small_batches_judged_four_ways(nb09, small, pictures):
    ways = {norm: nb09.Way(norm, 0.05, batch_size=20) for norm in ("batch", "group")}
    found = {norm: nb09.judged_four_ways(way, small, pictures, 0, 600) for norm, way in ways.items()}
    assert set(found["batch"]) == {"running", "precise", "own batches", "batches of 2"}
    assert set(found["group"]) == {"running"}
    assert all(0 <= value <= 100 for value in itertools.chain(*(values.values() for values in found.values())))


def test_the_precise_verdict_is_by_batches_of_training_pictures(nb09, small, pictures, monkeypatch):
    judged = []
    monkeypatch.setitem(nb09.judged_four_ways.__globals__, "accuracy", lambda model, *_: judged.append(copy.deepcopy(model)) or 50.0)
    nb09.judged_four_ways(nb09.Way("batch", 0.05, batch_size=20), small, pictures, 0, 600)
    running, precise = judged[-2:]
    nb09.precise_statistics(running, map(nb09.normalised, pictures["train"][0].split(64)))
    for name, value in running.state_dict().items():
        torch.testing.assert_close(precise.state_dict()[name], value)


def test_memory_kept_for_the_backward_pass(nb09):
    x = torch.randn(8, 4, 16, 16, requires_grad=True)
    kept = {layer: nb09.kept_for_backward(layer, x) for layer in (nb09.BatchNorm(4), nb09.Plain(4), nn.BatchNorm2d(4))}
    ours, plain, peer = kept.values()
    assert ours <= peer + 64
    assert ours < plain / 2
    assert plain >= x.nbytes


def test_plain_is_the_same_function(nb09):
    x = torch.randn(8, 4, 6, 6)
    torch.testing.assert_close(nb09.Plain(4)(x), nb09.BatchNorm(4)(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("name", "solution"), [("layer_norm", "columns"), ("zero_share", "normal")])
def test_exercises_can_be_solved(nb09, name, solution):
    if solution == "columns":
        rows = torch.randn(4, 6)
        answer = nb09.batch_norm(rows.T, None, None)[0].T
        torch.testing.assert_close(answer, F.layer_norm(rows, (6,)), atol=1e-5, rtol=1e-5)
    else:
        assert 0.5 * math.erfc(1 / math.sqrt(2)) == pytest.approx(0.1587, abs=1e-3)


def test_equal_ways_are_trained_once(nb09, small, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(nb09, "Config", lambda: small)
    ways = [nb09.Way("batch", 0.05, batch_size=20)] * 2 + [nb09.Way("none", 0.05, batch_size=20)]
    logs = nb09.train_all(ways, [0, 1], pictures, 200, tmp_path, "name")
    assert list(logs) == ways[1:]
    assert [len(runs) for runs in logs.values()] == [2, 2]
    for way, runs in logs.items():
        for seed, log in enumerate(runs):
            assert log["loss"] == nb09.trained(way, small, pictures, seed, 200)["loss"]


def test_the_angle_between_the_gradients(nb09, small, pictures):
    x, y = nb09.normalised(pictures["train"][0][:50]), pictures["train"][1][:50]
    model = nb09.vgg(nb09.Way("batch"), small.widths, 0)
    found = nb09.angle_between(model, x, y)
    slopes = []
    for norm in ("batch", "constants"):
        twin = nb09.vgg(nb09.Way(norm), small.widths, 0)
        slopes.append(torch.cat([part.flatten() for part in nb09.loss_and_slopes(twin, x, y)[1]]))
    assert found == pytest.approx(float(F.cosine_similarity(*slopes, dim=0)), rel=1e-4)
    assert 0 < found < 0.99
    assert model[1].normalise is nb09.Normalise


def test_momentum_is_set_and_changes_no_weight(nb09, small, pictures):
    way = nb09.Way("batch", 0.05, batch_size=20)
    models = {}
    for momentum in (1.0, 0.1):
        measure = lambda model, momentum=momentum: nb09.set_momentum(momentum, model)
        models[momentum], _ = nb09.train(way, small, pictures, 0, 400, measure)
    assert [layer.momentum for layer in models[1.0] if isinstance(layer, nb09.BatchNorm)] == [1.0] * 6
    states = [model.state_dict() for model in models.values()]
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]) == ("running" not in name), name


def test_a_stepper_trains(nb09, small, pictures):
    x, y = pictures["train"][0][:20], pictures["train"][1][:20]
    step = nb09.stepper(nb09.Way("batch", clip=1.0), small, x, y)
    step()
    step()


def test_the_layer_in_half_precision(nb09):
    """Half precision in, half precision out; statistics and parameters stay float32."""
    layer, x = nb09.BatchNorm(8), torch.randn(16, 8, 4, 4).half().requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert (y.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.running_var.dtype) == (
        torch.half,
        torch.half,
        torch.float32,
        torch.float32,
    )
    twin = nb09.BatchNorm(8)
    twin(x.detach().float())
    torch.testing.assert_close(layer.running_var, twin.running_var, atol=1e-4, rtol=1e-4)
    assert layer.eval()(x).dtype == torch.half
    torch.testing.assert_close(layer(x).float(), twin.eval()(x.float()), atol=5e-3, rtol=5e-3)
