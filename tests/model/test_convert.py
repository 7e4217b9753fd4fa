"""Checkpoints of other families: the same logits, whatever the family can be; the rest is refused by its name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, PreTrainedConfig

from checkpoints import CASES, GPT2, GROUPED, LLAMA3, SIZES, VOCABULARY, configuration, random_model, saved
from command_line import assert_refused
from entropi.errors import UserError
from entropi.model.convert import known_families, options_of
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.folding import fold
from entropi.model.shape import read_shape
from entropi.training import loading

cases = pytest.mark.parametrize("name", CASES)


def tokens(batch: int = 2, length: int = 17) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def assert_equal(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within float32 noise of a model of four layers."""
    torch.testing.assert_close(ours, theirs, atol=3e-6 * float(theirs.abs().max()), rtol=0)


def pair(name: str) -> tuple[Any, EntropiForCausalLM]:
    theirs = random_model(configuration(name))
    return theirs, EntropiForCausalLM.from_transformers(theirs)


@cases
@torch.no_grad()
def test_logits_are_theirs_with_a_cache_and_with_padding(name):
    theirs, ours = pair(name)
    ids = tokens()
    expected = theirs(ids).logits
    assert_equal(ours(ids).logits, expected)

    cache = ours(ids[:, :9]).past_key_values
    steps = [ours(ids[:, i : i + 1], past_key_values=cache).logits for i in range(9, 17)]
    assert_equal(torch.cat(steps, dim=1), expected[:, 9:])

    for padding in (slice(0, 5), slice(12, 17)):
        mask = torch.ones_like(ids)
        mask[0, padding] = 0
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        found, wanted = (m(ids, attention_mask=mask, position_ids=positions).logits for m in (ours, theirs))
        assert_equal(found[mask.bool()], wanted[mask.bool()])

    options = dict(attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(ids, **options), theirs.generate(ids, **options))


@cases
def test_the_source_stays_what_it_was(name):
    theirs, ours = pair(name)
    before = {key: value.clone() for key, value in theirs.state_dict().items()}
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.add_(1.0)
    assert all(torch.equal(value, before[key]) for key, value in theirs.state_dict().items())
    assert ours.config.initializer_range == theirs.config.initializer_range


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("GPT-NeoX", "Llama with GeGLU")])
@torch.no_grad()
def test_the_private_program_computes_their_logits(name):
    """Of models whose GELU is the tanh form, which stands for the exact one in private."""
    pytest.importorskip("jax")
    import msgspec
    import numpy as np

    from entropi.private.compute.description import Description
    from entropi.private.compute.program import run_plain

    theirs, ours = pair(name)
    folded = fold(ours)
    description = msgspec.convert(folded.description, Description)
    weights = {key: value.astype(np.float32) for key, value in folded.weights.items()}
    prompt = tokens(1)[0].tolist()
    generated, rows = run_plain(description, weights, prompt, 3, "quartic", exact=True)
    for step, row in enumerate(rows):
        expected = theirs(torch.tensor([prompt + generated[:step]])).logits[0, -1].numpy()
        np.testing.assert_allclose(row, expected, atol=3e-5 * np.abs(expected).max(), rtol=0)


@cases
def test_costs_are_read_from_the_same_configuration(name, tmp_path):
    from entropi.costs.operations import parameters
    from entropi.model.shape import expected_description

    theirs, ours = pair(name)
    theirs.config.save_pretrained(tmp_path)
    shape = read_shape(tmp_path)
    assert parameters(shape) == ours.num_parameters()
    assert expected_description(shape) == fold(ours).description


@pytest.mark.parametrize("family", known_families())
def test_every_field_of_a_configuration_is_known(family):
    """Read, or known not to matter, or refused: a field that transformers adds has to be looked at."""
    config = next(configuration(name) for name in CASES if configuration(name).model_type == family)
    theirs = {field.name for field in dataclasses.fields(config)} - {
        f.name for f in dataclasses.fields(PreTrainedConfig)
    }
    _, given = options_of(config.to_dict())
    assert theirs - given.known == set()


