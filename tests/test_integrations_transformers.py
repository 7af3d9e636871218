"""`integrations.transformers`: models of transformers on this attention, against their own eager attention."""

import copy
import inspect
import runpy
from pathlib import Path

import budget
import pytest
import torch
from torch._dynamo.testing import CompileCounter

import rfkernels as rf

transformers = pytest.importorskip("transformers", "4.57")
from transformers import (  # noqa: E402
    DynamicCache,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

from rfkernels.integrations import transformers as adapter  # noqa: E402

# What older versions call past_key_values.
CACHE = "cache" if "cache" in inspect.signature(MistralForCausalLM.forward).parameters else "past_key_values"
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
WINDOW, TOKENS, VOCABULARY = 6, 23, 97
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, initializer_range=0.3, pad_token_id=0, bos_token_id=None, eos_token_id=None,
)  # fmt: skip
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {
    "mistral": (MistralForCausalLM, MistralConfig, dict(sliding_window=WINDOW, num_hidden_layers=2)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config, dict(
        sliding_window=WINDOW, use_sliding_window=True, layer_types=LAYERS, num_hidden_layers=3)),
    # As many experts as a token takes: a choice between them could change with the last bit of a score.
    "gpt_oss": (GptOssForCausalLM, GptOssConfig, dict(
        sliding_window=WINDOW, layer_types=LAYERS, num_hidden_layers=3, num_local_experts=2, num_experts_per_tok=2)),
    "llama": (LlamaForCausalLM, LlamaConfig, dict(num_hidden_layers=2)),
}  # fmt: skip
every_model = pytest.mark.parametrize("name", MODELS)
sliding_models = pytest.mark.parametrize("name", [name for name in MODELS if name != "llama"])


def model(name, attention="eager", dtype=torch.float64, **changed):
    cls, config, sizes = MODELS[name]
    torch.manual_seed(1)
    made = cls(config(**SIZES | sizes | changed)).eval()
    for parameter_name, parameter in made.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, 1.0)  # logits that take a good part of the softmax
    if name == "gpt_oss" and dtype == torch.float64 and hasattr(made, "set_experts_implementation"):
        made.set_experts_implementation("eager")  # the other one has no float64
    made.set_attn_implementation(attention)
    return made.to(dtype)


def tokens(batch=2, length=TOKENS, seed=0):
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def ours():
    return adapter.register()


def exact_float64(got, wanted):
    """Eager takes its softmax of float64 scores in float32 in some models, hence the width."""
    torch.testing.assert_close(got, wanted, atol=2e-5, rtol=2e-6)


# --- whole sequences --------------------------------------------------------------------------------------------------


@every_model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_within_the_error_of_eager(ours, name, dtype):
    x = tokens()
    with torch.no_grad():
        exact, plain, got = (
            model(name, attention, kind)(x).logits
            for attention, kind in (("eager", torch.float64), ("eager", dtype), (ours, dtype))
        )
    budget.check(got, exact, plain, name)


@every_model
def test_forward_in_float64_on_every_backend(ours, backend, name):
    x = tokens()
    with torch.no_grad():
        exact_float64(model(name, ours)(x).logits, model(name)(x).logits)


@every_model
def test_gradients_of_every_parameter(ours, name):
    x = tokens()
    grads = []
    for attention in ("eager", ours):
        trained = model(name, attention).train()
        trained(x, labels=x, use_cache=False).loss.backward()
        grads.append({key: parameter.grad for key, parameter in trained.named_parameters()})
    assert any(key.endswith("sinks") for key in grads[0]) == (name == "gpt_oss")
    for key, grad in grads[0].items():
        assert grad.abs().max() > 0, key
        torch.testing.assert_close(grads[1][key], grad, atol=1e-6 + 1e-5 * grad.abs().max().item(), rtol=0, msg=key)


