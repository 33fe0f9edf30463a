"""Notebook 15 against autograd through one step, explicit sums, brute-force isomorphism, enumeration, and SciPy."""

import functools
import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from torch import nn

THREE = ("none", "skip", "conv3")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


@pytest.fixture
def small(nb15):
    """Settings of a small network with cells of four nodes."""
    return nb15.Config(nodes=4, operations=THREE, width=4, stages=2, batch_size=8, epochs=2)


@pytest.fixture
def data():
    """Pictures of 16 x 16 pixels and labels, {"train", "validation", "test"}."""
    draw = generator(7)
    parts = {}
    for name, count in (("train", 32), ("validation", 12), ("test", 10)):
        x = torch.randint(256, (count, 3, 16, 16), generator=draw).to(torch.uint8)
        parts[name] = (x, torch.randint(10, (count,), generator=draw))
    return parts


# --- mixed operations


def test_mixed_operation_is_the_sum(nb15):
    operations = [nn.Identity(), nn.Conv2d(3, 3, 3, padding=1), nn.MaxPool2d(3, 1, 1), nb15.Zero()]
    x = torch.randn(2, 3, 5, 5)
    mixed, weights = nb15.MixedOp(operations), torch.tensor([0.4, 0.3, 0.2, 0.1])
    expected = 0.4 * x + 0.3 * operations[1](x) + 0.2 * operations[2](x)
    torch.testing.assert_close(mixed(x, weights), expected)
    for k, part in enumerate(operations):
        one_hot = [float(k == n) for n in range(4)]
        torch.testing.assert_close(mixed(x, one_hot), part(x))
        torch.testing.assert_close(mixed(x, torch.tensor(one_hot)), part(x))


def test_mixed_operation_gives_gradients_of_weights(nb15):
    x, weights = torch.randn(2, 3), torch.tensor([0.5, 0.5], requires_grad=True)
    nb15.MixedOp([nn.Identity(), nn.Tanh()])(x, weights).sum().backward()
    torch.testing.assert_close(weights.grad, torch.stack([x.sum(), x.tanh().sum()]))


def test_a_plain_zero_is_not_computed(nb15):
    class Never(nn.Module):
        def forward(self, x):
            raise AssertionError

    mixed = nb15.MixedOp([Never(), nn.Identity()])
    assert torch.equal(mixed(torch.ones(1, 2), [0.0, 1.0]), torch.ones(1, 2))
    with pytest.raises(AssertionError):
        mixed(torch.ones(1, 2), torch.tensor([0.0, 1.0]))


def test_an_operation_that_changes_the_shape(nb15):
    mixed = nb15.MixedOp([nn.Identity(), nn.MaxPool2d(2)])
    with pytest.raises(ValueError, match=r"MaxPool2d changes the shape from \(1, 3, 4, 4\) to \(1, 3, 2, 2\)"):
        mixed(torch.ones(1, 3, 4, 4), [0.5, 0.5])
    with pytest.raises(ValueError, match="3 weights for 2 operations"):
        mixed(torch.ones(1, 3, 4, 4), [0.5, 0.5, 0.5])


def test_toy_search_finds_what_made_the_targets(nb15):
    history = nb15.toy_search(nn.AvgPool1d(3, 1, 1), 60)
    assert history[0].tolist() == pytest.approx([1 / 3] * 3)
    assert history[-1][1] > 0.9
    np.testing.assert_allclose(history.sum(1), 1, atol=1e-6)


# --- cells


def test_edges_are_nas_bench_201s(nb15):
    assert nb15.edges_of(4) == [(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)]
    assert [nb15.nodes_of(range(n)) for n in (1, 3, 6, 10)] == [2, 3, 4, 5]
    for n in (0, 2, 4, 5, 7):
        with pytest.raises(ValueError, match=f"{n} edges make no dense graph"):
            nb15.nodes_of(range(n))


def reachable(genotype, edges):
    """Edges on a path from 0 to the last node, by walking all paths."""
    last = max(j for _, j in edges)
    alive = set()

    def walk(node, path):
        if node == last:
            alive.update(path)
        for (i, j), name in zip(edges, genotype, strict=True):
            if i == node and name != "none":
                walk(j, [*path, (i, j)])

    walk(0, [])
    return alive


def test_live_edges_by_walking_all_paths(nb15):
    for genotype in itertools.product(THREE, repeat=6):
        found = nb15.live_edges(genotype)
        assert set(found) == reachable(genotype, nb15.edges_of(4))
        assert all(genotype[nb15.edges_of(4).index(e)] == name for e, name in found.items())


def test_cell_by_its_graph(nb15):
    """Every edge a convolution, summed by hand in the order of the genotype."""
    torch.manual_seed(1)
    cell, x = nb15.Cell(3, ("conv3",) * 6).eval(), torch.randn(2, 3, 5, 5)
    part = lambda i, j: cell.parts[f"{i}-{j}"]
    one = part(0, 1)(x)
    two = part(0, 2)(x) + part(1, 2)(one)
    torch.testing.assert_close(cell(x), part(0, 3)(x) + part(1, 3)(one) + part(2, 3)(two))


