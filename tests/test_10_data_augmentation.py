"""Notebook 10: every augmentation against torchvision's, by hand, and by the distribution of its draws."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms.v2 import functional as V


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def x():
    return torch.rand(6, 3, 32, 32, generator=generator(5))


# --- where things are


def test_flip_is_exact_and_each_picture_has_its_own_draw(nb10, x):
    many = x.repeat(500, 1, 1, 1)
    flipped = nb10.random_flip(many, 0.3, generator())
    same = (flipped == many).flatten(1).all(1)
    mirrored = (flipped == V.horizontal_flip(many)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert scipy.stats.binomtest(int(mirrored.sum()), len(many), 0.3).pvalue > 1e-3
    assert torch.equal(nb10.random_flip(x, 0.0), x)
    assert torch.equal(nb10.random_flip(x, 1.0), x.flip(3))


def test_crop_takes_every_place_alike(nb10):
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    x = ((1 + 7 * rows + columns) / 36).expand(9000, 1, 5, 7)
    cropped = nb10.random_crop(x, 1, generator())
    padded = F.pad(x[:1], [1] * 4)
    options = [padded[:, :, r : r + 5, c : c + 7] for r, c in itertools.product(range(3), repeat=2)]
    counts = [int((cropped == option).flatten(1).all(1).sum()) for option in options]
    assert sum(counts) == 9000
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_crop_of_nothing(nb10, x):
    assert torch.equal(nb10.random_crop(x, 0), x)


@pytest.mark.parametrize("degrees", [0.0, 10.0, -33.0, 90.0, 180.0])
@pytest.mark.parametrize("size", [(32, 32), (20, 32)])
def test_rotation_is_torchvisions(nb10, x, degrees, size):
    x = x[:, :, : size[0], : size[1]]
    expected = V.rotate(x, degrees, InterpolationMode.BILINEAR)
    torch.testing.assert_close(nb10.rotate(x, degrees), expected, atol=2e-5, rtol=0)


def test_rotation_by_one_angle_each(nb10, x):
    angles = torch.tensor([0.0, 5, -5, 90, 45, 300])
    alone = torch.cat([nb10.rotate(x[n : n + 1], angles[n]) for n in range(6)])
    torch.testing.assert_close(nb10.rotate(x, angles), alone)


def test_zoom_shows_a_part_of_the_area_asked_for(nb10):
    """Places written into the pictures say which part is seen: its sides, and that it lies inside."""
    places = (torch.arange(64) + 0.5) / 64
    x = torch.stack([places.expand(64, 64), places[:, None].expand(64, 64)]).expand(4000, 2, 64, 64)
    seen = nb10.random_zoom(x, 0.25, generator())
    first, last = seen[:, 0, 32, 1], seen[:, 0, 32, -2]  # the columns seen next to the sides
    side = (last - first) * 64 / 61
    assert scipy.stats.kstest(side.square().numpy(), scipy.stats.uniform(0.25, 0.75).cdf).pvalue > 1e-3
    assert seen[:, :, 1:-1, 1:-1].min() > 0  # nothing from outside
    down = (seen[:, 1, -2, 32] - seen[:, 1, 1, 32]) * 64 / 61
    torch.testing.assert_close(side, down, atol=1e-4, rtol=0)
    centre = seen[:, 0, 32, 31:33].mean(1)
    free = (centre - side / 2) / (1 - side)
    assert scipy.stats.kstest(free[side < 0.95].numpy(), "uniform").pvalue > 1e-3


# --- light and colour


@pytest.mark.parametrize("factor", [0.0, 0.4, 1.0, 1.9])
def test_colour_is_torchvisions(nb10, x, factor):
    torch.testing.assert_close(nb10.adjust_saturation(x, factor), V.adjust_saturation(x, factor), atol=1e-5, rtol=0)
    torch.testing.assert_close(nb10.adjust_brightness(x, factor), V.adjust_brightness(x, factor), atol=1e-5, rtol=0)


def test_a_factor_for_each_picture(nb10, x):
    factors = torch.linspace(0, 2, 6)
    for ours, theirs in ((nb10.adjust_saturation, V.adjust_saturation), (nb10.adjust_brightness, V.adjust_brightness)):
        expected = torch.stack([theirs(one, float(f)) for one, f in zip(x, factors, strict=True)])
        torch.testing.assert_close(ours(x, factors), expected, atol=1e-5, rtol=0)


# --- two pictures in one


def test_mixup_is_torchvisions_with_the_same_draw(nb10, x, monkeypatch):
    y = torch.tensor([0, 1, 2, 3, 4, 5])
    monkeypatch.setitem(nb10.mixup.__globals__, "drawn_share", lambda *_: 0.3)
    monkeypatch.setattr(nb10.torch, "randperm", lambda n, **_: torch.arange(n).roll(1))
    theirs = v2.MixUp(num_classes=10)
    theirs._dist = type("Beta", (), {"sample": lambda self, size: torch.tensor([0.3])})()
    expected, labels = theirs(x, y)
    mixed, ours = nb10.mixup(x, y, 1.0, classes=10)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(ours, labels)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_shares_are_beta(nb10, x, alpha):
    draws = generator(1)
    shares = [nb10.drawn_share(alpha, x, draws) for _ in range(3000)]
    assert scipy.stats.kstest(shares, scipy.stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_labels_stay_a_distribution(nb10, x):
    soft = torch.rand(6, 10, generator=generator()).softmax(1)
    for mix in (nb10.mixup, nb10.cutmix):
        for seed in range(20):
            _, labels = mix(x, soft, 1.0, generator(seed))
            assert (labels >= 0).all()
            torch.testing.assert_close(labels.sum(1), torch.ones(6))


def test_cutmix_labels_count_pixels(nb10):
    x = torch.linspace(0, 1, 8).view(8, 1, 1, 1).expand(8, 3, 32, 24)
    for seed in range(200):
        mixed, labels = nb10.cutmix(x, torch.arange(8), 1.0, generator(seed), classes=8)
        for picture, label in zip(mixed, labels, strict=True):
            shares = torch.stack([(picture[0] == value).float().mean() for value in x[:, 0, 0, 0]])
            torch.testing.assert_close(shares, label)


def test_cutmix_takes_partners_from_the_whole_batch(nb10):
    x = torch.zeros(5, 1, 8, 8)
    labels = sum(nb10.cutmix(x, torch.arange(5), 1.0, generator(seed), classes=5)[1] for seed in range(300))
    assert (labels > 0).all()


def box_of_the_authors(share, height, width, centre):
    """CutMix-PyTorch's rand_bbox: (first, last) along the rows and columns."""
    cut = np.sqrt(share)
    reach = [int(side * cut) // 2 for side in (height, width)]
    ends = [np.clip([c - r, c + r], 0, side) for c, r, side in zip(centre, reach, (height, width), strict=True)]
    return tuple(int(v) for v in np.concatenate(ends))


def test_boxes_are_the_authors(nb10):
    draws = np.random.default_rng(0)
    for _ in range(300):
        share, centre = draws.uniform(), tuple(draws.integers(32, size=2))
        assert nb10.box(share, 32, 32, centre) == box_of_the_authors(share, 32, 32, centre)
    assert nb10.box(1.0, 32, 32, (16, 16)) == (0, 32, 0, 32)
    assert nb10.box(0.0, 32, 32, (5, 5)) == (5, 5, 5, 5)


def test_cutout_hides_a_clipped_square(nb10):
    x = torch.ones(20_000, 1, 32, 32)
    hidden = nb10.cutout(x, 16, generator()) == 0.5
    rows, columns = hidden.any(3).sum(2)[:, 0], hidden.any(2).sum(2)[:, 0]
    assert rows.min() >= 8
    assert rows.max() == 16
    assert torch.equal(hidden.flatten(1).sum(1), rows * columns)
    clipped = np.mean([min(c + 8, 32) - max(c - 8, 0) for c in range(32)]) / 32
    assert float(hidden.float().mean()) == pytest.approx(clipped**2, abs=0.003)


# --- many operations


@pytest.mark.parametrize("level", [0.0, 0.1, 0.3, 1.0])
def test_operations_are_torchvisions(nb10, x, level):
    levels = torch.full((6,), level)
    bytes_ = (255 * x).round().byte()
    exact = bytes_.float() / 255
    degrees = math.degrees(math.atan(0.3 * level))
    expected = {
        "rotate": V.rotate(exact, 30 * level, InterpolationMode.BILINEAR),
        "shear across": V.affine(exact, 0.0, [0, 0], 1.0, [degrees, 0.0], InterpolationMode.BILINEAR),
        "autocontrast": V.autocontrast(exact),
        "equalize": V.equalize(bytes_).float() / 255,
        "solarize": V.solarize(exact, 1 - level),
        "posterize": V.posterize(bytes_, 4 - int(4 * level)).float() / 255,
        "brightness": V.adjust_brightness(exact, 1 + 0.9 * level),
        "saturation": V.adjust_saturation(exact, 1 + 0.9 * level),
    }
    for name, answer in expected.items():
        torch.testing.assert_close(nb10.OPERATIONS[name](exact, levels), answer, atol=3e-5, rtol=0, msg=name)


def test_shifts_by_whole_pixels(nb10, x):
    three = torch.full((6,), 3 * 2 / 32 / (2 / 3))  # a level that makes three pixels
    across, down = nb10.OPERATIONS["shift across"](x, three), nb10.OPERATIONS["shift down"](x, three)
    torch.testing.assert_close(across[..., :-3], x[..., 3:], atol=1e-5, rtol=0)
    torch.testing.assert_close(down[:, :, :-3], x[:, :, 3:], atol=1e-5, rtol=0)
    assert across[..., -3:].abs().max() < 1e-5


def test_random_operation_draws_all_alike_and_passes_levels(nb10, monkeypatch):
    seen = {}
    names = ["posterize", "rotate"]
    for name in names:
        monkeypatch.setitem(nb10.OPERATIONS, name, lambda x, level, name=name: seen.update({name: level}) or x * 0 + names.index(name))
    level = torch.linspace(0.01, 1, 4000)
    found = nb10.random_operation(torch.rand(4000, 1, 2, 2), names, level, generator())
    which = found[:, 0, 0, 0].long()
    assert scipy.stats.binomtest(int(which.sum()), 4000, 0.5).pvalue > 1e-3
    assert torch.equal(seen["posterize"], level[which == 0])
    assert torch.equal(seen["rotate"].abs(), level[which == 1])
    assert scipy.stats.binomtest(int((seen["rotate"] > 0).sum()), len(seen["rotate"]), 0.5).pvalue > 1e-3


def test_random_operation_gives_every_picture_its_own_back(nb10, monkeypatch):
    monkeypatch.setitem(nb10.OPERATIONS, "posterize", lambda x, level: x / 2)
    monkeypatch.setitem(nb10.OPERATIONS, "rotate", lambda x, level: x / 4)
    x = torch.linspace(0.1, 1, 60).view(60, 1, 1, 1)
    share = nb10.random_operation(x, ["posterize", "rotate"], torch.ones(60), generator()) / x
    assert set(share.flatten().tolist()) == {0.25, 0.5}


@pytest.mark.parametrize("width", [2, 3])
def test_augmix_is_the_mixture_of_its_chains(nb10, monkeypatch, width):
    """With an operation that adds 0.1 a picture of 0 becomes 0.1 * share * mean depth of the chains by their weights."""
    monkeypatch.setitem(nb10.augmix.__globals__, "random_operation", lambda x, names, level, generator: x + 0.1)
    count = 200_000
    found = nb10.augmix(torch.zeros(count, 1, 1, 1), generator(), width)[:, 0, 0, 0].double() * 10
    draws = np.random.default_rng(0)
    weights, depths = draws.dirichlet([1] * width, count), draws.integers(1, 4, (count, width))
    expected = draws.uniform(size=count) * (weights * depths).sum(1)
    assert scipy.stats.ks_2samp(found.numpy(), expected).pvalue > 1e-3


@pytest.mark.parametrize("name", ["augmix", "rand_augment", "random_zoom", "random_flip"])
def test_same_generator_same_pictures_inside_the_range(nb10, x, name):
    first, second = (getattr(nb10, name)(x, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == x.shape
    assert first.min() >= 0
    assert first.max() <= 1
    assert not torch.equal(first, getattr(nb10, name)(x, generator=generator(4)))


def test_augmix_loss_is_the_divergence_of_scipy(nb10):
    logits = 3 * torch.randn(3, 7, 10, dtype=torch.float64, generator=generator())
    targets = torch.arange(7)
    answers = logits.softmax(2).numpy()
    entropy = lambda p: scipy.stats.entropy(p, axis=1)
    divergence = entropy(answers.mean(0)) - np.mean([entropy(p) for p in answers], 0)
    expected = F.cross_entropy(logits[0], targets) + 5 * divergence.mean()
    torch.testing.assert_close(nb10.augmix_loss(*logits, targets, weight=5.0), expected)


def test_augmix_loss_of_equal_and_of_opposite_answers(nb10):
    certain = 100 * F.one_hot(torch.tensor([0, 1]), 10).float()
    assert nb10.augmix_loss(certain, certain, certain, torch.tensor([0, 1])).item() == pytest.approx(0, abs=1e-5)
    other = certain.flip(0)
    found = nb10.augmix_loss(certain, other, other, torch.tensor([0, 1]), weight=1.0)
    assert found.item() == pytest.approx(scipy.stats.entropy([1 / 3, 2 / 3]), abs=1e-5)


# --- bad input


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda nb, x: nb.random_flip((255 * x).byte()), "255"),
        (lambda nb, x: nb.rotate(2 * x - 1, 5.0), "before normalising"),
        (lambda nb, x: nb.random_crop(x, 33), "padding is 33"),
        (lambda nb, x: nb.random_crop(x, -1), "padding is -1"),
        (lambda nb, x: nb.adjust_saturation(x[:, :1], 0.5), "three channels"),
        (lambda nb, x: nb.adjust_brightness(x, torch.ones(2)), "6 are wanted"),
        (lambda nb, x: nb.mixup(x, torch.arange(6), 0.0, classes=6), "alpha is 0"),
        (lambda nb, x: nb.cutmix(x, torch.arange(6), -1.0, classes=6), "alpha is -1"),
        (lambda nb, x: nb.cutmix(x, torch.arange(6), 1.0), "classes=10"),
        (lambda nb, x: nb.augmix(x[0]), r"\(N, C, H, W\)"),
    ],
)
def test_bad_input_is_told_what_to_do(nb10, x, call, text):
    with pytest.raises((TypeError, ValueError), match=text):
        call(nb10, x)


