"""Notebook 11: masks against PyTorch's, removal against masked networks and Torch-Pruning's, counts by hand, and the training by hand."""

import copy
import itertools
import math
import operator
from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse
import scipy.stats
import torch
import torch.nn.functional as F
import torch_pruning
import torchvision
from torch import nn
from torch.nn.utils import prune

STREAMS = ((2, 2, 2, 2), (1, 1, 2, 2))  # strides: the stem has a stream of its own, or that of the first stage


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def config(nb11):
    return replace(nb11.Config(), widths=(4, 8, 6), blocks=1, strides=(2, 2, 2, 2), batch_size=20, weight_decay=5e-3)


@pytest.fixture
def small(nb11, config):
    return nb11.fresh_weights(nb11.Network(config), 1)


@pytest.fixture
def deep(nb11, config):
    """Six blocks, random everywhere, in float64 and evaluation mode."""
    return scattered(nb11.Network(replace(config, blocks=2)))


@pytest.fixture
def pictures():
    """Random bytes of 16 by 16 pixels, in which the label is how bright they are."""
    draws, found = generator(7), {}
    for name, count in (("train", 130), ("validation", 90), ("test", 2100)):
        labels = torch.randint(10, (count,), generator=draws)
        noise = torch.randint(60, (count, 3, 16, 16), generator=draws)
        found[name] = [(noise + 19 * labels[:, None, None, None]).byte(), labels]
    return found


def scattered(model):
    """The network with random parameters and statistics, in float64 and evaluation mode."""
    draws = generator(3)
    uniform = lambda like: torch.rand(like.shape, generator=draws, dtype=torch.double)
    for layer in model.double().eval().modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean.copy_(uniform(layer.running_mean) - 0.5)
            layer.running_var.copy_(uniform(layer.running_var) + 0.5)
            layer.weight.data.copy_(uniform(layer.weight) + 0.5)
            layer.bias.data.copy_(uniform(layer.bias) - 0.3)
        elif getattr(layer, "bias", None) is not None:
            layer.bias.data.copy_(uniform(layer.bias))
    return model


