"""Notebook 02 against foolbox, timm, PyTorch's own layers, SciPy, explicit loops and brute force."""

import copy
import functools
import io
import itertools

import eagerpy
import foolbox
import numpy as np
import pytest
import timm.layers
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage
from torch import nn

from tests.checks import check_error_ends_the_rest

EPS = 8 / 255


def small_model(dtype=torch.float32, classes=10):
    """A network with batch norms whose running statistics are not those of its input."""
    torch.manual_seed(3)
    layers = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3, stride=2), nn.BatchNorm2d(8)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(8 * 9, classes)).to(dtype)
    for norm in (model[1], model[4]):
        norm.running_mean.normal_(0, 0.2)
        norm.running_var.uniform_(0.5, 2)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    return model


def pictures(count=6, dtype=torch.float32):
    return torch.rand(count, 3, 8, 8, dtype=dtype), torch.arange(count) % 10


def state_of(model):
    """Everything that an attack has to leave as it was."""
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    wanted = [p.requires_grad for p in model.parameters()]
    return copy.deepcopy(model.state_dict()), [m.training for m in model.modules()], wanted, gradients


def same(first, second):
    states = all(torch.equal(a, b) for a, b in zip(first[0].values(), second[0].values(), strict=True))
    gradients = all((a is None) == (b is None) and (a is None or torch.equal(a, b)) for a, b in zip(first[3], second[3], strict=True))
    return states and gradients and first[1:3] == second[1:3]


# --- the attack


@pytest.mark.parametrize(("steps", "step_size"), [(1, EPS), (5, 2 / 255), (10, 4 / 255)])
@pytest.mark.parametrize("targeted", [False, True])
def test_attack_is_foolbox(nb02, steps, step_size, targeted):
    model = small_model().eval()
    x, y = pictures(9)
    found = nb02.pgd_attack(model, x, y, EPS, step_size, steps, random_start=False, targeted=targeted)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=False)
    goal = foolbox.criteria.TargetedMisclassification if targeted else foolbox.criteria.Misclassification
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1))
    criterion = goal(eagerpy.astensor(y))
    expected = attack.run(wrapped, eagerpy.astensor(x), criterion, epsilon=EPS).raw
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_attack_climbs_and_a_targeted_one_reaches_its_label(nb02):
    model = small_model().eval()
    x, y = pictures(20)
    loss = lambda images, labels: F.cross_entropy(model(images), labels)
    assert loss(nb02.pgd_attack(model, x, y, EPS, EPS / 4, 10), y) > loss(x, y) + 0.01
    assert loss(nb02.pgd_attack(model, x, y, EPS, EPS / 4, 10, targeted=True), y) < loss(x, y) - 0.01


