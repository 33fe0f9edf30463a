"""Notebook 05: every gradient by hand against PyTorch's autograd, the ways to remember against one another, and what each holds."""

import functools
import itertools
import json
import math
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cloudpickle import register_pickle_by_value, unregister_pickle_by_value
from torch import nn

from tests.checks import check_error_ends_the_rest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def small(nb05):
    """A network in which everything happens, quickly."""
    return replace(nb05.Config(), depth=5, width=12, hidden=7)


def tensor(array):
    return torch.tensor(array, requires_grad=True)


def residual(nb05, width, hidden, rng, dtype=np.float64, scale=1.0):
    """A Residual whose biases are not zero."""
    function = nb05.Residual(width, hidden, scale, rng, dtype, nb05.Buffers())
    function.b1[:], function.b2[:] = rng.standard_normal(hidden), rng.standard_normal(width)
    return function


def in_torch(function):
    """(the same function in PyTorch, its weights)."""
    w1, b1, w2, b2 = weights = [tensor(part) for part in (function.w1, function.b1, function.w2, function.b2)]
    return lambda x: F.linear(F.relu(F.linear(x, w1.T, b1)), w2.T, b2), weights


def gradients(function):
    return [function.d_w1, function.d_b1, function.d_w2, function.d_b2]


def close(found, expected, tolerance=1e-10):
    return all(
        np.allclose(a, b.detach().numpy() if isinstance(b, torch.Tensor) else b, rtol=tolerance, atol=tolerance)
        for a, b in zip(found, expected, strict=True)
    )


# --- the coupling and the residual function


def test_coupling_by_hand(nb05):
    square, triple = lambda x: x**2, lambda x: 3 * x
    assert nb05.couple(1, 2, square, triple) == (5, 17)
    assert nb05.uncouple(5, 17, square, triple) == (1, 2)
    assert nb05.uncouple(*nb05.couple(-3, 0.5, abs, lambda x: -x), abs, lambda x: -x) == (-3, 0.5)


@pytest.mark.parametrize(("batch", "width", "hidden"), [(1, 1, 1), (1, 4, 3), (5, 3, 8), (32, 16, 16)])
def test_residual_function(nb05, rng, batch, width, hidden):
    function = residual(nb05, width, hidden, rng)
    x, slope, start = rng.standard_normal((3, batch, width))
    twin, weights = in_torch(function)
    leaf = tensor(x)
    y = twin(leaf)
    added, taken, kept = start.copy(), start.copy(), np.empty((batch, hidden))
    function.add(added, x, kept)
    function.add(taken, x, np.empty((batch, hidden)), sign=-1)
    assert close([added - start, start - taken], [y, y])
    expected = torch.autograd.grad(y, [leaf, *weights], torch.tensor(slope))
    target = start.copy()
    for times in (1, 2):  # gradients add up
        function.pull(target, x, kept, slope)
        assert close([target - start, *gradients(function)], [times * part for part in expected])


def test_a_frozen_function_gets_no_gradients(nb05, rng):
    function = residual(nb05, 4, 5, rng)
    function.trainable = False
    x, slope = rng.standard_normal((2, 3, 4))
    hidden, d_x = np.empty((3, 5)), np.zeros((3, 4))
    function.add(np.zeros((3, 4)), x, hidden)
    function.pull(d_x, x, hidden, slope)
    assert not function.gradients.any()
    leaf = tensor(x)
    assert close([d_x], torch.autograd.grad(in_torch(function)[0](leaf), leaf, torch.tensor(slope)))


def test_views_share_the_flat_vectors(nb05):
    layer = nb05.Layer(np.float32, a=(2, 3), b=(4,))
    layer.a[:], layer.b[:], layer.d_b[:] = 1, 2, 3
    assert layer.weights.tolist() == [1] * 6 + [2] * 4
    assert layer.gradients.tolist() == [0] * 6 + [3] * 4
    layer.hold(np.full(10, 5, np.float32))
    assert layer.d_a.tolist() == [[5] * 3] * 2


def test_buffers_are_made_once(nb05):
    buffers = nb05.Buffers()
    first = buffers("a", (2, 3), np.float32)
    assert buffers("a", (2, 3), np.float32) is first
    assert buffers("a", (2, 3), np.float64) is not first
    assert buffers("b", (2, 3), np.float32) is not first
    assert buffers.megabytes() == (24 + 48 + 24) / 2**20


# --- the block