def plain():
    """Convolutions with a bias in a row, pooled to one place and flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 7, 3, padding=1),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(7, 5, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 6),
        nn.ReLU(),
        nn.Linear(6, 4),
    )


def same_state(first, second):
    first, second = (x if isinstance(x, dict) else x.state_dict() for x in (first, second))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


# --- masks of weights


@pytest.mark.parametrize("shapes", [[(7,)], [(3, 4), (2, 3, 3, 3)], [(5, 1), (1, 8), (4, 4), (6, 2, 1, 1)]])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.95])
def test_global_masks_are_torchs(nb11, shapes, sparsity):
    weights = [torch.randn(shape) for shape in shapes]
    before = [weight.clone() for weight in weights]
    layers = [nn.Module() for _ in weights]
    for layer, weight in zip(layers, weights, strict=True):
        layer.register_parameter("weight", nn.Parameter(weight.clone()))
    prune.global_unstructured([(layer, "weight") for layer in layers], prune.L1Unstructured, amount=sparsity)
    masks = nb11.magnitude_mask(weights, sparsity)
    for mask, layer in zip(masks, layers, strict=True):
        assert mask.dtype == torch.bool
        assert torch.equal(mask, layer.weight_mask.bool())
    n = sum(weight.numel() for weight in weights)
    assert sum(int((~mask).sum()) for mask in masks) == round(sparsity * n)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


def test_of_equal_magnitudes_the_first_go(nb11):
    weights = [torch.tensor([[1.0, -1.0], [0.5, 1.0]]), torch.tensor([-1.0, 1.0, -0.1, 2.0])]
    found = [mask.int().tolist() for mask in nb11.magnitude_mask(weights, 0.5)]
    assert found == [[[0, 0], [0, 1]], [1, 1, 0, 1]]
    many = nb11.magnitude_mask([torch.full((30, 10), -0.2), torch.full((50,), 0.2)], 0.7)
    together = torch.cat([mask.flatten() for mask in many])
    assert not together[:245].any()
    assert together[245:].all()


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11])
@pytest.mark.parametrize("sparsity", [0.25, 0.33, 0.5, 0.999])
def test_the_number_that_goes_is_rounded(nb11, count, sparsity):
    (mask,) = nb11.magnitude_mask([torch.ones(count)], sparsity)
    assert int((~mask).sum()) == round(sparsity * count)


def test_masks_of_parameters_and_of_float64(nb11):
    weights = [nn.Parameter(torch.randn(4, 5, dtype=torch.double)), nn.Parameter(torch.randn(3, 2, dtype=torch.double))]
    masks = nb11.magnitude_mask(weights, 0.5)
    assert [mask.shape for mask in masks] == [(4, 5), (3, 2)]
    assert not any(mask.requires_grad for mask in masks)


@pytest.mark.parametrize("sparsity", [-0.1, 1, 1.5, math.nan])
def test_a_sparsity_that_is_no_share(nb11, sparsity):
    for function in (nb11.magnitude_mask, nb11.layer_masks):
        with pytest.raises(ValueError, match=f"sparsity is {sparsity}"):
            function([torch.ones(3)], sparsity)


def test_masks_layer_by_layer(nb11):
    weights = [torch.randn(6, 5), 100 * torch.randn(4, 3, 3, 3)]
    for mask, weight in zip(nb11.layer_masks(weights, 0.6), weights, strict=True):
        layer = nn.Module()
        layer.register_parameter("weight", nn.Parameter(weight))
        prune.l1_unstructured(layer, "weight", 0.6)
        assert torch.equal(mask, layer.weight_mask.bool())


def test_gradual_sparsity_is_the_cubic(nb11):
    for t in np.linspace(0, 1, 11):
        cubic = 0.9 + (0 - 0.9) * (1 - t) ** 3  # as Zhu and Gupta write it, from 0
        assert nb11.gradual_sparsity(t, 0.9) == pytest.approx(cubic, abs=1e-12)
    assert nb11.gradual_sparsity(1.0, 0.83) == 0.83
    assert nb11.gradual_sparsity(1.4, 0.83) == 0.83
    assert nb11.gradual_sparsity(0.0, 0.83) == 0.0
    assert nb11.gradual_sparsity(-2.0, 0.83) == 0.0


# --- scores of filters


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (8, 2, 1, 5), (1, 4, 1, 1)])
def test_norms_and_geometric_median_by_brute_force(nb11, dtype, shape):
    conv = nn.Conv2d(shape[1], shape[0], shape[2:]).to(dtype)
    filters = conv.weight.detach().double().numpy().reshape(shape[0], -1)
    ones, twos = np.abs(filters).sum(1), np.sqrt((filters**2).sum(1))
    distances = [sum(math.sqrt(((one - other) ** 2).sum()) for other in filters) for one in filters]
    found = nb11.filter_scores(conv, 1), nb11.filter_scores(conv), nb11.geometric_median_scores(conv)
    for scores, expected in zip(found, (ones, twos, distances), strict=True):
        assert scores.dtype == dtype
        assert scores.shape == shape[:1]
        assert not scores.requires_grad
        np.testing.assert_allclose(scores, expected, rtol=1e-5 if dtype == torch.float32 else 1e-12)


def test_the_geometric_median_is_exact_for_filters_nearly_alike(nb11):
    conv = nn.Conv2d(3, 40, 3)
    conv.weight.data = 1 + 1e-4 * torch.randn(40, 3, 3, 3)
    filters = conv.weight.detach().double().flatten(1)
    expected = (filters[:, None] - filters).norm(dim=2).sum(1)
    torch.testing.assert_close(nb11.geometric_median_scores(conv).double(), expected, rtol=1e-4, atol=0)


# --- which channels hang together


def described(groups):
    """{makers: (norms, readers, channels, fixed)}, all without an order."""
    order = lambda names: tuple(sorted(names))
    return {order(g.makers): (order(g.norms), order(g.readers), g.channels, g.fixed) for g in groups}


def test_groups_of_the_network(nb11, config):
    found = described(nb11.channel_groups(nb11.Network(replace(config, blocks=2))))
    assert len(found) == 1 + 3 + 6 + 1  # the stem's, a stream each stage, the inside of each block, the answer
    assert found["stem",] == (("norm",), ("blocks.0.conv1", "blocks.0.shortcut.0"), 4, False)
    makers = "blocks.2.conv2", "blocks.2.shortcut.0", "blocks.3.conv2"
    norms = "blocks.2.norm2", "blocks.2.shortcut.1", "blocks.3.norm2"
    assert found[makers] == (norms, ("blocks.3.conv1", "blocks.4.conv1", "blocks.4.shortcut.0"), 8, False)
    assert found["blocks.4.conv2", "blocks.4.shortcut.0", "blocks.5.conv2"][1] == ("blocks.5.conv1", "head")
    for n, width in enumerate((4, 4, 8, 8, 6, 6)):
        assert found[f"blocks.{n}.conv1",] == ((f"blocks.{n}.norm1",), (f"blocks.{n}.conv2",), width, False)
    assert found["head",] == ((), (), 10, True)


def test_a_stem_that_is_added_to(nb11, config):
    found = described(nb11.channel_groups(nb11.Network(replace(config, blocks=2, strides=(1, 1, 2, 2)))))
    assert len(found) == 3 + 6 + 1
    norms, readers, *_ = found["blocks.0.conv2", "blocks.1.conv2", "stem"]
    assert norms == ("blocks.0.norm2", "blocks.1.norm2", "norm")
    assert readers == ("blocks.0.conv1", "blocks.1.conv1", "blocks.2.conv1", "blocks.2.shortcut.0")


def test_groups_of_torchvisions_resnet(nb11):
    found = described(nb11.channel_groups(torchvision.models.resnet18()))
    assert len(found) == 4 + 8 + 1
    assert found["conv1", "layer1.0.conv2", "layer1.1.conv2"] == (
        ("bn1", "layer1.0.bn2", "layer1.1.bn2"),
        ("layer1.0.conv1", "layer1.1.conv1", "layer2.0.conv1", "layer2.0.downsample.0"),
        64,
        False,
    )
    assert found["layer4.0.conv2", "layer4.0.downsample.0", "layer4.1.conv2"][1:] == (("fc", "layer4.1.conv1"), 512, False)
    assert found["layer3.1.conv1",] == (("layer3.1.bn1",), ("layer3.1.conv2",), 256, False)
    assert [makers for makers, (*_, fixed) in found.items() if fixed] == [("fc",)]


def test_groups_of_a_plain_network(nb11):
    found = described(nb11.channel_groups(plain()))
    assert found == {
        ("0",): (("1",), ("4",), 7, False),
        ("4",): ((), ("8",), 5, False),
        ("8",): ((), ("10",), 6, False),
        ("10",): ((), (), 4, True),
    }


class Added(nn.Module):
    """Two convolutions of the picture added in a way of their own, and a third behind them."""

    def __init__(self, add):
        super().__init__()
        self.one, self.two, self.three = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)
        self.add = add

    def forward(self, x):
        return self.three(self.add(self.one(x), self.two(x)) + 1)


def added_in_place(x, y):
    x += y
    return x


@pytest.mark.parametrize("add", [lambda x, y: x + y, added_in_place, operator.iadd, torch.add])
def test_ways_to_add(nb11, add):
    model = Added(add).eval()
    found = described(nb11.channel_groups(model))
    assert found["one", "two"] == ((), ("three",), 4, False)
    assert found["three",] == ((), (), 2, True)
    for name in ("one", "two"):
        smaller = nb11.remove_channels(model, {name: [1]})
        assert smaller.one.weight.shape == smaller.two.weight.shape == (3, 3, 1, 1)


def test_what_cannot_be_followed_is_named(nb11):
    grouped = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten(), nn.Linear(8, 2))
    with pytest.raises(ValueError, match=r"^2 reads"):
        nb11.channel_groups(grouped)
    with pytest.raises(ValueError, match=r"features\.1\.conv\.0\.0 reads"):
        nb11.channel_groups(torchvision.models.mobilenet_v2())
    flattened = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(8 * 16, 5))
    with pytest.raises(ValueError, match=r"^2 reads"):
        nb11.remove_channels(flattened, {"0": [1]})


def test_letters_of_the_picture(nb11, small):
    groups = nb11.channel_groups(small)
    table = nb11.group_letters(groups, ["stem", "norm", "blocks.0.conv1", "head"])
    stem, inside, end = ([g.makers[0] for g in groups].index(name) for name in ("stem", "blocks.0.conv1", "head"))
    assert [row[stem] for row in table.values()] == ["M", "N", "R", ""]
    assert table["blocks.0.conv1"][inside] == "M"
    assert table["head"][end] == "M"
    assert sorted(table["head"]) == [""] * (len(groups) - 2) + ["M", "R"]


# --- removal

NETWORK_CASES = [  # strides, plan, {norm: channels that are gone}
    (STREAMS[0], {"stem": [0, 2]}, {"norm": [0, 2]}),
    (STREAMS[0], {"blocks.3.conv1": [7, 1, 1]}, {"blocks.3.norm1": [1, 7]}),
    (STREAMS[0], {"blocks.2.conv2": [3]}, {name: [3] for name in ("blocks.2.norm2", "blocks.2.shortcut.1", "blocks.3.norm2")}),
    (STREAMS[0], {"blocks.5.conv2": range(5)}, {n: range(5) for n in ("blocks.4.norm2", "blocks.4.shortcut.1", "blocks.5.norm2")}),
    (STREAMS[1], {"blocks.1.conv2": [0], "stem": [0]}, {name: [0] for name in ("norm", "blocks.0.norm2", "blocks.1.norm2")}),
    (
        STREAMS[1],
        {"stem": [1, 2], "blocks.0.conv1": [0], "blocks.4.shortcut.0": torch.tensor([5, 2])},
        {
            **{name: [1, 2] for name in ("norm", "blocks.0.norm2", "blocks.1.norm2")},
            **{name: [2, 5] for name in ("blocks.4.norm2", "blocks.4.shortcut.1", "blocks.5.norm2")},
            "blocks.0.norm1": [0],
        },
    ),
    (STREAMS[1], {"stem": [], "blocks.0.conv1": ()}, {}),
    (STREAMS[1], {}, {}),
]


def masked(model, silent):
    """A copy whose norms give 0 for the channels of {name: channels}."""
    model = copy.deepcopy(model)
    for name, channels in silent.items():
        norm = model.get_submodule(name)
        norm.weight.data[list(channels)] = 0
        norm.bias.data[list(channels)] = 0
    return model


def pruned_by_peer(model, plan, shape):
    """A copy from which Torch-Pruning has removed the channels of a plan, group by group."""
    model = copy.deepcopy(model)
    for name, channels in plan.items():
        dependencies = torch_pruning.DependencyGraph().build_dependency(model, torch.rand(shape, dtype=torch.double))
        channels = sorted({int(n) for n in channels})
        if channels:
            dependencies.get_pruning_group(model.get_submodule(name), torch_pruning.prune_conv_out_channels, channels).prune()
    return model


@pytest.mark.parametrize(("strides", "plan", "silent"), NETWORK_CASES)
def test_removed_equals_masked(nb11, config, strides, plan, silent):
    model = scattered(nb11.Network(replace(config, blocks=2, strides=strides)))
    before = copy.deepcopy(model.state_dict())
    x = torch.rand(5, 3, 16, 16, dtype=torch.double)
    smaller = nb11.remove_channels(model, plan)
    torch.testing.assert_close(smaller(x), masked(model, silent)(x), atol=1e-6, rtol=0)
    same_state(model, before)
    gone = {name: len(set(channels)) for name, channels in silent.items()}
    for name, norm in smaller.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.num_features == len(norm.weight) == model.get_submodule(name).num_features - gone.get(name, 0)
    assert not silent or nb11.count_macs(smaller, (3, 16, 16)) < nb11.count_macs(model, (3, 16, 16))
    assert next(smaller.parameters()).dtype == torch.double


@pytest.mark.parametrize(("strides", "plan", "silent"), NETWORK_CASES)
def test_removal_is_torch_prunings(nb11, config, strides, plan, silent):
    model = scattered(nb11.Network(replace(config, blocks=2, strides=strides)))
    makers = {name: channels for name, channels in plan.items() if name != "stem" or "blocks.1.conv2" not in plan}  # once a group
    same_state(nb11.remove_channels(model, plan), pruned_by_peer(model, makers, (1, 3, 16, 16)))


def test_removal_from_torchvisions_resnet(nb11):
    model = scattered(torchvision.models.resnet18(num_classes=12))
    plan = {"layer1.0.conv2": [5, 63], "layer3.1.conv1": list(range(0, 250, 3)), "layer4.0.downsample.0": range(100)}
    silent = {name: plan["layer1.0.conv2"] for name in ("bn1", "layer1.0.bn2", "layer1.1.bn2")}
    silent |= {"layer3.1.bn1": plan["layer3.1.conv1"]}
    silent |= {name: plan["layer4.0.downsample.0"] for name in ("layer4.0.bn2", "layer4.0.downsample.1", "layer4.1.bn2")}
    x = torch.rand(2, 3, 32, 32, dtype=torch.double)
    smaller = nb11.remove_channels(model, plan)
    torch.testing.assert_close(smaller(x), masked(model, silent)(x), atol=1e-6, rtol=0)
    same_state(smaller, pruned_by_peer(model, plan, (1, 3, 32, 32)))


def test_removal_from_a_plain_network(nb11):
    model, x = scattered(plain()), torch.rand(3, 3, 12, 12, dtype=torch.double)
    silent = masked(model, {"1": [0, 6]})
    for name, channels in (("4", [2]), ("8", [1, 5])):  # no norm, a bias
        silent.get_submodule(name).weight.data[channels] = 0
        silent.get_submodule(name).bias.data[channels] = 0
    smaller = nb11.remove_channels(model, {"0": [6, 0], "4": [2], "8": [5, 1]})
    torch.testing.assert_close(smaller(x), silent(x), atol=1e-6, rtol=0)
    assert (smaller[0].out_channels, smaller[4].in_channels, smaller[4].out_channels) == (5, 5, 4)
    assert (smaller[8].in_features, smaller[8].out_features, smaller[10].in_features) == (4, 4, 4)
    assert smaller[10].bias.shape == (4,)
    torch.testing.assert_close(nb11.remove_channels(smaller, {"0": [1]})(x).shape, (3, 4))


def test_the_smaller_network_learns(nb11, deep):
    deep.train()
    deep(torch.rand(4, 3, 16, 16, dtype=torch.double)).sum().backward()
    before = {name: parameter.grad.clone() for name, parameter in deep.named_parameters()}
    smaller = nb11.remove_channels(deep, {"blocks.2.conv2": [0, 4], "blocks.0.conv1": [1]})
    assert smaller.training
    smaller.zero_grad()
    smaller(torch.rand(4, 3, 16, 16, dtype=torch.double)).square().sum().backward()
    for name, parameter in smaller.named_parameters():
        assert parameter.grad.shape == parameter.shape, name
        assert parameter.grad.abs().sum() > 0 or name.endswith("conv.bias"), name
    torch.optim.SGD(smaller.parameters(), 0.1, momentum=0.9).step()
    assert all(torch.equal(parameter.grad, before[name]) for name, parameter in deep.named_parameters())
    later = nb11.remove_channels(smaller, {"blocks.2.conv2": [0]})  # gradients of another shape are left behind
    assert all(p.grad is None or p.grad.shape == p.shape for p in later.parameters())


@pytest.mark.parametrize(
    ("plan", "text"),
    [
        ({"blocks.9.conv1": [0]}, r"no convolution blocks\.9\.conv1"),
        ({"norm": [0]}, "no convolution norm"),
        ({"stem": [4]}, r"stem has the channels 0 to 3, not \[4\]"),
        ({"stem": [-1]}, "stem has the channels 0 to 3"),
        ({"blocks.0.conv1": range(4)}, r"nothing would be left of blocks\.0\.conv1"),
        ({"blocks.2.conv2": range(8)}, r"nothing would be left of blocks\.2\.conv2"),
        (
            {"blocks.2.conv2": [1], "blocks.2.shortcut.0": [2]},
            r"blocks\.2\.(conv2|shortcut\.0) and blocks\.2\.(conv2|shortcut\.0) are added",
        ),
        ({"blocks.2.conv2": [1], "blocks.3.conv2": [1, 2]}, r"blocks\.2\.conv2 and blocks\.3\.conv2 are added"),
        ({"head": [1]}, "head makes the output"),
    ],
)
def test_plans_that_cannot_be(nb11, deep, plan, text):
    before = copy.deepcopy(deep.state_dict())
    with pytest.raises(ValueError, match=text):
        nb11.remove_channels(deep, plan)
    same_state(deep, before)


def test_a_layer_is_taken_apart_along_one_dimension(nb11):
    conv = nn.Conv2d(4, 5, 3)
    weight, bias = conv.weight.detach().clone(), conv.bias.detach().clone()
    conv.weight.grad = torch.ones_like(conv.weight)
    nb11.take(conv, torch.tensor([0, 3]), 1, in_channels=2)
    assert conv.weight.grad is None  # it had another shape
    assert torch.equal(conv.weight, weight[:, [0, 3]])
    assert torch.equal(conv.bias, bias)
    assert (conv.in_channels, conv.out_channels) == (2, 5)


# --- blocks


def test_a_removed_block_is_its_shortcut(nb11, deep):
    x, before = torch.rand(3, 3, 16, 16, dtype=torch.double), copy.deepcopy(deep.state_dict())
    for gone in ([1], [2], [0, 3, 5], [4, 4], []):
        silent = masked(deep, {f"blocks.{n}.norm2": range(deep.blocks[n].norm2.num_features) for n in gone})
        shorter = nb11.remove_blocks(deep, gone)
        torch.testing.assert_close(shorter(x), silent(x), atol=1e-10, rtol=0)
        own = {n: sum(p.numel() for p in deep.blocks[n].parameters()) for n in set(gone)}
        stays = {n: sum(p.numel() for p in deep.blocks[n].shortcut.parameters()) for n in set(gone)}
        assert nb11.count_parameters(shorter) == nb11.count_parameters(deep) - sum(own.values()) + sum(stays.values())
        assert len(shorter.blocks) == 6
    same_state(deep, before)
    assert len(deep.blocks[1].conv1.weight) == 4


def test_channels_after_blocks(nb11, deep):
    x = torch.rand(3, 3, 16, 16, dtype=torch.double)
    shorter = nb11.remove_blocks(deep, [1, 2])
    smaller = nb11.remove_channels(shorter, {"blocks.0.conv2": [0], "blocks.3.conv2": [2, 3]})
    silent = {name: [0] for name in ("blocks.0.norm2", "blocks.0.shortcut.1")}
    silent |= {name: [2, 3] for name in ("blocks.2.0.1", "blocks.3.norm2")}
    torch.testing.assert_close(smaller(x), masked(shorter, silent)(x), atol=1e-6, rtol=0)


@pytest.mark.parametrize("index", [-1, 6, 99])
def test_a_block_that_is_not_there(nb11, deep, index):
    with pytest.raises(ValueError, match=f"no block {index}: there are 0 to 5"):
        nb11.remove_blocks(deep, [0, index])


# --- counts


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "vgg11", "resnet50"])
def test_multiply_adds_and_parameters_are_the_published(nb11, name):
    published = torchvision.models.get_model_weights(name).DEFAULT.meta
    with torch.device("meta"):  # no memory, no arithmetic
        model = torchvision.models.get_model(name)
        assert nb11.count_macs(model, (3, 224, 224)) / 1e9 == pytest.approx(published["_ops"], abs=6e-4)
    assert nb11.count_parameters(model) == published["num_params"]


def test_multiply_adds_by_hand(nb11, small):
    model = nn.Sequential(nn.Conv2d(4, 6, (3, 5), stride=2, padding=1, groups=2), nn.Flatten(2), nn.Linear(3 * 2, 7))
    assert nb11.count_macs(model, (4, 6, 6)) == 6 * 3 * 2 * (2 * 3 * 5) + 6 * (6 * 7)  # 3 by 2 places; the last layer six times
    stem = 64 * 3 * 4 * 9
    stages = 16 * (4 * 4 * 9 + 4 * 4 * 9 + 4 * 4) + 4 * (4 * 8 * 9 + 8 * 8 * 9 + 4 * 8) + (8 * 6 * 9 + 6 * 6 * 9 + 8 * 6)
    assert nb11.count_macs(small, (3, 16, 16)) == stem + stages + 60


def test_counting_leaves_the_model_as_it_was(nb11, small):
    before = copy.deepcopy(small.state_dict())
    for training in (True, False):
        small.train(training)
        first = nb11.count_macs(small, (3, 16, 16))
        assert small.training == small.blocks[0].norm1.training == training
        assert nb11.count_macs(small, (3, 16, 16)) == first
        assert not any(layer._forward_hooks for layer in small.modules())
    same_state(small, before)
    with pytest.raises(RuntimeError):
        nb11.count_macs(small.train(), (5, 16, 16))  # the stem wants three channels
    assert small.training
    assert not any(layer._forward_hooks for layer in small.modules())


def test_parameters_that_are_not_zero(nb11):
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Linear(4, 5))
    assert nb11.count_parameters(model) == 2 * 3 * 9 + 3 + 6 + 25
    model[0].weight.data[1] = 0
    model[2].bias.data[:2] = 0
    assert nb11.count_parameters(model, nonzero=True) == nb11.count_parameters(model) - 18 - 2 - 3  # a norm's shifts are 0
    assert nb11.count_parameters(model) == 2 * 3 * 9 + 3 + 6 + 25


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes(nb11, dtype):
    model = nn.Sequential(nn.Conv2d(20, 30, 3), nn.BatchNorm2d(30), nn.Flatten(), nn.Linear(40, 50)).to(dtype)
    dense = nb11.count_bytes(model)
    assert dense["raw"] == 4 * nb11.count_parameters(model)
    for weight in (model[0].weight, model[3].weight):
        weight.data.mul_(torch.rand(weight.shape, generator=generator()) > 0.9)
    found = nb11.count_bytes(model)
    assert list(found) == ["raw", "zip", "CSR"]
    assert found["raw"] == dense["raw"]
    matrices = [scipy.sparse.csr_matrix(w.detach().float().flatten(1).numpy()) for w in (model[0].weight, model[3].weight)]
    csr = sum(8 * matrix.nnz + 4 * (matrix.shape[0] + 1) for matrix in matrices)
    assert found["CSR"] == csr + 4 * (30 + 30 + 30 + 50)
    assert found["CSR"] < 0.3 * dense["CSR"]
    assert found["zip"] < 0.3 * dense["zip"]
    assert 0.8 * dense["raw"] < dense["zip"] < 1.01 * dense["raw"]
    assert dense["CSR"] > 1.9 * dense["raw"]


def test_bytes_of_a_smaller_network(nb11, small):
    half = nb11.remove_channels(small, {"blocks.1.conv2": range(4), "blocks.1.conv1": range(4), "blocks.2.conv1": range(3)})
    before, after = nb11.count_bytes(small), nb11.count_bytes(half)
    assert all(after[kind] < 0.8 * before[kind] for kind in before)


# --- the training's parts


def test_every_shift_and_mirror_occurs_alike(nb11):
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    picture = torch.stack([1 + 7 * rows + columns, 50 + 7 * rows + columns])
    count = 18_000
    seen = nb11.shifted_and_mirrored(picture.expand(count, 2, 5, 7), generator(), padding=1)
    padded = F.pad(picture, [1] * 4)
    places = [padded[:, r : r + 5, c : c + 7] for r in range(3) for c in range(3)]
    options = [*places, *(place.flip(2) for place in places)]
    counts = [int((seen == option).flatten(1).all(1).sum()) for option in options]
    assert sum(counts) == count
    assert scipy.stats.chisquare(counts).pvalue > 1e-3


def test_shifts_reach_four_pixels_and_repeat(nb11):
    x = torch.zeros(3000, 1, 16, 16)
    x[:, :, 8, 8] = 1
    seen = nb11.shifted_and_mirrored(x, generator(2))
    assert torch.equal(seen, nb11.shifted_and_mirrored(x, generator(2)))
    assert not torch.equal(seen, nb11.shifted_and_mirrored(x, generator(3)))
    rows, columns = seen[:, 0].sum(2).argmax(1), seen[:, 0].sum(1).argmax(1)
    assert set(rows.tolist()) == set(range(4, 13))
    assert set(columns.tolist()) == set(range(3, 13))  # mirrored, 8 is 7
    assert seen.shape == x.shape
    assert x.sum() == 3000


def test_schedule(nb11):
    found = [nb11.schedule(t) for t in (0, 0.05, 0.1, 0.55, 0.91, 1)]
    assert found == pytest.approx([0, 0.5, 1, 0.5, 0.1, 0])
    assert nb11.schedule(0.25, warm=0.5) == pytest.approx(0.5)
    assert nb11.schedule(0.75, warm=0.5) == pytest.approx(0.5)


def test_prunable_weights(nb11, small):
    found = nb11.prunable(small)
    expected = [layer.weight for layer in small.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    assert {id(weight) for weight in found} == {id(weight) for weight in expected}
    assert [weight.shape[0] for weight in found[:3]] == [4, 4, 4]


def test_fresh_weights_are_hes(nb11):
    model = nn.Sequential(nn.Conv2d(20, 300, 3), nn.BatchNorm2d(300), nn.Linear(400, 500))
    model[1].weight.data.fill_(7)
    model[1].running_mean.fill_(7)
    before = copy.deepcopy(model.state_dict())
    first, second, other = (nb11.fresh_weights(model, seed) for seed in (3, 3, 4))
    same_state(model, before)
    same_state(first, second)
    assert not torch.equal(first[0].weight, other[0].weight)
    assert float(first[0].weight.detach().std()) == pytest.approx(math.sqrt(2 / 180), rel=0.02)
    assert scipy.stats.kstest(first[0].weight.detach().flatten()[:5000] / math.sqrt(2 / 180), "norm").pvalue > 1e-3
    assert float(first[2].weight.detach().std()) == pytest.approx(0.1 * math.sqrt(2 / 400), rel=0.02)
    assert first[2].bias.abs().max() == 0
    assert torch.equal(first[1].weight, torch.ones(300))
    assert torch.equal(first[1].running_mean, torch.zeros(300))
    state = torch.get_rng_state()
    nb11.fresh_weights(model, 3)
    assert torch.equal(torch.get_rng_state(), state)


def test_recalibrated_norms_have_the_statistics_of_the_pictures(nb11):
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4)).eval()
    model[1].running_mean.fill_(100.0)
    model[1].num_batches_tracked.fill_(50)
    before = copy.deepcopy(model.state_dict())
    images = torch.randint(256, (2600, 3, 6, 6), generator=generator()).byte()
    found = nb11.recalibrated(model, images[:480])
    with torch.no_grad():
        first = model[0](images.float() / 255)
        whole = first[:480]
        centred = (whole - whole.mean((0, 2, 3), keepdim=True)) / (whole.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        second = model[3](centred.relu())
    for norm, outputs in ((found[1], whole), (found[4], second)):
        torch.testing.assert_close(norm.running_mean, outputs.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(norm.running_var, outputs.var((0, 2, 3)), atol=1e-5, rtol=1e-4)
        assert norm.momentum == 0.1
    same_state(model, before)
    assert model[1].momentum == 0.1
    assert not model.training
    many = nb11.recalibrated(model, images)[1]  # the first 2,000, in four parts
    torch.testing.assert_close(many.running_mean, first[:2000].mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    parts = torch.stack([part.var((0, 2, 3)) for part in first[:2000].split(500)])
    torch.testing.assert_close(many.running_var, parts.mean(0), atol=1e-5, rtol=1e-4)
    few = nb11.recalibrated(model, images, count=100)[1]
    torch.testing.assert_close(few.running_mean, first[:100].mean((0, 2, 3)), atol=1e-5, rtol=1e-4)


def test_answers_and_rights(nb11, small, pictures):
    images, labels = pictures["validation"]
    logits = nb11.answers(small.train(), images)
    torch.testing.assert_close(logits, small.eval()(images / 255).detach())
    torch.testing.assert_close(nb11.answers(small.train(), images, size=7), logits)
    assert not logits.requires_grad
    assert torch.equal(nb11.rights(small, images, labels), logits.argmax(1) == labels)


# --- the training


def trained(nb11, config, model, pictures, epochs=1.5, rate=0.1, seed=0, **options):
    return nb11.train(model, pictures, epochs, rate, config, seed, **options)


def test_training_by_hand(nb11, config, small, pictures):
    """Ten steps of Nesterov's SGD with weight decay, written out, over more than one epoch."""
    images, labels = pictures["train"]
    draws, steps, rate, losses = generator(5), 10, 0.1, []
    model = copy.deepcopy(small).train()
    speed = [torch.zeros_like(p) for p in model.parameters()]
    order = []
    for step in range(steps):
        if not order:
            order = list(torch.randperm(130, generator=draws).split(20)[:6])  # ten pictures are left over
        batch = order.pop(0)
        x = nb11.shifted_and_mirrored(images[batch].float() / 255, draws)
        progress = (step + 0.5) / steps
        share = progress / 0.1 if progress < 0.1 else (1 - progress) / 0.9
        logits = model(x)
        loss = -logits.log_softmax(1)[range(20), labels[batch]].mean()
        losses.append(loss.item())
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():
            for parameter, slope, velocity in zip(model.parameters(), slopes, speed, strict=True):
                slope = slope + 5e-3 * parameter
                velocity.mul_(0.9).add_(slope)
                parameter.sub_(rate * share * (slope + 0.9 * velocity))
    before = copy.deepcopy(small.state_dict())
    weights, log = trained(nb11, config, small, pictures, 10 / 6, rate, 5)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(weights[name], tensor, atol=1e-5, rtol=1e-4, msg=name)
    assert log["step"] == list(range(1, 11))
    assert log["loss"] == pytest.approx(losses, rel=1e-4)
    same_state(small, before)