def test_every_genotype_is_valid_or_said_to_be_zero(nb15):
    x = torch.randn(2, 2, 4, 4)
    for genotype in itertools.product(THREE, repeat=6):
        if reachable(genotype, nb15.edges_of(4)):
            assert nb15.Cell(2, genotype).eval()(x).shape == x.shape
        else:
            with pytest.raises(ValueError, match="disconnects the output"):
                nb15.Cell(2, genotype)


def test_searched_cell_with_one_hot_weights_is_the_cell(nb15):
    torch.manual_seed(2)
    searched, x = nb15.Cell(3, None, 4, THREE), torch.randn(4, 3, 5, 5)
    for genotype in (("conv3", "none", "skip", "none", "conv3", "conv3"), ("skip",) * 6, nb15.residual(4)):
        values = {0: x, 1: 0, 2: 0, 3: 0}
        for (i, j), name in zip(nb15.edges_of(4), genotype, strict=True):
            if name != "none":
                values[j] = values[j] + (values[i] if name == "skip" else searched.parts[f"{i}-{j}"].operations[2](values[i]))
        torch.testing.assert_close(searched(x, nb15.one_hot(genotype, THREE)), values[3])
        torch.testing.assert_close(searched(x, torch.tensor(nb15.one_hot(genotype, THREE))), values[3])


def test_an_edge_that_is_dropped_passes_nothing(nb15):
    """Not even the channels that go round the operations."""
    part, x = nb15.partial_edge(2, 4, THREE), torch.randn(2, 4, 5, 5)
    (weights,) = nb15.one_hot(("none",), THREE)
    assert weights == [0, 0, 0]
    assert part(x, weights).abs().max() == 0


def test_mixed_cell_by_a_loop(nb15):
    torch.manual_seed(3)
    searched, x = nb15.Cell(3, None, 3, THREE), torch.randn(2, 3, 4, 4)
    weights = torch.rand(3, 3)
    edge = lambda n, e, x: searched.parts[e].operations[1](x) * weights[n, 1] + searched.parts[e].operations[2](x) * weights[n, 2]
    one = edge(0, "0-1", x)
    torch.testing.assert_close(searched(x, weights), edge(1, "0-2", x) + edge(2, "1-2", one))


def test_bad_cells(nb15):
    with pytest.raises(ValueError, match="operation 'conv5' is unknown"):
        nb15.Cell(2, ("conv5", "skip", "skip"))
    with pytest.raises(ValueError, match="operation 'conv5' is unknown"):
        nb15.Cell(2, None, 3, ("skip", "conv5"))
    with pytest.raises(ValueError, match=r"\('none', 'none', 'conv3'\) disconnects the output"):
        nb15.Cell(2, ("none", "none", "conv3"))
    with pytest.raises(ValueError, match="2 edges make no dense graph"):
        nb15.Cell(2, ("skip", "skip"))


