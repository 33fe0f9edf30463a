"""Notebook 06 against NumPy, SciPy, scikit-learn, torchvision, explicit loops and models computed anew."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from scipy import ndimage
from scipy.spatial.distance import cdist, mahalanobis
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score
from torchvision.models.feature_extraction import create_feature_extractor

from tests.checks import check_amp_dtype, check_peak_memory, check_seconds_in_turns, check_statistics


def correlated(count, places, features, dtype=torch.float64):
    """Embeddings whose features are correlated, differently at each place, with a mean."""
    mixing = torch.randn(places, features, features, dtype=dtype)
    return torch.einsum("bpd,pde->bpe", torch.randn(count, places, features, dtype=dtype), mixing) + 3 * torch.randn(
        places, features, dtype=dtype
    )


def numpy_covariance(embeddings):
    return np.stack([np.cov(embeddings[:, place].double().numpy(), rowvar=False) for place in range(embeddings.shape[1])])


def gaussian_of(nb06, embeddings, *sizes, dtype=None):
    """OnlineGaussian of the embeddings, in batches of these sizes."""
    gaussian = nb06.OnlineGaussian(*embeddings.shape[1:], dtype=dtype or embeddings.dtype)
    for batch in embeddings.split(list(sizes) or len(embeddings)):
        gaussian.update(batch)
    return gaussian


# --- online statistics


@pytest.mark.parametrize("sizes", [(20,), (1,) * 20, (1, 19), (19, 1), (3, 7, 10)])
def test_online_statistics_are_those_of_numpy(nb06, sizes):
    x = correlated(20, 3, 5)
    gaussian = gaussian_of(nb06, x, *sizes)
    assert gaussian.count == 20
    np.testing.assert_allclose(gaussian.mean.numpy(), x.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(gaussian.covariance(0).numpy(), numpy_covariance(x), rtol=1e-10, atol=1e-12)


def test_regularisation_is_added_once_to_the_diagonal(nb06):
    x = correlated(20, 3, 5)
    gaussian = gaussian_of(nb06, x, 8, 12)
    expected = numpy_covariance(x) + 0.3 * np.eye(5)
    np.testing.assert_allclose(gaussian.covariance(0.3).numpy(), expected, rtol=1e-10)
    np.testing.assert_allclose(gaussian.covariance(0.3).numpy(), expected, rtol=1e-10)  # asking does not change it
    np.testing.assert_allclose(gaussian.covariance().numpy(), numpy_covariance(x) + 0.01 * np.eye(5), rtol=1e-10)


def test_places_are_handled_in_parts(nb06, monkeypatch):
    x = correlated(30, 7, 5)
    whole = gaussian_of(nb06, x, 10, 20)
    factors, distances = nb06.cholesky_factors(whole), nb06.mahalanobis(x, whole.mean, nb06.cholesky_factors(whole))
    anatomy = nb06.Anatomy(whole, x)
    monkeypatch.setattr(nb06, "PLACES", 3)
    parts = gaussian_of(nb06, x, 10, 20)
    assert torch.allclose(whole.scatter, parts.scatter, rtol=1e-12)
    assert torch.allclose(factors, nb06.cholesky_factors(parts), rtol=1e-10)
    assert torch.allclose(distances, nb06.mahalanobis(x, parts.mean, nb06.cholesky_factors(parts)), rtol=1e-10)
    again = nb06.Anatomy(parts, x)
    assert all(torch.allclose(getattr(anatomy, name), getattr(again, name), rtol=1e-8) for name in ("pull", "precision", "square"))


def test_merging_does_not_depend_on_the_order(nb06):
    x = correlated(26, 2, 4)
    parts = [gaussian_of(nb06, part) for part in x.split([1, 5, 8, 12])]
    for order in itertools.permutations(range(4)):
        merged = nb06.OnlineGaussian(2, 4, torch.float64)
        for index in order:
            merged.merge(parts[index])
        assert merged.count == 26
        np.testing.assert_allclose(merged.mean.numpy(), x.mean(0).numpy(), rtol=1e-12)
        np.testing.assert_allclose(merged.covariance(0).numpy(), numpy_covariance(x), rtol=1e-10, atol=1e-12)


def test_merging_with_nothing(nb06):
    x = correlated(6, 2, 3)
    gaussian, empty = gaussian_of(nb06, x), nb06.OnlineGaussian(2, 3, torch.float64)
    gaussian.merge(empty)
    empty.merge(empty)
    assert empty.count == 0
    np.testing.assert_allclose(gaussian.covariance(0).numpy(), numpy_covariance(x), rtol=1e-10)
    with pytest.raises(ValueError, match="places or features differ"):
        gaussian.merge(nb06.OnlineGaussian(2, 4))


@pytest.mark.parametrize("count", [0, 1])
def test_covariance_of_fewer_than_two_pictures_is_undefined(nb06, count):
    gaussian = nb06.OnlineGaussian(2, 3)
    if count:
        gaussian.update(torch.randn(1, 2, 3))
    with pytest.raises(ValueError, match=f"a covariance needs two pictures or more, this is {count}"):
        gaussian.covariance()
    with pytest.raises(ValueError, match="two pictures or more"):
        nb06.cholesky_factors(gaussian)


def test_a_constant_feature_is_regularised(nb06):
    x = correlated(10, 2, 3)
    x[..., 1] = 7.0
    gaussian = gaussian_of(nb06, x, 4, 6)
    assert gaussian.covariance(0)[:, 1].abs().max() < 1e-12
    distances = nb06.mahalanobis(x, gaussian.mean, nb06.cholesky_factors(gaussian, 0.01))
    assert distances.isfinite().all()
    x[0, 0, 1] += 0.5  # a change that training never saw: 0.5 / sqrt(0.01)
    moved = nb06.mahalanobis(x[:1], gaussian.mean, nb06.cholesky_factors(gaussian, 0.01))
    assert moved[0, 0].item() == pytest.approx((distances[0, 0].item() ** 2 + 25) ** 0.5, rel=1e-6)
    with pytest.raises(ValueError, match=r"2 covariances are not positive definite: raise regularisation above 0"):
        nb06.cholesky_factors(gaussian, 0)


@pytest.mark.parametrize("shape", [(5, 2, 4), (5, 3, 3), (2, 3), (0, 2, 3)])
def test_embeddings_of_another_shape_are_refused(nb06, shape):
    with pytest.raises(ValueError, match=r"do not fit: \(B, 2, 3\) with B > 0"):
        nb06.OnlineGaussian(2, 3).update(torch.zeros(shape))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_refused_and_change_nothing(nb06, value):
    gaussian = gaussian_of(nb06, correlated(5, 2, 3))
    before = gaussian.scatter.clone()
    x = torch.zeros(4, 2, 3, dtype=torch.float64)
    x[3, 1, 2] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        gaussian.update(x)
    assert gaussian.count == 5
    assert torch.equal(gaussian.scatter, before)


def test_precision_with_a_large_mean(nb06):
    """Online in float32 keeps 1e-5 where the schoolbook form has lost everything; accumulating in float64 loses nothing."""
    x = (correlated(100, 2, 4) + 1000).float()
    exact = numpy_covariance(x)
    error = lambda covariance: np.abs(covariance.double().numpy() - exact).max() / np.abs(exact).max()
    assert error(gaussian_of(nb06, x, *[10] * 10).covariance(0)) < 1e-5
    assert error(gaussian_of(nb06, x, *[10] * 10, dtype=torch.float64).covariance(0)) < 1e-12
    assert error(nb06.schoolbook_covariance(x.split(10))) > 1e-3
    assert error(nb06.schoolbook_covariance(x.double().split(10))) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_embeddings_of_another_precision(nb06, dtype):
    x = correlated(12, 2, 3).to(dtype)
    gaussian = gaussian_of(nb06, x, 5, 7, dtype=torch.float32)
    assert gaussian.scatter.dtype == torch.float32
    np.testing.assert_allclose(gaussian.covariance(0).numpy(), numpy_covariance(x), rtol=1e-3, atol=1e-4)


def test_update_leaves_the_embeddings_alone(nb06):
    x = correlated(6, 2, 3)
    before = x.clone()
    gaussian_of(nb06, x, 2, 4)
    assert torch.equal(x, before)


def test_errors_of_covariances(nb06):
    batches = list((correlated(60, 3, 5) + 300).float().split(20))
    errors = nb06.covariance_errors(batches)
    exact = numpy_covariance(torch.cat(batches))
    school = np.abs(nb06.schoolbook_covariance(batches).double().numpy() - exact).max() / np.abs(exact).max()
    assert errors["schoolbook, float32"][0] == pytest.approx(school, rel=1e-6)
    assert errors["online, float64"][0] < 1e-12
    assert errors["online, float64"][1] == 0
    assert nb06.covariance_errors([batch + 1e6 for batch in batches])["schoolbook, float32"][1] > 0.5


# --- Mahalanobis distance


def test_mahalanobis_against_scipy_and_sklearn(nb06):
    x, new = correlated(40, 3, 5), correlated(4, 3, 5)
    gaussian = gaussian_of(nb06, x)
    ours = nb06.mahalanobis(new, gaussian.mean, nb06.cholesky_factors(gaussian, 0.05))
    assert ours.shape == (4, 3)
    for place in range(3):
        inverse = np.linalg.inv(numpy_covariance(x)[place] + 0.05 * np.eye(5))
        expected = [mahalanobis(v, x[:, place].mean(0).numpy(), inverse) for v in new[:, place].numpy()]
        np.testing.assert_allclose(ours[:, place].numpy(), expected, rtol=1e-9)
    fitted = EmpiricalCovariance().fit(x[:, 1].numpy())  # divides by N, without regularisation
    plain = nb06.mahalanobis(new, gaussian.mean, nb06.cholesky_factors(gaussian, 0))[:, 1].square().numpy()
    np.testing.assert_allclose(plain, fitted.mahalanobis(new[:, 1].numpy()) * 39 / 40, rtol=1e-8)


def test_mahalanobis_of_the_mean_is_zero_and_of_one_picture_works(nb06):
    gaussian = gaussian_of(nb06, correlated(9, 3, 4))
    assert nb06.mahalanobis(gaussian.mean[None], gaussian.mean, nb06.cholesky_factors(gaussian)).abs().max() < 1e-12


@pytest.mark.parametrize("shapes", [((2, 3, 4), (3, 5), (3, 5, 5)), ((2, 3, 4), (3, 4), (3, 4, 5)), ((2, 4), (3, 4), (3, 4, 4))])
def test_mahalanobis_of_shapes_that_do_not_fit(nb06, shapes):
    with pytest.raises(ValueError, match="shapes differ"):
        nb06.mahalanobis(*map(torch.zeros, shapes))


def test_factors_of_some_features_are_those_of_their_own_model(nb06):
    x, features = correlated(30, 3, 6), torch.tensor([4, 0, 5])
    gaussian, own = gaussian_of(nb06, x), gaussian_of(nb06, x[..., features])
    assert torch.allclose(nb06.cholesky_factors(gaussian, 0.02, features), nb06.cholesky_factors(own, 0.02), rtol=1e-10)
    expected = nb06.mahalanobis(x[..., features], own.mean, nb06.cholesky_factors(own, 0.02))
    assert torch.allclose(nb06.distances_of(gaussian, x, features, 0.02), expected, rtol=1e-10)


def test_known_pictures_lie_closer_than_new_ones_as_hotelling_says(nb06):
    """(N - 1) / N d exactly, and (N^2 - 1) d / (N (N - d - 2)) on average."""
    count, d = 30, 10
    known, new = torch.randn(count, 4000, d, dtype=torch.float64), torch.randn(1, 4000, d, dtype=torch.float64)
    gaussian = gaussian_of(nb06, known)
    factors = nb06.cholesky_factors(gaussian, 0)
    seen = nb06.mahalanobis(known, gaussian.mean, factors).square().mean(0)
    assert torch.allclose(seen, torch.full_like(seen, (count - 1) / count * d))
    unseen = nb06.mahalanobis(new, gaussian.mean, factors).square().mean().item()
    assert unseen == pytest.approx((count**2 - 1) * d / (count * (count - d - 2)), rel=0.03)


@pytest.mark.parametrize("regularisation", [0.01, 1.0])
def test_leaving_out_without_a_refit(nb06, regularisation):
    x = correlated(14, 2, 20)  # more features than pictures
    gaussian = gaussian_of(nb06, x)
    factors = nb06.cholesky_factors(gaussian, regularisation, left_out=1)
    fast = nb06.leave_one_out(nb06.mahalanobis(x, gaussian.mean, factors).square(), 14)
    for k in range(14):
        rest = gaussian_of(nb06, torch.cat([x[:k], x[k + 1 :]]))
        slow = nb06.mahalanobis(x[k : k + 1], rest.mean, nb06.cholesky_factors(rest, regularisation)).square()
        assert torch.allclose(fast[k], slow[0], rtol=1e-6)


def test_leaving_out_takes_three_pictures(nb06):
    with pytest.raises(ValueError, match="three or more, these are 2"):
        nb06.leave_one_out(torch.ones(2, 1), 2)


@pytest.mark.parametrize(("count", "alarms", "rank"), [(99, 0.05, 95), (19, 0.05, 19), (209, 0.05, 200), (99, 0.5, 50)])
def test_threshold(nb06, count, alarms, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, count + 1))
    assert nb06.threshold(scores, alarms) == rank


def test_a_threshold_from_too_few_pictures_is_refused(nb06):
    with pytest.raises(ValueError, match=r"18 good pictures are too few to reject 5.0% of them"):
        nb06.threshold(np.arange(18.0), 0.05)


def test_threshold_keeps_its_promise(nb06):
    """A new score exceeds the threshold with the probability asked for."""
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(4000, 40))
    exceeded = np.mean([row[39] > nb06.threshold(row[:39], 0.1) for row in scores])
    assert exceeded == pytest.approx(0.1, abs=0.02)


# --- heat maps


@pytest.mark.parametrize(("side", "size", "sigma"), [(7, 28, 4.0), (5, 19, 1.0), (8, 8, 2.0)])
def test_heat_maps_are_interpolation_and_gaussian_filter(nb06, side, size, sigma):
    distances = torch.rand(2, side * side, dtype=torch.float64)
    ours = nb06.heat_maps(distances, size, sigma)
    for index in range(2):
        large = F.interpolate(distances[index].view(1, 1, side, side), size=size, mode="bilinear", align_corners=False)[0, 0]
        np.testing.assert_allclose(ours[index].numpy(), ndimage.gaussian_filter(large.numpy(), sigma), rtol=1e-5)


def test_heat_maps_at_some_rows_and_columns(nb06):
    distances = torch.rand(2, 49)
    assert torch.allclose(nb06.heat_maps(distances, 30, 2.0, 4), nb06.heat_maps(distances, 30, 2.0)[:, ::4, ::4], atol=1e-6)


def test_heat_maps_without_smoothing_and_of_a_constant(nb06):
    assert torch.equal(nb06.smoothing_matrix(4, 4, 0), torch.eye(4))
    assert torch.allclose(nb06.heat_maps(torch.full((1, 16), 3.0), 32, 4.0), torch.tensor(3.0))
    with pytest.raises(ValueError, match="12 places are no square grid"):
        nb06.heat_maps(torch.zeros(1, 12), 32, 4.0)


# --- per-region overlap


def pro_by_definition(masks, maps, max_fpr):
    """Threshold by threshold, region by region; trapezoids, the last one cut at max_fpr."""
    regions = [(i, ndimage.label(mask, np.ones((3, 3)))[0] == n) for i, mask in enumerate(masks)
               for n in range(1, ndimage.label(mask, np.ones((3, 3)))[1] + 1)]  # fmt: skip
    points = [(0.0, 0.0)]
    for level in sorted(set(maps.ravel()), reverse=True):
        above = maps >= level
        points.append((above[~masks].mean(), np.mean([above[i][region].mean() for i, region in regions])))
    area = 0.0
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x1 > max_fpr:
            if x0 < max_fpr:
                cut = y0 + (y1 - y0) * (max_fpr - x0) / (x1 - x0)
                area += (max_fpr - x0) * (y0 + cut) / 2
            break
        area += (x1 - x0) * (y0 + y1) / 2
    return area / max_fpr


@pytest.mark.parametrize("levels", [4, 1000])
@pytest.mark.parametrize("max_fpr", [0.05, 0.3, 1.0])
def test_pro_score_by_definition(nb06, levels, max_fpr):
    rng = np.random.default_rng(levels)
    for _ in range(5):
        masks = ndimage.binary_dilation(rng.random((3, 12, 12)) < 0.02, np.ones((1, 3, 3)))
        masks[2] = False  # a good picture
        maps = rng.integers(0, levels, masks.shape) + masks * rng.integers(0, levels // 2)
        assert nb06.pro_score(masks, maps, max_fpr) == pytest.approx(pro_by_definition(masks, maps, max_fpr), abs=1e-12)


def test_pro_score_of_one_region_is_the_area_under_the_roc_curve(nb06):
    rng = np.random.default_rng(1)
    masks = np.zeros((2, 10, 10), bool)
    masks[0, 2:6, 3:7] = True
    maps = rng.normal(size=masks.shape) + masks
    assert nb06.pro_score(masks, maps, 1.0) == pytest.approx(roc_auc_score(masks.ravel(), maps.ravel()), abs=1e-12)


def test_pro_score_of_known_maps(nb06):
    masks = np.zeros((1, 10, 10), bool)
    masks[0, :2, :2] = masks[0, 5:, 5:] = True
    assert nb06.pro_score(masks, masks.astype(float)) == pytest.approx(1)
    assert nb06.pro_score(masks, -masks.astype(float)) == pytest.approx(0)
    assert nb06.pro_score(masks, np.zeros(masks.shape)) == pytest.approx(0.15)  # chance: half of max_fpr
    assert nb06.pro_score(masks, masks) == pytest.approx(1)
    assert nb06.pro_score(masks, masks.astype(np.uint8) + 1) == pytest.approx(1)  # unsigned: 0 - 1 is no -1
    small = np.zeros(masks.shape)
    small[0, :2, :2] = 1  # the small region weighs as much as the large one
    assert nb06.pro_score(masks, small, 1.0) == pytest.approx(0.75)
    assert nb06.pro_score(masks.astype(np.uint8) * 255, torch.tensor(small), 1.0) == pytest.approx(0.75)


def test_regions_touch_by_corners(nb06):
    masks = np.zeros((1, 6, 6), bool)
    masks[0, 0, 0] = masks[0, 1, 1] = masks[0, 4, 4] = True
    maps = np.zeros(masks.shape)
    maps[0, 0, 0] = 1
    assert nb06.pro_curve(masks, maps)[1][1] == pytest.approx(0.25)  # half of the first of two regions


@pytest.mark.parametrize(
    ("masks", "maps", "max_fpr", "message"),
    [
        (np.zeros((1, 4, 4)), np.zeros((1, 4, 4)), 0.3, "pixels of both kinds"),
        (np.ones((1, 4, 4)), np.zeros((1, 4, 4)), 0.3, "pixels of both kinds"),
        (np.eye(4), np.zeros((4, 4)), 0.3, r"must both be \(N, H, W\)"),
        (np.eye(4)[None], np.zeros((1, 4, 5)), 0.3, r"must both be \(N, H, W\)"),
        (np.eye(4)[None], np.full((1, 4, 4), np.nan), 0.3, "without NaN"),
        (np.eye(4)[None], np.zeros((1, 4, 4)), 0.0, r"must lie in \(0, 1\]"),
        (np.eye(4)[None], np.zeros((1, 4, 4)), 1.1, r"must lie in \(0, 1\]"),
    ],
)
def test_pro_score_of_bad_input(nb06, masks, maps, max_fpr, message):
    with pytest.raises(ValueError, match=message):
        nb06.pro_score(masks, maps, max_fpr)


# --- features


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "wide_resnet50_2"])
def test_extractor_gives_what_torchvision_gives(nb06, name):
    extractor, backbone = nb06.Extractor(name), nb06.BACKBONES[name]
    reference = getattr(torchvision.models, name)(weights=None).eval()
    reference.load_state_dict(extractor.model.state_dict(), strict=False)
    pictures = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    normalised = torchvision.transforms.functional.normalize(pictures / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with torch.no_grad():
        expected = create_feature_extractor(reference, list(backbone.layers))(normalised)
    maps = extractor(pictures)
    assert [m.shape[1] for m in maps] == list(backbone.widths)
    assert [m.shape[-1] for m in maps] == [16, 8, 4]
    for m, e in zip(maps, expected.values(), strict=True):
        assert torch.allclose(m, e, rtol=1e-4, atol=1e-5 * float(e.abs().max()))
    assert not any(p.requires_grad for p in extractor.parameters())
    assert not extractor.model.training


def stages(batch=3):
    return [torch.randn(batch, 4, 8, 8), torch.randn(batch, 6, 4, 4), torch.randn(batch, 5, 2, 2)]


@pytest.mark.parametrize("average", [1, 3])
def test_embed_place_by_place(nb06, average):
    maps = stages()
    embeddings, reach = nb06.embed(maps, average=average), average // 2
    assert embeddings.shape == (3, 64, 15)
    for row, column in ((0, 0), (3, 5), (7, 7)):
        expected = []
        for m in maps:
            r, c = row * m.shape[2] // 8, column * m.shape[3] // 8
            window = m[1, :, max(r - reach, 0) : r + reach + 1, max(c - reach, 0) : c + reach + 1]
            expected.append(window.mean((1, 2)))
        assert torch.allclose(embeddings[1, row * 8 + column], torch.cat(expected), atol=1e-6)


@pytest.mark.parametrize("features", [[14, 0, 3, 9, 4], [2, 1], [12]])
@pytest.mark.parametrize("average", [1, 3])
def test_embed_some_features(nb06, features, average):
    maps = stages()
    expected = nb06.embed(maps, average=average)[..., features]
    assert torch.equal(nb06.embed(maps, torch.tensor(features), average), expected)


def test_draw_features(nb06):
    drawn = nb06.draw_features(20, 8, 3)
    assert len(set(drawn.tolist())) == 8
    assert torch.equal(drawn, nb06.draw_features(20, 8, 3))
    assert not torch.equal(drawn, nb06.draw_features(20, 8, 4))
    assert sorted(nb06.draw_features(5, 5, 0).tolist()) == list(range(5))
    for count in (0, 21):
        with pytest.raises(ValueError, match=f"{count} features cannot be drawn from 20"):
            nb06.draw_features(20, count, 0)


def test_amp_dtype(nb06, monkeypatch):
    check_amp_dtype(nb06, monkeypatch)


class TinyExtractor:
    """Stands for a backbone: three maps of a picture's colours, without randomness."""

    mean = torch.zeros(3)

    def __call__(self, pictures):
        x = pictures.float() / 255
        return [F.avg_pool2d(x, 4), F.avg_pool2d(x.square(), 8), F.avg_pool2d(x.sqrt(), 16)]