def test_one_step_is_fgsm(nb02):
    model = small_model(torch.float64).eval()
    x, y = pictures(5, torch.float64)
    leaf = x.clone().requires_grad_()
    F.cross_entropy(model(leaf), y).backward()
    expected = (x + EPS * leaf.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(nb02.pgd_attack(model, x, y, EPS, EPS, 1, random_start=False), expected)


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("step_size", [EPS / 3, 5 * EPS])
def test_box_and_ball_hold(nb02, random_start, step_size):
    x, y = pictures(8)
    x[0], x[1] = 0, 1
    found = nb02.pgd_attack(small_model(), x, y, EPS, step_size, 4, random_start=random_start)
    assert (found - x).abs().max() <= EPS + 1e-7
    assert found.min() >= 0
    assert found.max() <= 1
    assert not found.requires_grad


def test_random_start_fills_the_ball(nb02):
    blind = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    nn.init.zeros_(blind[1].weight)  # no slope: the start stays
    x, y = torch.full((50, 3, 8, 8), 0.5), torch.zeros(50, dtype=torch.long)
    moved = nb02.pgd_attack(blind, x, y, EPS, EPS, 1) - x
    assert abs(moved.mean()) < 0.01 * EPS * 3
    assert moved.abs().max() > 0.99 * EPS
    assert abs(moved.std() / EPS - 3**-0.5) < 0.02


def test_a_generator_makes_an_attack_repeatable(nb02):
    model, (x, y) = small_model(), pictures()
    attack = lambda seed: nb02.pgd_attack(model, x, y, EPS, EPS / 4, 2, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(attack(1), attack(1))
    assert not torch.equal(attack(1), attack(2))


@pytest.mark.parametrize("training", [True, False])
def test_attack_leaves_the_model_as_it_was(nb02, training):
    model, (x, y) = small_model().train(training), pictures()
    F.cross_entropy(model(x), y).backward()
    model[0].weight.requires_grad_(False)
    model[4].eval()
    before = state_of(model)
    nb02.pgd_attack(model, x, y, EPS, EPS / 4, 3)
    assert same(before, state_of(model))


def test_attack_that_fails_leaves_the_model_as_it_was(nb02):
    model, (x, _) = small_model().train(), pictures()
    before = state_of(model)
    with pytest.raises(IndexError):
        nb02.pgd_attack(model, x, torch.full((6,), 99), EPS, EPS / 4, 3)
    assert same(before, state_of(model))


def test_attack_is_made_in_evaluation_mode(nb02):
    """Each picture for itself: alone or in a batch makes no difference."""
    model, (x, y) = small_model(torch.float64).train(), pictures(4, torch.float64)
    together = nb02.pgd_attack(model, x, y, EPS, EPS / 4, 3, random_start=False)
    alone = [nb02.pgd_attack(model, x[n : n + 1], y[n : n + 1], EPS, EPS / 4, 3, random_start=False) for n in range(4)]
    torch.testing.assert_close(together, torch.cat(alone))


@pytest.mark.parametrize(("change", "value"), [("scale", 255), ("shift", -0.5), ("nan", float("nan"))])
def test_pictures_outside_the_box_are_refused(nb02, change, value):
    x, y = pictures()
    x = x * value if change == "scale" else x + value
    with pytest.raises(ValueError, match="normalise inside the model"):
        nb02.pgd_attack(small_model(), x, y, EPS, EPS, 1)


@pytest.mark.parametrize(("eps", "step_size", "steps"), [(0, 0.1, 1), (-0.1, 0.1, 1), (0.1, 0, 1), (0.1, -1, 1), (0.1, 0.1, 0)])
def test_senseless_attacks_are_refused(nb02, eps, step_size, steps):
    with pytest.raises(ValueError, match="wanted"):
        nb02.pgd_attack(small_model(), *pictures(), eps, step_size, steps)


# --- dual batch norm


@pytest.mark.parametrize("separate", [True, False])
def test_dual_norm_is_two_norms(nb02, separate):
    dual = nb02.DualBatchNorm2d(4, separate)
    nn.init.normal_(dual.main.weight)
    nn.init.normal_(dual.auxiliary.bias)
    norms = [copy.deepcopy(part) for part in (dual.main, dual.auxiliary)]
    for _ in range(3):
        x = torch.randn(10, 4, 3, 3) * 3 + 1
        with nb02.routed(dual, "split"):
            torch.testing.assert_close(dual(x), torch.cat([norms[0](x[:5]), norms[1](x[5:])]))
    dual.eval()
    for part, norm in zip(("main", "auxiliary"), norms, strict=True):
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(getattr(dual, part).state_dict()[name], value)
        with nb02.routed(dual, part):
            torch.testing.assert_close(dual(x), norm.eval()(x))
    torch.testing.assert_close(dual(x), norms[0](x))  # main is what is used afterwards


def test_dual_norm_is_timms_split_norm(nb02):
    """timm's split batch norm: the first part through its main norm, the second through the other one."""
    split = timm.layers.SplitBatchNorm2d(4, num_splits=2)
    dual = nb02.DualBatchNorm2d(4, separate_affine=True)
    x = torch.randn(8, 4, 5, 5) + torch.arange(8)[:, None, None, None]
    with nb02.routed(dual, "split"):
        torch.testing.assert_close(dual(x), split(x))
    torch.testing.assert_close(dual.main.running_mean, split.running_mean)
    torch.testing.assert_close(dual.auxiliary.running_var, split.aux_bn[0].running_var)
    torch.testing.assert_close(dual.eval()(x), split.eval()(x))


def test_affine_parts_are_shared_or_not(nb02):
    names = lambda dual: {name for name, _ in dual.named_parameters()}
    shared, separate = (nb02.DualBatchNorm2d(4, value) for value in (False, True))
    assert names(shared) == {"main.weight", "main.bias"}
    assert names(separate) == {f"{part}.{name}" for part in ("main", "auxiliary") for name in ("weight", "bias")}
    with nb02.routed(shared, "auxiliary"):
        shared(torch.randn(4, 4, 2, 2)).square().sum().backward()
    assert shared.main.weight.grad is not None
    assert shared.main.running_mean.abs().sum() == 0
    assert copy.deepcopy(shared).auxiliary.weight is not shared.main.weight
    copied = copy.deepcopy(shared)
    assert copied.auxiliary.weight is copied.main.weight


def test_an_odd_batch_has_no_halves(nb02):
    dual = nb02.DualBatchNorm2d(2)
    with nb02.routed(dual, "split"), pytest.raises(ValueError, match="5 has no halves"):
        dual(torch.randn(5, 2, 3, 3))


@pytest.mark.parametrize("separate", [True, False])
def test_conversion_keeps_what_the_model_computes(nb02, separate):
    model, (x, _) = small_model(), pictures()
    model[1].momentum, model[1].eps = 0.3, 1e-2
    before = state_of(model)
    dual = nb02.with_dual_norms(model, separate)
    assert same(before, state_of(model))
    assert type(dual[1]) is nb02.DualBatchNorm2d
    assert type(nb02.with_dual_norms(model, separate, nb02.AffineOnly)[1]) is nb02.AffineOnly
    assert dual[1].auxiliary.momentum == 0.3
    assert dual[1].auxiliary.eps == 1e-2
    for training, route in itertools.product((False, True), ("main", "auxiliary")):
        with nb02.routed(dual.train(training), route):
            torch.testing.assert_close(dual(x), copy.deepcopy(model).train(training)(x))
    assert (dual[1].auxiliary.weight is dual[1].main.weight) is not separate


def test_conversion_of_nested_models_and_of_none(nb02):
    config = nb02.Config(widths=(8, 8), blocks=2)
    dual = nb02.with_dual_norms(nb02.Network(config))
    plain = [m for m in nb02.Network(config).modules() if isinstance(m, nn.BatchNorm2d)]
    found = [m for m in dual.modules() if isinstance(m, nb02.DualBatchNorm2d)]
    assert len(found) == len(plain)
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        nb02.with_dual_norms(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with pytest.raises(ValueError, match="no BatchNorm2d"):
        nb02.with_dual_norms(dual)  # once is enough


def test_routes_are_put_back(nb02):
    dual = nb02.with_dual_norms(small_model())
    with nb02.routed(dual, "auxiliary"):
        with nb02.routed(dual, "split"):
            assert dual[4].route == "split"
        assert dual[4].route == "auxiliary"
        with pytest.raises(ValueError, match="no halves"), nb02.routed(dual, "split"):
            dual(torch.rand(5, 3, 8, 8))
        assert dual[4].route == "auxiliary"
    assert dual[1].route == "main"


def test_affine_only_has_one_set_of_statistics(nb02):
    norm, plain = nb02.AffineOnly(3, True), nn.BatchNorm2d(3, affine=False)
    for part in (norm.main, norm.auxiliary):
        nn.init.normal_(part.weight)
        nn.init.normal_(part.bias)
    affine = lambda x, part: x * part.weight[:, None, None] + part.bias[:, None, None]
    x = torch.randn(8, 3, 4, 4) + 2
    with nb02.routed(norm, "split"):
        normal = plain(x)
        expected = torch.cat([affine(normal[:4], norm.main), affine(normal[4:], norm.auxiliary)])
        torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm.main.running_var, plain.running_var)
    norm.eval()
    plain.eval()
    with nb02.routed(norm, "auxiliary"):
        torch.testing.assert_close(norm(x), affine(plain(x), norm.auxiliary))
    torch.testing.assert_close(norm(x), affine(plain(x), norm.main))


# --- training steps


def test_advprop_loss_is_the_mean_of_two_passes(nb02):
    model = nb02.with_dual_norms(small_model(torch.float64), True)
    (x, y), (other, _) = pictures(6, torch.float64), pictures(6, torch.float64)
    loss = nb02.advprop_loss(model, x, other, y)
    reference = copy.deepcopy(model)
    expected = F.cross_entropy(reference(x), y) / 2
    with nb02.routed(reference, "auxiliary"):
        expected = expected + F.cross_entropy(reference(other), y) / 2
    torch.testing.assert_close(loss, expected)
    # bookkeeping: the second pair of passes moved the statistics of the copy once more, in the same direction
    once = nb02.with_dual_norms(small_model(torch.float64), True)
    once(x)
    torch.testing.assert_close(once[1].main.running_mean, model[1].main.running_mean)
    assert not torch.allclose(model[1].auxiliary.running_mean, model[1].main.running_mean)


def test_second_halves(nb02):
    model, (x, y) = nb02.with_dual_norms(small_model(), True), pictures()
    generator = lambda: torch.Generator().manual_seed(5)
    assert torch.equal(nb02.companions(nb02.Way(nb02.mirrored), model, x, y, generator()), x.flip(3))
    noisy = nb02.companions(nb02.Way(functools.partial(nb02.gaussian_noise, 0.1)), model, x, y, generator())
    torch.testing.assert_close(noisy, (x + 0.1 * torch.randn(x.shape, generator=generator())).clamp(0, 1))
    with torch.no_grad():
        model[1].auxiliary.weight.neg_()  # the two routes have other slopes now
    way = nb02.Way("adversary", norm=nb02.DualBatchNorm2d, eps=0.1, attack_steps=3)
    found = nb02.companions(way, model, x, y, generator())
    with nb02.routed(model, "auxiliary"):
        expected = nb02.pgd_attack(model, x, y, 0.1, 0.05, 3, generator=generator())
    assert torch.equal(found, expected)
    assert not torch.equal(found, nb02.pgd_attack(model, x, y, 0.1, 0.05, 3, generator=generator()))


def test_losses_of_the_ways(nb02):
    (x, y), fixed = pictures(), torch.rand(6, 3, 8, 8)
    other = lambda pictures, generator: fixed
    loss = lambda way: nb02.loss_of(way, small_model(), x, y, None)
    expected = lambda images, labels: F.cross_entropy(small_model()(images), labels)
    torch.testing.assert_close(loss(nb02.Way()), expected(x, y))
    torch.testing.assert_close(loss(nb02.Way(other, alone=True)), expected(fixed, y))
    torch.testing.assert_close(loss(nb02.Way(other)), expected(torch.cat([x, fixed]), torch.cat([y, y])))


def data_of(nb02, count=64):
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8)
    return {"train": (images, images.float().mean((1, 2, 3)).gt(127.5).long())}


def test_training_learns_and_is_repeatable(nb02):
    config = nb02.Config(widths=(8, 8), batch_size=16)
    data = data_of(nb02)
    data["train"][0][data["train"][1] == 1] //= 2  # bright or dark: easy
    state = nb02.initial_state(config, 0)
    way = nb02.Way("adversary", norm=nb02.DualBatchNorm2d, separate_affine=True, learning_rate=0.1)
    log, weights = nb02.trained(config, way, data, 20, 1, state)
    assert log["loss"][-1] < log["loss"][0]
    assert log["step"][-1] == 20
    again = nb02.trained(config, way, data, 20, 1, state)
    assert again[0] == log
    assert all(torch.equal(weights[name], again[1][name]) for name in weights)
    other = nb02.trained(config, way, data, 20, 2, state)[0]
    assert other != log


def test_the_rate_is_warmed_up_and_led_to_zero(nb02, monkeypatch):
    rates, step = [], torch.optim.SGD.step

    def noted(self, *args, **kwargs):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.SGD, "step", noted)
    config = nb02.Config(widths=(8, 8), batch_size=4)
    nb02.trained(config, nb02.Way(learning_rate=0.2), data_of(nb02, 16), 40, 0, nb02.initial_state(config, 0))
    steps = np.arange(40)
    expected = 0.2 * np.minimum(1, (steps + 1) / 6) * (1 + np.cos(np.pi * steps / 40)) / 2
    np.testing.assert_allclose(rates, expected)


