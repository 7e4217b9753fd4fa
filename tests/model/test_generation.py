"""Caches, masks and packed rows: however a text is cut up, its logits and entropies are those of one pass over it."""

from dataclasses import fields

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import (
    CompileConfig,
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

import entropi
from entropi import EntropiForCausalLM
from model.test_model import VARIANTS, make_model, tokens, variants

CLOSE = dict(atol=2e-4, rtol=1e-4)  # logits are of size 10, sums of a few hundred float32 products
LENGTH, NEW = 9, 8


def sharp(name="fused", seed=0, **options):
    """A model that tells tokens apart: what it generates changes from token to token."""
    model = make_model(**{**VARIANTS[name], **options}, seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2.5)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model


families = pytest.mark.parametrize("name", ["fused", "rotary, grouped"])


def padded(batch=2):
    """Prompts, the first of which begins with three tokens of padding."""
    ids, mask = tokens(batch, LENGTH), torch.ones(batch, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    return ids, mask


def generate(model, ids, mask, **options):
    return model.generate(
        ids,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=NEW,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )


def whole(model, sequences, mask):
    """One pass over all but the last token, which generation never reads; positions as `generate` counts them."""
    mask = torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1] - 1)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(sequences[:, :-1], attention_mask=mask, position_ids=positions, use_cache=False), mask.bool()


CACHES = {
    "dynamic": lambda config: {},
    "user's dynamic": lambda config: {"past_key_values": DynamicCache()},
    "user's static": lambda config: {"past_key_values": StaticCache(config=config, max_cache_len=30)},
    "static": lambda config: {"cache_implementation": "static"},
    "static under an old name": lambda config: {"cache_implementation": "hybrid"},
    "none": lambda config: {"use_cache": False},
    "chunked": lambda config: {"prefill_chunk_size": 4},
    "chunked static": lambda config: {"prefill_chunk_size": 4, "cache_implementation": "static"},
}


@families
@pytest.mark.parametrize("cache", CACHES.values(), ids=CACHES)
def test_generated_text_has_the_logits_and_entropies_of_one_pass(name, cache):
    model, (ids, mask) = sharp(name), padded()
    options = cache(model.config)
    with entropi.record_entropy(model, keep_rows=True) as recorded:
        out = generate(model, ids, mask, **options)
    expected, text = whole(model, out.sequences, mask)
    assert len(set(out.sequences[:, LENGTH:].flatten().tolist())) > 4
    torch.testing.assert_close(torch.stack(out.logits, dim=1), expected.logits[:, LENGTH - 1 :], **CLOSE)
    for layer, entropies in enumerate(expected.entropies):
        assert (entropies.transpose(1, 2)[~text] == 0).all()
        if not options.get("use_cache", True):
            torch.testing.assert_close(recorded.rows[layer][-1], entropies, **CLOSE)
            continue
        torch.testing.assert_close(torch.cat(recorded.rows[layer], dim=2), entropies, **CLOSE)
        torch.testing.assert_close(recorded.mean()[layer], entropies.transpose(1, 2)[text].mean(dim=0), **CLOSE)


def test_nothing_is_masked_where_causality_says_all():
    """Training, prompts and decoding without padding take no mask, whatever the cache; padding alone one row of it."""
    model, shown = make_model(), []
    hook = model.model.blocks[0].attention.register_forward_pre_hook(lambda module, args: shown.append(args[3]))
    ids, mask = padded()
    model.train()(ids, attention_mask=torch.ones_like(ids))
    model.eval()
    for options in ({}, {"cache_implementation": "static"}, {"prefill_chunk_size": 4}):
        generate(model, ids, torch.ones_like(ids), **options)
    assert all(visible.mask is None and visible.is_causal and visible.counted is None for visible in shown)
    shown.clear()
    for options in ({}, {"cache_implementation": "static"}):
        generate(model, ids, mask, **options)
    assert [tuple(visible.mask.shape) for visible in shown] == [(2, 1, 1, LENGTH + n) for n in range(NEW)] * 2
    hook.remove()