def test_training_repeats_and_learns(nb11, config, small, pictures):
    first, log = trained(nb11, config, small, pictures, 3)
    second, again = trained(nb11, config, small, pictures, 3)
    same_state(first, second)
    assert log == again
    other, _ = trained(nb11, config, small, pictures, 3, seed=1)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert log["loss"][-1] < log["loss"][0]


@pytest.mark.parametrize("epochs", [0, 0.5, 1, 4.5])
def test_the_log_has_ten_points_at_most(nb11, config, small, pictures, monkeypatch, epochs):
    seen = []
    loss = lambda *inputs: seen.append(F.cross_entropy(*inputs)) or seen[-1]
    monkeypatch.setitem(nb11.train.__globals__, "F", type("F", (), {"pad": F.pad, "relu": F.relu, "cross_entropy": loss}))
    _, log = trained(nb11, config, small, pictures, epochs)
    steps = round(6 * epochs)
    assert len(seen) == steps
    assert len(log["step"]) == len(log["loss"]) == min(10, steps)
    assert log["step"][-1:] == ([steps] if steps else [])
    for end, start, mean in zip(log["step"], [0, *log["step"]], log["loss"], strict=False):
        assert mean == pytest.approx(float(torch.stack(seen[start:end]).detach().mean()), rel=1e-5)