def test_restored_is_what_was_trained(nb02):
    config, data = nb02.Config(widths=(8, 8), batch_size=16), data_of(nb02)
    mask = functools.partial(nb02.SparseTopK, 0.3)
    for norm, separate in ((None, False), (nb02.DualBatchNorm2d, False), (nb02.AffineOnly, True)):
        way = nb02.Way("adversary", norm=norm, separate_affine=separate, mask=mask)
        _, weights = nb02.trained(config, way, data, 2, 0, nb02.initial_state(config, 0))
        model = nb02.restored(config, way, weights, torch.device("cpu"))
        assert isinstance(model.stages[2], nb02.SparseTopK)
        assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_augmentation_is_a_shift_and_a_flip_for_each_picture(nb02):
    images = torch.randint(1, 256, (40, 3, 32, 32), dtype=torch.uint8)
    found = nb02.augment(images, torch.Generator().manual_seed(0))
    padded = F.pad(images, (4, 4, 4, 4)).float() / 255
    drawn = []
    for n in range(40):
        places = itertools.product(range(9), range(9), (False, True))
        crops = {(r, c, f): padded[n, :, r : r + 32, c : c + 32] for r, c, f in places}
        crops = {key: crop.flip(2) if key[2] else crop for key, crop in crops.items()}
        drawn.append(next(key for key, crop in crops.items() if torch.equal(crop, found[n])))
    assert len(set(drawn)) > 30
    assert {flip for _, _, flip in drawn} == {False, True}
    assert {0, 8} <= {row for row, _, _ in drawn}


