"""Notebook 01 against independent implementations: NumPy's solver, scikit-learn's Ridge, SciPy's minimisers and conjugate gradients."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from sklearn.linear_model import Ridge
from torch import nn

from tools import lift

MEASURE = lift.block("measure")
double = torch.float64


def layer(N=20, n=7, m=5, bias=True):
    """Random x (N, n), grad_z (N, m), weight (m, n), bias (m,) or None in float64."""
    x, grad_z, weight, shift = (torch.randn(*shape, dtype=double) for shape in ((N, n), (N, m), (m, n), (m,)))
    return x, grad_z, weight, shift if bias else None


def with_ones(x, bias):
    """A as a NumPy array."""
    return x.numpy() if bias is None else np.hstack([x.numpy(), np.ones((len(x), 1))])


def columns(grads):
    """(grad_weight, grad_bias) as a NumPy array (k, m)."""
    weight, bias = grads
    return weight.numpy().T if bias is None else np.vstack([weight.numpy().T, bias.numpy()])


def relative(value, reference):
    return np.linalg.norm(value - reference) / np.linalg.norm(reference)


# --- implicit and explicit steps


@pytest.mark.parametrize("tau", [1e-3, 0.3, 20.0])
def test_implicit_step_minimises(nb01, tau):
    root = torch.randn(3, 3, dtype=double)
    hessian, w = root @ root.T + 0.1 * torch.eye(3), torch.randn(3, dtype=double)

    def objective(v):
        v = torch.from_numpy(v)
        return (v @ hessian @ v / 2 + (v - w).square().sum() / (2 * tau)).item()

    found = scipy.optimize.minimize(objective, np.zeros(3), options={"gtol": 1e-10}).x
    np.testing.assert_allclose(nb01.implicit_step(w, hessian, tau), found, atol=1e-5)


def test_explicit_step_follows_the_gradient(nb01):
    root, w = torch.randn(3, 3, dtype=double), torch.randn(3, dtype=double, requires_grad=True)
    hessian = root @ root.T
    (gradient,) = torch.autograd.grad(w @ hessian @ w / 2, w)
    torch.testing.assert_close(nb01.explicit_step(w, hessian, 0.2), w - 0.2 * gradient)


def test_path(nb01):
    hessian, w = torch.diag(torch.tensor([1.0, 3.0], dtype=double)), torch.tensor([1.0, 1.0], dtype=double)
    points = nb01.path_of(nb01.explicit_step, w, hessian, 0.5, 3)
    torch.testing.assert_close(points, torch.tensor([[0.5**i, (-0.5) ** i] for i in range(4)], dtype=double))
    points = nb01.path_of(nb01.implicit_step, w, hessian, 0.5, 3)
    torch.testing.assert_close(points, torch.tensor([[1.5**-i, 2.5**-i] for i in range(4)], dtype=double))


# --- the step of a layer


SIZES = [(20, 7), (8, 7), (7, 7), (6, 7), (3, 7), (1, 7), (2, 1), (1, 1)]  # around k = n + 1 = 8, where the system changes


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("N", "n"), SIZES)
@pytest.mark.parametrize("tau", [1e-4, 0.05, 1.0, 300.0])
def test_exact_against_numpy(nb01, N, n, bias, tau):
    x, grad_z, weight, shift = layer(N, n, bias=bias)
    a = with_ones(x, shift)
    expected = np.linalg.solve(a.T @ a + np.eye(a.shape[1]) / tau, a.T @ grad_z.numpy())
    grads = nb01.proximal_gradient(x, grad_z, weight, shift, tau)
    np.testing.assert_allclose(columns(grads), expected, rtol=1e-10, atol=1e-10)
    assert grads[0].shape == weight.shape
    assert grads[1] is None if shift is None else grads[1].shape == shift.shape


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("N", [20, 4, 1])
def test_exact_against_ridge(nb01, N, bias):
    """Ridge regression of the shifted targets shrinks towards zero, so it finds the change of the weights."""
    x, grad_z, weight, shift = layer(N, bias=bias)
    a, old = with_ones(x, shift), columns((weight, shift))
    target = a @ old - grad_z.numpy()
    change = Ridge(alpha=1 / 0.3, fit_intercept=False, tol=1e-12).fit(a, target - a @ old).coef_.T
    np.testing.assert_allclose(columns(nb01.proximal_gradient(x, grad_z, weight, shift, 0.3)), -change, atol=1e-10)


@pytest.mark.parametrize("N", [20, 4])
def test_exact_against_a_direct_minimiser(nb01, N):
    x, grad_z, weight, shift = layer(N, n=4, m=2)
    a, old = with_ones(x, shift), columns((weight, shift))
    objective = lambda v: (((a @ (v.reshape(old.shape) - old) + grad_z.numpy()) ** 2).sum() / 2
                           + ((v.reshape(old.shape) - old) ** 2).sum() / (2 * 0.7))  # fmt: skip
    found = scipy.optimize.minimize(objective, old.ravel(), options={"gtol": 1e-9}).x.reshape(old.shape)
    np.testing.assert_allclose(columns(nb01.proximal_gradient(x, grad_z, weight, shift, 0.7)), old - found, atol=1e-5)


@pytest.mark.parametrize(("N", "n"), [(30, 12), (9, 12)])
def test_woodbury_is_the_primal_solution(nb01, N, n):
    a, b = torch.randn(N, n, dtype=double), torch.randn(N, 4, dtype=double)
    primal = nb01.cholesky_solve(a.T @ a, a.T @ b, 0.4)
    dual = a.T @ nb01.cholesky_solve(a @ a.T, b, 0.4)
    torch.testing.assert_close(primal, dual, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(nb01.solve_exact(a, b, 0.4), dual, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(nb01.primal_solve(a[:, :-1], b, 0.4), nb01.solve_exact(nb01.augmented(a[:, :-1], b), b, 0.4))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("N", [30, 9, 1])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_cg_against_scipy(nb01, N, steps, bias):
    """The same iterates, output by output, whichever of the two forms is chosen; started from the old weights."""
    x, grad_z, weight, shift = layer(N, n=12, m=3, bias=bias)
    a, old = with_ones(x, shift), columns((weight, shift))
    matrix = a.T @ a + np.eye(a.shape[1]) / 0.3
    right = a.T @ (a @ old - grad_z.numpy()) + old / 0.3  # what the new weights solve for
    found = [scipy.sparse.linalg.cg(matrix, r, x0=w, rtol=0, maxiter=steps)[0] for r, w in zip(right.T, old.T, strict=True)]
    grads = nb01.proximal_gradient(x, grad_z, weight, shift, 0.3, "cg", steps)
    np.testing.assert_allclose(columns(grads), old - np.stack(found, 1), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("N", [30, 9])
def test_cg_converges_to_exact(nb01, N):
    case = layer(N, n=12)
    exact = columns(nb01.proximal_gradient(*case, 0.3))
    errors = [relative(columns(nb01.proximal_gradient(*case, 0.3, "cg", steps)), exact) for steps in (1, 2, 4, 6, 13)]
    assert all(a > b for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-10
    assert relative(columns(nb01.proximal_gradient(*case, 0.3, "cg", 200)), exact) < 1e-10  # going on does no harm


@pytest.mark.parametrize("N", [30, 9])
def test_cg_takes_three_steps_unless_told(nb01, N):
    case = layer(N, n=12)
    torch.testing.assert_close(nb01.proximal_gradient(*case, 0.3, "cg"), nb01.proximal_gradient(*case, 0.3, "cg", 3), rtol=0, atol=0)


def test_cg_leaves_an_output_without_gradient(nb01):
    for N in (30, 9):
        x, grad_z, weight, bias = layer(N, n=12)
        grad_z[:, 2] = 0
        for steps in (1, 4, 50):
            g, shift = nb01.proximal_gradient(x, grad_z, weight, bias, 0.3, "cg", steps)
            assert g.isfinite().all()
            assert (g[2] == 0).all()
            assert shift[2] == 0
            assert (g[1] != 0).all()


@pytest.mark.parametrize("N", [20, 4])
def test_small_tau_is_the_gradient(nb01, N):
    x, grad_z, weight, bias = layer(N)
    leaves = weight.requires_grad_(), bias.requires_grad_()
    gradient = torch.autograd.grad((F.linear(x, *leaves) * grad_z).sum(), leaves)
    for method in ("exact", "cg"):
        g = nb01.proximal_gradient(x, grad_z, weight, bias, 1e-9, method)
        for a, b in zip(g, gradient, strict=True):
            torch.testing.assert_close(a / 1e-9, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("N", [20, 4])
def test_large_tau_is_least_squares(nb01, N):
    x, grad_z, weight, bias = layer(N)
    expected = np.linalg.pinv(with_ones(x, bias)) @ grad_z.numpy()
    np.testing.assert_allclose(columns(nb01.proximal_gradient(x, grad_z, weight, bias, 1e9)), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["exact", "cg"])
def test_descends_for_every_tau(nb01, method):
    """Along the gradient, and the loss falls for a short enough step."""
    for tau, N, seed in itertools.product((1e-4, 1e-2, 1.0, 1e2, 1e4), (1, 5, 40), range(4)):
        torch.manual_seed(seed)
        x, grad_z, weight, bias = layer(N)
        a = torch.from_numpy(with_ones(x, bias))
        gradient = (a.T @ grad_z).numpy()
        for steps in (1, 3) if method == "cg" else (1,):
            g = columns(nb01.proximal_gradient(x, grad_z, weight, bias, tau, method, steps))
            assert (g * gradient).sum() > 0


def test_step_is_linear_in_the_gradient(nb01):
    """So a loss scaler, or a weighted loss, does what one expects."""
    for N in (20, 4):
        x, grad_z, weight, bias = layer(N)
        for method in ("exact", "cg"):
            one, thousand = (nb01.proximal_gradient(x, scale * grad_z, weight, bias, 0.3, method)[0] for scale in (1, 1024))
            torch.testing.assert_close(1024 * one, thousand, rtol=1e-10, atol=1e-12)


def test_float32_is_close_and_half_comes_back_as_the_weights(nb01):
    for N in (300, 40):
        case = layer(N, n=100)
        exact = nb01.proximal_gradient(*case, 0.05)[0]
        single = nb01.proximal_gradient(*(t.float() for t in case), 0.05)[0]
        assert single.dtype == torch.float32
        assert relative(single.numpy(), exact.numpy()) < 1e-4
        x, grad_z = (t.bfloat16() for t in case[:2])
        mixed = nb01.proximal_gradient(x, grad_z, case[2].float(), case[3].float(), 0.05)[0]
        assert mixed.dtype == torch.float32
        assert relative(mixed.numpy(), exact.numpy()) < 0.05


@pytest.mark.parametrize("method", ["exact", "cg"])
def test_batch_of_none(nb01, method):
    x, grad_z, weight, bias = layer()
    g, shift = nb01.proximal_gradient(x[:0], grad_z[:0], weight, bias, 0.3, method)
    assert (g == 0).all()
    assert (shift == 0).all()


@pytest.mark.parametrize("tau", [0, -1.0, math.nan, math.inf, 1e-39, 1e39])
@pytest.mark.parametrize("make", ["gradient", "linear", "conv"])
def test_bad_tau(nb01, tau, make):
    x, grad_z, weight, bias = layer()
    with pytest.raises(ValueError, match="tau must be positive and finite"):
        {"gradient": lambda: nb01.proximal_gradient(x, grad_z, weight, bias, tau),
         "linear": lambda: nb01.ProxLinear(3, 4, tau=tau), "conv": lambda: nb01.ProxConv2d(3, 4, 3, tau=tau)}[make]()  # fmt: skip


@pytest.mark.parametrize("settings", [("newton", 3), ("cg", 0), ("cg", -1)])
def test_bad_method(nb01, settings):
    message = "unknown; choose one of: exact, cg" if settings[0] == "newton" else "at least one step"
    for call in (lambda: nb01.proximal_gradient(*layer(), 0.1, *settings), lambda: nb01.ProxLinear(3, 4, True, 0.1, *settings),
                 lambda: nb01.ProxConv2d(3, 4, 3, method=settings[0], steps=settings[1])):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_shapes(nb01):
    x, grad_z, weight, bias = layer()
    for wrong in ((x[:3], grad_z, weight, bias), (x[:, :3], grad_z, weight, bias), (x, grad_z[:, :2], weight, bias), (x, grad_z, weight.T, bias),
                  (x[None], grad_z, weight, bias)):  # fmt: skip
        with pytest.raises(ValueError, match="do not fit together"):
            nb01.proximal_gradient(*wrong, 0.1)
    with pytest.raises(ValueError, match=r"bias must be None or of shape \(5,\), not \(3,\)"):
        nb01.proximal_gradient(x, grad_z, weight, bias[:3], 0.1)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["exact", "cg"])
def test_numbers_that_are_not_finite(nb01, bad, method):
    assert issubclass(nb01.Diverged, ValueError)
    for which, message in ((0, "inputs of the layer are not finite"), (1, "gradients that reach the layer are not finite")):
        case = layer()
        case[which][3, 1] = bad
        with pytest.raises(nb01.Diverged, match=message):
            nb01.proximal_gradient(*case, 0.1, method)
    conv = nb01.ProxConv2d(1, 1, 3, method=method).double()
    with pytest.raises(nb01.Diverged, match="not finite: lower the learning rate"):
        conv(torch.randn(2, 1, 5, 5, dtype=double)).backward(torch.full((2, 1, 3, 3), bad, dtype=double))


def test_singular_in_its_precision(nb01):
    x = torch.full((20, 4), 100.0)
    with pytest.raises(ValueError, match=r"not positive definite in torch.float32: the inputs or tau = 1000000000000.0 are too large"):
        nb01.proximal_gradient(x, torch.randn(20, 3), torch.randn(3, 4), None, 1e12)


# --- modules


def twins(nb01, bias=True, **settings):
    """ProxLinear and nn.Linear with the same weights, in float64."""
    ours, theirs = nb01.ProxLinear(7, 5, bias=bias, **settings).double(), nn.Linear(7, 5, bias=bias).double()
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def test_linear_starts_like_pytorchs(nb01):
    torch.manual_seed(3)
    ours = nb01.ProxLinear(7, 5)
    torch.manual_seed(3)
    theirs = nn.Linear(7, 5)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (ours.tau, ours.method, ours.steps) == (0.05, "exact", 3)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(20, 7), (4, 7), (1, 7), (2, 3, 7), (7,)])
@pytest.mark.parametrize("method", ["exact", "cg"])
def test_linear_module(nb01, bias, shape, method):
    """Output and gradient of the inputs as nn.Linear's, gradient of the parameters the proximal one."""
    ours, theirs = twins(nb01, bias, tau=0.4, method=method, steps=2)
    x, grad_z = torch.randn(*shape, dtype=double), torch.randn(*shape[:-1], 5, dtype=double)
    down = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        z = module(leaf)
        z.backward(grad_z)
        down.append((z, leaf.grad))
    torch.testing.assert_close(*down)
    expected = nb01.proximal_gradient(x.reshape(-1, 7), grad_z.reshape(-1, 5), ours.weight.detach(), ours.bias, 0.4, method, 2)
    for p, g in zip(ours.parameters(), expected, strict=False):
        torch.testing.assert_close(p.grad, g)