@pytest.mark.parametrize("pruned_before", [True, False])
def test_masked_weights_stay_zero(nb11, config, small, pictures, pruned_before):
    """Momentum and decay of weights that were not zero before would move them, were only the gradients masked."""
    masks = nb11.magnitude_mask(nb11.prunable(small), 0.7)
    model = copy.deepcopy(small)
    if pruned_before:
        for weight, mask in zip(nb11.prunable(model), masks, strict=True):
            weight.data.mul_(mask)
    before = copy.deepcopy(model.state_dict())
    for epochs in (1 / 6, 2):
        weights, _ = trained(nb11, config, model, pictures, epochs, masks=masks)
        after = copy.deepcopy(model)
        after.load_state_dict(weights)
        for weight, mask in zip(nb11.prunable(after), masks, strict=True):
            assert not weight[~mask].any()
            assert weight[mask].all()
        assert not torch.equal(weights["stem.weight"], before["stem.weight"])
    same_state(model, before)


def test_masks_of_another_network_are_refused(nb11, config, small, pictures):
    masks = nb11.magnitude_mask(nb11.prunable(small), 0.5)
    with pytest.raises(ValueError, match="zip"):
        trained(nb11, config, small, pictures, masks=masks[:-1])


@pytest.mark.parametrize("epochs", [1, 17])
def test_gradual_pruning_follows_its_curve_and_arrives(nb11, config, small, pictures, monkeypatch, epochs):
    asked, original = [], nb11.magnitude_mask
    spy = lambda weights, sparsity: asked.append(sparsity) or original(weights, sparsity)
    monkeypatch.setitem(nb11.train.__globals__, "magnitude_mask", spy)
    weights, _ = trained(nb11, config, small, pictures, epochs, gradual=0.83)
    steps = 6 * epochs
    every = max(1, steps // 50)
    assert asked == pytest.approx([0.83 * (1 - max(0, 1 - step / steps / 0.75) ** 3) for step in range(0, steps, every)])
    matrices = [tensor for name, tensor in weights.items() if tensor.dim() > 1]
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    assert zeros == round(0.83 * sum(matrix.numel() for matrix in matrices))
    assert all(tensor.all() for name, tensor in weights.items() if name.endswith("norm1.weight"))


# --- plans


def test_groups_that_may_shrink(nb11, deep):
    found = nb11.prunable_groups(deep)
    assert len(found) == 10
    assert not any(group.fixed or "head" in group.makers for group in found)


def test_scores_of_a_group_are_means_over_makers(nb11, deep):
    for score in (nb11.filter_scores, nb11.geometric_median_scores, lambda conv: nb11.filter_scores(conv, 1)):
        found = nb11.maker_scores(deep, score)
        assert list(found) == [group.makers[0] for group in nb11.prunable_groups(deep)]
        (stream,) = (name for name in found if name in ("blocks.2.conv2", "blocks.2.shortcut.0"))
        makers = [deep.blocks[2].conv2, deep.blocks[2].shortcut[0], deep.blocks[3].conv2]
        expected = sum(score(conv) / score(conv).mean() for conv in makers) / 3
        torch.testing.assert_close(found[stream], expected)
        inside = deep.blocks[1].conv1
        torch.testing.assert_close(found["blocks.1.conv1"], score(inside) / score(inside).mean())
    deep.blocks[1].conv1.weight.data.zero_()
    assert torch.equal(nb11.maker_scores(deep, nb11.filter_scores)["blocks.1.conv1"], torch.zeros(4).double())


@pytest.mark.parametrize("share", [0.9, 0.5, 0.3])
def test_the_lowest_scores_go_until_it_fits(nb11, deep, share):
    shape = (3, 16, 16)
    draws = generator(2)
    scores = nb11.maker_scores(deep, nb11.filter_scores)
    scores = {name: torch.rand(len(values), generator=draws) for name, values in scores.items()}
    target = int(share * nb11.count_macs(deep, shape))
    plan = nb11.plan_for(deep, scores, target, shape)
    macs = lambda plan: nb11.count_macs(nb11.remove_channels(deep, plan), shape)
    assert macs(plan) <= target
    highest = max((float(scores[name][channel]), name, channel) for name, channels in plan.items() for channel in channels)
    without = {name: [c for c in channels if (name, c) != highest[1:]] for name, channels in plan.items()}
    assert macs(without) > target
    for name, values in scores.items():
        gone = plan.get(name, [])
        left = sorted(set(range(len(values))) - set(gone))
        assert len(left) >= math.ceil(0.1 * len(values))
        assert not gone or values[gone].max() <= values[left].min()
        if len(left) > math.ceil(0.1 * len(values)):  # what stays, stays because its score is high
            assert float(values[left].min()) > highest[0]


def test_a_share_of_each_group_stays(nb11, deep):
    shape = (3, 16, 16)
    scores = nb11.maker_scores(deep, nb11.filter_scores)
    scores["blocks.3.conv1"] = scores["blocks.3.conv1"] / 1000  # all of it would go first
    full = nb11.count_macs(deep, shape)
    for least, stay in ((0.1, 1), (0.3, 3), (0.5, 4)):
        plan = nb11.plan_for(deep, scores, int(0.8 * full), shape, least)
        assert 8 - len(plan["blocks.3.conv1"]) == stay
    slim = {name: values.argsort()[: len(values) - math.ceil(len(values) / 2)].tolist() for name, values in scores.items()}
    fewest = nb11.count_macs(nb11.remove_channels(deep, slim), shape)
    plan = nb11.plan_for(deep, scores, fewest, shape, 0.5)
    assert {name: sorted(channels) for name, channels in plan.items()} == {name: sorted(channels) for name, channels in slim.items()}
    with pytest.raises(ValueError, match=f"{fewest - 1:,} multiply-adds: more are left"):
        nb11.plan_for(deep, scores, fewest - 1, shape, 0.5)
    assert nb11.plan_for(deep, scores, full, shape) == {}
    assert nb11.plan_for(deep, scores, 10 * full, shape) == {}


def test_plans_count_for_pictures_of_cifar(nb11, small):
    scores = nb11.maker_scores(small, nb11.filter_scores)
    target = nb11.count_macs(small, (3, 32, 32)) // 2
    assert nb11.plan_for(small, scores, target) == nb11.plan_for(small, scores, target, (3, 32, 32))
    assert nb11.count_macs(nb11.remove_channels(small, nb11.plan_for(small, scores, target)), (3, 32, 32)) <= target


# --- the pipeline


@pytest.mark.parametrize("sparsity", [0.0, 0.8])
def test_retrained(nb11, config, small, pictures, sparsity):
    small.load_state_dict(trained(nb11, config, small, pictures, 4)[0])
    small.norm.running_mean.fill_(50.0)  # stale
    before = copy.deepcopy(small.state_dict())
    masks = nb11.magnitude_mask(nb11.prunable(small), sparsity) if sparsity else ()
    found = nb11.retrained(small, masks, pictures, config, 4, 1.5, 0.05)
    same_state(small, before)
    assert set(found) == {"before", "validation", "right", "weights", "log"}
    start = copy.deepcopy(small)
    for weight, mask in zip(nb11.prunable(start), masks, strict=bool(masks)):
        weight.data.mul_(mask)
    start = nb11.recalibrated(start, pictures["train"][0])
    images, labels = pictures["test"]
    few = nb11.rights(start, images[:2000], labels[:2000])
    assert found["before"] == pytest.approx(100 * float(few.float().mean()))
    assert found["before"] != pytest.approx(100 * float(nb11.rights(start, images, labels).float().mean()), abs=1e-6)
    expected, log = trained(nb11, config, start, pictures, 1.5, 0.05, 4, masks=masks)
    same_state(found["weights"], expected)
    assert found["log"] == log
    after = copy.deepcopy(small)
    after.load_state_dict(found["weights"])
    assert found["right"].dtype == torch.bool
    assert torch.equal(found["right"], nb11.rights(after, images, labels))
    assert found["validation"] == pytest.approx(100 * float(nb11.rights(after, *pictures["validation"]).float().mean()))
    for weight, mask in zip(nb11.prunable(after), masks, strict=bool(masks)):
        assert not weight[~mask].any()


def test_retrained_prunes_gradually(nb11, config, small, pictures):
    found = nb11.retrained(small, (), pictures, config, 0, 2, 0.05, gradual=0.6)
    small.load_state_dict(found["weights"])
    matrices = nb11.prunable(small)
    zeros = sum(int((matrix == 0).sum()) for matrix in matrices)
    assert zeros == round(0.6 * sum(matrix.numel() for matrix in matrices))


def test_the_pipeline_from_end_to_end(nb11, config, small, pictures):
    small.load_state_dict(trained(nb11, config, small, pictures, 10)[0])
    full = nb11.count_macs(small, (3, 16, 16))
    plan = nb11.plan_for(small, nb11.maker_scores(small, nb11.filter_scores), full // 2, (3, 16, 16))
    lean = nb11.remove_channels(small, plan)
    found = nb11.retrained(lean, (), pictures, config, 0, 10, 0.1)
    assert nb11.count_macs(lean, (3, 16, 16)) <= full // 2
    assert 100 * float(found["right"].float().mean()) > 30  # of ten classes


# --- the study


def test_layers_that_are_not_followed_are_named(nb11):
    with pytest.raises(ValueError, match="1 is a GroupNorm"):
        nb11.channel_groups(nn.Sequential(nn.Conv2d(3, 8, 1), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 1)))


def test_random_scores(nb11, deep):
    scores = nb11.random_scores(deep, 4)
    assert {name: len(values) for name, values in scores.items()} == {g.makers[0]: g.channels for g in nb11.prunable_groups(deep)}
    joined = torch.cat(list(scores.values()))
    assert joined.unique().numel() == joined.numel()
    assert 0 <= joined.min() <= joined.max() < 1
    again = nb11.random_scores(deep, 4)
    assert all(torch.equal(again[name], values) for name, values in scores.items())
    assert not torch.equal(nb11.random_scores(deep, 5)["stem"], scores["stem"])


def test_shuffled_deals_the_scores_of_each_layer(nb11):
    scores = {"a": torch.arange(30.0), "b": torch.arange(100.0, 140)}
    dealt = nb11.shuffled(scores, 1)
    for name, values in scores.items():
        assert torch.equal(dealt[name].sort().values, values)
        assert not torch.equal(dealt[name], values)
    assert torch.equal(nb11.shuffled(scores, 1)["a"], dealt["a"])
    assert not torch.equal(nb11.shuffled(scores, 2)["a"], dealt["a"])


def test_evenly_gives_ranks(nb11):
    ranks = nb11.evenly({"a": torch.tensor([100.0, -7.0, 0.3, 0.4]), "b": torch.tensor([2.0, 1.0])})
    assert ranks["a"].tolist() == [0.875, 0.125, 0.375, 0.625]
    assert ranks["b"].tolist() == [0.75, 0.25]


def test_activation_scores(nb11, deep):
    """What the readers of each group read, taken with hooks of our own, in another order of the sums."""
    deep, x = deep.float().eval(), torch.rand(6, 3, 32, 32, generator=generator(2))
    read = {}
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output, name=name: read.update({name: inputs[0].detach()}))
        for name, layer in deep.named_modules()
        if isinstance(layer, (nn.Conv2d, nn.Linear))
    ]
    deep.eval()(x)
    for hook in hooks:
        hook.remove()
    scores = nb11.activation_scores(deep.train(), x)
    assert not any(layer._forward_pre_hooks for layer in deep.modules())
    for group in nb11.prunable_groups(deep):
        expected = []
        for name in group.readers:
            each = np.array([read[name][:, n].abs().numpy().mean() for n in range(group.channels)])
            expected.append(each / each.mean())
        np.testing.assert_allclose(scores[group.makers[0]], np.mean(expected, 0), rtol=1e-4)