def test_patterns_recorded_with_a_static_cache_are_those_with_a_dynamic_one():
    model, ids = sharp(), tokens(1, LENGTH)
    found = []
    for options in ({}, {"cache_implementation": "static"}):
        with entropi.record_entropy(model, keep_patterns=True) as recorded:
            generate(model, ids, torch.ones_like(ids), **options)
        found.append([torch.stack(pattern) for pattern in recorded.patterns[0]])
    torch.testing.assert_close(*found)


def test_a_quantised_cache_rounds_and_no_more():
    """Keys in 8-bit floats have three bits behind the leading one: some percent; without what is cached it is half."""
    model, (ids, mask) = make_model("SM(t)+ScFuFFN"), padded()
    exact, out = (
        generate(model, ids, mask, pad_token_id=0, eos_token_id=None, **options).logits[1]
        for options in ({}, {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}})
    )
    assert 0 < (out - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_beams_are_reordered_with_their_cache(options):
    model, (ids, mask) = sharp(), padded()
    expected = generate(model, ids, mask, num_beams=3, use_cache=False)
    assert torch.equal(generate(model, ids, mask, num_beams=3, **options).sequences, expected.sequences)


@pytest.mark.parametrize("way", ["assistant", "prompt lookup"])
def test_assisted_generation_goes_back_to_where_it_was_right(way):
    """The cache is cropped where a guess was wrong; what comes out is what the model says alone."""
    model, ids = sharp(), tokens(1, LENGTH)
    ids[0, -3:] = ids[0, :3]  # something to look up
    options = {"prompt_lookup_num_tokens": 3} if way == "prompt lookup" else {"assistant_model": sharp(seed=3)}
    mask = torch.ones_like(ids)
    assert torch.equal(generate(model, ids, mask, **options).sequences, generate(model, ids, mask).sequences)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_a_conversation_goes_on_with_the_cache_of_the_last_answer(static):
    model, (ids, mask) = sharp(), padded()
    cache = StaticCache(config=model.config, max_cache_len=36) if static else DynamicCache()
    first = generate(model, ids, mask, past_key_values=cache)
    longer = torch.cat([first.sequences, tokens(2, 4, seed=5)], dim=1)
    mask = torch.cat([mask, mask.new_ones(2, longer.shape[1] - LENGTH)], dim=1)
    second = generate(model, longer, mask, past_key_values=first.past_key_values)
    expected = generate(model, longer, mask, use_cache=False)
    assert torch.equal(second.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(second.logits), torch.stack(expected.logits), **CLOSE)


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
@variants
def test_passes_over_pieces_are_one_pass(options, static):
    """Every variant of the model; pieces of several tokens and of one, and no padding."""
    model, ids = make_model(**options), tokens(2, 12)
    cache = StaticCache(config=model.config, max_cache_len=20) if static else None
    expected, parts = model(ids, use_cache=False), []
    for piece in ids.split([5, 1, 4, 2], dim=1):
        parts.append(model(piece, past_key_values=cache))
        cache = parts[-1].past_key_values
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), expected.logits, **CLOSE)
    for layer, entropies in enumerate(expected.entropies):
        torch.testing.assert_close(torch.cat([p.entropies[layer] for p in parts], 2), entropies, **CLOSE)