def test_norms_of_a_search_have_no_weights_and_no_memory(nb15):
    searched = [part for part in nb15.Cell(2, None, 4, THREE).modules() if isinstance(part, nn.BatchNorm2d)]
    fixed = [part for part in nb15.Cell(2, ("conv3",) * 3).modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(searched) == 6
    assert len(fixed) == 3
    assert not any(part.affine or part.track_running_stats for part in searched)
    assert all(part.affine and part.track_running_stats for part in fixed)


def test_average_pooling_does_not_count_padding(nb15):
    assert torch.equal(nb15.operation("avg3", 2)(torch.ones(1, 2, 4, 4)), torch.ones(1, 2, 4, 4))


# --- which cells are distinct


def graph(genotype, edges):
    """(names of the convolutions, matrix of path counts): rows input and convolutions, columns convolutions and output."""
    alive = [(e, name) for e, name in zip(edges, genotype, strict=True) if e in reachable(genotype, edges)]
    vertices = [e for e, name in alive if name != "skip"]

    def ways(start, end):
        """Number of paths of skips."""
        return int(start == end) + sum(ways(j, end) for (i, j), name in alive if name == "skip" and i == start)

    sources, last = [0, *[j for _, j in vertices]], max(j for _, j in edges)
    matrix = np.array([[ways(s, t) for t in [*[i for i, _ in vertices], last]] for s in sources])
    return [dict(alive)[e] for e in vertices], matrix


def isomorphic(first, second):
    """Whether a renaming of the vertices turns one graph into the other, by trying all."""
    (names, a), (others, b) = first, second
    if sorted(names) != sorted(others):
        return False
    for order in itertools.permutations(range(len(names))):
        rows, columns = [0, *[n + 1 for n in order]], [*order, len(order)]
        if [others[n] for n in order] == names and np.array_equal(b[np.ix_(rows, columns)], a):
            return True
    return False


@pytest.mark.parametrize(("operations", "zero", "distinct"), [(THREE, 5, 8), (("none", "skip", "conv3", "avg3"), 7, 25)])
def test_distinct_cells_of_three_nodes_by_brute_force(nb15, operations, zero, distinct):
    edges, classes = nb15.edges_of(3), []
    for genotype in itertools.product(operations, repeat=3):
        if not reachable(genotype, edges):
            continue
        found = graph(genotype, edges)
        same = [part for part in classes if isomorphic(part[0], found)]
        (same[0] if same else classes.append([found]) or classes[-1]).append(genotype)
    ours = nb15.distinct_cells(3, operations)
    assert len(ours.pop("")) == zero
    assert sorted(tuple(part[1:]) for part in classes) == sorted(tuple(part) for part in ours.values())
    assert len(ours) == distinct


def test_the_space_has_98_distinct_cells_by_brute_force(nb15):
    ours = nb15.distinct_cells(4, THREE)
    assert len(ours.pop("")) == 67
    assert len(ours) == 98
    edges = nb15.edges_of(4)
    graphs = {key: [graph(g, edges) for g in part] for key, part in ours.items()}
    for part in graphs.values():
        assert all(isomorphic(part[0], other) for other in part[1:])
    firsts = [part[0] for part in graphs.values()]
    assert not any(isomorphic(a, b) for a, b in itertools.combinations(firsts, 2))


def test_equal_cells_compute_the_same_and_others_do_not(nb15):
    left, right = ("conv3", "none", "skip", "none", "none", "conv3"), ("none", "conv3", "none", "none", "none", "conv3")
    chain, shared = nb15.Cell(2, left).eval(), nb15.Cell(2, right).eval()
    for a, b in (("0-1", "0-2"), ("2-3", "2-3")):
        shared.parts[b].load_state_dict(chain.parts[a].state_dict())
    x = torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(chain(x), shared(x))
    assert nb15.canonical(left) == nb15.canonical(right)
    twice = ("skip", "none", "skip", "skip", "none", "skip")  # x + x
    assert nb15.canonical(twice) != nb15.canonical(("none", "none", "none", "skip", "none", "none"))


def test_residual_cell(nb15):
    assert nb15.residual(4) == ("conv3", "none", "conv3", "skip", "none", "skip")
    assert nb15.residual(3) == ("conv3", "skip", "conv3")


# --- the hypergradient


def bilevel(seed=0):
    """A quadratic inner loss with mixed terms, an outer loss of both; (train, val, weights, alphas)."""
    H = normal(5, 5, seed=seed)
    H, A, b = H @ H.T / 5 + torch.eye(5), normal(5, 4, seed=seed + 1), normal(5, seed=seed + 2)
    w = [part.clone().requires_grad_() for part in normal(5, seed=seed + 3).split([2, 3])]
    a = [part.clone().requires_grad_() for part in normal(4, seed=seed + 4).split([1, 3])]

    def inner(w, a):
        rest = torch.cat(w) - A @ torch.cat(a)
        return rest @ H @ rest / 2

    def outer(w, a):
        return (torch.cat(w) - b).square().sum() / 2 + 0.3 * torch.cat(a).square().sum() + torch.cat(w)[:4] @ torch.cat(a)

    return inner, outer, w, a, (H, A, b)


@pytest.mark.parametrize("xi", [0.0, 0.05, 0.3])
def test_hypergradient_is_autograds_through_one_step(nb15, xi):
    inner, outer, w, a, _ = bilevel()
    slopes = torch.autograd.grad(inner(w, a), w, create_graph=True)
    exact = torch.autograd.grad(outer([x - xi * s for x, s in zip(w, slopes, strict=True)], a), a)
    before = [part.detach().clone() for part in (*w, *a)]
    found = nb15.hypergradient(lambda: inner(w, a), lambda: outer(w, a), w, a, xi)
    assert isinstance(found, list)
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-8, rtol=1e-8)
    assert all(torch.equal(x, y) for x, y in zip((*w, *a), before, strict=True))
    assert all(part.requires_grad and part.grad is None for part in (*w, *a))


def test_hypergradient_of_a_closed_form(nb15):
    _, _, w, a, (H, A, b) = bilevel(3)
    w, a, xi = torch.cat(w).detach().requires_grad_(), torch.cat(a).detach().requires_grad_(), 0.2
    inner = lambda: (w - A @ a) @ H @ (w - A @ a) / 2
    outer = lambda: (w - b).square().sum() / 2
    ahead = w - xi * H @ (w - A @ a)
    (found,) = nb15.hypergradient(inner, outer, [w], [a], xi)
    torch.testing.assert_close(found, (xi * A.T @ H @ (ahead - b)).detach())
    (first,) = nb15.hypergradient(inner, outer, [w], [a], 0)
    assert torch.equal(first, torch.zeros_like(a))


def test_hypergradient_of_a_network_with_the_length_of_its_difference(nb15):
    """On a loss that is no quadratic the difference is close to the exact product, and epsilon is a length."""
    torch.manual_seed(0)
    x, y = normal(20, 3), normal(20, seed=1)
    w, a = normal(3, seed=2).requires_grad_(), normal(3, seed=3).requires_grad_()
    train = lambda: ((x @ (w * a).tanh()) - y).square().mean()
    val = lambda: ((x[:7] @ (w * a).sin()) - y[:7]).square().mean()
    slopes = torch.autograd.grad(train(), w, create_graph=True)[0]
    moved = (w - 0.1 * slopes) * a
    exact = torch.autograd.grad((x[:7] @ moved.sin() - y[:7]).square().mean(), a)[0]
    for epsilon, close in ((0.01, 1e-4), (1e-4, 1e-7)):
        (found,) = nb15.hypergradient(train, val, [w], [a], 0.1, epsilon)
        torch.testing.assert_close(found, exact, atol=close, rtol=0)
    (wide,) = nb15.hypergradient(train, val, [w], [a], 0.1, 1.0)
    assert (wide - exact).abs().max() > 1e-4