def expected_of(functions, inputs, slopes):
    """Outputs, slopes by the inputs and gradients of the functions' weights, by autograd."""
    twins = [in_torch(function) for function in functions]
    x1, x2 = map(tensor, inputs)
    y1 = x1 + twins[0][0](x2)
    y2 = x2 + twins[1][0](y1)
    leaves = [x1, x2, *twins[0][1], *twins[1][1]]
    found = torch.autograd.grad((y1, y2), leaves, tuple(map(torch.tensor, slopes)))
    return (y1, y2), found[:2], found[2:]


@pytest.mark.parametrize(("batch", "width", "hidden"), [(1, 1, 1), (1, 6, 4), (7, 5, 9), (16, 32, 32)])
def test_block(nb05, rng, batch, width, hidden):
    functions = [residual(nb05, width, hidden, rng) for _ in range(2)]
    block = nb05.ReversibleBlock(*functions)
    inputs, slopes = rng.standard_normal((2, 2, batch, width))
    before = inputs.copy(), slopes.copy()
    outputs, d_inputs, d_weights = expected_of(functions, inputs, slopes)
    found = block.forward(*inputs)
    assert close(found, outputs)
    assert close(block.inverse(*found), inputs)
    assert close(block.backward(*found, *slopes), (*inputs, *d_inputs))
    assert close([part for function in functions for part in gradients(function)], d_weights)
    assert np.array_equal(inputs, before[0])  # arguments stay as they are
    assert np.array_equal(slopes, before[1])


def test_gradients_of_a_block_by_finite_differences(nb05, rng):
    """The derivation without autograd: central differences of a sum of the outputs."""
    functions = [residual(nb05, 3, 4, rng) for _ in range(2)]
    block, (x1, x2), slopes = nb05.ReversibleBlock(*functions), rng.standard_normal((2, 5, 3)), rng.standard_normal((2, 5, 3))
    loss = lambda: sum((y * slope).sum() for y, slope in zip(block.forward(x1, x2), slopes, strict=True))
    *_, dx1, dx2 = block.backward(*block.forward(x1, x2), *slopes)
    for array, slope in ((x1, dx1), (x2, dx2), *((f.weights, f.gradients) for f in functions)):
        place = np.unravel_index(rng.integers(array.size), array.shape)
        values = []
        for step in (1e-6, -1e-6):
            array[place] += step
            values.append(loss())
            array[place] -= step
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope[place], rel=1e-5, abs=1e-7)


def test_a_function_shared_by_both_streams(nb05, rng):
    """Its gradient is the sum of what both uses give."""
    function = residual(nb05, 4, 6, rng)
    block = nb05.ReversibleBlock(function, function)
    inputs, slopes = rng.standard_normal((2, 2, 3, 4))
    _, d_inputs, d_weights = expected_of([function, function], inputs, slopes)
    assert close(block.backward(*block.forward(*inputs), *slopes)[2:], d_inputs)
    assert close(gradients(function), [a + b for a, b in zip(d_weights[:4], d_weights[4:], strict=True)])


def test_inverse_in_float32(nb05, rng):
    block = nb05.ReversibleBlock(*(residual(nb05, 64, 64, rng, np.float32, 0.1) for _ in range(2)))
    inputs = rng.standard_normal((2, 100, 64)).astype(np.float32)
    rebuilt = block.inverse(*block.forward(*inputs))
    assert all(part.dtype == np.float32 for part in rebuilt)
    assert np.abs(np.stack(rebuilt) - inputs).max() < 1e-5


def test_wrong_arrays_are_refused(nb05, rng):
    block = nb05.ReversibleBlock(*(residual(nb05, 4, 6, rng, np.float32) for _ in range(2)))
    good = np.zeros((3, 4), np.float32)
    with pytest.raises(TypeError, match="float64 given, the weights are float32: use astype"):
        block.forward(good.astype(np.float64), good)
    for wrong in ((good[:, :3], good[:, :3]), (good[0], good[0]), (good, good[:2])):
        with pytest.raises(ValueError, match=r"two streams of \(B, 4\)"):
            block.inverse(*wrong)
    with pytest.raises(ValueError, match="two streams"):
        block.backward(good, good, good, good[:1])


# --- loss and optimisers