@pytest.mark.slow
@families
def test_decoding_compiles_once_over_a_static_cache(name):
    """In one graph, which serves every token; with the mask of a padded batch, and chunks of a prompt."""
    model, (ids, mask) = sharp(name), padded()
    text = tokens(2, 12)
    expected = model(text, use_cache=False)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=model.config, max_cache_len=20)
    with torch.no_grad():
        parts = [model(text[:, :5], past_key_values=cache)]
        counters.clear()
        parts += [compiled(text[:, i : i + 1], past_key_values=cache) for i in range(5, 10)]
        assert counters["stats"]["unique_graphs"] == 1
        parts.append(compiled(text[:, 10:], past_key_values=cache))
    torch.testing.assert_close(torch.cat([p.logits for p in parts], 1), expected.logits, **CLOSE)
    torch.testing.assert_close(torch.cat([p.entropies[1] for p in parts], 2), expected.entropies[1], **CLOSE)

    compiling = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiling._compile_all_devices = True
    plain = generate(model, ids, mask)
    for options in ({}, {"prefill_chunk_size": 4}):
        torch._dynamo.reset()
        counters.clear()
        out = generate(model, ids, mask, cache_implementation="static", compile_config=compiling, **options)
        assert counters["stats"]["unique_graphs"] >= 1
        torch.testing.assert_close(torch.stack(out.logits), torch.stack(plain.logits), **CLOSE)
    torch._dynamo.reset()


# --- Rows of several documents ----------------------------------------------------------------------------------------

DOCUMENTS = (5, 1, 7, 4)


def positions_of(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@variants
def test_packed_documents_are_as_if_alone(options, training):
    """Logits and entropies; two rows that are packed differently, as temperatures go by position."""
    model, ids = make_model(**options).train(training), tokens(2)
    if "SNorm" in options["architecture"]:
        model.eval()  # every pass in training takes one step of the power iteration
    lengths = (DOCUMENTS, (9, 8))
    packed = model(ids, position_ids=torch.cat([positions_of(*n) for n in lengths]))
    assert packed.past_key_values is None
    for row in (0, 1):
        alone = [model(part, use_cache=False) for part in ids[row : row + 1].split(lengths[row], dim=1)]
        torch.testing.assert_close(packed.logits[row : row + 1], torch.cat([a.logits for a in alone], 1), **CLOSE)
        for layer in range(3):
            entropies = torch.cat([a.entropies[layer] for a in alone], 2)
            torch.testing.assert_close(packed.entropies[layer][row : row + 1], entropies, **CLOSE)


def test_packed_documents_have_their_own_gradients():
    model, ids = make_model("SM(t)+ScFuFFN", entropy_regularizer=None).train(), tokens(1)
    labels = ids.clone()
    labels[:, [0, 5, 6, 13]] = -100  # the first token of a document follows nothing

    def gradients(*losses):
        model.zero_grad()
        sum(losses).backward()
        return [p.grad.clone() for p in model.parameters()]

    options = dict(num_items_in_batch=13)
    packed = gradients(model(ids, position_ids=positions_of(*DOCUMENTS), labels=labels, **options).loss)
    parts = ids.split(DOCUMENTS, dim=1)
    alone = gradients(*(model(part, labels=part, **options).loss for part in parts if part.shape[1] > 1))
    for ours, theirs in zip(packed, alone):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_rows_longer_than_the_model_are_taken_where_their_documents_are_not():
    model, ids = make_model(), tokens(1, 60)  # of 40 positions
    packed = model(ids, position_ids=positions_of(30, 30)).logits
    torch.testing.assert_close(packed[:, 30:], model(ids[:, 30:]).logits, **CLOSE)
    with pytest.raises(ValueError, match="position_ids from 0 to 44 do not fit the 40 positions of this model"):
        model(ids, position_ids=positions_of(15, 45))


def test_rows_are_packed_where_transformers_takes_them_for_packed():
    """Not with an attention mask, nor with a cache: Llama under SDPA decides alike."""
    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=61, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    ).eval()
    ids, positions = tokens(1), positions_of(9, 8)
    for options in (
        {"use_cache": False},
        {"use_cache": False, "attention_mask": torch.ones_like(ids)},
        {"past_key_values": None},
    ):
        decisions = []
        for model in (make_model(position_embedding="rotary"), llama):
            if "past_key_values" in options:
                options = {"past_key_values": DynamicCache()}
            with torch.no_grad():
                second = model(ids, position_ids=positions, **options).logits[:, 9:]
                alone = model(ids[:, 9:], use_cache=False).logits
            decisions.append(bool((second - alone).abs().max() < 1e-4))
        assert decisions[0] == decisions[1] == (list(options) == ["use_cache"])