def test_gradients_pass_down_by_the_old_weights(nb01):
    """Two layers: what reaches the first is the ordinary gradient at its output."""
    x, target = torch.randn(9, 7, dtype=double), torch.randn(9, 5, dtype=double)
    net = nn.Sequential(nb01.ProxLinear(7, 6, tau=0.4), nn.ReLU(), nb01.ProxLinear(6, 5, tau=0.4)).double()
    F.mse_loss(net(x), target).backward()
    z = F.linear(x, net[0].weight, net[0].bias).detach().requires_grad_()
    loss = F.mse_loss(F.linear(F.relu(z), net[2].weight, net[2].bias), target)
    (grad_z,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(net[0].weight.grad, nb01.proximal_gradient(x, grad_z, net[0].weight, net[0].bias, 0.4)[0])


def test_accumulation_over_micro_batches(nb01):
    ours, _ = twins(nb01, tau=0.4)
    x, grad_z = torch.randn(12, 7, dtype=double), torch.randn(12, 5, dtype=double)
    expected = [torch.zeros_like(p) for p in ours.parameters()]
    for part in (slice(0, 3), slice(3, 12)):
        ours(x[part]).backward(grad_z[part])
        for total, g in zip(expected, nb01.proximal_gradient(x[part], grad_z[part], ours.weight, ours.bias, 0.4), strict=True):
            total += g
    for p, total in zip(ours.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, total)


def test_shared_layer(nb01):
    """Used twice in one graph, as in a recurrent network."""
    shared = nb01.ProxLinear(7, 7, tau=0.4).double()
    x, target = torch.randn(9, 7, dtype=double), torch.randn(9, 7, dtype=double)
    first = shared(x)
    middle = torch.tanh(first)
    second = shared(middle)
    loss = F.mse_loss(second, target)
    grads = torch.autograd.grad(loss, (first, second), retain_graph=True)
    loss.backward()
    steps = [nb01.proximal_gradient(a.detach(), g, shared.weight, shared.bias, 0.4) for a, g in zip((x, middle), grads, strict=True)]
    torch.testing.assert_close(shared.weight.grad, steps[0][0] + steps[1][0])
    torch.testing.assert_close(shared.bias.grad, steps[0][1] + steps[1][1])


@pytest.mark.parametrize("make", ["linear", "conv"])
@pytest.mark.parametrize("method", ["exact", "cg"])
def test_frozen_parameters(nb01, make, method):
    """What is frozen takes no part in the step of the rest, and nothing is computed for it."""
    if make == "linear":
        module, x = nb01.ProxLinear(7, 5, tau=0.4, method=method).double(), torch.randn(4, 7, dtype=double)
        rows, grad_z = x, torch.randn(4, 5, dtype=double)
        flat = grad_z
    else:
        module, x = nb01.ProxConv2d(2, 3, 3, tau=0.4, method=method).double(), torch.randn(4, 2, 6, 6, dtype=double)
        grad_z = torch.randn_like(module(x))
        rows, flat, *_ = as_linear(module, x, grad_z)
    x.requires_grad_()
    module.bias.requires_grad_(False)
    module(x).backward(grad_z)
    alone = nb01.proximal_gradient(rows.detach(), flat, module.weight.detach().flatten(1), None, 0.4, method)[0]
    torch.testing.assert_close(module.weight.grad.flatten(1), alone)
    assert module.bias.grad is None
    module.zero_grad()
    module.requires_grad_(False)
    module.bias.requires_grad_(True)
    module(x).backward(grad_z)
    torch.testing.assert_close(module.bias.grad, flat.sum(0) / (len(flat) + 1 / 0.4))  # least squares with a column of ones
    assert module.weight.grad is None
    module.requires_grad_(False)
    x.grad = None
    module(x).backward(grad_z)
    assert x.grad is not None


def test_bias_gradient_minimises(nb01):
    grad_z, bias = torch.randn(6, 3, dtype=double), torch.randn(3, dtype=double)
    expected = nb01.proximal_gradient(torch.zeros(6, 0, dtype=double), grad_z, torch.zeros(3, 0, dtype=double), bias, 0.4)[1]
    torch.testing.assert_close(nb01.bias_gradient(grad_z, 0.4), expected)


@pytest.mark.parametrize("make", ["linear", "conv"])
def test_gradients_keep_no_larger_tensor_alive(nb01, make):
    module, x = (nb01.ProxLinear(7, 5), torch.randn(4, 7)) if make == "linear" else (nb01.ProxConv2d(2, 3, 3), torch.randn(4, 2, 6, 6))
    module(x).sum().backward()
    for p in module.parameters():
        assert p.grad.untyped_storage().nbytes() == 4 * p.numel()


@pytest.mark.parametrize("method", ["exact", "cg"])
def test_under_autocast(nb01, method):
    """Mixed precision around the forward pass, as recommended, or around the backward pass too: the solver stays in float32."""
    ours, _ = twins(nb01, tau=0.4, method=method)
    ours, x, grads = ours.float(), torch.randn(20, 7, requires_grad=True), {}
    for case in ("none", "forward", "both"):
        ours.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=case != "none"):
            loss = ours(x).square().mean()
            if case == "both":
                loss.backward()
        if case != "both":
            loss.backward()
        grads[case] = ours.weight.grad.clone()
    assert grads["both"].dtype == torch.float32
    assert torch.equal(grads["forward"], grads["both"])
    assert relative(grads["both"].numpy(), grads["none"].numpy()) < 0.05
    assert x.grad.isfinite().all()