@pytest.mark.parametrize("family", known_families())
def test_what_a_file_does_not_say_is_transformers_default(family):
    name = next(name for name in CASES if configuration(name).model_type == family)
    kind = type(configuration(name))
    sizes = GPT2 if family == "gpt2" else SIZES if family == "gpt_neox" else GROUPED
    caps = dict(attn_logit_softcapping=None, final_logit_softcapping=None) if family == "gemma2" else {}
    options, given = options_of({"model_type": family, **sizes, **caps})
    expected, expected_given = options_of(kind(**sizes, **caps).to_dict())
    tokens_ids = dict(bos_token_id=None, eos_token_id=None, pad_token_id=None)
    assert options | tokens_ids == expected | tokens_ids
    assert given.notes == expected_given.notes


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("llama", dict(rope_theta=500.0), dict(rope_parameters=dict(rope_type="default", rope_theta=500.0))),
        (
            "llama",
            dict(rope_theta=1e4, rope_scaling={k: v for k, v in LLAMA3.items() if k != "rope_theta"}),
            dict(rope_parameters=LLAMA3),
        ),
        (
            "llama",
            dict(rope_scaling=dict(type="linear", factor=2.0)),
            dict(rope_parameters=dict(rope_type="linear", factor=2.0, rope_theta=1e4)),
        ),
        (
            "gpt_neox",
            dict(rotary_pct=0.5, rotary_emb_base=500),
            dict(rope_parameters=dict(rope_type="default", rope_theta=500.0, partial_rotary_factor=0.5)),
        ),
        (
            "gemma3_text",
            dict(rope_theta=2e6, rope_local_base_freq=100.0, rope_scaling=dict(rope_type="linear", factor=8.0)),
            dict(
                rope_parameters=dict(
                    full_attention=dict(rope_type="linear", factor=8.0, rope_theta=2e6),
                    sliding_attention=dict(rope_type="default", rope_theta=100.0),
                )
            ),
        ),
    ],
)
def test_older_configurations_say_the_same(family, old, new):
    common = {"model_type": family, **GROUPED}
    assert options_of(common | old)[0] == options_of(common | new)[0]


def test_a_sliding_window_cuts_the_context():
    for name in ("Mistral with a window", "Qwen2 with a window", "Gemma 2", "Gemma 3"):
        theirs, ours = pair(name)
        assert ours.config.max_position_embeddings == 24
        _, given = options_of(theirs.config.to_dict())
        assert given.notes == ["its context is cut from 40 tokens to the 24 of its sliding window"]
    _, given = options_of(configuration("Qwen2 with a window", max_window_layers=4).to_dict())
    assert given.notes == []


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("GPT-2", dict(add_cross_attention=True), "this GPT-2 uses cross-attention, which entropi models do not have"),
        ("GPT-2", dict(activation_function="tanh"), "the activation 'tanh' has no secure form"),
        ("Llama", dict(hidden_act="relu2"), "the activation 'relu2' has no secure form; known are silu and gelu"),
        (
            "Qwen2",
            dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=4.0)),
            "this Qwen2 uses the rotary scaling 'yarn'",
        ),
        ("Gemma", dict(use_bidirectional_attention=True), "this Gemma uses attention to later tokens"),
        (
            "Gemma 2",
            dict(attn_logit_softcapping=50.0, final_logit_softcapping=30.0),
            "a soft cap of attention's logits and a soft cap of the final logits",
        ),
        ("Llama", dict(quantization_config={"bits": 4}), "this Llama uses quantised weights"),
        ("Llama", dict(model_type="phi3"), "models of type 'phi3' cannot be converted; those of gemma, gemma2"),
    ],
)
def test_what_entropi_models_do_not_have_is_refused_by_its_name(name, changes, words):
    with pytest.raises(UserError, match=words):
        options_of(configuration(name).to_dict() | changes)


# --- Folders ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(random_model(configuration("Llama")), tmp_path / "theirs")


