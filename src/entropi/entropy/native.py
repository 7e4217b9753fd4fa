"""`entropy_attention` on CPUs: `native.cpp`, compiled once for this machine and called from many threads.

It is plain C++ with no dependency, so compiling takes some seconds; the result is cached beside the tokenizers. The
compiled code is registered as a torch operator, which `torch.compile` treats as one node.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from entropi.cache import default_cache_dir
from entropi.entropy.operators import (
    as_mean,
    before_mean,
    contiguous_rows,
    make_differentiable,
    row_results,
    squarings,
    with_empty,
)
from entropi.entropy.secure_softmax import CLIP
from entropi.errors import UserError
from entropi.softmax import SoftmaxForm

SOURCES = [Path(__file__).with_name(name) for name in ("native.cpp", "products.h")]
FLAGS = ("-O3", "-std=c++17", "-shared", "-fPIC", "-pthread", "-fno-strict-aliasing")
KEY_BLOCK = 128  # KEYS of native.cpp
KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Tensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("batch", ctypes.c_long),
        ("head", ctypes.c_long),
        ("row", ctypes.c_long),
        ("width", ctypes.c_long),
    )


_TENSORS = ("query", "key", "value", "output", "grad_output", "grad_query", "grad_key", "grad_value", "mask")


class _Problem(ctypes.Structure):
    """`Problem` of native.cpp, field by field."""

    _fields_ = (
        *((name, ctypes.c_long) for name in ("batches", "heads", "queries", "keys")),
        ("kind", ctypes.c_int),
        ("causal", ctypes.c_int),
        *((name, _Tensor) for name in _TENSORS),
        ("mask_column", ctypes.c_long),
        ("mask_kind", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("entropy", "lse", "grad_entropy")),
        ("iterations", ctypes.c_int),
        ("lowest", ctypes.c_float),
        *((name, ctypes.c_void_p) for name in ("largest", "argmax")),
        ("softcap", ctypes.c_float),
        ("sinks", ctypes.c_void_p),
    )


@torch.compiler.assume_constant_result
def unavailable_reason() -> str | None:
    """Why it cannot run on this machine, or None where it can."""
    loaded = _load()
    return loaded if isinstance(loaded, str) else None


def _load() -> ctypes.CDLL | str:
    """The compiled library, or the reason why there is none."""
    return _build()


@functools.cache
def _build(*flags: str) -> ctypes.CDLL | str:
    """The library compiled with further flags, or the reason why it cannot be."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler is None:
        return "no C++ compiler was found (set CXX, or install g++)"
    source = b"".join(path.read_bytes() for path in SOURCES)
    try:
        version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
        # -march=native means another machine's code elsewhere, and caches may lie on a shared disk.
        key = hashlib.sha256(b"\0".join([source, version, _processor(), " ".join(FLAGS + flags).encode()])).hexdigest()
        library = _cache_folder() / f"attention-{key[:24]}.so"
        if not library.exists():
            _compile(compiler, flags, library)
        return ctypes.CDLL(str(library))
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or b""
        reason = output.decode(errors="replace").strip().splitlines()[:1] or [str(error)]
        return f"{compiler} could not build it: {reason[0]}"


def _compile(compiler: str, flags: tuple[str, ...], library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        built = Path(folder) / library.name
        for native in ("-march=native", "-mcpu=native"):  # x86 and Arm compilers differ in the name
            command = [compiler, *FLAGS, *flags, native, str(SOURCES[0]), "-o", str(built)]
            done = subprocess.run(command, capture_output=True, check=False)
            if done.returncode == 0:
                os.replace(built, library)
                return
        done.check_returncode()


def _cache_folder() -> Path:
    """Where compiled code is kept; readable and writable by this user alone."""
    try:
        folder = default_cache_dir() / "native"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, UserError):
        return Path(tempfile.mkdtemp(prefix="entropi-native-"))
    return folder


def _processor() -> bytes:
    """What identifies this processor's instruction set."""
    try:
        lines = Path("/proc/cpuinfo").read_bytes().splitlines()
        return b"".join(line for line in lines if line.startswith((b"flags", b"Features")))[:8192]
    except OSError:
        return f"{platform.machine()} {platform.processor()}".encode()


@functools.cache
def _parallel() -> Any:
    """`GOMP_parallel` of the OpenMP runtime torch has loaded, or None: then the library starts threads of its own."""
    runtimes = sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*.so*"))
    for runtime in runtimes:
        try:
            return ctypes.cast(ctypes.CDLL(str(runtime)).GOMP_parallel, ctypes.c_void_p)
        except (OSError, AttributeError):
            continue
    return None


ROW_RESULTS = ("entropy", "lse", "largest", "argmax")


