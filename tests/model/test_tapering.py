"""Tapering: a student that begins as its teacher, operations that fade, and a plain model that is left of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import VOCABULARY, configuration, random_model
from entropi.errors import UserError
from entropi.model.configuration import EntropiConfig
from entropi.model.decoder import EntropiForCausalLM
from entropi.model.tapering import OPERATIONS, TaperedModel, TaperedNorm, leaving, target_of
from entropi.training.recipe import TAPER_STAGES

SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=12
)
IDS = torch.randint(VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
OURS = {
    "LN+G": dict(architecture="SM+LN+G"),
    "LN+G, all biases": dict(architecture="SM+LN+G", bias="all", num_key_value_heads=1),
    "slopes": dict(architecture="SM+LeakyR", leaky_slope_learned="layer"),
    "slope": dict(architecture="SM+LN+LeakyR", leaky_slope_learned="global"),
    "powers": dict(architecture="Pow+LN+G"),
    "ScFFN": dict(architecture="SM(t)+ScFFN", temperature_granularity="head"),
}
OTHERS = {
    "RMS+SwiGLU": "Llama",
    "RMS+SwiGLU, all biases": "Llama with biases, wide heads, tied",
    "parallel": "GPT-NeoX",
    "query norms": "Qwen3",
}
# Teacher, target, other options, and what leaves.
CASES: list[tuple[str, str, dict[str, Any], list[str]]] = [
    ("LN+G", "SM(t)+ScFuFFN", {}, ["norm", "activation"]),
    ("LN+G", "SM(t)+ScFuFFN", {"softmax": "polynomial-1", "final_norm": False}, list(OPERATIONS)),
    ("LN+G", "Pow(t)+ScFuFFN", {"softmax": "polynomial-1/keys", "final_norm": False}, list(OPERATIONS)),
    ("powers", "Pow(t)+G", {"softmax": "polynomial-1/keys"}, ["norm"]),
    ("LN+G", "SM+LN+R", {}, ["activation"]),
    ("LN+G", "SM+LN+Square", {"softmax": "power-2"}, ["activation", "softmax"]),
    ("LN+G, all biases", "SM+ScFFN", {}, ["norm", "activation"]),
    ("LN+G, all biases", "SM+G", {"bias": "all"}, ["norm"]),
    ("slopes", "SM", {}, ["activation"]),
    ("slope", "SM+LeakyR", {}, ["norm"]),
    ("ScFFN", "SM(t)+ScFuFFN", {"softmax": "power-1"}, ["softmax"]),
    ("RMS+SwiGLU", "SM+Bilinear", {}, ["norm", "activation", "final_norm"]),
    ("RMS+SwiGLU", "SM(t)+ScFuFFN", {"final_norm": False}, ["norm", "activation", "final_norm"]),
    ("RMS+SwiGLU, all biases", "SM", {}, ["norm", "activation", "final_norm"]),
    ("parallel", "SM+R", {}, ["norm", "activation"]),
    ("query norms", "SM+RMS+Bilinear", {"final_norm": False}, ["activation", "final_norm"]),
]


def teacher_of(name: str) -> EntropiForCausalLM:
    """A tiny model none of whose parameters is at its start."""
    if name in OTHERS:
        return EntropiForCausalLM.from_transformers(random_model(configuration(OTHERS[name])))
    torch.manual_seed(0)
    model = EntropiForCausalLM(EntropiConfig(**SIZES, **OURS[name])).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.rand_like(parameter))
    return model


def student_of(name: str, architecture: str, options: dict[str, Any]) -> tuple[EntropiForCausalLM, TaperedModel]:
    teacher = teacher_of(name)
    return teacher, TaperedModel(teacher, target_of(teacher.config, architecture, **options)).eval()


def set_all(student: TaperedModel, gate: float) -> None:
    student.set_gates({name: [gate] * len(gates) for name, gates in student.gates.items()})


@torch.no_grad()
def logits(model: EntropiForCausalLM) -> Tensor:
    return model(IDS).logits


@pytest.mark.parametrize(("name", "architecture", "options", "left"), CASES)
def test_the_student_is_its_teacher_and_the_plain_model_is_the_student(
    name: str, architecture: str, options: dict[str, Any], left: list[str]
):
    teacher, student = student_of(name, architecture, options)
    assert list(student.gates) == left == leaving(teacher.config, student.target)
    with torch.no_grad():
        ours, theirs = student(IDS), teacher(IDS)
    assert torch.allclose(ours.logits, theirs.logits, atol=1e-6)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours.entropies, theirs.entropies))

    with torch.no_grad():
        student.train()(IDS)  # measures what norms divide by
        for parameter in student.parameters():  # and whatever has been added is not where it starts
            parameter.mul_(1.05)
    student.eval()
    seen = [logits(student)]
    for gate in (0.5, 0.0):
        set_all(student, gate)
        seen.append(logits(student))
    assert all(bool(torch.isfinite(one).all()) for one in seen)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)
    assert not torch.allclose(seen[1], seen[2], atol=1e-3)

    plain = student.merged()
    assert type(plain) is EntropiForCausalLM
    assert plain.config.architecture == architecture
    assert (plain.config.softmax, plain.config.final_norm) == (
        options.get("softmax", "exact"),
        options.get("final_norm", True),
    )
    scales = [p.item() for n, p in plain.named_parameters() if n.endswith(("alpha", "beta"))]
    assert name == "ScFFN" or set(scales) <= {1.0}
    torch.testing.assert_close(logits(plain), seen[2], rtol=1e-4, atol=1e-4)


def test_a_plain_model_is_saved_folded_and_opened(tmp_path):
    """The head is a matrix of its own where a map went into it, which files and folding have to know."""
    from entropi.model.folding import fold

    _, student = student_of("LN+G", "SM(t)+ScFuFFN", {"final_norm": False})
    set_all(student, 0.0)
    plain = student.merged()
    plain.save_pretrained(tmp_path)
    again = EntropiForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again), logits(plain))
    assert not torch.equal(again.lm_head.weight, again.model.token_embedding.weight)
    assert fold(again).description["final_norm"] == "none"


@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_fades_into_a_map_by_its_mean_scale(kind: type[nn.Module]):
    torch.manual_seed(0)
    norm: Any = kind(6, eps=1e-5)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    tapered, batches = TaperedNorm(norm).train(), torch.randn(5, 2, 3, 6) * torch.arange(1, 6).view(5, 1, 1, 1)
    assert all(torch.equal(tapered(batch), norm(batch)) for batch in batches)

    centred = batches - batches.mean(dim=-1, keepdim=True) if kind is nn.LayerNorm else batches
    scale = 1 / (centred.square().mean(dim=-1) + 1e-5).sqrt()
    assert tapered.scale.item() == pytest.approx(scale.mean().item(), rel=1e-5)  # of so few batches the plain mean

    tapered.eval()
    expected = tapered.scale * centred[0] * norm.weight + (norm.bias if kind is nn.LayerNorm else 0)
    tapered.gate = 0.0
    assert torch.allclose(tapered(batches[0]), expected, atol=1e-6)
    tapered.gate = 0.25
    assert torch.allclose(tapered(batches[0]), 0.25 * norm(batches[0]) + 0.75 * expected, atol=1e-6)
    tapered.train()
    (tapered(batches[1]) + tapered(batches[2])).sum().backward()  # though the scale has changed between them
    assert bool(torch.isfinite(norm.weight.grad).all())
    before = tapered.scale.clone()
    tapered.gate = 0.0
    tapered(batches[4])
    assert torch.equal(tapered.scale, before)  # a map stays as it is


def test_a_softmax_fades_by_its_outputs_and_entropies():
    _, student = student_of("LN+G", "SM+LN+G", {"softmax": "power-1"})
    block: Any = student.model.blocks[0]
    found = {}
    for gate in (1.0, 0.25, 0.0):
        set_all(student, gate)
        kept = []
        handle = block.attention.register_forward_hook(lambda module, given, made, kept=kept: kept.append(made))
        logits(student)
        handle.remove()
        found[gate] = kept[0]
    for ends, faded in zip(zip(found[1.0], found[0.0]), found[0.25]):
        assert torch.allclose(faded, 0.25 * ends[0] + 0.75 * ends[1], atol=1e-6)


def test_layers_have_gates_of_their_own():
    _, student = student_of("LN+G", "SM+ScFuFFN", {})
    student.set_gates({"norm": [0.0, 1.0]})
    first, second = student.model.blocks
    assert (first.attention_norm.gate, first.feed_forward.network.norm.gate) == (0.0, 0.0)
    assert (second.attention_norm.gate, second.feed_forward.network.norm.gate) == (1.0, 1.0)
    assert student.gates == {"norm": [0.0, 1.0], "activation": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("name", "architecture", "options", "message"),
    [
        ("slopes", "SM+LN+G", {}, "has no LayerNorm; the teacher's activation is leaky_relu, .* not become gelu"),
        ("RMS+SwiGLU", "SM+LN", {}, "the teacher has no LayerNorm"),
        ("RMS+SwiGLU", "SM+R", {}, "swiglu, which does not become relu"),
        ("LN+G", "SM+Bilinear", {}, "gelu, which does not become bilinear"),
        ("ScFFN", "SM+ScFuFFN", {}, "the teacher has temperatures, so the target is SM"),
        ("ScFFN", "SM(t)", {}, "feed-forward networks are scaled, which cannot become plain ones"),
        ("LN+G", "SM+WNorm(FFN)+G", {}, "norms on weights"),
        ("LN+G", "SM+G", {"bias": "qk"}, "bias 'qk' has no place for the biases of ffn, value"),
        ("LN+G", "SM+LN+G", {}, "there is nothing to taper"),
        ("LN+G", "SM(t)+LN+G", {}, "there is nothing to taper"),
        ("LN+G", "SM+LN+X", {}, "unknown architecture"),
        ("LN+G", "SM", {"softmax": "quartic"}, "softmax must be exact"),
    ],
)
def test_what_cannot_be_tapered_is_refused(name: str, architecture: str, options: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        target_of(teacher_of(name).config, architecture, **options)


def test_no_softmax_becomes_exact_and_no_branch_norm_goes():
    approximate = EntropiConfig(**SIZES, architecture="SM+LN+G", softmax="power-2")
    with pytest.raises(UserError, match="softmax is power-2, which does not become exact"):
        target_of(approximate, "SM+G")
    gemma = EntropiForCausalLM.from_transformers(random_model(configuration("Gemma 2"))).config
    with pytest.raises(UserError, match="branch_norm"):
        target_of(gemma, "SM+Bilinear")


def test_recipes_name_the_operations_that_may_leave():
    assert set(TAPER_STAGES) == set(OPERATIONS)