# --- corruptions


def rng(seed=0):
    return np.random.default_rng(seed)


def test_every_corruption_keeps_shape_and_gets_stronger(nb10):
    smooth = F.interpolate(torch.rand(6, 3, 8, 8, generator=generator()), (32, 32), mode="bilinear")
    for name, (function, strengths) in nb10.CORRUPTIONS.items():
        found = [function(smooth.clone(), strength, rng()).clamp(0, 1) for strength in strengths]
        assert all(part.shape == smooth.shape and part.dtype == torch.float32 for part in found), name
        distance = [float((part - smooth).abs().mean()) for part in found]
        assert distance[0] > 0, name
        if name not in ("elastic", "glass", "snow", "pixelate"):  # which do not all grow
            assert all(a <= b for a, b in itertools.pairwise(distance)), (name, distance)


def test_corrupted_has_all_in_bytes_and_repeats(nb10):
    images = (255 * torch.rand(12, 3, 32, 32, generator=generator())).byte()
    first, second = nb10.corrupted(images, 3), nb10.corrupted(images, 3)
    assert first.shape == (14, 12, 3, 32, 32)
    assert first.dtype == torch.uint8
    assert torch.equal(first, second)


def test_each_strength_has_its_fifth_of_the_pictures(nb10):
    images = (255 * torch.rand(12, 3, 32, 32, generator=generator())).byte()
    found = nb10.corrupted(images, 3)
    for n, (function, strengths) in enumerate(nb10.CORRUPTIONS.values()):
        for m, strength in enumerate(strengths):
            expected = function(images[m::5].float() / 255, strength, np.random.default_rng([3, n, m]))
            difference = 255 * expected.clamp(0, 1) - found[n, m::5].float()
            assert difference.abs().max() <= 0.5 + 1e-4