def _problem(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    causal: bool,
    power: int,
    polynomial: int,
    softcap: float | None,
    **tensors: Tensor,
) -> _Problem:
    """The library's view of tensors, which have to outlive it; sinks are float32 and contiguous."""
    problem = _Problem(
        batches=query.shape[0],
        heads=query.shape[1],
        queries=query.shape[2],
        keys=key.shape[2],
        kind=KINDS[query.dtype],
        causal=int(causal),
        query=_view(query),
        key=_view(key),
        iterations=power or -polynomial,
        lowest=-CLIP * 2.0**power if power else 0.0,
        softcap=softcap or 0.0,
        sinks=None if sinks is None else sinks.data_ptr(),
    )
    for name, tensor in tensors.items():
        value: Any = tensor.data_ptr() if name in (*ROW_RESULTS, "grad_entropy") else _view(tensor)
        setattr(problem, name, value)
    if mask is not None:
        problem.mask, problem.mask_column = _view(mask), mask.stride(3)
        problem.mask_kind = 1 if mask.dtype == torch.bool else 2
    return problem


def _view(tensor: Tensor) -> _Tensor:
    return _Tensor(tensor.data_ptr(), *tensor.stride()[:3], tensor.shape[3])


def _mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """The mask as the library reads it: bool or float32, broadcast by strides of 0."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask.float()
    return mask.expand(*query.shape[:3], key.shape[2])


@torch.library.custom_op("entropi::attention", mutates_args=(), device_types="cpu")
def operator(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    power: int,
    polynomial: int,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Output `(B, H, T, E)`, entropy and log-sum-exp `(B, H, T)` of scaled queries; see `row_results`.

    With `seen`, which broadcasts against `(B, H, T)`, weights are divided by these numbers of keys.
    """
    library = _load()
    assert isinstance(library, ctypes.CDLL)
    query, key, value = contiguous_rows(query), contiguous_rows(key), contiguous_rows(value)
    sinks = None if sinks is None else sinks.contiguous()
    output = query.new_empty(*query.shape[:3], value.shape[3])
    rows = with_empty(output, *row_results(query, power))[1:]
    mask = _mask(mask, query, key)  # kept until the library has run, which is given addresses
    problem = _problem(
        query,
        key,
        mask,
        sinks,
        causal,
        power,
        polynomial,
        softcap,
        value=value,
        output=output,
        **dict(zip(ROW_RESULTS, rows)),
    )
    # Few heads over many threads: cut the query rows, at the price of packing keys once a piece.
    pieces = -(-4 * torch.get_num_threads() // max(1, query.shape[0] * query.shape[1]))
    chunks = max(1, min(pieces, query.shape[2] // 256))
    library.entropi_forward(
        ctypes.byref(problem), ctypes.c_long(chunks), ctypes.c_uint(torch.get_num_threads()), _parallel()
    )
    return as_mean(output, rows[1], seen), *rows


@torch.library.custom_op("entropi::attention_backward", mutates_args=(), device_types="cpu")
def operator_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    power: int,
    polynomial: int,
    softcap: float | None,
    output: Tensor,
    entropy: Tensor,
    lse: Tensor,
    largest: Tensor,
    argmax: Tensor,
    grad_output: Tensor,
    grad_entropy: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    library = _load()
    assert isinstance(library, ctypes.CDLL)
    output, grad_output = before_mean(output, grad_output, lse, seen)
    query, key, value, grad_output = (
        contiguous_rows(query),
        contiguous_rows(key),
        contiguous_rows(value),
        contiguous_rows(grad_output),
    )
    grads = tuple(torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value))
    mask = _mask(mask, query, key)
    problem = _problem(
        query,
        key,
        mask,
        None,  # the log-sum-exp counts them
        causal,
        power,
        polynomial,
        softcap,
        value=value,
        output=output,
        grad_output=grad_output,
        grad_query=grads[0],
        grad_key=grads[1],
        grad_value=grads[2],
        entropy=entropy,
        lse=lse,
        largest=largest,
        argmax=argmax,
        grad_entropy=grad_entropy,
    )
    # Fewer heads than threads: share out a head's key blocks, at the price of a dQ and a packing a piece.
    heads, threads = query.shape[0] * query.shape[1], torch.get_num_threads()
    pieces = 1 if heads >= threads else -(-2 * threads // max(1, heads))
    pieces = max(1, min(pieces, key.shape[2] // KEY_BLOCK))
    library.entropi_backward(ctypes.byref(problem), ctypes.c_long(pieces), ctypes.c_uint(threads), _parallel())
    return grads[0], grads[1], grads[2]


make_differentiable(operator, operator_backward)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    sinks: Tensor | None,
    seen: Tensor | None,
    causal: bool,
    softmax: SoftmaxForm,
    softcap: float | None,
) -> tuple[Tensor, ...]:
    """What `operator` returns, of any form of the softmax that it computes."""
    result: tuple[Tensor, ...] = operator(query, key, value, mask, sinks, seen, causal, *squarings(softmax), softcap)
    return result
