"""Notebook 07 against independent implementations: transformers, NLTK, SciPy, closed forms and plain loops."""

import hashlib
import inspect
import itertools
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from tests.checks import check_amp_dtype, check_no_leak

V = 11


@pytest.fixture(scope="module")
def small(nb07):
    """A small run with more than one head, layer and RoPE pair."""
    return nb07.Run(n_layer=2, n_head=2, d_model=16, context=12, batch_size=4, steps=30, warmup=5)


@pytest.fixture(scope="module")
def corpus(nb07):
    """A text with structure that a small model can learn."""
    words = "the cat sat on a mat and ate the rat".split()
    text = " ".join(np.random.default_rng(0).choice(words, 1500))
    return nb07.make_corpus(text)


def model_of(nb07, run, **changes):
    """A model in float64 whose gains are no longer one."""
    model = nb07.Transformer(replace(run, **changes), V).double().eval()
    for p in model.parameters():
        if p.ndim == 1:
            torch.nn.init.normal_(p, mean=1.0, std=0.3)
    return model


# --- positions


def rotation_matrix(position, width, base):
    """The block-diagonal matrix of RoFormer's eq. 15."""
    matrix = torch.zeros(width, width, dtype=torch.float64)
    for j in range(width // 2):
        angle = position * base ** (-2 * j / width)
        cos, sin = math.cos(angle), math.sin(angle)
        matrix[2 * j : 2 * j + 2, 2 * j : 2 * j + 2] = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
    return matrix


@pytest.mark.parametrize("base", [10_000.0, 500.0])
def test_rope_is_the_rotation_matrix(nb07, base):
    x, positions = torch.randn(2, 3, 5, 8, dtype=torch.float64), torch.tensor([0, 1, 7, 100, 4095])
    expected = torch.stack([x[:, :, i] @ rotation_matrix(m.item(), 8, base).T for i, m in enumerate(positions)], 2)
    torch.testing.assert_close(nb07.apply_rope(x, positions, base), expected, rtol=0, atol=1e-12)


def test_rope_against_transformers(nb07):
    """Llama rotates (i, i + d/2); the same after moving the pairs there."""
    q, k, positions = torch.randn(2, 4, 9, 16), torch.randn(2, 4, 9, 16), torch.arange(3, 12)
    angle = positions[:, None] * 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    cos, sin = torch.cat([angle, angle], -1).cos()[None], torch.cat([angle, angle], -1).sin()[None]
    halves = lambda x: torch.cat([x[..., 0::2], x[..., 1::2]], -1)
    for ours, theirs in zip((q, k), apply_rotary_pos_emb(halves(q), halves(k), cos, sin), strict=True):
        torch.testing.assert_close(halves(nb07.apply_rope(ours, positions)), theirs, rtol=1e-5, atol=1e-5)


def test_rope_depends_on_relative_position_only_and_keeps_lengths(nb07):
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    at = lambda x, m: nb07.apply_rope(x, torch.tensor([m]))
    for shift in (1, 17, 100_000):
        torch.testing.assert_close((at(q, 9) * at(k, 4)).sum(), (at(q, 9 + shift) * at(k, 4 + shift)).sum(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(at(q, 123).norm(), q.norm())
    assert torch.equal(at(q, 0), q)


def test_rope_types_strides_and_gradients(nb07):
    positions = torch.arange(6)
    for dtype, tolerance in ((torch.float16, 2e-3), (torch.bfloat16, 2e-2), (torch.float32, 1e-5)):
        x = torch.randn(1, 2, 6, 8).to(dtype)
        rotated = nb07.apply_rope(x, positions)
        assert rotated.dtype == dtype
        assert torch.equal(rotated, nb07.apply_rope(x.float(), positions).to(dtype))  # one rounding, at the end
        torch.testing.assert_close(rotated.double(), nb07.apply_rope(x.double(), positions), rtol=0, atol=tolerance)
    wide = torch.randn(6, 2, 1, 9, dtype=torch.float64)[..., 1:].transpose(0, 2)  # odd offset, odd strides
    torch.testing.assert_close(nb07.apply_rope(wide, positions), nb07.apply_rope(wide.contiguous(), positions))
    torch.autograd.gradcheck(lambda x: nb07.apply_rope(x, positions), torch.randn(1, 1, 6, 4, dtype=torch.float64, requires_grad=True))


def test_rope_is_the_same_under_compilation(nb07):
    """There it takes another form."""
    x, rotation = torch.randn(2, 3, 6, 8, requires_grad=True), nb07.rope_rotation(torch.arange(6), 8)
    results = []
    for rotate in (nb07.rotate, torch.compile(nb07.rotate, backend="eager", fullgraph=True)):
        y = rotate(x, rotation)
        results.append((y, *torch.autograd.grad(y.square().sum() + y.sum(), x)))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled, rtol=1e-5, atol=1e-5)


def test_rope_is_exact_far_away(nb07):
    """float32 angles at a million are off by 0.03; the table is made in float64."""
    x = torch.randn(1, 1, 1, 4)
    expected = x[0, 0, 0].double() @ rotation_matrix(1_000_003, 4, 10_000.0).T
    torch.testing.assert_close(nb07.apply_rope(x, torch.tensor([1_000_003]))[0, 0, 0].double(), expected, rtol=0, atol=1e-5)


def test_rope_refuses_bad_input(nb07):
    with pytest.raises(ValueError, match="even width"):
        nb07.apply_rope(torch.randn(1, 1, 3, 5), torch.arange(3))
    with pytest.raises(ValueError, match="3 tokens need as many positions"):
        nb07.apply_rope(torch.randn(1, 1, 3, 4), torch.arange(2))


# --- parts of the model


def test_attention_formula_against_a_loop(nb07):
    q, k, v = torch.randn(3, 2, 2, 5, 4, dtype=torch.float64)
    expected = torch.zeros_like(v)
    for b, h, m in itertools.product(range(2), range(2), range(5)):
        weights = torch.stack([(q[b, h, m] @ k[b, h, n] / 2).exp() for n in range(m + 1)])
        expected[b, h, m] = sum(w * v[b, h, n] for n, w in enumerate(weights / weights.sum()))
    torch.testing.assert_close(nb07.attention(q, k, v), expected)


def test_self_attention_against_pytorch(nb07, small):
    """nn.MultiheadAttention with the same weights."""
    ours = nb07.CausalSelfAttention(small).double()
    theirs = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True, dtype=torch.float64)
    theirs.in_proj_weight.data, theirs.out_proj.weight.data = ours.qkv.weight.data, ours.out.weight.data
    x = torch.randn(3, 7, 16, dtype=torch.float64)
    future = torch.ones(7, 7, dtype=torch.bool).triu(1)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=future, need_weights=False)[0])


def test_rmsnorm_against_pytorch_and_transformers(nb07):
    x = torch.randn(4, 5, 24) * torch.tensor([1e-4, 1.0, 100.0, 1.0])[:, None, None]
    ours, theirs = nb07.RMSNorm(24), LlamaRMSNorm(24, eps=1e-6)
    torch.nn.init.normal_(ours.gain)
    theirs.weight.data = ours.gain.data
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours(x), F.rms_norm(x, (24,), ours.gain, 1e-6), rtol=1e-5, atol=1e-6)
    assert ours(torch.zeros(2, 24)).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rmsnorm_keeps_its_precision_in_mixed_precision(nb07, dtype):
    """The squares of a large residual stream exceed float16's 65,504."""
    x, norm = torch.randn(3, 384) * 1000, nb07.RMSNorm(384)
    with torch.autocast("cpu", dtype):
        y = norm(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, F.rms_norm(x, (384,)), rtol=1e-5, atol=1e-6)


