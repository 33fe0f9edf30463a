"""Notebook 13 against foolbox, SciPy, the authors' formulas written again, explicit loops and brute force."""

import copy
import functools
import itertools
import math
from dataclasses import replace

import eagerpy
import foolbox
import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

EPS = 0.1


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small_model(dtype=torch.float32, channels=2, classes=5):
    """A network with dropout and batch norms whose running statistics are not those of its input."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), nn.Dropout(0.5), nn.Conv2d(6, 8, 3, stride=2)]
    model = nn.Sequential(*layers, nn.BatchNorm2d(8), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 9, classes)).to(dtype)
    for norm in (model[1], model[5]):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
    return model


def pictures(count, dtype=torch.float32, channels=2, classes=5):
    x = torch.rand(count, channels, 8, 8, generator=generator(1)).to(dtype)
    x[: count // 2] = x[: count // 2].round()  # black and white: the box matters
    return x, torch.arange(count) % classes


def foolboxs(attack, model, x, y, eps, targeted=False):
    """What an attack of foolbox makes of x."""
    goal = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    return attack.run(wrapped, eagerpy.astensor(x), goal(eagerpy.astensor(y)), epsilon=eps).raw


# --- the linear problem


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_steepest_has_size_one_and_gains_the_dual_norm(nb13, norm):
    slope = torch.randn(7, 2, 3, 3, dtype=torch.float64, generator=generator())
    v = nb13.steepest(slope, norm)
    size = v.flatten(1).abs().amax(1) if norm == "linf" else v.flatten(1).norm(dim=1)
    dual = slope.flatten(1).abs().sum(1) if norm == "linf" else slope.flatten(1).norm(dim=1)
    torch.testing.assert_close(size, torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close((slope * v).flatten(1).sum(1), dual)


def test_tiny_slopes_have_a_direction_and_none_has_none(nb13):
    slope = torch.tensor([[3e-30, -4e-30], [0.0, 0.0], [3e30, 4e30]]).view(3, 1, 1, 2)
    expected = torch.tensor([[0.6, -0.8], [0.0, 0.0], [0.6, 0.8]]).view(3, 1, 1, 2)
    torch.testing.assert_close(nb13.steepest(slope, "l2"), expected)
    torch.testing.assert_close(nb13.l2_sizes(slope), torch.tensor([5e-30, 0.0, 5e30]))
    assert torch.equal(nb13.steepest(slope, "linf"), slope.sign())


# --- FGSM and PGD


@pytest.mark.parametrize("eps", [0.01, 0.3])
def test_fgsm_is_foolboxs(nb13, eps):
    model = small_model().eval()
    x, y = pictures(9)
    expected = foolboxs(foolbox.attacks.FGSM(random_start=False), model, x, y, eps)
    torch.testing.assert_close(nb13.fgsm(model, x, y, eps), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("steps", "step_size"), [(1, EPS), (5, 0.03), (12, 0.25)])
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_foolboxs(nb13, steps, step_size, targeted, norm):
    model = small_model().eval()
    x, y = pictures(9)
    eps = EPS if norm == "linf" else 5 * EPS
    kind = foolbox.attacks.LinfPGD if norm == "linf" else foolbox.attacks.L2PGD
    expected = foolboxs(kind(abs_stepsize=step_size, steps=steps, random_start=False), model, x, y, eps, targeted)
    found = nb13.pgd(model, x, y, eps, step_size, steps, norm, random_start=False, targeted=targeted)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def torchattacks_pgd(model, x, y, eps, alpha, steps, start):
    """torchattacks' PGD (torchattacks/attacks/pgd.py), its loop written again."""
    x_adv = start.clone()
    for _ in range(steps):
        x_adv.requires_grad = True
        grad = torch.autograd.grad(nn.CrossEntropyLoss()(model(x_adv), y), x_adv)[0]
        x_adv = x_adv.detach() + alpha * grad.sign()
        delta = torch.clamp(x_adv - x, min=-eps, max=eps)
        x_adv = torch.clamp(x + delta, min=0, max=1).detach()
    return x_adv


def torchattacks_pgd_l2(model, x, y, eps, alpha, steps):
    """torchattacks' PGDL2, its loop written again."""
    x_adv = x.clone()
    for _ in range(steps):
        x_adv.requires_grad = True
        grad = torch.autograd.grad(nn.CrossEntropyLoss()(model(x_adv), y), x_adv)[0]
        grad = grad / (torch.norm(grad.view(len(x), -1), p=2, dim=1) + 1e-10).view(len(x), 1, 1, 1)
        delta = x_adv.detach() + alpha * grad - x
        factor = torch.min(eps / torch.norm(delta.view(len(x), -1), p=2, dim=1), torch.ones(len(x), dtype=x.dtype))
        x_adv = torch.clamp(x + delta * factor.view(-1, 1, 1, 1), min=0, max=1).detach()
    return x_adv


def test_pgd_is_torchattacks(nb13):
    model = small_model(torch.float64).eval()
    x, y = pictures(9, torch.float64)
    start = nb13.project(x + nb13.random_shift(x, EPS, "linf", generator(7)), x, EPS, "linf")
    expected = torchattacks_pgd(model, x, y, EPS, 0.03, 6, start)
    torch.testing.assert_close(nb13.pgd(model, x, y, EPS, 0.03, 6, generator=generator(7)), expected)
    expected = torchattacks_pgd_l2(model, x, y, 0.5, 0.2, 6)
    torch.testing.assert_close(nb13.pgd(model, x, y, 0.5, 0.2, 6, "l2", random_start=False), expected)


def momentum_iterative(model, x, y, eps, alpha, steps, decay):
    """torchattacks' MIFGSM (torchattacks/attacks/mifgsm.py), its loop written again."""
    momentum, x_adv = torch.zeros_like(x), x.clone()
    for _ in range(steps):
        x_adv.requires_grad = True
        grad = torch.autograd.grad(nn.CrossEntropyLoss()(model(x_adv), y), x_adv)[0]
        grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
        momentum = grad + momentum * decay
        x_adv = x_adv.detach() + alpha * momentum.sign()
        x_adv = torch.clamp(x + torch.clamp(x_adv - x, min=-eps, max=eps), min=0, max=1).detach()
    return x_adv


