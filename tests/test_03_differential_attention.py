"""Notebook 03 against independent implementations: transformers' DiffLlama, PyTorch's modules, closed forms and plain loops."""

import hashlib
import itertools
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from transformers import DiffLlamaConfig, DiffLlamaForCausalLM
from transformers.models.diffllama.modeling_diffllama import DiffLlamaAttention, DiffLlamaRotaryEmbedding, lambda_init_fn

from tests.checks import check_amp_dtype, check_no_leak

V = 13
FORMS = ("differential_attention", "fused_differential_attention", "split_differential_attention")
KINDS = ("ordinary", "differential", "v2", "wide")
double = torch.float64


@pytest.fixture(scope="module")
def small(nb03):
    """A small run with more than one pair of heads, layer and RoPE pair."""
    return nb03.Run(n_layer=2, n_head=4, d_model=32, context=12, batch_size=4, steps=30, warmup=5)


@pytest.fixture(scope="module")
def text(nb03):
    """A text with structure that a small model can learn."""
    words = "the cat sat on a mat and ate the rat".split()
    return nb03.Corpus(" ".join(np.random.default_rng(0).choice(words, 1500)))


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


@pytest.mark.parametrize("name", FORMS)
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
    for function in (getattr(nb03, name) for name in FORMS):
        leaves = [x.clone().requires_grad_() for x in inputs]
        y = function(*leaves, mask=mask)
        results.append((y, *torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum(), leaves)))
    for explicit, fused, split in zip(*results, strict=True):
        for other in (fused, split):
            torch.testing.assert_close(other, explicit, rtol=0, atol=1e-5 * max(1, explicit.abs().max().item()))


@pytest.mark.parametrize("name", FORMS)
def test_rows_sum_to_one_minus_lambda(nb03, name):
    q1, q2, k1, k2, v = pairs()
    for lam in (0.0, 0.2, 0.8, 1.0, 1.5):
        y = getattr(nb03, name)(q1, q2, k1, k2, torch.ones_like(v), lam)
        torch.testing.assert_close(y, torch.full_like(y, 1 - lam))


@pytest.mark.parametrize("name", FORMS)
def test_limits(nb03, name):
    """lambda = 0 is ordinary attention; equal maps cancel at lambda = 1; lambda may differ between heads and tokens."""
    function, (q1, q2, k1, k2, v) = getattr(nb03, name), pairs()
    torch.testing.assert_close(function(q1, q2, k1, k2, v, 0.0), F.scaled_dot_product_attention(q1, k1, v, is_causal=True))
    assert function(q1, q1, k1, k1, v, 1.0).abs().max() < 1e-12
    lam = torch.rand(2, 3, 7, 1, dtype=double)
    each = torch.stack([torch.stack([function(q1, q2, k1, k2, v, lam[b, h, t].item())[b, h, t] for t in range(7)])
                        for b in range(2) for h in range(3)])  # fmt: skip
    torch.testing.assert_close(function(q1, q2, k1, k2, v, lam), each.view(2, 3, 7, 8))


@pytest.mark.parametrize("name", FORMS)
def test_no_leak_from_the_future(nb03, name):
    inputs = pairs()
    before = getattr(nb03, name)(*inputs, 0.4)
    for x in inputs[2:]:
        x[:, :, 4] += 1.0
    moved = (getattr(nb03, name)(*inputs, 0.4) - before).abs().amax((0, 1, 3))
    assert moved[:4].max() == 0
    assert moved[4:].min() > 1e-6


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("causal", [True, False])
def test_gradients_by_finite_differences(nb03, name, causal):
    leaves = [x.requires_grad_() for x in (*pairs(B=1, H=2, T=4, d=2), torch.tensor(0.3, dtype=double))]
    assert torch.autograd.gradcheck(lambda *inputs: getattr(nb03, name)(*inputs, causal=causal), leaves)


@pytest.mark.parametrize("name", FORMS)
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
    for sign in (0, -1):  # nothing is subtracted; the maps are added
        other = nb03.DifferentialAttention(32, 2, layer=3, sign=sign)
        other.load_state_dict(module.state_dict())
        assert other.lam().item() == pytest.approx(sign * module.lam().item())
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
    H, d = module.n_pair, module.d
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
    with pytest.raises(ValueError, match="no multiple of n_pair 3"):
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