def test_a_learned_sink_takes_its_part_of_the_softmax(ours):
    """gpt-oss's logits matter to the result: what is compared above is not the same without them."""
    made, x = model("gpt_oss", ours), tokens()
    with torch.no_grad():
        before = made(x).logits
        for layer in made.model.layers:
            layer.self_attn.sinks.fill_(-40.0)
        assert (made(x).logits - before).abs().max() > 0.1


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_compiled_in_one_graph(ours, name):
    if name == "gpt_oss" and VERSION < (5, 15):
        pytest.skip("its experts do not compile in this transformers")
    torch.compiler.reset()
    one = {"num_hidden_layers": 1, "layer_types": LAYERS[:1]}
    made, x = model(name, ours, torch.float32, **one if name == "gpt_oss" else {"num_hidden_layers": 1}), tokens()
    run = torch.compile(made, fullgraph=True, backend="eager")
    with torch.no_grad():
        for options in ({}, {"attention_mask": torch.ones_like(x)}):
            assert torch.equal(run(x, use_cache=False, **options).logits, made(x, use_cache=False).logits)
        with pytest.raises(RuntimeError, match="padding cannot be represented"):
            run(x, use_cache=False, attention_mask=(x > 20).long())
        if name == "mistral":  # whose masks look at positions
            with pytest.raises(RuntimeError, match="packed documents cannot be represented"):
                run(x, use_cache=False, position_ids=(torch.arange(TOKENS) % 9).expand(2, -1))


# --- caches -----------------------------------------------------------------------------------------------------------


def in_pieces(made, x, cache, pieces):
    """Logits of x, given in pieces of these lengths, one after another."""
    assert sum(pieces) == x.shape[1]
    with torch.no_grad():
        return torch.cat([made(part, use_cache=True, **{CACHE: cache}).logits for part in x.split(pieces, 1)], 1)


PIECES = [[9, 1, 1, 1, 7, 1, 3], [1] * TOKENS, [2, 3, 18], [TOKENS]]


@every_model
@pytest.mark.parametrize("pieces", PIECES, ids=str)
@pytest.mark.parametrize("sliding", [False, True], ids=["keeps all", "keeps the window"])
def test_prefill_and_decode(ours, name, pieces, sliding):
    made = model(name, ours)
    cache = DynamicCache(config=made.config) if sliding else DynamicCache()
    with torch.no_grad():
        wanted = model(name)(tokens()).logits
    exact_float64(in_pieces(made, tokens(), cache, pieces), wanted)


def test_a_static_sliding_cache_whose_length_the_host_knows(ours):
    """All layers of Mistral slide: their static cache counts on the host, and gives more keys than are valid."""
    made = model("mistral", ours)
    cache = StaticCache(made.config, max_cache_len=TOKENS)
    with torch.no_grad():
        wanted = model("mistral")(tokens()).logits
    exact_float64(in_pieces(made, tokens(), cache, [3, 1, 4, 1, 1, 6, 7]), wanted)


def test_generate(ours):
    for name in MODELS:
        x = tokens(length=9)
        old, new = (
            model(name, attention).generate(
                x, attention_mask=torch.ones_like(x), max_new_tokens=14, do_sample=False, num_beams=beams
            )
            for attention, beams in (("eager", 1), (ours, 1))
        )
        assert torch.equal(old, new)


# --- positional sinks -------------------------------------------------------------------------------------------------


def visible(length, window, sinks):
    """The definition of docs/semantics.md, literally, as an additive mask."""
    mask = torch.full((1, 1, length, length), torch.finfo(torch.float64).min, dtype=torch.float64)
    for i in range(length):
        for j in range(i + 1):
            if j >= i + 1 - window or j < sinks:
                mask[..., i, j] = 0
    return mask


def eager_with_sinks(name, x, sinks, window=WINDOW):
    length = x.shape[1]
    sliding = visible(length, window, sinks)
    if name in ("gpt_oss", "qwen3"):
        sliding = {"sliding_attention": sliding, "full_attention": visible(length, length, 0)}
    with torch.no_grad():
        return model(name)(x, attention_mask=sliding).logits


@sliding_models
@pytest.mark.parametrize("sinks", [1, 3, 9])
def test_sinks_beside_the_window(name, sinks):
    made, x = model(name, adapter.register("with sinks", sink_tokens=sinks)), tokens()
    wanted = eager_with_sinks(name, x, sinks)
    with torch.no_grad():
        exact_float64(made(x).logits, wanted)
        if sinks < TOKENS - WINDOW:
            assert (made(x).logits - model(name)(x).logits).abs().max() > 1e-2
    for pieces in PIECES:
        exact_float64(in_pieces(made, x, SinkWindowCache(made, sinks), pieces), wanted)
        exact_float64(in_pieces(made, x, DynamicCache(), pieces), wanted)