def test_corrupted_pictures_of_one_strength_have_draws_of_their_own(nb10):
    gray = torch.full((10, 3, 32, 32), 128, dtype=torch.uint8)
    noise = nb10.corrupted(gray, 0)[0]
    assert len({bytes(picture.flatten().tolist()) for picture in noise}) == 10


def test_noises(nb10):
    gray = torch.full((200, 3, 32, 32), 0.5)
    assert float((nb10.gaussian_noise(gray, 0.1, rng()) - gray).std()) == pytest.approx(0.1, rel=0.01)
    shot = nb10.shot_noise(gray, 50, rng())
    assert float(shot.mean()) == pytest.approx(0.5, rel=0.01)
    assert float(shot.var()) == pytest.approx(0.5 / 50, rel=0.02)
    impulse = nb10.impulse_noise(gray, 0.06, rng())
    assert float((impulse == 0).float().mean()) == pytest.approx(0.03, rel=0.05)
    assert float((impulse == 1).float().mean()) == pytest.approx(0.03, rel=0.05)


def test_brightness_raises_the_value_of_hsv(nb10, x):
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    x = torch.cat([x, torch.zeros(1, 3, 32, 32)])
    hsv = rgb_to_hsv(x.permute(0, 2, 3, 1).numpy())
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.2, 0, 1)
    expected = torch.from_numpy(hsv_to_rgb(hsv)).permute(0, 3, 1, 2)
    torch.testing.assert_close(nb10.brighter(x, 0.2, None), expected, atol=1e-5, rtol=0, check_dtype=False)