# --- SparseTopK


@pytest.mark.parametrize("keep", [1, 0.5, 0.29, 0.1, 0.001])
def test_top_k_by_brute_force(nb02, keep):
    x = torch.randn(2, 3, 10, 10, dtype=torch.float64, requires_grad=True)
    y = nb02.SparseTopK(keep)(x)
    kept = max(1, round(keep * 10000) * 100 // 10000)
    expected = torch.zeros_like(x)
    for picture, channel in itertools.product(range(2), range(3)):
        values = x[picture, channel].detach().flatten()
        for place in sorted(range(100), key=lambda p: -abs(float(values[p])))[:kept]:
            expected[picture, channel, place // 10, place % 10] = values[place]
    assert torch.equal(y, expected)
    (slope,) = torch.autograd.grad((y * 3).sum(), x)
    assert torch.equal(slope, 3.0 * (expected != 0))


def test_of_tied_values_exactly_k_stay(nb02):
    x = torch.ones(2, 3, 4, 4)
    assert (nb02.SparseTopK(0.25)(x) != 0).flatten(2).sum(2).tolist() == [[4] * 3] * 2
    assert torch.equal(nb02.SparseTopK(1)(x), x)
    assert nb02.SparseTopK(0.5)(torch.zeros(1, 1, 2, 2)).sum() == 0


@pytest.mark.parametrize("keep", [0, -0.1, 1.01, 20, float("nan")])
def test_shares_outside_are_refused(nb02, keep):
    with pytest.raises(ValueError, match="keep is"):
        nb02.SparseTopK(keep)


def test_controls_keep_as_many_that_are_not_zero(nb02):
    x = torch.randn(2, 3, 5, 5).relu()
    x[0, 0] = torch.arange(-12.0, 13).view(5, 5)
    x[1, 2, :, 1:] = 0
    top, bottom, random = (kind(0.2) for kind in (nb02.SparseTopK, nb02.BottomK, nb02.RandomK))
    count = lambda y: (y != 0).flatten(2).sum(2)
    first, second = random(x), random(x)
    assert torch.equal(count(bottom(x)), count(top(x)))
    assert torch.equal(count(first), count(top(x)))
    assert sorted(bottom(x)[0, 0].flatten().abs().tolist())[-5:] == [1, 1, 2, 2, 3]
    assert all(torch.equal(y[y != 0], x[y != 0]) for y in (first, second, bottom(x)))
    assert not torch.equal(first, second)
    assert torch.equal(nb02.RandomK(0.2)(x), first)
    random.eval()
    assert torch.equal(random(x), random(x))


# --- test sets and corruptions


def test_swapped_amplitudes(nb02):
    x, other = 0.25 + 0.5 * torch.rand(2, 4, 3, 32, 32, dtype=torch.float64)
    found = nb02.swap_amplitude(x, other)
    numbers = [np.fft.fft2(part.numpy()) for part in (x, other)]
    expected = np.fft.ifft2(np.abs(numbers[1]) * np.exp(1j * np.angle(numbers[0]))).real.clip(0, 1)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-10)
    torch.testing.assert_close(nb02.swap_amplitude(x, x), x)


def test_conflicts_have_two_labels(nb02):
    x, y = torch.rand(60, 3, 32, 32), torch.arange(60) % 3
    found, shapes, textures = nb02.cue_conflicts(x, y)
    assert len(found) == len(shapes) == len(textures)
    assert (shapes != textures).all()
    order = torch.from_numpy(np.random.default_rng(0).permutation(60))
    expected = nb02.swap_amplitude(x, x[order])[y != y[order]]
    assert torch.equal(found, expected)
    assert torch.equal(textures, y[order][y != y[order]])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_shuffled_patches_are_the_same_patches(nb02, size):
    x = torch.rand(5, 3, 32, 32)
    found = nb02.shuffle_patches(x, size)
    cut = lambda t: [t[:, r : r + size, c : c + size] for r in range(0, 32, size) for c in range(0, 32, size)]
    key = lambda patch: float(patch.double().sum())
    orders = []
    for before, after in zip(x, found, strict=True):
        assert sorted(map(key, cut(before))) == sorted(map(key, cut(after)))
        places = {key(patch): n for n, patch in enumerate(cut(before))}
        orders.append([places[key(patch)] for patch in cut(after)])
        assert all(torch.equal(cut(before)[n], patch) for n, patch in zip(orders[-1], cut(after), strict=True))
    assert len(set(map(tuple, orders))) == 5


def test_corruptions_against_scipy_and_pillow(nb02):
    x = torch.rand(3, 3, 32, 32)
    blurred = nb02.blur(0.8, x, 0)[:, :, 6:-6, 6:-6]
    expected = ndimage.gaussian_filter(x.numpy(), (0, 0, 0.8, 0.8), truncate=4 / 0.8)[:, :, 6:-6, 6:-6]
    np.testing.assert_allclose(blurred.numpy(), expected, atol=2e-3)
    squares = nb02.pixelize(16, x, 0)
    np.testing.assert_allclose(squares[..., ::2, ::2].numpy(), x.reshape(3, 3, 16, 2, 16, 2).mean((3, 5)).numpy(), atol=1e-6)
    assert torch.equal(squares[..., ::2, ::2], squares[..., 1::2, 1::2])
    file = io.BytesIO()
    Image.fromarray((255 * x[0]).byte().permute(1, 2, 0).numpy()).save(file, "jpeg", quality=50)
    expected = np.asarray(Image.open(file)) / 255
    found = nb02.jpeg(50, x, 0)[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).mean() < 0.02
    coarse = nb02.coarse_noise(0.1, torch.full((2, 3, 32, 32), 0.5), 0)
    assert torch.equal(coarse[..., ::4, ::4], coarse[..., 3::4, 3::4])
    torch.testing.assert_close(nb02.contrast(0.5, x, 0).std((2, 3)), x.std((2, 3)) / 2)
    torch.testing.assert_close(nb02.contrast(0.5, x, 0).mean((2, 3)), x.mean((2, 3)))
    veil = nb02.fog(1.0, x, 0)
    assert veil.min() >= 0.5
    assert veil.max() < 1
    assert (veil[..., 1:] - veil[..., :-1]).abs().max() < 0.1
    torch.testing.assert_close(nb02.fog(0.25, x, 0), 0.75 * x + 0.25 * veil)
    line = torch.arange(32.0)[None, None, None].expand(1, 3, 32, 32) / 31
    torch.testing.assert_close(nb02.motion(5, line, 0)[..., 2:-2], line[..., 2:-2])
    torch.testing.assert_close(nb02.saturate(0.0, x, 0)[:, 0], nb02.saturate(0.0, x, 0)[:, 2])


@pytest.mark.parametrize("kinds", ["CORRUPTIONS", "CHOOSING"])
def test_corruptions_stay_pictures_and_grow(nb02, kinds):
    x = F.interpolate(torch.rand(20, 3, 9, 9), (32, 32), mode="bilinear")
    found = nb02.corrupted(getattr(nb02, kinds), x)
    assert found.dtype == torch.uint8
    assert found.shape[2:] == x.shape
    assert torch.equal(found, nb02.corrupted(getattr(nb02, kinds), x))  # the same for all who are judged
    changes = (found.float() / 255 - x).abs().mean((2, 3, 4, 5))
    growing = [name for name in getattr(nb02, kinds) if name != "saturate"]
    for name, change in zip(getattr(nb02, kinds), changes, strict=True):
        assert change.min() > 0
        assert name not in growing or change[-1] > change[0]


def test_no_corruption_is_reported_that_was_chosen_on(nb02):
    assert not set(nb02.CORRUPTIONS) & set(nb02.CHOOSING)
    assert not {f for f, _ in nb02.CORRUPTIONS.values()} & {f for f, _ in nb02.CHOOSING.values()}


# --- judging


class Bright(nn.Module):
    """Class 1 for pictures brighter than a half."""

    def forward(self, x):
        logit = 20 * (x.mean((1, 2, 3)) - 0.5)
        return torch.stack([-logit, logit], 1)


def test_hits_of_all_are_those_of_each_kind_and_strength(nb02):
    images = torch.rand(2, 3, 5, 3, 8, 8)
    labels = torch.randint(10, (5,))
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 10))
    found = nb02.hits_of_all(model, images, labels)
    each = [[nb02.hits(model, images[n, m], labels) for m in range(3)] for n in range(2)]
    assert torch.equal(found, torch.stack(list(map(torch.stack, each))))


