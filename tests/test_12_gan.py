"""Notebook 12 against closed forms, trained tables, torch's spectral norm, SVD, pytorch-fid's formula and explicit loops."""

import copy
import functools
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.spatial
import torch
import torch.nn.functional as F
from torch import nn

KINDS = ("minimax", "non_saturating", "least_squares", "wasserstein", "relativistic")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64)


# --- the game


def test_jensen_shannon_is_scipys(nb12):
    p, q = np.random.default_rng(0).dirichlet(np.ones(7), 2)
    p[2] = q[4] = q[5] = p[5] = 0
    p, q = p / p.sum(), q / q.sum()
    expected = scipy.spatial.distance.jensenshannon(p, q) ** 2
    assert float(nb12.jensen_shannon(torch.tensor(p), torch.tensor(q))) == pytest.approx(expected)
    apart = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    assert float(nb12.jensen_shannon(*apart)) == pytest.approx(math.log(2))
    assert float(nb12.jensen_shannon(apart[0], apart[0])) == 0


def test_optimal_discriminator_beats_every_other_point_by_point(nb12):
    p, q = torch.tensor([0.1, 0.7, 0.2]), torch.tensor([0.5, 0.3, 0.2])
    for one, other, found in zip(p.tolist(), q.tolist(), nb12.optimal_discriminator(p, q).tolist(), strict=True):
        worth = lambda d, a=one, b=other: -(a * math.log(d) + b * math.log(1 - d))
        assert found == pytest.approx(scipy.optimize.minimize_scalar(worth, bounds=(1e-6, 1 - 1e-6), method="bounded").x, abs=1e-4)


def test_game_value_in_scalars_and_where_a_sigmoid_would_overflow(nb12):
    a, b = [0.3, -2.0, 1.0], [0.5, -1.0]
    sigma = lambda x: 1 / (1 + math.exp(-x))
    expected = sum(math.log(sigma(x)) for x in a) / 3 + sum(math.log(1 - sigma(x)) for x in b) / 2
    assert float(nb12.game_value(torch.tensor(a), torch.tensor(b))) == pytest.approx(expected, rel=1e-6)
    assert float(nb12.game_value(torch.tensor([-300.0]), torch.tensor([200.0]))) == -500


# --- losses