@pytest.mark.slow
def test_packed_rows_are_trained_in_one_graph():
    torch._dynamo.reset()
    model, ids, positions = make_model("SM(t)+ScFuFFN").train(), tokens(1), positions_of(*DOCUMENTS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for asked in (positions, positions_of(17)):  # one text a row as well
        torch.testing.assert_close(compiled(ids, position_ids=asked).logits, model(ids, position_ids=asked).logits)
    torch._dynamo.reset()


# --- Masks ------------------------------------------------------------------------------------------------------------


def additive(visible, dtype=torch.float32):
    """transformers' mask of eager attention."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


KINDS = {"boolean": lambda mask: mask}
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    KINDS[str(dtype)] = lambda mask, dtype=dtype: additive(mask, dtype)


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_a_mask_with_four_dimensions_says_all(kind):
    """Padding and causality as one mask are the 2-D mask; every kind of cache takes it, row by row too."""
    model, (ids, mask) = sharp(), padded()
    visible = (torch.ones(LENGTH, LENGTH).tril().bool() & mask.bool()[:, None])[:, None]
    expected = model(ids, attention_mask=mask, use_cache=False)
    with entropi.record_entropy(model) as recorded:
        found = model(ids, attention_mask=kind(visible), use_cache=False)
    torch.testing.assert_close(found.logits, expected.logits, **CLOSE)
    torch.testing.assert_close(torch.stack(found.entropies), torch.stack(expected.entropies), **CLOSE)
    with entropi.record_entropy(model) as alike:
        model(ids, attention_mask=mask, use_cache=False)
    torch.testing.assert_close(recorded.mean(), alike.mean(), **CLOSE)  # rows of padding are not counted
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=12)):
        for width in {LENGTH, 12 if isinstance(cache, StaticCache) else LENGTH}:
            cache.reset()
            room = torch.nn.functional.pad(visible, (0, 12 - LENGTH))  # a static cache's mask may cover all its keys
            parts = [
                model(
                    ids[:, first:last],
                    attention_mask=kind(room[:, :, first:last, : last if width == LENGTH else width]),
                    past_key_values=cache,
                ).logits
                for first, last in ((0, 6), (6, 7), (7, 9))
            ]
            torch.testing.assert_close(torch.cat(parts, 1), expected.logits, **CLOSE)


def test_a_mask_with_four_dimensions_is_used_as_it_is():
    """A prefix that sees itself whole, by head: the same as GPT-2's own attention makes of it."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_embd=24, n_layer=2, n_head=4, n_positions=40, attn_implementation="eager")
    gpt2 = GPT2LMHeadModel(config).eval()
    ours, ids = EntropiForCausalLM.from_transformers(gpt2), tokens(2)
    visible = torch.ones(17, 17).tril().bool().repeat(2, 4, 1, 1)
    visible[:, :2, :6, :6] = True
    with torch.no_grad():
        theirs = gpt2(ids, attention_mask=additive(visible), output_attentions=True, use_cache=False)
        found = ours(ids, attention_mask=visible)
    torch.testing.assert_close(found.logits, theirs.logits, atol=1e-5, rtol=1e-4)
    for weights, entropy in zip(theirs.attentions, found.entropies):
        torch.testing.assert_close(entropy, torch.special.entr(weights).sum(-1), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("shape", "dtype", "problem"),
    [
        ((2, 5), torch.long, r"attention_mask \(2, 5\) does not fit: \(2, 9\) is needed, cached tokens included, or"),
        ((3, 9), torch.long, r"attention_mask \(3, 9\) does not fit"),
        ((9,), torch.long, r"attention_mask \(9,\) does not fit"),
        ((2, 9, 9), torch.bool, r"attention_mask \(2, 9, 9\) does not fit: .* or \(2 or 1, 4 or 1, 9, 9\)"),
        ((2, 1, 9, 8), torch.bool, r"attention_mask \(2, 1, 9, 8\) does not fit"),
        ((2, 3, 9, 9), torch.bool, r"attention_mask \(2, 3, 9, 9\) does not fit"),
        ((2, 1, 9, 9), torch.long, r"a 4-D attention_mask is boolean \(True = visible\) or added .* not torch.int64"),
    ],
)
def test_masks_that_do_not_fit(shape, dtype, problem):
    with pytest.raises(ValueError, match=problem):
        make_model()(tokens(2, LENGTH), attention_mask=torch.ones(shape, dtype=dtype))


def test_a_mask_of_the_new_tokens_alone_is_refused():
    """transformers takes it for one of the first tokens, and what is cached for padding."""
    model = make_model()
    cache = model(tokens(2, LENGTH)).past_key_values
    with pytest.raises(ValueError, match=r"\(2, 1\) does not fit: \(2, 10\) is needed, cached tokens included"):
        model(tokens(2, 1), attention_mask=torch.ones(2, 1), past_key_values=cache)


# --- What is refused --------------------------------------------------------------------------------------------------


def sliding(window=4):
    return LlamaConfig(
        num_hidden_layers=3, sliding_window=window, num_attention_heads=4, layer_types=["sliding_attention"] * 3
    )


def filled(batch):
    return make_model()(tokens(batch, 5)).past_key_values


UNFIT = {
    "sliding": (lambda: DynamicCache(config=sliding()), "does not keep all keys and values of every layer"),
    "static sliding": (lambda: StaticCache(config=sliding(), max_cache_len=20), "does not keep all keys and values"),
    "tuple": (lambda: ((torch.zeros(2, 4, 5, 6),) * 2,) * 3, "must be a transformers Cache .* got tuple"),
    "two caches": (lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()), "got EncoderDecoderCache"),
    "layers": (lambda: DynamicCache(config=LlamaConfig(num_hidden_layers=2)), "has 2 layers, the model 3"),
    "batch": (lambda: filled(1), "of the cached keys are 1 x 4 x 6, of the new ones 2 x 4 x 6"),
    "too short": (
        lambda: StaticCache(config=make_model().config, max_cache_len=8),
        "the cache is made for 8 tokens and would have to hold 9",
    ),
}