def SinkWindowCache(made, sinks, **options):
    return adapter.SinkWindowCache(made.config, sink_tokens=sinks, **options)


def test_a_model_without_windows_gets_one():
    """StreamingLLM: a causal model streams with a cache of constant size."""
    name = adapter.register("streaming", sink_tokens=2, window_tokens=5)
    made, x = model("llama", name), tokens(length=40)
    wanted = eager_with_sinks("llama", x, 2, 5)
    with torch.no_grad():
        exact_float64(made(x).logits, wanted)
    cache = SinkWindowCache(made, 2, window_tokens=5)
    exact_float64(in_pieces(made, x, cache, [7, *[1] * 20, 13]), wanted)
    assert [layer.keys.shape[2] for layer in cache.layers] == [2 + 5 - 1] * 2
    assert cache.get_seq_length() == 40


def test_a_window_of_one_token():
    name = adapter.register("streaming", sink_tokens=1, window_tokens=1)
    made, x = model("llama", name), tokens()
    wanted = eager_with_sinks("llama", x, 1, 1)
    exact_float64(in_pieces(made, x, SinkWindowCache(made, 1, window_tokens=1), [4, *[1] * 19]), wanted)


def test_generate_with_sinks_and_a_cache_of_fixed_size():
    name = adapter.register("with sinks", sink_tokens=2)
    x = tokens(length=5)
    for kind in ("mistral", "gpt_oss"):
        made = model(kind, name)
        cache = SinkWindowCache(made, 2)
        options = dict(attention_mask=torch.ones_like(x), max_new_tokens=25, do_sample=False)
        streamed = made.generate(x, **options, **{CACHE: cache})
        whole = made.generate(x, **options, **{CACHE: DynamicCache()})
        assert torch.equal(streamed, whole)
        sizes = {layer.keys.shape[2] for layer in cache.layers if isinstance(layer, adapter.SinkWindowLayer)}
        assert sizes == {2 + WINDOW - 1}


def test_gradients_with_sinks():
    grads = []
    for attention in ("eager", adapter.register("with sinks", sink_tokens=2)):
        made, x = model("mistral", attention).train(), tokens()
        mask = visible(TOKENS, WINDOW, 2) if attention == "eager" else None
        made(x, attention_mask=mask, labels=x, use_cache=False).loss.backward()
        grads.append(made.model.layers[0].self_attn.k_proj.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], atol=1e-5 * grads[0].abs().max().item(), rtol=0)


@pytest.mark.skipif(VERSION < (5, 15), reason="its caches are not made to be compiled")
def test_compiled_decoding_with_a_cache_of_fixed_size():
    """In one graph, which serves every token once the cache is full."""
    torch.compiler.reset()
    name = adapter.register("with sinks", sink_tokens=2)
    made, x = model("mistral", name, torch.float32, num_hidden_layers=1), tokens()
    counter = CompileCounter()
    run = torch.compile(made, fullgraph=True, backend=counter)
    caches, graphs = [SinkWindowCache(made, 2) for _ in range(2)], []
    with torch.no_grad():
        for cache in caches:
            made(x[:, :9], **{CACHE: cache})
        for token in x[:, 9:].split(1, 1):
            got, wanted = (
                call(token, **{CACHE: cache}).logits for call, cache in zip((run, made), caches, strict=True)
            )
            torch.testing.assert_close(got, wanted, atol=1e-5, rtol=0)
            graphs.append(counter.frame_count)
    assert graphs[-1] == graphs[2] <= 2, graphs


def test_beams_and_reset_of_a_sink_cache():
    made, x = model("mistral", adapter.register("with sinks", sink_tokens=2)), tokens()
    cache = SinkWindowCache(made, 2)
    in_pieces(made, x, cache, [TOKENS])
    kept = cache.layers[0].keys.clone()
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(cache.layers[0].keys, kept.flip(0))
    cache.reset()
    assert cache.get_seq_length() == 0
    exact_float64(in_pieces(made, x, cache, [TOKENS]), eager_with_sinks("mistral", x, 2))