class Sharper(nn.Module):
    """Logits times 30: slopes change their size by orders of magnitude from step to step."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return 30 * self.model(x)


@pytest.mark.parametrize("sharp", [False, True])
@pytest.mark.parametrize("decay", [0.5, 1.0])
def test_momentum_is_torchattacks(nb13, decay, sharp):
    model = small_model(torch.float64).eval()
    model = Sharper(model) if sharp else model
    x, y = pictures(9, torch.float64)
    expected = momentum_iterative(model, x, y, EPS, 0.03, 6, decay)
    found = nb13.pgd(model, x, y, EPS, 0.03, 6, random_start=False, momentum=decay)
    torch.testing.assert_close(found, expected)
    plain = nb13.pgd(model, x, y, EPS, 0.03, 6, random_start=False)
    assert not torch.equal(found, plain)


def test_momentum_without_a_slope_stays(nb13):
    model = lambda x: torch.stack([0 * x.flatten(1).sum(1), 0 * x.flatten(1).sum(1) + 1, x[:, 0, 0, 0] * 0 - 1], 1)
    x, y = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    module = nn.Module()
    module.forward = model
    found = nb13.pgd(module, x, y, 0.1, 0.05, 3, random_start=False, momentum=1.0)
    assert torch.equal(found, x)


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("step_size", [EPS / 3, 5 * EPS])
def test_ball_and_box_hold(nb13, norm, random_start, step_size):
    x, y = pictures(20)
    x_adv = nb13.pgd(small_model().eval(), x, y, EPS, step_size, 4, norm, random_start, generator=generator())
    shift = (x_adv - x).flatten(1)
    size = shift.abs().amax(1) if norm == "linf" else shift.norm(dim=1)
    assert size.max() <= EPS + 1e-6
    assert size.min() > EPS / 5
    assert x_adv.min() >= 0
    assert x_adv.max() <= 1
    assert x_adv.shape == x.shape
    assert x_adv.dtype == x.dtype
    assert not x_adv.requires_grad


def test_projection_is_the_nearest_point_of_the_ball(nb13):
    x = torch.full((1, 1, 1, 2), 0.5, dtype=torch.float64)
    far = x + torch.tensor([0.3, 0.4]).view(1, 1, 1, 2)
    torch.testing.assert_close(nb13.project(far, x, 0.1, "l2") - x, (far - x) * 0.2)
    torch.testing.assert_close(nb13.project(far, x, 0.1, "linf") - x, torch.full_like(x, 0.1))
    torch.testing.assert_close(nb13.project(far, x, 0.9, "l2"), far)


def test_random_starts_fill_the_ball(nb13):
    x = torch.zeros(20_000, 1, 1, 3)
    shift = nb13.random_shift(x, 0.3, "linf", generator(2)).flatten(1)
    assert scipy.stats.kstest(shift[:, 0].numpy(), scipy.stats.uniform(-0.3, 0.6).cdf).pvalue > 1e-3
    shift = nb13.random_shift(x, 0.3, "l2", generator()).flatten(1)
    volume = (shift.norm(dim=1) / 0.3) ** 3  # uniform in a ball of three dimensions
    assert scipy.stats.kstest(volume.numpy(), "uniform").pvalue > 1e-3
    assert abs(shift.mean()) < 0.005


def test_random_start_is_drawn_by_the_generator(nb13):
    model = small_model().eval()
    x, y = pictures(5)
    attack = functools.partial(nb13.pgd, model, x, y, EPS, 0.001, 1)
    first, again, other = (attack(generator=generator(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().max() > EPS / 2
    assert (attack(random_start=False) - x).abs().max() < 0.002


def test_pgd_climbs_and_a_targeted_one_reaches_its_class(nb13):
    model = small_model().eval()
    x, y = pictures(20)
    loss = lambda images: F.cross_entropy(model(images), y)
    assert loss(nb13.pgd(model, x, y, EPS, EPS / 4, 10, generator=generator())) > loss(nb13.fgsm(model, x, y, EPS)) > loss(x) + 0.05
    assert loss(nb13.pgd(model, x, y, EPS, EPS / 4, 10, targeted=True, generator=generator())) < loss(x) - 0.05


@pytest.mark.parametrize("attack", ["fgsm", "pgd", "margin_pgd", "square_attack"])
def test_linear_model_worst_case(nb13, attack):
    """Every attack with gradients finds the exact worst case; Square does not exceed it."""
    w = torch.randn(64, generator=generator(2))
    x, y = torch.rand(12, 1, 8, 8, generator=generator(3)), torch.arange(12) % 2
    model = nb13.Linear(w)
    sign = (1 - 2 * y)[:, None]  # the margin is -w x for class 0, w x for class 1
    low, high = (x - EPS).clamp(min=0).flatten(1), (x + EPS).clamp(max=1).flatten(1)
    worst = -torch.maximum(sign * w * low, sign * w * high).sum(1)
    settings = {"fgsm": (), "pgd": (0.05, 8), "margin_pgd": (0.05, 8), "square_attack": (50,)}[attack]
    found = nb13.margins(model(getattr(nb13, attack)(model, x, y, EPS, *settings)), y)
    if attack == "square_attack":
        assert (found >= worst - 1e-4).all()
    else:
        torch.testing.assert_close(found, worst, atol=1e-4, rtol=0)


def test_slopes_of_sure_pictures_do_not_vanish_in_a_large_batch(nb13):
    """A mean over the batch would divide slopes near the smallest number of half precision until they are 0."""
    model = nb13.Linear(torch.full((4,), -10.0).half())
    x = torch.full((4096, 1, 2, 2), 0.28).half()
    y = torch.zeros(4096, dtype=torch.long)
    assert (nb13.loss_slope(model, x, y) != 0).all()
    assert (nb13.fgsm(model, x, y, EPS) < x).all()


def attacks(nb13):
    """Every public attack, as functions of (model, x, y)."""
    return [
        lambda model, x, y: nb13.fgsm(model, x, y, EPS),
        lambda model, x, y: nb13.pgd(model, x, y, EPS, 0.05, 2),
        lambda model, x, y: nb13.pgd(model, x, y, EPS, 0.05, 2, "l2", targeted=True),
        lambda model, x, y: nb13.margin_pgd(model, x, y, EPS, 0.05, 2),
        lambda model, x, y: nb13.square_attack(model, x, y, EPS, 5),
    ]


@pytest.mark.parametrize("number", range(5))
def test_an_attack_leaves_the_model_alone(nb13, number):
    model = small_model().train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    x, y = pictures(6)
    F.cross_entropy(model(x), y).backward()
    state = copy.deepcopy(model.state_dict())
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [part.training for part in model.modules()]
    before, needs = x.clone(), [p.requires_grad for p in model.parameters()]
    attacks(nb13)[number](model, x, y)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert [part.training for part in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == needs
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        assert (parameter.grad is None) if grad is None else torch.equal(parameter.grad, grad)
    assert torch.equal(x, before)
    assert not x.requires_grad


def test_mode_returns_after_an_error_and_no_grad_is_no_obstacle(nb13):
    model = small_model().train()
    x, y = pictures(4)
    with pytest.raises(RuntimeError):
        nb13.fgsm(model, x[:, :1], y, EPS)
    assert model.training
    with torch.no_grad():
        inside = nb13.pgd(model, x, y, EPS, 0.05, 3, random_start=False)
    torch.testing.assert_close(inside, nb13.pgd(model, x, y, EPS, 0.05, 3, random_start=False))
    assert torch.is_grad_enabled()


def test_attack_sees_the_model_in_evaluation_mode(nb13):
    x, y = pictures(6)
    training, evaluating = small_model().train(), small_model().eval()
    for attack in (nb13.fgsm, functools.partial(nb13.square_attack, queries=20)):
        torch.testing.assert_close(attack(training, x, y, eps=EPS), attack(evaluating, x, y, eps=EPS))


@pytest.mark.parametrize("number", range(5))
def test_bad_input_says_what_to_do(nb13, number):
    attack = attacks(nb13)[number]
    model = small_model().eval()
    x, y = pictures(6)
    for bad in (x * 255, x - 0.5, x + math.nan):
        with pytest.raises(ValueError, match="normalisation into the model"):
            attack(model, bad, y)
    with pytest.raises(TypeError, match="255"):
        attack(model, (x * 255).byte(), y)
    with pytest.raises(ValueError, match=r"\(N, C, H, W\)"):
        attack(model, x[0], y)
    for bad in (y + 1, y - 1):
        with pytest.raises(ValueError, match="with 5 classes they are 0 to 4"):
            attack(model, x, bad)
    for bad in (y[:4], y.float(), F.one_hot(y, 5)):
        with pytest.raises(ValueError, match="labels are whole numbers"):
            attack(model, x, bad)
    with pytest.raises(ValueError, match="leave out its softmax"):
        attack(nn.Sequential(model, nn.Softmax(1)).eval(), x, y)
    with pytest.raises(ValueError, match=r"logits \(N, K\)"):
        attack(nn.Sequential(model, nn.Unflatten(1, (5, 1))).eval(), x, y)
    attack(nn.Sequential(model, nn.LogSoftmax(1)).eval(), x, y)  # these are logits


@pytest.mark.parametrize("values", [(0.0, 0.0), (0.25, 0.25), (3.0, 0.0), (-1.0, 2.0)])
def test_logits_that_are_no_probabilities_are_taken(nb13, values):
    nb13.check_answers(torch.tensor([values, values]), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="probabilities"):
        nb13.check_answers(torch.tensor([[0.25, 0.75], [1.0, 0.0]]), torch.tensor([0, 1]))


@pytest.mark.parametrize("eps", [0.0, -0.1, math.nan])
def test_eps_has_to_be_positive(nb13, eps):
    x, y = pictures(4)
    for attack in (nb13.fgsm, functools.partial(nb13.pgd, step_size=0.1, steps=1), functools.partial(nb13.square_attack, queries=1)):
        with pytest.raises(ValueError, match="eps is"):
            attack(small_model(), x, y, eps=eps)


def test_pgd_refuses_norms_and_steps_without_sense(nb13):
    x, y = pictures(4)
    attack = functools.partial(nb13.pgd, small_model(), x, y, EPS)
    with pytest.raises(ValueError, match="'l1': it takes one of linf, l2"):
        attack(0.1, 1, "l1")
    for step_size, steps in ((0.0, 3), (-0.1, 3), (0.1, 0), (0.1, 1.5), (math.nan, 1)):
        with pytest.raises(ValueError, match=f"1 or more, step_size above 0.*not {steps}, {step_size}"):
            attack(step_size, steps)
    for momentum in (-0.1, math.nan):
        with pytest.raises(ValueError, match="momentum from 0 on"):
            attack(0.1, 1, momentum=momentum)


def test_no_pictures_are_no_error(nb13):
    x, y = pictures(4)
    for attack in attacks(nb13):
        assert attack(small_model().eval(), x[:0], y[:0]).shape == (0, 2, 8, 8)


# --- margins and Square


def test_margins_by_a_loop(nb13):
    logits, y = torch.randn(9, 4, generator=generator()), torch.arange(9) % 4
    expected = [float(row[label] - max(v for k, v in enumerate(row.tolist()) if k != label)) for row, label in zip(logits, y, strict=True)]
    torch.testing.assert_close(nb13.margins(logits, y), torch.tensor(expected))
    assert torch.equal(nb13.margins(logits, y) > 0, logits.argmax(1) == y)


def test_margin_pgd_lowers_margins_more_than_noise(nb13):
    model = small_model().eval()
    x, y = pictures(12)
    y = model(x).argmax(1)
    margins = lambda images: nb13.margins(model(images), y)
    found = margins(nb13.margin_pgd(model, x, y, EPS, 0.03, 10, generator()))
    assert (found < margins((x + EPS * torch.randn_like(x).sign()).clamp(0, 1))).all()


def p_selection(p_init, it, n_iters):
    """The schedule of the authors' code (max-andr/square-attack, attack.py)."""
    it = int(it / n_iters * 10000)
    ends = ((10, 50, 2), (50, 200, 4), (200, 500, 8), (500, 1000, 16), (1000, 2000, 32), (2000, 4000, 64), (4000, 6000, 128))
    for low, high, factor in (*ends, (6000, 8000, 256), (8000, 10000, 512)):
        if low < it <= high:
            return p_init / factor
    return p_init