@pytest.mark.parametrize(("cache", "problem"), UNFIT.values(), ids=UNFIT)
def test_caches_that_do_not_fit(cache, problem):
    with pytest.raises(ValueError, match=problem):
        make_model()(tokens(2, LENGTH), past_key_values=cache())


def test_inputs_that_do_not_fit():
    model, ids = make_model(), tokens(2, LENGTH)
    states = model.get_input_embeddings()(ids)
    for options, problem in (
        ({}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids, "inputs_embeds": states}, "either input_ids or inputs_embeds"),
        ({"input_ids": ids, "output_attentions": True}, "record_entropy"),
        ({"input_ids": ids, "position_ids": torch.arange(9)}, r"\(9,\) do not fit: \(2 or 1, 9\) is needed"),
        ({"input_ids": ids, "position_ids": torch.arange(8)[None]}, r"\(1, 8\) do not fit"),
        ({"input_ids": ids, "position_ids": torch.arange(-1, 8)[None]}, "from -1 to 7 do not fit the 40 positions"),
        ({"input_ids": ids, "labels": ids, "logits_to_keep": 1}, r"labels \(2, 9\) do not fit logits of \(2, 1\)"),
        ({"input_ids": ids, "position_ids": positions_of(5, 4), "use_cache": True}, "pass use_cache=False"),
    ):
        with pytest.raises(ValueError, match=problem):
            model(**options)
    with pytest.raises(ValueError, match="use generate with a padded batch"):
        model.generate_batch([[1, 2, 3]])
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="record_entropy"):
        model(ids)


