"""Notebook 03 against independent implementations: transformers' DiffLlama, PyTorch's modules, closed forms and plain loops."""

import itertools
import math
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM, TopPLogitsWarper
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding, lambda_init_fn

from tests.checks import check_amp_dtype, check_no_leak, check_peak_memory, check_seconds_in_turns, check_statistics

V = 13
double = torch.float64


@pytest.fixture(scope="module")
def small(nb03):
    """A small run with more than one pair of heads, layer and RoPE pair."""
    return nb03.Run(n_layer=2, n_head=4, d_model=32, context=12, batch_size=4, steps=30, warmup=5)


@pytest.fixture(scope="module")
def text(nb03):
    """A text with structure that a small model can learn."""
    words = "the cat sat on a mat and ate the rat".split()
    return nb03.Text(" ".join(np.random.default_rng(0).choice(words, 1500)))


def pairs(B=2, H=3, T=7, d=4, dtype=double):
    """Random q1, q2, k1, k2 (B, H, T, d) and v (B, H, T, 2d)."""
    return [*torch.randn(4, B, H, T, d, dtype=dtype), torch.randn(B, H, T, 2 * d, dtype=dtype)]


def model_of(nb03, run, size=V, **changes):
    """A model in float64 whose gains are no longer one and whose lambdas are far from their start."""
    model = nb03.Transformer(replace(run, **changes), size).double().eval()
    for name, p in model.named_parameters():
        if p.ndim == 1 or name.endswith("vectors"):
            torch.nn.init.normal_(p, mean=0.5, std=0.3)
    return model


# --- the function


def loop(q1, q2, k1, k2, v, lam, sees):
    """Differential attention by sums over single positions; sees(m, n) tells whether query m may look at key n."""
    y = torch.zeros_like(v)
    B, H, T, d = q1.shape
    for b, h, m in itertools.product(range(B), range(H), range(T)):
        keys = [n for n in range(T) if sees(m, n)]
        weights = []
        for q, k in ((q1, k1), (q2, k2)):
            e = [math.exp(sum(q[b, h, m, i].item() * k[b, h, n, i].item() for i in range(d)) / math.sqrt(d)) for n in keys]
            weights.append([x / sum(e) for x in e])
        for n, first, second in zip(keys, *weights, strict=True):
            y[b, h, m] += (first - lam * second) * v[b, h, n]
    return y


BAND = (torch.arange(7)[:, None] - torch.arange(7)).abs() <= 2


@pytest.mark.parametrize("name", ["differential_attention", "fused_differential_attention"])
@pytest.mark.parametrize(("causal", "mask", "sees"), [
    (True, None, lambda m, n: n <= m),
    (False, None, lambda m, n: True),
    (False, BAND, lambda m, n: abs(m - n) <= 2),
    (True, BAND, lambda m, n: m - 2 <= n <= m),
])  # fmt: skip
@pytest.mark.parametrize("lam", [0.0, 0.37, 1.0, -0.6, 1.8])
def test_against_a_loop(nb03, name, causal, mask, sees, lam):
    inputs = pairs(B=1, H=2)
    torch.testing.assert_close(getattr(nb03, name)(*inputs, lam, causal=causal, mask=mask), loop(*inputs, lam, sees), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 33, 8), (1, 2, 130, 32)])
@pytest.mark.parametrize("masked", [False, True])
def test_fused_is_explicit_forward_and_backward(nb03, shape, masked):
    inputs = [*pairs(*shape, dtype=torch.float32), torch.tensor(0.4)]
    mask = (torch.rand(shape[2], shape[2]) < 0.5) | torch.eye(shape[2], dtype=torch.bool) if masked else None
    results = []
    for function in (nb03.differential_attention, nb03.fused_differential_attention):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves, mask=mask)
        results.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaves)))
    for explicit, fused in zip(*results, strict=True):
        torch.testing.assert_close(fused, explicit, rtol=0, atol=1e-5 * max(1, explicit.abs().max().item()))


@pytest.mark.parametrize("name", ["differential_attention", "fused_differential_attention"])
def test_rows_sum_to_one_minus_lambda(nb03, name):
    q1, q2, k1, k2, v = pairs()
    for lam in (0.0, 0.2, 0.8, 1.0, 1.5):
        y = getattr(nb03, name)(q1, q2, k1, k2, torch.ones_like(v), lam)
        torch.testing.assert_close(y, torch.full_like(y, 1 - lam))


@pytest.mark.parametrize("name", ["differential_attention", "fused_differential_attention"])
def test_limits(nb03, name):
    """lambda = 0 is ordinary attention; equal maps cancel at lambda = 1; lambda may differ between heads and tokens."""
    function, (q1, q2, k1, k2, v) = getattr(nb03, name), pairs()
    torch.testing.assert_close(function(q1, q2, k1, k2, v, 0.0), F.scaled_dot_product_attention(q1, k1, v, is_causal=True))
    assert function(q1, q1, k1, k1, v, 1.0).abs().max() < 1e-12
    lam = torch.rand(2, 3, 7, 1, dtype=double)
    each = torch.stack([torch.stack([function(q1, q2, k1, k2, v, lam[b, h, t].item())[b, h, t] for t in range(7)])
                        for b in range(2) for h in range(3)])  # fmt: skip
    torch.testing.assert_close(function(q1, q2, k1, k2, v, lam), each.view(2, 3, 7, 8))