def test_cross_entropy(nb05, rng):
    logits, labels = 3 * rng.standard_normal((7, 5)), rng.integers(5, size=7)
    leaf = tensor(logits)
    expected = F.cross_entropy(leaf, torch.tensor(labels))
    loss, slope = nb05.cross_entropy(logits, labels)
    assert loss == pytest.approx(expected.item())
    assert close([slope], torch.autograd.grad(expected, leaf))
    half, half_slope = nb05.cross_entropy(logits, labels, 14)
    assert half == pytest.approx(loss / 2)
    assert close([half_slope], [slope / 2])


def test_cross_entropy_of_extreme_logits(nb05):
    logits = np.array([[1000.0, -1000.0], [-1000.0, 1000.0]])
    loss, slope = nb05.cross_entropy(logits, np.array([0, 0]))
    assert loss == pytest.approx(1000)
    assert slope.tolist() == [[0, 0], [-0.5, 0.5]]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (lambda nb, layers: nb.Adam(layers, 0.1), lambda weights: torch.optim.Adam(weights, 0.1)),
        (lambda nb, layers: nb.Adam(layers, 0.01, (0.5, 0.9), 0.1), lambda weights: torch.optim.Adam(weights, 0.01, (0.5, 0.9), 0.1)),
        (lambda nb, layers: nb.SGD(layers, 0.1), lambda weights: torch.optim.SGD(weights, 0.1)),
    ],
    ids=["Adam", "Adam with other settings", "SGD"],
)
def test_optimisers(nb05, rng, ours, theirs):
    layers = [nb05.Layer(np.float64, a=(3, 2)), nb05.Layer(np.float64, b=(4,)), nb05.Layer(np.float64, frozen=(2,))]
    layers[2].trainable = False
    for layer in layers:
        layer.weights[:] = rng.standard_normal(layer.weights.size)
    weights = [tensor(layer.weights) for layer in layers[:2]]
    frozen = layers[2].weights.copy()
    optimiser, expected = ours(nb05, layers), theirs(weights)
    for _ in range(10):
        for layer, w in itertools.zip_longest(layers, weights):
            layer.gradients[:] = rng.standard_normal(layer.gradients.size)
            if w is not None:
                w.grad = torch.tensor(layer.gradients)
        before = [layer.gradients.copy() for layer in layers]
        optimiser.step()
        expected.step()
        assert close([layer.gradients for layer in layers], before)  # not used up
    assert close([layer.weights for layer in layers[:2]], weights)
    assert np.array_equal(layers[2].weights, frozen)


def test_plain_descent_keeps_nothing(nb05):
    layer = nb05.Layer(np.float32, a=(3,))
    assert nb05.SGD([layer], 1).moments[0].size == 0
    assert nb05.Adam([layer], 1).moments[0].size == 6


# --- the network and its ways to remember


def picture_batch(rng, batch):
    return rng.standard_normal((batch, 784)), rng.integers(10, size=batch)


def all_gradients(network):
    return [layer.gradients.copy() for layer in network.layers]


WAYS = [("stored",), ("reversible",), *(("checkpoints", k) for k in (1, 2, 3, 5, 9)), *(("micro-batches", m) for m in (1, 2, 3, 8))]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: " ".join(map(str, way)))
@pytest.mark.parametrize(("depth", "width", "hidden", "batch"), [(1, 2, 1, 1), (5, 12, 7, 8), (8, 6, 4, 8)])
def test_gradients_of_the_network(nb05, rng, way, depth, width, hidden, batch):
    """All ways against autograd; micro-batches of unequal size and of none at all among them."""
    network = nb05.Network(replace(nb05.Config(), depth=depth, width=width, hidden=hidden), 1, np.float64)
    pictures, labels = picture_batch(rng, batch)
    for layer in network.layers:
        layer.weights += 0.1 * rng.standard_normal(layer.weights.size)
    weights = [tensor(layer.weights) for layer in network.layers]
    loss = torch_loss(network, weights, pictures, labels)
    nothing = nb05.SGD(network.layers, 0.0)
    if way[0] == "micro-batches" and way[1] > batch:
        way = ("micro-batches", batch)
    found = nb05.step_by(*way)(network, nothing, pictures, labels)
    assert found == pytest.approx(loss.item())
    assert close(all_gradients(network), torch.autograd.grad(loss, weights))
    again = nb05.step_by(*way)(network, nothing, pictures, labels)
    assert again == found  # buffers are used again, gradients begin anew
    assert close(all_gradients(network), torch.autograd.grad(torch_loss(network, weights, pictures, labels), weights))