def test_hypergradient_restores_the_weights_after_an_error(nb15):
    w, a = normal(2).requires_grad_(), normal(2, seed=1).requires_grad_()
    before = w.detach().clone()

    def broken():
        raise KeyError("batch")

    with pytest.raises(KeyError, match="batch"):
        nb15.hypergradient(lambda: (w * a).sum(), broken, [w], [a], 0.1)
    assert torch.equal(w, before)


def test_hypergradient_where_weights_do_not_matter(nb15):
    w, a = normal(2).requires_grad_(), normal(2, seed=1).requires_grad_()
    (found,) = nb15.hypergradient(lambda: (w * a).sum(), lambda: a.square().sum(), [w], [a], 0.1)
    torch.testing.assert_close(found, 2 * a.detach())


@pytest.mark.parametrize(("xi", "epsilon"), [(-0.1, 0.01), (0.1, 0.0), (math.nan, 0.01), (0.1, -1.0)])
def test_hypergradient_of_bad_sizes(nb15, xi, epsilon):
    with pytest.raises(ValueError, match=f"xi is {xi}, epsilon {epsilon}"):
        nb15.hypergradient(None, None, [], [], xi, epsilon)


def test_paths_of_the_papers_example(nb15):
    assert nb15.path(0.0)[-1] == pytest.approx([2, 2], abs=1e-2)
    assert nb15.path(0.5)[-1] == pytest.approx([1, 1], abs=1e-2)
    assert nb15.path(0.5)[0].tolist() == [2, -2]


# --- discretisation


def test_discretise_by_hand(nb15):
    alphas = torch.tensor([[5.0, 1, 0], [0, 0, 3], [0, 2, 0], [0, 0, 1], [0, 4, 0], [0, 0, 2]])
    cut = functools.partial(nb15.discretise, alphas, operations=THREE)
    assert cut() == ("skip", "conv3", "skip", "none", "skip", "conv3")
    assert cut(1) == ("skip", "conv3", "none", "none", "skip", "none")
    assert cut(3) == ("skip", "conv3", "skip", "conv3", "skip", "conv3")
    assert cut(3, True) == ("none", "conv3", "skip", "conv3", "skip", "conv3")
    assert cut(1, edge_weights=torch.tensor([1.0, 0.1, 1, 1, 0.01, 0.5])) == ("skip", "none", "skip", "conv3", "none", "none")
    assert alphas[0].tolist() == [5, 1, 0]


def test_discretise_ranks_edges_by_the_softmax_with_none(nb15):
    """A large none lowers the weight of what is left on its edge, as in the paper."""
    alphas = torch.tensor([[0.0, 0, 0], [6, 4, 0], [0, 1, 0]])
    assert nb15.discretise(alphas, 1, operations=THREE) == ("skip", "none", "skip")


def test_discretise_ties_and_orders(nb15):
    assert nb15.discretise(torch.zeros(6, 3), operations=THREE) == ("skip", "skip", "skip", "skip", "skip", "none")
    assert nb15.discretise(torch.zeros(6, 3), 3, True, operations=THREE) == ("none",) * 6
    assert nb15.discretise(torch.zeros(3, 2), operations=("conv3", "skip")) == ("conv3",) * 3


def test_discretised_cells_are_connected(nb15):
    for seed in range(200):
        alphas = 3 * torch.randn(6, 3, generator=generator(seed))
        assert nb15.live_edges(nb15.discretise(alphas, 1 + seed % 3, operations=THREE))


@pytest.mark.parametrize(
    ("alphas", "keep", "message"),
    [
        (torch.zeros(6, 4), 2, r"\(6, 4\).*finite ones \(edges, 3\)"),
        (torch.full((6, 3), math.nan), 2, "finite"),
        (torch.zeros(6, 3), 0, "keep is 0"),
        (torch.zeros(6), 2, r"alphas are \(6,\)"),
        (torch.zeros(5, 3), 2, "5 edges make no dense graph"),
    ],
)
def test_discretise_of_bad_alphas(nb15, alphas, keep, message):
    with pytest.raises(ValueError, match=message):
        nb15.discretise(alphas, keep, operations=THREE)


# --- random search and evolution


SPACE = (THREE,) * 6


def value(genotype):
    """A smooth table with its optimum at all convolutions."""
    return sum(THREE.index(name) for name in genotype)


