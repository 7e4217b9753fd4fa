"""What becomes of the GPU kernels on an architecture, without a GPU: compiled ahead of time, looked at, not run.

    python benchmarks/compiled_kernels.py [--arch 90 80] [--dtype bf16 fp16 fp32] [--width 64 128 100] [--first 1]
        [--value-width 128] [--softcap 50] [--sinks] [--uneven]

For every kernel and tuning choice: registers a thread, spilled bytes, shared memory, which tensor-core instruction the
products became (wgmma on Hopper, mma on Ampere, none for exact float32), and how many of it there are. A choice that
needs more shared memory than the architecture has is left out by the tuner at run time. The last line is JSON.
"""

from __future__ import annotations

import argparse
import inspect
import json
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from entropi.entropy import triton_kernel
from entropi.entropy.secure_softmax import CLIP

SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227}  # a block may use, CUDA C programming guide, technical specifications
KERNELS = {
    "forward": triton_kernel._forward_kernel,
    "backward query": triton_kernel._backward_query_kernel,
    "backward key": triton_kernel._backward_key_kernel,
}
POINTERS = {"ARGMAX": "*i32", "MASK": "*u8"} | dict.fromkeys(
    ("SINKS", "ENTROPY", "LSE", "LARGEST", "GRAD_ENTROPY", "DELTA", "CORRECTION"), "*fp32"
)
ROWS_ARE_ALIGNED = 16  # what a launch finds of pointers and strides of usual tensors, and tells the compiler


def compile_kernel(
    name: str,
    choice: Any,
    arch: int,
    dtype: str,
    width: int,
    iterations: int,
    value_width: int,
    softcap: float = 0.0,
    sinks: bool = False,
    even: bool = True,
) -> Any:
    """One kernel of one tuning choice, for tensors as they usually are."""
    kernel = KERNELS[name].fn
    constants = {
        "D": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "E": value_width,
        "PADDED_E": max(16, triton.next_power_of_2(value_width)),
        "CAUSAL": True,
        "MASK_KIND": 0,
        "PRECISION": "ieee" if dtype == "fp32" else "tf32",
        "ITERATIONS": max(iterations, 0),
        "LOWEST": -CLIP * 2.0**iterations if iterations > 0 else 0.0,
        "POLYNOMIAL": max(-iterations, 0),
        "SOFTCAP": softcap,
        **({"HAS_SINKS": sinks} if name == "forward" else {}),
        "SCALED": bool(iterations or softcap),
        "EVEN": even,
        # Of an attention without a mask and, but for the power, nothing that a row's largest logit is needed for.
        **dict.fromkeys(("MASK", "mb", "mh", "mr", "mc")),
        **({} if iterations > 0 else dict.fromkeys(("LARGEST", "ARGMAX", "CORRECTION"))),
        **({} if sinks else {"SINKS": None}),
        **choice.kwargs,
    }
    names = inspect.signature(kernel.fn).parameters
    constants = {argument: constants[argument] for argument in names if argument in constants}
    signature, attributes = {}, {}
    for number, argument in enumerate(names):
        if argument in constants:
            signature[argument] = "constexpr"
            continue
        if argument.isupper() and argument not in ("T", "S", "HEADS", "SIZE"):
            signature[argument] = POINTERS.get(argument, f"*{dtype}")
            attributes[(number,)] = [["tt.divisibility", ROWS_ARE_ALIGNED]]
        elif argument == "scale":
            signature[argument] = "fp32"
        else:
            signature[argument] = "i32"
            strides = len(argument) == 2
            if (strides or argument in ("T", "S")) and width % ROWS_ARE_ALIGNED == 0:
                attributes[(number,)] = [["tt.divisibility", ROWS_ARE_ALIGNED]]
    return triton.compile(
        ASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": choice.num_warps, "num_stages": choice.num_stages} | triton_kernel.LAUNCH,
    )


def look_at(compiled: Any) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    found = {kind: len(re.findall(rf"^\s*(?:@\S+\s+)?{kind}\.", ptx, re.M)) for kind in ("wgmma.mma_async", "mma.sync")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    kind, count = max(found.items(), key=lambda item: item[1])
    return {
        "registers": int(numbers["REG"]),
        "spilled_bytes": int(numbers["STACK"]) + int(numbers["LOCAL"]),
        "shared_kb": round(compiled.metadata.shared / 1024, 1),
        "products": kind.partition(".")[0] if count else "none",
        "instructions": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="*", default=[90, 80])
    parser.add_argument("--dtype", nargs="*", default=["bf16", "fp16", "fp32"])
    parser.add_argument("--width", type=int, nargs="*", default=[64, 128, 100])
    parser.add_argument("--value-width", type=int, help="that of queries and keys where it is not given")
    parser.add_argument("--softcap", type=float, default=0.0, help="0: none")
    parser.add_argument("--sinks", action="store_true")
    parser.add_argument("--uneven", action="store_true", help="lengths that are no multiple of every block")
    parser.add_argument("--iterations", type=int, nargs="*", default=[0, 5, -1], help="t; -t: the polynomial")
    parser.add_argument("--kernel", nargs="*", choices=KERNELS, default=list(KERNELS))
    parser.add_argument("--choice", nargs=4, type=int, action="append", help="ROWS KEYS warps stages instead of ours")
    parser.add_argument("--first", type=int, help="only so many of the tuning choices")
    options = parser.parse_args()
    tasks = []
    for arch in options.arch:
        for dtype in options.dtype:
            for width in options.width:
                for iterations in options.iterations:
                    for name in options.kernel:
                        wider = max(width, options.value_width or width)
                        padded = max(16, triton.next_power_of_2(wider))
                        choices = triton_kernel.choices(name, padded, dtype == "fp32")
                        if options.choice:
                            choices = [
                                triton.Config({"ROWS": r, "KEYS": k}, num_warps=w, num_stages=n)
                                for r, k, w, n in options.choice
                            ]
                        tasks += [(name, choice, arch, dtype, width, iterations) for choice in choices[: options.first]]

    def do(task: Any) -> dict[str, Any]:
        name, choice, arch, dtype, width, iterations = task
        started = time.perf_counter()
        rest = (options.value_width or width, options.softcap, options.sinks, not options.uneven)
        seen = look_at(compile_kernel(*task, *rest))
        blocks = (choice.kwargs["ROWS"], choice.kwargs["KEYS"], choice.num_warps, choice.num_stages)
        row = {"kernel": name, "choice": blocks, "arch": arch, "dtype": dtype, "width": width, "iterations": iterations}
        row |= seen | {"fits": seen["shared_kb"] <= SHARED_KB[arch]}
        print(
            f"sm_{arch} {dtype} D={width:<3} t={iterations} {name:14} {blocks!s:18} {seen['registers']:3} registers  "
            f"{seen['spilled_bytes']:4} B spilled  {seen['shared_kb']:5} KB{'' if row['fits'] else ' TOO MUCH'}  "
            f"{seen['products']} x {seen['instructions']}  ({time.perf_counter() - started:.1f} s)",
            flush=True,
        )
        return row

    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(do, tasks))
    print(json.dumps(rows))


if __name__ == "__main__":
    if triton_kernel.INTERPRETED:
        sys.exit("TRITON_INTERPRET=1 compiles nothing: unset it")
    main()