@torch.no_grad()
def test_a_folder_is_converted_with_all_that_belongs_to_it(entropi, surroundings, tmp_path):
    theirs = random_model(configuration("Gemma", torch_dtype="bfloat16")).to(torch.bfloat16)
    theirs.generation_config.stop_strings = ["END"]
    theirs.generation_config.eos_token_id = [2, 7]
    source, target = saved(theirs, tmp_path / "theirs"), tmp_path / "ours"
    done = entropi("convert", source, target)
    assert done.status == 0, done.err
    assert done.out.splitlines() == [
        "its weights were bfloat16 and are float32 now",
        f"SM+RMS+GeGLU, {theirs.num_parameters():,} parameters in float32, written to {target}",
    ]
    assert_refused(entropi("convert", source, target), f"{target} exists: name a folder that is new or empty")
    assert_refused(entropi("convert", target, tmp_path / "again"), "is an entropi model already")

    ours, tokenizer, _ = loading.open_model(target)
    theirs = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    assert_equal(ours(tokens()).logits, theirs(tokens()).logits)
    assert tokenizer.encode("ABC").ids == [36, 37, 38]
    generation = json.loads((target / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["bos_token_id"]) == ([2, 7], 1)
    assert generation["stop_strings"] == ["END"]
    assert entropi("fold", target, tmp_path / "folded").status == 0
    assert json.loads((tmp_path / "folded" / "folded.json").read_text())["end_of_text"] == [2, 7]
    assert "m['content']" in (target / "chat_template.jinja").read_text()


def test_commands_take_a_folder_as_it_is(entropi, surroundings, folder, corpus, tmp_path):
    pytest.importorskip("jax")
    words = ["--corpus", corpus, "--sequences", "2"]
    for command in ("evaluate", "diagnose"):
        more = ["--heatmap", tmp_path / "x.png"] if command == "diagnose" else []
        done = entropi(command, folder, *words, *more)
        assert done.status == 0, done.err
    done = entropi("cost", "--architecture", folder, "--seq-len", 8, "--json")
    assert json.loads(done.out)["counts"]["architecture"] == "SM+RMS+SwiGLU"
    done = entropi("fold", folder, tmp_path / "folded")
    assert done.status == 0, done.err
    assert (tmp_path / "folded" / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert json.loads((tmp_path / "folded" / "folded.json").read_text())["key_value_heads"] == 2


def test_texts_end_as_the_checkpoint_says(entropi, surroundings, folder, corpus, tmp_path):
    """Where none of the usual tokens is in the vocabulary."""
    for file in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / file).read_text()
        assert '"</s>"' in text
        (folder / file).write_text(text.replace('"</s>"', '"<|end_of_turn|>"'))
    assert entropi("convert", folder, tmp_path / "ours").status == 0
    done = entropi("evaluate", tmp_path / "ours", "--corpus", corpus, "--sequences", 2)
    assert done.status == 0, done.err
    model, tokenizer, _ = loading.open_model(tmp_path / "ours")
    assert loading._end_of_text(model, tokenizer) == 2


def test_texts_begin_as_the_checkpoint_says(entropi, surroundings, folder, corpus, tmp_path):
    assert entropi("convert", folder, tmp_path / "plain").status == 0
    begun = Tokenizer.from_file(str(folder / "tokenizer.json"))
    begun.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    begun.save(str(folder / "tokenizer.json"))
    assert entropi("convert", folder, tmp_path / "begun").status == 0
    plain, found = (
        loading.open_with_text(tmp_path / name, str(corpus), None, 2, 9).blocks for name in ("plain", "begun")
    )
    assert found.shape == plain.shape
    assert (found[:, 0] == 1).all()
    assert found[0, 1:].tolist() == plain[0, :8].tolist()
    assert 1 not in plain[:, 0]


@pytest.mark.parametrize("name", ["Gemma 3", "Qwen2", "Qwen3", "GPT-NeoX"])
def test_the_price_of_every_option(entropi, surroundings, tmp_path, name):
    pytest.importorskip("jax")
    configuration(name).save_pretrained(tmp_path)
    done = entropi("cost", "--architecture", tmp_path, "--seq-len", 8)
    assert done.status == 0, done.err
    assert ("--bias qkv" in done.out) == (name == "Qwen2")  # heads of their own width and the like have no option


def test_too_little_memory_is_told_before_anything_is_loaded(entropi, surroundings, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "available_memory", lambda: 100_000)
    count = random_model(configuration("Llama")).num_parameters()
    (folder / "model.safetensors").write_bytes(b"")  # nobody reads it
    left, has = "0.0001 GB are left on this machine", f"has {count:,} parameters, and"
    message = f"{has} converting it takes {9 * count / 1e9:.3g} GB of memory: {left}"
    assert_refused(entropi("convert", folder, tmp_path / "ours"), message)
    assert_refused(entropi("fold", folder, tmp_path / "ours"), f"{has} folding it takes 0.00035", left)
    assert not (tmp_path / "ours").exists()


def test_damaged_checkpoints_are_refused_in_one_line(entropi, surroundings, folder, tmp_path):
    weights = load_file(folder / "model.safetensors")
    name, extra = "model.layers.1.mlp.up_proj.weight", "model.layers.9.mlp.up_proj.weight"
    for changed, words in (
        ({k: v for k, v in weights.items() if k != name}, f"is damaged: {name} is missing"),
        (weights | {extra: weights[name].clone()}, f"its configuration has no place for the tensor {extra}"),
        (weights | {name: weights[name][1:].clone()}, "cannot be opened"),
    ):
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        assert_refused(entropi("convert", folder, tmp_path / "ours"), words)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})

    config = json.loads((folder / "config.json").read_text())
    for changes, words in (
        ({"vocab_size": 2**21}, "vocab_size must be 1 to 1048576, got 2097152"),
        ({"model_type": "phi3"}, "models of type 'phi3' cannot be converted; those of gemma,"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, "the rotary scaling 'yarn'"),
    ):
        (folder / "config.json").write_text(json.dumps(config | changes))
        assert_refused(entropi("convert", folder, tmp_path / "ours"), words)
    (folder / "config.json").unlink()
    assert_refused(entropi("convert", folder, tmp_path / "ours"), "holds no model: config.json is missing or damaged")