@pytest.mark.parametrize("kind", KINDS)
def test_model_does_not_see_the_future(nb03, small, kind):
    check_no_leak(model_of(nb03, small, kind=kind), V, 12)


@pytest.mark.parametrize("kind", KINDS)
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
    variant = nb03.Transformer(replace(run, initial=0.5, sign=-1, head_norm=False), 65)
    assert variant.lambdas() == pytest.approx([-0.5] * 8, abs=0.2)
    assert variant.blocks[0].attention.norm is None
    assert nb03.Transformer(replace(run, kind="ordinary"), 65).lambdas() == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_mixed_precision(nb03, small, kind, dtype):
    """Close to float32, with lambda in float32."""
    model, tokens = nb03.Transformer(replace(small, kind=kind), V), torch.randint(V, (2, 12))
    with torch.no_grad(), torch.autocast("cpu", dtype):
        logits, lambdas = model(tokens), [b.attention.lam() for b in model.blocks if kind == "differential"]
    torch.testing.assert_close(logits.float(), model(tokens), rtol=0, atol=0.03)
    assert all(lam.dtype == torch.float32 for lam in lambdas)


# --- tasks


@dataclass(frozen=True)
class Recurrence:
    """Mostly a_n = 2 a_(n-1) + 3 a_(n-2), now and then a_(n-1) + 1, both modulo `size`; the first two are random."""

    size: int = 5
    p: float = 0.1

    def batch(self, run, generator):
        a = torch.randint(self.size, (run.batch_size, run.context + 1), generator=generator)
        noise = torch.rand(a.shape, generator=generator) < self.p
        for n in range(2, run.context + 1):
            a[:, n] = torch.where(noise[:, n], a[:, n - 1] + 1, 2 * a[:, n - 1] + 3 * a[:, n - 2]) % self.size
        return a[:, :-1], a[:, 1:]


@pytest.mark.parametrize("kind", KINDS)
def test_a_known_rule_is_found(nb03, kind):
    """Every kind learns to predict as well as the rule itself, which errs where the noise strikes."""
    run = nb03.Run(kind=kind, n_layer=1, d_model=32, n_head=4, context=8, batch_size=32, steps=300, learning_rate=1e-2, warmup=20)
    data = Recurrence()
    model, _ = nb03.train(run, data, 0, lambda model: 0.0, eval_every=1000)
    x, y = data.batch(replace(run, batch_size=400), torch.Generator().manual_seed(77))
    right = (model(x).argmax(-1) == y)[:, 1:].float().mean().item()
    ruled = ((2 * x[:, 1:] + 3 * x[:, :-1]) % 5 == y[:, 1:]).float().mean().item()
    assert right > ruled - 0.02


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
    words = "hello world, hello moon. " * 40
    data = nb03.Corpus(words)
    assert (len(data.train), len(data.validation), len(data.test)) == (900, 50, 50)
    characters = sorted(set(words))
    assert data.size == len(characters)
    assert "".join(characters[i] for i in torch.cat([data.train, data.validation, data.test])) == words
    x, y = data.batch(nb03.Run(batch_size=6, context=9), torch.Generator().manual_seed(0))
    assert x.shape == y.shape == (6, 9)
    assert torch.equal(x[:, 1:], y[:, :-1])
    windows = {tuple(w.tolist()) for w in data.train.unfold(0, 10, 1)}
    assert all(tuple([*a.tolist(), b.tolist()[-1]]) in windows for a, b in zip(x, y, strict=True))


def test_text_of_any_alphabet_and_too_short_a_text(nb03):
    data = nb03.Corpus("жизнь — 🎭, été " * 30)
    assert data.size == len(set("жизнь — 🎭, été "))
    run = nb03.Run(context=64, batch_size=2)
    with pytest.raises(ValueError, match=r"450 characters leave 22 to a part, a window has 65: take a longer text"):
        data.batch(run, torch.Generator())


