"""Stages are compiled once, and a further token's before it is there."""

import threading

import pytest

pytest.importorskip("spu")

from entropi.private.compute import compiling, prefix
from entropi.private.compute.compiling import Compiler, compile_ahead
from entropi.private.compute.program import Stage, stages_of_pass
from entropi.private.compute.settings import Settings
from entropi.private.preparation.online import PreparedPasses
from private_reference import VARIANTS, describe

SETTINGS = Settings(embedding="public")


def compiler_for(model, tokens):
    compiler = Compiler()
    for name, shape in model.weight_shapes().items():
        compiler.note(name, shape)
    compiler.note("embedded", (tokens, model.hidden_size))
    return compiler


def test_a_further_token_waits_for_no_compiler(monkeypatch):
    monkeypatch.setattr(compiling, "_codes", {})
    model = describe(layers=2)
    compiler = compiler_for(model, 3)
    for stage in stages_of_pass(model, SETTINGS, 3, 0):
        compiler.compile(stage)
    ahead = compiler_for(model, 1)
    for name in prefix.names(model):
        ahead.note(name, compiler.shape(name))
    before = len(compiling._codes)
    compile_ahead(stages_of_pass(model, SETTINGS, 1, 3), ahead).join()
    after = len(compiling._codes)
    assert after > before

    compiler.note("embedded", (1, model.hidden_size))
    for stage in stages_of_pass(model, SETTINGS, 1, 3):
        compiler.compile(stage)
    assert len(compiling._codes) == after
    assert compiler.shape("logits") == (1, model.vocab_size)


@pytest.mark.parametrize("output", ["logits", "argmax"])
def test_a_prepared_pass_leaves_nothing_to_the_engine_but_choices(output):
    model, settings = describe(**VARIANTS["llama"]), Settings(embedding="public", output=output)
    compiler = compiler_for(model, 3)
    passes = PreparedPasses(None, None, settings.fraction_bits, {})
    left = list(passes.parts(stages_of_pass(model, settings, 3, 0, prepared=True), compiler))
    assert [stage.name for stage in left] == ["choose"] * settings.chooses
    assert compiler.shape("logits") == (1, model.vocab_size)


def test_what_cannot_be_compiled_is_told_where_it_is_run():
    def wrong(x):
        raise ValueError("no such function")

    compiler = Compiler()
    compiler.note("x", (2,))
    stage = Stage("wrong", -1, wrong, ("x",), ("y",))
    compile_ahead([stage], compiler).join()
    with pytest.raises(ValueError, match="no such function"):
        compiler.compile(stage)


def test_only_as_many_functions_are_kept(monkeypatch):
    monkeypatch.setattr(compiling, "_codes", {})
    monkeypatch.setattr(compiling, "_MOST", 2)
    for number in range(4):
        compiler = Compiler()
        compiler.note("x", (number + 1,))
        compiler.compile(Stage("same", -1, lambda x: x + x, ("x",), ("y",)))
    assert len(compiling._codes) == 2
    assert threading.active_count() < 50