def test_channel_scores(nb11, deep):
    scores = nb11.channel_scores(deep, torch.rand(2, 3, 32, 32, dtype=torch.double), 3)
    norm = nb11.maker_scores(deep, nb11.filter_scores)
    assert len(scores) == 8
    assert torch.equal(scores["l2 norm"]["stem"], norm["stem"])
    assert torch.equal(scores["l1 norm"]["stem"], nb11.filter_scores(deep.stem, 1) / nb11.filter_scores(deep.stem, 1).mean())
    assert torch.equal(scores["geometric median"]["stem"].argsort(), nb11.geometric_median_scores(deep.stem).argsort())
    for first, second in (("l2 norm", "l2 norm, shuffled in layers"), ("l2 norm, layers alike", "layers alike, shuffled")):
        for name, values in scores[first].items():
            assert torch.equal(scores[second][name].sort().values, values.sort().values)
        assert any(not torch.equal(scores[second][name], values) for name, values in scores[first].items())


@pytest.mark.parametrize(("kept", "expected"), [(16, 16), (13, 16), (11, 8), (2, 8)])
def test_rounded_keeps_multiples(nb11, kept, expected):
    model = nb11.Network(replace(nb11.Config(), widths=(16, 24), blocks=1, strides=(2, 2, 2)))
    scores = nb11.maker_scores(model, nb11.filter_scores)
    changed = nb11.rounded(model, {"stem": list(range(16 - kept))}, scores)
    assert changed["stem"] == scores["stem"].argsort()[: 16 - expected].tolist()
    assert all(gone == [] for name, gone in changed.items() if name != "stem")
    narrow = nb11.Network(replace(nb11.Config(), widths=(4, 24), blocks=1, strides=(2, 2, 2)))
    assert nb11.rounded(narrow, {}, nb11.maker_scores(narrow, nb11.filter_scores))["stem"] == []  # all, where there are fewer


