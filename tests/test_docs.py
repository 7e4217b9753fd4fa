"""What documents say about the program is what the program has: names of operations, words, pictures, recipes."""

import re
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

pytest.importorskip("jax", reason="the private program needs the extra private")
from entropi.activations import ACTIVATIONS
from entropi.model.architectures import ARCHITECTURES
from entropi.model.configuration import EntropiConfig
from entropi.model.shape import expected_description
from entropi.private.compute.description import Description
from entropi.private.compute.program import forward

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def read(name):
    return (DOCS / name).read_text(encoding="utf-8")


def stages():
    """Names of everything that a private pass of any architecture may run."""
    sizes = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=16)
    found = set()
    for name, parts in ARCHITECTURES.items():
        softmaxes = [] if parts.powers else [{"softmax": "polynomial-1"}]
        for options in ({}, *softmaxes, {"log_length_scaling": True}):
            config = EntropiConfig(architecture=name, **sizes, **options)
            model = msgspec.convert(expected_description(config), Description)
            for output, bits in (("argmax", None), ("top_k", 3)):
                passed = forward(model, 4, 0, "power-3", output=output, logit_bits=bits)
                found |= {stage.name for stage in passed}
    return found


def test_every_operation_is_explained_where_prices_are():
    legend = read("costs.md").partition("## Names of operations")[2].partition("\n\nLayers")[0]
    rows = [line.split("|")[1] for line in legend.splitlines() if line.startswith("| `")]
    assert set(re.findall(r"`(\w+)`", " ".join(rows))) == stages()


def test_every_part_of_a_name_is_in_the_glossary():
    explained = " ".join(re.findall(r"^\*\*(.*?)\*\*", read("glossary.md"), flags=re.MULTILINE))
    words = set(re.findall(r"[\w()]+", explained))
    parts = {"SM", "SM(t)", "Pow", "Pow(t)", "LN", "RMS", "WNorm", "SNorm", "ScFFN", "ScFuFFN", "EReg(", *ACTIVATIONS}
    assert {part for part in parts if part not in words and part not in explained} == set()


def test_every_part_of_a_name_is_in_the_table_of_architectures():
    table = read("architectures.md").partition("`EReg(...)` around")[0]
    assert {part for part in ACTIVATIONS if f"`+{part}`" not in table} == set()


def test_files_to_touch_exist():
    """Recipes for additions name files of the package that are there."""
    text = read("extending.md")
    named = set(re.findall(r"`((?:model|private|entropy|costs|training|tests|benchmarks)/[\w/]+\.(?:py|cpp))`", text))
    assert len(named) > 12
    missing = {name for name in named if not (ROOT / "src" / "entropi" / name).exists() and not (ROOT / name).exists()}
    assert missing == set()


@pytest.mark.slow
def test_pictures_are_those_that_the_script_draws(tmp_path):
    """`python benchmarks/pictures.py` renews them, for example when a price has changed."""
    command = [sys.executable, str(ROOT / "benchmarks" / "pictures.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    drawn = {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    committed = {path.name: path.read_text(encoding="utf-8") for path in (DOCS / "pictures").glob("*.svg")}
    assert len(drawn) == 10
    assert drawn == committed
    page = read("private-inference.md")
    assert all(f"pictures/{name}" in page for name in drawn)