# --- What the forward pass takes and returns --------------------------------------------------------------------------


def test_embeddings_in_place_of_tokens():
    model, (ids, mask) = sharp(), padded()
    states = model.get_input_embeddings()(ids)
    torch.testing.assert_close(model(inputs_embeds=states).logits, model(ids).logits)
    options = dict(attention_mask=mask, do_sample=False, max_new_tokens=NEW)
    for cache in (None, "static"):
        found = model.generate(inputs_embeds=states, cache_implementation=cache, **options)
        assert torch.equal(found, model.generate(ids, **options)[:, LENGTH:])


def test_logits_to_keep():
    model, ids = make_model(), tokens(2, LENGTH)
    full = model(ids).logits
    chosen, mask = torch.tensor([[1, 4], [0, 8]]), tokens(2, LENGTH) > 30
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, full[:, -2:])
    torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([1, 5])).logits, full[:, [1, 5]])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, full[torch.arange(2)[:, None], chosen])
    torch.testing.assert_close(model(ids, logits_to_keep=mask).logits, full[mask])


def test_a_cache_in_training_is_made_where_asked():
    model, ids = make_model("SM(t)+ScFuFFN").train(), tokens()
    assert model(ids).past_key_values is None
    first = model(ids[:, :9], use_cache=True)
    second = model(ids[:, 9:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, model(ids).logits[:, 9:], **CLOSE)
    second.logits.sum().backward()  # through the cache
    model.activation_checkpointing_enable()
    assert model(ids).past_key_values is None
    with pytest.raises(ValueError, match="gradient checkpointing would fill the cache twice"):
        model(ids, use_cache=True)


def test_a_cache_has_either_name_and_the_output_that_of_transformers():
    model, ids = make_model(), tokens()
    theirs = {field.name for field in fields(CausalLMOutputWithPast)} & {"past_key_values", "cache"}
    expected = model(ids)
    assert set(expected) & {"past_key_values", "cache"} == theirs
    for name in ("past_key_values", "cache"):
        cache = DynamicCache()
        first = model(ids[:, :9], **{name: cache})
        assert first[next(iter(theirs))] is cache
        second = model(ids[:, 9:], **{name: cache})
        torch.testing.assert_close(second.logits, expected.logits[:, 9:], **CLOSE)
    with pytest.raises(ValueError, match="two names of one argument"):
        model(ids, past_key_values=DynamicCache(), cache=DynamicCache())


def test_outputs_as_a_tuple_and_hidden_states_by_configuration():
    model, ids = make_model(), tokens()
    loss, logits = model(ids, labels=ids, return_dict=False, use_cache=False)[:2]
    expected = model(ids, labels=ids)
    torch.testing.assert_close([loss, logits], [expected.loss, expected.logits])
    model.config.output_hidden_states, model.config.return_dict = True, False
    assert len(model(ids, use_cache=False)[1]) == 4


@pytest.mark.parametrize("hidden", [-torch.inf, torch.finfo(torch.float32).min, -1e9, -1e4])
def test_padding_under_additive_masks_is_not_counted_however_it_is_hidden(hidden):
    model, ids = make_model("SM+LN+G"), tokens(1, 10)
    mask = torch.ones(1, 10, dtype=torch.long)
    mask[:, :4] = 0
    visible = torch.ones(10, 10, dtype=torch.bool).tril()[None, None] & mask[:, None, None, :].bool()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    means = []
    for given in (mask, torch.zeros(1, 1, 10, 10).masked_fill(~visible, hidden)):
        with torch.no_grad(), entropi.record_entropy(model) as recorded:
            model(ids, attention_mask=given, position_ids=positions)
        means.append(recorded.mean())
    torch.testing.assert_close(*means, atol=1e-5, rtol=0)