def test_blocks_for_comes_nearest(nb11, deep):
    full = nb11.count_macs(deep, (3, 32, 32))
    scores = [3.0, 1.0, 2.0, 0.0, 5.0, 4.0]
    order = [3, 1, 2, 0, 5, 4]
    for target in (full, 0.8 * full, 0.5 * full, 0.3 * full):
        left = [nb11.count_macs(nb11.remove_blocks(deep, order[:n]), (3, 32, 32)) for n in range(6)]
        best = int(np.argmin(np.abs(np.array(left) - target)))
        assert nb11.blocks_for(deep, scores, target) == order[:best]
    assert nb11.blocks_for(deep, scores, full) == []


def test_features_and_probes(nb11, deep):
    deep, x = deep.float(), torch.rand(5, 3, 32, 32)
    features = nb11.features_by_depth(deep, x)
    assert len(features) == len(deep.blocks) + 1
    torch.testing.assert_close(deep.head(features[-1]), deep(x))
    torch.testing.assert_close(features[0], F.relu(deep.norm(deep.stem((x - 0.47) / 0.25))).mean((2, 3)))
    labels = torch.randint(3, (60,), generator=generator(1))
    x = (labels[:, None, None, None] / 3).expand(60, 3, 32, 32) + 0.01 * torch.rand(60, 3, 32, 32)
    scores = nb11.probe_accuracies(deep, (x[:40], labels[:40]), (x[40:], labels[40:]))
    assert len(scores) == len(deep.blocks) + 1
    assert min(scores) > 80  # brightness is easy
    assert max(nb11.probe_accuracies(deep, (x[:40], labels[:40]), (x[40:], (labels[40:] + 1) % 3))) < 20