def test_works_with_any_optimiser(nb01):
    """Also with PyTorch's fused and multi-tensor ones, which are strict about layouts."""
    x, target = torch.randn(64, 7), torch.randn(64, 3)
    for make in (lambda p: torch.optim.SGD(p, 1.0, 0.9, nesterov=True), lambda p: torch.optim.Adam(p, 0.02, fused=True),
                 lambda p: torch.optim.AdamW(p, 0.02, foreach=True)):  # fmt: skip
        torch.manual_seed(0)
        net = nn.Sequential(nb01.ProxLinear(7, 40, tau=1.0), nn.ReLU(), nn.Linear(40, 3))
        optimizer, losses = make(net.parameters()), []
        for _ in range(60):
            losses.append(F.mse_loss(net(x), target))
            losses[-1].backward()
            optimizer.step()
            optimizer.zero_grad()
        assert losses[-1] < 0.9 * losses[0]


GEOMETRY = [(3, 1, 0), (3, 1, 1), ((3, 2), (2, 1), (1, 0)), (5, 2, 2), (1, 1, 0)]


def conv_case(nb01, kernel, stride, padding, bias=True, **settings):
    """A ProxConv2d, its pictures and a gradient at its output, in float64."""
    conv = nb01.ProxConv2d(3, 4, kernel, stride, padding, bias=bias, tau=0.7, **settings).double()
    x = torch.randn(6, 3, 9, 8, dtype=double)
    return conv, x, torch.randn_like(conv(x))


def as_linear(conv, x, grad_z):
    """The layer's patches (N L, n), gradients (N L, m), weight and bias."""
    patches = F.unfold(x, conv.kernel_size, padding=conv.padding, stride=conv.stride).transpose(1, 2).flatten(0, 1)
    return patches, grad_z.flatten(2).transpose(1, 2).flatten(0, 1), conv.weight.detach().flatten(1), conv.bias


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("geometry", GEOMETRY)
@pytest.mark.parametrize(("method", "steps"), [("exact", 3), ("cg", 1), ("cg", 3)])
def test_convolution_is_the_linear_layer_of_its_patches(nb01, geometry, bias, method, steps):
    conv, x, grad_z = conv_case(nb01, *geometry, bias, method=method, steps=steps)
    expected = nb01.proximal_gradient(*as_linear(conv, x, grad_z), 0.7, method, steps)
    x.requires_grad_()
    conv(x).backward(grad_z)
    torch.testing.assert_close(conv.weight.grad, expected[0].view_as(conv.weight), rtol=1e-9, atol=1e-11)
    if bias:
        torch.testing.assert_close(conv.bias.grad, expected[1], rtol=1e-9, atol=1e-11)
    leaf = x.detach().requires_grad_()
    z = F.conv2d(leaf, conv.weight, conv.bias, conv.stride, conv.padding)
    torch.testing.assert_close(conv(x), z)
    torch.testing.assert_close(x.grad, torch.autograd.grad(z, leaf, grad_z)[0])


@pytest.mark.parametrize("chunk", [1, 4, 6, 100])
def test_exact_convolution_in_chunks(nb01, chunk):
    conv, x, grad_z = conv_case(nb01, 3, 1, 1)
    whole, parts = (nb01.conv_exact(x, grad_z, conv.weight, conv.bias, 0.7, conv.stride, conv.padding, c) for c in (6, chunk))
    torch.testing.assert_close(parts, whole)


def test_convolution_with_cg_converges(nb01):
    conv, x, grad_z = conv_case(nb01, 3, 1, 1)
    grads = {}
    for conv.method, conv.steps in (("exact", 1), ("cg", 1), ("cg", 5), ("cg", 60)):
        (grads[conv.method, conv.steps],) = torch.autograd.grad(conv(x), conv.weight, grad_z)
    errors = [relative(grads["cg", steps].numpy(), grads["exact", 1].numpy()) for steps in (1, 5, 60)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-10


def test_convolution_accumulates_and_shares(nb01):
    conv, x, grad_z = conv_case(nb01, 3, 1, 1, method="exact")
    singles = [torch.autograd.grad(conv(x[p]), conv.weight, grad_z[p])[0] for p in (slice(0, 2), slice(2, 6))]
    conv(x[:2]).backward(grad_z[:2])
    conv(x[2:]).backward(grad_z[2:])
    torch.testing.assert_close(conv.weight.grad, sum(singles))
    conv.zero_grad()
    torch.autograd.backward([conv(x[:2]), conv(x[2:])], [grad_z[:2], grad_z[2:]])
    torch.testing.assert_close(conv.weight.grad, sum(singles))


@pytest.mark.parametrize("method", ["exact", "cg"])
def test_convolution_under_autocast(nb01, method):
    conv, x, grad_z = conv_case(nb01, 3, 1, 1, method=method)
    conv, x, grads = conv.float(), x.float().requires_grad_(), {}
    for case in ("none", "forward", "both"):
        conv.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=case != "none"):
            z = conv(x)
            if case == "both":
                z.backward(grad_z.to(z.dtype))
        if case != "both":
            z.backward(grad_z.to(z.dtype))
        grads[case] = conv.weight.grad.clone()
    assert grads["both"].dtype == torch.float32
    assert torch.equal(grads["forward"], grads["both"])
    assert relative(grads["both"].numpy(), grads["none"].numpy()) < 0.05


def test_bad_convolutions(nb01):
    with pytest.raises(ValueError, match="padding must be given in pixels, not 'same'"):
        nb01.ProxConv2d(3, 4, 3, padding="same")
    with pytest.raises(ValueError, match=r"pictures \(N, C, H, W\) are needed, not \(3, 9, 8\)"):
        nb01.ProxConv2d(3, 4, 3)(torch.randn(3, 9, 8))


# --- the course's variant


def course_case(nb01, N=12):
    parameters = [(w.double(), b.double() + 0.2) for w, b in nb01.sigmoid_network((6, 5, 4, 3), 1)]
    return parameters, torch.rand(N, 6, dtype=double), torch.eye(3, dtype=double)[torch.randint(3, (N,))]


def course_targets(parameters, x, t, eta):
    """g_(l-1), f and f* of each layer, example by example, by the equations with explicit Jacobians."""
    sigmoid = lambda f: 1 / (1 + np.exp(-f))
    rows = []
    for a, target in zip(x.numpy(), t.numpy(), strict=True):
        g, f = [a], []
        for w, b in parameters:
            f.append(w.numpy() @ g[-1] + b.numpy())
            g.append(sigmoid(f[-1]))
        wanted, stars = g[-1] - eta * (g[-1] - target), [None] * len(f)
        for i in reversed(range(len(f))):
            jacobian = np.diag(sigmoid(f[i]) * (1 - sigmoid(f[i])))
            stars[i] = f[i] - jacobian @ (g[i + 1] - wanted)
            wanted = g[i] - parameters[i][0].numpy().T @ (f[i] - stars[i])
        rows.append([(g[i], f[i], stars[i]) for i in range(len(f))])
    return [[np.stack(part) for part in zip(*layers, strict=True)] for layers in zip(*rows, strict=True)]


@pytest.mark.parametrize("eta", [0.1, 3.0, 30.0])
@pytest.mark.parametrize("N", [12, 3, 1])
def test_course_step_against_a_direct_minimiser(nb01, eta, N):
    parameters, x, t = course_case(nb01, N)
    new = nb01.course_step(parameters, x, t, eta)
    for (w, b), (w_new, b_new), (a, f, star) in zip(parameters, new, course_targets(parameters, x, t, eta), strict=True):
        w, b = w.numpy(), b.numpy()

        def objective(v, w=w, b=b, a=a, star=star):
            v = v.reshape(w.shape)
            misfit, change = a @ v.T + b - star, v - w
            gradient = misfit.T @ a / len(a) + change / eta
            return (misfit**2).sum() / (2 * len(a)) + (change**2).sum() / (2 * eta), gradient.ravel()

        found = scipy.optimize.minimize(objective, w.ravel(), jac=True, method="BFGS", options={"gtol": 1e-11, "maxiter": 2000}).x
        np.testing.assert_allclose(w_new, found.reshape(w.shape), atol=1e-6)
        np.testing.assert_allclose(b_new, b - (f - star).mean(0), atol=1e-12)


def test_plain_step_is_backpropagation(nb01):
    parameters, x, t = course_case(nb01)
    leaves = [tuple(p.clone().requires_grad_() for p in pair) for pair in parameters]
    loss = (nb01.activations(leaves, x)[-1] - t).square().sum(1).mean() / 2
    grads = iter(torch.autograd.grad(loss, [p for pair in leaves for p in pair]))
    for pair, new in zip(parameters, nb01.course_step(parameters, x, t, 2.5, proximal=False), strict=True):
        for p, p_new in zip(pair, new, strict=True):
            torch.testing.assert_close(p_new, p - 2.5 * next(grads))