def test_swiglu_against_transformers(nb07):
    ours = nb07.SwiGLU(48)
    hidden = ours.gate.out_features
    assert hidden == 128  # 8/3 * 48, a multiple of 128
    theirs = LlamaMLP(LlamaConfig(hidden_size=48, intermediate_size=hidden, num_attention_heads=4))
    for name, weight in (("gate_proj", ours.gate.weight), ("up_proj", ours.up.weight), ("down_proj", ours.out.weight)):
        getattr(theirs, name).weight.data = weight.data
    x = torch.randn(3, 48)
    torch.testing.assert_close(ours(x), theirs(x))


def test_hidden_units(nb07):
    """Today's block with 341 units has as many parameters as GPT-2's, to one in a thousand."""
    assert [nb07.SwiGLU(128, 341).gate.out_features, nb07.SwiGLU(128, 341).out.in_features] == [341, 341]
    assert [nb07.GELUNetwork(16, 40).up.out_features, nb07.GELUNetwork(16, 40).out.in_features] == [40, 40]
    assert nb07.GELUNetwork(16).up.out_features == 64
    run = nb07.Run(n_layer=1, n_head=4, d_model=128, context=8, **nb07.OTHER_ARMS["today's block, 341 units"])
    count = lambda **changes: sum(p.numel() for p in nb07.Transformer(replace(run, **changes), V).parameters())
    assert count() == pytest.approx(count(block="gpt2", hidden=0), rel=1e-3)
    assert count() - count(hidden=0) == 3 * 128 * (341 - 256)
    assert nb07.Block(replace(run, block="gpt2", hidden=40)).network.up.out_features == 40


@pytest.mark.parametrize(("width", "hidden"), [(8, 128), (128, 256), (192, 512), (384, 1024)])
def test_swiglu_width(nb07, width, hidden):
    assert nb07.SwiGLU(width).gate.out_features == hidden


def interleaved_to_halves(weight, n_head):
    """Rows of a query or key projection, moved from neighbouring pairs to Llama's halves."""
    rows = weight.view(n_head, -1, 2, weight.shape[1])
    return rows.transpose(1, 2).reshape(weight.shape)


@pytest.mark.parametrize("block", ["modern", "qk_norm"])
def test_whole_model_against_llama_and_qwen(nb07, small, block):
    """transformers' Llama, or with QK-norm Qwen3, gives our logits with our weights: blocks, RoPE, norms, tying, scale."""
    model = model_of(nb07, small, block=block)
    kind, theirs = (LlamaConfig, LlamaForCausalLM) if block == "modern" else (Qwen3Config, Qwen3ForCausalLM)
    config = kind(
        vocab_size=V,
        hidden_size=16,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        rms_norm_eps=1e-6,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
    )
    llama = theirs(config).double().eval()
    embedding = model.embedding.weight
    state = {"model.embed_tokens.weight": embedding * 4.0, "lm_head.weight": embedding, "model.norm.weight": model.norm.gain}
    for i, block in enumerate(model.blocks):
        q, k, v = block.attention.qkv.weight.chunk(3)
        weights = {
            "self_attn.q_proj": interleaved_to_halves(q, 2),
            "self_attn.k_proj": interleaved_to_halves(k, 2),
            "self_attn.v_proj": v,
            "self_attn.o_proj": block.attention.out.weight,
            "mlp.gate_proj": block.network.gate.weight,
            "mlp.up_proj": block.network.up.weight,
            "mlp.down_proj": block.network.out.weight,
            "input_layernorm": block.norms[0].gain,
            "post_attention_layernorm": block.norms[1].gain,
        }
        if block.attention.normalised:
            weights |= {"self_attn.q_norm": torch.ones(8), "self_attn.k_norm": torch.ones(8)}
        state |= {f"model.layers.{i}.{name}.weight": weight for name, weight in weights.items()}
    llama.load_state_dict(state)
    tokens = torch.randint(V, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), llama(tokens).logits, rtol=1e-4, atol=1e-5)  # Llama's cosines are in float32


def test_baseline_against_gpt2(nb07, small):
    """transformers' GPT-2 with our weights and zero biases gives the logits of the nanoGPT variant."""
    model = model_of(nb07, small, block="gpt2", position="learned", init="nanogpt")
    config = GPT2Config(
        vocab_size=V,
        n_positions=12,
        n_embd=16,
        n_layer=2,
        n_head=2,
        activation_function="gelu",
        tie_word_embeddings=False,
    )
    gpt2 = GPT2LMHeadModel(config).double().eval()
    state = {name: torch.zeros_like(value) if name.endswith("bias") else value for name, value in gpt2.state_dict().items()}
    state |= {
        "transformer.wte.weight": model.embedding.weight,
        "lm_head.weight": model.embedding.weight,
        "transformer.wpe.weight": model.position,
        "transformer.ln_f.weight": model.norm.weight,
    }
    for i, block in enumerate(model.blocks):
        weights = {
            "attn.c_attn": block.attention.qkv.weight.T,
            "attn.c_proj": block.attention.out.weight.T,
            "mlp.c_fc": block.network.up.weight.T,
            "mlp.c_proj": block.network.out.weight.T,
            "ln_1": block.norms[0].weight,
            "ln_2": block.norms[1].weight,
        }
        state |= {f"transformer.h.{i}.{name}.weight": weight for name, weight in weights.items()}
    gpt2.load_state_dict(state)
    tokens = torch.randint(V, (3, 12))
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), gpt2(tokens).logits)


@pytest.mark.parametrize("position", ["none", "learned", "rope"])
def test_no_leak_from_the_future(nb07, small, position):
    check_no_leak(model_of(nb07, small, position=position), V, 12)


@pytest.mark.parametrize("position", ["none", "learned", "rope"])
def test_only_position_encodings_see_order(nb07, small, position):
    """Without an encoding the last logits of one layer do not change when earlier tokens swap places."""
    model = model_of(nb07, small, position=position, n_layer=1)
    tokens = torch.tensor([[1, 2, 3, 4, 5]])
    same = torch.allclose(model(tokens)[0, -1], model(tokens[:, [2, 0, 3, 1, 4]])[0, -1])
    assert same == (position == "none")


def test_initialisation(nb07):
    run = nb07.Run(n_layer=8, n_head=4, d_model=128, context=64)
    model = nb07.Transformer(run, 65)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for block in model.blocks:
        assert block.attention.qkv.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert block.attention.out.weight.std().item() == pytest.approx(128**-0.5 / 4, rel=0.05)
        assert block.network.gate.weight.std().item() == pytest.approx(128**-0.5, rel=0.05)
        assert block.network.out.weight.std().item() == pytest.approx(256**-0.5 / 4, rel=0.05)
    theirs = nb07.Transformer(replace(run, init="nanogpt", block="gpt2", position="learned"), 65)
    assert theirs.position.std().item() == pytest.approx(0.02, rel=0.05)
    assert theirs.blocks[3].network.out.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    for m in (model, theirs):
        loss = F.cross_entropy(m(torch.randint(65, (16, 64))).flatten(0, 1), torch.randint(65, (16 * 64,)))
        assert loss.item() == pytest.approx(math.log(65), abs=0.1)


@pytest.mark.parametrize(
    ("init", "scale", "deviation"),
    [("fan_in", 128**0.5, 128**-0.5), ("matrices", 1, 128**-0.5), ("factor", 128**0.5, 0.02), ("nanogpt", 1, 0.02)],
)
def test_initialisations_and_their_halves(nb07, init, scale, deviation):
    run = nb07.Run(n_layer=8, n_head=4, d_model=128, context=64, block="gpt2", position="learned", init=init)
    model = nb07.Transformer(run, 65)
    assert model.scale == pytest.approx(scale)
    assert model.embedding.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.position.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.blocks[5].attention.qkv.weight.std().item() == pytest.approx(deviation, rel=0.05)
    into_stream = 0.02 if deviation == 0.02 else 512**-0.5
    assert model.blocks[5].network.out.weight.std().item() == pytest.approx(into_stream / 4, rel=0.05)