def test_block_scores(nb11, config, pictures):
    model = nb11.fresh_weights(nb11.Network(replace(config, blocks=2)), 3)
    scores = nb11.block_scores(model, pictures)
    few = [values[:2000] for values in pictures["train"]]
    sets = [(images.float() / 255, labels) for images, labels in (few, pictures["validation"])]
    probes = nb11.probe_accuracies(model, *sets)
    assert scores["probes"] == pytest.approx([after - before for before, after in itertools.pairwise(probes)])
    judge = lambda network: 100 * float(nb11.rights(network, *pictures["validation"]).float().mean())
    for n, lost in enumerate(scores["alone"]):
        without = nb11.recalibrated(nb11.remove_blocks(model, [n]), few[0])
        assert lost == pytest.approx(judge(model) - judge(without))


def test_judged(nb11):
    draws = generator(9)
    runs = {
        (name, seed): {"before": 10.0 * seed, "validation": 20.0, "right": torch.rand(50, generator=draws) < p}
        for name, p in (("ours", 0.8), ("control", 0.3))
        for seed in (1, 2)
    }
    assert torch.equal(nb11.rights_of(runs, "ours", [2, 1])[0], runs["ours", 2]["right"])
    row = nb11.judged(runs, "ours", "control", [1, 2])
    assert row["before, %"].startswith("15.0")
    assert row["test, %"].startswith(f"{100 * nb11.rights_of(runs, 'ours', [1, 2]).float().mean():.1f}")
    assert row["minus dense, seeds"].startswith("+")
    assert "minus dense, seeds" not in nb11.judged(runs, "control", "control", [1, 2])


def test_difference_as_text(nb11):
    first = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 1], [0, 1, 0, 0]]).bool()
    second = torch.tensor([[1, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0]]).bool()
    means = 100 * (first.double() - second.double()).mean(0).numpy()
    half = scipy.stats.t.ppf(0.975, 3) * scipy.stats.sem(means)
    assert nb11.difference(first, second) == f"{means.mean():+.1f} [{means.mean() - half:+.1f}, {means.mean() + half:+.1f}], 2"


def test_shuffled_masks(nb11):
    masks = [torch.rand(20, 10, generator=generator(1)) < 0.3, torch.rand(5, 4, 3, generator=generator(2)) < 0.8]
    dealt = nb11.shuffled_masks(masks, 6)
    for mask, other in zip(masks, dealt, strict=True):
        assert (mask.shape, int(mask.sum()), mask.dtype) == (other.shape, int(other.sum()), other.dtype)
        assert not torch.equal(mask, other)