def test_contrast_keeps_the_mean(nb10, x):
    found = nb10.contrast(x, 0.3, None)
    torch.testing.assert_close(found.mean((2, 3)), x.mean((2, 3)))
    torch.testing.assert_close(found.std((2, 3)), 0.3 * x.std((2, 3)))


def test_zoom_blur_is_scipys(nb10, x):
    import scipy.ndimage

    def zoomed(picture, factor):
        side = int(np.ceil(32 / factor))
        start = (32 - side) // 2
        part = picture[start : start + side, start : start + side]
        large = scipy.ndimage.zoom(part, (factor, factor), order=1)
        trim = (large.shape[0] - 32) // 2
        return large[trim : trim + 32, trim : trim + 32]

    factors = np.arange(1, 1.16, 0.01)
    picture = x[0, 0].numpy()
    expected = (picture + sum(zoomed(picture, factor) for factor in factors)) / (len(factors) + 1)
    np.testing.assert_allclose(nb10.zoom_blur(x, 1.16, None)[0, 0].numpy(), expected, atol=1e-5)


def test_defocus_spreads_a_point_over_a_disk(nb10):
    point = torch.zeros(1, 3, 32, 32)
    point[:, :, 16, 16] = 1
    spread = nb10.defocus(point, (1.5, 0.1), None)[0, 0]
    assert float(spread.sum()) == pytest.approx(1, abs=1e-5)
    assert int((spread > 0.05).sum()) == 9  # places within 1.5 of the middle
    alone = nb10.defocus(point, (0.3, 0.4), None)[0, 0]
    weights = np.exp(-(np.arange(-1, 2) ** 2) / (2 * 0.4**2))
    weights /= weights.sum()
    np.testing.assert_allclose(alone[15:18, 15:18].numpy(), np.outer(weights, weights), atol=1e-5)


def test_motion_smears_a_point_along_its_direction(nb10):
    point = torch.zeros(1, 3, 32, 32)
    point[:, :, 16, 16] = 1
    weights = np.exp(-(np.arange(13) ** 2) / 8)
    weights /= weights.sum()
    across = nb10.motion(point, (6, 2), rng(), angles=(0, 0))[0, 0]
    np.testing.assert_allclose(across[16, 4:17].flip(0).numpy(), weights, atol=1e-6)
    down = nb10.motion(point, (6, 2), rng(), angles=(90, 90))[0, 0]
    np.testing.assert_allclose(down[4:17, 16].flip(0).numpy(), weights, atol=1e-6)