def test_affine_only_stays_in_the_precision_of_its_input(nb02):
    norm = nb02.AffineOnly(3, True)
    x = torch.randn(4, 3, 2, 2, dtype=torch.bfloat16)
    with nb02.routed(norm, "split"):
        assert norm(x).dtype == torch.bfloat16


def test_hits_of_bytes_and_floats(nb02):
    images = torch.tensor([10, 100, 150, 250], dtype=torch.uint8)[:, None, None, None].expand(4, 3, 32, 32)
    labels = torch.tensor([0, 1, 1, 1])
    assert nb02.hits(Bright(), images, labels).tolist() == [True, False, True, True]
    assert nb02.hits(Bright(), images.float() / 255, labels).tolist() == [True, False, True, True]


def test_withstood_needs_every_attack_and_the_picture_itself(nb02, monkeypatch):
    """Right without an attack and under each of two; one step begins at the picture, more steps at random."""
    moves, starts = iter([0.0, 0.2, 0.0, 0.2]), []

    def attack(model, x, y, eps, random_start, **settings):
        starts.append(random_start)
        return x + torch.tensor([0.0, 1.0, 0.0])[:, None, None, None] * next(moves)

    monkeypatch.setitem(nb02.withstood.__globals__, "pgd_attack", attack)
    x = torch.tensor([0.4, 0.4, 0.6])[:, None, None, None].expand(3, 3, 32, 32)
    labels = torch.zeros(3, dtype=torch.long)
    assert nb02.withstood(Bright(), x, labels, 0.1, 5, 2).tolist() == [True, False, False]
    moves = iter([0.2, 0.0])
    assert nb02.withstood(Bright(), x, labels, 0.1, 1, 2).tolist() == [True, False, False]
    assert starts == [True, True, False, False]
    pull = lambda model, x, y, eps, **settings: x * 0.5  # an attack that helps
    monkeypatch.setitem(nb02.withstood.__globals__, "pgd_attack", pull)
    assert nb02.withstood(Bright(), x, labels, 0.1, 1).tolist() == [True, True, False]