def torch_loss(network, weights, pictures, labels):
    """Written anew, with modules of PyTorch."""
    parts = [{name: layer.views(w)[name] for name in layer.shapes} for layer, w in zip(network.layers, weights, strict=True)]
    x = torch.tensor(pictures)
    state = [F.linear(x, w.T, b[0]) for w, b in zip(parts[0]["w"], parts[0]["b"], strict=True)]
    change = lambda x, p: F.linear(F.relu(F.linear(x, p["w1"].T, p["b1"])), p["w2"].T, p["b2"])
    if len(state) == 2:
        for f, g in zip(parts[1:-1:2], parts[2:-1:2], strict=True):
            state[0] = state[0] + change(state[1], f)
            state[1] = state[1] + change(state[0], g)
    else:
        for f in parts[1:-1]:
            state[0] = state[0] + change(state[0], f)
    logits = F.linear(torch.cat(state, 1), torch.cat(list(parts[-1]["w"])).T, parts[-1]["b"])
    return F.cross_entropy(logits, torch.tensor(labels))


@pytest.mark.parametrize("segment", [None, 1, 2, 7])
def test_gradients_of_the_ordinary_network(nb05, rng, segment, small):
    network = nb05.Network(replace(small, streams=1), 1, np.float64)
    pictures, labels = picture_batch(rng, 6)
    weights = [tensor(layer.weights) for layer in network.layers]
    loss = torch_loss(network, weights, pictures, labels)
    remember = functools.partial(nb05.checkpointed, segment=segment) if segment else nb05.stored
    assert nb05.gradients_by(remember, network, pictures, labels) == pytest.approx(loss.item())
    assert close(all_gradients(network), torch.autograd.grad(loss, weights))
    twin = nb05.torch_loss(network, weights, torch.tensor(pictures), torch.tensor(labels))
    assert twin.item() == pytest.approx(loss.item())


def test_both_kinds_have_as_many_weights(nb05):
    """Equal but for 64 of 8,384 a block: an ordinary block has one bias less."""
    sizes = []
    for streams in (2, 1):
        network = nb05.Network(nb05.Config(streams=streams), 0)
        sizes.append(sum(layer.weights.size for layer in network.layers))
    assert sizes[0] - sizes[1] == nb05.Config().depth * 64
    assert sizes[0] < 1.01 * sizes[1]


def test_predict(nb05, rng, small):
    network = nb05.Network(small, 0, np.float64)
    pictures, labels = picture_batch(rng, 4)
    loss, _ = nb05.cross_entropy(network.predict(pictures), labels)
    assert nb05.gradients_by(nb05.stored, network, pictures, labels) == pytest.approx(loss)
    expected = torch_loss(network, [torch.tensor(layer.weights) for layer in network.layers], pictures, labels)
    assert loss == pytest.approx(expected.item())


def test_an_odd_width_is_refused(nb05):
    with pytest.raises(ValueError, match="width 127 does not part into 2 equal streams"):
        nb05.Network(nb05.Config(width=127), 0)
    nb05.Network(nb05.Config(width=127, streams=1, depth=1), 0)


def test_inputs_that_cannot_be_rebuilt_name_the_block(nb05, rng, small):
    """Block 3 overflows on the way back."""
    network = nb05.Network(small, 0)
    network.blocks[3].functions[1].b2[:] = np.inf
    state, slopes = (list(rng.standard_normal((2, 4, 6)).astype(np.float32)) for _ in range(2))
    with pytest.raises(FloatingPointError, match=r"block 3: inputs not rebuilt, not finite: make gain"):
        nb05.rebuild(network.blocks, state, slopes)


def test_after_is_called_from_the_last_block_to_the_first(nb05, rng, small):
    network, seen = nb05.Network(small, 0), []
    remember = functools.partial(nb05.reversible, after=seen.append)
    nb05.gradients_by(remember, network, *picture_batch(rng, 2))
    assert seen == network.blocks[::-1]


@pytest.mark.parametrize("make", ["Adam", "SGD"])
def test_a_frugal_step_is_the_same_step(nb05, rng, small, make):
    networks = [nb05.Network(small, 0, np.float64) for _ in range(2)]
    networks[0].blocks[2].functions[0].trainable = networks[1].blocks[2].functions[0].trainable = False
    usual, frugal = (getattr(nb05, make)(network.layers, 0.01) for network in networks)
    nb05.share_gradients(networks[1])
    assert len({id(layer.gradients) for layer in networks[1].layers}) == 4  # stem, two functions, head
    for _ in range(4):
        batch = picture_batch(rng, 6)
        losses = nb05.training_step(nb05.stored, networks[0], usual, *batch), nb05.frugal_step(networks[1], frugal, *batch)
        assert losses[0] == pytest.approx(losses[1])
    pairs = zip(networks[0].layers, networks[1].layers, strict=True)
    assert close(*zip(*((a.weights, b.weights) for a, b in pairs), strict=True))