def test_random_search_finds_the_optimum_and_draws_evenly(nb15):
    asked = []
    history = nb15.random_search(SPACE, lambda g: asked.append(g) or value(g), 5000, np.random.default_rng(0))
    assert [genotype for genotype, _ in history] == asked
    assert max(value for _, value in history) == 12
    assert all(found == value(genotype) for genotype, found in history)
    for edge in range(6):
        shares = [np.mean([genotype[edge] == name for genotype in asked]) for name in THREE]
        assert shares == pytest.approx([1 / 3] * 3, abs=0.03)
    again = nb15.random_search(SPACE, value, 20, np.random.default_rng(0))
    assert again == history[:20]


def test_evolution_finds_the_optimum(nb15):
    for seed in range(5):
        history = nb15.regularised_evolution(SPACE, value, 10, 4, 200, np.random.default_rng(seed))
        assert len(history) == 200
        assert max(found for _, found in history) == 12


class Recorded:
    """A generator of NumPy that keeps what it drew."""

    def __init__(self, seed):
        self.rng, self.drawn = np.random.default_rng(seed), []

    def integers(self, high, size=None):
        found = self.rng.integers(high, size=size)
        if size is not None:
            self.drawn.append((high, found.tolist()))
        return found


def test_parents_are_the_best_of_a_sample_of_the_living(nb15):
    rng, population = Recorded(3), 5
    history = nb15.regularised_evolution(SPACE, value, population, 2, 40, rng)
    assert len(rng.drawn) == 35
    for n, (high, drawn) in enumerate(rng.drawn):
        assert high == population
        living = history[n : n + population]  # the oldest has died n times
        parent = max((living[k] for k in drawn), key=lambda member: member[1])[0]
        child = history[n + population][0]
        assert sum(a != b for a, b in zip(parent, child, strict=True)) == 1


def test_mutations_reach_every_neighbour(nb15):
    space = (("skip",), THREE, ("none", "conv3"))
    start, rng = ("skip", "skip", "none"), np.random.default_rng(0)
    found = {nb15.mutated(start, space, rng) for _ in range(100)}
    assert found == {("skip", "none", "none"), ("skip", "conv3", "none"), ("skip", "skip", "conv3")}


def test_bad_budgets(nb15):
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="the budget is 0"):
        nb15.random_search(SPACE, value, 0, rng)
    with pytest.raises(ValueError, match="the budget 9 is below the population 10"):
        nb15.regularised_evolution(SPACE, value, 10, 2, 9, rng)
    for population, sample in ((0, 1), (3, 0)):
        with pytest.raises(ValueError, match="below 1"):
            nb15.regularised_evolution(SPACE, value, population, sample, 9, rng)


# --- the network and its training


def test_network_by_its_parts(nb15, small, data):
    model = nb15.build(small, ("conv3",) * 6, 0, "cpu").eval()
    x = data["test"][0]
    y = x.float() / 64 - 2
    for part in model.parts:
        y = part(y)
    torch.testing.assert_close(model(x), model.head(F.relu(model.norm(y)).mean((2, 3))))
    assert y.shape == (10, 8, 4, 4)


def test_build_draws_by_its_seed(nb15, small):
    first, again, other = (nb15.build(small, nb15.residual(4), seed, "cpu").state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["parts.0.0.weight"], other["parts.0.0.weight"])
    wide = nb15.build(replace(small, width=64), nb15.residual(4), 0, "cpu").parts[1].parts["0-1"][1].weight
    assert wide.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.02)