def test_withstood_is_the_worst_of_all_attacks(nb02):
    values = torch.tensor([0.3, 0.47, 0.53, 0.7])
    x = values[:, None, None, None].expand(4, 3, 32, 32)
    labels = torch.tensor([0, 0, 1, 0])
    for steps in (1, 5):
        assert nb02.withstood(Bright(), x, labels, 0.05, steps, 2).tolist() == [True, False, False, False]
        assert nb02.withstood(Bright(), x, labels, 0.01, steps, 2).tolist() == [True, True, True, False]


def test_the_same_rates_are_tried_for_each(nb02):
    for name, way in nb02.WAYS.items():
        tries = nb02.tries_of(way)
        strengths = 2 if way.second in ("adversary", nb02.gaussian_noise) else 1
        assert len(set(tries)) == 3 * strengths, name
        assert {t.learning_rate for t in tries} == {0.003, 0.01, 0.03}
        assert len({(t.eps, t.attack_steps, t.second) for t in tries}) == strengths
        assert {(t.norm, t.mask, t.alone) for t in tries} == {(way.norm, way.mask, way.alone)}
    for way in nb02.tries_of(nb02.WAYS["noise, both"]):
        assert isinstance(way.second, functools.partial)


def test_judgements_by_kind(nb02):
    verdict = {"corrupted": torch.rand(8, 5, 6) < 0.5, "clean": torch.ones(6)}
    found = nb02.by_kind(verdict)
    names = list(nb02.CORRUPTIONS)
    for n, name in enumerate(names):
        assert torch.equal(found[name], verdict["corrupted"][n])
    quiet = [n for n, name in enumerate(names) if name not in ("Gaussian noise", "coarse noise")]
    assert torch.equal(found["without noises"], verdict["corrupted"][quiet])
    assert found["clean"] is verdict["clean"]