def test_anchors(nb05, rng, small):
    """The gradients are those of rebuilding, and no tape is kept; copies take the place of streams that were rebuilt wrongly."""
    network = nb05.Network(small, 0, np.float64)
    batch = picture_batch(rng, 5)
    nb05.gradients_by(nb05.stored, network, *batch)
    expected = all_gradients(network)
    for every in (1, 2, 5, 9):
        network = nb05.Network(small, 0, np.float64)
        nb05.gradients_by(functools.partial(nb05.anchored, every=every), network, *batch)
        assert close(all_gradients(network), expected)
        assert not any(isinstance(name, tuple) for name, *_ in network.buffers.arrays)  # no tape
    steep = nb05.Network(nb05.scaled_config(replace(small, depth=40), 1.0), 0)
    batch = batch[0].astype(np.float32), batch[1]
    angles = [nb05.angle_to_exact(functools.partial(nb05.anchored, every=every), steep, *batch) for every in (40, 2)]
    assert angles[1] < 0.01 * angles[0]


# --- data and training


def toy_data(rng, count=300):
    """Ten classes that a network can tell apart."""
    labels = rng.integers(10, size=count)
    pictures = rng.integers(0, 60, size=(count, 784)).astype(np.uint8)
    for row, label in zip(pictures, labels, strict=True):
        row[70 * label : 70 * label + 70] = 200
    return dict.fromkeys(("train", "validation", "test"), (pictures, labels))


def test_sets_are_split(nb05):
    sets, full = nb05.load_sets("MNIST"), nb05.load_images("MNIST")
    images, labels = full["train"]
    kept = len(labels) * 5 // 6
    assert sets["train"][0].shape == (kept, 784)
    assert np.array_equal(np.concatenate([sets["train"][1], sets["validation"][1]]), labels.numpy())
    assert np.array_equal(sets["validation"][0][0], images[kept].flatten().numpy())
    assert np.array_equal(sets["test"][1], full["test"][1].numpy())
    assert sets["train"][0].dtype == np.uint8
    assert [len(part[1]) for part in nb05.load_sets("FashionMNIST", 60).values()] == [50, 60, 10]


def test_scaled(nb05):
    values = nb05.scaled(np.array([0, 255], np.uint8))
    assert values.dtype == np.float32
    assert values.tolist() == pytest.approx([-0.2 / 0.33, 0.8 / 0.33])


@pytest.mark.parametrize("streams", [1, 2])
def test_training_learns(nb05, rng, streams):
    config = nb05.Config(streams=streams, depth=3, width=16, hidden=8, batch_size=32, epochs=3, learning_rate=1e-2)
    remember = nb05.reversible if streams == 2 else nb05.stored
    data = toy_data(rng)
    log, network = nb05.train(config, data, 0, remember)
    assert log["step"] == [1, 2, 3]
    assert log["loss"][0] > log["loss"][-1]
    assert log["validation accuracy"][-1] > 90
    assert nb05.accuracy(network, *data["test"], batch_size=7) == pytest.approx(log["validation accuracy"][-1] / 100)
    again, right = nb05.trained(config, data, 0, remember)
    assert again == log
    assert right == pytest.approx(log["validation accuracy"][-1])
    assert nb05.train(config, data, 1, remember)[0] != log


def test_rebuilt_and_stored_train_alike(nb05, rng):
    config = nb05.Config(depth=3, width=16, hidden=8, batch_size=32, epochs=2)
    data = toy_data(rng)
    logs = [nb05.train(config, data, 0, remember)[0] for remember in (nb05.stored, nb05.reversible)]
    assert logs[0]["loss"] == pytest.approx(logs[1]["loss"], rel=1e-3)


def test_the_rate_is_warmed_up_and_led_to_zero(nb05, rng, monkeypatch):
    rates = []
    monkeypatch.setitem(
        nb05.train.__globals__, "training_step", lambda remember, network, optimiser, *batch: rates.append(step(optimiser)) or 0
    )

    def step(optimiser):
        optimiser.count += 1
        return optimiser.rate

    config = nb05.Config(depth=1, width=2, hidden=1, batch_size=1, epochs=1, learning_rate=0.5)
    nb05.train(config, toy_data(rng), 0, nb05.stored)
    assert rates[:3] == pytest.approx([0.005, 0.01, 0.015])
    assert max(rates) == pytest.approx(0.5 * (1 - 75 / 300), abs=0.02)
    assert rates[-1] == pytest.approx(0.5 / 300)


