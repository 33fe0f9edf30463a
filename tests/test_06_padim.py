"""Notebook 06 against NumPy, SciPy, scikit-learn, torchvision, explicit loops and models computed anew."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from scipy import ndimage
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import EmpiricalCovariance
from sklearn.metrics import roc_auc_score
from torchvision.models.feature_extraction import create_feature_extractor

from tests.checks import check_amp_dtype


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
    error = lambda covariance: np.abs(covariance.double().numpy() - exact).max() / np.abs(exact).max()
    assert errors["schoolbook"] == pytest.approx(error(nb06.schoolbook_covariance(batches)), rel=1e-6)
    assert errors["online"] == pytest.approx(error(gaussian_of(nb06, torch.cat(batches), 20, 20, 20).covariance(0)), rel=0.3)
    assert errors["schoolbook"] > 100 * errors["online"]


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


# --- question 1 and 2


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


def test_pixel_embeddings(nb06):
    good = pictures(2)
    embeddings = nb06.pixel_embeddings(good, 64, "cpu")
    block = (good[1, 2, 4:8, 12:16].float() / 255).mean()
    assert embeddings[1, 1 * 8 + 3, 2].item() == pytest.approx((block.item() - 0.406) / 0.225, rel=1e-4)


def test_auroc_and_wins_against_sklearn(nb06):
    """With ties; pairs and ranks agree; a mean over runs is the mean of their AUROCs."""
    rng = np.random.default_rng(0)
    defective = rng.random(70) < 0.4
    runs = [{"scores": torch.tensor(rng.integers(0, 9, 70) + 2 * defective * k)} for k in range(3)]
    expected = [roc_auc_score(defective, run["scores"]) for run in runs]
    for run, value in zip(runs, expected, strict=True):
        assert nb06.auroc(defective, run["scores"]) == pytest.approx(value, abs=1e-12)
        assert nb06.auroc(torch.from_numpy(defective), run["scores"].double()) == pytest.approx(value, abs=1e-12)
    matrix = nb06.wins(defective, runs)
    assert matrix.shape == (defective.sum(), (~defective).sum())
    assert matrix.mean().item() == pytest.approx(np.mean(expected), abs=1e-12)
    assert nb06.wins(np.array([True, False]), [{"scores": torch.tensor([2.0, 1.0])}]).item() == 1


def test_interval_by_resampling_test_pictures(nb06):
    """Close to the normal approximation of Hanley and McNeil for a large set; certain where all is separated."""
    rng = np.random.default_rng(0)
    labels = np.repeat([False, True], [150, 150])
    scores = torch.tensor(rng.normal(size=300) + labels)
    auc, low, high = nb06.paired_bootstrap(nb06.wins(labels, [{"scores": scores}]), 0)
    assert auc == pytest.approx(roc_auc_score(labels, scores))
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = ((auc * (1 - auc) + 149 * (q1 - auc**2) + 149 * (q2 - auc**2)) / 150**2) ** 0.5
    assert (low, high) == (pytest.approx(auc - 1.96 * error, abs=0.012), pytest.approx(auc + 1.96 * error, abs=0.012))
    certain = nb06.wins(labels, [{"scores": torch.tensor(labels.astype(float))}])
    assert nb06.paired_bootstrap(certain, 0) == pytest.approx((1, 1, 1))


def test_paired_bootstrap_uses_the_pairs(nb06):
    """Models that differ by little but err on the same pictures: an interval far narrower than of one AUROC, and its sign."""
    rng = np.random.default_rng(1)
    labels = np.repeat([False, True], [80, 80])
    scores = rng.normal(size=160) + labels
    better = nb06.wins(labels, [{"scores": torch.tensor(scores + 0.15 * labels)}])
    worse = nb06.wins(labels, [{"scores": torch.tensor(scores)}])
    difference, low, high = nb06.paired_bootstrap(better, worse)
    assert 0 < low < difference < high
    alone = nb06.paired_bootstrap(worse, 0)
    assert high - low < (alone[2] - alone[1]) / 3
    assert nb06.paired_bootstrap(worse, better) == pytest.approx((-difference, -high, -low), abs=5e-3)
    assert nb06.paired_bootstrap(worse, worse) == (0, 0, 0)


@pytest.mark.parametrize("place", [(0, 0), (3, 20), (31, 15), (16, 29), (10, 12)])
def test_border_distance(nb06, place):
    maps = torch.rand(2, 32, 32)
    maps[1][place] = 2
    row, column = place
    assert nb06.border_distance(maps)[1] == min(row, column, 31 - row, 31 - column)
    scores = nb06.picture_scores(maps, 4)
    assert scores[0] == maps[0, 4:-4, 4:-4].max()
    assert (scores[1] == 2) == (min(row, column, 31 - row, 31 - column) >= 4)
    assert torch.equal(nb06.picture_scores(maps), maps.amax((1, 2)))


def test_margin_is_chosen_only_where_maxima_crowd_at_the_border(nb06):
    """Uniform maxima: no. In the middle: no. Nearly all at the border: yes. Few pictures: no."""

    def peaks(rows):
        maps = torch.zeros(len(rows), 64, 64)
        for m, row in zip(maps, rows, strict=True):
            m[row, 32] = 1
        return maps

    rng = np.random.default_rng(0)
    anywhere = peaks(rng.integers(64, size=200))
    assert nb06.choose_margin(peaks(rng.integers(64, size=200)), anywhere, 8) == 0
    assert nb06.choose_margin(peaks(rng.integers(20, 40, 200)), anywhere, 8) == 0
    assert nb06.choose_margin(peaks([0, 63] * 100), anywhere, 8) == 8
    assert nb06.choose_margin(peaks([0, 63] * 100), peaks([0, 63] * 100), 8) == 0
    assert nb06.choose_margin(peaks([0, 63]), anywhere[:2], 8) == 0


def test_rolled(nb06):
    """The same numbers, moved round by multiples of four places, each picture by its own."""
    distances = torch.rand(50, 16 * 16)
    moved = nb06.rolled(distances)
    shifts = set()
    for before, after in zip(distances.view(50, 16, 16), moved.view(50, 16, 16), strict=True):
        row, column = divmod(int((after == before[0, 0]).flatten().nonzero()), 16)
        assert torch.equal(before.roll((row, column), (0, 1)), after)
        shifts.add((row, column))
    assert len(shifts) > 10
    assert all(row % 4 == column % 4 == 0 for row, column in shifts)


def test_scores_of_good_parts(nb06):
    """By the model that knows them, and by models of all others, each fitted anew."""
    config = nb06.Config(size=32, sigma=1.0, batch_size=3, regularisation=0.05)
    good, features = pictures(8), torch.tensor([0, 3, 7])
    gaussian = nb06.fit(TinyExtractor(), good, features)
    offered = torch.tensor([7, 0, 1, 3])
    everything = nb06.fit(TinyExtractor(), good, offered)
    known, left_out, _ = nb06.training_maps(TinyExtractor(), good, everything, offered, torch.tensor([1, 3, 0]), config)
    map_of = lambda model, picture: nb06.heat_maps(
        nb06.mahalanobis(nb06.embed(TinyExtractor()(picture), features), model.mean, nb06.cholesky_factors(model, 0.05)), 32, 1.0
    )[0]
    for k in range(8):
        rest = nb06.fit(TinyExtractor(), torch.cat([good[:k], good[k + 1 :]]), features)
        assert torch.allclose(known[k], map_of(gaussian, good[k : k + 1]), rtol=1e-3)
        assert torch.allclose(left_out[k], map_of(rest, good[k : k + 1]), rtol=1e-2)


def test_alarms(nb06):
    config = nb06.Config(size=32, sigma=1.0, batch_size=5, alarms=0.2)
    category = category_of(nb06)
    nb06.picture_scores(torch.rand(1, 40, 40), 16)
    run, later = nb06.alarms_of(larger(nb06), TinyExtractor(), torch.arange(9), 9, replace(config, size=48), (0, 1))
    assert later["whole"]["test"].numpy() == pytest.approx(run["whole"]["test"].numpy(), rel=1e-3)  # all features, in another order
    assert (run["whole"]["left out"] > run["whole"]["known"]).all()
    assert (run["inner"]["test"] <= run["whole"]["test"]).all()
    far = run["border"]["test"] >= 16
    assert torch.equal(run["inner"]["test"][far], run["whole"]["test"][far])
    row, caught = nb06.alarm_row(category, [run, run], "whole", "left out", 0.2)
    limit = nb06.threshold(run["whole"]["left out"].numpy(), 0.2)
    assert row["threshold"] == f"{limit:.1f} ± 0.0"
    good = (run["whole"]["test"][:4] > limit).sum()
    corner = (run["whole"]["test"][8:] > limit).sum()
    assert row["test pictures above"].startswith(f"good {good:.1f} ± 0.0 of 4; corner {corner:.1f} ± 0.0 of 4; spot ")
    assert caught.tolist() == [(run["whole"]["test"][4:] > limit).sum()] * 2
    few, _ = nb06.alarm_row(category, [run], "whole", "known", 0.0001)  # the highest of ten
    assert few["threshold"] == f"{run['whole']['known'].max():.1f}"


def larger(nb06):
    """category_of() at 48 pixels."""
    category = category_of(nb06)
    grow = lambda part: F.interpolate(part.float(), 48).to(torch.uint8)
    return replace(category, train=grow(category.train), test=grow(category.test), masks=None)


def test_compare(nb06):
    """Every model gets every metric once a draw; those without a draw once."""
    config = nb06.Config(size=32, sigma=1.0, batch_size=5)
    category, offered, extractor = category_of(nb06), torch.arange(9), TinyExtractor()
    found = nb06.compare(category, extractor, offered, 4, config, range(3))
    once = {"PaDiM, all 9 features", "mean colours, no network"}
    assert all(len(runs) == (1 if name in once else 3) for name, runs in found.items())
    assert {"PaDiM, 1 features", "PaDiM, ε = 0.1", "PaDiM, ε = 0.001", "means only"} < set(found)
    draw = nb06.draw_features(9, 4, 1)
    for average, name, epsilon in ((1, "PaDiM", 0.01), (3, "PaDiM, averaged 3 × 3", 0.01), (1, "PaDiM, ε = 0.1", 0.1)):
        own = nb06.fit(extractor, category.train, draw, average)
        embeddings = nb06.embeddings_of(extractor, category.test, draw, average)
        maps = nb06.heat_maps(nb06.mahalanobis(embeddings, own.mean, nb06.cholesky_factors(own, epsilon)), 32, 1.0)
        run = dict(found[name][1])
        assert run.pop("scores").numpy() == pytest.approx(maps.amax((1, 2)).numpy(), rel=1e-2)
        assert run == pytest.approx(nb06.metrics(category, maps), abs=1e-2)


# --- a model to keep


def test_a_model_is_saved_and_loaded(nb06, tmp_path):
    """The loaded model gives the same scores, needs no weights beside it, and keeps its threshold."""
    config = nb06.Config(size=64, sigma=2.0, batch_size=4)
    extractor, good = nb06.Extractor("mobilenet_v2"), pictures(24, 64)
    features = nb06.draw_features(152, 6, 0)
    model = nb06.train_padim(extractor, good, features, config)
    assert model.settings["margin"] == 0
    nb06.save_model(model, tmp_path / "m.pt")
    again = nb06.load_model(tmp_path / "m.pt")
    assert again.settings == model.settings
    assert torch.allclose(again(good[:3]), model(good[:3]), rtol=1e-5)
    own = nb06.fit(extractor, good, features)
    distances = nb06.mahalanobis(nb06.embeddings_of(extractor, good[:3], features), own.mean, nb06.cholesky_factors(own))
    assert torch.allclose(model(good[:3]), nb06.heat_maps(distances, 64, 2.0), rtol=1e-3)
    offered = torch.arange(6)
    left_out = nb06.training_maps(extractor, good, own, features, offered, config)[1]
    assert model.settings["limit"] == pytest.approx(nb06.threshold(left_out.amax((1, 2)).numpy(), 0.05), rel=1e-4)
    raw = (tmp_path / "m.pt").read_bytes()
    (tmp_path / "m.pt").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(ValueError, match=r"m.pt is damaged"):
        nb06.load_model(tmp_path / "m.pt")


def test_pictures_of_ones_own_are_scored(nb06, tmp_path):
    """A folder without defects and masks, one path, several: as the model scores the tensors; hidden files are no pictures."""
    config = nb06.Config(size=64, sigma=2.0, batch_size=4)
    extractor, good = nb06.Extractor("mobilenet_v2"), pictures(9, 64)
    model = nb06.train_padim(extractor, good, nb06.draw_features(152, 6, 0), config, margin=4)
    for index, picture in enumerate(good):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(tmp_path / f"{index}.png")
    (tmp_path / "._0.png").write_bytes(b"no picture")
    (tmp_path / "notes.txt").write_text("no picture")
    scores, maps = nb06.score_pictures(model, tmp_path, batch_size=4)
    assert scores.shape == (9,)
    assert maps.shape == (9, 64, 64)
    assert maps == pytest.approx(model(good).numpy(), rel=1e-3)
    assert scores == pytest.approx(maps[:, 4:-4, 4:-4].max((1, 2)))
    one, _ = nb06.score_pictures(model, tmp_path / "7.png")
    two, _ = nb06.score_pictures(model, [str(tmp_path / "7.png"), tmp_path / "2.png"])
    assert one == pytest.approx(scores[7:8], rel=1e-3)
    assert two == pytest.approx(scores[[7, 2]], rel=1e-3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures to score in .*empty"):
        nb06.score_pictures(model, tmp_path / "empty")
    with pytest.raises(ValueError, match="no pictures to score in an empty list"):
        nb06.score_pictures(model, [])
    with pytest.raises(ValueError, match=r"_0.png is damaged or no picture"):
        nb06.score_pictures(model, tmp_path / "._0.png")


# --- question 3


def test_all_ways_of_fitting_are_equal(nb06):
    batches = [batch + 2 for batch in nb06.imitated(50, 7, 12, 16, "cpu")]
    assert [len(batch) for batch in batches] == [16, 16, 16, 2]
    mean, inverse = nb06.collected_fit(batches, 0.1)
    expected = np.linalg.inv(numpy_covariance(torch.cat(batches)) + 0.1 * np.eye(12))
    np.testing.assert_allclose(inverse.numpy(), expected, rtol=1e-3, atol=1e-4)
    for own_mean, factors in (nb06.buffer_fit(batches, 50, 0.1), nb06.online_fit(batches, 0.1)):
        assert (mean - own_mean).abs().max() / mean.abs().max() < 1e-5
        assert (inverse - torch.cholesky_inverse(factors)).abs().max() / inverse.abs().max() < 1e-5


def test_imitated_embeddings_are_the_same_every_time(nb06):
    first, second = (torch.cat(list(nb06.imitated(20, 3, 4, 6, "cpu"))) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (20, 3, 4)


def test_memory_is_as_the_formulas_predict(nb06):
    """The embeddings of a batch and the temporaries aside."""
    places, width, count = 1024, 32, 80
    rows = {row["way"]: row for row in nb06.scan((count,), places, width, 16, 1, "cpu")}
    embeddings, square = (4 * count * places * width / 2**20, 4 * places * width**2 / 2**20)
    assert 2 * embeddings < rows["collected"]["peak"] < 2 * embeddings + 6 * square
    assert embeddings + square < rows["buffer"]["peak"] < 1.2 * embeddings + 2 * square
    assert 2 * square < rows["online"]["peak"] < 4 * square
    for way, copies, squares in (("collected", 2, 3), ("buffer", 1, 1), ("online", 0, 2)):
        assert rows[way]["embeddings"] == pytest.approx(copies * embeddings)
        assert rows[way]["d × d"] == pytest.approx(squares * square)


def test_scan(nb06):
    rows = nb06.scan((8, 16), 16, 5, 4, 1, "cpu")
    assert [(row["pictures"], row["way"]) for row in rows] == [(n, w) for n in (8, 16) for w in ("collected", "buffer", "online")]
    assert rows[3]["peak"] > rows[0]["peak"]
    assert all(row["ms"] > 0 for row in rows)


def test_maps_of_the_inner_picture(nb06):
    """What a window shows is what the network says of these places in the whole picture."""
    whole = [torch.rand(1, 2, side, side) for side in (40, 20, 10)]
    inner = nb06.windowed(lambda x: whole)(None)
    assert [m.shape[-1] for m in inner] == [24, 12, 6]
    assert torch.equal(inner[2], whole[2][..., 2:8, 2:8])
    assert torch.equal(inner[0][0, 0, 0], whole[0][0, 0, 8, 8:32])


# --- question 4


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