def by_hand(kind, a, b):
    """(loss of D, loss of G) of one pair of logits, as the papers write them."""
    sigma = lambda x: 1 / (1 + math.exp(-x))
    return {
        "minimax": (-math.log(sigma(a)) - math.log(1 - sigma(b)), math.log(1 - sigma(b))),
        "non_saturating": (-math.log(sigma(a)) - math.log(1 - sigma(b)), -math.log(sigma(b))),
        "least_squares": ((a - 1) ** 2 + b**2, (b - 1) ** 2),
        "wasserstein": (b - a, -b),
        "relativistic": (math.log(1 + math.exp(-(a - b))), math.log(1 + math.exp(-(b - a)))),
    }[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_means_of_the_formulas(nb12, kind):
    a, b = [0.3, -2.0, 1.5, 4.0], [0.5, -1.0, 2.0, -3.0]
    pairs = [by_hand(kind, x, y) for x, y in zip(a, b, strict=True)]
    real, fake = torch.tensor(a)[:, None], torch.tensor(b)[:, None]
    assert float(nb12.d_loss(kind, real, fake)) == pytest.approx(np.mean([d for d, _ in pairs]), rel=1e-5)
    assert float(nb12.g_loss(kind, real, fake)) == pytest.approx(np.mean([g for _, g in pairs]), rel=1e-5)
    if kind != "relativistic":
        assert nb12.g_loss(kind, None, fake) == nb12.g_loss(kind, real, fake)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_stay_finite_and_the_generator_pulls_upwards(nb12, kind):
    real, fake = torch.tensor([500.0, -500.0]), torch.tensor([-500.0, 500.0]).requires_grad_()
    assert nb12.d_loss(kind, real, fake).isfinite()
    assert nb12.g_loss(kind, real, fake).isfinite()
    fake = torch.zeros(3, requires_grad=True)
    (slope,) = torch.autograd.grad(nb12.g_loss(kind, torch.zeros(3), fake), fake)
    assert (slope < 0).all()  # to lower its loss the generator raises the logits of its samples
    (slope,) = torch.autograd.grad(nb12.d_loss(kind, torch.ones(3), fake), fake)
    assert kind == "least_squares" or (slope > 0).all()  # and the discriminator lowers them


def outcomes():
    """Counts of p and q on four outcomes in eighths, and samples in all pairs of them."""
    p, q = torch.tensor([4, 2, 1, 1]), torch.tensor([1, 3, 3, 1])
    real, fake = (torch.arange(4).repeat_interleave(count) for count in (p, q))
    return p / 8, q / 8, real.repeat(8), fake.repeat_interleave(8)


def trained_table(loss, clip=None):
    """The least value of loss(logits of four outcomes), by training them."""
    table = torch.zeros(4, requires_grad=True)
    optimiser = torch.optim.Adam([table], 0.05)
    for _ in range(600):
        optimiser.zero_grad()
        loss(table).backward()
        optimiser.step()
        if clip:
            table.data.clamp_(*clip)
    return loss(table).item(), table.detach()


@pytest.mark.parametrize("kind", KINDS)
def test_trained_optima_are_the_divergences(nb12, kind):
    p, q, real, fake = outcomes()
    clip = (0.0, 1.0) if kind == "wasserstein" else None  # slopes bounded in the 0/1 metric
    value, table = trained_table(lambda table: nb12.d_loss(kind, table[real], table[fake]), clip)
    outer = torch.outer(p, q)
    expected = {
        "least_squares": (p * q / (p + q)).sum(),
        "wasserstein": -(p - q).abs().sum() / 2,  # total variation
        "relativistic": math.log(2) - nb12.jensen_shannon(outer.flatten(), outer.T.flatten()),
    }.get(kind, math.log(4) - 2 * nb12.jensen_shannon(p, q))
    assert value == pytest.approx(float(expected), abs=1e-4)
    half = 0.5 - 0.25 * ((p - q) ** 2 / (p + q)).sum()
    assert float((p * q / (p + q)).sum()) == pytest.approx(float(half))
    if kind == "relativistic":  # D = log p / q + c
        torch.testing.assert_close(table - table[0], (p / q).log() - (p / q).log()[0], atol=0.02, rtol=0)
    elif kind != "wasserstein":
        best = p / (p + q) if kind == "least_squares" else (p / q).log()
        torch.testing.assert_close(table, best, atol=0.02, rtol=0)


@pytest.mark.parametrize("side", ["d_loss", "g_loss"])
def test_losses_refuse_what_makes_no_sense(nb12, side):
    loss, x = getattr(nb12, side), torch.zeros(4, 1)
    with pytest.raises(ValueError, match="'hinge': it takes one of minimax, non_saturating, least_squares, wasserstein, relativistic"):
        loss("hinge", x, x)
    with pytest.raises(ValueError, match=r"come in pairs, not .*\(4, 1\), \(3, 1\).*draw as many of both"):
        loss("relativistic", x, x[:3])
    with pytest.raises(ValueError, match="come in pairs"):
        loss("relativistic", None, x)
    with pytest.raises(ValueError, match="no logits"):
        loss("minimax", x, x[:0])


# --- penalties


def test_penalties_of_a_linear_critic(nb12):
    w = normal(12).requires_grad_()
    x, fake = normal(6, 3, 2, 2, seed=1), normal(6, 3, 2, 2, seed=2)
    critic = lambda x: x.flatten(1) @ w
    size = w.detach().norm()
    r1, gp = nb12.zero_centred_penalty(critic, x), nb12.gradient_penalty(critic, x, fake)
    torch.testing.assert_close(r1, size**2)
    torch.testing.assert_close(gp, (size - 1) ** 2)
    torch.testing.assert_close(torch.autograd.grad(r1, w)[0], 2 * w.detach())
    torch.testing.assert_close(torch.autograd.grad(gp, w)[0], 2 * (size - 1) * w.detach() / size)


def test_penalties_of_a_quadratic_critic_sample_by_sample(nb12):
    matrix = normal(3, 3)
    matrix = matrix + matrix.T
    critic = lambda x: (x @ matrix * x).sum(1, keepdim=True) / 2  # its slope is matrix x
    x, fake = normal(5, 3, seed=1), normal(5, 3, seed=2)
    squares = [float((matrix @ one).square().sum()) for one in x]
    assert nb12.zero_centred_penalty(critic, x).item() == pytest.approx(np.mean(squares))
    alpha = torch.rand(5, 1, generator=generator(3), dtype=torch.float64)
    sizes = [float((matrix @ (a * one + (1 - a) * other)).norm()) for a, one, other in zip(alpha, x, fake, strict=True)]
    found = nb12.gradient_penalty(critic, x, fake, generator(3))
    assert found.item() == pytest.approx(np.mean([(size - 1) ** 2 for size in sizes]))
    assert len(set(alpha.flatten().tolist())) == 5


def test_points_between_lie_between_for_pictures_too(nb12):
    seen = []

    def critic(x):
        seen.append(x.detach())
        return x.flatten(1).sum(1)

    nb12.gradient_penalty(critic, torch.zeros(50, 2, 4, 4), torch.ones(50, 2, 4, 4), generator())
    values = seen[0].flatten(1)
    assert (values == values[:, :1]).all()  # one place for each sample
    assert values.min() >= 0
    assert values.max() <= 1
    assert values[:, 0].std() > 0.2


def test_slopes_of_zero_can_be_trained(nb12):
    w = torch.zeros(2, requires_grad=True)
    found = nb12.gradient_penalty(lambda x: x @ w, torch.randn(4, 2), torch.randn(4, 2))
    assert found.item() == 1
    assert torch.autograd.grad(found, w)[0].isfinite().all()


def test_penalty_leaves_samples_and_generator_alone(nb12):
    source = torch.randn(4, 2, requires_grad=True)
    w = torch.randn(2, requires_grad=True)
    (nb12.zero_centred_penalty(lambda x: x @ w, 2 * source) + nb12.gradient_penalty(lambda x: x @ w, source, 2 * source)).backward()
    assert source.grad is None
    assert w.grad is not None


def test_penalties_ask_for_no_slope_of_the_samples_that_they_get(nb12):
    x = torch.randn(4, 2)
    nb12.zero_centred_penalty(lambda x: x.square().sum(1), x)
    nb12.gradient_penalty(lambda x: x.square().sum(1), x, x + 1)
    assert not x.requires_grad


def test_penalties_refuse(nb12):
    critic = lambda x: x.sum(1)
    with pytest.raises(ValueError, match=r"\(4, 2\) and \(3, 2\): draw as many of both"):
        nb12.gradient_penalty(critic, torch.zeros(4, 2), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="no samples"):
        nb12.zero_centred_penalty(critic, torch.zeros(0, 2))


# --- spectral norm, moving average


@pytest.mark.parametrize("layer", [nn.Linear(7, 5), nn.Conv2d(3, 8, 4), nn.Linear(1, 6)])
def test_spectral_norm_is_torchs(nb12, layer):
    ours, theirs = copy.deepcopy(layer).double(), nn.utils.parametrizations.spectral_norm(copy.deepcopy(layer).double())
    norm = nb12.SpectralNorm(ours.weight, generator=generator())
    nn.utils.parametrize.register_parametrization(ours, "weight", norm)
    peer = theirs.parametrizations.weight[0]
    norm.u, norm.v = peer._u.clone(), peer._v.clone()  # registering may have looked at the weight
    for _ in range(3):
        torch.testing.assert_close(ours.weight, theirs.weight)
        torch.testing.assert_close(norm.u, peer._u)
        torch.testing.assert_close(norm.v, peer._v)
    goal = normal(*layer.weight.shape, seed=3)
    for network in (ours, theirs):
        network.eval()
        (network.weight * goal).sum().backward()
    slopes = [network.parametrizations.weight.original.grad for network in (ours, theirs)]
    torch.testing.assert_close(*slopes)


@pytest.mark.parametrize("shape", [(6, 9), (8, 3, 4, 4)])
def test_spectral_norm_is_one_by_svd_and_follows_the_weight(nb12, shape):
    weight = normal(*shape)
    norm = nb12.SpectralNorm(weight, iterations=3, generator=generator())
    for _ in range(60):
        found = norm(weight)
    assert float(torch.linalg.svdvals(found.flatten(1))[0]) == pytest.approx(1)
    torch.testing.assert_close(found * torch.linalg.svdvals(weight.flatten(1))[0], weight)
    for _ in range(60):
        found = norm(normal(*shape, seed=5))
    assert float(torch.linalg.svdvals(found.flatten(1))[0]) == pytest.approx(1)
    kept = norm.u.clone()
    norm.eval()(normal(*shape, seed=6))
    assert torch.equal(norm.u, kept)  # no iteration in evaluation
    assert set(norm.state_dict()) == {"u", "v"}


def test_spectral_norm_counts_its_iterations(nb12):
    weight = normal(5, 4)
    norm = nb12.SpectralNorm(weight, iterations=2, generator=generator())
    v = norm.v.clone()
    norm(weight)
    for _ in range(2):
        u = F.normalize(weight @ v, dim=0)
        v = F.normalize(weight.T @ u, dim=0)
    torch.testing.assert_close(norm.u, u)
    torch.testing.assert_close(norm.v, v)


def test_spectral_norm_of_a_bias_is_refused(nb12):
    with pytest.raises(ValueError, match=r"\(5,\) is no matrix"):
        nb12.SpectralNorm(torch.zeros(5))


def test_moving_average_is_its_formula(nb12):
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    average = copy.deepcopy(model)
    expected = {name: part.detach().clone() for name, part in model.named_parameters()}
    for step in range(4):
        with torch.no_grad():
            for part in model.parameters():
                part.add_(torch.randn(part.shape))
            model[1].running_mean.fill_(step)
        nb12.update_average(average, model, 0.8)
        for name, part in model.named_parameters():
            expected[name] = 0.8 * expected[name] + 0.2 * part.detach()
    for name, part in average.named_parameters():
        torch.testing.assert_close(part.detach(), expected[name])
    assert (average[1].running_mean == 3).all()
    assert all(part.requires_grad for part in model.parameters())


# --- measures


def test_mode_measures_by_an_explicit_loop(nb12):
    centres = torch.tensor([[0.0, 0], [1, 0], [0, 1]])
    samples = torch.cat([normal(40, 2) * 0.4 + 0.3, centres.double().repeat(3, 1)]).float()[None]
    found = nb12.mode_measures(samples, centres, 0.05)
    shares = np.zeros(3)
    for point in samples[0].tolist():
        distances = [math.dist(point, centre) for centre in centres.tolist()]
        if min(distances) <= 0.15:
            shares[int(np.argmin(distances))] += 1 / 49
    among = shares / shares.sum()
    assert float(found["modes"]) == (shares > 0).sum()
    assert float(found["quality"]) == pytest.approx(shares.sum())
    assert float(found["reverse KL"]) == pytest.approx(sum(q * math.log(3 * q) for q in among if q), abs=1e-6)
    assert float(found["miss"]) == pytest.approx((abs(shares - 1 / 3).sum() + 1 - shares.sum()) / 2)
    assert 0.2 < float(found["quality"]) < 0.9


def test_mode_measures_at_their_ends(nb12):
    centres = torch.tensor([[0.0, 0], [1, 0], [0, 1], [1, 1]])
    rows = [centres[[0] * 8], centres.repeat(2, 1), centres[[0] * 8] + 9, centres[[0] * 8] * math.nan]
    found = nb12.mode_measures(torch.stack(rows), centres, 0.1)
    assert found["modes"].tolist() == [1, 4, 0, 0]
    assert found["quality"].tolist() == [1, 1, 0, 0]
    assert found["miss"].tolist() == pytest.approx([0.75, 0, 1, 1])
    assert found["reverse KL"].tolist() == pytest.approx([math.log(4), 0, math.log(4), math.log(4)])


@pytest.mark.parametrize(("name", "modes", "spacing", "sigmas"), [("ring", 8, 2 * math.sin(math.pi / 8), 100), ("grid", 25, 2, 20)])
def test_mixtures_are_pacgans(nb12, name, modes, spacing, sigmas):
    centres, deviation = nb12.mixture(name)
    nearest = torch.cdist(centres, centres).fill_diagonal_(9).min(1).values
    assert len(centres) == modes
    torch.testing.assert_close(nearest / deviation, torch.full_like(nearest, spacing * sigmas), atol=1e-3, rtol=1e-4)
    assert float(centres.square().mean()) == pytest.approx(1)
    points, labels = nb12.draw_points(centres, deviation, 20_000, generator())
    found = nb12.mode_measures(points[None], centres, deviation)
    assert labels is None
    assert float(found["quality"]) == pytest.approx(1 - math.exp(-4.5), abs=0.004)  # 98.9 %
    assert float(found["miss"]) < 0.03


def test_moments_are_numpys(nb12):
    x = np.random.default_rng(0).normal(size=(30, 4)).astype(np.float32)
    mean, cov = nb12.moments(torch.tensor(x))
    np.testing.assert_allclose(mean, x.astype(float).mean(0))
    np.testing.assert_allclose(cov, np.cov(x.astype(float), rowvar=False))
    assert mean.dtype == cov.dtype == torch.float64


def pytorch_fid(mu1, sigma1, mu2, sigma2):
    """pytorch-fid's calculate_frechet_distance (fid_score.py), written again; its sqrtm(disp=False) is gone from newer SciPy."""
    covmean = scipy.linalg.sqrtm(sigma1.dot(sigma2))
    diff = mu1 - mu2
    return diff.dot(diff) + np.trace(sigma1) + np.trace(sigma2) - 2 * np.trace(np.real(covmean))


@pytest.mark.parametrize("size", [1, 5, 40])
def test_frechet_distance_is_pytorch_fids(nb12, size):
    draws = np.random.default_rng(size)
    parts = [draws.normal(size=(3 * size + 5, size)) @ draws.normal(size=(size, size)) + shift for shift in (0, 0.7)]
    moments = [(x.mean(0), np.atleast_2d(np.cov(x, rowvar=False))) for x in parts]
    found = nb12.frechet_distance(*moments[0], *moments[1])
    assert isinstance(found, float)
    assert found == pytest.approx(pytorch_fid(*moments[0], *moments[1]), rel=1e-6)
    assert found == pytest.approx(nb12.frechet_distance(*moments[1], *moments[0]))
    assert nb12.frechet_distance(*moments[0], *moments[0]) == pytest.approx(0, abs=1e-8)


def test_frechet_distance_of_commuting_covariances(nb12):
    basis = torch.linalg.qr(normal(4, 4)).Q
    first, second = torch.tensor([1.0, 4, 9, 0]).double(), torch.tensor([4.0, 1, 0, 16]).double()
    covs = [basis @ torch.diag(part) @ basis.T for part in (first, second)]
    means = normal(4, seed=1), normal(4, seed=2)
    expected = (means[0] - means[1]).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    assert nb12.frechet_distance(means[0], covs[0], means[1], covs[1]) == pytest.approx(float(expected))


def test_frechet_distance_of_few_samples_is_real(nb12):
    """Covariances of rank below their size, where sqrtm gives complex numbers."""
    few = [normal(6, 30, seed=seed) for seed in (0, 1)]
    moments = [(x.mean(0), torch.cov(x.T)) for x in few]
    found = nb12.frechet_distance(*moments[0], *moments[1])
    assert math.isfinite(found)
    mean = (moments[0][0] - moments[1][0]).square().sum()
    product = torch.linalg.svdvals((few[0] - few[0].mean(0)) @ (few[1] - few[1].mean(0)).T / 5).sum()  # nuclear norm
    assert found == pytest.approx(float(mean + moments[0][1].trace() + moments[1][1].trace() - 2 * product))


def test_frechet_distance_refuses(nb12):
    mean, cov = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"features \(3, 3\) are not \(N, D\) with N above D, so singular: take more samples"):
        nb12.moments(torch.randn(3, 3))
    with pytest.raises(ValueError, match="take more samples"):
        nb12.moments(torch.randn(5))
    with pytest.raises(ValueError, match=r"give means \(D,\) and covariances \(D, D\), not \(3,\), \(3, 3\), \(2,\), \(3, 3\)"):
        nb12.frechet_distance(mean, cov, torch.zeros(2), cov)
    with pytest.raises(ValueError, match="not finite: has the generator diverged"):
        nb12.frechet_distance(mean, cov * math.nan, mean, cov)