@pytest.mark.parametrize("optimiser", ["sgd", "adam"])
def test_training_by_a_loop_of_its_own(nb15, small, data, optimiser):
    config = replace(small, optimiser=optimiser, learning_rate=0.02, weight_decay=0.01)
    log = nb15.train(config, nb15.residual(4), data, 5)
    model, draws = nb15.build(config, nb15.residual(4), 5, "cpu"), generator(5)
    if optimiser == "sgd":
        steps = torch.optim.SGD(model.parameters(), 0.02, 0.9, weight_decay=0.01, nesterov=True)
    else:
        steps = torch.optim.AdamW(model.parameters(), 0.02, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(steps, 8)
    (x, y), losses = data["train"], []
    for _ in range(2):
        order = torch.randperm(32, generator=draws)
        for rows in order.split(8):
            loss = F.cross_entropy(model(x[rows]), y[rows])
            steps.zero_grad()
            loss.backward()
            steps.step()
            schedule.step()
            losses.append(loss.item())
    assert log["loss"] == pytest.approx([np.mean(losses[:4]), np.mean(losses[4:])], abs=1e-4)
    model.eval()
    for name in ("validation", "test"):
        right = (model(data[name][0]).argmax(1) == data[name][1]).float().mean()
        assert log[name] == pytest.approx(100 * right.item(), abs=1e-4)


def test_splits_do_not_overlap(nb15, monkeypatch):
    x = torch.arange(50 * 3 * 32 * 32).reshape(50, 3, 32, 32).remainder(251).to(torch.uint8)
    found = {"train": (x, torch.arange(50)), "test": (x[:20], torch.arange(20))}
    monkeypatch.setitem(nb15.splits.__globals__, "load_images", lambda name: found)
    parts = nb15.splits(45, 10, 15, "cpu")
    assert parts["train"][1].tolist() == list(range(40))
    assert parts["validation"][1].tolist() == list(range(40, 50))
    assert parts["test"][1].tolist() == list(range(15))
    expected = x[3].float().reshape(3, 16, 2, 16, 2).mean((2, 4)).round()
    assert torch.equal(parts["train"][0][3].float(), expected)


def test_multiply_adds_by_counting(nb15, small):
    count = functools.partial(nb15.multiply_adds, small)
    rest = 3 * 9 * 4 * 64 + 4 * 8 * 16 + 8 * 10  # stem, doubling, head
    convolution = 4 * 4 * 9 * 64 + 8 * 8 * 9 * 16
    assert count(("none", "none", "none", "skip", "none", "none")) == rest
    assert count(nb15.residual(4)) == rest + 2 * convolution
    assert count(("conv3",) * 6) == rest + 6 * convolution
    assert count(("conv3", "none", "none", "skip", "none", "none")) == rest


# --- the search


def test_first_order_search_by_a_loop_of_its_own(nb15, small, data):
    check_search(nb15, small, data, 1)


def test_second_order_search_by_a_loop_of_its_own(nb15, small, data):
    check_search(nb15, small, data, 2)


def check_search(nb15, small, data, order):
    way = nb15.Way(order=order, epochs=1, alpha_rate=0.05)
    weights, log = nb15.search(way, small, data, 3, 2)
    model, draws = nb15.build(small, None, 3, "cpu"), generator(3)
    alphas = (1e-3 * torch.randn(6, 3, generator=draws)).requires_grad_()
    torch.randn(6, generator=draws)
    adam = torch.optim.Adam([alphas], 0.05, (0.5, 0.999), weight_decay=1e-3)
    sgd = torch.optim.SGD(model.parameters(), 0.025, 0.9, weight_decay=3e-4)
    x, y = data["train"]
    for step in range(4):
        rate = 0.025 * (1 + math.cos(math.pi * step / 4)) / 2
        first = torch.randperm(16, generator=draws)[:4]
        second = torch.randperm(16, generator=draws)[:4] + 16
        loss = lambda rows: F.cross_entropy(model(x[rows], alphas.softmax(1)), y[rows])
        xi = rate if order == 2 else 0
        (alphas.grad,) = nb15.hypergradient(
            functools.partial(loss, first), functools.partial(loss, second), list(model.parameters()), [alphas], xi
        )
        adam.step()
        slopes = torch.autograd.grad(loss(first), list(model.parameters()))
        for weight, slope in zip(model.parameters(), slopes, strict=True):
            weight.grad = slope
        nn.utils.clip_grad_norm_(model.parameters(), 5.0)
        sgd.param_groups[0]["lr"] = rate
        sgd.step()
    torch.testing.assert_close(log["alphas"][-1], alphas.detach(), atol=1e-4, rtol=1e-3)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)
    assert log["step"] == [2, 4]
    looking = tuple(part[:500] for part in data["validation"])
    cell = nb15.one_hot(nb15.kept_cell(log, small, "paper"), small.operations)
    model.load_state_dict(weights)
    assert log["mixture"][-1] == nb15.accuracy(model, looking, alphas.softmax(1))
    assert log["cell"][-1] == nb15.accuracy(model, looking, cell)


def test_alphas_rest_during_warm_up(nb15, small, data):
    _, log = nb15.search(nb15.Way(epochs=1, warm_up=0.5), small, data, 0, 4)
    first, second, third, last = log["alphas"]
    assert torch.equal(first, second)
    assert first.abs().max() < 0.01
    assert not torch.equal(second, third)
    assert not torch.equal(third, last)


def test_search_looks_at_held_out_pictures_only(nb15, small, data):
    """Accuracy of a search is of the validation pictures, on which neither weights nor alphas learn."""
    other = {**data, "test": (255 - data["test"][0], data["test"][1])}
    runs = [nb15.search(nb15.Way(epochs=1), small, part, 0, 1)[1] for part in (data, other)]
    assert runs[0]["mixture"] == runs[1]["mixture"]
    changed = {**data, "validation": (data["validation"][0], (data["validation"][1] + 1) % 10)}
    log = nb15.search(nb15.Way(epochs=1), small, changed, 0, 1)[1]
    assert torch.equal(log["alphas"][0], runs[0]["alphas"][0])


def test_weights_of_the_ways(nb15):
    alphas, betas = torch.randn(6, 3), torch.randn(6)
    torch.testing.assert_close(nb15.softmax_weights(alphas, betas, 0.5, None), alphas.exp() / alphas.exp().sum(1, keepdim=True))
    weighed = nb15.with_edge_weights(alphas, betas, 0.5, None)
    for node in (1, 2, 3):
        incoming = [n for n, (_, j) in enumerate(nb15.edges_of(4)) if j == node]
        expected = betas[incoming].softmax(0)
        torch.testing.assert_close(weighed[incoming].sum(1), expected)
        torch.testing.assert_close(weighed[incoming], expected[:, None] * alphas[incoming].softmax(1))
    for decay, extra in ((True, 0.75), (False, 1.0)):
        added = nb15.with_skip(1, decay, alphas, betas, 0.25, None) - alphas.softmax(1)
        torch.testing.assert_close(added, extra * torch.tensor([0.0, 1, 0]).expand(6, 3))