# --- memory


def test_the_segments_keep_least(nb05):
    """Starts of depth / k segments, and a tape of four streams for each of k blocks."""
    kept = lambda depth, k: math.ceil(depth / k) - 1 + 2 * k
    for depth in (1, 2, 8, 32, 128):
        (segment,) = [way[1] for way in nb05.four_ways(depth) if way[0] == "checkpoints"]
        assert kept(depth, segment) == min(kept(depth, k) for k in range(1, depth + 1))


def test_memory_of_the_ways(nb05):
    """A tape holds four streams a block; reversible activations do not grow; checkpoints and micro-batches lie between."""
    batch, unit = 256, 256 * 64 * 4 / 2**20
    found = {}
    for way in ("stored", "reversible", "checkpoints", "micro-batches"):
        number = {"checkpoints": 4, "micro-batches": 4}.get(way)
        for depth in (8, 32, 128):
            config = nb05.Config(depth=depth)
            found[way, depth] = nb05.memory_of_step(config, batch, nb05.step_by(way, number))["activations"]
    assert found["stored", 32] - found["stored", 8] == pytest.approx(24 * 4 * unit, rel=0.03)
    assert found["reversible", 32] < 1.05 * found["reversible", 8]
    assert found["checkpoints", 128] - found["checkpoints", 32] == pytest.approx(24 * 2 * unit, rel=0.1)
    assert found["micro-batches", 32] - found["micro-batches", 8] == pytest.approx(24 * unit, rel=0.1)


def test_parts_of_the_memory(nb05):
    config = nb05.Config(depth=8)
    facts = nb05.memory_of_step(config, 64, nb05.step_by("reversible"))
    weights = sum(layer.weights.size for layer in nb05.Network(config, 0).layers) * 4 / 2**20
    assert facts["weights"] == facts["gradients"] == facts["moments"] / 2 == pytest.approx(weights)
    assert facts["batch"] == (64 * 784 * 4 + 64 * 8) / 2**20
    assert facts["peak"] == pytest.approx(
        sum(facts[part] for part in ("weights", "gradients", "moments", "batch", "activations")), rel=0.02
    )
    frugal = nb05.memory_of_step(config, 64, nb05.frugal_step, nb05.share_gradients, nb05.SGD)
    assert frugal["moments"] == 0
    assert frugal["gradients"] < facts["gradients"] - 7 * 2 * 8256 * 4 / 2**20  # of seven of eight blocks


def test_costs(nb05):
    cases = [("stored",), ("checkpoints", 2), ("ordinary",)]
    found = nb05.costs(cases, nb05.Config(depth=6), 32, 2, 1)
    assert list(found) == cases
    assert found["stored",][0] > found["checkpoints", 2][0] > 0
    assert found["ordinary",][0] == pytest.approx(
        nb05.memory_of_step(nb05.Config(depth=6, streams=1), 32, nb05.step_by("stored"))["activations"], rel=0.01
    )
    assert all(len(seconds) == 2 and min(seconds) > 0 for _, seconds in found.values())


@pytest.fixture
def by_value(nb05):
    """A notebook's functions reach another process by value, those of a module by name: here they are to go as from a notebook."""
    register_pickle_by_value(nb05)
    yield nb05
    unregister_pickle_by_value(nb05)


def test_a_process_of_its_own(by_value):
    """What it holds by tracemalloc is what this process counts; the resident set grows by about as much."""
    config = by_value.Config(depth=24)
    there = by_value.in_own_process(config, 1024, by_value.step_by("stored"))
    here = by_value.memory_of_step(config, 1024, by_value.step_by("stored"))
    assert there["activations"] == pytest.approx(here["activations"], rel=0.02)
    if sys.platform == "linux":
        assert there["resident"] == pytest.approx(there["peak"], rel=0.5)
    json.dumps(there)


def test_a_process_that_fails_says_why(by_value):
    with pytest.raises(ValueError, match="width 7 does not part into 2 equal streams"):
        by_value.in_own_process(by_value.Config(width=7), 4, by_value.step_by("stored"))


# --- rebuilding errors