def test_neighbour_measures_by_explicit_loops(nb12):
    """The definitions of prdc (Naeem et al.), loop by loop."""
    real, fake, k = normal(30, 3), normal(25, 3, seed=1) * 0.9 + 1.2, 3

    def radius(points, n):
        return sorted(float((points[n] - other).norm()) for m, other in enumerate(points) if m != n)[k - 1]

    inside = lambda centre, r, point: float((centre - point).norm()) <= r
    real_r, fake_r = ([radius(points, n) for n in range(len(points))] for points in (real, fake))
    found = nb12.neighbour_measures(real, fake, k)
    assert found["precision"] == pytest.approx(np.mean([any(inside(c, r, x) for c, r in zip(real, real_r, strict=True)) for x in fake]))
    assert found["recall"] == pytest.approx(np.mean([any(inside(c, r, x) for c, r in zip(fake, fake_r, strict=True)) for x in real]))
    assert found["coverage"] == pytest.approx(np.mean([any(inside(c, r, x) for x in fake) for c, r in zip(real, real_r, strict=True)]))
    assert len({round(value, 6) for value in found.values()}) == 3
    assert 0 < min(found.values()) < max(found.values()) < 1
    with pytest.raises(ValueError, match="30 and 5 samples are too few for k = 5: take more"):
        nb12.neighbour_measures(real, fake[:5])