def test_a_sink_cache_goes_back_while_it_has_dropped_nothing():
    made, x = model("mistral", adapter.register("with sinks", sink_tokens=2)), tokens()
    cache = SinkWindowCache(made, 2)
    in_pieces(made, x[:, :5], cache, [5])
    cache.crop(-2)
    assert cache.get_seq_length() == 3
    exact_float64(in_pieces(made, x[:, 3:], cache, [20]), eager_with_sinks("mistral", x, 2)[:, 3:])
    with pytest.raises(RuntimeError, match="cannot be cropped"):
        cache.crop(-1)
    if hasattr(DynamicCache, "activate_past_recording"):
        with pytest.raises(NotImplementedError, match="assisted decoding"):
            cache.activate_past_recording()


# --- what it cannot say -----------------------------------------------------------------------------------------------

PADDED = torch.ones(2, TOKENS, dtype=torch.long)
PADDED[1, :4] = 0
PACKED = (torch.arange(TOKENS) % 9).expand(2, -1)


@pytest.mark.parametrize("options,message", [
    ({"attention_mask": PADDED}, r"attention_mask must be ones: padding .* got \[0, 4\] padded tokens"),
    ({"position_ids": PACKED, "use_cache": False}, "packed documents, by position_ids, cannot be represented"),
    ({"attention_mask": visible(TOKENS, 3, 0)}, r"attention_mask must be what 'rfkernels' makes for it, got a tensor"),
    ({"cu_seq_lens_q": torch.tensor([0, 9, 46])}, "cu_seq_lens_q must be None: packed documents"),
    ({"seq_idx": torch.zeros(2, TOKENS)}, r"seq_idx must be None: packed documents .* got a tensor \(2, 23\)"),
    ({"softcap": 30.0}, r"softcap must be None: capped scores cannot be represented, got 30.0"),
    ({"position_bias": torch.zeros(1)}, "position_bias must be None"),
    ({"is_causal": False}, "a bidirectional layer .* cannot be represented"),
])  # fmt: skip
def test_what_a_call_cannot_ask(ours, options, message):
    made = model("mistral", ours)
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        made(tokens(), **options)


def test_dropout(ours):
    made = model("mistral", ours, attention_dropout=0.25)
    made(tokens())
    with pytest.raises(ValueError, match=r"dropout must be 0 .* got 0.25"):
        made.train()(tokens())


def test_probabilities_are_not_returned(ours):
    with pytest.raises(ValueError, match="output_attentions"):
        model("mistral", ours)(tokens(), output_attentions=True)