def pictures(count, size=32):
    return torch.randint(256, (count, 3, size, size), dtype=torch.uint8)


def test_fit_does_not_depend_on_the_batches(nb06):
    good, features = pictures(11), torch.tensor([0, 4, 8, 2])
    one, many = (nb06.fit(TinyExtractor(), good, features, 3, size) for size in (11, 3))
    assert one.count == many.count == 11
    assert torch.allclose(one.scatter, many.scatter, rtol=1e-3, atol=1e-5)
    embeddings = nb06.embeddings_of(TinyExtractor(), good, features, 3, 4)
    assert torch.equal(embeddings, nb06.embed(TinyExtractor()(good), features, 3))
    np.testing.assert_allclose(one.covariance(0).numpy(), numpy_covariance(embeddings), rtol=1e-3, atol=1e-6)


# --- experiment 1


def category_of(nb06, count=12, masks=True):
    """Twelve test pictures of 32 pixels, the last two thirds defective: brighter squares, one kind in the first half of them."""
    test = pictures(count) // 4
    kinds = ["good"] * (count // 3) + ["spot"] * (count // 3) + ["corner"] * (count - 2 * (count // 3))
    drawn = np.zeros((count, 32, 32), bool)
    for index in range(count // 3, count):
        drawn[index, index : index + 6, 8:16] = True
        test[index][:, torch.from_numpy(drawn[index])] += 100
    return nb06.Category("tiny", pictures(10) // 4, test, tuple(kinds), drawn if masks else None, "synthetic", "32 × 32")


def test_metrics(nb06):
    category, maps = category_of(nb06), torch.rand(12, 32, 32)
    found = nb06.metrics(category, maps)
    assert found["image AUROC"] == pytest.approx(roc_auc_score([0] * 4 + [1] * 8, maps.amax((1, 2))))
    assert found["pixel AUROC"] == pytest.approx(roc_auc_score(category.masks.ravel(), maps.ravel()))
    assert found["PRO"] == pytest.approx(pro_by_definition(category.masks, maps.numpy(), 0.3), abs=1e-9)
    assert set(nb06.metrics(replace(category, masks=None), maps)) == {"image AUROC"}


def test_pooled_is_the_gaussian_of_all_places(nb06):
    x = correlated(15, 4, 3)
    whole = nb06.pooled(gaussian_of(nb06, x, 5, 10))
    assert whole.count == 60
    np.testing.assert_allclose(whole.mean[0].numpy(), x.mean((0, 1)).numpy(), rtol=1e-10)
    np.testing.assert_allclose(whole.covariance(0)[0].numpy(), np.cov(x.reshape(-1, 3).numpy(), rowvar=False), rtol=1e-10)


def test_parts_away(nb06):
    x, new, features = correlated(30, 4, 5), correlated(3, 4, 5), torch.tensor([3, 1])
    parts = nb06.parts_away(gaussian_of(nb06, x), new, features, 0.1)
    v, known = new[2, 1, features].numpy(), x[..., features]
    difference, covariance = v - known[:, 1].mean(0).numpy(), np.cov(known[:, 1].numpy(), rowvar=False) + 0.1 * np.eye(2)
    everywhere = known.reshape(-1, 2).numpy()
    other = v - everywhere.mean(0)
    expected = {
        "PaDiM": np.sqrt(difference @ np.linalg.inv(covariance) @ difference),
        "variances, no covariances": np.sqrt((difference**2 / np.diag(covariance)).sum()),
        "means only": np.linalg.norm(difference),
        "one Gaussian for all places": np.sqrt(other @ np.linalg.inv(np.cov(everywhere, rowvar=False) + 0.1 * np.eye(2)) @ other),
    }
    assert set(parts) == set(expected)
    for name, value in expected.items():
        assert parts[name][2, 1].item() == pytest.approx(value, rel=1e-8)


def test_nearest_patches(nb06):
    bank, embeddings = torch.randn(20, 3), torch.randn(2, 5, 3)
    expected = cdist(embeddings.reshape(-1, 3), bank).min(1).reshape(2, 5)
    np.testing.assert_allclose(nb06.nearest_distances(bank, embeddings).numpy(), expected, rtol=1e-4)


def test_patch_banks_are_a_share_of_the_patches(nb06):
    good, features = pictures(6), torch.tensor([1, 4])
    banks = nb06.patch_banks(TinyExtractor(), good, features, 1, 0.25, (0, 1), batch_size=4)
    rows = {tuple(row) for row in nb06.embed(TinyExtractor()(good), features).flatten(0, 1).tolist()}
    for bank in banks.values():
        assert len(bank) == 6 * 64 // 4
        assert {tuple(row) for row in bank.tolist()} <= rows
    assert torch.equal(banks[1], nb06.patch_banks(TinyExtractor(), good, features, 1, 0.25, (1,), batch_size=4)[1])
    assert not torch.equal(banks[0], banks[1])


def test_pixel_embeddings(nb06):
    good = pictures(2)
    embeddings = nb06.pixel_embeddings(good, 64, "cpu")
    block = (good[1, 2, 4:8, 12:16].float() / 255).mean()
    assert embeddings[1, 1 * 8 + 3, 2].item() == pytest.approx((block.item() - 0.406) / 0.225, rel=1e-4)
    gaussian = nb06.pixel_gaussian(good, 64, "cpu", batch_size=1)
    np.testing.assert_allclose(gaussian.mean.numpy(), embeddings.mean(0).numpy(), rtol=1e-5, atol=1e-6)
    assert gaussian.count == 2


def test_scores_of_good_parts(nb06):
    """By the model that knows them, and by models of all others, each fitted anew."""
    config = nb06.Config(size=32, sigma=1.0, batch_size=3, regularisation=0.05)
    good, features = pictures(8), torch.tensor([0, 3, 7])
    gaussian = nb06.fit(TinyExtractor(), good, features)
    everything, offered = nb06.fit(TinyExtractor(), good, torch.tensor([7, 0, 1, 3])), torch.tensor([7, 0, 1, 3])
    known, left_out = nb06.good_scores(TinyExtractor(), good, everything, offered, torch.tensor([1, 3, 0]), config)
    score = lambda model, picture: nb06.heat_maps(
        nb06.mahalanobis(nb06.embed(TinyExtractor()(picture), features), model.mean, nb06.cholesky_factors(model, 0.05)), 32, 1.0
    ).amax()
    for k in range(8):
        rest = nb06.fit(TinyExtractor(), torch.cat([good[:k], good[k + 1 :]]), features)
        assert known[k] == pytest.approx(score(gaussian, good[k : k + 1]).item(), rel=1e-4)
        assert left_out[k] == pytest.approx(score(rest, good[k : k + 1]).item(), rel=1e-3)


def test_alarms(nb06):
    config = nb06.Config(size=32, sigma=1.0, batch_size=5, alarms=0.2)
    category = category_of(nb06)
    run, later = nb06.alarms_of(category, TinyExtractor(), torch.arange(9), 9, config, (0, 1))
    assert "maps" not in later
    assert later["scores"]["test"].numpy() == pytest.approx(run["scores"]["test"].numpy(), rel=1e-3)  # all features, in another order
    assert run["limits"]["left out"] == nb06.threshold(run["scores"]["left out"].numpy(), 0.2)
    assert (run["scores"]["left out"] > run["scores"]["known"]).all()
    assert torch.equal(run["scores"]["test"], run["maps"].amax((1, 2)))
    (known, left_out) = nb06.alarm_rows(category, [run, run])
    assert left_out[:2] == ["tiny", "left out"]
    assert left_out[3] == f"{(run['scores']['test'][:4] > run['limits']['left out']).sum():.1f} ± 0.0 of 4"
    spot = (run["scores"]["test"][4:8] > run["limits"]["known"]).sum()
    assert known[4].startswith(f"spot {spot:.1f} ± 0.0 of 4; corner ")


def test_interval_by_resampling_test_pictures(nb06):
    """Close to the normal approximation of Hanley and McNeil for a large set; certain where all is separated."""
    rng = np.random.default_rng(0)
    labels = np.repeat([False, True], [150, 150])
    scores = rng.normal(size=300) + labels
    low, high = nb06.resampled_interval(labels, scores)
    auc = roc_auc_score(labels, scores)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = ((auc * (1 - auc) + 149 * (q1 - auc**2) + 149 * (q2 - auc**2)) / 150**2) ** 0.5
    assert (low, high) == (pytest.approx(auc - 1.96 * error, abs=0.012), pytest.approx(auc + 1.96 * error, abs=0.012))
    assert nb06.resampled_interval(labels, labels.astype(float)).tolist() == [1, 1]


def test_compare_and_regularisation_and_geometry(nb06):
    """Every model gets every metric once a seed; those without a draw once."""
    config = nb06.Config(size=32, sigma=1.0, batch_size=5, neighbours=0.1, epsilons=(0.1, 0.01))
    category, offered, extractor = category_of(nb06), torch.arange(9), TinyExtractor()
    found = nb06.compare(category, extractor, offered, 4, config, range(3))
    once = {"PaDiM, all 9 features", "PaDiM, all 9 features, averaged over 3 × 3", "mean colours, no network"}
    assert all(len(runs) == (1 if name in once else 3) for name, runs in found.items())
    assert len(found) == 10
    draw = nb06.draw_features(9, 4, 1)
    own = nb06.fit(TinyExtractor(), category.train, draw, 3)
    distances = nb06.mahalanobis(
        nb06.embeddings_of(TinyExtractor(), category.test, draw, 3), own.mean, nb06.cholesky_factors(own, config.regularisation)
    )
    assert found["PaDiM, averaged over 3 × 3"][1] == pytest.approx(nb06.metrics(category, nb06.heat_maps(distances, 32, 1.0)), abs=1e-3)
    bank = nb06.patch_banks(extractor, category.train, draw, 1, 0.1, (1,), 5)[1]
    nearest = nb06.nearest_distances(bank, nb06.embeddings_of(extractor, category.test, draw))
    assert found["nearest of 10% of the patches"][1] == pytest.approx(nb06.metrics(category, nb06.heat_maps(nearest, 32, 1.0)), abs=1e-3)
    swept = nb06.by_regularisation(category, extractor, offered, 4, config, range(2))
    assert swept["PaDiM, ε = 0.01"] == pytest.approx(found["PaDiM"][:2])
    assert list(swept) == ["PaDiM, ε = 0.01", "PaDiM, ε = 0.1", "mean colours, ε = 0.01", "mean colours, ε = 0.1"]
    rows = nb06.metrics_table({"tiny": swept}, "what")
    assert rows[0] == ["what", "tiny: image AUROC", "tiny: pixel AUROC", "tiny: PRO"]
    assert rows[3][1] == f"{swept['mean colours, ε = 0.01'][0]['image AUROC']:.3f}"


def test_cases_shown(nb06):
    category = category_of(nb06)
    scores = np.array([4, 9, 1, 2, 30, 31, 32, 33, 5, 6, 40, 50.0])
    assert nb06.cases_of(category, scores) == [11, 10, 8, 9, 1, 0]


# --- experiment 2


def test_ordinary_and_online_are_equal(nb06):
    batches = [batch + 2 for batch in nb06.imitated(50, 7, 12, 16, "cpu")]
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    mean, inverse = nb06.ordinary_fit(batches, 0.1)
    expected = np.linalg.inv(numpy_covariance(torch.cat(batches)) + 0.1 * np.eye(12))
    np.testing.assert_allclose(inverse.numpy(), expected, rtol=1e-3, atol=1e-4)
    for way in (nb06.batched_fit, nb06.online_fit):
        own_mean, factors = way(batches, 0.1)
        assert (mean - own_mean).abs().max() / mean.abs().max() < 1e-5
        assert (inverse - torch.cholesky_inverse(factors)).abs().max() / inverse.abs().max() < 1e-5


def test_imitated_embeddings_are_the_same_every_time(nb06):
    first, second = (torch.cat(list(nb06.imitated(20, 3, 4, 6, "cpu"))) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (20, 3, 4)


def test_memory_of_both_ways(nb06):
    """Ordinary: at least the collected and the stacked embeddings. Online: the scatter and the factors, and little else."""
    places, width, count = 1024, 32, 80
    batches = lambda: nb06.imitated(count, places, width, 16, "cpu")
    embeddings, square = 4 * count * places * width, 4 * places * width**2
    ordinary = nb06.peak_memory(lambda: nb06.ordinary_fit(batches()), "cpu")
    online = nb06.peak_memory(lambda: nb06.online_fit(batches()), "cpu")
    assert 2 * embeddings < ordinary < 2 * embeddings + 6 * square
    assert 2 * square < online < 4 * square
    seconds, held, spans = nb06.memory_events(lambda: nb06.online_fit(batches()))
    assert list(spans) == ["update", "factors"]
    assert spans["update"][1] <= spans["factors"][0]
    assert held.max() == pytest.approx(online, rel=0.2)
    assert len(seconds) == len(held)


def test_peak_memory(nb06):
    check_peak_memory(nb06)


def test_seconds_in_turns(nb06):
    check_seconds_in_turns(nb06)


def test_scan(nb06):
    config = nb06.Config(counts=(8, 16), widths=(4, 6), repeats=1, batch_size=4)
    found = nb06.scan(config, 16, 5, 8, "cpu")
    assert list(found["pictures"]) == [8, 16]
    assert list(found["features"]) == [4, 6]
    assert found["pictures"][16]["ordinary"][1] > found["pictures"][8]["ordinary"][1]


# --- experiment 3


def test_anatomy_against_models_computed_anew(nb06):
    x = correlated(25, 3, 5)
    gaussian, chosen = gaussian_of(nb06, x[:20]), torch.tensor([24, 3, 7, 21])
    anatomy, order = nb06.Anatomy(gaussian, x, 0.05), torch.tensor([2, 0, 3, 1])
    squares = lambda embeddings, features: nb06.distances_of(gaussian, embeddings, torch.tensor(features), 0.05).square()
    assert torch.allclose(anatomy.square, squares(x, range(5)), rtol=1e-8)
    for feature in range(5):
        exchanged = x[chosen].clone()
        exchanged[..., feature] = x[chosen][order][..., feature]
        assert torch.allclose(anatomy.permuted(feature, chosen, order), squares(exchanged, range(5)), rtol=1e-8, atol=1e-8)
        others = [other for other in range(5) if other != feature]
        assert torch.allclose(anatomy.left_out(feature, chosen), squares(x[chosen], others), rtol=1e-8, atol=1e-8)
        assert torch.allclose(anatomy.alone(feature, chosen), squares(x[chosen], [feature]), rtol=1e-8, atol=1e-8)


@pytest.fixture(scope="module")
def telling(nb06):
    """A category of 30 test pictures whose embeddings (64 places) tell defects by feature 2 alone; config, gaussian, embeddings."""
    torch.manual_seed(5)
    config = nb06.Config(size=32, sigma=1.0, permutations=3, budgets=(1, 3), grid=4)
    category = category_of(nb06, 30)
    good, test = torch.randn(60, 64, 5), torch.randn(30, 64, 5)
    test[10:, :, 2] += 6
    return category, config, gaussian_of(nb06, good), test


def test_importance_finds_the_telling_feature(nb06, telling):
    category, config, gaussian, test = telling
    judge, anatomy = nb06.make_judge(category, "pictures", config), nb06.Anatomy(gaussian, test)
    found = nb06.importances(anatomy, torch.arange(30), judge, 3, 0)
    for kind in ("permuted", "left out", "alone"):
        assert np.argmax(found[kind]) == 2
        assert len(found[kind]) == 5
    whole = roc_auc_score(category.defective, nb06.heat_maps(anatomy.square.sqrt(), 32, 1.0).amax((1, 2)))
    without = nb06.distances_of(gaussian, test, torch.tensor([0, 1, 3, 4]))
    expected = whole - roc_auc_score(category.defective, nb06.heat_maps(without, 32, 1.0).amax((1, 2)))
    assert found["left out"][2] == pytest.approx(expected, abs=1e-9)
    assert found["permuted"][2] > 0.2


def test_importance_looks_at_the_given_pictures_only(nb06, telling):
    category, config, gaussian, test = telling
    judge, given = nb06.make_judge(category, "pictures", config), torch.arange(0, 30, 2)
    changed = test.clone()
    changed[1::2] += 100
    first, second = (nb06.importances(nb06.Anatomy(gaussian, t), given, judge, 2, 0) for t in (test, changed))
    assert first == second


@pytest.mark.parametrize("measure", ["pictures", "pixels"])
def test_judge(nb06, telling, measure):
    category, config, _, _ = telling
    chosen, squares = torch.tensor([3, 17, 25, 4, 12]), torch.rand(5, 64)
    maps = nb06.heat_maps(squares.sqrt(), 32, 1.0)
    if measure == "pictures":
        expected = roc_auc_score(category.defective[chosen], maps.amax((1, 2)))
    else:
        expected = roc_auc_score(category.masks[chosen][:, ::4, ::4].ravel(), maps[:, ::4, ::4].ravel())
    assert nb06.make_judge(category, measure, config)(squares, chosen) == pytest.approx(expected)
    assert nb06.make_judge(category, measure, config)(-1e-9 * squares, chosen) == 0.5  # rounding below zero is no NaN


def test_ranked(nb06):
    assert nb06.ranked([0.1, 0.9, 0.5], True, 0).tolist() == [1, 2, 0]
    assert nb06.ranked([0.1, 0.9, 0.5], False, 0).tolist() == [0, 2, 1]
    ties = [nb06.ranked([0.0, 1e-12] * 10, most, seed).tolist() for most, seed in ((True, 0), (False, 0), (True, 1))]
    assert all(sorted(order) == list(range(20)) for order in ties)
    assert len({tuple(order) for order in ties}) == 3
    assert all({index % 2 for index in order[:10]} == {0, 1} for order in ties)  # 1e-12 is no difference
    assert nb06.tied([0.0, 1e-12, 0.5, 0.7]) == 0.5
    assert nb06.tied([3, 1, 2]) == 0


@pytest.fixture
def given(nb06, telling, monkeypatch):
    """The fixture's category, config, gaussian and embeddings, in the place of what an extractor would give."""
    monkeypatch.setattr(nb06, "fit", lambda *_: telling[2])
    monkeypatch.setattr(nb06, "embeddings_of", lambda *_: telling[3])
    return telling


def test_selection_ranks_by_two_folds_and_judges_by_the_third(nb06, given):
    category, config, gaussian, test = given
    found = nb06.select(category, None, torch.arange(5), "pictures", config, 4)
    assert len(found["importances"]) == 3
    own = nb06.Anatomy(gaussian, test).precision[3] * gaussian.covariance()[:, 3, 3]
    assert found["redundancy"][3] == pytest.approx(own.mean().item(), rel=1e-5)
    assert min(found["redundancy"]) >= 1
    assert set(found["AUROC"]) == {"random"} | {f"{kind}, {end}" for kind in ("permuted", "left out", "alone") for end in ("most", "least")}
    assert all(list(line) == [1, 3, 5] for line in found["AUROC"].values())
    assert found["AUROC"]["alone, most"][1] > 0.95
    assert found["AUROC"]["alone, least"][3] < 0.8
    assert len({line[5] for line in found["AUROC"].values()}) == 1  # all features: whatever the order
    folds = nb06.StratifiedKFold(3, shuffle=True, random_state=4).split(category.kinds, category.kinds)
    judge = nb06.make_judge(category, "pictures", config)
    scores = []
    for number, (ranking, judging) in enumerate(folds):
        importance = nb06.importances(nb06.Anatomy(gaussian, test), torch.tensor(ranking), judge, 3, 12 + number)
        assert importance == found["importances"][number]
        best = torch.tensor(nb06.ranked(importance["left out"], True, 12 + number)[:3].copy())
        scores.append(judge(nb06.distances_of(gaussian, test[judging], best).square(), torch.tensor(judging)))
    assert found["AUROC"]["left out, most"][3] == pytest.approx(np.mean(scores))


def test_agreement(nb06):
    assert nb06.rank_correlation([1, 2, 3], [10, 20, 5]) == "-0.50"
    assert nb06.rank_correlation([1, 1, 1], [1, 2, 3]) == "—"
    fold = lambda *numbers: {"permuted": list(numbers), "left out": [0.0] * 3, "alone": [1.0, 2.0, 3.0]}
    runs = [{"importances": [fold(1, 2, 3), fold(1, 2, 3), fold(3, 2, 1)], "redundancy": [3.0, 2.0, 5.0]}]
    rows = nb06.agreement_rows({("a", "pictures"): runs, ("b", "pictures"): runs, ("a", "pixels"): runs})
    assert rows[0] == ["a, pictures", "permuted", "0%", "-0.33", "1.00", "0.50", "b 1.00"]
    assert rows[1] == ["a, pictures", "left out", "100%", "—", "—", "—", "b —"]
    assert rows[6][-1] == "—"


def test_models_of_stages(nb06, given):
    category, config, _, _ = given
    stages = np.array([0, 0, 1, 2, 2])
    found = nb06.stage_models(category, None, torch.arange(5), stages, config, range(3))
    assert [len(runs) for runs in found.values()] == [1] * 7 + [3] * 6
    assert max(run["image AUROC"] for run in found["all stages, stage 2 exchanged"]) < 0.8  # the telling feature, of another picture
    assert min(run["image AUROC"] for run in found["all stages, stage 1 exchanged"]) > 0.9
    assert found["stage 2 alone (1 features)"][0]["image AUROC"] > 0.95
    assert found["without stage 2"][0]["image AUROC"] < 0.8
    assert found["1 features of stage 2"][0] == pytest.approx(found["stage 2 alone (1 features)"][0])


# --- helpers


def test_statistics(nb06):
    check_statistics(nb06)
    assert nb06.mean_and_std([0.5]) == "0.500"


def test_results_are_computed_once(nb06, tmp_path):
    path, calls = tmp_path / "new" / "step.pt", []
    compute = lambda *arguments: calls.append(arguments) or {"a": [1.5, {"b": torch.ones(2)}]}
    first = nb06.remembered(path, compute, 3, 4)
    second = nb06.remembered(path, compute, 3, 4)
    assert calls == [(3, 4)]
    assert first["a"][0] == second["a"][0] == 1.5
    assert torch.equal(second["a"][1]["b"], torch.ones(2))
    path.write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"step.pt is damaged: delete it"):
        nb06.remembered(path, compute)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.95, 0.999])
def test_a_checkpoint_that_was_cut_is_named(nb06, tmp_path, share):
    path = tmp_path / "step.pt"
    nb06.remembered(path, lambda: {"a": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ValueError, match=r"step.pt is damaged: delete it"):
        nb06.remembered(path, dict)


def test_checkpoints_that_cannot_be_written_are_noticed_before_the_work(nb06, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write to .*file.*: set CHECKPOINTS"):
        nb06.remembered(tmp_path / "file" / "step.pt", lambda: pytest.fail("computed"))


def test_an_interrupted_step_leaves_nothing(nb06, tmp_path, monkeypatch):
    def torn(value, target):
        target.write_bytes(b"half a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", torn)
        with pytest.raises(KeyboardInterrupt):
            nb06.remembered(tmp_path / "step.pt", dict)
    assert not (tmp_path / "step.pt").exists()
    assert nb06.remembered(tmp_path / "step.pt", dict) == {}


def test_checkpoints_of_other_data_or_settings_have_other_names(nb06, tmp_path):
    category, config = category_of(nb06), nb06.Config()
    other = replace(category, test=category.test.flip(0))
    identities = [
        ("compare", config, 0, nb06.fingerprint(category)),
        ("epsilon", config, 0, nb06.fingerprint(category)),
        ("compare", replace(config, sigma=3.0), 0, nb06.fingerprint(category)),
        ("compare", config, 1, nb06.fingerprint(category)),
        ("compare", config, 0, nb06.fingerprint(other)),
        ("compare", config, 0, nb06.fingerprint(replace(category, masks=None))),
        ("compare", config, 0, nb06.fingerprint(replace(category, masks=~category.masks))),
        ("compare", config, 0, nb06.fingerprint(replace(category, kinds=category.kinds[::-1]))),
    ]
    assert len({nb06.checkpoint_path(tmp_path, *identity) for identity in identities}) == 8
    assert nb06.checkpoint_path(tmp_path, *identities[0]) == nb06.checkpoint_path(tmp_path, *identities[0])