@pytest.mark.parametrize("proximal", [True, False])
def test_course_step_does_not_depend_on_the_batch_size(nb01, proximal):
    parameters, x, t = course_case(nb01, 4)
    once = nb01.course_step(parameters, x, t, 5.0, proximal)
    thrice = nb01.course_step(parameters, x.repeat(3, 1), t.repeat(3, 1), 5.0, proximal)
    for a, b in zip(sum(once, ()), sum(thrice, ()), strict=True):
        torch.testing.assert_close(a, b)


def test_course_step_changes_nothing_in_place(nb01):
    parameters, x, t = course_case(nb01)
    before = [p.clone() for pair in parameters for p in pair]
    nb01.course_step(parameters, x, t, 5.0)
    assert all(torch.equal(a, b) for a, b in zip(before, sum(parameters, ()), strict=True))


def test_sigmoid_network(nb01):
    parameters = nb01.sigmoid_network((784, 128, 64, 10), 0)
    assert [tuple(w.shape) for w, _ in parameters] == [(128, 784), (64, 128), (10, 64)]
    for w, b in parameters:
        assert w.std().item() * math.sqrt(w.shape[1]) == pytest.approx(1, abs=0.1)
        assert (b == 0).all()
    x = torch.rand(3, 784)
    g = nb01.activations(parameters, x)
    assert [tuple(a.shape) for a in g] == [(3, 784), (3, 128), (3, 64), (3, 10)]
    torch.testing.assert_close(g[2], torch.sigmoid(g[1] @ parameters[1][0].T + parameters[1][1]))


@pytest.mark.parametrize("eta", [0, -2.0, math.nan])
def test_course_step_needs_a_positive_eta(nb01, eta):
    with pytest.raises(ValueError, match=r"^eta must be positive and finite"):
        nb01.course_step(*course_case(nb01), eta)


# --- data and training


def pictures(nb01, count=200, shape=(3, 16, 16), **options):
    """Pictures whose brightness tells the class."""
    source = np.random.default_rng(0)
    labels = source.integers(0, 10, count).astype(np.uint8)
    images = (25 * labels[:, None, None, None] + source.integers(0, 20, (count, *shape))).astype(np.uint8)
    return nb01.Pictures({"train": (images, labels), "test": (images[:50], labels[:50])}, **options)


def test_splits(nb01):
    data = pictures(nb01, count=207)
    assert [len(x) for x, _ in (data.train, data.validation, data.test)] == [186, 21, 50]
    assert len(pictures(nb01, count=207, **{}).validation[1]) == 21
    small = nb01.Pictures({"train": tuple(t.numpy() for t in data.train), "test": tuple(t.numpy() for t in data.test)}, 30)
    assert [len(x) for x, _ in (small.train, small.validation, small.test)] == [27, 3, 30]
    x = data.floats(data.train[0])
    assert x.dtype == torch.float32
    assert torch.equal(x, data.train[0] / 255)
    centred = data.floats(data.train[0], centre=True)
    torch.testing.assert_close(centred.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(centred.std((0, 2, 3)), x.std((0, 2, 3)))
    assert data.identity != small.identity


def test_networks_are_the_papers(nb01):
    sizes = lambda net: [tuple(p.shape) for p in net.parameters()]
    mlp = nb01.make_network(nb01.Run(widths=(4000, 1000, 4000), method="exact"))
    assert sizes(mlp)[::2] == [(4000, 3072), (1000, 4000), (4000, 1000), (10, 4000)]
    conv = nb01.make_network(nb01.Run(network="convnet", widths=(16, 20, 20), method="cg"))
    assert sizes(conv)[::2] == [(16, 3, 5, 5), (20, 16, 5, 5), (20, 20, 5, 5), (10, 1280)]
    assert [type(m).__name__ for m in conv] == ["ProxConv2d", "ReLU", "MaxPool2d"] * 2 + ["ProxConv2d", "ReLU", "Flatten", "Linear"]
    assert conv(torch.rand(2, 3, 32, 32)).shape == (2, 10)


@pytest.mark.parametrize("network", ["mlp", "convnet"])
def test_only_the_last_layer_is_explicit_and_all_methods_start_alike(nb01, network):
    run, nets = nb01.Run(network=network, widths=(6, 5, 4), tau=0.3, cg_steps=7), {}
    for method in ("explicit", "exact", "cg"):
        torch.manual_seed(0)
        nets[method] = nb01.make_network(replace(run, method=method))
    for method in ("exact", "cg"):
        layers = [module for module in nets[method] if list(module.parameters())]
        assert {type(module).__name__ for module in layers[:-1]} <= {"ProxLinear", "ProxConv2d"}
        assert type(layers[-1]) is nn.Linear
        assert {(module.tau, module.method, module.steps) for module in layers[:-1]} == {(0.3, method, 7)}
        for a, b in zip(nets[method].parameters(), nets["explicit"].parameters(), strict=True):
            assert torch.equal(a, b)
    assert not [m for m in nets["explicit"] if type(m).__name__.startswith("Prox")]


def test_unknown_names(nb01):
    with pytest.raises(ValueError, match="network 'rnn' is unknown; choose one of: mlp, convnet"):
        nb01.make_network(nb01.Run(network="rnn"))
    with pytest.raises(ValueError, match="method 'newton' is unknown; choose one of: exact, cg"):
        nb01.make_network(nb01.Run(method="newton", widths=(4,)))
    with pytest.raises(ValueError, match="optimizer 'lion' is unknown; choose one of: nesterov, adam, muon"):
        nb01.make_optimizers(nn.Linear(2, 2), nb01.Run(optimizer="lion"))


def test_optimisers(nb01):
    net = nb01.make_network(nb01.Run(widths=(6, 5, 4)))
    (sgd,) = nb01.make_optimizers(net, nb01.Run(learning_rate=0.3, momentum=0.8))
    assert {(g["lr"], g["momentum"], g["nesterov"]) for g in sgd.param_groups} == {(0.3, 0.8, True)}
    (sgd,) = nb01.make_optimizers(net, nb01.Run(learning_rate=0.3, tau=0.1, **nb01.TWO_RATES))
    assert [(len(g["params"]), g["lr"]) for g in sgd.param_groups] == [(6, pytest.approx(0.03)), (2, 0.3)]
    (adam,) = nb01.make_optimizers(net, nb01.Run(optimizer="adam", learning_rate=0.01))
    assert (type(adam), adam.defaults["lr"], adam.defaults["eps"]) == (torch.optim.Adam, 0.01, nb01.ADAM_EPSILON)
    muon, rest = nb01.make_optimizers(net, nb01.Run(optimizer="muon", learning_rate=0.01))
    shapes = [[tuple(p.shape) for g in optimizer.param_groups for p in g["params"]] for optimizer in (muon, rest)]
    assert shapes == [[(6, 3072), (5, 6), (4, 5)], [(6,), (5,), (4,), (10, 4), (10,)]]
    assert {(g["lr"], g["momentum"]) for g in muon.param_groups} == {(0.01, 0.95)}
    assert rest.defaults["lr"] == 1e-3
    convnet = nb01.Run(network="convnet", widths=(2, 2), optimizer="muon")
    with pytest.raises(ValueError, match="muon is for the matrices of hidden layers, the convnet has none"):
        nb01.make_optimizers(nb01.make_network(convnet), convnet)


def test_order(nb01):
    assert sorted(nb01.order(50, 1, 2).tolist()) == list(range(50))
    orders = {tuple(nb01.order(50, seed, epoch).tolist()) for seed in range(3) for epoch in range(4)}
    assert len(orders) == 12
    assert torch.equal(nb01.order(50, 1, 2), nb01.order(50, 1, 2))


@pytest.mark.parametrize(("network", "widths"), [("mlp", (60, 30, 60)), ("convnet", (3, 4, 4))])
@pytest.mark.parametrize(("method", "rate"), [("explicit", 0.05), ("exact", 0.3), ("cg", 0.3)])
def test_training_learns(nb01, network, widths, method, rate):
    optimizer, rate = ("nesterov", rate) if network == "mlp" else ("adam", 0.01)
    run = nb01.Run(
        network=network,
        widths=widths,
        method=method,
        optimizer=optimizer,
        learning_rate=rate,
        batch_size=30,
        steps=150,
        centre=network == "mlp",
    )
    model, log = nb01.train(replace(run, momentum=0.9), pictures(nb01), 0, eval_every=50)
    assert log["step"] == [50, 100, 150]
    assert log["loss"][-1] < 0.6 * log["loss"][0]
    assert log["accuracy"][-1] > 0.3
    assert nb01.accuracy(model, pictures(nb01), "validation", run.centre) == log["accuracy"][-1]


def test_training_by_hand(nb01):
    """Three steps, written out: the batches in order, the mean of the losses, both optimisers of Muon."""
    data = pictures(nb01)
    for optimizer in ("nesterov", "muon"):
        run = nb01.Run(widths=(6, 5), method="exact", optimizer=optimizer, learning_rate=0.1, batch_size=80, steps=3)
        model, log = nb01.train(run, data, 4, eval_every=3)
        torch.manual_seed(4)
        net, losses = nb01.make_network(run, (3, 16, 16)), []
        optimizers = nb01.make_optimizers(net, run)
        for epoch, first in ((0, 0), (0, 80), (1, 0)):
            batch = nb01.order(180, 4, epoch)[first : first + 80]
            loss = F.cross_entropy(net(data.train[0][batch] / 255), data.train[1][batch])
            net.zero_grad()
            loss.backward()
            [o.step() for o in optimizers]
            losses.append(loss.item())
        assert log["loss"] == [pytest.approx(np.mean(losses))]
        assert nb01.train(run, data, 4, eval_every=1)[1]["loss"] == pytest.approx(losses)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), net.parameters(), strict=True))


def test_centred_training_differs(nb01):
    run = nb01.Run(widths=(6, 5), batch_size=80, steps=2)
    logs = [nb01.train(replace(run, centre=centre), pictures(nb01), 0)[1] for centre in (True, False)]
    assert logs[0]["loss"] != logs[1]["loss"]