def test_last_window_of_the_text_is_drawn(nb03):
    data, run = nb03.Corpus("".join(map(chr, range(40, 140)))), nb03.Run(context=4, batch_size=500)
    y = data.batch(run, torch.Generator().manual_seed(0))[1]
    assert (y[:, -1].min(), y[:, -1].max()) == (4, 89)


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


@pytest.mark.parametrize("kind", KINDS)
def test_training_learns(nb03, small, text, kind):
    run = replace(small, kind=kind, steps=60, learning_rate=2e-3)
    loss = lambda model: nb03.text_loss(model, text.validation, 12)
    model, log = nb03.train(run, text, 0, loss, eval_every=25)
    assert log["step"] == [25, 50, 60]
    assert log["score"][-1] < 2.3 < math.log(text.size) < log["loss"][0] + 0.4
    assert log["score"][-1] == pytest.approx(loss(model), rel=1e-5)
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
    model = nb03.Transformer(run, text.size, torch.Generator().manual_seed(5))
    draws = torch.Generator().manual_seed(5)
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
                row[hit].abs() / row.abs().sum(), sum(row[n].abs() for n in rest), row[hit].abs(),
                noise.norm(), (row[hit] * v[b, h, hit]).norm(),
            ])  # fmt: skip
        share, absolute, size, noise, message = torch.tensor(rows, dtype=double).mean(0).tolist()
        expected = {"share": share, "absolute": absolute / size, "output": noise / message}
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
        expected = {measure: x[head].item() for measure, x in halves[1][layer][name].items()}
        assert {measure: value for measure, value in each.items() if measure != "shared"} == pytest.approx(expected)
    assert ("shared" in values["A"]) == (kind == "differential")


# --- measuring and reporting


def test_fused_needs_less_memory(nb03):
    """The maps grow with the square of the length, the fused kernel's memory with the length."""
    cases = {length: nb03.speed_cases(length, "cpu") for length in (256, 512)}
    peak = {length: {name: nb03.peak_memory(case, "cpu") for name, case in cases[length].items()} for length in cases}
    maps = 2 * 4 * 512**2 * 4  # bytes of A1 and A2
    assert peak[512]["explicit"] > 2 * maps
    assert peak[512]["fused"] < peak[512]["explicit"] / 2
    assert peak[512]["fused"] / peak[256]["fused"] == pytest.approx(2, rel=0.1)
    assert peak[512]["ordinary"] < peak[512]["split"] < peak[512]["fused"]  # padding is what the fused form pays for
    assert peak[512]["explicit"] / peak[256]["explicit"] > 3.5