# What ImageMagick 6.9.11-60 made of one white pixel (255) with -motion-blur 9x2.5+13 and 6x1.5-37: rows down, columns right, value.
SMEARED = {
    (9, 2.5, 13): [(-2, -7, 1), (-1, -6, 3), (-1, -5, 9), (-1, -4, 19), (-1, -3, 34), (0, -2, 50), (0, -1, 64), (0, 0, 70)],
    (6, 1.5, -37): [(0, 0, 107), (1, -2, 44), (1, -1, 85), (2, -3, 3), (2, -2, 14)],
}


@pytest.mark.parametrize("settings", SMEARED)
def test_motion_is_imagemagicks(nb10, settings):
    point = torch.zeros(1, 3, 32, 32)
    point[:, :, 16, 16] = 1
    radius, sigma, angle = settings
    expected = torch.zeros(32, 32)
    for row, column, value in SMEARED[settings]:
        expected[16 + row, 16 + column] = value / 255
    found = nb10.motion(point, (radius, sigma), rng(), angles=(angle, angle))[0, 0].float()
    torch.testing.assert_close(found, expected, atol=1.1 / 255, rtol=0)


def plasma_by_the_released_loops(decay, draws, size=32):
    """One field, value by value, from its definition: corners, middles, edges; indices wrap around."""
    field, step, wobble = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half = step // 2
        grid = range(0, size, step)
        jump = lambda total, draw, wobble=wobble: total / 4 + wobble * draw
        middle = draws(wobble, (len(grid), len(grid)))
        for i, r in enumerate(grid):
            for j, c in enumerate(grid):
                corners = [field[(r + a) % size, (c + b) % size] for a in (0, step) for b in (0, step)]
                field[r + half, c + half] = jump(sum(corners), middle[i, j])
        across, down = draws(wobble, (len(grid), len(grid))), draws(wobble, (len(grid), len(grid)))
        for i, r in enumerate(grid):
            for j, c in enumerate(grid):
                ends = field[r, c] + field[r, (c + step) % size]
                field[r, c + half] = jump(ends + field[r + half, c + half] + field[(r - half) % size, c + half], across[i, j])
                ends = field[r, c] + field[(r + step) % size, c]
                field[r + half, c] = jump(ends + field[r + half, c + half] + field[r + half, (c - half) % size], down[i, j])
        step, wobble = half, wobble / decay
    field -= field.min()
    return field / field.max()


def test_plasma_is_diamond_square(nb10):
    source = rng(4)
    expected = plasma_by_the_released_loops(2.0, lambda w, shape: source.uniform(-w, w, (1, *shape))[0])
    np.testing.assert_allclose(nb10.plasma(1, 2.0, rng(4))[0], expected, atol=1e-10)


def test_fog_is_a_bright_field(nb10, x):
    field = torch.from_numpy(nb10.plasma(6, 3, rng(1))).float()[:, None]
    top = x.amax((1, 2, 3), keepdim=True)
    torch.testing.assert_close(nb10.fog(x, (0.5, 3), rng(1)), (x + 0.5 * field) * top / (top + 0.5))


def test_snow_without_flakes_is_pale(nb10, x):
    gray = V.rgb_to_grayscale(x)
    expected = 0.8 * x + 0.2 * torch.maximum(x, 1.5 * gray + 0.5)
    torch.testing.assert_close(nb10.snow(x, (0.1, 0.2, 1, 9.0, 8, 3, 0.8), rng()), expected, atol=1e-6, rtol=0, check_dtype=False)


def test_glass_moves_pixels_one_after_the_other(nb10, x):
    import scipy.ndimage

    draws = rng(2)
    blur = lambda picture: scipy.ndimage.gaussian_filter(picture, (0, 0.4, 0.4), mode="nearest")
    pictures = [blur(picture) for picture in x[:2].double().numpy()]
    for _ in range(2):
        for row in range(31, 1, -1):
            for column in range(31, 1, -1):
                across, down = draws.integers(-1, 1, (2, 2))
                for n, picture in enumerate(pictures):
                    picture[:, row, column] = picture[:, row + down[n], column + across[n]]
    expected = np.stack([blur(picture) for picture in pictures])
    found = nb10.glass(x[:2].clone(), (0.4, 2), rng(2))
    np.testing.assert_allclose(found.numpy()[:, :, 3:-3, 3:-3], expected[:, :, 3:-3, 3:-3], atol=2e-3)


def test_elastic_without_draws_changes_nothing(nb10, x):
    torch.testing.assert_close(nb10.elastic(x, (0, 0, 0), rng()), x, atol=1e-4, rtol=0)


