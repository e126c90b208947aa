"""Compiles the head's Triton kernels for GPUs that need not be here, and prints what they need.

    python -m benchmarks.compile_kernels [--json FILE]

A row is a kernel with the launch settings of arcshard/head/kernels.py for a compute capability:
registers of a thread, bytes of a thread's stack (registers that were spilled are there), shared
memory of a program, and instructions of the tensor cores. Triton is needed, a GPU is not.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from arcshard.head.kernels import SETTINGS, LaunchSettings, columns_of_program, launch_of, tile_of

WIDTH = 512
COMPILED = ((8, 0), (9, 0))  # 10.0 has the settings of 8.0
COLUMNS = ("kernel", "capability", "registers", "stack", "shared", "wgmma", "mma")
TYPES = {
    "unit": "*bf16",
    "operand": "*bf16",
    "numerators": "*bf16",
    "at_target": "*bf16",
    "gradient": "*fp32",
    "norm": "*fp32",
    "sums": "*fp32",
    "steps": "*fp64",
    "column": "*i64",
    "rows": "*i64",
    "numbers": "*i64",
    "veto": "*u8",
    "batch": "i32",
    "n": "i32",
    "start": "i64",
    "first_row": "i64",
    "key0": "i32",
    "key1": "i32",
}  # all others are fp32 numbers, and the centers and their state of the row's dtype


class Kernel(NamedTuple):
    """A kernel to compile.

    Attributes:
        name: Name in arcshard/head/triton_kernels.py.
        words: What distinguishes the row.
        constants: Values of its constexpr arguments.
        dtype: Dtype of centers and state, "fp32" or "bf16".
        warps: Warps of a program.
        stages: Steps in flight.
        batch_is_aligned: Whether B is a multiple of 16.
    """

    name: str
    words: str
    constants: dict[str, Any]
    dtype: str = "fp32"
    warps: int = 4
    stages: int = 3
    batch_is_aligned: bool = True


def kernels_of(settings: LaunchSettings) -> Iterator[Kernel]:
    """Returns all kernels that a head of D = 512 launches with these settings."""
    width = {"D": WIDTH, "BLOCK_D": columns_of_program(WIDTH)}
    for dtype in ("fp32", "bf16"):
        for has_rows in (False, True):
            launch = launch_of(settings.normalize, WIDTH)
            constants = {**width, "BLOCK_N": launch.n, "HAS_ROWS": has_rows}
            words = f"{dtype}{', sampled' if has_rows else ''}"
            yield Kernel("normalize_rows_kernel", words, constants, dtype, launch.warps)
    for has_sums in (True, False):
        for batch in (1024, 1001):
            tile, has_tma = tile_of(settings, 2**18, batch, WIDTH)
            constants = {"D": WIDTH, "BLOCK_N": tile.n, "BLOCK_B": tile.b, "BLOCK_D": tile.d}
            constants |= {"HAS_AT_TARGET": not has_sums, "HAS_SUMS": has_sums, "HAS_TMA": has_tma}
            words = f"{'forward' if has_sums else 'backward'}, B = {batch}"
            launched = (tile.warps, tile.stages, batch % 16 == 0)
            yield Kernel("softmax_numerators_kernel", words, constants, "bf16", *launched)
    yield Kernel("fill_targets_kernel", "", {"BLOCK_B": 256})
    for is_adamw in (False, True):
        for dtype in ("fp32", "bf16"):
            launch = launch_of(settings.update, WIDTH)
            constants = {**width, "BLOCK_N": launch.n}
            constants |= {"IS_ADAMW": is_adamw, "HAS_MOMENTUM": True, "NORMALIZES": True}
            constants |= {"HAS_ROWS": True, "HAS_NUMBERS": False, "HAS_VETO": True}
            constants |= dict.fromkeys(("ROUNDS_WEIGHT", "ROUNDS_STATE"), dtype == "bf16")
            words = f"{'AdamW' if is_adamw else 'SGD'}, {dtype}"
            yield Kernel("update_rows_kernel", words, constants, dtype, launch.warps)


def compile_kernel(kernel: Kernel, capability: tuple[int, int]) -> dict[str, Any]:
    """Compiles a kernel and returns its row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from arcshard.head import triton_kernels

    function = getattr(triton_kernels, kernel.name)
    types = TYPES | dict.fromkeys(("weight", "first", "second"), f"*{kernel.dtype}")
    constants = dict(kernel.constants)
    if "HAS_TMA" in constants:
        constants["DTYPE"] = triton.language.bfloat16
        if constants["HAS_TMA"]:
            n, b, d = (constants[f"BLOCK_{name}"] for name in "NBD")
            for name, block in (("unit", (b, d)), ("operand", (n, d)), ("numerators", (n, b))):
                types[name] = f"tensordesc<bf16[{block[0]}, {block[1]}]>"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "fp32")
        for name in function.arg_names
    }
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(function.arg_names)
        if signature[name].startswith("*") or (name == "batch" and kernel.batch_is_aligned)
    }
    compiled = triton.compile(
        ASTSource(function, signature, constexprs=constants, attrs=aligned),
        target=GPUTarget("cuda", 10 * capability[0] + capability[1], 32),
        options={"num_warps": kernel.warps, "num_stages": kernel.stages},
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        words = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    ptx = compiled.asm["ptx"]
    return {
        "kernel": f"{kernel.name}{f' ({kernel.words})' if kernel.words else ''}",
        "capability": ".".join(map(str, capability)),
        "registers": int(found["REG"]),
        "stack": int(found["STACK"]) + int(found["LOCAL"]),
        "shared": int(compiled.metadata.shared),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": ptx.count("mma.sync"),
        "warps": kernel.warps,
        "stages": kernel.stages,
        "constants": kernel.constants,
        "triton": triton.__version__,
    }


def compile_all() -> list[dict[str, Any]]:
    """Returns the rows of all kernels and capabilities."""
    return [
        compile_kernel(kernel, capability)
        for capability, settings in SETTINGS.items()
        if capability in COMPILED
        for kernel in kernels_of(settings)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(arguments)
    rows = compile_all()
    widths = (46, *[12] * (len(COLUMNS) - 1))
    for row in ({name: name for name in COLUMNS}, *rows):
        print("".join(f"{row[name]!s:<{w}}" for name, w in zip(COLUMNS, widths, strict=True)))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