def test_batch_larger_than_the_data(nb01):
    with pytest.raises(ValueError, match="batch_size 500 exceeds the 180 pictures for training: lower it"):
        nb01.train(nb01.Run(widths=(4,)), pictures(nb01), 0)


def test_accuracy(nb01):
    data = pictures(nb01, count=2400)
    right = nn.Module()
    right.forward = lambda x: F.one_hot((x.mean((1, 2, 3)) * 255 // 25).long().clamp(0, 9), 10).float()
    share = ((data.train[0].float().mean((1, 2, 3)) // 25).long().clamp(0, 9) == data.train[1]).float().mean().item()
    assert nb01.accuracy(right, data, "train") == pytest.approx(share)
    assert nb01.accuracy(right, data, "train", centre=True) < share - 0.2  # centred, the pictures are darker
    assert share > 0.9


@pytest.mark.parametrize("proximal", [True, False])
def test_course_training(nb01, proximal):
    data = pictures(nb01, shape=(1, 28, 28), count=1200)
    log = nb01.train_course(data, proximal, 3.0, 20, 4, 0)
    assert log != nb01.train_course(data, not proximal, 3.0, 20, 4, 0)
    assert len(log["accuracy"]) == 4
    assert log["accuracy"][-1] > 0.15
    parameters = nb01.sigmoid_network(nb01.WIDTHS, 0)
    x, t = data.floats(data.train[0]).flatten(1), F.one_hot(data.train[1], 10).float()
    for epoch in range(4):
        for batch in nb01.order(len(x), 0, epoch).split(20):
            parameters = nb01.course_step(parameters, x[batch], t[batch], 3.0, proximal)
    guess = lambda split: nb01.activations(parameters, data.floats(split[0]).flatten(1))[-1].argmax(1)
    assert log["accuracy"][-1] == (guess(data.validation) == data.validation[1]).float().mean().item()
    assert log["test"] == (guess(data.test) == data.test[1]).float().mean().item()


def test_course_training_that_diverges_counts_as_guessing(nb01, monkeypatch):
    data, calls = pictures(nb01, shape=(1, 28, 28), count=200), []
    step = nb01.course_step

    def failing(*arguments):
        calls.append(1)
        if len(calls) > 4:
            raise nb01.Diverged("no")
        return step(*arguments)

    monkeypatch.setattr(nb01, "course_step", failing)
    log = nb01.train_course(data, True, 3.0, 60, 3, 0)  # three batches an epoch: it fails in the second
    assert log["accuracy"][1:] == [0.1, 0.1]
    assert len(log["accuracy"]) == 3
    assert log["test"] == 0.1


# --- measurements


def test_same_step_at_another_batch_size(nb01):
    """tau and rate scaled as in experiment 4: twice the batch, each example twice, gives the same change of the weights."""
    run = nb01.Run(batch_size=10, tau=0.3, learning_rate=0.7)
    double_run = nb01.scaled(run, 20, True)
    assert (double_run.tau, double_run.learning_rate, double_run.batch_size) == (0.15, 1.4, 20)
    assert nb01.scaled(run, 20, False) == replace(run, batch_size=20)
    x, grad_z, weight, bias = layer(10)
    once = nb01.proximal_gradient(x, grad_z / 10, weight, bias, run.tau)[0]
    twice = nb01.proximal_gradient(x.repeat(2, 1), grad_z.repeat(2, 1) / 20, weight, bias, double_run.tau)[0]
    torch.testing.assert_close(run.learning_rate * once, double_run.learning_rate * twice)


def test_formula_of_the_batch_size(nb01):
    """g = (C + I / (tau N))^-1 dL/dW / N."""
    x, grad_z, weight, bias = layer(11, bias=False)
    c = x.T @ x / 11 + torch.eye(7, dtype=double) / (0.3 * 11)
    torch.testing.assert_close(nb01.proximal_gradient(x, grad_z, weight, bias, 0.3)[0], (torch.linalg.solve(c, x.T @ grad_z) / 11).T)


def test_layer_cases(nb01):
    torch.manual_seed(2)
    net = nb01.make_network(nb01.Run(widths=(6, 5), method="exact"), (3, 4, 4)).double()
    x, y = torch.rand(8, 3, 4, 4, dtype=double), torch.randint(10, (8,))
    cases = nb01.layer_cases(net, x, y)
    assert len(cases) == 2
    z1 = F.linear(x.flatten(1), net[1].weight, net[1].bias).detach().requires_grad_()
    h = F.relu(z1)
    z2 = F.linear(h, net[3].weight, net[3].bias)
    loss = F.cross_entropy(F.linear(F.relu(z2), net[5].weight, net[5].bias), y)
    for (inputs, grad, weight, bias), (a, g, module) in zip(
        cases, zip((x.flatten(1), h), torch.autograd.grad(loss, (z1, z2)), (net[1], net[3]), strict=True), strict=True
    ):
        for value, expected in ((inputs, a), (grad, g), (weight, module.weight), (bias, module.bias)):
            torch.testing.assert_close(value, expected.detach())
    assert not net[1]._forward_hooks


def test_errors_and_cosines(nb01):
    case = layer(9, n=12)
    exact = columns(nb01.proximal_gradient(*case, 0.3))
    expected = [relative(columns(nb01.proximal_gradient(*case, 0.3, "cg", k)), exact) for k in (1, 4)]
    assert nb01.cg_errors(case, 0.3, (1, 4)) == pytest.approx(expected)
    a = with_ones(case[0], case[3])
    cosine = lambda p, q: (p * q).sum() / np.linalg.norm(p) / np.linalg.norm(q)
    references = a.T @ case[1].numpy(), np.linalg.pinv(a) @ case[1].numpy()
    assert nb01.cosines(case, 0.3) == pytest.approx([cosine(exact, other) for other in references])
    assert nb01.cosines(case, 1e-8)[0] == pytest.approx(1)
    assert nb01.cosines(case, 1e8)[1] == pytest.approx(1)


def test_training_step(nb01):
    """The step that is timed computes gradients as in training, but leaves the network where it is."""
    data = pictures(nb01)
    for method in ("explicit", "exact", "cg"):
        step = nb01.training_step(nb01.Run(widths=(6, 5), method=method, batch_size=20), data)
        cells = dict(zip(step.__code__.co_freevars, (c.cell_contents for c in step.__closure__), strict=True))
        before = [p.clone() for p in cells["model"].parameters()]
        step()
        assert all(torch.equal(a, b) for a, b in zip(before, cells["model"].parameters(), strict=True))
        assert len(cells["batch"]) == 20
        assert all(p.grad is None for p in cells["model"].parameters())


def test_woodbury_needs_less_memory(nb01):
    x, grad_z, weight, bias = (t.float() for t in layer(20, n=600, m=5))
    ways = [lambda: nb01.primal_solve(x, grad_z, 0.1), lambda: nb01.proximal_gradient(x, grad_z, weight, bias, 0.1)]
    direct, dual = (MEASURE.peak_memory(way, "cpu") for way in ways)
    assert direct > 2 * 4 * 601**2
    assert dual < direct / 5


def test_divergence_is_named(nb01):
    """And counted as chance, not dropped."""
    run = nb01.Run(widths=(20, 10, 20), learning_rate=1e6, batch_size=30, steps=50)
    with pytest.raises(nb01.Diverged, match=r"the loss is (nan|inf|[\d.e+]+) in step \d+: lower learning_rate 1000000.0"):
        nb01.train(run, pictures(nb01), 0)
    for lost in (run, replace(run, method="exact", tau=5.0), replace(run, method="cg", tau=5.0)):  # there the solver notices first
        log = nb01.outcome(lost, pictures(nb01), 0)
        assert log["accuracy"] == [0.1]
        assert log["step"] == [50]
        assert math.isnan(log["loss"][0])
        assert math.isnan(log["end"][0])
        several = nb01.outcome(replace(lost, steps=7), pictures(nb01), 0, points=3)
        calm = nb01.outcome(replace(lost, steps=7, learning_rate=1e-4, tau=0.05), pictures(nb01), 0, points=3)
        assert several["step"] == calm["step"] == [3, 6, 7]  # as long as the log of a run that does not diverge
        assert {len(values) for values in several.values()} == {3}
    with pytest.raises(ValueError, match="batch_size 500 exceeds"):  # a mistake is no divergence
        nb01.outcome(replace(run, batch_size=500), pictures(nb01), 0)
    calm = replace(run, learning_rate=0.01, steps=4)
    assert nb01.outcome(calm, pictures(nb01), 0) == nb01.train(calm, pictures(nb01), 0)[1]


def test_a_loss_that_is_finite_but_huge_is_a_divergence(nb01, monkeypatch):
    run, data = nb01.Run(widths=(6, 5), batch_size=30, steps=9, learning_rate=0.01), pictures(nb01)
    calm = nb01.outcome(run, data, 0)
    assert math.isfinite(calm["loss"][0])
    monkeypatch.setattr(nb01, "DIVERGED", 1.0)  # any network that guesses is above
    with pytest.raises(nb01.Diverged, match=r"the loss is 2\.\d+ in step 1: lower learning_rate 0\.01"):
        nb01.train(run, data, 0)
    assert nb01.outcome(run, data, 0)["accuracy"] == [0.1]


@pytest.mark.parametrize("error", [torch.linalg.LinAlgError, "Diverged"])
def test_a_solver_that_fails_is_a_divergence_and_other_errors_are_not(nb01, monkeypatch, error):
    kind = nb01.Diverged if error == "Diverged" else error
    run = nb01.Run(widths=(6, 5), method="exact", batch_size=30, steps=8)

    def broken(*arguments):
        raise kind("no")

    monkeypatch.setattr(nb01, "cholesky_solve", broken)
    log = nb01.outcome(run, pictures(nb01), 0, points=4)
    assert (log["step"], log["accuracy"]) == ([2, 4, 6, 8], [0.1] * 4)
    kind = RuntimeError
    with pytest.raises(RuntimeError, match="no"):
        nb01.outcome(run, pictures(nb01), 0)


def test_outcome_looks_at_the_split_so_many_times(nb01):
    data, run = pictures(nb01, count=400), nb01.Run(widths=(6, 5), batch_size=30, steps=30, learning_rate=0.1)
    log = nb01.outcome(run, data, 1, "test", 3)
    assert log["step"] == [10, 20, 30]
    model = nb01.train(run, data, 1)[0]
    assert log["accuracy"][-1] == nb01.accuracy(model, data, "test")
    assert nb01.outcome(run, data, 1)["accuracy"][-1] == nb01.accuracy(model, data, "validation")
    every = nb01.train(run, data, 1, eval_every=1)[1]["loss"]
    assert log["loss"] == pytest.approx([np.mean(every[i : i + 10]) for i in (0, 10, 20)])
    assert nb01.outcome(run, data, 1)["end"] == pytest.approx([np.mean(every[-10:])])


def test_outcomes_are_remembered_by_run_seed_and_data(nb01, tmp_path, monkeypatch):
    monkeypatch.setenv("COOKBOOK_PRESET", "smoke")
    data, run = pictures(nb01), nb01.Run(widths=(4,), batch_size=30, steps=2)
    runs = {"a": run, "b": replace(run, learning_rate=0.2)}
    logs = nb01.outcomes(runs, data, [3, 4], "test", "x", tmp_path)
    assert list(logs) == [("a", 3), ("a", 4), ("b", 3), ("b", 4)]
    assert logs["b", 4] == nb01.outcome(runs["b"], data, 4, "test", 1)
    assert len(list(tmp_path.glob("*.pt"))) == 4
    assert nb01.outcomes(runs, data, [3, 4], "test", "x", tmp_path) == logs
    assert len(list(tmp_path.glob("*.pt"))) == 4
    nb01.outcomes({"a": run}, nb01.fewer(data, 60), [3], "test", "x", tmp_path)
    nb01.outcomes({"a": run}, data, [3], "validation", "x", tmp_path)
    assert len(list(tmp_path.glob("*.pt"))) == 6


def test_threads_do_not_disturb_each_other(nb01, tmp_path):
    """Side by side or alone: initial weights and batches follow from the seed only."""
    data, run = pictures(nb01), nb01.Run(widths=(6, 5), method="cg", batch_size=30, steps=4, learning_rate=0.5)
    together = nb01.outcomes({0: run}, data, range(6), "test", "x", None)
    assert together == {(0, seed): nb01.outcome(run, data, seed, "test") for seed in range(6)}


@pytest.mark.parametrize("run", [{"widths": (6, 5)}, {"network": "convnet", "widths": (2, 3)}, {"widths": (6,), "method": "exact"}])
def test_weights_are_drawn_as_pytorch_does(nb01, run):
    run = nb01.Run(**run)
    torch.manual_seed(7)
    expected = nb01.make_network(run, (3, 8, 8))
    found = nb01.make_network(run, (3, 8, 8), seed=7)
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))
    other = nb01.make_network(run, (3, 8, 8), seed=8)
    assert not all(torch.equal(a, b) for a, b in zip(other.parameters(), expected.parameters(), strict=True))


def test_after(nb01):
    logs = [{"step": [10, 20], "accuracy": [0.1, 0.2], "loss": [3.0, 2.0]}, {"step": [10, 20], "accuracy": [0.2, 0.4], "loss": [5.0, 4.0]}]
    assert nb01.after(logs, "step", 20) == [0.2, 0.4]
    assert nb01.after(logs, "step", 15, "loss") == [2.5, 4.5]
    assert nb01.after(logs, "step", 99) == [0.2, 0.4]
    assert nb01.after(logs, "step", 5) == pytest.approx([0.1, 0.15])  # before training: the accuracy of guessing
    assert nb01.after(logs, "step", 5, "loss", start=2.0) == pytest.approx([2.5, 3.5])


# --- backpropagation as descent on a penalty


def test_penalty_in_loops(nb01):
    weights, x = [torch.randn(*shape, dtype=double) for shape in ((3, 4), (4, 5), (5, 2))], torch.randn(6, 3, dtype=double)
    z = [torch.randn(6, 4, dtype=double), torch.randn(6, 5, dtype=double)]
    a = [x, torch.randn(6, 4, dtype=double), torch.randn(6, 5, dtype=double)]
    expected = np.sum((a[2].numpy() @ weights[2].numpy()) ** 3)
    for i in range(2):
        expected += np.sum((a[i].numpy() @ weights[i].numpy() - z[i].numpy()) ** 2) / 0.6
        expected += np.sum((np.tanh(z[i].numpy()) - a[i + 1].numpy()) ** 2) / 0.6
    assert nb01.penalty(weights, z, a, lambda out: (out**3).sum(), 0.3).item() == pytest.approx(expected)


@pytest.mark.parametrize("tau", [0.01, 1.0, 8.0])
@pytest.mark.parametrize("depth", [1, 2, 4])
def test_descent_on_the_penalty_is_backpropagation(nb01, tau, depth):
    weights = [torch.randn(4, 4, dtype=double) for _ in range(depth)]
    x, y = torch.randn(7, 4, dtype=double), torch.arange(7) % 4
    before = [w.clone() for w in weights]
    leaves = [w.clone().requires_grad_() for w in weights]
    a = x
    for w in leaves[:-1]:
        a = torch.tanh(a @ w)
    slopes = torch.autograd.grad(F.cross_entropy(a @ leaves[-1], y), leaves)
    found = nb01.penalty_descent(weights, x, lambda z: F.cross_entropy(z, y), tau)
    for w, slope, new, old in zip(leaves, slopes, found, before, strict=True):
        torch.testing.assert_close(new, w.detach() - tau * slope)
        assert not torch.equal(new, old)
    assert all(torch.equal(a, b) for a, b in zip(weights, before, strict=True))


# --- the authors' loop


def loop_by_hand(a, b, tau, steps, aliased, epsilon, tolerance=1e-2):
    """The loop as described, in NumPy with its views: P = R is one array, R -= changes both."""
    matrix = a.T @ a + np.eye(a.shape[1]) / tau
    g, R = np.zeros((a.shape[1], b.shape[1])), a.T @ b
    P = R if aliased else R.copy()
    rr = first = (R * R).sum(0)
    for _ in range(steps):
        AP = matrix @ P
        alpha = rr / ((P * AP).sum(0) + epsilon)
        g = g + alpha * P
        R -= alpha * AP
        old, rr = rr, (R * R).sum(0)
        if rr.max() < tolerance**2 * first.mean():
            break
        P = R + rr / (old + epsilon) * P
    return g


@pytest.mark.parametrize("N", [30, 6])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
@pytest.mark.parametrize(("name", "aliased", "epsilon"), [("authors", True, 1e-6), ("aliased", True, 0.0), ("epsilon", False, 1e-6)])
def test_authors_loop_against_numpy(nb01, N, steps, scale, name, aliased, epsilon):
    a, b = torch.randn(N, 12, dtype=double), scale * torch.randn(N, 3, dtype=double)
    stop = 1e-2 if name == "authors" else 0.0  # the stop belongs to the whole loop, not to one flaw
    expected = loop_by_hand(a.numpy(), b.numpy(), 0.3, steps, aliased, epsilon, stop)
    found = nb01.solve_cg(a, b, 0.3, steps, nb01.LOOPS[name])
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10 * scale)
    g = nb01.proximal_gradient(a, b, torch.randn(3, 12, dtype=double), None, 0.3, name, steps)
    np.testing.assert_allclose(columns(g), expected, atol=1e-10)


@pytest.mark.parametrize("N", [30, 6])
def test_authors_loop_without_its_flaws_is_conjugate_gradients(nb01, N):
    a, b = torch.randn(N, 12, dtype=double), torch.randn(N, 3, dtype=double)
    mended = lambda *inputs: nb01.authors_cg(*inputs, aliased=False, epsilon=0.0, tolerance=0.0)
    for steps in (1, 2, 4):
        torch.testing.assert_close(nb01.solve_cg(a, b, 0.3, steps, mended), nb01.solve_cg(a, b, 0.3, steps))


def test_each_flaw_matters(nb01):
    a, b = torch.randn(30, 12, dtype=double), 1e-4 * torch.randn(30, 3, dtype=double)
    found = {name: nb01.solve_cg(a, b, 0.3, 4, loop) for name, loop in nb01.LOOPS.items() if name not in ("as run", "rounded")}
    for first, second in itertools.combinations(found, 2):
        assert relative(found[first].numpy(), found[second].numpy()) > 1e-4
    exact = nb01.solve_exact(a, b, 0.3).numpy()
    errors = {name: relative(g.numpy(), exact) for name, g in found.items()}
    assert errors["cg"] == min(errors.values())


@pytest.mark.parametrize("N", [30, 6])
@pytest.mark.parametrize(("name", "direction", "length"), [("cg resized", "cg", "authors"), ("authors resized", "authors", "cg")])
def test_resized_loops_have_the_direction_of_one_and_the_length_of_the_other(nb01, N, name, direction, length):
    case = torch.randn(N, 12, dtype=double), 1e-4 * torch.randn(N, 3, dtype=double), torch.randn(3, 12, dtype=double), None
    step = lambda method: columns(nb01.proximal_gradient(*case, 0.3, method, 4))
    found, way, model = step(name), step(direction), step(length)
    np.testing.assert_allclose(found / np.linalg.norm(found), way / np.linalg.norm(way), rtol=1e-9, atol=1e-12)
    assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(model))
    assert abs(np.linalg.norm(model) / np.linalg.norm(way) - 1) > 1e-3  # else the test would be none
    nothing = nb01.proximal_gradient(case[0], 0 * case[1], *case[2:], 0.3, name, 4)[0]
    assert (nothing == 0).all()