@pytest.mark.parametrize("queries", [7, 300, 5000, 10_000])
@pytest.mark.parametrize("height", [8, 28, 32])
def test_schedule_is_the_authors(nb13, queries, height):
    for query in range(queries):
        expected = round(np.sqrt(p_selection(0.8, query, queries) * height**2))
        assert nb13.square_side(query, queries, height**2) == max(1, expected)


def test_squares_are_one_for_each_picture_and_come_everywhere(nb13):
    x = torch.zeros(6000, 3, 5, 7)
    inside, signs = nb13.random_squares(x, 3, generator())
    assert inside.shape == (6000, 1, 5, 7)
    assert signs.shape == (6000, 3, 1, 1)
    assert (inside.sum((1, 2, 3)) == 9).all()
    corners = [tuple(one[0].nonzero().min(0).values.tolist()) for one in inside]
    ends = [tuple(one[0].nonzero().max(0).values.tolist()) for one in inside]
    assert all((a + 2, b + 2) == end for (a, b), end in zip(corners, ends, strict=True))
    counts = [corners.count(place) for place in itertools.product(range(3), range(5))]
    assert sum(counts) == 6000
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    combinations = (signs.flatten(1) > 0).long() @ torch.tensor([1, 2, 4])
    assert scipy.stats.chisquare(combinations.bincount(minlength=8)).pvalue > 1e-3
    assert set(signs.unique().tolist()) == {-1.0, 1.0}


def test_proposals_change_the_square_only_and_always_something(nb13):
    x = torch.rand(50, 1, 6, 6, generator=generator()) * 0.5 + 0.25
    inside, signs = nb13.random_squares(x, 2, generator(1))
    trial = nb13.propose(x, x, inside, EPS * signs)
    torch.testing.assert_close(trial, torch.where(inside, x + EPS * signs, x))
    again = nb13.propose(x, trial, inside, EPS * signs)  # the same once more would ask nothing new
    torch.testing.assert_close(again, torch.where(inside, x - EPS * signs, x))