def test_means_of_judgements(nb02):
    verdicts = [{"corrupted": torch.rand(2, 5, 6) < 0.5, "clean": torch.rand(6) < 0.5} for _ in range(3)] + [{"clean": torch.ones(6)}]
    stacked = np.stack([verdict["corrupted"].numpy() for verdict in verdicts[:3]]).astype(float)
    np.testing.assert_allclose(nb02.of_seeds(verdicts, "corrupted"), 100 * stacked.mean((1, 2, 3)), rtol=1e-6)
    np.testing.assert_allclose(nb02.of_pictures(verdicts[:3], "corrupted"), 100 * stacked.mean((0, 1, 2)), rtol=1e-6)
    clean = np.stack([verdict["clean"].float().numpy() for verdict in verdicts])
    np.testing.assert_allclose(nb02.of_pictures(verdicts, "clean"), 100 * clean.mean(0), rtol=1e-6)


@pytest.mark.parametrize(
    ("interval", "seeds", "expected"),
    [
        ((1, 0.5, 1.5), (0.1, 2), "more"),
        ((1, 0.5, 1.5), (-0.1, 2), "no more"),
        ((1, -0.5, 2.5), (0.1, 2), "no more"),
        ((-1, -1.5, -0.5), (-0.1, -2), "fewer"),
        ((-1, -1.5, -0.5), (0.1, -2), "no more"),
    ],
)
def test_a_verdict_takes_the_interval_and_every_seed(nb02, interval, seeds, expected):
    assert nb02.verb(interval, seeds) == expected


def test_judging(nb02):
    """All judgements of a network that knows bright from dark, and through both norms where there are two."""
    config = nb02.Config(widths=(8, 8), batch_size=8)
    state = nb02.initial_state(config, 0)
    images = torch.randint(256, (12, 3, 32, 32), dtype=torch.uint8)
    labels, x = torch.arange(12) % 10, images / 255
    exam = {"images": images, "labels": labels, "attacked": 4, "steps": 2, "source": nb02.initial_state(config, 1)}
    exam |= {"corrupted": torch.stack([images, 255 - images])[:, None], "patches": nb02.shuffle_patches(x)}
    exam["conflicts"], exam["shapes"], exam["textures"] = nb02.cue_conflicts(x, labels)
    found = nb02.judged(config, nb02.Way(), state, exam)
    model = nb02.Network(config)
    model.load_state_dict(state)
    right = lambda pictures, wanted: model.eval()(pictures).argmax(1) == wanted
    assert torch.equal(found["clean"], right(x, labels))
    assert torch.equal(found["corrupted"][1, 0], right(1 - x, labels))
    assert torch.equal(found["shape"], right(exam["conflicts"], exam["shapes"]))
    assert torch.equal(found["texture"], right(exam["conflicts"], exam["textures"]))
    source = nb02.Network(config)
    source.load_state_dict(exam["source"])
    moved = nb02.pgd_attack(source, x[:4], labels[:4], config.eps, config.eps / 4, 2, random_start=False)
    assert torch.equal(found["transferred"], right(moved, labels[:4]))
    assert "clean, auxiliary" not in found
    way = nb02.Way("adversary", norm=nb02.DualBatchNorm2d, separate_affine=True)
    dual = nb02.with_dual_norms(model, True)
    for module in dual.modules():
        if isinstance(module, nb02.DualBatchNorm2d):
            nn.init.normal_(module.auxiliary.bias)
    found = nb02.judged(config, way, dual.state_dict(), exam)
    with nb02.routed(dual.eval(), "auxiliary"):
        assert torch.equal(found["clean, auxiliary"], dual(x).argmax(1) == labels)
    assert torch.equal(found["clean"], right(x, labels))