def test_random_paths_are_plain_one_hot_and_even(nb15):
    draws = generator(1)
    paths = np.array([nb15.random_path(torch.zeros(6, 3), None, 0, draws) for _ in range(600)])
    assert (paths.sum(2) == 1).all()
    assert paths.mean(0) == pytest.approx(np.full((6, 3), 1 / 3), abs=0.08)
    assert isinstance(nb15.random_path(torch.zeros(6, 3), None, 0, draws)[0][0], float)


def test_partial_channels(nb15):
    torch.manual_seed(0)
    part = nb15.partial_edge(3, 6, ("skip", "conv3"))
    x, weights = torch.randn(3, 6, 5, 5), torch.tensor([0.25, 0.75])
    mixed = 0.25 * x[:, :2] + 0.75 * part.operations[1](x[:, :2])
    found = part(x, weights)
    for channel, expected in enumerate((mixed[:, 0], x[:, 2], x[:, 4], mixed[:, 1], x[:, 3], x[:, 5])):
        torch.testing.assert_close(found[:, channel], expected)
    torch.testing.assert_close(part(x, 0.4 * weights), 0.4 * found)  # an edge weight holds for all channels
    with pytest.raises(ValueError, match="4 channels are not divisible by share 3"):
        nb15.partial_edge(3, 4, THREE)