class Recorder(nn.Module):
    """A model that remembers what it was asked."""

    def __init__(self, model):
        super().__init__()
        self.model, self.seen = model, []

    def forward(self, x):
        self.seen.append(x.clone())
        return self.model(x)


def test_square_never_raises_the_margin_and_counts_queries(nb13):
    model = small_model().eval()
    x, y = pictures(30)
    y = torch.where(torch.arange(30) % 3 > 0, model(x).argmax(1), y)
    before, last = nb13.margins(model(x), y), None
    for queries in (1, 5, 40, 200):
        recorder = Recorder(model)
        x_adv, used = nb13.square_search(recorder, x, y, EPS, queries, seed=3)
        margins = nb13.margins(model(x_adv), y)
        assert (margins <= before + 1e-6).all()
        assert torch.equal(margins < 0, used.isfinite())
        assert torch.equal(used == 0, before < 0)
        assert used[used.isfinite()].max() <= queries
        asked = sum(len(part) for part in recorder.seen) - 4 - 30  # less the check, and the pictures as they are
        assert asked == int(used.clamp(max=queries).sum())
        assert (x_adv - x).abs().max() <= EPS + 1e-6
        assert x_adv.min() >= 0
        assert x_adv.max() <= 1
        wrong = int((margins < 0).sum())
        assert last is None or wrong >= last
        last = wrong
    assert wrong > int((before < 0).sum()) + 5
    assert torch.equal(x_adv[before < 0], x[before < 0])


def test_square_keeps_the_best_of_what_it_asked(nb13):
    """With one picture: the margin of the result is the lowest of all queries, and each query changes one square of the best before."""
    model = small_model().eval()
    x, _ = pictures(3)
    x = x[2:]
    y = model(x).argmax(1)
    model.state_dict()["8.bias"][y] += 20  # too sure to fall
    recorder = Recorder(model)
    x_adv, used = nb13.square_search(recorder, x, y, EPS, 60)
    assert used.isinf().all()
    asked = recorder.seen[2:]  # after the check and the picture as it is
    assert len(asked) == 60
    margins = [nb13.margins(model(part), y).item() for part in asked]
    assert nb13.margins(model(x_adv), y).item() == pytest.approx(min(margins), abs=1e-5)
    best = 0
    for number in range(1, 60):
        rows, columns = (asked[number] != asked[best])[0].any(0).nonzero(as_tuple=True)
        side = nb13.square_side(number - 1, 60, 64)
        assert rows.max() - rows.min() < min(side, 8)
        assert columns.max() - columns.min() < min(side, 8)
        best = number if margins[number] < margins[best] else best
    stripes = (asked[0] - x).sign()
    assert (stripes.abs().sum(2) > 0).any()
    inner = (x > EPS) & (x < 1 - EPS)
    torch.testing.assert_close((asked[0] - x)[inner].abs(), torch.full((int(inner.sum()),), EPS))
    assert all(len(set(stripes[0, c, :, w][inner[0, c, :, w]].tolist())) <= 1 for c in range(2) for w in range(8))


def test_square_follows_the_schedule_from_its_beginning(nb13, monkeypatch):
    asked = []
    monkeypatch.setitem(nb13.square_search.__globals__, "square_side", lambda *numbers: asked.append(numbers) or 3)
    model = nb13.Linear(torch.zeros(64))
    model.w.data[0] = -1e3  # never falls
    x = torch.full((2, 1, 8, 8), 0.5)
    nb13.square_attack(model, x, torch.zeros(2).long(), EPS, 6)
    assert asked[:5] == [(number, 6, 64) for number in range(5)]


def test_square_draws_by_its_seed(nb13):
    model = small_model().eval()
    x, y = pictures(8)
    first, again, other = (nb13.square_attack(model, x, y, EPS, 30, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# --- defence


@pytest.mark.parametrize("beta", [0.0, 1.0, 6.0])
def test_trades_loss_is_the_authors_and_its_gradient_goes_through_both(nb13, beta):
    model = small_model(torch.float64).eval()
    x, y = pictures(6, torch.float64)
    x_adv = (x + 0.1 * torch.randn(x.shape, generator=generator()).double()).clamp(0, 1)
    criterion = nn.KLDivLoss(reduction="sum")  # as in trades.py
    robust = criterion(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1)) / len(x)
    expected = F.cross_entropy(model(x), y) + beta * robust
    found = nb13.trades_loss(model, x, y, x_adv, beta)
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, list(model.parameters())) for loss in (found, expected)]
    for ours, theirs in zip(*slopes, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_trades_loss_by_hand(nb13):
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 2, bias=False))
    model[1].weight.data = torch.eye(2)
    x, x_adv = torch.tensor([[1.0, 0.0]]).view(1, 1, 1, 2), torch.tensor([[0.0, 0.0]]).view(1, 1, 1, 2)
    p = math.e / (1 + math.e)
    expected = -math.log(p) + 3 * (p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)))
    assert nb13.trades_loss(model, x, torch.tensor([0]), x_adv, 3.0).item() == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="beta"):
        nb13.trades_loss(model, x, torch.tensor([0]), x_adv, -1.0)


@pytest.fixture
def trained(nb13):
    """A network of the notebook, digits of noise, their labels and the settings."""
    config = nb13.Config(filters=4, batch_size=10, steps=6, eps=0.3, attack_steps=3, ramp=0.5)
    x = torch.rand(40, 1, 28, 28, generator=generator(4))
    return nb13.Network(config, 1), x, torch.arange(40) % 10, config


def test_shifts_of_the_ways_to_train(nb13, trained):
    model, x, y, config = trained
    x = 0.4 + 0.2 * x  # no pixel meets the box
    shift = lambda way: way(model, x, y, 0.3, config, generator()) - x
    slope = nb13.loss_slope(model, x, y)
    assert shift(nb13.no_attack).abs().max() == 0
    noise = shift(nb13.noise)
    torch.testing.assert_close(noise.abs(), torch.full_like(x, 0.3))
    assert scipy.stats.binomtest(int((noise > 0).sum()), noise.numel()).pvalue > 1e-3
    torch.testing.assert_close(shift(nb13.one_step), 0.3 * slope.sign(), atol=1e-6, rtol=0)
    for way in (nb13.fast, nb13.many_steps, nb13.divergent):
        assert shift(way).abs().max() <= 0.3 + 1e-6
    expected = nb13.pgd(model, x, y, 0.3, 0.075, 3, generator=generator()) - x
    torch.testing.assert_close(shift(nb13.many_steps), expected)