# --- networks


def test_copies_side_by_side_are_separate_networks(nb12):
    both, x = nb12.MLP((2, 5, 4, 1), [3, 4]), torch.randn(12, 2)
    first, second = nb12.MLP((2, 5, 4, 1), [3]), nb12.MLP((2, 5, 4, 1), [4])
    torch.testing.assert_close(both(x), torch.cat([first(x[:6]), second(x[6:])]))
    assert not torch.equal(first(x), second(x))
    layers = list(zip(first.weights, first.biases, strict=True))
    hidden = x
    for n, (weight, bias) in enumerate(layers):
        hidden = hidden @ weight[0] + bias[0]
        if n < 2:
            hidden = torch.where(hidden > 0, hidden, 0.2 * hidden)
    torch.testing.assert_close(first(x), hidden)


def test_waves_of_the_first_layer(nb12):
    network, x = nb12.MLP((2, 400, 1), [0], waves=5.0), torch.randn(7, 2)
    hidden = x @ network.weights[0][0] + network.biases[0][0]
    torch.testing.assert_close(network(x), (hidden.sin() + hidden / 5) @ network.weights[1][0] + network.biases[1][0])
    assert network.weights[0].std().item() == pytest.approx(5, rel=0.1)


def test_pairs_of_points_stay_within_their_copy(nb12):
    d, x = nb12.MLP((4, 5, 1), [0, 1]), torch.randn(12, 2)
    assert d(x).shape == (6, 1)
    torch.testing.assert_close(d(x)[3:], nb12.MLP((4, 5, 1), [1])(x[6:].reshape(3, 4)))


def small(nb12, **changes):
    smaller = {"width": 16, "channels": 4, "noise": 6, "features": 5, "samples": 20, "steps": 3, "batch": 6, "average": 0.9}
    return replace(nb12.Config(), point_noise=2, point_batch=16, point_steps=30, **(smaller | changes))


@pytest.mark.parametrize("shape", [(1, 32), (2, 16), (3, 32)])
@pytest.mark.parametrize("norm", ["", "batch", "batch in D", "spectral"])
def test_picture_networks(nb12, shape, norm):
    way, where = nb12.Way("non_saturating", norm=norm), "cpu"
    g, d = nb12.picture_networks(small(nb12), (shape[0], shape[1], shape[1]), where, way, 0)
    x = g(torch.randn(4, 6))
    assert x.shape == (4, shape[0], shape[1], shape[1])
    assert x.abs().max() <= 1
    assert d(x).shape == (4, 1)
    kinds = [[type(part).__name__ for part in network.modules()] for network in (g, d)]
    assert ("BatchNorm2d" in kinds[0]) == (norm == "batch")
    assert ("BatchNorm2d" in kinds[1]) == ("batch" in norm)
    assert ("SpectralNorm" in kinds[1]) == (norm == "spectral")
    again = nb12.picture_networks(small(nb12), (shape[0], shape[1], shape[1]), where, way, 0)
    assert all(torch.equal(one, other) for one, other in zip(d.parameters(), again[1].parameters(), strict=True))
    if norm == "batch":
        weights = torch.cat([part.weight.flatten() for part in g.modules() if isinstance(part, nn.ConvTranspose2d)])
        assert float(weights.std()) == pytest.approx(0.02, rel=0.1)