def test_bidirectional_models(ours):
    from transformers import BertConfig, BertModel

    if VERSION < (5,):
        pytest.skip("BERT takes no registered attention in this transformers")

    small = dict(vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    made = BertModel(BertConfig(**small))
    made.set_attn_implementation(ours)
    with pytest.raises(ValueError, match=r"a bidirectional layer .* got bidirectional_mask_function"):
        made(tokens() % 50)


def test_a_layer_that_is_not_causal(ours):
    """Where the model's masks do not tell, the layer does: cross-attention, towers of images."""
    made = model("mistral", ours)
    made.model.layers[0].self_attn.is_causal = False
    with torch.no_grad(), pytest.raises(ValueError, match="is_causal must be true, got False in MistralAttention"):
        made(tokens())


def test_chunked_masks(ours):
    from transformers.masking_utils import create_chunked_causal_mask

    made = model("llama", ours)
    made.config.attention_chunk_size = 4
    with pytest.raises(ValueError, match="attention in chunks cannot be represented, got chunked_overlay"):
        make_mask(create_chunked_causal_mask, made.config)


def test_masks_of_ones_own(ours):
    from transformers.masking_utils import create_causal_mask

    def images(batch, head, q, kv):
        return q < 3

    with pytest.raises(ValueError, match="another mask function cannot be represented, got or_masks"):
        make_mask(create_causal_mask, model("llama", ours).config, or_mask_function=images)


def make_mask(create, config, **options):
    """As a model calls it; older versions name an argument otherwise and have one more."""
    options |= dict(config=config, attention_mask=None, cache_position=torch.arange(9), **{CACHE: None})
    options |= dict(inputs_embeds=torch.zeros(1, 9, 8), input_embeds=torch.zeros(1, 9, 8))
    taken = inspect.signature(inspect.unwrap(create)).parameters
    return create(**{name: value for name, value in options.items() if name in taken})


def test_caches_that_dropped_what_is_seen():
    made = model("mistral", adapter.register("with sinks", sink_tokens=2))
    cache = DynamicCache(config=made.config)
    with torch.no_grad(), pytest.raises(ValueError, match="2 sinks and 5 for the window, got 5 keys after"):
        in_pieces(made, tokens(), cache, [9, 14])
    with torch.no_grad(), pytest.raises(ValueError, match="2 sinks and 5 for the window, got 8 keys after"):
        in_pieces(made, tokens(), SinkWindowCache(made, 3), [9, 14])
    plain = model("llama", adapter.register())
    with torch.no_grad(), pytest.raises(ValueError, match="must keep what this attention sees, all, got"):
        in_pieces(plain, tokens(), SinkWindowCache(plain, 2, window_tokens=4), [9, 14])


def test_a_cache_that_counts_on_the_device(ours):
    made, x = model("llama", ours), tokens()
    cache = StaticCache(made.config, max_cache_len=TOKENS + 5)
    if "cache_position" in inspect.signature(transformers.masking_utils.sdpa_mask).parameters:  # in older versions
        exact_float64(in_pieces(made, x, cache, [9, 1, 13]), model("llama")(x).logits)
        return
    with torch.no_grad(), pytest.raises(ValueError, match="the cache must know its length on the host"):
        in_pieces(made, x, cache, [9, 14])


def test_a_sink_cache_under_another_attention_never_shows_a_wrong_key():
    """Eager masks the sinks of a sliding layer by their place, and sees the whole cache of a causal one."""
    x = tokens()
    made = model("mistral")
    with torch.no_grad():
        exact_float64(in_pieces(made, x, SinkWindowCache(made, 2), [9, 1, 13]), made(x).logits)


@pytest.mark.parametrize("options,error,message", [
    ({"sink_tokens": -1}, ValueError, "sink_tokens must be at least 0, got -1"),
    ({"sink_tokens": 2.0}, TypeError, "sink_tokens must be an integer"),
    ({"window_tokens": 0}, ValueError, "window_tokens must be at least 1, got 0"),
    ({"backend": "fast"}, ValueError, "backend must be one of"),
    ({"name": "sdpa"}, ValueError, "name must not be empty or contain any of"),
    ({"name": "rf/flash"}, ValueError, "got 'rf/flash'"),
    ({"name": ""}, ValueError, "name must not be empty"),
    ({"name": 3}, TypeError, "name must be a string"),
    ({"name": "theirs"}, ValueError, "name must not be registered by somebody else, got 'theirs'"),
])  # fmt: skip
def test_bad_registrations(options, error, message):
    transformers.AttentionInterface.register("theirs", lambda *_, **__: None)
    before = copy.copy(transformers.AttentionInterface._global_mapping)
    with pytest.raises(error, match=message):
        adapter.register(**options)
    assert transformers.AttentionInterface._global_mapping == before


def test_bad_caches():
    with pytest.raises(ValueError, match="window_tokens must be given for a model without a sliding window"):
        adapter.SinkWindowCache(model("llama").config, sink_tokens=2)
    with pytest.raises(ValueError, match="sink_tokens must be at least 0"):
        adapter.SinkWindowCache(model("mistral").config, sink_tokens=-1)


def test_a_name_takes_new_options():
    x = tokens()
    made = model("mistral", adapter.register("twice"))
    with torch.no_grad():
        before = made(x).logits
        adapter.register("twice", sink_tokens=3)
        exact_float64(made(x).logits, eager_with_sinks("mistral", x, 3))
        assert (made(x).logits - before).abs().max() > 1e-2


def test_a_named_backend():
    made = model("mistral", adapter.register("by reference", backend="reference"))
    with torch.no_grad():
        exact_float64(made(tokens()).logits, model("mistral")(tokens()).logits)
    if "cuda" not in rf.available_backends():
        made = model("mistral", adapter.register("by cuda", backend="cuda"))
        with pytest.raises(rf.backends.UnservedError):
            made(tokens())


@pytest.mark.skipif(CACHE != "cache", reason="the example passes a cache by the name that newer transformers have")
def test_the_example_runs(capsys):
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "transformers_sinks.py"), run_name="__main__")
    assert "constant" in capsys.readouterr().out