def from_the_weights(x, grad_z, weight, bias, tau, steps, aliased=True, epsilon=1e-6, tolerance=1e-2):
    """The authors' loop as they run it, in NumPy and in the precision of its inputs: it solves for the new weights, not for the step."""
    a = with_ones(x, bias).astype(x.numpy().dtype)
    old = columns((weight, bias)).astype(a.dtype)
    system = lambda w: a.T @ (a @ w) + w / a.dtype.type(tau)
    X = old.copy()
    R = a.T @ (a @ old - grad_z.numpy()) + old / a.dtype.type(tau) - system(X)
    P = R if aliased else R.copy()
    rr = first = (R * R).sum(0)
    for k in range(steps):
        AP = system(P)
        alpha = rr / ((P * AP).sum(0) + epsilon)
        X += P * alpha
        if k + 1 == steps:
            break
        R -= AP * alpha
        previous, rr = rr, (R * R).sum(0)
        if rr.max() < tolerance**2 * first.mean():
            break
        P = R + P * (rr / (previous + epsilon))
    return old - X


@pytest.mark.parametrize("N", [30, 6])
@pytest.mark.parametrize("steps", [1, 2, 3, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("name", "flaws"), [("as run", {}), ("rounded", {"aliased": False, "epsilon": 0.0, "tolerance": 0.0})])
def test_loops_from_the_weights_against_numpy(nb01, N, steps, bias, name, flaws):
    case = layer(N, n=12, m=3, bias=bias)
    expected = from_the_weights(*case, 0.3, steps, **flaws)
    np.testing.assert_allclose(columns(nb01.proximal_gradient(*case, 0.3, name, steps)), expected, rtol=1e-7, atol=1e-10)


def test_rounding_of_the_first_residual(nb01):
    """In float32, small gradients drown where the residual is a difference of large numbers, here as in NumPy; elsewhere they do not."""
    x, grad_z, weight, bias = layer(200, n=40, m=3)
    case = x.abs(), 1e-6 * grad_z, weight, bias
    half = [part.float() for part in case]
    exact = columns(nb01.proximal_gradient(*case, 0.05, "epsilon", 3))
    error = lambda found, wanted: relative(found.astype(float), wanted)
    assert error(columns(nb01.proximal_gradient(*half, 0.05, "cg", 3)), columns(nb01.proximal_gradient(*case, 0.05, "cg", 3))) < 1e-3
    assert error(columns(nb01.proximal_gradient(*half, 0.05, "epsilon", 3)), exact) < 1e-3
    assert error(columns(nb01.proximal_gradient(*half, 0.05, "rounded", 3)), columns(nb01.proximal_gradient(*case, 0.05, "cg", 3))) > 0.05
    theirs = from_the_weights(*half, 0.05, 3, aliased=False, epsilon=0.0)
    assert error(theirs, columns(nb01.proximal_gradient(*case, 0.05, "cg", 3))) > 0.05


def test_errors_are_to_the_exact_step_in_double_precision(nb01):
    case = layer(9, n=12)
    single = tuple(part.float() for part in case)
    assert nb01.cg_errors(single, 0.3, (1, 30)) == pytest.approx(nb01.cg_errors(case, 0.3, (1, 30)), abs=1e-4)
    exact = columns(nb01.proximal_gradient(*(part.double() for part in single), 0.3))
    left = relative(columns(nb01.proximal_gradient(*single, 0.3, "cg", 30)).astype(float), exact)
    assert nb01.cg_errors(single, 0.3, (30,)) == [pytest.approx(left, rel=1e-3)]  # what float32 leaves
    assert nb01.cosines(single, 0.3) == pytest.approx(nb01.cosines(case, 0.3), abs=1e-4)


def test_epsilon_breaks_linearity(nb01):
    """Ordinary CG on half the gradient is half the step; with epsilon it is far less."""
    a, b = torch.randn(30, 12, dtype=double), 1e-4 * torch.randn(30, 3, dtype=double)
    size = lambda scale, name: nb01.solve_cg(a, scale * b, 0.3, 1, nb01.LOOPS[name]).norm().item()
    assert size(0.1, "cg") / size(1, "cg") == pytest.approx(0.1)
    assert size(0.1, "epsilon") / size(1, "epsilon") < 0.08


def test_authors_loop_leaves_an_output_without_gradient(nb01):
    x, grad_z, weight, bias = layer(30, n=12)
    grad_z[:, 2] = 0
    for name in ("authors", "aliased", "epsilon", "cg resized", "authors resized"):  # the others begin at a residual that is rounded
        g, shift = nb01.proximal_gradient(x, grad_z, weight, bias, 0.3, name, 8)
        assert g.isfinite().all()
        assert (g[2] == 0).all()
        assert shift[2] == 0
        assert grad_z.abs().sum() > 0


def test_authors_loop_changes_no_input(nb01):
    for N in (30, 6):
        x, grad_z, weight, bias = layer(N, n=12)
        before = grad_z.clone()
        old = weight.clone(), bias.clone()
        for name in ("authors", "as run"):
            nb01.proximal_gradient(x, grad_z, weight, bias, 0.3, name, 3)
        assert torch.equal(grad_z, before)
        assert torch.equal(weight, old[0])
        assert torch.equal(bias, old[1])


def test_convolutions_know_no_flaws(nb01):
    with pytest.raises(ValueError, match="a convolution knows exact and cg, not authors"):
        nb01.ProxConv2d(3, 4, 3, method="authors")


# --- Muon


def test_orthogonalised_evens_out_singular_values(nb01):
    for shape in ((6, 20), (20, 6), (6, 6)):
        matrix = torch.randn(*shape, dtype=double)
        u, _, v = torch.linalg.svd(matrix, full_matrices=False)
        found = nb01.orthogonalised(matrix)
        assert found.shape == matrix.shape
        inner = u.T @ found @ v.T  # the same singular vectors
        assert (inner - torch.diag(inner.diagonal())).abs().max() < 1e-8
    values = torch.linalg.svdvals(nb01.orthogonalised(torch.randn(6, 200, dtype=double)))
    assert 0.6 < values.min() <= values.max() < 1.3
    assert (nb01.orthogonalised(torch.zeros(3, 4)) == 0).all()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="PyTorch before 2.9 has no Muon")