def test_speed_cases_compute_the_same(nb03):
    cases = nb03.speed_cases(64, "cpu")
    assert list(cases) == ["explicit", "fused", "split", "ordinary"]
    for name in ("fused", "split"):
        for a, b in zip(cases["explicit"](), cases[name](), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    explicit, fused, _, ordinary = (sum(x.numel() for x in case()) for case in cases.values())
    assert explicit == fused == ordinary + 1  # as many numbers go in, and lambda


# --- the toy


def test_difference_of_maps(nb03):
    first, second = torch.randn(2, 5, 7, dtype=double)
    found = nb03.difference_of_maps(first, second, 0.3)
    for row, a, b in zip(found, first, second, strict=True):
        exp = [[math.exp(x) for x in scores] for scores in (a, b)]
        assert row.tolist() == pytest.approx([x / sum(exp[0]) - 0.3 * y / sum(exp[1]) for x, y in zip(*exp, strict=True)])


@pytest.mark.parametrize("shared", [0.0, 0.3, 1.0])
def test_noisy_scores(nb03, shared):
    scores = nb03.noisy_scores(20_000, 5, shared, 2.5, torch.Generator().manual_seed(0))
    assert scores.shape == (2, 20_000, 5)
    assert scores.mean(1)[0].tolist() == pytest.approx([0, 0, 2.5, 0, 0], abs=0.03)
    assert scores.mean(1)[1].tolist() == pytest.approx([0] * 5, abs=0.03)
    assert scores.std(1).flatten().tolist() == pytest.approx([1] * 10, abs=0.03)
    assert torch.corrcoef(scores[:, :, 2])[0, 1].item() == pytest.approx(shared, abs=0.03)
    assert abs(torch.corrcoef(scores[0, :, :2].T)[0, 1].item()) < 0.03  # keys are independent


def test_rest_per_answer(nb03):
    weights = torch.tensor([[0.2, -0.1, 0.3, 0.1], [0.0, 0.0, -0.5, 0.0]])
    assert nb03.rest_per_answer(weights).tolist() == pytest.approx([0.4 / 0.3, 0], abs=1e-6)


# --- the controls


@pytest.mark.parametrize(("kind", "heads"), [("ordinary", 4), ("wide", 2)])
def test_ordinary_with_a_norm(nb03, small, kind, heads):
    """Each head has a root mean square of 1 times a gain; heads of `wide` are half as many."""
    plain, normed = (nb03.make_attention(replace(small, kind=kind, head_norm=norm), 1).double() for norm in (None, True))
    assert plain.norm is None
    assert plain.n_head == normed.n_head == heads
    normed.load_state_dict(plain.state_dict(), strict=False)
    normed.norm.weight.data = torch.rand(32 // heads, dtype=double)
    x, table = torch.randn(2, 7, 32, dtype=double), nb03.rope_table(7, 32 // heads)
    y = F.scaled_dot_product_attention(*plain.project(x, table), is_causal=True)
    torch.testing.assert_close(plain(x, table), y.transpose(1, 2).flatten(2) @ plain.out.weight.T)
    y = y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt() * normed.norm.weight
    torch.testing.assert_close(normed(x, table), y.transpose(1, 2).flatten(2) @ normed.out.weight.T)


def test_wide_against_pytorch(nb03, small):
    """Heads twice as wide, with rotations of their own width."""
    model = model_of(nb03, small, kind="wide")
    assert model.table.shape == (12, 8)
    assert model_of(nb03, small, kind="ordinary").table.shape == (12, 4)
    attention, x = model.blocks[0].attention, torch.randn(1, 5, 32, dtype=double)
    q, k, v = (linear(x).view(1, 5, 2, 16).transpose(1, 2) for linear in (attention.q, attention.k, attention.v))
    turned = [torch.stack([z[:, :, m] @ rotation_matrix(m, 16).T for m in range(5)], 2) for z in (q, k)]
    expected = F.scaled_dot_product_attention(*turned, v, is_causal=True)
    torch.testing.assert_close(attention(x, model.table), attention.out(expected.transpose(1, 2).flatten(2)))


def test_kinds_share_their_first_weights(nb03, small):
    """Same seed, same matrices, whatever else a kind has; another seed, others."""
    build = lambda seed, **changes: nb03.Transformer(replace(small, **changes), V, torch.Generator().manual_seed(seed))
    weights = {kind: dict(build(3, kind=kind).named_parameters()) for kind in ("ordinary", "wide", "differential")}
    frozen = dict(build(3, sign=0, head_norm=False).named_parameters())
    for name, weight in weights["ordinary"].items():
        assert torch.equal(weight, weights["wide"][name])
        assert torch.equal(weight, weights["differential"][name])
        assert torch.equal(weight, frozen[name])
    assert not torch.equal(weights["ordinary"]["embedding.weight"], build(4).embedding.weight)
    torch.rand(5)  # the global generator has no say
    assert torch.equal(build(3).blocks[1].attention.vectors, weights["differential"]["blocks.1.attention.vectors"])


def test_variants(nb03, small):
    """The paper's rows and the controls, at nearly equal parameters."""
    assert set(nb03.VARIANTS) >= {"differential", "ordinary", "version 2", "no per-head norm", "wide + norm", "ordinary + norm"}
    run = replace(small, d_model=128)
    generator = lambda: torch.Generator().manual_seed(0)
    models = {name: nb03.Transformer(replace(run, **changes), 65, generator()) for name, changes in nb03.VARIANTS.items()}
    count = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    assert max(count.values()) < 1.01 * count["ordinary"] == 1.01 * min(count.values())
    normed = {name for name, model in models.items() if getattr(model.blocks[0].attention, "norm", None) is not None}
    assert normed == {
        "ordinary + norm", "wide + norm", "differential", "λ_init = 0.8", "λ_init = 0.5", "second map unused", "maps added"
    }  # fmt: skip
    assert models["second map unused"].lambdas() == [0, 0]
    assert models["maps added"].lambdas() == [-lam for lam in models["differential"].lambdas()]
    assert models["λ_init = 0.8"].lambdas() == pytest.approx([0.8] * 2, abs=0.2)
    named = set(itertools.chain(*nb03.SUBTRACTION.values(), *nb03.OTHERS.values(), *nb03.CORNER_PAIRS.values(), *nb03.LONG.values()))
    assert named <= set(nb03.VARIANTS)
    assert all("differential" in pair or "no per-head norm" in pair for pair in nb03.SUBTRACTION.values())


def test_nothing_subtracted_is_the_first_map_alone(nb03, small):
    attention, x = nb03.make_attention(replace(small, sign=0), 2).double(), torch.randn(2, 7, 32, dtype=double)
    q1, _, k1, _, v = attention.project(x)
    y = (1 - nb03.lambda_init(2)) * attention.norm(F.scaled_dot_product_attention(q1, k1, v, is_causal=True))
    torch.testing.assert_close(attention(x), attention.out(y.transpose(1, 2).flatten(2)))


# --- the study's parts


def test_learned_and_with_weights(nb03, small, text):
    run, cpu = replace(small, steps=20), torch.device("cpu")
    found = nb03.learned(run, text, nb03.Corpus, 3, nb03.text_score, nb03.text_measures, cpu)
    assert found["log"]["step"] == [3, 6, 9, 12, 15, 18, 20]
    model = nb03.with_weights(run, text, found["weights"], cpu)
    assert not model.training
    assert found["found"] == {
        "validation": pytest.approx(nb03.text_loss(model, text.validation, 12)),
        "test": pytest.approx(nb03.text_loss(model, text.test, 12)),
    }
    assert nb03.text_score(model, text) == pytest.approx(nb03.text_loss(model, text.validation[:2049], 12))
    twin = nb03.train(run, text, 3, lambda model: 0.0)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_trainings_are_remembered_by_all_that_changes_them(nb03, small, text, tmp_path):
    """Settings, data, seed and what is measured are in the name; a second call trains nothing."""
    run, asked = replace(small, steps=3), []

    def look(model, data):
        asked.append(model)
        return {"validation": 0.0}

    arguments = (run, text, nb03.Corpus, 0, nb03.text_score, look, "cpu")
    first = nb03.remembered(tmp_path, "run", nb03.learned, *arguments)
    again = nb03.remembered(tmp_path, "run", nb03.learned, *arguments)
    assert len(asked) == 1
    assert first["log"] == again["log"]
    others = (
        (0, replace(run, kind="wide")), (0, replace(run, head_norm=True)), (1, nb03.Corpus(text.text[:900])), (3, 1), (4, nb03.recall_score)
    )  # fmt: skip
    names = {nb03.identity(nb03.learned, *arguments)}
    for place, value in others:
        names.add(nb03.identity(nb03.learned, *[value if n == place else part for n, part in enumerate(arguments)]))
    assert len(names) == 6
    tasks = (nb03.Recall((8,), (2,)), nb03.Recall((8, 9), (2,)), nb03.Recall((8,), (2,), keys=17))
    assert len({nb03.identity(task) for task in tasks}) == 3


def test_tuned_takes_the_best_rate_of_each(nb03, small):
    calls = []

    def fit(run, seed):
        calls.append((run.kind, run.learning_rate, run.steps, seed))
        wanted = rates[0] if run.kind == "wide" else rates[-1]
        return {"found": {"validation": abs(run.learning_rate - wanted)}}

    rates = (0.1, 0.2, 0.4)
    variants = {"a": {"kind": "wide"}, "b": {"kind": "ordinary", "head_norm": True}}
    chosen, tried = nb03.tuned(variants, fit, replace(small, steps=20), (77, 78), min, rates, 0.25)
    expected = itertools.product(("wide", "ordinary"), rates, (5,), (77, 78))
    assert sorted(calls) == sorted(expected)
    assert chosen["a"] == replace(small, steps=20, kind="wide", learning_rate=0.1)
    assert chosen["b"] == replace(small, steps=20, kind="ordinary", head_norm=True, learning_rate=0.4)
    assert tried.loc["b"].tolist() == pytest.approx([0.3, 0.2, 0.0])
    assert nb03.tuned(variants, fit, small, (77,), max, rates, 1)[0]["a"].learning_rate == 0.4


@pytest.mark.parametrize("best", [min, max])
def test_a_rate_that_diverges_is_not_chosen(nb03, small, best):
    def fit(run, seed):
        if run.learning_rate == 0.2:
            raise RuntimeError("the loss diverged before step 3: lower learning_rate 0.2")
        return {"found": {"validation": run.learning_rate}}

    chosen, tried = nb03.tuned({"a": {}}, fit, small, (0, 1), best, (0.1, 0.2, 0.4), 1)
    assert chosen["a"].learning_rate == {min: 0.1, max: 0.4}[best]
    assert math.isinf(tried.loc["a", "rate 0.2"])


def test_rates_are_chosen_by_the_mean_over_seeds(nb03, small):
    found = {(0.1, 0): 0.9, (0.1, 1): 0.1, (0.2, 0): 0.4, (0.2, 1): 0.4}
    fit = lambda run, seed: {"found": {"validation": found[run.learning_rate, seed]}}
    chosen, tried = nb03.tuned({"a": {}}, fit, small, (0, 1), min, (0.1, 0.2), 1)
    assert chosen["a"].learning_rate == 0.2
    assert tried.loc["a"].tolist() == [0.5, 0.4]


def test_pairs_table(nb03, small):
    runs = {name: replace(small, learning_rate=rate) for name, rate in (("a", 0.1), ("b", 0.2))}
    values = {"a": [1.0, 1.2, 1.1], "b": [0.5, 0.6, 0.7]}
    table = nb03.pairs_table({"this": ("a", "b")}, values, runs, 4)
    assert table.index.tolist() == ["this: a less b"]
    assert table.iloc[0].to_dict() == nb03.difference_row(values["a"], values["b"], 4) | {"rates": "0.1, 0.2"}


def test_a_row_of_differences_allows_for_the_number_of_comparisons(nb03):
    first, second = [1.1, 1.3, 1.2, 1.26], [1.0, 1.1, 1.1, 1.1]
    found = nb03.difference_row(first, second, 7)
    difference = np.subtract(first, second)
    error = difference.std(ddof=1) / 2
    for key, level in (("95 %", 0.05), ("for all 7", 0.05 / 7)):
        half = scipy.stats.t.ppf(1 - level / 2, 3) * error
        assert found[key] == f"[{difference.mean() - half:+.3f}, {difference.mean() + half:+.3f}]"
    assert found["difference"] == "+0.140"
    assert found["told apart"] == "no"
    assert nb03.difference_row(first, second, 1)["told apart"] == "yes"
    assert "for all 1" not in nb03.difference_row(first, second)
    assert nb03.difference_row(second, first, 1)["told apart"] == "yes"


def test_by_depth(nb03):
    places = torch.tensor([[0, 3, 4, 11], [12, 15, 19, 8]])
    hits = torch.tensor([[1.0, 0, 1, 0], [1, 1, 0, 1]])
    assert nb03.by_depth(hits, places, 20).tolist() == [0.5, 1, 0.5, 1, 0]


def test_recall_measures(nb03):
    task = nb03.Recall((10, 16), (2, 4))
    model = nb03.Transformer(nb03.Run(n_layer=1, context=24, d_model=32), task.size)
    found = nb03.recall_measures(model, task)
    for name, seed in (("validation", nb03.VALIDATION_SEED), ("test", nb03.TEST_SEED)):
        tokens, targets, places = nb03.recall_tests(task, 4, 16, nb03.RECALL_TESTS, seed)
        hits = (model(tokens).argmax(-1) == targets)[targets >= 0].float()
        assert found[name] == pytest.approx(hits.mean().item())
        assert nb03.recall_score(model, task, seed) == pytest.approx(hits.mean().item())
    depths = [hits.view(-1, 4)[(places >= 3.2 * n) & (places < 3.2 * (n + 1))].mean().item() for n in range(5)]
    assert found["depth"] == pytest.approx(depths)
    assert not torch.equal(nb03.recall_tests(task, 4, 16, 9, nb03.VALIDATION_SEED)[0], nb03.recall_tests(task, 4, 16, 9)[0])


def test_means_over_heads_and_layers(nb03, small):
    """The authors' share, and the correlation of what two maps have on the rest: over heads, layers, questions, sequences."""
    task = nb03.Recall((10,), (3,))
    model = nb03.Transformer(replace(small, context=16), task.size)
    tests = nb03.recall_tests(task, 3, 10, 6)
    shares, shared = [], []
    for layer in nb03.attention_maps(model, tests[0]):
        for b, h, q in itertools.product(range(6), range(2), range(3)):
            row, hit = layer["A"][b, h, 10 + q].abs(), tests[2][b, q].item()
            shares.append((row[hit] / row.sum()).item())
            rest = [n for n in range(10) if n != hit]
            shared.append(np.corrcoef(*(layer[name][b, h, 10 + q, rest].numpy() for name in ("A1", "A2")))[0, 1])
    assert nb03.mean_of("share", model, tests, 10) == pytest.approx(np.mean(shares))
    assert nb03.mean_of("shared", model, tests, 10) == pytest.approx(np.mean(shared), rel=1e-4)


def test_shared_noise(nb03):
    """1 for proportional maps plus a constant, -1 for opposite ones; the answer and later keys have no say."""
    first, places = torch.rand(2, 3, 9, 9, dtype=double), torch.randint(6, (2, 3))
    second = 0.5 * first + 0.1
    second[..., 6:] = torch.rand(2, 3, 9, 3, dtype=double)
    where = places[:, None, :, None].expand(-1, 3, -1, 1)
    second[:, :, 6:].scatter_(-1, where, 7.0)
    assert nb03.shared_noise(first, second, places, 6).tolist() == pytest.approx([1.0] * 3)
    assert nb03.shared_noise(first, 1 - second, places, 6).tolist() == pytest.approx([-1.0] * 3)


def test_position_loss(nb03, small, text):
    model, tokens = model_of(nb03, small, text.size), text.validation[:60]
    losses = nb03.position_loss(model, tokens, 12, size=2)
    assert losses.shape == (4, 12)
    for n, t in itertools.product(range(4), range(12)):
        logits = model(tokens[None, 12 * n : 12 * n + 12])[0, t]
        assert losses[n, t].item() == pytest.approx(-logits.log_softmax(-1)[tokens[12 * n + t + 1]].item(), rel=1e-5)
    assert losses.mean().item() == pytest.approx(nb03.text_loss(model, tokens, 12), rel=1e-5)


def test_long_measures(nb03, text, monkeypatch):
    monkeypatch.setattr(nb03, "EDGES", (0, 4, 12))
    model = nb03.Transformer(nb03.Run(n_layer=1, d_model=32, context=12, n_head=4), text.size)
    found = nb03.long_measures(model, text)
    losses = nb03.position_loss(model, text.test, 12)
    assert found["positions"] == pytest.approx([losses[:, :4].mean().item(), losses[:, 4:].mean().item()])
    assert found["test"] == pytest.approx(losses.mean().item())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_quantise(nb03, bits):
    """Against integers by Python's rounding; never more than half a step away; zeros stay."""
    scores = torch.randn(4, 5, dtype=double) * 3
    found, most = nb03.quantise(scores, bits), scores.abs().max().item()
    step = most / (2 ** (bits - 1) - 1)
    assert found.flatten().tolist() == pytest.approx([round(x / step) * step for x in scores.flatten().tolist()])
    assert found.abs().max().item() == pytest.approx(most)
    assert len(found.unique()) <= 2**bits - 1
    assert nb03.quantise(torch.zeros(3), bits).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="1 bits leave no level"):
        nb03.quantise(scores, 1)


def test_quantised_map(nb03):
    """The future neither is seen nor sets the scale."""
    q, k = torch.randn(2, 1, 2, 6, 4, dtype=double)
    k[:, :, 5] *= 100  # only the last query sees this key
    q[:, :, 5] = 0
    found = nb03.quantised_map(q, k, 5)
    past = torch.ones(6, 6, dtype=torch.bool).tril()
    scores = (q @ k.transpose(-2, -1) / 2).masked_fill(~past, 0)
    step = scores.abs().max() / 15
    expected = torch.stack([
        torch.stack([F.pad(((scores[0, h, t, : t + 1] / step).round() * step).softmax(-1), (0, 5 - t)) for t in range(6)])
        for h in range(2)
    ])  # fmt: skip
    torch.testing.assert_close(found[0], expected)


def test_both_maps_are_quantised_on_one_scale(nb03, small, text):
    model = model_of(nb03, replace(small, n_layer=1), text.size)
    attention, (_, x, table) = model.blocks[0].attention, nb03.attention_inputs(model, text.test[:24].view(2, 12))[0]
    q1, q2, k1, k2, v = attention.project(x, table)
    past = torch.ones(12, 12, dtype=torch.bool).tril()
    scores = [(q @ k.transpose(-2, -1) / math.sqrt(8)).masked_fill(~past, 0) for q, k in ((q1, k1), (q2, k2))]
    step = max(s.abs().max() for s in scores) / 7
    maps = [((s / step).round() * step).masked_fill(~past, -math.inf).softmax(-1) for s in scores]
    found = nb03.quantised(model, 4).blocks[0].attention.attend(q1, q2, k1, k2, v, attention.lam())
    torch.testing.assert_close(found, (maps[0] - attention.lam() * maps[1]) @ v)


@pytest.mark.parametrize("changes", [{"kind": "ordinary"}, {"kind": "wide", "head_norm": True}, {}, {"head_norm": False}])
def test_quantised_model(nb03, small, text, changes):
    """With many bits the model as it was; with few another one; the rise is against the exact loss."""
    run = replace(small, **changes)
    model, tokens = model_of(nb03, run, text.size), text.test[:24].view(2, 12)
    exact = model(tokens)
    torch.testing.assert_close(nb03.quantised(model, 40)(tokens), exact)
    assert not torch.allclose(nb03.quantised(model, 3)(tokens), exact)
    weights = {name: weight.float() for name, weight in model.state_dict().items()}
    rises = nb03.rise(run, weights, text, (24, 3), 61, "cpu")
    loss = lambda bits: nb03.text_loss(nb03.quantised(nb03.with_weights(run, text, weights, "cpu"), bits), text.test[:61], 12)
    plain = nb03.text_loss(nb03.with_weights(run, text, weights, "cpu"), text.test[:61], 12)
    assert rises == pytest.approx([loss(24) - plain, loss(3) - plain])
    assert abs(rises[0]) < 1e-3


# --- data


def test_text_is_found_or_the_plays_stand_in(nb03, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COOKBOOK_DATA", str(tmp_path))
    monkeypatch.setattr(nb03, "download", lambda *arguments: False)
    with pytest.raises(FileNotFoundError, match=r"save https://\S+ as .*tinyshakespeare.txt.*COOKBOOK_DATA"):
        nb03.load_text()
    plays, tiny = b"All:\nSpeak, speak.\n", b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(nb03, "PLAYS", ("shakespeare.txt", hashlib.sha256(plays).hexdigest()))
    monkeypatch.setattr(nb03, "TINY", ("tinyshakespeare.txt", hashlib.sha256(tiny).hexdigest()))
    (tmp_path / "shakespeare.txt").write_bytes(plays)
    assert nb03.load_text() == plays.decode()
    assert "EMBEDDED TEXT shakespeare.txt" in capsys.readouterr().out
    (tmp_path / "tinyshakespeare.txt").write_bytes(tiny)
    assert nb03.load_text() == tiny.decode()
    for name in ("tinyshakespeare.txt", "shakespeare.txt"):
        (tmp_path / name).write_bytes(b"cut off")
        with pytest.raises(ValueError, match=rf"{name} is corrupt or incomplete \(7 bytes\)"):
            nb03.load_text()
        (tmp_path / "tinyshakespeare.txt").unlink(missing_ok=True)


def test_settings(nb03):
    """A run is a Config with an attention; the recall task is inside its alphabet."""
    assert issubclass(nb03.Run, nb03.Config)
    assert nb03.Run().n_head % 2 == 0
    assert nb03.Run().context >= 64
    assert len(nb03.RATES) >= 3