def test_elastic_moves_three_points_as_drawn(nb10):
    """The first strength is an affine map alone: what was at (26, 26), (26, 6), (6, 6) is found where the draw took it."""
    rows, columns = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    x = (torch.stack([columns, rows, rows]) / 31).expand(4, 3, 32, 32)
    moved = np.array([[26.0, 26], [26, 6], [6, 6]]) + rng(3).uniform(-2.56, 2.56, (4, 3, 2))
    found = nb10.elastic(x, (0, 0, 0.08), rng(3))
    for picture, places in zip(found, moved, strict=True):
        for (across, down), original in zip(places, ([26, 26], [26, 6], [6, 6]), strict=True):
            grid = torch.tensor([[[[2 * across / 31 - 1, 2 * down / 31 - 1]]]], dtype=torch.float32)
            value = 31 * F.grid_sample(picture[None], grid, align_corners=True)[0, :2, 0, 0]
            assert value.tolist() == pytest.approx(original, abs=0.05)


# --- the experiments


def test_calibration_error_by_hand(nb10):
    logits = torch.tensor([[0.0, math.log(9)], [0.0, math.log(9)], [math.log(3), 0.0]])  # sure by 0.9, 0.9, 0.75
    assert nb10.calibration_error(logits, torch.tensor([1, 0, 0])) == pytest.approx(100 * (2 * 0.4 + 0.25) / 3, abs=1e-4)


def test_calibration_error_bin_by_bin(nb10):
    logits = 2 * torch.randn(3000, 10, generator=generator())
    labels = torch.randint(10, (3000,), generator=generator(1))
    confidence, answer = logits.softmax(1).max(1)
    expected = 0
    for n in range(15):
        inside = (confidence >= n / 15) & (confidence < (n + 1) / 15)
        if inside.any():
            gap = (answer == labels)[inside].double().mean() - confidence[inside].double().mean()
            expected += float(inside.double().mean() * gap.abs())
    assert nb10.calibration_error(logits, labels) == pytest.approx(100 * expected, abs=1e-3)


def test_temperature_undoes_a_factor(nb10):
    logits = torch.randn(20_000, 5, generator=generator())
    labels = torch.distributions.Categorical(logits=logits).sample()
    assert nb10.best_temperature(3 * logits, labels) == pytest.approx(3, rel=0.05)


def test_pictures_needed(nb10):
    sizes, accuracies = (100, 1000, 10_000), np.array([20.0, 30.0, 50.0])
    assert nb10.pictures_needed(30.0, sizes, accuracies) == pytest.approx(1000)
    assert nb10.pictures_needed(40.0, sizes, accuracies) == pytest.approx(10**3.5)
    assert nb10.pictures_needed(50.1, sizes, accuracies) == math.inf
    falling = np.array([20.0, 30.0, 29.0])
    assert nb10.pictures_needed(29.5, sizes, falling) == pytest.approx(10**2.95)
    assert nb10.pictures_needed(30.5, sizes, falling) == math.inf


def test_schedule(nb10):
    assert [nb10.schedule(p) for p in (0, 0.075, 0.15, 0.575, 1)] == pytest.approx([0, 0.5, 1, 0.5, 0])


@pytest.fixture
def small(nb10):
    return replace(nb10.Config(), widths=(4, 8, 8), stride=2, batch_size=20)