def test_normed_skip(nb15):
    x = 3 + 2 * torch.randn(8, 2, 6, 6)
    y = nb15.normed_edge(2, THREE)(x, [0, 1, 0])
    torch.testing.assert_close(y.mean((0, 2, 3)), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(y.var((0, 2, 3), correction=0), torch.ones(2), atol=1e-3, rtol=0)


def test_largest_eigenvalue(nb15):
    H = normal(6, 6)
    H = H + H.T
    alphas = normal(2, 3).requires_grad_()
    found = nb15.largest_eigenvalue(alphas.flatten() @ H @ alphas.flatten() / 2 + alphas.sum(), alphas)
    assert found == pytest.approx(torch.linalg.eigvalsh(H)[-1].item())


def test_stopping_look(nb15):
    assert nb15.stopping_look([1.0] * 8) == 7
    assert nb15.stopping_look([1, 1, 1, 1, 1, 2, 2, 2]) == 3  # mean 4/3 at looks 4 to 6, 1 two before
    assert nb15.stopping_look([1, 1, 1, 1, 4, 4]) == 2
    assert nb15.stopping_look([3, 2, 1]) == 2
    assert nb15.stopping_look([3, 2]) == 1


# --- the table, and predictors


def test_best_of_by_enumeration(nb15):
    chosen_by, reported, counts = np.array([2.0, 5.0, 3.0]), np.array([7.0, 1.0, 4.0]), np.array([2, 1, 3])
    members = [0, 0, 1, 2, 2, 2]
    for k in (1, 2, 4):
        draws = list(itertools.product(members, repeat=k))
        values = sorted(reported[max(draw, key=lambda n: chosen_by[n])] for draw in draws)
        mean, low, high = nb15.best_of(k, chosen_by, reported, counts)
        assert mean == pytest.approx(np.mean(values))
        assert low == values[math.ceil(0.05 * len(values)) - 1]
        assert high == values[math.ceil(0.95 * len(values)) - 1]


def table(nb15):
    classes = nb15.distinct_cells(3, THREE)
    logs = {}
    for n, key in enumerate(classes):
        if key:
            logs |= {(n, s): {"validation": 20.0 + n + s, "test": 30.0 + 2 * n - s, "seconds": n + s} for s in (0, 1)}
    return classes, nb15.Truth(classes, logs, (0, 1))


def test_truth_holds_the_table(nb15):
    classes, truth = table(nb15)
    assert truth.counts.sum() == 27
    assert truth.test[:, 0].tolist() == [10, 10]  # the cells of output 0
    assert truth.test[:, 3].tolist() == [36, 35]
    assert truth.validation[:, 3].tolist() == [23, 24]
    assert truth.seconds[:4].tolist() == [0, 1.5, 2.5, 3.5]  # a cell of output 0 costs nothing
    assert truth.best == 45.5
    for n, part in enumerate(classes.values()):
        for genotype in part:
            assert truth.regret(genotype) == pytest.approx(45.5 - (29.5 + 2 * n if n else 10))


def test_random_regret_falls_to_that_of_all_cells(nb15):
    _, truth = table(nb15)
    regrets = [nb15.random_regret(k, truth, truth.counts)[0] for k in (1, 3, 10, 100, 10_000)]
    assert regrets == sorted(regrets, reverse=True)
    assert regrets[-1] == pytest.approx(0, abs=1e-6)
    mean = truth.counts @ truth.test.mean(0) / 27
    assert regrets[0] == pytest.approx(truth.best - mean)
    values = nb15.random_regret(3, truth, truth.counts)
    assert values[1] <= values[0] <= values[2]


def test_random_regret_draws_by_the_counts(nb15):
    _, truth = table(nb15)
    only = np.zeros(9, int)
    only[4] = 5
    expected = truth.best - truth.test[:, 4].mean()
    assert nb15.random_regret(3, truth, only) == pytest.approx((expected, expected, expected))


def test_a_cost_buys_fewer_of_the_dear_and_more_of_the_cheap(nb15):
    _, truth = table(nb15)
    mean = truth.counts @ truth.seconds / 27
    for cheap, dear in ((1, 3), (2, 7)):
        counts = np.zeros(9, int)
        counts[[cheap, dear]] = 1
        k = 2.5 * mean / truth.seconds[[cheap, dear]].mean()
        picked = [nb15.best_of(k, truth.validation[a], truth.test[b], counts)[0] for a, b in ((0, 1), (1, 0))]
        assert nb15.random_regret(2.5, truth, counts)[0] == pytest.approx(truth.best - np.mean(picked))


def test_random_regret_reports_the_other_seed(nb15):
    """Where validation of a seed only knows its own luck, choosing gains nothing."""
    _, truth = table(nb15)
    truth.test = np.array([[0.0] * 8 + [1.0], [1.0] + [0.0] * 8])
    truth.validation, truth.best = truth.test.copy(), 1.0
    assert nb15.random_regret(10_000, truth, truth.counts)[0] == pytest.approx(1.0)


def test_rank_correlations_are_scipys(nb15):
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    b[3] = b[7] = a[2] = a[9]
    found = nb15.rank_correlations(a, b)
    ranks = [scipy.stats.rankdata(part) for part in (a, b)]
    assert found["Spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])
    signs = [np.sign(np.subtract.outer(part, part)) for part in (a, b)]
    tau = (signs[0] * signs[1]).sum() / math.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
    assert found["Kendall"] == pytest.approx(tau)
    assert math.isnan(nb15.rank_correlations([1, 1], [1, 2])["Spearman"])


def test_kept_cells_of_a_log(nb15, small):
    alphas = torch.tensor([[9.0, 1, 0], [0, 0, 3], [0, 2, 0], [0, 0, 1], [0, 4, 0], [0, 0, 2]])
    log = {"alphas": [torch.zeros(6, 3), alphas], "edge_weights": [torch.ones(6), torch.ones(6)]}
    assert nb15.kept_cell(log, small, "paper") == nb15.discretise(alphas, 2, operations=THREE)
    assert nb15.kept_cell(log, small, "all edges") == nb15.discretise(alphas, 3, True, operations=THREE)
    assert nb15.kept_cell(log, small, "paper", 0)[0] == "skip"
    log["edge_weights"][1] = torch.tensor([1.0, 1, 1, 9, 1, 9])
    assert nb15.kept_cell(log, small, "paper")[3] == "conv3"


def test_one_shot_scores_are_those_of_single_cells(nb15, small, data):
    weights, _ = nb15.search(nb15.Way(epochs=1), small, data, 0, 1)
    genotypes = [nb15.residual(4), ("skip",) * 6]
    found = nb15.one_shot_scores(weights, nb15.Way(), small, genotypes, data["validation"])
    model = nb15.build(small, None, 0, "cpu")
    model.load_state_dict(weights)
    x, y = data["validation"]
    for genotype, score in zip(genotypes, found, strict=True):
        right = model(x, torch.tensor(nb15.one_hot(genotype, THREE))).argmax(1) == y
        assert score == pytest.approx(100 * right.float().mean().item(), abs=1e-4)


def test_synflow_by_products_of_weights(nb15, small):
    """Without convolutions in the cell the network is linear: every layer's sum is the output at absolute weights."""
    config = replace(small, stages=1)
    genotype = ("none", "none", "none", "skip", "none", "none")
    model = nb15.build(config, genotype, 4, "cpu").double()
    stem, head = model.parts[0][0].weight.abs(), model.head.weight.abs()
    y = F.conv2d(torch.ones(1, 3, 16, 16, dtype=torch.float64), stem, None, 2, 1).mean((2, 3))
    total = (y @ head.T).sum().item()
    assert nb15.synflow(config, genotype, 4) == pytest.approx(math.log(2 * total))


def test_gradient_norm(nb15, small, data):
    model = nb15.build(small, nb15.residual(4), 1, "cpu")
    F.cross_entropy(model(data["train"][0]), data["train"][1]).backward()
    expected = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm().item()
    assert nb15.gradient_norm(small, nb15.residual(4), 1, data["train"]) == pytest.approx(expected, rel=1e-4)


def test_as_large_is_the_nearest_width(nb15, small):
    found = nb15.as_large(small, nb15.residual(4), nb15.multiply_adds(small, ("conv3",) * 6))
    wanted = nb15.multiply_adds(small, ("conv3",) * 6)
    distance = lambda width: abs(nb15.multiply_adds(replace(small, width=width), nb15.residual(4)) - wanted)
    assert distance(found.width) == min(map(distance, range(2, 12)))
    assert found.width > small.width


def test_saved_bytes(nb15):
    w = torch.ones(100, requires_grad=True)
    assert nb15.saved_bytes(lambda: w.exp().sum()) == 400
    assert nb15.saved_bytes(lambda: (w * w).sum()) == 400  # one storage, saved twice