def test_the_factor_multiplies_embedding_and_positions(nb07, small):
    """With blocks that add nothing the logits are those of the scaled sum of both."""
    model = model_of(nb07, small, position="learned", init="factor", block="gpt2")
    for block in model.blocks:
        block.attention.out.weight.data.zero_()
        block.network.out.weight.data.zero_()
    tokens = torch.randint(V, (2, 12))
    x = 4.0 * (model.embedding.weight[tokens] + model.position)
    torch.testing.assert_close(model(tokens), F.layer_norm(x, (16,), model.norm.weight) @ model.embedding.weight.T)


def test_weights_are_tied(nb07, small):
    model = nb07.Transformer(small, V)
    per_layer = 4 * 16 * 16 + 3 * 16 * 128 + 2 * 16
    assert sum(p.numel() for p in model.parameters()) == V * 16 + 2 * per_layer + 16
    model(torch.zeros(1, 3, dtype=torch.long))[..., 1:].sum().backward()
    assert model.embedding.weight.grad[5].abs().sum() > 0  # token 5 is no input; its gradient comes from the output


def test_model_refuses_bad_input(nb07, small):
    with pytest.raises(ValueError, match="13 tokens exceed the context of 12"):
        nb07.Transformer(small, V)(torch.zeros(1, 13, dtype=torch.long))
    with pytest.raises(ValueError, match="position 'sinus' is unknown"):
        nb07.Transformer(replace(small, position="sinus"), V)
    with pytest.raises(ValueError, match="no multiple of n_head"):
        nb07.Transformer(replace(small, n_head=3), V)
    with pytest.raises(ValueError, match="RoPE rotates pairs"):
        nb07.Transformer(replace(small, n_head=16), V)


def test_dropout_acts_in_training_only(nb07, small):
    model, tokens = nb07.Transformer(replace(small, dropout=0.5), V), torch.randint(V, (2, 12))
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    assert torch.equal(model(tokens), model(tokens))


def test_dropout_acts_on_what_the_sublayers_add(nb07, small):
    """With everything dropped a block passes its input on, and the model sees no embedding."""
    run = replace(small, dropout=1.0)
    block, x = nb07.Block(run), torch.randn(2, 5, 16)
    assert torch.equal(block(x), x)
    assert not torch.equal(block.eval()(x), x)
    assert torch.equal(nb07.Transformer(run, V)(torch.randint(V, (2, 5))), torch.zeros(2, 5, V))


def test_extended_takes_longer_inputs(nb07, small):
    for position in ("rope", "none", "learned"):
        model = model_of(nb07, small, position=position)
        longer, tokens = nb07.extended(model, 20), torch.randint(V, (1, 20))
        torch.testing.assert_close(longer(tokens)[:, :12], model(tokens[:, :12]))
        assert model.context == 12
        assert longer(tokens).shape == (1, 20, V)
    wide = nb07.extended(nb07.Transformer(nb07.Run(n_layer=1, position="learned", d_model=64, context=8), V), 400)
    assert wide.position[8:].std().item() == pytest.approx(0.02, rel=0.03)  # as at initialisation


# --- data


def test_vocabulary(nb07):
    vocabulary = nb07.Vocabulary("hello\n")
    assert len(vocabulary) == 5
    assert vocabulary.encode("ole\n").tolist() == [4, 3, 1, 0]
    assert vocabulary.decode(vocabulary.encode("hello")) == "hello"
    assert vocabulary.encode("").shape == (0,)
    with pytest.raises(ValueError, match=r"unknown characters \['x', 'z'\]"):
        vocabulary.encode("hexz")


def test_corpus_is_split_without_overlap(nb07):
    text = "".join(chr(33 + i % 90) for i in range(1000))
    corpus = nb07.make_corpus(text)
    assert "".join(map(corpus.vocabulary.decode, corpus[:3])) == text
    assert [len(part) for part in corpus[:3]] == [900, 50, 50]


def test_a_text_that_is_too_short_is_named(nb07):
    text = "to be or not " * 100  # 1,300 characters, 65 in each held-out part
    nb07.make_corpus(text, least=65)
    with pytest.raises(ValueError, match=r"too short: 1,320 characters are wanted"):
        nb07.make_corpus(text, least=66)


def test_batches(nb07, small):
    tokens = torch.arange(40)
    x, y = nb07.draw_batch(tokens, replace(small, batch_size=500), torch.Generator().manual_seed(1))
    assert x.shape == y.shape == (500, 12)
    assert torch.equal(y, x + 1)
    assert torch.equal(x[:, 1:], x[:, :-1] + 1)
    assert (x[:, 0].min(), y[:, -1].max()) == (0, 39)  # all of the text is used
    again = nb07.draw_batch(tokens, replace(small, batch_size=500), torch.Generator().manual_seed(1))
    assert torch.equal(x, again[0])


# --- training


def test_learning_rate(nb07):
    run = nb07.Run(steps=1100, warmup=100, learning_rate=2.0, final_rate=0.1)
    rates = [nb07.learning_rate(step, run) for step in range(1101)]
    assert rates[0] == pytest.approx(0.02)
    assert rates[99] == rates[100] == pytest.approx(2.0)
    assert rates[600] == pytest.approx(2.0 * 0.55)  # half of the way
    assert rates[350] == pytest.approx(2.0 * (0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2))  # a quarter
    assert rates[1100] == pytest.approx(0.2)
    assert all(a > b for a, b in itertools.pairwise(rates[100:]))
    assert nb07.learning_rate(0, replace(run, warmup=0)) == pytest.approx(2.0)


def test_optimizer_decays_matrices_only(nb07, small):
    model = nb07.Transformer(replace(small, position="learned"), V)
    optimizer = nb07.make_optimizer(model, small)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))
    assert all(decay[p] == (0.1 if p.ndim == 2 else 0.0) for p in model.parameters())
    assert optimizer.defaults["fused"]
    assert optimizer.defaults["betas"] == (0.9, 0.99)