@pytest.mark.parametrize("shape", [(6, 20), (20, 6)])
def test_muon_is_torchs_up_to_half_precision(nb01, shape):
    start, slopes = torch.randn(*shape), torch.randn(4, *shape)
    ours, theirs = (nn.Parameter(start.clone()) for _ in range(2))
    pairs = (ours, nb01.Muon([ours], lr=0.1, momentum=0.9)), (theirs, torch.optim.Muon([theirs], lr=0.1, momentum=0.9, weight_decay=0.0))
    for slope in slopes:
        for part, optimizer in pairs:
            part.grad = slope.clone()
            optimizer.step()
    assert relative((ours - start).detach().numpy(), (theirs - start).detach().numpy()) < 0.03
    pairs[0][1].zero_grad()
    assert ours.grad is None


# --- tables


def test_step_sizes(nb01):
    """The size is the rate of explicit steps and the tau of proximal ones, at rate 1."""
    base, ways = nb01.Run(tau=7.0, learning_rate=9.0), {"explicit": {}, "CG-5": {"method": "cg", "cg_steps": 5}}
    runs = nb01.step_sizes(base, ways, (0.1, 3.0))
    assert list(runs) == [("explicit", 0.1), ("explicit", 3.0), ("CG-5", 0.1), ("CG-5", 3.0)]
    assert runs["explicit", 3.0] == nb01.Run(tau=7.0, learning_rate=3.0)
    assert runs["CG-5", 0.1] == nb01.Run(method="cg", cg_steps=5, tau=0.1, learning_rate=1.0)