def test_weights_that_are_not_the_configurations():
    config = configuration("Llama").to_dict()
    held = dict(random_model(configuration("Llama")).state_dict())
    from entropi.model.convert import Weights

    wrong = "model.embed_tokens.weight"
    for changed, words in (
        ({k: v for k, v in held.items() if k != wrong}, f"lacks the tensor {wrong}"),
        (held | {"more": held[wrong]}, "has the tensor more, which a Llama of its configuration has not"),
        (held | {wrong: held[wrong][:5]}, "model.token_embedding.weight is .5, 24., not .61, 24."),
        (held | {"model.layers.0.self_attn.q_proj.bias": held[wrong][0]}, "query.bias is missing or too much"),
    ):
        with pytest.raises(UserError, match=words):
            EntropiForCausalLM.from_weights(config, Weights(changed))


# --- GGUF files -------------------------------------------------------------------------------------------------------


def test_gguf_files_that_cannot_be_used_say_why(entropi, surroundings, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    import numpy as np

    def write(name: str, *, tokenizer: bool, tensor: str = "token_embd.weight") -> Path:
        writer = gguf.GGUFWriter(tmp_path / name, "llama")
        writer.add_context_length(16)
        if tokenizer:
            writer.add_tokenizer_model("gpt2")
            writer.add_token_list(["a", "b"])
        writer.add_tensor(tensor, np.zeros((2, 4), np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return tmp_path / name

    (tmp_path / "text.gguf").write_text("no such file")
    for path, words in (
        (tmp_path / "none.gguf", "there is no file"),
        (tmp_path / "text.gguf", "text.gguf is no GGUF file"),
        (write("bare.gguf", tokenizer=False), "bare.gguf holds no tokenizer"),
        (write("own.gguf", tokenizer=True, tensor="rope_freqs.weight"), "has rotary frequencies of its own"),
        (write("small.gguf", tokenizer=True), "small.gguf"),
    ):
        assert_refused(entropi("convert", path, tmp_path / "ours"), words)
        assert not (tmp_path / "ours").exists()
    monkeypatch.setattr("entropi.model.gguf.importlib.util.find_spec", lambda name: None)
    assert_refused(entropi("convert", tmp_path / "bare.gguf", tmp_path / "ours"), "pip install 'entropi[gguf]'")


def test_a_gguf_file_is_read_once(entropi, surroundings, tmp_path, monkeypatch):
    """For configuration, tokenizer, weights and chat template together; its vocabulary takes seconds a time."""
    gguf = pytest.importorskip("gguf")
    readings = []

    class Counted(gguf.GGUFReader):
        def __init__(self, path, *more):
            readings.append(path)
            super().__init__(path, *more)

    monkeypatch.setattr(gguf, "GGUFReader", Counted)
    for number, command in enumerate(("fold", "convert")):
        path = write_llama(tmp_path / f"{number}.gguf")  # transformers' reading of a configuration is kept
        done = entropi(command, path, tmp_path / command)
        assert (done.status, len(readings)) == (0, number + 1), done.err
    assert (tmp_path / "fold" / "chat.json").is_file()
    assert gguf.GGUFReader is Counted


def write_llama(path: Path) -> Path:
    """A GGUF file of a tiny Llama with random weights, a tokenizer of bytes and a chat template."""
    import gguf
    import numpy as np
    from tokenizers import pre_tokenizers

    tokens, width = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ab", "<|end|>"], 16
    end = len(tokens) - 1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * end + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|end|>{% endfor %}")
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    shapes |= {f"blk.0.attn_{part}": (width, width) for part in ("q", "k", "v", "output")}
    shapes |= {f"blk.0.{part}_norm": (width,) for part in ("attn", "ffn")}
    shapes |= {"blk.0.ffn_gate": (2 * width, width), "blk.0.ffn_up": (2 * width, width)}
    shapes |= {"blk.0.ffn_down": (width, 2 * width)}
    random = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", random.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.slow
@pytest.mark.pretrained
@torch.no_grad()
def test_smollm2_from_its_gguf_file(smollm2, smollm2_file, entropi, surroundings, tmp_path):
    """Real weights: the logits of transformers' model, and the answer."""
    theirs, tokenizer = smollm2
    done = entropi("convert", smollm2_file, tmp_path / "ours")
    assert done.status == 0, done.err
    ours, backend, _ = loading.open_model(tmp_path / "ours")
    prompt = "The capital of France is"
    assert backend.encode(prompt).ids == tokenizer(prompt).input_ids
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    expected = theirs(ids).logits
    torch.testing.assert_close(ours(ids).logits, expected, atol=2e-4, rtol=0)
    text = ours.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert tokenizer.decode(text[0, ids.shape[1] :]) == " Paris."
    assert ours.generation_config.eos_token_id == 2
    assert "<|im_start|>" in (tmp_path / "ours" / "chat_template.jinja").read_text()
