"""Compile the kernels ahead of time and print what each takes of the device, as JSON lines.

    python compile_rows.py ARCH

One line for every row of the tile table of that architecture, for the kernels of the chunked
backend and, but for the row of small cards, every other kernel: name, shared memory in bytes,
registers of a thread, bytes of stack and spill instructions. Runs on machines without a GPU; triton
must be imported without TRITON_INTERPRET.
"""

import json
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from ctt_kernels import bucket, chunked, contrast, ema, gather, push, tiles, topk
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Case(NamedTuple):
    name: str
    kernel: Any
    types: dict[str, str]  # of the arguments that are no constants
    constants: dict[str, Any]
    options: dict[str, int]


CONTRAST_TYPES = {
    "inverse_norm_ptr": "*fp32",
    "positive_inverse_norm_ptr": "*fp32",
    "cosine_ptr": "*fp32",
    "rows_ptr": "*i32",
    "start_ptr": "*i32",
    "longest_ptr": "*fp32",
    "ends_ptr": "*i32",
    "label_ptr": "*i64",
    "weight_ptr": "*fp32",
    "loss_ptr": "*fp32",
    "push_ptr": "*fp32",
    "score_ptr": "*fp32",
    "product_ptr": "*fp32",
    "part_log2_ptr": "*fp32",
    "part_mean_ptr": "*fp32",
    "inverse_tau": "fp32",
}
CONTRAST_CONSTANTS = {
    "C": 21,
    "NEED_GRAD": True,
    "PER_PIXEL": False,
    "PRECISION": "tf32",
}


def contrast_cases(arch: int) -> Iterator[Case]:
    for (row_arch, kind, dim), tile in tiles.TILES.items():
        if row_arch == arch:
            for pair, add_parts in product((False, True), repeat=2):
                yield contrast_case(kind, dim, tile, pair, add_parts=add_parts)


def contrast_case(kind: str, dim: int, tile: Any, pair: bool, *, add_parts: bool = False) -> Case:
    kernel = contrast.contrast_kernel
    constants = {
        **CONTRAST_CONSTANTS,
        "D": dim,
        "DIM_PADDED": dim,
        "PAIR": pair,
        "BLOCK_M": tiles.ROWS_TO_ADD if add_parts else tile.block_m,
        "PART_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_OWN": tile.block_n if add_parts else tile.block_own,
        "ADD_PARTS": add_parts,
        "KEYS_OF_A_PART": tiles.TILES_OF_A_PART * tile.block_n,
    }
    options = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    if add_parts:
        options = {"num_warps": 4, "num_stages": 2}
    name = f"contrast {kind} {dim} {'pair' if pair else 'queue'}{' parts' * add_parts}"
    return Case(name, kernel, contrast_types(kernel, kind, constants), constants, options)


def small_cases() -> Iterator[Case]:
    """The constants that the other cases leave out."""
    for kind in ("half", "tf32"):
        for pair, add in product((False, True), repeat=2):
            case = contrast_case(kind, 64, tiles.TILES[90, kind, 64], pair, add_parts=add)
            constants = case.constants | {"D": 5, "DIM_PADDED": 16, "PER_PIXEL": True, "C": 2}
            for need_grad in (False, True):
                yield case._replace(
                    name=case.name.replace("contrast", "small") + " gradient" * need_grad,
                    constants=constants | {"NEED_GRAD": need_grad},
                )