def test_two_rates_trains_as_sgd_with_two_groups(nb01):
    run, data = nb01.Run(widths=(6, 5), batch_size=90, steps=2, tau=0.2, learning_rate=0.5, **nb01.TWO_RATES), pictures(nb01)
    model, _ = nb01.train(run, data, 3)
    net = nb01.make_network(replace(run, method="explicit"), (3, 16, 16), seed=3)
    *hidden, weight, bias = net.parameters()
    groups = [{"params": hidden, "lr": 0.1}, {"params": [weight, bias], "lr": 0.5}]
    optimizer = torch.optim.SGD(groups, momentum=0.95, nesterov=True)
    for batch in nb01.order(180, 3, 0).split(90):
        optimizer.zero_grad()
        F.cross_entropy(net(data.train[0][batch] / 255), data.train[1][batch]).backward()
        optimizer.step()
    for found, expected in zip(model.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("way", ["CG-1", "CG-3", "CG-5", "exact"])
def test_small_steps_are_the_same_in_all_ways(nb01, way):
    """What makes tau and the rate of explicit steps one axis of the table."""
    data, base = pictures(nb01), nb01.Run(widths=(6, 5), batch_size=30, steps=3)
    runs = nb01.step_sizes(base, {"two rates": nb01.TWO_RATES, way: nb01.PROXIMAL[way]}, (1e-5,))
    parts = {}
    for (name, _), run in runs.items():
        start = nb01.make_network(run, (3, 16, 16), seed=0)
        model, _ = nb01.train(run, data, 0)
        pairs = list(zip(model.parameters(), start.parameters(), strict=True))[:-2]  # the last layer is explicit, at rate 1
        parts[name] = torch.cat([(a - b).detach().flatten() for a, b in pairs])
    assert relative(parts[way].numpy(), parts["two rates"].numpy()) < 0.1
    assert parts["two rates"].norm() > 0


def test_last_loss(nb01):
    log = lambda end: {"end": [9.0, end]}
    assert nb01.last_loss([log(1.0), log(2.0)]) == "1.50 ± 0.71"
    assert nb01.last_loss([log(1.0), log(math.nan), log(math.nan)]) == "2 of 3 diverged"


def test_edged(nb01):
    rates = (0.1, 1.0, 30.0)
    assert [nb01.edged(rate, rates) for rate in rates] == ["0.1 (edge)", "1", "30 (edge)"]


def test_near_best(nb01):
    assert nb01.near_best([0.1, 0.37, 0.4, 0.37, 0.35], (1, 2, 3, 4, 5)) == (2, 4)
    assert nb01.near_best([0.5], (3,)) == (3, 3)
    assert nb01.near_best([0.1, 0.25, 0.4], (1, 2, 3), share=0.5) == (2, 3)


def test_rates_for(nb01):
    run = nb01.Run()
    assert nb01.rates_for(run) == nb01.FIVE["nesterov"]
    assert nb01.rates_for(replace(run, method="cg")) == nb01.FIVE["proximal"]
    assert nb01.rates_for(replace(run, **nb01.TWO_RATES)) == nb01.FIVE["proximal"]
    assert nb01.rates_for(replace(run, method="exact", optimizer="adam")) == nb01.FIVE["adam"]
    assert nb01.rates_for(replace(run, optimizer="muon")) == nb01.FIVE["muon"]
    assert nb01.rates_for(replace(run, network="convnet", optimizer="adam")) == nb01.FIVE["convnet"]
    assert {len(rates) for rates in nb01.FIVE.values()} == {5}  # as many tries for all


def test_every_arm_has_its_twin_with_centred_inputs(nb01):
    plain = [name for name in nb01.ARMS if not name.endswith(", centred")]
    assert len(nb01.ARMS) == 2 * len(plain) == 14
    for name in plain:
        assert nb01.ARMS[f"{name}, centred"] == {**nb01.ARMS[name], "centre": True}


def test_tuned_takes_the_best_mean_of_five_rates_by_validation(nb01, monkeypatch):
    monkeypatch.setenv("COOKBOOK_PRESET", "cpu")
    asked = []

    def outcomes(runs, data, seeds, split, name, folder):
        asked.append((len(runs), seeds, split, folder))
        one = {(key, 9): {"accuracy": [1.0, -abs(math.log(run.learning_rate / 0.05))]} for key, run in runs.items()}
        # alone, the second seed would choose another rate
        return one | {(key, 8): {"accuracy": [0.0, 0.1 * run.learning_rate]} for key, run in runs.items()}

    monkeypatch.setattr(nb01, "outcomes", outcomes)
    arms = {"explicit": {}, "exact": {"method": "exact"}}
    found = nb01.tuned(nb01.Run(), arms, None, [8, 9], "folder")
    assert found == {"explicit": nb01.Run(learning_rate=0.05), "exact": nb01.Run(method="exact", learning_rate=0.1)}
    assert nb01.tuned(nb01.Run(), arms, None, [8], "folder")["exact"].learning_rate == 10
    assert asked == [(10, [8, 9], "validation", "folder"), (10, [8], "validation", "folder")]


def test_comparison_at_equal_updates_and_minutes(nb01):
    run = nb01.Run(learning_rate=0.05)
    runs = {"explicit": run, "CG-3": replace(run, method="cg", learning_rate=10.0)}
    logs = {("explicit", s): {"step": [100, 200], "end": [2.0, 1.0], "accuracy": [0.2 + s, 0.4 + s]} for s in (0, 1)}
    logs |= {("CG-3", s): {"step": [50, 100], "end": [1.5, 0.5], "accuracy": [0.3 + s, 0.5 + 2 * s]} for s in (0, 1)}
    rows, scores = nb01.comparison(runs, logs, {"explicit": 0.02, "CG-3": 0.025}, (0, 1), 100)
    assert scores["explicit"] == ([0.2, 1.2], [0.2, 1.2])
    assert scores["CG-3"] == ([0.5, 2.5], [pytest.approx(0.42), pytest.approx(2.02)])  # 80 updates in 2 seconds
    assert rows["CG-3"]["rate"] == "10 (edge)"
    assert rows["explicit"]["rate"] == "0.05"
    assert [rows[name]["equal minutes"] for name in runs] == [nb01.summary(scores[name][1]) for name in runs]
    assert rows["explicit"]["ms an update"] == "20"
    assert rows["explicit"]["minus explicit, updates"] == ""
    assert rows["CG-3"]["minus explicit, updates"] == nb01.versus([0.5, 2.5], [0.2, 1.2])
    assert rows["CG-3"]["minus explicit, minutes"] == nb01.versus([0.42, 2.02], [0.2, 1.2])
    assert rows["CG-3"]["loss"].startswith("0.50")


def test_comparison_reads_a_slow_arm_between_guessing_and_its_first_point(nb01):
    runs = {"explicit": nb01.Run(), "slow": nb01.Run(method="exact")}
    logs = {(name, s): {"step": [10, 20], "end": [2, 1], "accuracy": [0.2, 0.4]} for name in runs for s in (0, 1)}
    rows, scores = nb01.comparison(runs, logs, {"explicit": 0.01, "slow": 0.04}, (0, 1), 20)
    assert rows["explicit"]["equal minutes"] == rows["slow"]["equal updates"] == "0.400 ± 0.000"
    assert rows["slow"]["equal minutes"] == "0.150 ± 0.000"  # 5 updates
    assert scores["slow"][1] == pytest.approx([0.15, 0.15])


def test_centred_arms_are_compared_with_the_centred_explicit_one(nb01):
    runs = {name: nb01.Run() for name in ("explicit", "CG-3", "explicit, centred", "CG-3, centred")}
    value = dict(zip(runs, (0.1, 0.2, 0.4, 0.7), strict=True))
    logs = {(name, s): {"step": [1, 9], "end": [1, 1], "accuracy": [value[name] + s] * 2} for name in runs for s in (0, 1)}
    rows, _ = nb01.comparison(runs, logs, dict.fromkeys(runs, 1.0), (0, 1), 9)
    assert rows["CG-3, centred"]["minus explicit, updates"].startswith("+0.300")
    assert rows["CG-3"]["minus explicit, minutes"].startswith("+0.100")


def test_contest(nb01, monkeypatch):
    monkeypatch.setenv("COOKBOOK_PRESET", "smoke")
    base = nb01.Run(widths=(4,), batch_size=30, steps=4)
    arms = {"explicit": {}, "CG-3": {"method": "cg"}}
    rows, scores, logs = nb01.contest(base, arms, pictures(nb01), [0, 1], [9], None)
    assert set(rows) == set(scores) == set(arms)
    assert {key: log["step"] for key, log in logs.items()} == {(name, s): [1, 2, 3, 4] for name in arms for s in (0, 1)}
    assert scores["CG-3"][0] == [logs["CG-3", s]["accuracy"][-1] for s in (0, 1)]
    assert scores["explicit"][1] == [logs["explicit", s]["accuracy"][-1] for s in (0, 1)]  # the minutes are its own


def test_fewer(nb01):
    data = pictures(nb01)
    few = nb01.fewer(data, 25)
    assert [len(part[1]) for part in (few.train, few.validation, few.test, data.train)] == [25, 20, 50, 180]
    assert torch.equal(few.train[0], data.train[0][:25])
    assert len({data.identity, few.identity, nb01.fewer(data, 26).identity}) == 3


def test_mean_step(nb01):
    data, run = pictures(nb01), nb01.Run(widths=(5, 4), method="exact", batch_size=20, tau=0.3, learning_rate=0.7)
    model = nb01.make_network(run, (3, 16, 16), seed=2)
    total = 0
    for x, y in zip(data.train[0][:60].split(20), data.train[1][:60].split(20), strict=True):
        x, grad, weight, bias = nb01.layer_cases(model, data.floats(x), y)[0]
        total = total + nb01.proximal_gradient(x, grad, weight, bias, 0.3)[0] / 3
    torch.testing.assert_close(nb01.mean_step(run, data, 79, 2).double(), 0.7 * total.flatten(), rtol=1e-3, atol=1e-6)


def test_cosines_and_errors_of_other_loops(nb01):
    case = layer(9, n=12)
    exact = columns(nb01.proximal_gradient(*case, 0.3))
    found = nb01.cg_errors(case, 0.3, (2, 3), "authors")
    assert found == pytest.approx([relative(columns(nb01.proximal_gradient(*case, 0.3, "authors", k)), exact) for k in (2, 3)])
    g, gradient = columns(nb01.proximal_gradient(*case, 0.3, "cg", 2)), with_ones(case[0], case[3]).T @ case[1].numpy()
    cosine = (g * gradient).sum() / np.linalg.norm(g) / np.linalg.norm(gradient)
    assert nb01.cosines(case, 0.3, "cg", 2)[0] == pytest.approx(cosine)


def test_presets(nb01):
    """Rates span five decades; every way of Table 1; every flaw is trained; the paper's settings."""
    assert nb01.RATES[-1] / nb01.RATES[0] == pytest.approx(1e5)
    assert list(nb01.WAYS) == ["explicit", "CG-1", "CG-3", "CG-5", "exact"]
    assert nb01.PROXIMAL["CG-5"] == {"method": "cg", "cg_steps": 5}
    assert {changes["method"] for changes in nb01.FLAWED.values()} == {"as run", "aliased", "epsilon", *nb01.RESIZED}
    assert {changes["cg_steps"] for changes in nb01.FLAWED.values()} == {5}
    assert (nb01.Run().batch_size, nb01.Run().tau, nb01.Run().momentum) == (500, 0.05, 0.95)


def test_exercises_can_be_solved(nb01):
    """The checks accept the right answer."""
    w, curvatures = torch.tensor([7.0]), torch.tensor([3.0])
    torch.testing.assert_close(nb01.implicit_step(w, torch.diag(curvatures), 2.0), w / (1 + 2.0 * curvatures))
    x = torch.ones(2)
    assert nb01.solve_exact(x[:, None], torch.ones(2, 1), 0.5).item() == pytest.approx(0.5)