def test_channels_that_do_not_fit_are_named(nb12):
    _, d = nb12.picture_networks(small(nb12), (3, 16, 16), "cpu", nb12.Way("minimax"), 0)
    with pytest.raises(ValueError, match=r"\(5, 1, 16, 16\), not \(N, 3, H, W\): convert them"):
        d(torch.zeros(5, 1, 16, 16))


def test_classes_steer_both_networks(nb12):
    g, d = nb12.picture_networks(small(nb12), (1, 16, 16), "cpu", nb12.Way("minimax", classes=10), 0)
    z, x = torch.randn(1, 6).repeat(2, 1), torch.randn(1, 1, 16, 16).repeat(2, 1, 1, 1)
    labels = torch.tensor([0, 7])
    assert (g(z, labels)[0] - g(z, labels)[1]).abs().max() > 1e-4
    logits = d(x, labels)
    hidden = d.body(x[:1])[0]
    for logit, label in zip(logits[:, 0], labels, strict=True):
        asked = d.of_class.weight[:, label] + d.of_class.bias
        torch.testing.assert_close(logit, d.head(hidden)[0] + (hidden * asked).sum() / math.sqrt(len(hidden)))
    assert logits[0] != logits[1]
    x, labels = nb12.made_pictures(g, 25)
    assert labels.tolist() == [n % 10 for n in range(25)]


# --- data and the other measures of pictures


def fake_images(monkeypatch, nb12, count=360):
    pictures = {part: (torch.randint(256, (count, 1, 28, 28), dtype=torch.uint8), torch.arange(count) % 10) for part in ("train", "test")}
    monkeypatch.setattr(nb12, "load_images", lambda name: pictures)
    return pictures


def test_splits_share_no_picture_and_are_scaled(nb12, monkeypatch):
    images = fake_images(monkeypatch, nb12)
    parts = nb12.splits("MNIST", 32, torch.device("cpu"))
    sizes = {name: len(labels) for name, (_, labels) in parts.items()}
    assert sizes["reference"] == sizes["floor"] == 180
    assert sizes["validation"] == (sizes["train"] + sizes["validation"]) // 12
    keys = {name: {tuple(one.flatten()[200:260].tolist()) for one in x} for name, (x, _) in parts.items()}
    for name, other in (("train", "validation"), ("reference", "floor")):
        assert not keys[name] & keys[other]
    x, _ = parts["validation"]
    torch.testing.assert_close(x[-1, 0, 2:-2, 2:-2], images["train"][0][-1, 0] / 127.5 - 1)
    assert (x[:, :, :2] == -1).all()
    assert x.min() >= -1
    assert x.max() <= 1
    halved = nb12.splits("MNIST", 16, torch.device("cpu"))["validation"][0]
    torch.testing.assert_close(halved[0, 0, 3, 5], x[0, 0, 6:8, 10:12].mean())


def test_stacks_are_drawn_with_replacement_and_counted(nb12):
    images = torch.arange(10.0)[:, None, None, None].expand(-1, 1, 16, 16)
    x, labels = nb12.draw_pictures((images, torch.arange(10)), 2, 4000, generator())
    assert x.shape == (4000, 2, 16, 16)
    assert labels is None
    classifier = lambda x: F.one_hot(x[:, 0, 0, 0].long(), 10).float()
    found = nb12.stack_measures(classifier, x)
    pairs, counts = np.unique(x[:, :, 0, 0].numpy(), axis=0, return_counts=True)
    shares = counts / 4000
    assert found["modes"] == len(pairs) == 100
    assert found["reverse KL"] == pytest.approx((shares * np.log(100 * shares)).sum(), abs=1e-5)
    assert found["reverse KL"] == pytest.approx(99 / 8000, rel=0.5)
    one = nb12.stack_measures(classifier, x[:1].repeat(50, 1, 1, 1))
    assert one == {"modes": 1.0, "reverse KL": pytest.approx(math.log(100), abs=1e-5)}
    x, labels = nb12.draw_pictures((images, torch.arange(10)), 1, 50, generator())
    assert x[:, 0, 0, 0].tolist() == labels.tolist()


def test_classifier_learns_and_its_accuracy_is_counted(nb12):
    y = torch.arange(300) % 10
    x = torch.full((300, 1, 16, 16), -1.0)
    x[torch.arange(300), 0, y] = 1.0  # the class is the row that is lit
    config = small(nb12, features=16)
    classifier = nb12.Classifier(config, 16)
    classifier.load_state_dict(nb12.train_classifier((x, y), config, 60, 0))
    assert nb12.accuracy(classifier, x, y) > 0.95
    assert nb12.accuracy(classifier, x, (y + 1) % 10) < 0.05
    features = nb12.in_parts(classifier.body, x, 70)
    assert features.shape == (300, 16)
    torch.testing.assert_close(classifier.head(features), classifier(x))


def test_judged_compares_with_the_right_parts(nb12):
    config = small(nb12, features=3)
    draw = lambda count, seed: torch.rand(count, 1, 16, 16, generator=generator(seed))
    parts = {"train": (draw(60, 0), None), "reference": (draw(40, 1), None)}
    classifier = nb12.Classifier(config, 16)
    reference = nb12.moments(nb12.in_parts(classifier.body, parts["reference"][0]))
    copied = nb12.judged(classifier, reference, parts, parts["train"][0][:30])
    fresh = nb12.judged(classifier, reference, parts, draw(30, 2))
    assert copied["nearest"] < 0.01
    assert fresh["nearest"] == pytest.approx(1, abs=0.1)
    same = nb12.judged(classifier, reference, parts, parts["reference"][0])
    assert same["frechet"] == pytest.approx(0, abs=1e-8)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    x = parts["reference"][0]
    distances, indices = nb12.nearest(x, parts["train"][0])
    expected = scipy.spatial.distance.cdist(x.flatten(1), parts["train"][0].flatten(1))
    np.testing.assert_allclose(distances, expected.min(1), rtol=1e-3)
    assert indices.tolist() == expected.argmin(1).tolist()


# --- training


def game_of(nb12, copies=2, **changes):
    return replace(nb12.point_game("grid", small(nb12), copies, "cpu", 200), **changes)