def contrast_types(kernel: Any, kind: str, constants: dict[str, Any]) -> dict[str, str]:
    dtype = "*bf16" if kind == "half" else "*fp32"
    return {
        name: CONTRAST_TYPES.get(name, dtype if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
        if name not in constants
    }


def gather_cases() -> Iterator[Case]:
    """With the pixels or the features of a query next to each other in memory."""
    kernel = gather.gather_queries
    for kind in ("half", "tf32"):
        for unit in ("n", "d"):
            for dim, rows in ((256, 32), (512, 16), (chunked.MAX_DIM, 2)):
                constants = {
                    **CONTRAST_CONSTANTS,
                    "D": dim,
                    "DIM_PADDED": dim,
                    "PAIR": True,
                    "BLOCK_M": 128,
                    "BLOCK": rows,
                    f"query_stride_{unit}": 1,
                    f"positive_stride_{unit}": 1,
                }
                del constants["PRECISION"]
                types = contrast_types(kernel, kind, constants)
                yield Case(
                    f"gather_queries {kind} {dim} by {unit}",
                    kernel,
                    types,
                    constants,
                    {"num_warps": 8},
                )


def chunked_cases() -> Iterator[Case]:
    """For many and few keys, and for features of usual width and of the least and the greatest."""
    kinds = [(kind, pair) for kind in ("half", "tf32") for pair in (False, True)]
    weighed = [(*kind, 2688) for kind in kinds]
    for kind, pair, columns in [*weighed, ("tf32", False, 48)]:
        tile = chunked.tile(columns)
        yield chunked_case(chunked.weigh_keys, kind, pair, columns, tile._asdict(), num_warps=4)
        little = tile._asdict() | {"NEED_GRAD": False, "PER_PIXEL": True}
        yield chunked_case(chunked.weigh_keys, kind, pair, f"{columns} loss", little, num_warps=4)
    finished = [(*kind, 512, 16) for kind in kinds]
    for kind, pair, dim, rows in [
        *finished,
        ("tf32", True, 16, 32),
        ("tf32", True, chunked.MAX_DIM, 2),
    ]:
        sizes = {"D": dim, "DIM_PADDED": dim, "BLOCK": rows}
        yield chunked_case(chunked.finish_rows, kind, pair, dim, sizes, num_warps=8)


def chunked_case(
    kernel: Any, kind: str, pair: bool, size: object, sizes: dict[str, int], num_warps: int
) -> Case:
    every = {"C": 21, "PAIR": pair, "NEED_GRAD": True, "PER_PIXEL": False, **sizes}
    constants = {name: value for name, value in every.items() if name in kernel.arg_names}
    name = f"chunked.{kernel.__name__} {kind} {'pair' if pair else 'queue'} {size}"
    types = contrast_types(kernel, kind, constants)
    return Case(name, kernel, types, constants, {"num_warps": num_warps})


def other_cases() -> Iterator[Case]:
    sizes: dict[str, Any] = {"C": 150, "BINS": 256, "BLOCK": bucket.BLOCK}
    four = {"num_warps": 4}
    i32, i64, f32, flag = "*i32", "*i64", "*fp32", "*i1"
    counting = {"bucket_ptr": i32, "histogram_ptr": i32}
    n = {"n": "i32", "num_blocks": "i32"}
    yield Case(
        "gather.assign_buckets",
        gather.assign_buckets,
        {"label_ptr": i64, "mask_ptr": flag, "held_ptr": i64, **counting, **n},
        {**sizes, "BANKS": 2, "HAS_MASK": True, "OWN_MUST_HOLD": True},
        four,
    )
    yield Case(
        "gather.order_rows",
        gather.order_rows,
        {**counting, "ends_ptr": i32, "rows_ptr": i32, "weight_ptr": f32, **n},
        {**sizes, "REDUCTION": "class"},
        four,
    )
    for dim, rows in ((64, 32), (256, 32), (512, 16), (chunked.MAX_DIM, 2)):
        strides = {"stride_c": "i32", "stride_v": "i32"}
        yield Case(
            f"gather.pack_keys {dim}",
            gather.pack_keys,
            {
                "keys_ptr": f32,
                "held_ptr": i64,
                "packed_ptr": "*bf16",
                "start_ptr": i32,
                "longest_ptr": f32,
                **strides,
            },
            {
                "stride_d": 1,
                "D": dim,
                "DIM_PADDED": dim,
                "C": 150,
                "BINS": 256,
                "BANK": 1,
                "BANKS": 2,
                "PAD": 64,
                "BLOCK": rows,
            },
            four,
        )
    for wide in (False, True):
        confidence, key = ("*fp64", i64) if wide else (f32, i32)
        yield Case(
            f"topk.make_sort_keys {confidence}",
            topk.make_sort_keys,
            {"confidence_ptr": confidence, "key_ptr": key, "n": "i32"},
            {"WIDE": wide, "BLOCK": 1024},
            four,
        )
    yield Case(
        "topk.assign_buckets",
        topk.assign_buckets,
        {
            "order_ptr": i64,
            "confidence_ptr": f32,
            "label_ptr": i64,
            "valid_ptr": flag,
            **counting,
            **n,
        },
        {**sizes, "HAS_VALID": True},
        four,
    )
    yield Case(
        "topk.store_topk",
        topk.store_topk,
        {
            "order_ptr": i64,
            **counting,
            "ends_ptr": i32,
            "index_ptr": i64,
            "count_ptr": i64,
            **n,
            "k": "i32",
        },
        sizes,
        four,
    )
    for features, wide in (("*bf16", False), ("*fp64", True)):
        yield Case(
            f"queue_push {features}",
            push.queue_push_kernel,
            {
                "keys_ptr": f32,
                "count_ptr": i64,
                "cursor_ptr": i64,
                "features_ptr": features,
                "index_ptr": i64,
                "n": "i32",
                "k": "i32",
                "keys_stride_c": "i32",
                "keys_stride_v": "i32",
                "features_stride_n": "i32",
            },
            {
                "count_stride": 1,
                "cursor_stride": 1,
                "keys_stride_d": 1,
                "features_stride_d": 1,
                "V": 128,
                "D": 256,
                "DIM_PADDED": 256,
                "BLOCK": 32,
                "WIDE": wide,
            },
            {"num_warps": 8},
        )
    for student in ("float32", "bfloat16"):
        for aligned in (True, False):
            for on_device in (False, True):
                yield Case(
                    f"ema {student}{' aligned' * aligned}{' device' * on_device}",
                    ema.ema_kernel,
                    {
                        "table_ptr": i64,
                        "num_chunks": "i32",
                        "decay": "fp32",
                        "complement": "fp32",
                        "decay_ptr": f32,
                    },
                    {
                        "TEACHER": triton.language.float32,
                        "STUDENT": getattr(triton.language, student),
                        "DECAY_ON_DEVICE": on_device,
                        "ALIGNED": aligned,
                        "BLOCK": ema.BLOCK,
                    },
                    {"num_warps": 8},
                )


def compiled(case: Case, arch: int) -> Any:
    names = case.kernel.arg_names
    # as the launcher finds them: pointers, strides and row lengths are multiples of 16
    attrs = {
        (names.index(name),): [["tt.divisibility", 16]]
        for name in case.types
        if name.endswith("_ptr") or "stride" in name or name in ("columns", "width")
    }
    signature = {
        name: "constexpr" if name in case.constants else case.types[name] for name in names
    }
    source = ASTSource(fn=case.kernel, signature=signature, constexprs=case.constants, attrs=attrs)
    return triton.compile(
        source,
        target=GPUTarget("cuda", arch, 32),
        options=case.options | {"enable_fp_fusion": True},
    )


def usage(kernel: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = [
            subprocess.run(
                [CUOBJDUMP, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        ]
    resources = dict(re.findall(r"(REG|STACK):(\d+)", dump[0]))
    ptx = kernel.asm["ptx"]
    return {
        "shared": kernel.metadata.shared,
        "registers": int(resources["REG"]),
        "stack": int(resources["STACK"]),
        "spills": len(re.findall(r"\b(?:STL|LDL)\b", dump[1])),
        "tensor_core": len(re.findall(r"\bHG?MMA\b", dump[1])),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
    }


def main(arch: int, *words: str) -> None:
    """With `words`, only the cases whose name holds one of them."""
    warnings.filterwarnings("ignore")
    cases = [*contrast_cases(arch), *chunked_cases()]
    if arch != 86:
        cases += [*gather_cases(), *small_cases(), *other_cases()]
    for case in cases:
        if words and not any(word in case.name for word in words):
            continue
        line = {"case": case.name, "arch": arch, **usage(compiled(case, arch))}
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