def test_scaled_config(nb05, small):
    assert nb05.scaled_config(small, None) == small
    network = nb05.Network(nb05.scaled_config(replace(small, width=2000, hidden=500, depth=2), 0.3), 0)
    assert network.blocks[0].functions[1].w2.std() * math.sqrt(500) == pytest.approx(0.3, rel=0.01)


def test_errors_of_rebuilding(nb05, small):
    error = lambda depth, scale, dtype: nb05.rebuilding_error(nb05.scaled_config(replace(small, depth=depth), scale), dtype, 0)
    assert error(8, 0.5, np.float64) < 1e-10 < error(8, 0.5, np.float32) < error(8, 0.5, np.float16)
    assert error(4, 0.5, np.float32) < error(32, 0.5, np.float32) < error(32, 1.0, np.float32)
    assert not math.isfinite(error(64, 50.0, np.float32))


def test_angle(nb05):
    assert nb05.angle(np.array([1.0, 0]), np.array([0, 2.0])) == pytest.approx(90)
    assert nb05.angle(np.array([1.0, 0]), np.array([-3.0, 0])) == pytest.approx(180)
    assert nb05.angle(np.array([1.0, 0]), np.array([5.0, 5e-9])) == pytest.approx(math.degrees(1e-9), rel=1e-6)
    assert nb05.angle(np.ones(3), np.ones(3)) == 0


def test_angle_to_the_exact_gradient(nb05, rng, small):
    network = nb05.Network(small, 0)
    batch = rng.standard_normal((8, 784), dtype=np.float32), rng.integers(10, size=8)
    assert 0 < nb05.angle_to_exact(nb05.stored, network, *batch) < 1e-3
    assert 0 < nb05.angle_to_exact(nb05.reversible, network, *batch) < 1e-3
    network.blocks[1].functions[0].b2[:] = np.inf
    with np.errstate(invalid="ignore"):
        assert math.isnan(nb05.angle_to_exact(nb05.reversible, network, *batch))


def test_steep_training(nb05, rng):
    config, data = nb05.Config(depth=2, width=8, hidden=4, batch_size=16), toy_data(rng)
    for remember in (nb05.stored, nb05.reversible):
        found, right = nb05.steep_training(config, data, remember, 6, 2, 0)
        assert 0 <= right <= 100
        assert set(found) == {"reversible", "stored"}
        assert all(len(values) == 4 and max(values) < 0.01 for values in found.values())


def test_a_training_ends_where_inputs_cannot_be_rebuilt(nb05, rng, monkeypatch):
    """What was reached by then is told."""

    def fails(remember, network, optimiser, *batch):
        raise FloatingPointError("block 1")

    monkeypatch.setitem(nb05.steep_training.__globals__, "training_step", fails)
    config = nb05.Config(depth=2, width=8, hidden=4, batch_size=16)
    found, right = nb05.steep_training(config, toy_data(rng), nb05.reversible, 6, 2, 0)
    assert len(found["reversible"]) == 1
    assert 0 <= right <= 100


# --- seeds side by side


def test_side_by_side(nb05):
    assert nb05.side_by_side(lambda x: x**2, range(5)) == [0, 1, 4, 9, 16]


def test_an_error_ends_what_has_not_begun(nb05, monkeypatch):
    check_error_ends_the_rest(nb05, monkeypatch, nb05.side_by_side)


def test_tune_and_train(nb05, rng):
    """The rate is chosen on validation pictures by a seed that is not reported, over half of the epochs."""
    config = nb05.Config(depth=2, width=16, hidden=8, batch_size=32, epochs=3)
    data = toy_data(rng)
    data["test"] = tuple(part[:50] for part in data["test"])
    best, logs, right = nb05.tune_and_train(config, data, nb05.reversible, (1e-6, 1e-2, 1e-5), range(2, 4), None)
    assert best == replace(config, learning_rate=1e-2)
    for seed, log, value in zip((2, 3), logs, right, strict=True):
        assert (log, value) == nb05.trained(best, data, seed, nb05.reversible)
    calls = []
    spy = lambda folder, name, compute, config, data, seed, remember: calls.append((config, seed)) or compute(config, data, seed, remember)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(nb05.tune_and_train.__globals__, "remembered", spy)
        nb05.tune_and_train(config, data, nb05.reversible, (1e-3, 1e-2), range(2, 4), None)
    assert {(c.epochs, seed) for c, seed in calls} == {(2, 102), (3, 2), (3, 3)}