@pytest.mark.parametrize("name", ["differential_attention", "fused_differential_attention"])
def test_no_leak_from_the_future(nb03, name):
    inputs = pairs()
    before = getattr(nb03, name)(*inputs, 0.4)
    for x in inputs[2:]:
        x[:, :, 4] += 1.0
    moved = (getattr(nb03, name)(*inputs, 0.4) - before).abs().amax((0, 1, 3))
    assert moved[:4].max() == 0
    assert moved[4:].min() > 1e-6


@pytest.mark.parametrize("name", ["differential_attention", "fused_differential_attention"])
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_by_finite_differences(nb03, name, causal):
    leaves = [x.requires_grad_() for x in (*pairs(B=1, H=2, T=4, d=2), torch.tensor(0.3, dtype=double))]
    assert torch.autograd.gradcheck(lambda *inputs: getattr(nb03, name)(*inputs, causal=causal), leaves)


@pytest.mark.parametrize("name", ["differential_attention", "fused_differential_attention"])
def test_refuses_shapes_that_do_not_fit(nb03, name):
    function, (q1, q2, k1, k2, v) = getattr(nb03, name), pairs()
    with pytest.raises(ValueError, match="must have one shape"):
        function(q1, q2[:, :, :5], k1, k2, v, 0.5)
    with pytest.raises(ValueError, match=r"v must be \(B, H, T, 2d\) = \(2, 3, 7, 8\), not \(2, 3, 7, 4\)"):
        function(q1, q2, k1, k2, v[..., :4], 0.5)
    with pytest.raises(ValueError, match=r"mask must be bool \(T, T\) = \(7, 7\), not torch.bool \(6, 7\)"):
        function(q1, q2, k1, k2, v, 0.5, mask=BAND[:6])
    with pytest.raises(ValueError, match=r"mask must be bool .* not torch\.float32"):
        function(q1, q2, k1, k2, v, 0.5, mask=BAND.float())
    with pytest.raises(ValueError, match="hides every key from some query"):
        function(q1, q2, k1, k2, v, 0.5, causal=False, mask=BAND & (torch.arange(7) != 3)[:, None])
    with pytest.raises(ValueError, match="hides every key from some query"):
        function(q1, q2, k1, k2, v, 0.5, mask=~torch.eye(7, dtype=torch.bool))  # the first query could see itself alone


# --- lambda and positions


def test_lambda_init(nb03):
    assert [nb03.lambda_init(layer) for layer in (1, 2, 12)] == pytest.approx([0.2, 0.8 - 0.6 * math.exp(-0.3), 0.8 - 0.6 * math.exp(-3.3)])
    assert [nb03.lambda_init(layer + 1) for layer in range(30)] == [lambda_init_fn(layer) for layer in range(30)]
    with pytest.raises(ValueError, match="count from 1"):
        nb03.lambda_init(0)


def test_lambda_of_a_module(nb03):
    module = nb03.DifferentialAttention(32, 2, layer=3)
    module.vectors.data = torch.randn(4, 8)
    q1, k1, q2, k2 = module.vectors.detach().numpy().astype(float)
    assert module.lam().item() == pytest.approx(math.exp(q1 @ k1) - math.exp(q2 @ k2) + nb03.lambda_init(3), rel=1e-5)
    module.lam().backward()
    assert (module.vectors.grad.abs() > 0).all()
    assert nb03.DifferentialAttention(32, 2, layer=3, initial=0.8).lam().item() == pytest.approx(0.8, abs=0.15)
    frozen = nb03.DifferentialAttention(32, 2, layer=2, learn_lambda=False)
    assert frozen.lam().item() == pytest.approx(nb03.lambda_init(2))
    assert "vectors" not in dict(frozen.named_parameters())
    draws = torch.cat([nb03.DifferentialAttention(256, 2).vectors.flatten() for _ in range(20)])
    assert draws.std().item() == pytest.approx(0.1, rel=0.05)


def rotation_matrix(position, width):
    """The block-diagonal matrix of RoFormer's eq. 15."""
    matrix = torch.zeros(width, width, dtype=double)
    for j in range(width // 2):
        angle = position * 10_000.0 ** (-2 * j / width)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = torch.tensor([[cos, -sin], [sin, cos]], dtype=double)
    return matrix


def test_rope(nb03):
    x, table = torch.randn(2, 3, 40, 8, dtype=double), nb03.rope_table(50, 8)
    expected = torch.stack([x[:, :, m] @ rotation_matrix(m, 8).T for m in range(40)], 2)
    torch.testing.assert_close(nb03.rotate(x, table), expected, rtol=0, atol=1e-12)
    for dtype, tolerance in ((torch.float16, 3e-3), (torch.bfloat16, 3e-2), (torch.float32, 1e-5)):
        rotated = nb03.rotate(x.to(dtype), table)
        assert rotated.dtype == dtype
        torch.testing.assert_close(rotated.double(), expected, rtol=0, atol=tolerance)
    with pytest.raises(ValueError, match="51 tokens exceed the 50 positions of RoPE"):
        nb03.rotate(torch.randn(1, 1, 51, 8), table)
    with pytest.raises(ValueError, match="odd one out"):
        nb03.rope_table(50, 5)


# --- the modules


def interleaved_to_halves(rows):
    """Rows (..., d, C) of heads, moved from neighbouring RoPE pairs to Llama's halves."""
    return rows.unflatten(-2, (-1, 2)).transpose(-3, -2).flatten(-3, -2)


def to_diffllama(module):
    """Weights of a DifferentialAttention in transformers' order: it pairs head i with i + H, and rotates halves."""
    H, d = module.n_head, module.d
    state = {}
    for name, weight in (("q", module.q.weight), ("k", module.k.weight)):
        heads = interleaved_to_halves(weight.view(H, 2, d, -1))  # (H, 2, d, C)
        state[f"{name}_proj.weight"] = heads.transpose(0, 1).reshape(weight.shape)
    state["v_proj.weight"] = module.v.weight.view(H, 2, d, -1).transpose(0, 1).reshape(module.v.weight.shape)
    state["o_proj.weight"] = module.out.weight
    state |= {f"lambda_{name}": vector for name, vector in zip(("q1", "k1", "q2", "k2"), module.vectors, strict=True)}
    return {name: value.detach() for name, value in state.items()}


def diffllama_config(**changes):
    return DiffLlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=4, attention_dropout=0.0, attn_implementation="sdpa", **changes
    )