@pytest.fixture
def bright():
    """Random bytes in which the label is the brighter half of the picture."""
    images = torch.randint(100, (200, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    labels = torch.arange(200) % 2
    images[labels == 1, :, :16] += 100
    images[labels == 0, :, 16:] += 100
    return {"train": [images[:150], labels[:150]], "judge": [images[150:], labels[150:]]}


def test_first_answers_are_unsure(nb10):
    model = nb10.Network(nb10.Config(), 3)
    loss = F.cross_entropy(model(torch.rand(50, 3, 32, 32)), torch.arange(50) % 10)
    assert loss.item() == pytest.approx(math.log(10), abs=0.2)


def test_training_learns_and_looks_when_asked(nb10, small, bright):
    weights, log = nb10.train(nb10.Recipe(), small, bright, 43, 0, looks=4)
    assert log["step"] == [11, 22, 33, 43]
    assert log["train"][-1] > 90
    assert log["judge"][-1] > 90
    images, labels = bright["judge"]
    assert 100 * float(nb10.rights(small, weights, images, labels).float().mean()) == pytest.approx(log["judge"][-1])


def test_trainings_side_by_side_are_those_alone(nb10, small, bright):
    """The weights at the beginning come from a generator of their own, not from one that the threads share."""
    recipe = nb10.Recipe((nb10.random_flip, nb10.random_zoom))
    one = lambda seed: nb10.train(recipe, small, bright, 5, seed)[0]
    alone = [one(seed) for seed in range(6)]
    together = nb10.over_cores(one, range(6), "side by side")
    for first, second in zip(alone, together, strict=True):
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(alone[0]["layers.0.0.weight"], alone[1]["layers.0.0.weight"])


def test_every_picture_once_before_any_twice(nb10, small, monkeypatch):
    images = torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1).expand(50, 3, 32, 32)
    seen = []
    record = lambda recipe, model, x, y, draws: seen.append((255 * x[:, 0, 0, 0]).round()) or model(x).sum()
    monkeypatch.setitem(nb10.train.__globals__, "loss_of", record)
    pictures = {"train": [images, torch.zeros(50, dtype=torch.long)], "judge": [images, torch.zeros(50, dtype=torch.long)]}
    nb10.train(nb10.Recipe(), replace(small, batch_size=10), pictures, 10, 0)
    for epoch in (torch.cat(seen[:5]), torch.cat(seen[5:])):
        assert sorted(epoch.tolist()) == list(range(50))
    seen.clear()
    nb10.train(nb10.Recipe(), replace(small, batch_size=20), pictures, 5, 0)  # the rest of a round is not lost
    assert sorted(torch.cat(seen).tolist()) == sorted(2 * list(range(50)))


def test_last_steps_are_plain(nb10, small, bright, monkeypatch):
    recipes, whole = [], nb10.loss_of
    monkeypatch.setitem(nb10.train.__globals__, "loss_of", lambda recipe, *rest: recipes.append(recipe) or whole(recipe, *rest))
    recipe = nb10.Recipe((nb10.random_flip,), learning_rate=0.03)
    nb10.train(recipe, small, bright, 7, 0, plain=2)
    assert recipes == [recipe] * 5 + [nb10.Recipe()] * 2


class Linear(torch.nn.Module):
    """Answers that can be computed by hand, in place of a network."""

    def forward(self, x):
        return x.mean((2, 3)) @ torch.linspace(-9, 9, 30).sin().view(3, 10)


def test_loss_of_each_recipe(nb10, x):
    x = x * torch.tensor([1, 0.5, 0.1]).view(3, 1, 1)  # so that channels matter
    y, model = torch.tensor([0, 1, 2, 3, 4, 5]), Linear()
    mirror = lambda x, generator=None: x.flip(1)
    cross = F.cross_entropy
    found = lambda **settings: nb10.loss_of(nb10.Recipe(**settings), model, x, y, None)
    torch.testing.assert_close(found(), cross(model(x), y))
    torch.testing.assert_close(found(draws=(mirror,)), cross(model(x.flip(1)), y))
    smooth = torch.full((6, 10), 0.01) + 0.9 * F.one_hot(y, 10)
    torch.testing.assert_close(found(smoothing=0.1), cross(model(x), smooth))
    halves = lambda x, y, generator=None: ((x + x.roll(1, 0)) / 2, (F.one_hot(y, 10) + F.one_hot(y, 10).roll(1, 0)) / 2)
    mixed = model((x + x.roll(1, 0)) / 2)
    torch.testing.assert_close(found(mix=halves), (cross(mixed, y) + cross(mixed, y.roll(1))) / 2)
    two = lambda x, drawn, generator=None: torch.cat([x.roll(1, 1), drawn.roll(1, 1)])
    expected = nb10.augmix_loss(model(x.flip(1)), model(x.roll(1, 1)), model(x.flip(1).roll(1, 1)), y)
    torch.testing.assert_close(found(draws=(mirror,), again=two), expected)


def test_best_rate_is_chosen_on_the_validation_pictures(nb10):
    best = {"a": 0.3, "b": 0.03}
    recipes = {name: nb10.Recipe(smoothing=n / 10) for n, name in enumerate(best)}

    def fit(recipe, pictures, steps, seed, looks):
        assert (pictures["judge"], steps, seed, looks) == ("held out", 7, 100, 1)
        wanted = best["ab"[round(10 * recipe.smoothing)]]
        return None, {"judge": [-abs(math.log(recipe.learning_rate / wanted))]}

    pictures = {"train": "training", "validation": "held out", "test": "test"}
    chosen = nb10.with_best_rate(recipes, fit, pictures, 7, 100)
    assert {name: recipe.learning_rate for name, recipe in chosen.items()} == best
    assert [recipe.smoothing for recipe in chosen.values()] == [0.0, 0.1]


def test_compared_is_paired_over_pictures_and_counts_seeds(nb10):
    first = torch.rand(3, 500, generator=generator(1)) < 0.6
    second = torch.rand(3, 500, generator=generator(2)) < 0.5
    mean, low, high, seeds = nb10.compared(first, second)
    difference = 100 * (first.double() - second.double()).numpy()
    interval = scipy.stats.ttest_1samp(difference.mean(0), 0).confidence_interval(0.95)
    assert (mean, low, high) == pytest.approx((difference.mean(), interval.low, interval.high))
    assert seeds == (np.sign(difference.mean(1)) == np.sign(mean)).sum()
    assert nb10.compared(second, first)[:3] == pytest.approx((-mean, -high, -low))


def test_percents_are_one_for_each_seed(nb10):
    right = torch.tensor([[True, False, False, False], [True, True, True, False]])
    assert nb10.percents(right) == [25.0, 75.0]
    assert nb10.percents(torch.tensor([[-0.5, 0.25]])) == [-12.5]


def test_answers_come_batch_by_batch_in_order(nb10, small):
    images = torch.randint(256, (250, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    model = nb10.Network(small).train()
    found = nb10.answers(model, images)
    assert not model.training
    torch.testing.assert_close(found, model(images.float() / 255).detach(), atol=1e-5, rtol=1e-4)


def test_shares_average_over_the_corruptions_asked_for(nb10):
    right = torch.zeros(14, 2, dtype=torch.bool)
    right[1] = True
    right[3, 0] = True
    found = nb10.shares([{"corrupted": right}], "corrupted", [1, 3])
    torch.testing.assert_close(found, torch.tensor([[1.0, 0.5]]))
    clean = torch.tensor([[True, False]])
    torch.testing.assert_close(nb10.shares([{"clean": clean}] * 2, "clean", [0]), torch.tensor([[1.0, 0.0]] * 2))


def test_groups_hold_the_corruptions_they_name(nb10):
    names = list(nb10.CORRUPTIONS)
    groups = {name: {names[n] for n in places} for name, (what, places) in nb10.GROUPS.items() if what == "corrupted"}
    assert groups["corrupted"] == set(names)
    assert groups["noises"] == {"Gaussian noise", "shot noise", "impulse noise"}
    assert groups["without noises"] == set(names) - groups["noises"]
    assert groups["without light"] == set(names) - {"brightness", "contrast", "fog", "snow"}


def test_examined(nb10, small, bright):
    weights, log = nb10.train(nb10.Recipe(), small, bright, 60, 0)
    images, labels = bright["judge"]
    darker = torch.stack([images, images // 2])
    pictures = {"test": bright["judge"], "validation": bright["judge"], "corrupted": (darker, labels)}
    found = nb10.examined(weights, small, pictures)
    assert 100 * float(found["clean"].float().mean()) == pytest.approx(log["judge"][-1])
    assert found["corrupted"].shape == (2, 50)
    assert torch.equal(found["corrupted"][0], found["clean"][0])
    assert torch.equal(found["corrupted"][1], nb10.rights(small, weights, images // 2, labels))
    model = nb10.with_weights(small, weights, "cpu")
    logits = nb10.answers(model, images)
    torch.testing.assert_close(logits, model((images / 255).float()).detach())
    assert found["calibration"] == pytest.approx(nb10.calibration_error(logits, labels))
    cooled = logits / nb10.best_temperature(logits, labels)
    assert found["after"] == pytest.approx(nb10.calibration_error(cooled, labels))


def test_sixes_and_nines(nb10):
    labels = torch.tensor([6, 6, 9, 9, 1])
    assert nb10.digit_shares(torch.tensor([6, 9, 6, 9, 2]), labels) == pytest.approx([50, 50, 0])
    assert nb10.digit_shares(torch.tensor([6, 6, 1, 9, 1]), labels) == pytest.approx([75, 0, 100])


def test_mixup_of_pictures_keeps_one_label(nb10, x):
    y = torch.arange(6)
    for seed in range(5):
        mixed, labels = nb10.mixup_of_pictures(x, y, generator(seed))
        expected, soft = nb10.mixup(x, y, 1.0, generator(seed), classes=10)
        assert torch.equal(mixed, expected)
        assert torch.equal(labels.argmax(1), soft.argmax(1))
        assert torch.equal(labels.sum(1), torch.ones(6))
        assert set(labels.flatten().tolist()) == {0.0, 1.0}


def test_noise_has_the_deviation_asked_for(nb10):
    gray = torch.full((100, 3, 32, 32), 0.5)
    assert float((nb10.noisy(gray, generator()) - gray).std()) == pytest.approx(0.05, rel=0.01)
    assert float((nb10.noisy(gray, generator(), deviation=0.1) - gray).std()) == pytest.approx(0.1, rel=0.01)


def test_two_more_and_two_by_augmix(nb10, x, monkeypatch):
    others = nb10.two_more(x, None, generator())
    assert others.shape == (12, 3, 32, 32)
    assert torch.equal(others, nb10.two_more(x, None, generator()))
    assert not torch.equal(others[:6], others[6:])
    monkeypatch.setitem(nb10.two_by_augmix.__globals__, "augmix", lambda x, generator: -x)
    assert torch.equal(nb10.two_by_augmix(None, x), -torch.cat([x, x]))


def test_lost_is_counted_on_the_same_pictures(nb10):
    verdict = {"clean": torch.tensor([[True, True, False, True]]), "corrupted": torch.zeros(14, 2, dtype=torch.bool)}
    verdict["corrupted"][:, 0] = True
    found = nb10.by_group([verdict])
    torch.testing.assert_close(found["corrupted less clean"], torch.tensor([[0.0, -1.0]]))
    torch.testing.assert_close(found["clean"], torch.tensor([[1.0, 1, 0, 1]]))


def test_many_answers_mean_what_they_say(nb10, small, bright):
    weights, _ = nb10.train(nb10.Recipe(), small, bright, 10, 0)
    images, labels = bright["judge"]
    found = nb10.many_answers(weights, small, nb10.Recipe((nb10.random_flip,)), bright, 0)
    model = nb10.with_weights(small, weights, "cpu")
    plain, mirrored = nb10.answers(model, images), nb10.answers(model, images.flip(3))
    assert torch.equal(found["as they are"], plain.argmax(1) == labels)
    both = plain.softmax(1) + mirrored.softmax(1)
    assert torch.equal(found["with mirror image"], both.argmax(1) == labels)
    nothing = nb10.many_answers(weights, small, nb10.Recipe(), bright, 0)
    assert torch.equal(nothing["eight draws"], found["as they are"])