# --- PyTorch


def run_both(nb05, pairs, x, weights):
    """[(outputs, gradients by x and weights) of the Function and of plain modules]."""
    found = []
    for remember in ("reversible", "stored"):
        x1, x2 = x.clone().requires_grad_().chunk(2, 1)
        x1, x2 = x1.detach().requires_grad_(), x2.detach().requires_grad_()
        y1, y2 = x1, x2
        if remember == "reversible":
            y1, y2 = nb05.ReversibleFunction.apply(x1, x2, pairs, *nb05.trainable(itertools.chain(*pairs)))
        else:
            for f, g in pairs:
                y1 = y1 + f(y2)
                y2 = y2 + g(y1)
        loss = (y1 * torch.arange(1, y1.numel() + 1).view_as(y1)).sum() + y2.square().sum()
        found.append(((y1, y2), torch.autograd.grad(loss, [x1, x2, *weights])))
    return found


def check_both(found, tolerance=1e-9):
    (outputs, slopes), (expected_outputs, expected_slopes) = found
    for a, b in zip((*outputs, *slopes), (*expected_outputs, *expected_slopes), strict=True):
        assert torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def linear_pairs(count, dtype=torch.float64):
    make = lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).to(dtype)
    return [(make(), make()) for _ in range(count)]


def test_function_of_torch(nb05):
    pairs = linear_pairs(3)
    weights = [p for pair in pairs for f in pair for p in f.parameters()]
    check_both(run_both(nb05, pairs, torch.randn(5, 8, dtype=torch.float64), weights))


def test_function_of_torch_with_shared_and_frozen_modules(nb05):
    (f, g), (other, _) = linear_pairs(2)
    pairs = [(f, g), (f, other), (g, g)]
    g[0].weight.requires_grad_(False)
    weights = [p for module in (f, g, other) for p in module.parameters() if p.requires_grad]
    check_both(run_both(nb05, pairs, torch.randn(5, 8, dtype=torch.float64), weights))


def test_function_of_torch_in_mixed_precision(nb05):
    """It rebuilds in the precision in which it ran: the gradients differ from stored ones by rounding alone."""
    pairs = linear_pairs(2, torch.float32)
    weights = [p for pair in pairs for f in pair for p in f.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        (_, found), (_, expected) = run_both(nb05, pairs, torch.randn(5, 8), weights)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert (a - b).norm() < 0.02 * b.norm()
    seen = []
    pairs[0][0][0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        run_both(nb05, pairs, torch.randn(5, 8), weights)
    assert seen == [torch.bfloat16] * 3  # forth, rebuilt, stored


def test_function_of_torch_keeps_outputs_alone(nb05):
    kept = []
    for count in (2, 6):
        pairs = linear_pairs(count)
        sizes = {}
        x1, x2 = torch.randn(2, 5, 4, dtype=torch.float64, requires_grad=True)
        pack = lambda t, sizes=sizes: sizes.setdefault(t.data_ptr(), t.nbytes) and t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            nb05.ReversibleFunction.apply(x1, x2, pairs, *nb05.trainable(itertools.chain(*pairs)))
        kept.append(sum(sizes.values()))
    assert kept == [2 * 5 * 4 * 8] * 2


def test_convolutional_network(nb05):
    model = nb05.ConvRevNet(2, 16).double()
    pictures, labels = torch.randn(3, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 2, 3])
    found = nb05.gradients_of(model, pictures, labels)
    model.remember = "stored"
    expected = nb05.gradients_of(model, pictures, labels)
    assert len(found) == len(list(model.parameters()))
    assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-12) for a, b in zip(found, expected, strict=True))
    assert model(pictures).shape == (3, 10)


def test_memory_of_the_convolutional_network(nb05):
    pictures = torch.randn(2, 3, 32, 32)
    kept = {(way, n): nb05.conv_memory(way, n, 16, pictures)[0] for way in ("stored", "reversible") for n in (1, 3)}
    assert kept["reversible", 3] == kept["reversible", 1]
    assert kept["stored", 3] > 2 * kept["stored", 1]


def test_training_the_convolutional_network(nb05):
    images, labels = torch.randint(256, (20, 3, 32, 32), dtype=torch.uint8), torch.randint(10, (20,))
    runs = [nb05.train_conv(way, images, labels, 1, 16, 8, 3, 0) for way in ("stored", "reversible")]
    assert runs[0].shape == (3,)
    assert torch.allclose(*runs, rtol=1e-3)