def test_penalties_have_their_factors(nb12):
    w = torch.tensor([3.0, 4.0], requires_grad=True)
    critic, real, fake = lambda x: (x.square() @ w) / 2, torch.ones(5, 2), 2 * torch.ones(5, 2)  # slope w x
    found = lambda **how: float(nb12.penalties(nb12.Way("minimax", **how), critic, real, fake, generator()))
    assert found() == 0
    assert found(r1=0.5) == pytest.approx(0.25 * 25)
    assert found(r2=0.5) == pytest.approx(0.25 * 100)
    assert found(r1=1.0, r2=0.5) == pytest.approx(0.5 * 25 + 0.25 * 100)
    between = found(slope=2.0)
    assert between == pytest.approx(2 * float(nb12.gradient_penalty(critic, real, fake, generator())))
    assert 2 * 16 < between < 2 * 81


def reference_training(nb12, way, game, config, seed):
    """The loop in plain PyTorch: losses written out, penalties with autograd over the batch of one copy."""
    g, d = game.networks(way, seed)
    optimisers = [torch.optim.Adam(part.parameters(), lr=way.rate, betas=(way.beta, 0.99)) for part in (g, d)]
    draws, count = generator(seed), game.batch
    average = copy.deepcopy(g)
    for step in range(1, game.steps + 1):
        for _ in range(way.critic_steps):
            real, _ = game.draw(count, draws)
            fake = g(torch.randn(count, 2, generator=draws)).detach()
            loss_d, _ = hand_losses(way.loss, d(real), d(fake))
            for gamma, x in ((way.r1, real), (way.r2, fake)):
                if gamma:
                    x = x.clone().requires_grad_()
                    (slope,) = torch.autograd.grad(d(x).sum(), x, create_graph=True)
                    loss_d = loss_d + gamma / 2 * (slope**2).sum() / len(x)
            optimisers[1].zero_grad()
            loss_d.backward()
            optimisers[1].step()
        real, _ = game.draw(count, draws)
        _, loss_g = hand_losses(way.loss, d(real), d(g(torch.randn(count, 2, generator=draws))))
        optimisers[0].zero_grad()
        loss_g.backward()
        optimisers[0].step()
        decay = min(config.average, (1 + step) / (10 + step))
        for kept, new in zip(average.parameters(), g.parameters(), strict=True):
            kept.data = decay * kept.data + (1 - decay) * new.data
    return g, average


def hand_losses(kind, a, b):
    if kind == "relativistic":
        return -torch.log(torch.sigmoid(a - b)).mean(), -torch.log(torch.sigmoid(b - a)).mean()
    return -torch.log(torch.sigmoid(a)).mean() - torch.log(1 - torch.sigmoid(b)).mean(), -torch.log(torch.sigmoid(b)).mean()


@pytest.mark.parametrize(
    "how",
    [
        {"loss": "relativistic", "r1": 0.1, "r2": 0.2},
        {"loss": "non_saturating", "beta": 0.5, "critic_steps": 2},
        {"loss": "non_saturating", "r2": 0.3, "rate": 3e-3},
    ],
)
def test_training_is_the_plain_loop(nb12, how):
    config = small(nb12)
    game, way = game_of(nb12, copies=1, steps=12), nb12.Way(**how)
    kept, log = nb12.train(way, game, config, 5, looks=3)
    g, average = reference_training(nb12, way, game, config, 5)
    for name, part in g.state_dict().items():
        torch.testing.assert_close(kept["generator"][name], part, atol=2e-4, rtol=1e-3)
    for name, part in average.state_dict().items():
        torch.testing.assert_close(kept["average"][name], part, atol=2e-4, rtol=1e-3)
    assert log["step"] == [4, 8, 12]
    assert len(log["miss"]) == 3
    assert log["lost"] == [None]