def test_results_come_in_order(nb02):
    assert nb02.over_cores(lambda x: x**2, range(5), "squares") == [0, 1, 4, 9, 16]


def test_an_error_ends_what_has_not_begun(nb02, monkeypatch):
    check_error_ends_the_rest(nb02, monkeypatch, lambda work, items: nb02.over_cores(work, items, "seeds"))


def test_on_a_gpu_one_runs_after_the_other(nb02, monkeypatch):
    monkeypatch.setattr(nb02.torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(nb02.over_cores.__globals__, "ThreadPoolExecutor", lambda *args: pytest.fail("asked for threads"))
    assert nb02.over_cores(abs, [-1, 2], "signs") == [1, 2]


def test_training_from_scratch_begins_with_its_weights(nb02, monkeypatch):
    seen = []
    spy = lambda folder, name, compute, *arguments: seen.append((folder, compute, arguments)) or ("log", "weights", "judgement", 1.0)
    monkeypatch.setitem(nb02.judged_from_scratch.__globals__, "remembered", spy)
    assert nb02.judged_from_scratch("folder", ("config", "way", "data", 7), "exam", (3, "state")) == "judgement"
    assert seen == [("folder", nb02.trained_and_judged, ("config", "way", "data", 7, 3, "state", "exam"))]


def test_norms_estimated_anew(nb02):
    model, images = nn.Sequential(nn.BatchNorm2d(3)), torch.randint(256, (40, 3, 4, 4), dtype=torch.uint8)
    model[0].running_mean += 7
    model[0].num_batches_tracked += 50
    nb02.estimate_anew(model, images, 20)
    expected = (images.float() / 255).mean((0, 2, 3))
    torch.testing.assert_close(model[0].running_mean, expected)
    variances = [(part.float() / 255).transpose(0, 1).flatten(1).var(1) for part in images.split(20)]
    torch.testing.assert_close(model[0].running_var, torch.stack(variances).mean(0))
    assert not model.training


def test_half_precision_leaves_slopes_of_sure_answers(nb02):
    """A network that is sure by 20 nats has slopes that would be 0 in half precision; the attack still moves."""
    model = nb02.Linear([-40.0])  # logit -20 for the wrong class
    x, y = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    with torch.autocast("cpu", torch.float16):
        x_adv = nb02.pgd_attack(model, x, y, 0.1, 0.05, 4, random_start=False)
        x.requires_grad_()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        assert torch.autograd.grad(loss, x)[0] == 0
    assert x_adv.item() == pytest.approx(0.4)


def test_steps_follow_the_time(nb02, monkeypatch):
    """Twice as slow, half the steps; ways that differ in the learning rate alone get the same."""
    measured = []

    def seconds(cases, rounds, device):
        measured.append(len(cases))
        return {name: 2 * (0.1 + 0.1 * bool(case.args[1].second)) for name, case in cases.items()}

    monkeypatch.setitem(nb02.seconds_of_steps.__globals__, "seconds_in_turns", seconds)
    ways = [nb02.Way(), nb02.Way(nb02.mirrored), nb02.Way(learning_rate=0.2), nb02.Way(nb02.mirrored, learning_rate=0.1)]
    config = nb02.Config(widths=(8, 8))
    found = nb02.seconds_of_each(ways, config, data_of(nb02), nb02.initial_state(config, 0), 3)
    assert found == pytest.approx({0: 0.1, 1: 0.2, 2: 0.1, 3: 0.2})
    assert nb02.equal_time(found, 100, reference=0) == {0: 100, 1: 50, 2: 100, 3: 50}
    assert nb02.equal_time({"ordinary": 1.0, "slow": 500.0}, 100) == {"ordinary": 100, "slow": 1}
    assert measured == [2]