@pytest.mark.parametrize("layer", [1, 4])
@pytest.mark.parametrize("fused", [True, False])
def test_module_against_transformers(nb03, layer, fused):
    ours = nb03.DifferentialAttention(32, 2, layer=layer, fused=fused).double()
    ours.vectors.data = torch.randn(4, 8, dtype=double) * 0.5
    config = diffllama_config(rms_norm_eps=1e-5)
    theirs = DiffLlamaAttention(config, layer_idx=layer - 1).double()
    theirs.load_state_dict(to_diffllama(ours))
    x, positions = torch.randn(2, 9, 32, dtype=double), torch.arange(9)[None]
    cos, sin = DiffLlamaRotaryEmbedding(config)(x, positions)
    expected = theirs(x, (cos, sin), attention_mask=None)[0]
    torch.testing.assert_close(ours(x, nb03.rope_table(9, 8)), expected, rtol=0, atol=1e-5)  # their cosines are in float32


def test_whole_model_against_transformers(nb03, small):
    """DiffLlama with our weights gives our logits: blocks, schedule of lambda, RoPE, norms, tying, scale of the embedding."""
    model = nb03.Transformer(small, V).double()
    for name, p in model.named_parameters():
        if name.endswith("vectors") or (p.ndim == 1 and "attention" not in name):  # the gain of their head norm is fixed
            torch.nn.init.normal_(p, mean=0.5, std=0.3)
    config = diffllama_config(vocab_size=V, intermediate_size=128, num_hidden_layers=2, rms_norm_eps=1e-6, tie_word_embeddings=False)
    theirs = DiffLlamaForCausalLM(config).double().eval()
    embedding = model.embedding.weight
    state = {"model.embed_tokens.weight": embedding * math.sqrt(32), "lm_head.weight": embedding, "model.norm.weight": model.norm.weight}
    for i, block in enumerate(model.blocks):
        weights = {f"self_attn.{name}": value for name, value in to_diffllama(block.attention).items()}
        weights |= {
            "mlp.gate_proj.weight": block.network.gate.weight,
            "mlp.up_proj.weight": block.network.up.weight,
            "mlp.down_proj.weight": block.network.out.weight,
            "input_layernorm.weight": block.norms[0].weight,
            "post_attention_layernorm.weight": block.norms[1].weight,
        }
        state |= {f"model.layers.{i}.{name}": value for name, value in weights.items()}
        theirs.model.layers[i].self_attn.groupnorm.eps = 1e-5
    theirs.load_state_dict(state)
    tokens = torch.randint(V, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens).logits, rtol=1e-4, atol=1e-5)


def test_head_norm_and_its_constant(nb03):
    """Each head has a root mean square of 1 - lambda_init, times the gain; without the norm neither norm nor constant."""
    module, x = nb03.DifferentialAttention(32, 2, layer=2).double(), torch.randn(2, 7, 32, dtype=double)
    module.out.weight.data = torch.eye(32, dtype=double)
    heads = module(x).view(2, 7, 2, 16)
    size = heads.square().mean(-1).sqrt()
    torch.testing.assert_close(size, torch.full_like(size, 1 - nb03.lambda_init(2)), rtol=1e-2, atol=0)
    module.norm.weight.data = torch.rand(16, dtype=double)
    torch.testing.assert_close(module(x).view(2, 7, 2, 16), heads * module.norm.weight)
    plain = nb03.DifferentialAttention(32, 2, layer=2, head_norm=False).double()
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("norm")})
    expected = nb03.differential_attention(*plain.project(x), plain.lam())
    torch.testing.assert_close(plain(x), expected.transpose(1, 2).flatten(2))


def test_ordinary_against_pytorch(nb03):
    ours, theirs = nb03.OrdinaryAttention(32, 4).double(), torch.nn.MultiheadAttention(32, 4, bias=False, batch_first=True, dtype=double)
    theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]).detach()
    theirs.out_proj.weight.data = ours.out.weight.data
    x, future = torch.randn(3, 7, 32, dtype=double), torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=future, need_weights=False)[0])