def test_ticket_masks(nb11):
    model = nb11.lenet(1)
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in nb11.prunable(model)]
    masks[0][:, :400] = False  # gone before, whatever their size
    smaller = nb11.ticket_masks(model, masks)
    for n, (weight, mask, after) in enumerate(zip(nb11.prunable(model), masks, smaller, strict=True)):
        assert not (after & ~mask).any()
        off = mask & ~after
        assert int(off.sum()) == round((0.1 if n == 2 else 0.2) * int(mask.sum()))
        assert weight[off].abs().max() <= weight[after].abs().min()


def test_lenet(nb11):
    model = nb11.lenet(3)
    sizes = [tuple(layer.weight.shape) for layer in model if isinstance(layer, nn.Linear)]
    assert sizes == [(300, 784), (100, 300), (10, 100)]
    assert float(model[0].weight.detach().std()) == pytest.approx(math.sqrt(2 / (784 + 300)), rel=0.02)
    assert not model[0].bias.any()
    assert torch.equal(model[0].weight, nb11.lenet(3)[0].weight)


@pytest.fixture
def digits():
    draws, found = generator(4), {}
    for name, count in (("train", 200), ("test", 100), ("validation", 70)):
        labels = torch.randint(10, (count,), generator=draws)
        found[name] = (torch.rand(count, 784, generator=draws) * 0.1 + F.one_hot(labels, 784), labels)
    return found


def test_train_digits(nb11, digits):
    begin = nb11.lenet(0)
    before = copy.deepcopy(begin.state_dict())
    masks = nb11.magnitude_mask(nb11.prunable(begin), 0.5)
    model, accuracy = nb11.train_digits(begin, masks, digits, 60, 1)
    same_state(begin, before)
    assert accuracy == pytest.approx(100 * float((model(digits["test"][0]).argmax(1) == digits["test"][1]).float().mean()))
    assert accuracy > 50
    for weight, mask in zip(nb11.prunable(model), masks, strict=True):
        assert not weight[~mask].any()
        assert weight[mask].all()
    masked, _ = nb11.train_digits(begin, masks, digits, 0, 1)
    assert all(not weight[~mask].any() for weight, mask in zip(nb11.prunable(masked), masks, strict=True))
    untrained, _ = nb11.train_digits(begin, (), digits, 0, 1)
    same_state(untrained, before)


def test_lottery(nb11, digits):
    found = nb11.lottery(digits, 5, 4, 2, 0)
    assert [row["left"] for row in found] == pytest.approx([100, 64, 41], abs=0.6)
    begin = nb11.lenet(0)
    masks = [torch.ones_like(weight, dtype=torch.bool) for weight in nb11.prunable(begin)]
    for n in range(3):
        model, accuracy = nb11.train_digits(begin, masks, digits, 5, 0)
        if n % 2 == 0:
            row = found[n // 2]
            fresh = nb11.train_digits(nb11.lenet(100), masks, digits, 5, 0)[1]
            mixed = nb11.train_digits(begin, nb11.shuffled_masks(masks, 0), digits, 5, 0)[1]
            assert (row["ticket"], row["fresh"], row["shuffled"]) == (accuracy, fresh, mixed)
            images, labels = digits["validation"]
            assert row["validation"] == pytest.approx(100 * float((model(images).argmax(1) == labels).float().mean()))
            assert row["validation"] != accuracy
        masks = nb11.ticket_masks(model, masks)


def test_zeros_have_no_sign_in_the_zip(nb11):
    model = nn.Linear(100, 100)
    model.weight.data.mul_(torch.rand(100, 100) > 0.9)
    clean = copy.deepcopy(model)
    clean.weight.data.add_(0.0)
    assert nb11.count_bytes(model) == nb11.count_bytes(clean)


def test_folding_changes_nothing(nb11, deep):
    x = torch.rand(3, 3, 32, 32, dtype=torch.double)
    folded = nb11.fuse(copy.deepcopy(deep))
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(x), deep(x), atol=1e-10, rtol=0)
    shorter = nb11.remove_blocks(deep, [0, 3])
    torch.testing.assert_close(nb11.fuse(copy.deepcopy(shorter))(x), shorter(x), atol=1e-10, rtol=0)


def test_with_weights_and_calls(nb11, small, config):
    other = nb11.fresh_weights(nb11.Network(config), 9)
    same_state(nb11.with_weights(small, other.state_dict()), other.state_dict())
    output = nb11.as_call(small, torch.rand(2, 3, 32, 32))()
    assert output.shape == (2, 10)
    assert not output.requires_grad


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
def test_the_sparse_product_is_the_masked_convolution(nb11):
    layer, x = nn.Conv2d(4, 6, 3, padding=1, bias=False), torch.rand(3, 4, 8, 8)
    product = nb11.as_product(layer, x, 0.7)()  # (6, 3 * 64), places first
    (mask,) = nb11.magnitude_mask([layer.weight], 0.7)
    expected = F.conv2d(x, layer.weight * mask, padding=1)  # (3, 6, 8, 8)
    columns = F.unfold(x, 3, padding=1).transpose(0, 1)
    assert product.shape == (6, 3 * 64) == (6, columns.shape[1] * columns.shape[2])
    torch.testing.assert_close(product.view(6, 3, 8, 8).transpose(0, 1), expected)


def test_overlap(nb11, deep):
    groups = nb11.prunable_groups(deep)
    first, second = groups[0].makers[0], groups[1].makers[0]
    one, two = {first: [0, 1], second: [2]}, {first: [1, 2, 3]}
    assert nb11.removed_of(one, groups) == {(first, 0), (first, 1), (second, 2)}
    same, chance = nb11.overlap(one, two, groups)
    assert same == pytest.approx(100 * 1 / 3)
    assert chance == pytest.approx(100 * (2 * 3 / groups[0].channels) / 3)
    assert nb11.overlap(one, one, groups)[0] == 100


def test_chance_is_what_random_plans_share(nb11, deep):
    groups = nb11.prunable_groups(deep)
    draws = generator(8)
    plan = lambda: {g.makers[0]: torch.randperm(g.channels, generator=draws)[: g.channels // 2].tolist() for g in groups}
    found = np.array([nb11.overlap(plan(), plan(), groups) for _ in range(300)])
    assert found[:, 0].mean() == pytest.approx(found[:, 1].mean(), abs=2)


def test_corruptions(nb11):
    x = torch.rand(4, 3, 32, 32, generator=generator(1))
    found = nb11.corrupted(x, 0)
    assert list(found) == ["noise", "blur", "low contrast", "dark", "pixels"]
    for corrupted in found.values():
        assert corrupted.shape == x.shape
        assert 0 <= corrupted.min() <= corrupted.max() <= 1
        assert not torch.allclose(corrupted, x, atol=0.01)
    torch.testing.assert_close(found["dark"], 0.4 * x)
    blocks = x.view(4, 3, 16, 2, 16, 2).mean((3, 5))
    torch.testing.assert_close(found["pixels"], blocks.repeat_interleave(2, 2).repeat_interleave(2, 3))
    inside = (found["noise"] > 0) & (found["noise"] < 1)
    assert (found["noise"] - x)[inside].std() == pytest.approx(0.08, rel=0.1)
    assert torch.equal(nb11.corrupted(x, 0)["noise"], found["noise"])
    assert not torch.equal(nb11.corrupted(x, 1)["noise"], found["noise"])
    assert found["blur"].std() < x.std()
    assert found["low contrast"].std() < 0.6 * x.std()


def test_robust(nb11, small):
    images, labels = torch.randint(256, (40, 3, 32, 32), generator=generator(1)).byte(), torch.arange(40) % 10
    right = nb11.robust(small, images, labels, 0)
    assert right.shape == (5, 40)
    for row, x in zip(right, nb11.corrupted(images.float() / 255, 0).values(), strict=True):
        assert torch.equal(row, nb11.rights(small, (255 * x).round().byte(), labels))