def test_muon_takes_the_matrices_of_the_blocks(nb07, small):
    """Each parameter is stepped by one of the two; Muon's steps are orthogonal and of AdamW's size, the others AdamW's own."""
    run = replace(small, muon=True, learning_rate=0.01)
    model, plain = (nb07.Transformer(run, V, torch.Generator().manual_seed(0)) for _ in range(2))
    muon, adamw = nb07.make_muon(model, run)
    held = [p for optimizer in (muon, adamw) for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    alone = nb07.make_optimizer(plain, run)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    tokens = torch.randint(V, (4, 12))
    for network, optimizers in ((model, (muon, adamw)), (plain, (alone,))):
        F.cross_entropy(network(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
        for optimizer in optimizers:
            optimizer.step()
    for (name, p), other in zip(model.named_parameters(), plain.parameters(), strict=True):
        if name.startswith("blocks") and p.ndim == 2:
            step = (before[name] * (1 - 0.01 * 0.1) - p.detach()) / 0.01
            values = torch.linalg.svdvals(step) / (0.2 * math.sqrt(max(p.shape)))
            assert values.median() == pytest.approx(1, abs=0.3)
            assert values.max() < 1.4
        else:
            assert torch.equal(p, other)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_after_an_overflow_no_optimiser_steps(nb07, small, corpus, monkeypatch, poison):
    """Where one gradient of AdamW's overflows in float16, Muon's matrices stay as they are too; the next step is a step."""
    norm, states = torch.nn.utils.clip_grad_norm_, []

    def clip(parameters, limit):
        parameters = list(parameters)
        states.append([p.detach().clone() for p in parameters])
        return norm(parameters, limit)

    unscale = torch.amp.GradScaler.unscale_

    def poisoned(self, optimizer):
        gains = [p for group in optimizer.param_groups for p in group["params"] if p.ndim == 1]
        if len(states) == 1 and gains:
            gains[0].grad[0] = poison
        unscale(self, optimizer)

    monkeypatch.setattr(torch.amp.GradScaler, "unscale_", poisoned)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    nb07.train(replace(small, steps=4, muon=True), corpus, seed=0, dtype=torch.float16)
    same = [[torch.equal(a, b) for a, b in zip(first, then, strict=True)] for first, then in itertools.pairwise(states)]
    assert [all(pairs) for pairs in same] == [False, True, False]
    assert all(part.isfinite().all() for part in states[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_muon_trains(nb07, small, corpus, dtype):
    run = replace(small, steps=60, learning_rate=1e-2)
    plain, _ = nb07.train(run, corpus, seed=0)
    model, log = nb07.train(replace(run, muon=True), corpus, seed=0, dtype=dtype)
    assert log["validation"][-1] < 2.2
    assert not torch.equal(model.embedding.weight, plain.embedding.weight)
    with pytest.raises(RuntimeError, match="diverged by step 2"):
        nb07.train(replace(run, muon=True, steps=2, warmup=0, learning_rate=float("inf")), corpus, seed=0)


def test_loss_by_position_against_a_loop(nb07, small):
    model, tokens = model_of(nb07, small), torch.randint(V, (100,))
    for stride in (None, 5):
        starts = range(0, 100 - 12, stride or 12)
        windows = torch.stack([tokens[i : i + 13] for i in starts])
        p = torch.stack([model(w[None, :-1])[0].log_softmax(-1) for w in windows])  # (W, 12, V)
        expected = -p.gather(-1, windows[:, 1:, None])[..., 0].mean(0)
        loss, accuracy = nb07.loss_by_position(model, tokens, 12, stride)
        np.testing.assert_allclose(loss, expected.detach(), rtol=1e-5)
        np.testing.assert_allclose(accuracy, (p.argmax(-1) == windows[:, 1:]).double().mean(0))
    model.train()
    nb07.loss_by_position(model, tokens, 12)
    assert model.training


def test_training_learns(nb07, small, corpus):
    run = replace(small, steps=200, learning_rate=1e-2)
    model, log = nb07.train(run, corpus, seed=0, eval_every=50)
    assert log["step"] == [50, 100, 150, 200]
    assert log["train"][-1] < 0.5 * math.log(len(corpus.vocabulary))
    assert log["validation"][-1] < 0.5 * math.log(len(corpus.vocabulary))
    assert not model.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_trains(nb07, small, corpus, dtype):
    """The loop of a GPU, loss scaler included, on a CPU."""
    run = replace(small, steps=60, learning_rate=1e-2, dropout=0.1)
    full, _ = nb07.train(run, corpus, seed=0, eval_every=60)
    model, log = nb07.train(run, corpus, seed=0, eval_every=60, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert log["validation"][-1] < 2.2
    assert not torch.equal(model.embedding.weight, full.embedding.weight)


def test_float16_alone_scales_the_loss(nb07, small, corpus, monkeypatch):
    scaled, scale = [], torch.amp.GradScaler.scale
    monkeypatch.setattr(torch.amp.GradScaler, "scale", lambda self, loss: scaled.append(scale(self, loss) / loss) or scale(self, loss))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        nb07.train(replace(small, steps=1), corpus, seed=0, dtype=dtype)
    assert [factor.item() for factor in scaled] == [1, 1, 65_536]


def test_gradients_are_clipped_unscaled(nb07, small, corpus, monkeypatch):
    """The loss scaler's factor of 65,536 is out of the gradients before they are clipped."""
    norms, clip = [], torch.nn.utils.clip_grad_norm_

    def watch(*arguments):
        found = clip(*arguments)
        norms.append(found.item())
        return found

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
    for dtype in (torch.float32, torch.float16):
        nb07.train(replace(small, steps=1), corpus, seed=0, dtype=dtype)
    assert norms[1] == pytest.approx(norms[0], rel=0.05)


def test_gradients_are_clipped(nb07, small, corpus, monkeypatch):
    seen = []
    clip = torch.nn.utils.clip_grad_norm_

    def watch(parameters, limit):
        parameters = list(parameters)
        seen.append(clip(parameters, limit).item())
        assert torch.cat([p.grad.flatten() for p in parameters]).norm() <= limit * 1.001
        return seen[-1]

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
    nb07.train(replace(small, steps=5, clip=0.01), corpus, seed=0)
    assert len(seen) == 5
    assert min(seen) > 0.01


def test_divergence_is_named(nb07, small, corpus):
    with pytest.raises(RuntimeError, match=r"diverged by step 2.*lower the rate"):
        nb07.train(replace(small, steps=2, warmup=0, learning_rate=float("inf")), corpus, seed=0)


def test_seeds_make_runs(nb07, small, corpus):
    a, b, c = (nb07.train(replace(small, steps=5), corpus, seed)[0].embedding.weight for seed in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


# --- sampling


def nucleus_by_loop(logits, top_p):
    p = logits.softmax(-1).tolist()
    kept, total = set(), 0.0
    for i in sorted(range(len(p)), key=p.__getitem__, reverse=True):
        kept.add(i)
        total += p[i]
        if total >= top_p:
            break
    return kept


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.9, 0.999])
def test_nucleus_against_transformers_and_a_loop(nb07, top_p):
    logits = torch.randn(300, 40, dtype=torch.float64) * 3
    ours = nb07.nucleus_filter(logits, top_p)
    assert torch.equal(ours, TopPLogitsWarper(top_p)(None, logits))
    for row, filtered in zip(logits[:50], ours, strict=False):
        assert set(filtered.isfinite().nonzero().flatten().tolist()) == nucleus_by_loop(row, top_p)


def test_nucleus_shapes_and_edges(nb07):
    logits = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    assert nb07.nucleus_filter(logits, 0.5).isfinite().tolist() == [True, False, False, False]
    assert nb07.nucleus_filter(logits, 0.5001).isfinite().tolist() == [True, True, False, False]
    assert nb07.nucleus_filter(logits.flip(0), 0.7).isfinite().tolist() == [False, False, True, True]
    assert torch.equal(nb07.nucleus_filter(logits, 1.0), logits)
    assert nb07.nucleus_filter(torch.zeros(2, 3, 5), 1e-9).isfinite().sum(-1).eq(1).all()
    masked = torch.tensor([0.0, -math.inf, -1.0])
    assert nb07.nucleus_filter(masked, 0.99).isfinite().tolist() == [True, False, True]
    for bad in (0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"top_p must lie in \(0, 1\]"):
            nb07.nucleus_filter(logits, bad)


def test_top_k_against_transformers(nb07):
    logits = torch.randn(50, 20)
    for k in (1, 5, 20):
        assert torch.equal(nb07.top_k_filter(logits, k), TopKLogitsWarper(k)(None, logits))
    assert torch.equal(nb07.top_k_filter(logits, 99), logits)
    with pytest.raises(ValueError, match="top_k must be at least 1"):
        nb07.top_k_filter(logits, 0)


@pytest.mark.parametrize("position", ["none", "learned", "rope"])
@pytest.mark.parametrize("pieces", [[12], [1] * 12, [5, 4, 1, 2]])
def test_cache_gives_the_same_logits(nb07, small, position, pieces):
    model, tokens = model_of(nb07, small, position=position), torch.randint(V, (3, 12))
    cache = nb07.KVCache(model, 3)
    with torch.no_grad():
        logits = torch.cat([model(piece, cache) for piece in tokens.split(pieces, 1)], 1)
        torch.testing.assert_close(logits, model(tokens), rtol=0, atol=1e-12)
    assert cache.length == 12
    with pytest.raises(ValueError, match="13 tokens exceed the context"):
        model(tokens[:, :1], cache)


def visible_window(length, context):
    """Where the window begins: it moves on by half a context as often as needed."""
    start = 0
    while length - start > context:
        start += context // 2
    return start


@pytest.mark.parametrize("prompt_length", [1, 11, 12, 13, 40])
def test_greedy_generation_against_a_loop(nb07, small, prompt_length):
    """Through several moves of the window, with and without the cache."""
    model, tokens = model_of(nb07, small), torch.randint(V, (2, prompt_length))
    expected = tokens
    for _ in range(30):
        window = expected[:, visible_window(expected.shape[1], 12) :]
        expected = torch.cat([expected, model(window)[:, -1].argmax(-1, keepdim=True)], 1)
    for use_cache in (True, False):
        assert torch.equal(nb07.generate(model, tokens, 30, temperature=0, use_cache=use_cache), expected)


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_p": 0.8}, {"top_k": 3}, {"temperature": 1.3, "top_k": 6, "top_p": 0.9}]
)
def test_sampling_is_the_same_with_and_without_cache(nb07, small, options):
    model, tokens = model_of(nb07, small), torch.randint(V, (4, 3))
    draw = lambda use_cache: nb07.generate(model, tokens, 25, use_cache=use_cache, generator=torch.Generator().manual_seed(3), **options)
    assert torch.equal(draw(True), draw(False))
    assert draw(True).shape == (4, 28)
    assert torch.equal(draw(True)[:, :3], tokens)


@pytest.mark.parametrize(("options", "filtered"), [
    ({"temperature": 0.5}, lambda nb, z: z / 0.5),
    ({"temperature": 2.0, "top_p": 0.6}, lambda nb, z: nb.nucleus_filter(z / 2.0, 0.6)),  # temperature first
    ({"top_k": 4}, lambda nb, z: nb.top_k_filter(z, 4)),
])  # fmt: skip
def test_sampled_frequencies(nb07, small, options, filtered):
    """First tokens of 20,000 texts against the distribution they are drawn from."""
    model = model_of(nb07, small)
    model.embedding.weight.data *= 15  # logits far from uniform
    prompt = torch.tensor([[1, 2, 3]])
    p = filtered(nb07, model(prompt)[:, -1].float())[0].softmax(-1).detach().numpy()
    tokens = nb07.generate(model, prompt.expand(20_000, -1), 1, generator=torch.Generator().manual_seed(0), **options)[:, -1]
    counts = np.bincount(tokens, minlength=V)
    assert counts[p == 0].sum() == 0
    likely = p * 20_000 > 5
    chi2 = ((counts - p * 20_000) ** 2 / (p * 20_000 + 1e-9))[likely].sum()
    assert chi2 < scipy.stats.chi2.ppf(0.9999, max(1, likely.sum() - 1))
    assert likely.sum() > 1


def test_generation_edges(nb07, small):
    model, prompt = model_of(nb07, small).train(), torch.tensor([[4, 2]])
    assert torch.equal(nb07.generate(model, prompt, 0), prompt)
    assert model.training
    greedy = nb07.generate(model, prompt, 10, temperature=0)
    assert torch.equal(nb07.generate(model, prompt, 10, top_k=1), greedy)
    assert torch.equal(nb07.generate(model, prompt, 10, top_p=1e-6), greedy)
    assert torch.equal(nb07.generate(model, prompt, 10, temperature=1e-4), greedy)


@pytest.mark.parametrize(("arguments", "message"), [
    ({"tokens": torch.zeros(1, 0, dtype=torch.long)}, "begin with a newline"),
    ({"tokens": torch.zeros(3, dtype=torch.long)}, r"tokens \(B, T\)"),
    ({"temperature": -0.5}, "must not be negative"),
    ({"n_new": -1}, "must not be negative"),
    ({"top_p": 0.0}, "top_p must lie in"),
    ({"top_p": 1.5}, "top_p must lie in"),
    ({"top_p": 5, "temperature": 0}, "top_p must lie in"),
    ({"top_k": 0}, "top_k must be at least 1"),
    ({"top_k": 0, "n_new": 0}, "top_k must be at least 1"),
])  # fmt: skip
def test_generate_refuses_bad_input(nb07, small, arguments, message):
    model = model_of(nb07, small)
    with pytest.raises(ValueError, match=message):
        nb07.generate(model, **{"tokens": torch.zeros(1, 2, dtype=torch.long), "n_new": 3, **arguments})


def test_evaluation_has_no_dropout_and_restores_the_mode(nb07, small, corpus):
    """Models that are still in training mode, and an error on the way."""
    model = nb07.Transformer(replace(small, dropout=0.9), len(corpus.vocabulary))
    tokens = corpus.train[None, :10]
    for evaluate in (
        lambda: nb07.perplexity(model, tokens, 3),
        lambda: nb07.loss_by_position(model, corpus.train[:100], 12)[0].sum(),
        lambda: nb07.generate(model, tokens, 5, temperature=0).tolist(),
    ):
        model.train()
        assert evaluate() == evaluate()
        assert model.training
        model.eval()
        evaluate()
        assert not model.training
    model.train()
    with pytest.raises(IndexError):
        nb07.generate(model, tokens + 1000, 5)
    assert model.training


# --- measures of text


def test_distinct_and_words(nb07):
    assert nb07.distinct([["a", "b", "a", "b"], ["a", "b"]]) == pytest.approx(2 / 4)
    assert nb07.distinct([["a"]]) == 0.0
    assert nb07.words("rst, we've\nspok'n: O! and the la") == [",", "we've", "spok'n", ":", "o", "!", "and", "the"]
    assert nb07.words(" the end.") == ["the", "end", "."]


def test_perplexity(nb07, small):
    """Within the context against the plain loss, beyond it against windows with at least half a context of history."""
    model, tokens = model_of(nb07, small), torch.randint(V, (2, 31))
    short = F.cross_entropy(model(tokens[:, :8])[:, 2:].transpose(1, 2), tokens[:, 3:9], reduction="mean").exp()
    assert nb07.perplexity(model, tokens[:, :9], 3) == pytest.approx(short.item(), rel=1e-5)
    losses = []
    for t in range(8, 31):
        begin = max(0, 8 + (t - 8) // 6 * 6 - 6)
        losses.append(F.cross_entropy(model(tokens[:, begin:t])[:, -1], tokens[:, t], reduction="none"))
    assert nb07.perplexity(model, tokens, 8) == pytest.approx(torch.cat(losses).mean().exp().item(), rel=1e-5)


def test_judge(nb07, small):
    vocabulary = nb07.Vocabulary(" .abcdefghi")
    tokens = torch.stack([vocabulary.encode("abc. had a bad hd. a"), vocabulary.encode("abc. a bad hag. hi a")])
    measures = nb07.judge(model_of(nb07, small), tokens, 5, vocabulary, known={"had", "a", "bad", "hi"})
    assert measures["known words"] == pytest.approx(4 / 6)
    assert measures["distinct-2"] == pytest.approx(nb07.distinct([nb07.words(vocabulary.decode(row[5:])) for row in tokens]))
    assert list(measures) == ["perplexity", "distinct-2", "known words"]


def test_excerpts(nb07):
    windows = nb07.excerpts(torch.arange(505), 50, 10, seed=1)
    assert windows.shape == (50, 10)
    assert torch.equal(windows - windows[:, :1], torch.arange(10).expand(50, 10))
    assert len(windows.unique()) == 500  # overlapping windows would lower distinct-2 of the real text
    assert torch.equal(windows, nb07.excerpts(torch.arange(505), 50, 10, seed=1))
    assert not torch.equal(windows, nb07.excerpts(torch.arange(505), 50, 10, seed=2))


def test_nanogpts_recipe_is_kept(nb07):
    assert nb07.OTHER_ARMS["nanoGPT"] == {"block": "gpt2", "position": "learned", "init": "nanogpt", "learning_rate": 1e-3}
    assert nb07.RATES[0] == 1e-3
    for name in ("GPT-2's block, matrices only", "GPT-2's block, factor only"):
        changes = nb07.OTHER_ARMS[name]
        assert (changes["block"], changes["position"]) == ("gpt2", "learned")
        assert changes["init"] in name


@pytest.mark.parametrize(("preset", "steps"), [("cpu", None), ("gpu", 2000)])
def test_a_twentieth_of_the_steps_is_warm_up(nb07, preset, steps):
    """The comment in Run says so; nanoGPT's 100 of 2,000."""
    lines = inspect.getsource(nb07.Run).splitlines()
    chosen = {name: next(line for line in lines if f" {name}: " in line) for name in ("steps", "warmup")}
    value = {name: int(re.search(rf"{preset}=(\d+)", line)[1]) for name, line in chosen.items()}
    assert value["warmup"] == pytest.approx(value["steps"] / 20, abs=0.51)
    assert steps in (None, value["steps"])


def test_amp_dtype(nb07, monkeypatch):
    check_amp_dtype(nb07, monkeypatch)


# --- counting


def textbook_kneser_ney(train, order, size, discount=0.75):
    """p(token | history) by the recursion with dictionaries, as in Chen and Goodman."""
    grams = {n: Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in range(1, order + 1)}
    before = {n: Counter(gram[1:] for gram in grams[n + 1]) for n in range(1, order)}  # different tokens before a run

    def p(history, token):
        n = len(history) + 1
        table = grams[n] if n == order else before[n]
        after = {gram[-1]: count for gram, count in table.items() if gram[:-1] == history}
        lower = p(history[1:], token) if n > 1 else 1 / size
        total = sum(after.values())
        if not total:
            return lower
        return (max(after.get(token, 0) - discount, 0) + discount * len(after) * lower) / total

    return p


@pytest.mark.parametrize(("order", "discount"), [(1, 0.75), (2, 0.75), (3, 0.5), (4, 0.9)])
def test_kneser_ney_against_the_recursion(nb07, order, discount):
    train, test = torch.randint(5, (400,)), torch.randint(6, (60,))  # token 5 is in no training text
    p = textbook_kneser_ney(train.tolist(), order, 6, discount)
    history = test.tolist()
    expected = [p(tuple(history[i - order + 1 : i]), history[i]) for i in range(order - 1, 60)]
    found = nb07.KneserNey(train, order, 6, discount).probabilities(test)
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_kneser_ney_against_nltk(nb07):
    """NLTK's recursion, with our lowest level in place of its own, which gives unseen tokens nothing."""
    from nltk.lm.models import InterpolatedLanguageModel
    from nltk.lm.smoothing import KneserNey
    from nltk.util import everygrams

    text = list("the cat sat on the mat and the rat sat on the cat that ate the bat")
    alphabet = sorted(set(text))
    ours = nb07.KneserNey(torch.tensor([alphabet.index(c) for c in text]), 3, len(alphabet))
    lowest = nb07.KneserNey(torch.tensor([alphabet.index(c) for c in text]), 3, len(alphabet)).levels[0]

    class Smoothing(KneserNey):
        def unigram_score(self, word):
            count, total = self._continuation_counts(word)
            return (max(count - 0.75, 0) + 0.75 * len(lowest[0]) / len(alphabet)) / total

    theirs = InterpolatedLanguageModel(Smoothing, 3, params={"discount": 0.75, "order": 3})
    theirs.fit([everygrams(text, max_len=3)], vocabulary_text=alphabet)
    for history in ("th", " c", "at", "ra"):
        for c in "athe ":
            found = ours.probabilities(torch.tensor([alphabet.index(x) for x in history + c])).item()
            assert found == pytest.approx(theirs.score(c, list(history)), rel=1e-9), (history, c)


def test_fit_counting_finds_the_best_of_all(nb07):
    train, validation = torch.randint(5, (300,)), torch.randint(5, (90,))
    model, losses = nb07.fit_counting(train, validation, (2, 3, 1), 5)
    assert set(losses) == set(itertools.product((1, 2, 3), (0.6, 0.7, 0.8, 0.9)))
    for (order, discount), loss in losses.items():
        p = nb07.KneserNey(train, order, 5, discount).probabilities(validation)
        assert loss == pytest.approx(-p.log().mean().item())
    best = min(losses, key=losses.get)
    assert (model.order, model.discount) == best
    assert -model.probabilities(validation).log().mean().item() == pytest.approx(losses[best])


def test_kneser_ney_edges(nb07):
    model = nb07.KneserNey(torch.zeros(9, dtype=torch.long), 3, 4)
    assert model.probabilities(torch.zeros(3, dtype=torch.long)).item() > 0.9
    unseen = model.probabilities(torch.tensor([3, 2, 1]))  # no history known: the lowest level's
    assert 0 < unseen.item() == pytest.approx(0.75 / 4)
    for bad in ({"order": 0}, {"order": 10}, {"order": 2, "discount": 1.0}, {"order": 2, "discount": 0.0}):
        with pytest.raises(ValueError, match="do not fit"):
            nb07.KneserNey(torch.zeros(9, dtype=torch.long), size=4, **bad)


def test_counting_needs_no_table_of_all_runs(nb07):
    """An alphabet of 160 characters: 160 ** 5 counts would be 800 GB."""
    tokens = torch.randint(160, (2000,))
    assert nb07.KneserNey(tokens, 5, 160).probabilities(tokens).min() > 0
    with pytest.raises(ValueError, match="make no 64-bit number: lower the order"):
        nb07.codes(tokens, 9, 160)
    assert nb07.codes(torch.tensor([1, 2, 3]), 2, 10).tolist() == [12, 23]


# --- the factorial


def test_factor_gains_against_all_orders(nb07):
    generator = np.random.default_rng(0)
    cube = {key: generator.normal(size=4) for key in itertools.product((0, 1), repeat=3)}
    found = nb07.factor_gains(cube)
    for factor in range(3):
        gains = []
        for order in itertools.permutations(range(3)):
            state = [0, 0, 0]
            for n in order:
                before = cube[tuple(state)]
                state[n] = 1
                if n == factor:
                    gains.append(before - cube[tuple(state)])
        np.testing.assert_allclose(found[factor]["all orders"], np.mean(gains, 0))
        first, rest = [0, 0, 0], [1, 1, 1]
        first[factor], rest[factor] = 1, 0
        np.testing.assert_allclose(found[factor]["alone"], cube[0, 0, 0] - cube[tuple(first)])
        np.testing.assert_allclose(found[factor]["last"], cube[tuple(rest)] - cube[1, 1, 1])
    np.testing.assert_allclose(sum(part["all orders"] for part in found), cube[0, 0, 0] - cube[1, 1, 1])


def test_corners_and_their_names(nb07):
    run = nb07.Run(steps=7)
    plain = nb07.corner(run, 0, 0)
    assert {"block": plain.block, "position": plain.position, "init": plain.init, "learning_rate": 1e-3} == nb07.OTHER_ARMS["nanoGPT"]
    assert nb07.corner(run, 1, 1) == replace(run, init="fan_in", block="modern", position="rope")
    assert nb07.corner(run, 1, 0).init == "fan_in"
    assert nb07.corner(run, 0, 1).block == "modern"
    assert plain.steps == 7
    assert nb07.name_of((0, 0, 0)) == "nanoGPT"
    assert nb07.name_of((1, 1, 1)) == "all three"
    assert nb07.name_of((1, 0, 1)) == "rate + architecture"


def test_trained_weights_come_back(nb07, small, corpus):
    weights, log = nb07.trained(small, corpus, 0, looks=3)
    assert log["step"] == [10, 20, 30]
    model = nb07.with_weights(small, weights, len(corpus.vocabulary), "cpu")
    assert not model.training
    expected = nb07.train(small, corpus, 0)[0]
    tokens = corpus.test[None, :12]
    assert torch.equal(model(tokens), expected(tokens))


def test_looks_are_spread_over_the_training(nb07, small, corpus):
    """No more than asked for, the last at the end."""
    for steps, looks, expected in ((10, 4, [3, 6, 9, 10]), (12, 4, [3, 6, 9, 12]), (3, 8, [1, 2, 3])):
        assert nb07.trained(replace(small, steps=steps), corpus, 0, looks=looks)[1]["step"] == expected


def test_late_loss_against_a_loop(nb07, small, corpus):
    """Every character from the seventh on, seen from the last 6 to 11 characters in windows of 12."""
    size, tokens = len(corpus.vocabulary), corpus.test[:67]  # 7 + 10 * 6
    model = nb07.Transformer(small, size).eval()
    losses = []
    for t in range(7, 67):
        begin = (t - 7) // 6 * 6
        losses.append(F.cross_entropy(model(tokens[None, begin:t])[0, -1], tokens[t]).item())
    assert nb07.late_loss(small, model.state_dict(), tokens, size) == pytest.approx(np.mean(losses), rel=1e-5)


def test_cut_text_against_a_loop(nb07, small):
    """Windows of 36 characters, each predicted from the last 6 to 11 of them (at the beginning from what there is)."""
    model, tokens = model_of(nb07, small), torch.randint(V, (73,))  # two windows and one more
    losses = np.zeros((2, 36))
    for window, place in itertools.product(range(2), range(36)):
        t = 36 * window + place + 1  # the character that stands at this place
        begin = 36 * window + max(0, place // 6 - 1) * 6
        losses[window, place] = F.cross_entropy(model(tokens[None, begin:t])[0, -1], tokens[t]).item()
    found = nb07.cut_text(model, tokens, 36)
    np.testing.assert_allclose(found, losses.mean(0), rtol=1e-5)
    far = nb07.loss_by_position(nb07.extended(model, 36), tokens, 36)[0]
    np.testing.assert_allclose(found[:12], far[:12], rtol=1e-5)
    assert not np.allclose(found[12:], far[12:], rtol=1e-3)


def test_steps_take_the_warm_up_with_them(nb07, small):
    run = replace(small, steps=400, warmup=20, learning_rate=0.5)
    assert nb07.with_steps(run, 200) == replace(run, steps=200, warmup=10)
    assert nb07.with_steps(run, 1600) == replace(run, steps=1600, warmup=80)
    assert nb07.with_steps(run, 3).warmup == 1


def test_a_try_takes_half_of_the_steps(nb07, small, corpus):
    half = replace(small, steps=15, warmup=2)
    weights, _ = nb07.trained(half, corpus, 4)
    expected = nb07.late_loss(half, weights, corpus.validation, len(corpus.vocabulary))
    assert nb07.try_rate(small, corpus, 4) == expected


def test_a_try_that_diverges_is_infinitely_bad(nb07, small, corpus, monkeypatch):
    wild = replace(small, steps=4, warmup=0, learning_rate=math.inf)
    assert nb07.try_rate(wild, corpus, 0) == math.inf

    def out_of_memory(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(nb07, "trained", out_of_memory)
    with pytest.raises(RuntimeError, match="out of memory"):
        nb07.try_rate(small, corpus, 0)


def test_paces_are_seconds_of_a_step(nb07, small, corpus, monkeypatch):
    """All arms in one set of turns, with the steps asked for and hardly any evaluation."""
    seen = []
    watched = lambda run, data, seed: seen.append((run, len(data.validation), seed))

    def turns(cases, rounds, device):
        assert rounds == 3
        for case in cases.values():
            case()
        return {name: 10.0 * n for n, name in enumerate(cases, 1)}

    monkeypatch.setattr(nb07, "train", watched)
    monkeypatch.setattr(nb07, "seconds_in_turns", turns)
    other = replace(small, block="gpt2")
    large = corpus._replace(validation=corpus.train[:3000])
    assert nb07.paces({"a": small, "b": other}, large, 5, 3) == {"a": 2.0, "b": 4.0}
    assert seen == [(replace(run, steps=5), 1000, 0) for run in (small, other)]


def test_trainings_side_by_side_are_those_one_after_the_other(nb07, small, corpus):
    runs = [(replace(small, steps=8, init=init), seed) for init in ("fan_in", "nanogpt") for seed in (0, 1)]
    together = nb07.each(lambda run: nb07.trained(run[0], corpus, run[1])[0]["embedding.weight"], runs, "")
    for run, seed in runs:
        assert torch.equal(together[run, seed], nb07.trained(run, corpus, seed)[0]["embedding.weight"])


def test_the_initial_weights_hang_on_the_generator_alone(nb07, small):
    weights = []
    for _ in range(2):
        torch.rand(3)
        weights.append(nb07.Transformer(small, V, torch.Generator().manual_seed(5)).blocks[0].attention.qkv.weight)
    assert torch.equal(*weights)


# --- attention stretched


@pytest.mark.parametrize("window", [1, 3, 12])
def test_sliding_window_against_a_mask(nb07, small, window):
    model, tokens = nb07.extended(model_of(nb07, replace(small, n_layer=1)), 12, window=window), torch.randint(V, (2, 12))
    theirs = torch.nn.MultiheadAttention(16, 2, bias=False, batch_first=True, dtype=torch.float64)
    ours = model.blocks[0].attention
    theirs.in_proj_weight.data, theirs.out_proj.weight.data = ours.qkv.weight.data, ours.out.weight.data
    gap = torch.arange(12)[:, None] - torch.arange(12)
    x = torch.randn(2, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x, x, x, attn_mask=(gap < 0) | (gap >= window), need_weights=False)[0])
    cache = nb07.KVCache(model, 2)
    with torch.no_grad():
        pieces = [model(piece, cache) for piece in tokens.split([5, 1, 4, 1, 1], 1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens))


def test_stretched_positions_are_llamas_linear_scaling(nb07):
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0}
    config = LlamaConfig(hidden_size=32, num_attention_heads=2, rope_parameters=scaling)
    cos, sin = LlamaRotaryEmbedding(config)(torch.zeros(1, 40, 32), torch.arange(40)[None])
    rotation = nb07.rope_rotation(torch.arange(40) * 0.25, 16)
    torch.testing.assert_close(rotation[0, :, ::2], cos[0, :, :8], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rotation[1, :, ::2], sin[0, :, :8], rtol=1e-5, atol=1e-5)


@pytest.fixture
def rotations(nb07, monkeypatch):
    """The positions and the number formats that the model asks rotations for."""
    asked, rotation = [], nb07.rope_rotation

    def watched(positions, width, *rest, **options):
        asked.append((positions.tolist(), options["dtype"]))
        return rotation(positions, width, *rest, **options)

    monkeypatch.setattr(nb07, "rope_rotation", watched)
    return asked


def test_extended_stretches_the_positions(nb07, small, rotations):
    model, tokens = model_of(nb07, small), torch.randint(V, (1, 3))
    nb07.extended(model, 48, stretch=0.25)(tokens)
    model(tokens)
    assert rotations == [([0.0, 0.25, 0.5], torch.float64), ([0.0, 1.0, 2.0], torch.float64)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_is_rotated_in_single_precision(nb07, small, rotations, dtype):
    nb07.Transformer(small, V).to(dtype)(torch.randint(V, (1, 3)))
    assert rotations[0][1] == torch.float32


def test_rmsnorm_of_large_halves(nb07):
    """Their squares exceed float16's 65,504."""
    x = (torch.randn(3, 384) * 1000).half()
    y = nb07.RMSNorm(384).half()(x)
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), F.rms_norm(x.float(), (384,)), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("position", ["none", "learned", "rope"])
def test_a_model_in_bfloat16_runs(nb07, small, position):
    model = nb07.Transformer(replace(small, position=position), V).bfloat16()
    tokens = torch.randint(V, (2, 12))
    assert model(tokens).dtype == torch.bfloat16
    assert model(tokens).isfinite().all()
    assert nb07.generate(model, tokens, 3).shape == (2, 15)


# --- calibration and mixtures


def test_late_logits_against_a_loop(nb07, small):
    model, tokens = model_of(nb07, small), torch.randint(V, (67,))  # 13 + 9 * 6
    logits, targets = nb07.late_logits(model, tokens)
    assert torch.equal(targets, tokens[7:])
    expected = []
    for t in range(7, 67):
        begin = (t - 7) // 6 * 6  # windows of 12 that move on by 6
        expected.append(F.cross_entropy(model(tokens[None, begin:t])[0, -1], tokens[t]))
    expected = torch.stack(expected).detach().float()
    torch.testing.assert_close(F.cross_entropy(logits, targets, reduction="none"), expected)
    p = nb07.probabilities(model, tokens, 7)
    np.testing.assert_allclose(p, (-expected).exp(), rtol=1e-5)
    np.testing.assert_allclose(nb07.probabilities(model, tokens, 13), p[6:], rtol=1e-5)


def test_probabilities_of_counting_are_of_the_same_tokens(nb07, small):
    model, tokens = nb07.KneserNey(torch.randint(V, (300,)), 3, V), torch.randint(V, (67,))
    found = nb07.probabilities(model, tokens, 7)
    assert found.shape == nb07.probabilities(model_of(nb07, small), tokens, 7).shape == (60,)
    np.testing.assert_allclose(found, model.probabilities(tokens)[5:])  # its first is of the third token


def test_fitted_temperature(nb07):
    """Tokens that are drawn at a temperature are told the temperature back; a grid finds nothing better."""
    logits = 3 * torch.randn(20_000, 6)
    for temperature in (0.5, 1.0, 2.5):
        targets = torch.multinomial((logits / temperature).softmax(-1), 1)[:, 0]
        found = nb07.fit_temperature(logits, targets)
        assert found == pytest.approx(temperature, rel=0.05)
        loss = lambda t, targets=targets: F.cross_entropy(logits / t, targets).item()
        assert loss(found) <= min(loss(t) for t in np.geomspace(0.2, 5, 40)) + 1e-6


def test_calibration_error_against_a_loop(nb07):
    logits, targets = 2 * torch.randn(500, 7), torch.randint(7, (500,))
    p = logits.double().softmax(-1)
    error, shares = 0.0, []
    for b in range(10):
        inside = [i for i in range(500) if b / 10 <= p[i].max() < (b + 1) / 10]
        shares.append(len(inside) / 500)
        if inside:
            right = np.mean([p[i].argmax().item() == targets[i].item() for i in inside])
            error += len(inside) / 500 * abs(right - np.mean([p[i].max().item() for i in inside]))
    assert nb07.calibration_error(logits, targets) == pytest.approx(error)
    assert nb07.reliability(logits, targets)[0].tolist() == pytest.approx(shares)
    sure = torch.tensor([[100.0, 0.0]])
    assert nb07.calibration_error(sure, torch.tensor([0])) == pytest.approx(0, abs=1e-9)
    assert nb07.calibration_error(sure, torch.tensor([1])) == pytest.approx(1)


def test_mixture_weight_against_a_grid(nb07):
    first, second = np.random.default_rng(0).uniform(0.01, 1, (2, 300))
    loss = lambda share: -np.log(share * first + (1 - share) * second).mean()
    found = nb07.mixture_weight(first, second)
    assert loss(found) <= min(loss(share) for share in np.linspace(0, 1, 201)) + 1e-9
    assert nb07.mixture_weight(second * 0.5, second) < 0.01
    assert nb07.mixture_weight(second, second * 0.5) > 0.99


def test_mixtures_are_fitted_on_validation_and_judged_on_test(nb07):
    draw = np.random.default_rng(1).uniform
    model, counted = ({part: draw(0.01, 1, count) for part, count in (("validation", 300), ("test", 40))} for _ in range(2))
    share, losses = nb07.mix(model, counted)
    assert share == nb07.mixture_weight(model["validation"], counted["validation"])
    assert 0.1 < share < 0.9
    expected = [-math.log(share * own + (1 - share) * other) for own, other in zip(model["test"], counted["test"], strict=True)]
    np.testing.assert_allclose(losses, expected)


def test_words_of_any_alphabet(nb07):
    assert nb07.words(" Être ou ne pas être. ") == ["être", "ou", "ne", "pas", "être", "."]
    assert nb07.words("ть или не быть, вот в чём вопр") == ["или", "не", "быть", ",", "вот", "в", "чём"]
    assert nb07.words(" the end\n") == ["the", "end"]
    assert nb07.words(" act 12_") == ["act", "1", "2", "_"]


# --- the text


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data folder, and the smoke preset, which asks no network."""
    monkeypatch.setenv("COOKBOOK_DATA", str(tmp_path))
    monkeypatch.setenv("COOKBOOK_PRESET", "smoke")
    return tmp_path


PLAY = "First Citizen:\nSpeak, speak.\n"


def known(nb07, monkeypatch, **texts):
    """Give the notebook these sha256 in place of the real ones."""
    for name, text in texts.items():
        digest = hashlib.sha256(text.encode()).hexdigest()
        monkeypatch.setitem(nb07.TEXT_SHA256, f"{name}.txt", digest)


def test_full_text_comes_first_then_the_embedded_one(nb07, folder, monkeypatch, capsys):
    known(nb07, monkeypatch, tinyshakespeare=PLAY, shakespeare=PLAY.upper())
    (folder / "shakespeare.txt").write_text(PLAY.upper())
    assert nb07.load_text() == PLAY.upper()
    assert "EMBEDDED TEXT" in capsys.readouterr().out
    (folder / "tinyshakespeare.txt").write_text(PLAY)
    assert nb07.load_text() == PLAY
    assert not capsys.readouterr().out


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "shakespeare.txt"])
def test_a_corrupt_text_is_named(nb07, folder, name):
    (folder / name).write_text(PLAY)
    with pytest.raises(ValueError, match=rf"{name} is corrupt or incomplete \(29 bytes\)"):
        nb07.load_text()


def test_no_text_at_all(nb07, folder):
    with pytest.raises(FileNotFoundError, match=r"save https://.* as .*tinyshakespeare.txt"):
        nb07.load_text()


def test_a_text_of_ones_own(nb07, folder):
    (folder / "mine.txt").write_bytes("Быть или\r\nне быть".encode())
    assert nb07.load_text(str(folder / "mine.txt")) == "Быть или\nне быть"


# --- interrupted trainings


def checkpoint_of(nb07, folder, run, corpus, seed=3, every=0):
    """The checkpoint of a run."""
    return nb07.Checkpoint(folder, "run", run, corpus, seed, nb07.train, every=every)


@pytest.mark.parametrize(("dtype", "muon"), [(None, False), (torch.float16, False), (None, True)])
def test_interrupted_training_resumes_to_the_same_numbers(nb07, small, corpus, tmp_path, dtype, muon):
    """Batches, dropout, optimisers, loss scaler and curves included."""
    run = replace(small, steps=40, dropout=0.2, muon=muon)
    whole, whole_log = nb07.train(run, corpus, 3, eval_every=10, dtype=dtype)

    class Stopped(nb07.Checkpoint):
        """One whose process dies after step 20 was saved."""

        def due(self):
            return True

        def save(self, log, **parts):
            super().save(log, **parts)
            if log["step"][-1] == 20:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        nb07.train(run, corpus, 3, eval_every=10, dtype=dtype, checkpoint=Stopped(tmp_path, "run", run, corpus, 3, nb07.train, every=0))
    torch.rand(7)  # whatever the restarted notebook has drawn before
    resumed, log = nb07.train(run, corpus, 3, eval_every=10, dtype=dtype, checkpoint=checkpoint_of(nb07, tmp_path, run, corpus))
    assert log["step"] == [10, 20, 30, 40]
    assert all(log[name] == whole_log[name] for name in ("step", "train", "validation"))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))
    again, _ = nb07.train(run, corpus, 3, eval_every=10, dtype=dtype, checkpoint=checkpoint_of(nb07, tmp_path, run, corpus))
    assert torch.equal(again.embedding.weight, whole.embedding.weight)


def test_each_run_and_text_has_a_checkpoint_of_its_own(nb07, small, corpus, tmp_path):
    other = nb07.make_corpus("another text of the same length " * 60)
    swapped = corpus._replace(train=corpus.train.flip(0))  # same alphabet, same length
    cases = [(small, corpus, 0), (small, other, 0), (small, swapped, 0), (replace(small, steps=31), corpus, 0), (small, corpus, 1)]
    paths = [checkpoint_of(nb07, tmp_path, *case).path for case in cases]
    assert len(set(paths)) == len(paths)
    assert checkpoint_of(nb07, tmp_path, *cases[0]).path == paths[0]