def test_linear_form_is_proportional_to_the_slope_and_as_long_as_the_signs(nb13, trained):
    model, x, y, config = trained
    x, eps = 0.5 + 0 * x + 0.01 * x, 1e-3
    shift = nb13.linear(model, x, y, eps, config, None) - x
    slope = nb13.loss_slope(model, x, y)
    ratio = (shift * slope).flatten(1).sum(1) / slope.square().flatten(1).sum(1)
    torch.testing.assert_close(ratio, ratio.mean().expand(40), rtol=1e-2, atol=0)
    assert ratio.mean() > 0
    assert shift.flatten(1).norm(dim=1).mean() == pytest.approx(eps * 28, rel=1e-2)


def test_fast_attack_is_the_authors(nb13, trained):
    """fast_adversarial/MNIST/train_mnist.py, its lines written again."""
    model, x, y, config = trained
    draw = 2 * torch.rand(x.shape, generator=generator(5)) - 1
    delta = (0.3 * draw).requires_grad_()
    F.cross_entropy(model(x + delta), y).backward()
    stepped = torch.clamp(delta + 0.375 * torch.sign(delta.grad), -0.3, 0.3).detach()
    stepped = torch.max(torch.min(1 - x, stepped), 0 - x)
    model.zero_grad()
    torch.testing.assert_close(nb13.fast(model, x, y, 0.3, config, generator(5)), x + stepped, atol=1e-6, rtol=0)


def test_attack_of_trades_is_the_authors(nb13, trained):
    """trades.py, the l-infinity branch, its lines written again."""
    model, x, y, config = trained
    x_adv = x + 0.001 * torch.randn(x.shape, generator=generator(6))
    for _ in range(config.attack_steps):
        x_adv.requires_grad_()
        loss = nn.KLDivLoss(reduction="sum")(F.log_softmax(model(x_adv), dim=1), F.softmax(model(x), dim=1))
        grad = torch.autograd.grad(loss, [x_adv])[0]
        x_adv = x_adv.detach() + 0.075 * torch.sign(grad.detach())
        x_adv = torch.clamp(torch.min(torch.max(x_adv, x - 0.3), x + 0.3), 0, 1)
    torch.testing.assert_close(nb13.divergent(model, x, y, 0.3, config, generator(6)), x_adv, atol=1e-6, rtol=0)


def test_schedule_rises_and_falls(nb13):
    values = [nb13.schedule(n / 100) for n in range(101)]
    assert values[0] == values[-1] == pytest.approx(0)
    assert values[30] == pytest.approx(1)
    assert values[15] == pytest.approx(0.5)
    assert values[65] == pytest.approx(0.5)
    assert max(values) <= 1 + 1e-12


