"""What nvcc has made of the kernels: no registers in memory, no stack, and code for the architectures asked for.

    python .ci/cuda_build.py BUILD_LOG MODULE ARCHITECTURE...

BUILD_LOG holds what `nvcc -Xptxas -v` says. MODULE is read without cuobjdump, which not every toolkit installation has:
device code is in fat binaries, a header and then pieces, each with its kind and its architecture.
"""

import re
import struct
import sys
from pathlib import Path

FAT_BINARY = struct.Struct("<IHHQ")  # magic, version, size of this header, size of all pieces
MAGIC = 0xBA55ED50
PIECE = struct.Struct("<HHIQ12xI")  # kind, version, size of this header, size of what follows; architecture
KERNELS = (
    "direct_sums|gemm_products|gemm_answers|answer_scores|cell_statistics|pair_statistics|kept_rows|count_kept|"
    "gather_rows"
)
ENDS = ("gemm_answers", "answer_scores")  # short ones, whose double square roots are calls of a function
KINDS = {1: "ptx", 2: "sm"}


def resources(log: str) -> list[str]:
    """One line for every kernel and architecture; those that spill or need a stack say so."""
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(sm_\d+\w?)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    lines = []
    for name, arch, stack, stores, loads, registers in entry.findall(log):
        short = re.sub(rf".*({KERNELS}).*", r"\1", name)
        bad = " SPILLS" if int(stack) + int(stores) + int(loads) else ""
        lines.append(f"{arch} {short}: {registers} registers{bad}")
    return lines


def code_in(module: bytes) -> set[str]:
    found = set()
    for start in [m.start() for m in re.finditer(re.escape(struct.pack("<I", MAGIC)), module)]:
        _, version, header, size = FAT_BINARY.unpack_from(module, start)
        if version != 1 or header != FAT_BINARY.size or start + header + size > len(module):
            continue  # the number by chance
        at, end = start + header, start + header + size
        while at < end:
            kind, _, piece_header, piece_size, arch = PIECE.unpack_from(module, at)
            found.add(f"{KINDS.get(kind, kind)}_{arch}")
            at += piece_header + piece_size
    return found


def main() -> None:
    log, module, *wanted = sys.argv[1:]
    lines = resources(Path(log).read_text(errors="replace"))
    print(*sorted(set(lines)), sep="\n")
    code = code_in(Path(module).read_bytes())
    print("code for", *sorted(code))
    if not lines:
        raise SystemExit(f"{log} says nothing of kernels")
    if spilling := [line for line in lines if "SPILLS" in line and not any(name in line for name in ENDS)]:
        raise SystemExit("kernels spill registers or need a stack: " + "; ".join(spilling))
    if missing := set(wanted) - code:
        raise SystemExit(f"no code for {', '.join(sorted(missing))}")


main()