def test_copies_train_as_if_alone(nb12, monkeypatch):
    """The slopes of a copy do not depend on the others, nor does their size on how many there are."""
    shared, way = torch.randn(16, 2, generator=generator(9)), nb12.Way("relativistic", r1=0.1, r2=0.1)
    slopes, plain = [], nb12.descend

    def descend(loss, optimiser):
        parts = [part for group in optimiser.param_groups for part in group["params"]]
        slopes.append([part.clone() for part in torch.autograd.grad(loss, parts, retain_graph=True)])
        plain(loss, optimiser)

    monkeypatch.setattr(nb12, "descend", descend)
    monkeypatch.setattr(nb12, "noise_for", lambda g, count, draws: shared.flip(0).repeat(count // 16, 1))
    for copies in (1, 2):  # every copy sees the same points and noise
        game = game_of(nb12, copies=copies, steps=1, draw=lambda count, draws: (shared.repeat(count // 16, 1), None), look=lambda g: {})
        nb12.train(way, game, small(nb12), 0)
    for alone, together in zip(slopes[:2], slopes[2:], strict=True):  # of D, then of G
        for one, both in zip(alone, together, strict=True):
            torch.testing.assert_close(both[:1], one, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["minimax", "least_squares", "wasserstein"])
def test_training_moves_points_towards_the_data(nb12, kind):
    centres = torch.tensor([[-1.0, 1.0]])
    game = game_of(nb12, copies=1, steps=200, draw=functools.partial(nb12.draw_points, centres, 0.1))
    way = nb12.Way(kind, r1=0.1, r2=0.1, rate=3e-3)
    g, _ = game.networks(way, 0)
    distance = lambda: (nb12.made_points(g, 500)[0].mean(0) - centres[0]).norm()
    before = distance()
    kept, _ = nb12.train(way, game, small(nb12), 0)
    g.load_state_dict(kept["average"])
    assert distance() < 0.6 * before


def test_divergence_keeps_the_last_good_weights_and_says_so(nb12, capsys):
    config, steps = small(nb12), []

    def draw(count, draws):
        steps.append(1)
        points, _ = nb12.draw_points(*nb12.mixture("grid"), count, draws)
        return (points if len(steps) <= 300 else points * math.nan), None  # nan from step 151 on

    game = game_of(nb12, copies=1, steps=400, draw=draw)
    kept, log = nb12.train(nb12.Way("non_saturating"), game, config, 0, looks=2)
    assert all(part.isfinite().all() for weights in kept.values() for part in weights.values())
    assert log["lost"] == [200]
    assert log["step"] == [200]
    out = capsys.readouterr().out
    assert "non_saturating, seed 0: diverged (nan) before step 200 of 400" in out
    assert "last finite weights are kept. Try a lower rate than 0.001" in out
    steps.clear()
    until, _ = nb12.train(nb12.Way("non_saturating"), replace(game, steps=100), config, 0)
    for kind in kept:
        assert all(torch.equal(part, until[kind][name]) for name, part in kept[kind].items())  # those of step 100
    assert math.isfinite(log["miss"][-1][0])


def test_divergence_at_once_leaves_the_first_weights(nb12, capsys):
    game = game_of(nb12, copies=1, steps=5, draw=lambda count, draws: (torch.full((count, 2), math.nan), None))
    kept, log = nb12.train(nb12.Way("minimax"), game, small(nb12), 0)
    start, _ = game.networks(nb12.Way("minimax"), 0)
    for weights in kept.values():
        assert all(torch.equal(part, start.state_dict()[name]) for name, part in weights.items())
    assert log["lost"] == [5]
    assert "diverged (nan) before step 5 of 5" in capsys.readouterr().out


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_number_that_is_not_finite_spoils_its_copy_only(nb12, bad):
    model = nb12.MLP((2, 4, 1), [0, 1, 2])
    kept = {name: torch.zeros_like(part) for name, part in model.state_dict().items()}
    model.weights[1].data[1, 2, 0] = bad
    found, alive = nb12.keep_finite(kept, model, 3)
    assert alive.tolist() == [True, False, True]
    for name, part in model.state_dict().items():
        assert torch.equal(found[name][[0, 2]], part[[0, 2]])
        assert (found[name][1] == 0).all()
    model.weights[0].data.zero_()
    assert found["weights.0"].any()  # a copy of the weights, not the weights


def test_batch_norms_are_kept_too(nb12):
    g, _ = nb12.picture_networks(small(nb12), (1, 16, 16), "cpu", nb12.Way("minimax", norm="batch"), 0)
    kept = copy.deepcopy(g.state_dict())
    g(torch.randn(4, 6))
    found, alive = nb12.keep_finite(kept, g, 1)
    assert alive.tolist() == [True]
    assert all(torch.equal(found[name], part) and found[name].dtype == part.dtype for name, part in g.state_dict().items())


def test_divergence_of_one_copy_leaves_the_others(nb12, capsys):
    calls = []

    def draw(count, draws):
        calls.append(1)
        points, _ = nb12.draw_points(*nb12.mixture("grid"), count, draws)
        if len(calls) > 20:
            points[: count // 2] = math.nan
        return points, None

    game = game_of(nb12, copies=2, steps=40, draw=draw)
    kept, log = nb12.train(nb12.Way("relativistic", r1=0.1, r2=0.1), game, small(nb12), 0, looks=4)
    assert log["lost"] == [20, None]
    assert log["step"] == [10, 20, 30, 40]
    assert all(part.isfinite().all() for part in kept["average"].values())
    assert "diverged" not in capsys.readouterr().out
    start, _ = game.networks(nb12.Way("relativistic"), 0)
    for name, part in kept["generator"].items():
        assert not torch.equal(part[1], start.state_dict()[name][1])


def test_training_is_exactly_repeatable_whatever_the_global_generator_does(nb12):
    way, game = nb12.Way("wasserstein", slope=0.1, critic_steps=2), game_of(nb12, steps=5)
    first, _ = nb12.train(way, game, small(nb12), 3)
    torch.manual_seed(99)
    again, _ = nb12.train(way, game, small(nb12), 3)
    other, _ = nb12.train(way, game, small(nb12), 4)
    assert all(torch.equal(part, again["average"][name]) for name, part in first["average"].items())
    assert not all(torch.equal(part, other["average"][name]) for name, part in first["average"].items())


def test_each_step_sends_slopes_to_its_own_network_only(nb12, monkeypatch):
    seen, plain = [], nb12.descend
    game = game_of(nb12, copies=1, steps=2)
    networks = game.networks(nb12.Way("relativistic"), 0)

    def descend(loss, optimiser):
        for network in networks:
            network.zero_grad(set_to_none=True)
        plain(loss, optimiser)
        seen.append([any(part.grad is not None for part in network.parameters()) for network in networks])

    monkeypatch.setattr(nb12, "descend", descend)
    nb12.train(nb12.Way("relativistic", r1=1.0), replace(game, networks=lambda way, seed: networks), small(nb12), 0)
    assert seen == [[False, True], [True, False]] * 2  # D, then G


def test_longer_ways_take_more_steps(nb12):
    _, log = nb12.train(nb12.Way("minimax", longer=2.0), game_of(nb12, copies=1, steps=6), small(nb12), 0, looks=3)
    assert log["step"] == [4, 8, 12]


@pytest.mark.parametrize("how", [{"loss": "relativistic", "r1": 1.0, "r2": 1.0}, {"loss": "non_saturating", "norm": "batch"}])
def test_pictures_train_with_the_same_loop(nb12, how):
    config = small(nb12)
    pictures = torch.rand(50, 1, 16, 16) * 2 - 1, torch.arange(50) % 10
    game = nb12.picture_game(pictures, 1, config, lambda g: {"mean": float(nb12.made_pictures(g, 4)[0].mean())})
    for classes in (0, 10):
        kept, log = nb12.train(nb12.Way(**how, classes=classes), game, config, 0)
        g = nb12.with_weights(nb12.Way(**how, classes=classes), config, kept["average"], (1, 16), "cpu")
        assert float(nb12.made_pictures(g, 4)[0].mean()) == pytest.approx(log["mean"][0], abs=1e-6)
        start, _ = game.networks(nb12.Way(**how, classes=classes), 0)
        assert not torch.equal(kept["generator"]["layers.0.weight"], start.layers[0].weight)


# --- the study's own functions


def test_candidates_are_as_many_for_every_way(nb12):
    rates, weights = (1, 2, 3, 4), (0.1, 10.0)
    plain = nb12.candidates(nb12.Way("minimax"), rates, weights)
    assert [way.rate for way in plain] == [1, 2, 3, 4]
    penalised = nb12.candidates(nb12.Way("relativistic", r1=1.0), rates, weights)
    assert [(way.rate, way.r1, way.r2, way.slope) for way in penalised] == [(2, 0.1, 0, 0), (2, 10, 0, 0), (3, 0.1, 0, 0), (3, 10, 0, 0)]
    assert {way.slope for way in nb12.candidates(nb12.Way("wasserstein", slope=2.0), rates, weights)} == {0.2, 20}


def test_what_a_look_keeps_is_no_view_of_all_that_was_made(nb12):
    """A view would put all samples into the checkpoint."""
    config, draws = small(nb12), generator(2)
    g, _ = game_of(nb12, copies=2, steps=1).networks(nb12.Way("minimax"), 0)
    points = nb12.look_at_points(*nb12.mixture("ring"), 900, g)["points"]
    assert points.shape == (500, 2)
    assert points.untyped_storage().nbytes() == 4 * points.numel()
    classifier = nb12.Classifier(config, 16)
    reference = nb12.moments(torch.randn(100, config.features, generator=draws))
    g = nb12.Generator(nb12.Way("minimax"), config, (1, 16), 0)
    shots = nb12.look_at_pictures(classifier, reference, 100, g)["shots"]
    assert shots.shape == (8, 1, 16, 16)
    assert shots.untyped_storage().nbytes() == 4 * shots.numel()


def test_pace_is_of_one_step_of_the_generator_without_looks(nb12, monkeypatch):
    clock = [0.0]
    seconds_a_step = {0.1: 2.0, 0.2: 5.0}

    def train(way, game, config, seed):
        assert game.look(None) == {}
        clock[0] += seconds_a_step[way.rate] * max(1, round(game.steps * way.longer))

    def in_turns(cases, rounds, where):
        found = {}
        for name, case in cases.items():
            before = clock[0]
            case()
            found[name] = clock[0] - before
        return found

    monkeypatch.setitem(nb12.pace_of.__globals__, "train", train)
    monkeypatch.setitem(nb12.pace_of.__globals__, "seconds_in_turns", in_turns)
    ways = {"a": nb12.Way("minimax", rate=0.1, longer=0.4), "b": nb12.Way("minimax", rate=0.2)}
    game = game_of(nb12, copies=1, steps=1000, look=lambda g: {"slow": 1})
    assert nb12.pace_of(ways, game, None, "cpu") == {"a": 2.0, "b": 5.0}


def test_sheet_lays_pictures_out_by_rows(nb12):
    shown = {}
    axis = SimpleNamespace(imshow=lambda x, **how: shown.update(how, x=x), set_title=lambda text: None, axis=lambda kind: None)
    x = torch.arange(6.0).view(6, 1, 1, 1).expand(6, 1, 2, 2)
    nb12.draw_sheet(axis, x, 3, "six")
    assert shown["x"].tolist() == [[0, 0, 1, 1, 2, 2]] * 2 + [[3, 3, 4, 4, 5, 5]] * 2
    assert (shown["vmin"], shown["vmax"]) == (-1, 1)


def test_tuned_takes_the_least_of_a_quarter_of_the_steps_and_nothing_that_diverged(nb12):
    asked, values = [], {1: (0.9, None), 2: (0.1, 100), 3: (0.4, None), 4: (0.5, None)}

    def fit(way, game, config, seed):
        asked.append((game.steps, seed))
        value, lost = values[way.rate]
        return {}, {"miss": [[9.0, 9.0], [value, value]], "lost": [None, lost]}

    game = game_of(nb12, copies=2, steps=41)
    found = nb12.tuned({"a": nb12.Way("minimax", beta=0.3)}, fit, game, None, 7, "miss", (1, 2, 3, 4), (0.1, 10.0))
    assert found == {"a": nb12.Way("minimax", beta=0.3, rate=3)}
    assert asked == [(10, 7)] * 4


def test_averaged_weights_make_pictures_by_the_statistics_of_their_batch(nb12):
    """Kept statistics belong to other weights than the averaged ones."""
    config, way, modes = small(nb12), nb12.Way("non_saturating", norm="batch"), []
    pictures = torch.rand(50, 1, 16, 16) * 2 - 1, torch.arange(50) % 10
    game = nb12.picture_game(pictures, 1, config, lambda g: modes.append([part.training for part in g.modules()]) or {})
    kept, _ = nb12.train(way, game, config, 0, looks=2)
    modes.append([part.training for part in nb12.with_weights(way, config, kept["average"], (1, 16), "cpu").modules()])
    assert len(modes) == 3
    assert all(map(all, modes))


def test_at_takes_the_last_look_within_the_limit(nb12):
    log = {"miss": [3, 2, 1], "step": [1, 2, 4]}
    assert [nb12.at(log, "miss", most) for most in (0.5, 1.0, 3.9, 4.0, 9.0)] == [3, 3, 2, 1, 1]


def test_sureness_counts_right_answers_and_measures_slopes(nb12):
    game = game_of(nb12, copies=2)
    g, d = game.networks(nb12.Way("minimax"), 0)
    real, noise = torch.randn(12, 2), torch.randn(12, 2)
    found = nb12.sureness(g, d, real, noise)
    right = torch.cat([(d(real) > 0).view(2, 6), (d(g(noise)) < 0).view(2, 6)], 1).float().mean(1)
    assert found["accuracy"] == right.tolist()
    for kind, loss in (("minimax", lambda b: torch.log(1 - torch.sigmoid(b))), ("non_saturating", lambda b: -torch.log(torch.sigmoid(b)))):
        for n in range(2):
            one_g, one_d = game_of(nb12, copies=1).networks(nb12.Way("minimax"), n)
            slope = torch.autograd.grad(loss(one_d(one_g(noise[6 * n : 6 * n + 6]))).mean(), list(one_g.parameters()))
            assert found[kind][n] == pytest.approx(float(torch.cat([part.flatten() for part in slope]).norm()), rel=1e-4)


def test_stall_leaves_the_generator_alone_first(nb12):
    game = game_of(nb12, copies=1)
    found, look = nb12.stall("minimax", "SGD", 1.0, game, 0, (0, 5, 40), 0)
    assert len(found) == 3
    assert found[-1]["accuracy"][0] > found[0]["accuracy"][0]
    still = game.look(game.networks(nb12.Way("minimax"), 0)[0])
    assert look["miss"] == still["miss"]
    moved = nb12.stall("non_saturating", "Adam", 0.01, game, 3, (0, 5), 0)[1]
    assert not torch.equal(moved["points"], still["points"])