def test_network_starts_from_its_seed_like_pytorchs(nb13, trained):
    _, x, _, config = trained
    first, again, other = (nb13.Network(config, seed)(x) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for layer in nb13.Network(config, 3).layers:
        if hasattr(layer, "weight"):
            bound = 1 / math.sqrt(layer.weight[0].numel())
            assert 0.9 * bound < layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() <= bound
            assert layer.bias.abs().max() > 0


def test_network_normalises_inside(nb13, trained):
    model, x, _, _ = trained
    torch.testing.assert_close(model(x), model.layers((x - 0.13) / 0.31))
    config = nb13.Config(filters=4, shape=(3, 32, 32), pixels=(0.5, 0.2))
    photos, network = torch.rand(2, 3, 32, 32, generator=generator(1)), nb13.Network(config)
    torch.testing.assert_close(network(photos), network.layers((photos - 0.5) / 0.2))
    assert network(photos).shape == (2, 10)
    oblong = nb13.Config(filters=4, shape=(2, 32, 20))
    assert nb13.Network(oblong)(torch.rand(1, 2, 32, 20)).shape == (1, 10)


def test_training_is_the_four_steps(nb13, trained, monkeypatch):
    """By a loop of its own: batches without repeats, the growing eps, the attack, the loss at x', Adam with the schedule."""
    _, x, y, config = trained
    way = nb13.Way(nb13.one_step, 2, learning_rate=0.01)
    weights, log = nb13.train(way, config, (x, y), (x[:5], y[:5]), 3, 2)
    model, draws = nb13.Network(config, 3), generator(3)
    optimiser = torch.optim.Adam(model.parameters())
    looks = []
    for step in range(1, 7):
        if step in (1, 5):
            order = torch.randperm(40, generator=draws)
        batch, order = order[:10], order[10:]
        x_adv = nb13.fgsm(model, x[batch], y[batch], 0.3 * min(1, step / 3))
        optimiser.param_groups[0]["lr"] = 0.01 * nb13.schedule(step / 7)
        optimiser.zero_grad()
        F.cross_entropy(model(x_adv), y[batch]).backward()
        optimiser.step()
        if step in (3, 6):
            looks.append(nb13.look(model, x[:5], y[:5], config))
    for name, value in model.state_dict().items():
        torch.testing.assert_close(weights[name], value)
    assert log["step"] == [3, 6]
    assert [log[name] for name in ("clean", "FGSM", "PGD")] == [[one[name] for one in looks] for name in ("clean", "FGSM", "PGD")]
    assert log["seconds"] > 0


def test_longer_and_another_loss_are_taken(nb13, trained):
    _, x, y, config = trained
    judges = x[:5], y[:5]
    longer = nb13.train(nb13.Way(nb13.no_attack, 1, longer=2.0), config, (x, y), judges, 0, 4)[1]
    assert longer["step"] == [3, 6, 9, 12]
    plain = nb13.Way(nb13.noise, 1)
    trades = nb13.Way(nb13.noise, 1, functools.partial(nb13.trades_loss, beta=5.0))
    first, second = (nb13.train(way, config, (x, y), judges, 0)[0] for way in (plain, trades))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    for beta in (1.0, 6.0):
        ways = nb13.defences(4, beta)
        assert ways["TRADES-4"].loss.keywords == {"beta": beta}
        assert ways["TRADES-4"].loss.func is nb13.trades_loss
        assert [way.passes for way in ways.values()] == [1, 1, 2, 2, 2, 5, 7]
    assert list(nb13.WAYS) == list(nb13.defences(nb13.Config().attack_steps, 1.0))


def test_look_counts_what_is_right(nb13, trained):
    model, x, y, config = trained
    found = nb13.look(model, x, y, config)
    attacked = {
        "clean": x,
        "FGSM": nb13.fgsm(model, x, y, 0.3),
        "PGD": nb13.pgd(model, x, y, 0.3, 0.075, 3, generator=generator()),
    }
    for name, images in attacked.items():
        assert found[name] == pytest.approx(100 * float((model(images).argmax(1) == y).float().mean()))


def test_look_attacks_harder_than_the_training(nb13, trained, monkeypatch):
    model, x, y, config = trained
    seen = []
    monkeypatch.setitem(nb13.look.__globals__, "pgd", lambda model, x, y, *how, generator: seen.append(how) or x)
    nb13.look(model, x, y, config)
    assert seen == [(0.3, pytest.approx(0.03), 15)]


def test_right_goes_through_all_parts(nb13, trained):
    model, x, y, _ = trained
    assert torch.equal(nb13.right(model, x, y, size=7), model(x).argmax(1) == y)


# --- the study


def test_survivors_are_attacked_only_where_alive(nb13, trained):
    model, x, y, _ = trained
    y = model(x).argmax(1)
    alive = torch.arange(40) % 2 == 0
    seen = []

    def attack(_, images, labels):
        seen.append(len(images))
        return torch.where((torch.arange(len(images)) < 5)[:, None, None, None], images, 1 - images)

    left = nb13.survivors(model, attack, x, y, alive)
    assert seen == [20]
    assert not left[~alive].any()
    assert left[:10:2].all()
    assert torch.equal(left[alive][5:], model(1 - x[alive][5:]).argmax(1) == y[alive][5:])
    assert not nb13.survivors(model, attack, x, y, alive & False).any()
    assert seen == [20]


def test_battery_is_its_attacks(nb13, trained):
    model, x, y, config = trained
    config = replace(config, eps=0.02)  # some fall, some stand
    answers = model(x).argmax(1)
    y = torch.where(torch.arange(40) < 35, answers, (answers + 1) % 10)
    moved = [(x + 0.3).clamp(0, 1), (x - 0.3).clamp(0, 1)]
    found = nb13.battery(model.state_dict(), config, (x, y), moved, 2, 2, 20)
    draws, alive = generator(2), after_part(model, x, y)
    assert torch.equal(found["clean"], alive)
    steps = {"step_size": 0.002, "steps": 2, "generator": draws}
    attacks = {
        "FGSM": lambda *part: nb13.fgsm(*part, 0.02),
        "PGD": lambda *part: nb13.pgd(*part, 0.02, **steps),
        "restart": lambda *part: nb13.pgd(*part, 0.02, **steps),
        "margin": lambda *part: nb13.margin_pgd(*part, 0.02, **steps),
        "targeted": lambda *part: nb13.towards_second(*part, eps=0.02, **steps),
        "Square": lambda *part: nb13.square_attack(*part, 0.02, 20, seed=2),
    }
    for name, attack in attacks.items():
        part, indices = (x[alive], y[alive]), alive.nonzero()[:, 0]
        stand = after_part(model, attack(model, *part), part[1])
        alive = torch.zeros(40, dtype=torch.bool)
        alive[indices[stand]] = True
        assert torch.equal(found[name], alive), name
    last = alive & after_part(model, moved[0], y) & after_part(model, moved[1], y)
    assert torch.equal(found["transfer"], last)
    assert list(found) == ["clean", *attacks, "transfer"]
    assert 0 < found["margin"].sum() < found["clean"].sum()


def test_each_attack_goes_on_where_the_last_left_off(nb13, trained, monkeypatch):
    model, x, y, config = trained
    seen = []

    def survivors(model, attack, x, y, alive):
        """Each attack takes one more picture away."""
        seen.append((attack.func.__name__, alive.clone()))
        left = alive.clone()
        left[len(seen)] = False
        return left

    monkeypatch.setitem(nb13.battery.__globals__, "survivors", survivors)
    y = model(x).argmax(1)
    found = nb13.battery(model.state_dict(), config, (x, y), [x, x.roll(1, 0)], 0, 2, 2)
    assert [name for name, _ in seen] == ["fgsm", "pgd", "pgd", "margin_pgd", "towards_second", "square_attack"]
    assert [int((~alive).sum()) for _, alive in seen] == [0, 1, 2, 3, 4, 5]
    moved = after_part(model, x.roll(1, 0), y)
    assert torch.equal(found["transfer"], found["Square"] & moved)


def test_second_class_is_asked_for(nb13, trained, monkeypatch):
    model, x, _, _ = trained
    y = model(x).topk(3).indices[:, 1]  # wrong pictures too: the strongest other class is then the first
    goals = []
    monkeypatch.setitem(nb13.towards_second.__globals__, "pgd", lambda model, x, goal, **how: goals.append((goal, how)) or x)
    nb13.towards_second(model, x, y, eps=0.1)
    nb13.towards_second(model, x, model(x).argmax(1), eps=0.1)
    assert torch.equal(goals[0][0], model(x).argmax(1))
    assert torch.equal(goals[1][0], y)
    assert goals[0][1] == {"targeted": True, "eps": 0.1}


def test_pictures_for_transfer_are_pgds(nb13, trained):
    model, x, y, config = trained
    for momentum in (0.0, 1.0):
        expected = nb13.pgd(model, x, y, 0.3, 0.03, 2, generator=generator(0), momentum=momentum)
        assert torch.equal(nb13.attacked_by(model.state_dict(), config, (x, y), 2, momentum), expected)


def after_part(model, images, y):
    return model(images).argmax(1) == y


def test_best_rate_is_chosen_by_clean_and_robust_accuracy(nb13):
    scores = {0.005: (90, 1), 0.01: (60, 40), 0.02: (50, 49)}
    tried = []

    def fit(way, *rest):
        tried.append((way.learning_rate, way.longer, rest))
        clean, robust = scores[way.learning_rate]
        return None, {"clean": [0, clean], "PGD": [99, robust if rest[-1] == 7 else robust - way.learning_rate]}

    ways = {"a": nb13.Way(None, 1), "b": nb13.Way(None, 1, longer=2.0)}
    chosen = nb13.with_best_rate(ways, fit, (7, 8), "rest")
    assert {name: (way.learning_rate, way.longer) for name, way in chosen.items()} == {"a": (0.01, 1), "b": (0.01, 2)}
    expected = itertools.product(nb13.RATES, (1.0, 2.0), (("rest", 7), ("rest", 8)))
    assert sorted(tried) == sorted(expected)


def test_best_rate_is_that_with_the_best_worse_seed(nb13):
    found = {(0.005, 0): 100, (0.005, 1): 0, (0.01, 0): 60, (0.01, 1): 55, (0.02, 0): 50, (0.02, 1): 110}
    fit = lambda way, seed: (None, {"clean": [found[way.learning_rate, seed]], "PGD": [0]})
    assert nb13.with_best_rate({"a": nb13.Way(None, 1)}, fit, (0, 1))["a"].learning_rate == 0.01


def test_masked_networks_answer_alike_and_hide_their_slopes(nb13, trained):
    model, x, y, _ = trained
    y = model(x).argmax(1)
    rounded = (x * 7).round() / 7
    hidden, through = nb13.Masked(model, **nb13.MASKS["quantised"]), nb13.Masked(model, 8, through=True)
    torch.testing.assert_close(hidden(x), model(rounded))
    torch.testing.assert_close(through(x), model(rounded), atol=1e-5, rtol=1e-5)
    assert nb13.loss_slope(hidden, x, y).abs().max() == 0
    torch.testing.assert_close(nb13.loss_slope(through, x, y), nb13.loss_slope(model, rounded, y), atol=1e-5, rtol=1e-3)
    saturated = nb13.Masked(model, scale=1e6)
    torch.testing.assert_close(saturated(x), 1e6 * model(x))
    assert nb13.loss_slope(saturated, x, y).abs().max() == 0
    assert nb13.MASKS["saturated"] == {"scale": 1000.0}
    torch.testing.assert_close(nb13.Masked(model)(x), model(x))


def test_checklist_tells_the_masked_from_the_plain(nb13, trained):
    model, x, y, config = trained
    y = model(x).argmax(1)
    sizes = (0.01, 0.3)
    check = functools.partial(
        nb13.checklist,
        weights=model.state_dict(),
        config=config,
        pictures=(x, y),
        transferred={"as it is": x, "turned": 1 - x},
        seed=0,
        steps=6,
        queries=10,
        sizes=sizes,
    )
    plain, curve = check(mask=None)
    quantised, _ = check(mask="quantised")
    assert plain["clean"] == plain["as it is"] == 100
    assert plain["turned"] == pytest.approx(100 * float(after_part(model, 1 - x, y).float().mean()))
    assert plain["PGD"] == plain["margin"] == 0
    assert "through" not in plain
    assert plain["gradient is 0"] == 0
    assert curve[0] > curve[1] == 0
    assert quantised["gradient is 0"] == 100
    assert quantised["PGD"] > quantised["through"] + 20
    saturated, _ = check(mask="saturated")
    assert saturated["margin"] == 0


def test_checklist_counts_what_was_right_and_goes_on_with_what_is_left(nb13, trained):
    model, x, y, config = trained
    config, answers = replace(config, eps=0.02), model(x).argmax(1)
    y = torch.where(torch.arange(40) < 30, answers, (answers + 1) % 10)
    likely = nb13.pgd(model, x, y, 1.0, 0.1, 20, targeted=True, generator=generator(8))
    moved = {"likely": likely, "as it is": x}
    found, curve = nb13.checklist(model.state_dict(), config, None, (x, y), moved, 3, 2, 5, (0.01, 0.02))
    draws, clean = generator(3), answers == y

    def after(alive, eps=0.02, steps=2):
        left = torch.zeros(40, dtype=torch.bool)
        x_adv = nb13.pgd(model, x[alive], y[alive], eps, eps / 10, steps, generator=draws)
        left[alive] = after_part(model, x_adv, y[alive])
        return left

    left, longer = after(clean), after(clean, steps=8)
    share = lambda mask: 100 * float(mask.float().mean())
    assert found["PGD"] == share(left)
    assert found["4 times the steps"] == share(longer)
    for _ in range(4):
        left = after(left)
    assert 0 < found["5 starts"] == share(left)
    assert found["5 starts"] < found["PGD"] < found["clean"] == found["as it is"] == 75
    likely_right = after_part(model, likely, y)
    assert found["likely"] == share(clean & likely_right) < share(likely_right)
    nb13.margin_pgd(model, x[clean], y[clean], 0.02, 0.002, 2, draws)  # takes as many draws
    assert curve == [share(after(clean, size, 1)) for size in (0.01, 0.02)]


def test_substitute_learns_from_the_victims_answers(nb13, trained, monkeypatch):
    model, x, y, config = trained
    answers = model(x).argmax(1)
    asked = torch.rand(30, 1, 28, 28, generator=generator(9))
    seen = {}

    def train(way, settings, pictures, judges, seed):
        seen.update(labels=pictures[1], images=pictures[0], steps=settings.steps, seed=seed, attack=way.attack)
        return model.state_dict(), None

    attack, how = nb13.pgd, {}
    monkeypatch.setitem(nb13.by_substitute.__globals__, "train", train)
    monkeypatch.setitem(nb13.by_substitute.__globals__, "pgd", lambda *given, **named: how.update(named) or attack(*given, **named))
    y = torch.where(torch.arange(40) < 20, answers, (answers + 1) % 10)
    found = nb13.by_substitute(model.state_dict(), config, asked, (x, y), 5, 7)
    assert torch.equal(seen["labels"], model(asked).argmax(1))
    assert seen["images"] is asked
    assert seen["steps"] == 7
    assert seen["seed"] != 5
    assert seen["attack"] is nb13.no_attack
    assert how["momentum"] == 1  # which carries over to other networks better
    moved = attack(model, x, y, 0.3, 0.075, 3, generator=generator(5), momentum=1.0)
    wrong = (model(moved).argmax(1) != y)[:20]
    assert found == pytest.approx(100 * float(wrong.float().mean()))


def test_queries_are_of_pictures_that_were_right(nb13, trained):
    model, x, _, config = trained
    answers = model(x).argmax(1)
    y = torch.where(torch.arange(40) < 25, answers, (answers + 1) % 10)
    used = nb13.queries_until_wrong(model.state_dict(), config, (x, y), 1, 10)
    assert len(used) == 25
    assert (used >= 1).all()


# --- smoothing


def test_bound_is_clopper_pearsons(nb13):
    for n, k, alpha in ((10, 7, 0.05), (1000, 990, 0.001), (50, 0, 0.01), (20, 20, 0.01)):
        expected = scipy.stats.beta.ppf(alpha, k, n - k + 1) if k else 0.0
        assert nb13.lower_bound(k, n, alpha) == pytest.approx(expected, abs=1e-9)


def test_radius_is_cohens(nb13):
    counts = [3, 990, 7]
    low = scipy.stats.beta.ppf(0.001, 990, 11)
    winner, radius = nb13.smoothed_radius(counts, 1000, 0.25, 0.001, chosen=1)
    assert winner == 1
    assert radius == pytest.approx(0.25 * scipy.stats.norm.ppf(low))
    halved = nb13.smoothed_radius(counts, 1000, 0.25, 0.001)
    assert halved == (1, pytest.approx(0.25 * scipy.stats.norm.ppf(scipy.stats.beta.ppf(0.0005, 990, 11))))
    assert nb13.smoothed_radius(torch.tensor(counts), 1000, 0.25, 0.001, chosen=2) == (None, 0.0)
    assert nb13.smoothed_radius(np.array([500, 500]), 1000, 0.25, 0.001) == (None, 0.0)


def test_radius_caps_of_the_literature(nb13):
    for n, most in ((1000, 2.46), (100_000, 3.81)):
        assert nb13.smoothed_radius([n, 0], n, 1.0, 0.001, chosen=0)[1] == pytest.approx(most, abs=0.01)


def test_one_sample_that_chooses_and_counts_is_wrong_at_most_alpha(nb13):
    """Two classes of 1/2: no certificate is true, and each may win the vote."""
    alpha, draws = 0.1, np.random.default_rng(0).binomial(101, 0.5, 4000)
    certified = {int(k): nb13.smoothed_radius([k, 101 - k], 101, 1.0, alpha)[0] is not None for k in set(draws)}
    wrong = np.mean([certified[int(k)] for k in draws])
    assert wrong <= alpha + 3 * math.sqrt(alpha * (1 - alpha) / 4000)
    assert wrong > alpha / 4


@pytest.mark.parametrize(
    ("counts", "n", "sigma", "alpha", "said"),
    [
        ([5, 4], 10, 1.0, 0.01, "are not 10 votes"),
        ([11, -1], 10, 1.0, 0.01, "are not 10 votes"),
        ([0, 0], 0, 1.0, 0.01, "are not 0 votes"),
        ([9, 1], 10, 0.0, 0.01, "sigma > 0"),
        ([9, 1], 10, 1.0, 0.0, "0 < alpha < 1"),
        ([9, 1], 10, 1.0, 1.0, "0 < alpha < 1"),
    ],
)
def test_votes_without_sense(nb13, counts, n, sigma, alpha, said):
    with pytest.raises(ValueError, match=said):
        nb13.smoothed_radius(counts, n, sigma, alpha)


def test_votes_are_of_noisy_copies(nb13):
    """A linear model: the share of votes is a normal probability."""
    w = torch.zeros(100)
    w[0] = 1.0

    class Two(nn.Module):
        def forward(self, x):
            logit = x.flatten(1) @ w - 1.1  # beyond the box: noise is not clipped
            return torch.stack([torch.zeros_like(logit), logit, *[torch.full_like(logit, -9)] * 8], 1)

    x = torch.tensor([0.9, 1.0, 0.5]).view(3, 1, 1, 1).expand(3, 1, 10, 10)
    counts = nb13.votes(Two(), x, 4000, 0.4, generator())
    assert (counts.sum(1) == 4000).all()
    expected = scipy.stats.norm.cdf(np.array([-0.2, -0.1, -0.6]) / 0.4)
    assert np.abs(counts[:, 1].numpy() / 4000 - expected).max() < 0.03


def test_certified_is_minus_one_where_wrong(nb13, trained):
    model, x, _, config = trained
    draws = generator(0)
    first, counts = nb13.votes(model, x, 5, nb13.SIGMA, draws), nb13.votes(model, x, 50, nb13.SIGMA, draws)
    y = first.argmax(1)
    y[::2] = (y[::2] + 1) % 10
    radius = nb13.certified(model.state_dict(), config, (x, y), 0, 50)
    assert (radius[::2] == -1).all()
    for n in range(1, 40, 2):
        winner, expected = nb13.smoothed_radius(counts[n], 50, nb13.SIGMA, 0.001, int(first[n].argmax()))
        assert float(radius[n]) == pytest.approx(expected if winner is not None else -1, abs=1e-6)


def test_gaussian_noise_has_its_deviation_and_is_not_clipped(nb13, trained):
    model, x, y, config = trained
    shift = nb13.gaussian(model, x, y, 0.3, config, generator()) - x
    assert scipy.stats.kstest(shift.flatten().numpy()[::5], scipy.stats.norm(0, nb13.SIGMA).cdf).pvalue > 1e-3


def test_l2_attack_of_the_study(nb13, trained):
    model, x, _, config = trained
    y = model(x).argmax(1)
    found = nb13.l2_attacked(model.state_dict(), config, (x, y), (0.0, 1e-4, 3.0), 5)
    assert found[0] == 100
    assert found[1] > 90 > 50 > found[2]


def test_vote_is_attacked_by_the_mean_of_noisy_answers(nb13, trained, monkeypatch):
    model, x, _, config = trained
    y = model(x).argmax(1)
    found = nb13.vote_attacked(model.state_dict(), config, (x, y), (0.0, 3.0), 5, copies=4, n=20)
    votes = nb13.votes(model, x, 20, nb13.SIGMA, generator(0)).argmax(1)
    assert found[0] == pytest.approx(100 * float((votes == y).float().mean()))
    assert found[0] > found[1] + 20
    objectives = []

    def climb(objective, x, start, eps, step_size, steps, norm):
        objectives.append((objective(x), eps, step_size, steps, norm))
        return x

    monkeypatch.setitem(nb13.vote_attacked.__globals__, "climb", climb)
    nb13.vote_attacked(model.state_dict(), config, (x, y), (2.0,), 5, copies=3, n=1)
    draws = generator(0)
    answers = [model(x + nb13.SIGMA * torch.randn(x.shape, generator=draws)).softmax(1) for _ in range(3)]
    expected = F.nll_loss(torch.stack(answers).mean(0).log(), y, reduction="sum")
    torch.testing.assert_close(objectives[0][0], expected)
    assert objectives[0][1:] == (2.0, 0.2, 5, "l2")


def test_shifts_of_equal_length(nb13, trained):
    model, x, y, _ = trained
    x = 0.45 + 0.1 * x
    slope = nb13.loss_slope(model, x, y)
    for form, direction in (("gradient", slope), ("sign of the gradient", slope.sign()), ("random signs", None)):
        shift = nb13.shifted(model, x, y, 0.01, form, generator()) - x
        torch.testing.assert_close(shift.flatten(1).norm(dim=1), torch.full((40,), 0.28), rtol=1e-4, atol=0)
        if direction is not None:
            cosine = F.cosine_similarity(shift.flatten(1), direction.flatten(1))
            torch.testing.assert_close(cosine, torch.ones(40), rtol=1e-3, atol=0)


def test_surface_is_the_loss_on_a_grid(nb13, trained):
    model, x, y, _ = trained
    reach = torch.linspace(-0.1, 0.2, 3)
    found = nb13.surface(model, x[:1], y[:1], reach, generator(1))
    first = nb13.loss_slope(model, x[:1], y[:1]).sign()
    second = nb13.random_signs(x[:1].shape, x, generator(1))
    for a, b in itertools.product(range(3), range(3)):
        shift = (reach[a] * first + reach[b] * second).clamp(-0.2, 0.2)  # not beyond the ball
        expected = F.cross_entropy(model((x[:1] + shift).clamp(0, 1)), y[:1])
        assert float(found[a, b]) == pytest.approx(expected.item(), abs=1e-5)


def test_splits_are_disjoint_floats(nb13, monkeypatch):
    sets = {part: (torch.arange(n).view(n, 1, 1, 1).to(torch.uint8), torch.arange(n)) for part, n in (("train", 120), ("test", 100))}
    monkeypatch.setitem(nb13.splits.__globals__, "load_images", lambda name: sets)
    found = nb13.splits("any", 30, "cpu")
    assert [len(labels) for _, labels in found.values()] == [110, 10, 30]
    assert torch.equal(torch.cat([found["train"][1], found["validation"][1]]), torch.arange(120))
    assert len(set(found["test"][1].tolist())) == 30
    assert found["test"][1].tolist() != list(range(30))
    assert len(nb13.splits("any", 0, "cpu")["test"][1]) == 0
    for images, labels in found.values():
        torch.testing.assert_close(images.flatten(), labels.float() / 255)