@pytest.mark.parametrize("n_head", [2, 4, 8])
def test_version_2_head_by_head(nb03, n_head):
    """Query heads 2i and 2i + 1 share one head of keys and values, 4 in a row; lambda is a sigmoid of the token."""
    module, x = nb03.DifferentialAttentionV2(32, n_head).double(), torch.randn(2, 6, 32, dtype=double)
    d, table = 32 // n_head, nb03.rope_table(6, 32 // n_head)
    head = lambda weight, i: (x @ weight[i * d : (i + 1) * d].T)[:, None]  # (B, 1, T, d)
    outputs = []
    for i in range(n_head):
        first, second = (
            F.scaled_dot_product_attention(
                nb03.rotate(head(module.q.weight, q), table),
                nb03.rotate(head(module.k.weight, q // 4), table),
                head(module.v.weight, q // 4),
                is_causal=True,
            )
            for q in (2 * i, 2 * i + 1)
        )
        lam = 1 / (1 + torch.exp(-(x @ module.lam.weight[i])))  # (B, T)
        outputs.append(first[:, 0] - lam[..., None] * second[:, 0])
    torch.testing.assert_close(module(x, table), torch.cat(outputs, -1) @ module.out.weight.T)


def test_swiglu(nb03):
    x, network = torch.randn(2, 5, 48), nb03.SwiGLU(48)
    a, b = x @ network.gate.weight.T, x @ network.up.weight.T
    torch.testing.assert_close(network(x), (a / (1 + torch.exp(-a)) * b) @ network.out.weight.T)
    assert [nb03.SwiGLU(width).gate.out_features for width in (8, 128, 192, 384)] == [128, 256, 512, 1024]


def test_modules_refuse_widths_that_do_not_divide(nb03):
    with pytest.raises(ValueError, match="no multiple of n_head 3"):
        nb03.DifferentialAttention(32, 3)
    with pytest.raises(ValueError, match="odd width 5 has no halves"):
        nb03.DifferentialAttention(20, 4)
    with pytest.raises(ValueError, match="odd one out"):  # heads of width 6 have halves of width 3, which RoPE refuses
        nb03.rope_table(4, nb03.DifferentialAttention(36, 6).d)
    with pytest.raises(ValueError, match="n_head 3 must be even"):
        nb03.DifferentialAttentionV2(30, 3)


def test_transformer_refuses_bad_settings(nb03, small):
    for changes, message in (
        ({"kind": "double"}, "kind 'double' is unknown; choose one of: ordinary, differential, v2"),
        ({"n_head": 5}, "no multiple of n_head 5"),
        ({"n_head": 1}, "must be even: differential attention makes pairs"),
        ({"n_head": 32}, "odd one out"),
    ):
        with pytest.raises(ValueError, match=message):
            nb03.Transformer(replace(small, **changes), V)
    with pytest.raises(ValueError, match="13 tokens exceed the 12 positions"):
        nb03.Transformer(small, V)(torch.zeros(1, 13, dtype=torch.long))


@pytest.mark.parametrize("kind", ["ordinary", "differential", "v2"])
def test_model_does_not_see_the_future(nb03, small, kind):
    check_no_leak(model_of(nb03, small, kind=kind), V, 12)


@pytest.mark.parametrize("kind", ["ordinary", "differential", "v2"])
def test_model_knows_the_order(nb03, small, kind):
    """Keys that swap places change the last logits of a single layer: the positions reach the scores."""
    model = model_of(nb03, small, kind=kind, n_layer=1)
    assert not torch.allclose(model(torch.tensor([[1, 2, 3, 4, 5]]))[0, -1], model(torch.tensor([[3, 1, 2, 4, 5]]))[0, -1])


def test_parameters_and_initialisation(nb03):
    run = nb03.Run(n_layer=8, n_head=4, d_model=128)
    count = lambda **changes: sum(p.numel() for p in nb03.Transformer(replace(run, **changes), 65).parameters())
    ordinary = 65 * 128 + 128 + 8 * (4 * 128**2 + 3 * 128 * 256 + 2 * 128)
    assert count(kind="ordinary") == ordinary
    assert count() == ordinary + 8 * (4 * 32 + 64)  # four vectors and a gain
    assert count(kind="v2") == ordinary + 8 * 4 * 128
    model = nb03.Transformer(run, 65)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert len(model.lambdas()) == 8
    for layer, block in enumerate(model.blocks, start=1):
        assert block.attention.initial == nb03.lambda_init(layer)
        assert block.attention.vectors.std().item() == pytest.approx(0.1, rel=0.3)
        assert block.attention.q.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert block.attention.out.weight.std().item() == pytest.approx(128**-0.5 / 4, rel=0.05)
        assert block.network.out.weight.std().item() == pytest.approx(256**-0.5 / 4, rel=0.05)
    variant = nb03.Transformer(replace(run, initial=0.5, learn_lambda=False, head_norm=False), 65)
    assert variant.lambdas() == [0.5] * 8
    assert variant.blocks[0].attention.norm is None
    plain = nb03.Transformer(replace(run, head_norm=False), 65).blocks[0].attention
    assert (plain.norm is None, plain.vectors is None) == (True, False)
    assert nb03.Transformer(replace(run, kind="ordinary"), 65).lambdas() == []


@pytest.mark.parametrize("kind", ["ordinary", "differential", "v2"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(nb03, small, kind, dtype):
    """Close to float32, with lambda in float32."""
    model, tokens = nb03.Transformer(replace(small, kind=kind), V), torch.randint(V, (2, 12))
    with torch.no_grad(), nb03.mixed_precision(torch.device("cpu"), dtype):
        logits, lambdas = model(tokens), [b.attention.lam() for b in model.blocks if kind == "differential"]
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0, atol=0.03)
    assert all(lam.dtype == torch.float32 for lam in lambdas)


# --- tasks


def test_recurrence(nb03):
    pure, draws = nb03.Recurrence(size=7, p=0.0, coefficients=(3, 5)), torch.Generator().manual_seed(1)
    for row in pure.sequences(20, 30, draws).tolist():
        assert all(row[n] == (3 * row[n - 1] + 5 * row[n - 2]) % 7 for n in range(2, 30))
    for row in nb03.Recurrence(size=7, p=1.0).sequences(20, 30, draws).tolist():
        assert all(row[n] == (row[n - 1] + 1) % 7 for n in range(2, 30))
    noisy = nb03.Recurrence(size=8, p=0.3)
    a = noisy.sequences(4000, 30, draws)
    assert (a.min(), a.max()) == (0, 7)
    plus_one, rule = (a[:, 1:-1] + 1) % 8, noisy.rule(a[:, :-2], a[:, 1:-1])
    differ = plus_one != rule
    assert (a[:, 2:] == plus_one)[differ].float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert ((a[:, 2:] == plus_one) | (a[:, 2:] == rule)).all()
    x, y = noisy.batch(nb03.Run(batch_size=5, context=9), draws)
    assert x.shape == y.shape == (5, 9)
    assert torch.equal(x[:, 2:], y[:, 1:-1])
    assert (y[:, 0] == nb03.UNASKED).all()
    assert (y[:, 1:] >= 0).all()


@pytest.mark.parametrize(("records", "length"), [(1, 16), (5, 16), (16, 16), (16, 100)])
def test_recall(nb03, records, length):
    task = nb03.Recall((16, 100), (1, 5, 16))
    tokens, targets, places = task.sequences(40, records, length, torch.Generator().manual_seed(0))
    questions = min(8, records)
    assert tokens.shape == targets.shape == (40, length + questions)
    assert places.shape == (40, questions)
    assert task.size == 16 * 16 + 16 + 16 + 16
    assert (targets[:, :length] == nb03.UNASKED).all()
    for row, answers, where in zip(tokens.tolist(), targets.tolist(), places.tolist(), strict=True):
        book = {token // 16: token % 16 for token in row[:length] if token < 256}
        assert len(book) == sum(token < 256 for token in row[:length]) == records  # no key twice
        assert all(256 <= token < 272 for token in row[:length] if token >= 256)
        asked = [token - 272 for token in row[length:]]
        assert len(set(asked)) == questions
        assert [token - 288 for token in answers[length:]] == [book[key] for key in asked]
        assert [row[place] // 16 for place in where] == asked
    assert len({tuple(sorted(t // 16 for t in row[:length] if t < 256)) for row in tokens.tolist()}) > 1 or records == 16
    other = task.sequences(40, records, length, torch.Generator().manual_seed(0))
    assert torch.equal(tokens, other[0])


def test_recall_batches(nb03):
    task, draws, run = nb03.Recall((8, 20), (2, 8)), torch.Generator().manual_seed(0), nb03.Run(batch_size=6)
    shapes = {tuple(task.batch(run, draws)[0].shape) for _ in range(40)}
    assert shapes == {(6, 10), (6, 16), (6, 22), (6, 28)}
    for lengths, records, keys in (((8,), (9,), 16), ((20,), (17,), 16)):
        with pytest.raises(ValueError, match="lower records"):
            nb03.Recall(lengths, records, keys=keys)


def test_recall_tests_are_the_same_each_time(nb03):
    task = nb03.Recall((8, 20), (2, 8))
    first, second = (nb03.recall_tests(task, 2, 8, 10) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0][:, :8], nb03.recall_tests(task, 8, 8, 10)[0][:, :8])


def test_text(nb03):
    data = nb03.Text("hello world, hello moon. " * 40)
    assert (len(data.train), len(data.validation)) == (900, 100)
    assert data.size == len(set("hello world, hello moon. "))
    assert data.decode(torch.cat([data.train, data.validation])) == "hello world, hello moon. " * 40
    x, y = data.batch(nb03.Run(batch_size=6, context=9), torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (6, 9)
    assert torch.equal(x[:, 1:], y[:, :-1])
    windows = {tuple(w.tolist()) for w in data.train.unfold(0, 10, 1)}
    assert all(tuple([*a.tolist(), b.tolist()[-1]]) in windows for a, b in zip(x, y, strict=True))


def test_text_loss_and_correct(nb03, small, text):
    model = model_of(nb03, small, text.size)
    tokens = text.validation[:100].clone()
    losses, hits = [], []
    for begin in range(0, 96, 12):
        logits = model(tokens[None, begin : begin + 12])[0]
        target = tokens[begin + 1 : begin + 13]
        losses.append(F.cross_entropy(logits, target, reduction="none"))
        hits.append(logits.argmax(-1) == target)
    assert nb03.text_loss(model, tokens, 12) == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    x, y = tokens[:96].view(8, 12), tokens[1:97].view(8, 12).clone()
    torch.testing.assert_close(nb03.correct(model, x, y), torch.stack(hits).float())
    y[:, :7] = nb03.UNASKED
    torch.testing.assert_close(nb03.correct(model, x, y), torch.stack(hits)[:, 7:].float())
    many = torch.randint(text.size, (300, 3))  # more than one batch of the evaluation
    assert nb03.correct(model, many, many).shape == (300, 3)


# --- training


def test_learning_rate(nb03):
    run = nb03.Run(steps=1000, warmup=100, learning_rate=0.5, final_rate=0.1)
    assert [nb03.learning_rate(step, run) for step in (0, 49, 99)] == pytest.approx([0.005, 0.25, 0.5])
    assert [nb03.learning_rate(step, run) for step in (100, 550, 1000)] == pytest.approx([0.5, 0.275, 0.05])


def test_optimizer_decays_matrices_only(nb03, small):
    model = nb03.Transformer(small, V)
    optimizer = nb03.make_optimizer(model, small)
    decayed, kept = optimizer.param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    vectors = [block.attention.vectors for block in model.blocks]
    assert all(any(p is q for q in kept["params"]) for p in vectors)
    assert all(p.ndim == 2 for p in decayed["params"])
    assert all(p.ndim == 1 or any(p is q for q in vectors) for p in kept["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert optimizer.defaults["betas"] == (0.9, small.beta2)


@pytest.mark.parametrize("kind", ["ordinary", "differential", "v2"])
def test_training_learns(nb03, small, text, kind):
    seen = []
    run = replace(small, kind=kind, steps=60)
    loss = lambda model: nb03.text_loss(model, text.validation, 12)
    model, log = nb03.train(run, text, 0, loss, eval_every=25, report=lambda *point: seen.append(point))
    assert log["step"] == [25, 50, 60]
    assert log["score"][-1] < 2.3 < math.log(text.size) < log["loss"][0] + 0.4
    assert log["score"][-1] == pytest.approx(loss(model), rel=1e-5)
    assert seen[:2] == [("loss", log["loss"][0], 25), ("score", log["score"][0], 25)]
    assert [len(values) for values in log["lambda"]] == [2 * (kind == "differential")] * 3
    assert not model.training
    again = nb03.train(run, text, 0, loss, eval_every=60)[1]
    assert again["score"][-1] == log["score"][-1]
    assert again["loss"][0] == pytest.approx(np.dot(log["loss"], [25, 25, 10]) / 60, rel=1e-5)
    assert nb03.train(run, text, 1, loss, eval_every=60)[1]["score"] != again["score"]


def test_training_one_step_by_hand(nb03, small, text):
    """Clipping, warm-up, AdamW: the weights after two steps from PyTorch's parts."""
    run = replace(small, steps=2, warmup=2, clip=0.05, learning_rate=0.01)
    ours, _ = nb03.train(run, text, 5, lambda model: 0.0)
    torch.manual_seed(5)
    model, draws = nb03.Transformer(run, text.size), torch.Generator().manual_seed(5)
    decayed = [p for n, p in model.named_parameters() if p.ndim == 2 and "vectors" not in n]
    kept = [p for n, p in model.named_parameters() if p.ndim < 2 or "vectors" in n]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": kept, "weight_decay": 0.0}], betas=(0.9, 0.99))
    for rate in (0.005, 0.01):
        x, y = text.batch(run, draws)
        optimizer.zero_grad()
        F.cross_entropy(model(x).transpose(1, 2), y).backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        for p in model.parameters():
            p.grad *= min(1.0, 0.05 / norm)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    for a, b in zip(ours.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_targets_that_are_not_asked_do_not_count(nb03, small):
    class Half:
        size = V

        def batch(self, run, generator):
            y = torch.full((4, 12), 3)
            y[:, ::2] = nb03.UNASKED
            return torch.zeros(4, 12, dtype=torch.long), y

    model, log = nb03.train(replace(small, steps=40), Half(), 0, lambda model: 0.0)
    assert log["loss"][-1] < 2.0
    assert (model(torch.zeros(1, 12, dtype=torch.long)).argmax(-1) == 3).all()


def test_divergence_is_named(nb03, small, text):
    with pytest.raises(RuntimeError, match=r"diverged before step .*lower learning_rate"):
        nb03.train(replace(small, learning_rate=1e30, warmup=1, steps=20), text, 0, lambda model: 0.0, eval_every=10)


def test_train_seeds(nb03, small, text, tmp_path, monkeypatch):
    """Each seed by itself, with curves in ClearML and a checkpoint that a second call finds."""
    monkeypatch.setattr(nb03, "CHECKPOINTS", str(tmp_path))
    reported = []
    logger = types.SimpleNamespace(report_scalar=lambda *point: reported.append(point))
    score = lambda model: nb03.text_loss(model, text.validation, 12)
    runs = nb03.train_seeds("task", small, text, score, (3, 4), logger, torch.device("cpu"), 15)
    for seed, (model, log) in zip((3, 4), runs, strict=True):
        alone, own = nb03.train(small, text, seed, score, eval_every=15)
        assert log["score"] == own["score"]
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))
        assert ("task", f"score, seed {seed}", own["score"][0], 15) in reported
    assert len(list(tmp_path.iterdir())) == 2
    assert nb03.train_seeds("task", small, text, score, (3, 4), logger, torch.device("cpu"), 15)[0][1] == runs[0][1]


def test_amp_dtype(nb03, monkeypatch):
    check_amp_dtype(nb03, monkeypatch)


def test_float16_scales_the_loss(nb03, small, text, monkeypatch):
    """The gradients that reach the clipping are those of the unscaled loss."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *arguments: norms.append(clip(*arguments).item()))
    for dtype in (torch.float32, torch.float16):
        nb03.train(replace(small, steps=1), text, 0, lambda model: 0.0, dtype=dtype)
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


# --- looking inside


def test_attention_maps(nb03, small):
    """The maps times the values are what the module makes of them; A is A1 - lambda A2."""
    for kind in ("differential", "ordinary"):
        model, tokens = model_of(nb03, small, kind=kind), torch.randint(V, (2, 9))
        inputs = []
        keep = lambda module, arguments, inputs=inputs: inputs.append(arguments)
        hooks = [block.attention.register_forward_pre_hook(keep) for block in model.blocks]
        maps = nb03.attention_maps(model, tokens)
        for hook in hooks:
            hook.remove()
        assert len(maps) == 2
        for block, layer, arguments in zip(model.blocks, maps, inputs, strict=True):
            *qk, v = block.attention.project(*arguments)
            if kind == "ordinary":
                expected = F.scaled_dot_product_attention(*qk, v, is_causal=True)
                assert set(layer) == {"A", "v"}
            else:
                expected = nb03.differential_attention(*qk, v, block.attention.lam())
                torch.testing.assert_close(layer["A"], layer["A1"] - block.attention.lam() * layer["A2"])
                torch.testing.assert_close(layer["A1"] @ v, F.scaled_dot_product_attention(qk[0], qk[2], v, is_causal=True))
            torch.testing.assert_close(layer["A"] @ layer["v"], expected)
        assert all(not b.attention._forward_pre_hooks for b in model.blocks)


def test_attention_noise_against_a_loop(nb03):
    attention, v, places = torch.randn(3, 2, 9, 9, dtype=double), torch.randn(3, 2, 9, 5, dtype=double), torch.randint(5, (3, 4))
    measured = nb03.attention_noise(attention, v, places, 5)  # 5 of context, 4 questions
    for h in range(2):
        rows = []
        for b, q in itertools.product(range(3), range(4)):
            row, hit = attention[b, h, 5 + q], places[b, q].item()
            rest = [n for n in range(5) if n != hit]
            noise = sum(row[n] * v[b, h, n] for n in rest)
            rows.append([
                row[hit].abs() / row.abs().sum(), sum(row[n] for n in rest), row[hit], sum(row[n].abs() for n in rest), row[hit].abs(),
                noise.norm(), (row[hit] * v[b, h, hit]).norm(),
            ])  # fmt: skip
        share, net, answer, absolute, size, noise, message = torch.tensor(rows, dtype=double).mean(0).tolist()
        expected = {"share": share, "net": net / answer, "absolute": absolute / size, "output": noise / message}
        assert {name: x[h].item() for name, x in measured.items()} == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["ordinary", "differential"])
def test_best_head(nb03, kind):
    """Chosen by the first half of the tests, measured on the second."""
    task = nb03.Recall((16,), (4,))
    run = nb03.Run(kind=kind, n_layer=2, n_head=4, d_model=32, context=24)
    model = nb03.Transformer(run, task.size)
    tests = nb03.recall_tests(task, 4, 16, 20)
    values, layer, head = nb03.best_head(model, tests, 16)
    halves = [
        [{name: nb03.attention_noise(m[name], m["v"], tests[2][part], 16) for name in m if name != "v"}
         for m in nb03.attention_maps(model, tests[0][part])]
        for part in (slice(10), slice(10, 20))
    ]  # fmt: skip
    shares = {(i, h): share.item() for i, maps in enumerate(halves[0]) for h, share in enumerate(maps["A"]["share"])}
    assert (layer, head) == max(shares, key=shares.get)
    assert set(values) == ({"A"} if kind == "ordinary" else {"A", "A1", "A2"})
    for name, each in values.items():
        assert each == pytest.approx({measure: x[head].item() for measure, x in halves[1][layer][name].items()})


@pytest.mark.parametrize("kind", ["ordinary", "differential"])
def test_magnitudes(nb03, small, kind):
    model, tokens = model_of(nb03, small, kind=kind), torch.randint(V, (2, 9))
    x, stream, logits = model.embedding(tokens) * math.sqrt(32), [], []
    for block in model.blocks:
        *qk, _ = block.attention.project(block.norms[0](x), model.table)
        q, k = torch.cat(qk[: len(qk) // 2], 1), torch.cat(qk[len(qk) // 2 :], 1)
        for m in range(9):
            logits.append((torch.einsum("bhd,bhnd->bhn", q[:, :, m], k[:, :, : m + 1]) / math.sqrt(8)).abs().flatten())
        x = block(x, model.table)
        stream.append(x.abs().flatten())
    measured = nb03.magnitudes(model, tokens)
    torch.testing.assert_close(measured["activations"], torch.cat(stream).sort(descending=True).values.detach())
    torch.testing.assert_close(measured["attention logits"], torch.cat(logits).sort(descending=True).values.detach())
    assert not any(block._forward_hooks or block.attention._forward_pre_hooks for block in model.blocks)


# --- generation


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 0.6), (0.7, 0.9), (2.0, 1.0), (1.0, 1e-6)])
def test_drawn_frequencies(nb03, temperature, top_p):
    """20,000 draws against transformers' nucleus."""
    logits = torch.randn(1, 12) * 2
    p = TopPLogitsWarper(top_p)(None, logits / temperature).softmax(-1)[0] if top_p < 1 else (logits[0] / temperature).softmax(-1)
    tokens = nb03.draw(logits.expand(20_000, -1), temperature, top_p, torch.Generator().manual_seed(0)).flatten()
    counts = tokens.bincount(minlength=12).float() / 20_000
    assert counts[p == 0].sum() == 0
    assert (counts - p).abs().max() < 0.015


def test_greedy_draw_and_errors(nb03):
    logits = torch.randn(5, 9)
    assert torch.equal(nb03.draw(logits, 0, 0.9, None), logits.argmax(-1, keepdim=True))
    for temperature, top_p in ((-0.1, 1.0), (1.0, 0.0), (1.0, 1.1), (0, 5)):
        with pytest.raises(ValueError, match="must lie in"):
            nb03.draw(logits, temperature, top_p, None)


@pytest.mark.parametrize("kind", ["ordinary", "differential", "v2"])
def test_greedy_generation_against_a_loop(nb03, small, kind):
    """Beyond the context the window slides."""
    model, tokens = model_of(nb03, small, kind=kind), torch.randint(V, (2, 5))
    expected = tokens
    for _ in range(15):
        expected = torch.cat([expected, model(expected[:, max(0, expected.shape[1] - 12) :])[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(nb03.generate(model, tokens, 15, temperature=0), expected)
    assert torch.equal(nb03.generate(model, tokens, 0), tokens)
    with pytest.raises(ValueError, match="empty prompt"):
        nb03.generate(model, tokens[:, :0], 3)


def test_grid(nb03, small, monkeypatch):
    """Greedy fills a row; each other setting has its own value, and the measure sees two tokens of the prompt."""
    asked = []
    model, prompts = model_of(nb03, small), torch.randint(V, (3, 4))

    def fake(model, prompts, n_new, temperature, top_p, generator):
        asked.append((temperature, top_p))
        return torch.cat([prompts, torch.full((3, n_new), len(asked))], 1)

    monkeypatch.setattr(nb03, "generate", fake)
    table = nb03.grid_of([(model, None)] * 2, prompts, 5, lambda tokens: tokens[0, -1].item())
    assert table.shape == (2, len(nb03.TEMPERATURES), len(nb03.NUCLEI))
    assert (table[0, 0] == 1).all()
    assert table[0, 1:].flatten().tolist() == list(range(2, 2 + table[0, 1:].size))
    assert set(asked[1:17]) == {(t, p) for t in nb03.TEMPERATURES[1:] for p in nb03.NUCLEI}
    shapes = nb03.grid_of([(model, None)], prompts, 5, lambda tokens: tokens.shape[1])
    assert (shapes == 7).all()


# --- measuring and reporting


def test_peak_memory_and_turns(nb03):
    check_peak_memory(nb03)
    check_seconds_in_turns(nb03)


def test_fused_needs_less_memory(nb03):
    """The maps grow with the square of the length, the fused kernel's memory with the length."""
    peak = {
        length: {name: nb03.peak_memory(case, "cpu") for name, case in nb03.speed_cases(length, "cpu").items()} for length in (256, 512)
    }
    maps = 2 * 4 * 512**2 * 4  # bytes of A1 and A2
    assert peak[512]["explicit"] > 2 * maps
    assert peak[512]["fused"] < peak[512]["explicit"] / 2
    assert peak[512]["fused"] / peak[256]["fused"] == pytest.approx(2, rel=0.1)
    assert peak[512]["explicit"] / peak[256]["explicit"] > 3.5


def test_speed_cases_compute_the_same(nb03):
    cases = nb03.speed_cases(64, "cpu")
    explicit, fused = cases["explicit"](), cases["fused"]()
    for a, b in zip(explicit, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert nb03.kernel_of(cases["fused"]) == "flash_attention_for_cpu"
    assert nb03.kernel_of(cases["explicit"]) == "none fused"


def test_tables_and_statistics(nb03):
    check_statistics(nb03)
    difference = np.array([0.1, 0.3, 0.2])
    expected = f"+0.2000 ± {np.std(difference, ddof=1) / math.sqrt(3):.4f}"
    assert nb03.paired([1.1, 2.3, 3.2], [1, 2, 3]) == expected
    log = {"step": [10, 20, 30], "score": [0.2, 0.9, 0.7]}
    assert [nb03.steps_to(log, level) for level in (0.1, 0.5, 0.95)] == ["10", "20", "never"]
    assert nb03.words("rst, We've\nspok'n: O! and the la") == ["we", "ve", "spok", "n", "o", "and", "the"]


def test_recall_accuracy(nb03):
    task = nb03.Recall((16,), (4,))
    model = nb03.Transformer(nb03.Run(n_layer=1, context=24, d_model=32), task.size)
    tokens, targets, _ = nb03.recall_tests(task, 4, 16, 30)
    expected = (model(tokens).argmax(-1) == targets)[targets >= 0].float().mean().item()
    assert nb03.recall_accuracy([(model, None)] * 2, task, 4, 16, 30) == pytest.approx([expected] * 2)


def test_presets(nb03):
    """Baseline and variants share their budgets; the text run has that of nanoGPT's CPU command; three seeds or more."""
    assert all(nb03.PRESETS[preset].seeds >= 3 for preset in ("cpu", "gpu"))
    run = nb03.PRESETS["cpu"].text
    assert (run.n_layer, run.n_head, run.d_model, run.context, run.batch_size, run.steps) == (4, 4, 128, 64, 12, 2000)
    for config in nb03.PRESETS.values():
        assert config.recall.context >= max(config.recall_lengths) + 8
        assert set(config.recall_lengths) <= set(config.test_lengths)
        assert len([n for n in config.test_lengths if n + 8 <= config.recall.context]) > len(config.recall_lengths)
    assert set(nb03.VARIANTS) >= {"differential", "ordinary", "version 2", "no per-head norm"}
