"""What the machine code of the kernels promises on a Hopper GPU: loads in flight, instructions, share of the floor.

``python benches/machine_code.py`` reads what ``cuobjdump`` and ``nvdisasm`` say of the code for sm_90 in the extension
that was built, and prints a table, as in docs/measurements/machine-code.md; no GPU is needed. The two tools are on PyPI
(``pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm``, or ``grokcurv[dev]``).

How it reads. A function is cut into basic blocks; an edge to a block that dominates its start closes a loop. The loop
that :data:`CASES` asks for is the smallest that holds the opcodes named there, so the innermost that streams what they
stream. Of the ways through it the hot one loads most bytes by 128-bit loads, then stores most bytes if the loop is
there to store, then is the shortest: whole quads, not cut ones, and nothing that a task may do without. A predicated
instruction counts as executed.

How it counts what is in flight. The hot path is issued in order, again and again; a streamed load arrives one latency
after its issue, whoever reads a register that has not arrived waits, and nothing else takes time. Bytes in flight on a
multiprocessor are the bytes that an iteration streams, by the latencies that it waits, times the threads that take
part.

How it predicts. For a coordinate a multiprocessor needs at least

* for its bytes: all of them at 3.0 TB/s by 132, those that it loads at (bytes in flight) by 0.6 us,
* for what crosses between L1 and L2: 64 bytes a clock, where stores go in whole sectors (:func:`sent`),
* for its float64 operations: 64 a clock, and 128 on the tensor cores; for its conversions: 16; for its instructions:
  128, of four warps.

A loop takes the root of the sum of their squares. Their maximum would say that they overlap perfectly, which is too
kind to loops that come near two bounds at once; their sum, that nothing overlaps. Loops of a kernel take turns, as do
launches: their times are added. The floor is that of docs/cuda.md, at the same rates. Not modelled: that warps may be
dealt unevenly to the four schedulers, shared memory, latencies of anything but streamed loads, copies by TMA.
"""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from importlib import import_module
from importlib.util import find_spec
from math import hypot
from pathlib import Path
from typing import Annotated, NamedTuple

import tyro

# ---------------------------------------------------------------------------------------------------------- the machine

PROCESSORS, CLOCK = 132, 1.755e9
"""Multiprocessors of an H100 SXM, and Hz under load. All that follows is of one multiprocessor and in its clocks."""
BANDWIDTH, LATENCY = 3.0e12 / PROCESSORS / CLOCK, 0.6e-6 * CLOCK
"""Of a copy, read and written, and of a load from memory that is busy."""
PORT, FLOAT64, TENSOR, CONVERSIONS, ISSUED = 64, 64, 128, 16, 128
"""Bytes between L1 and L2, operations, those of the tensor cores, conversions, and instructions of single threads."""
REGISTERS, THREADS, SHARED, RESERVED = 65536, 2048, 228 * 1024, 1024
"""What blocks share; the last is what the system takes of the shared memory of each."""
BLOCK, SECTOR = 256, 32
"""Threads of most blocks; bytes in which L2 is written."""

# ---------------------------------------------------------------------------------------------------- what is looked at


@dataclass(frozen=True)
class Loop:
    """A loop of a kernel, and what its machine code cannot tell.

    Attributes:
        name: what it does.
        kernel: the end of the template's name and arguments, mangled, that no other kernel has.
        holds: opcodes that it holds, as often as they are named here.
        times: how often the first of them is executed for a coordinate, by all threads together: this tells how many
            coordinates an iteration handles, however it is unrolled.
        shared: dynamic shared memory of a block, in bytes.
        threads: of a block that take part.
        block: all threads of a block (``threads`` in csrc/block).
        streams: whether its loads of that opcode come from memory: false of tables, which the L1 cache holds.
    """

    name: str
    kernel: str
    holds: tuple[str, ...]
    times: float
    shared: int = 0
    threads: int = BLOCK
    block: int = BLOCK
    streams: bool = True


@dataclass(frozen=True)
class Case:
    """A kernel at work: its loops, one after the other, and the floor of a coordinate as docs/cuda.md has it."""

    name: str
    bytes: float
    flops: float
    loops: tuple[Loop, ...]


QUAD, CHUNK, ROOM = "LDG.E.128", 4096 * 8, BLOCK * 8
"""A load of four coordinates; bytes of a chunk in shared memory, and of the sums of 32 rows in each warp."""
COPY = "LDGSTS.E.BYPASS.128"
"""A load of four coordinates to shared memory, asynchronously."""
TILE, FUSED = "DMMA.16x8x8", 16 * 8 * 8 // 32
"""A product of tiles by a warp; fused operations of a thread in it."""
PLAIN, WITH_THETA, ON_BASIS = (f"CommutatorRangeIfLb0E{flags}Lb1E" for flags in ("Lb0ELb0E", "Lb1ELb0E", "Lb0ELb1E"))


def vectors(kernel: str, count: int, shared: int) -> Loop:
    """Of the commutator: a quad takes a load of each of so many vectors, a coordinate a quarter of it."""
    return Loop("vectors", kernel, (*(QUAD,) * count, "DMUL"), count / 4, shared)


def project(kernel: str, rows: float, shared: int) -> Loop:
    """So many rows of a basis meet a coordinate. A quad takes a load of the values of each.

    All threads take part, each with coordinates that it has put into shared memory itself. That a row is found and
    summed over the warp is on the way too; of rows that miss a chunk 32 are seen at once, for next to nothing.
    """
    return Loop("project", kernel, (QUAD, "LDS.64"), rows / 4, shared)


def rotated(outputs: int) -> Case:
    """32 rows. A coordinate is a column of all of them, of each a quarter of a quad: they come in four parts.

    Each iteration copies a part to come and multiplies another; after every fourth, the outputs are written. A warp
    multiplies 32 columns by 16 outputs in four instructions. A block has 512 columns, or 256 where there are 32
    outputs. Shared memory has four parts, of eight rows, a quad longer than they are, and the coefficients for them.
    """
    groups = outputs // 16
    kernel, shared = f"RotateColumnsIffLi{groups}ELb1E", 4 * 8 * (4 * (512 // groups + 4) + 8 * outputs)
    parts = Loop("three parts", kernel, (COPY, TILE), 3 / 4 * 32 / 4, shared, 128, 128)
    last = Loop("last part, outputs", kernel, (COPY, TILE, "STG.E.128"), 1 / 4 * 32 / 4, shared, 128, 128)
    return Case(f"rotate_, 32 rows to {outputs}", 4 * (32 + outputs), 64 * outputs, (parts, last))


SPLIT = Loop("stage", "SplitRangeIfLb1E", (QUAD, *("STS.64",) * 4), 1 / 4, ROOM + CHUNK)
# With a theta for each direction a thread loads a quad of both for four coordinates; else theta's is in registers.
PERTURB = Loop("vectors", "PerturbChunkIfLb1ELb0E", (QUAD, QUAD, "STG.E.128"), 2 / 4)
PERTURB_SHARED = Loop("vectors", "PerturbChunkIfLb1ELb1E", (QUAD, QUAD, "STG.E.128"), 1 / 4)
# 16 rows that hardly any chunk meets, as in the bench. Every thread looks for them, once in a chunk, 32 at once.
FILTER = Loop("scale", "FilterChunkIfLb1E", (QUAD, QUAD, "STG.E.128"), 1 / 4)
FILTER_ROWS = Loop("rows looked for", "FilterChunkIfLb1E", ("VOTE.ANY",), BLOCK * 8 / CHUNK)
# A coordinate is a column of 32 rows: of each row a quarter of a quad. An iteration copies 16 columns to come, of four
# quads of each thread, and multiplies 16 that are there; shared memory has five such parts, and the sums.
GRAM = Loop("columns", "GramRangeIfLi2ELi4ELb1ELb0E", (COPY, TILE), 32 / 4, 5 * 4 * 128 * 16 + 8 * 32 * 32, 128, 128)
# The signs of 1024 coordinates of a block come from nine counters.
SKETCH = Loop("coordinates", "SketchRangeIfE", ("LDG.E",) * 8, 1, 4 * 32 + 16 * 32 * 9)
SKETCH_SIGNS = Loop("signs", "SketchRangeIfE", ("STS.128",), 9 / 1024, 4 * 32 + 16 * 32 * 9)

CASES = (
    Case("commutator", 16, 16, (vectors(PLAIN, 4, 384),)),
    Case("commutator with theta", 20, 31, (vectors(WITH_THETA, 5, 640),)),
    # Pairs of directions that live on one matrix each: two rows meet every chunk, the other 14 cost next to nothing.
    # The nine vectors of a measurement share their values, which memory has to give once. A block has two vectors and
    # loads them once, so that five blocks load what nine vectors need.
    Case(
        "commutator on a basis of 16",
        16 + 8 / 9,
        20,
        (vectors(ON_BASIS, 4, 2 * (ROOM + CHUNK)), project(ON_BASIS, 2 * 5 / 9, 2 * (ROOM + CHUNK))),
    ),
    Case("perturb", 12, 0, (PERTURB,)),
    Case("perturb, many from one theta", 8, 0, (PERTURB_SHARED,)),
    # Four rows of an eighth of the coordinates each, as in the bench.
    Case("subspace_split", 6, 3, (SPLIT, project("SplitRangeIfLb1E", 1 / 2, ROOM + CHUNK))),
    Case("subspace_filter_", 12, 3, (SPLIT, FILTER, FILTER_ROWS)),
    Case("gram, 32 rows", 4 * 32, 32 * 33, (GRAM,)),
    rotated(32),
    rotated(16),
    Case("sketch", 4, 1, (SKETCH, SKETCH_SIGNS)),
)

# ----------------------------------------------------------------------------------------------- the code and its loops

INSTRUCTION = re.compile(r"\s+/\*\w+\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
LABEL = re.compile(r"([.$\w]+):")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Instruction:
    """One line of machine code."""

    predicate: str
    opcode: str
    operands: str

    @cached_property
    def base(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @cached_property
    def width(self) -> int:
        """Bytes that a load or store moves for a thread."""
        return next((WIDTHS[part] for part in self.opcode.split(".") if part in WIDTHS), 4)

    @cached_property
    def is_load(self) -> bool:
        """From global memory, to registers or, asynchronously, to shared memory."""
        return self.base in ("LDG", "LDGSTS")

    @cached_property
    def reads(self) -> list[int]:
        """Registers, of a wide operand the first. An operand that begins with a register is written."""
        named = [int(number) for number in re.findall(r"\bR(\d+)\b", self.operands)]
        return named[1:] if re.match(r"R\d", self.operands) else named

    @cached_property
    def fills(self) -> range:
        """The registers that a load fills."""
        first = re.match(r"R(\d+)", self.operands)
        return range(int(first[1]), int(first[1]) + -(-self.width // 4)) if first else range(0)


Graph = Sequence[Sequence[int]]


def reached(graph: Graph, start: int, without: int | None = None) -> set[int]:
    """Blocks that can be come to from one, on ways that avoid another."""
    found, waiting = {start}, [start]
    while waiting:
        fresh = {after for after in graph[waiting.pop()] if after != without} - found
        found |= fresh
        waiting += fresh
    return found


class Way(NamedTuple):
    """From a block to the end of an iteration; of two the better one is the larger."""

    wide: int
    stored: int
    shortness: int
    blocks: tuple[int, ...]


@dataclass(frozen=True)
class Function:
    """Of one kernel: its blocks of instructions, in order, and for each the blocks that may follow."""

    blocks: Sequence[Sequence[Instruction]]
    following: Graph

    @cached_property
    def loops(self) -> dict[int, set[int]]:
        """The blocks of each natural loop, by its first."""
        preceding: list[list[int]] = [[] for _ in self.blocks]
        for block in reached(self.following, 0):
            for after in self.following[block]:
                preceding[after].append(block)
        loops: dict[int, set[int]] = {}
        for head, before in enumerate(preceding):
            elsewhere = reached(self.following, 0, without=head) if head else set()
            for last in set(before) - elsewhere:
                loops.setdefault(head, {head}).update(reached(preceding, last, without=head) if last != head else ())
        return loops

    def loop(self, holds: Sequence[str]) -> int:
        """The first block of the smallest loop that holds these opcodes, each as often as it is named."""
        sizes = {}
        for head, body in self.loops.items():
            opcodes = Counter(one.opcode for block in body for one in self.blocks[block])
            if Counter(holds) <= opcodes:
                sizes[head] = opcodes.total()
        if not sizes:
            raise ValueError(f"no loop holds {', '.join(holds)}: CASES describes another kernel than this")
        return min(sizes, key=lambda head: sizes[head])

    def hot_path(self, head: int, stores: bool) -> list[Instruction]:
        """The way through a loop that the module's docstring describes; loops inside are gone through once, or not."""

        @cache
        def onward(block: int) -> Way | None:
            ways = [Way(0, 0, 0, ())] if head in self.following[block] else []
            for after in self.following[block]:
                back = block in self.loops.get(after, ())
                if after in self.loops[head] and not back and (way := onward(after)):
                    ways.append(way)
            if not ways:
                return None
            best, code = max(ways), self.blocks[block]
            wide = sum(one.width for one in code if one.is_load and one.width == 16)
            stored = sum(one.width for one in code if one.base == "STG" and stores)
            return Way(best.wide + wide, best.stored + stored, best.shortness - len(code), (block, *best.blocks))

        way = onward(head)
        assert way is not None
        return [one for block in way.blocks for one in self.blocks[block]]


def sections(listing: str) -> Iterator[tuple[str, str]]:
    """The kernels, by mangled name, in what ``nvdisasm -c`` prints."""
    for section in re.split(r"^\t\.section\t\.text\.", listing, flags=re.MULTILINE)[1:]:
        yield section.split(",")[0], section


def function(section: str) -> Function:
    """The control flow of one kernel. What it calls lies behind it and, reached by calls alone, is no part of it."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in section.splitlines():
        if label := LABEL.fullmatch(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.match(line):
            code.append(Instruction(found[1] or "", found[2], found[3]))
    ends = {n + 1 for n, one in enumerate(code) if one.base in ("BRA", "BRX", "EXIT", "RET")}
    starts = sorted(start for start in {0, *labels.values(), *ends} if start < len(code))
    blocks = [code[start:stop] for start, stop in zip(starts, [*starts[1:], len(code)], strict=True)]
    following = []
    for n, block in enumerate(blocks):
        last, next_block = block[-1], [n + 1] if n + 1 < len(blocks) else []
        target = re.search(r"`\((\S+)\)", last.operands)
        # BRA.DIV is for warps that have come apart: they go another way to the same end.
        leaves = last.base in ("BRA", "BRX", "EXIT", "RET") and last.opcode != "BRA.DIV"
        always = leaves and not last.predicate and not re.match(r"!?U?P", last.operands)
        jump = [starts.index(labels[target[1]])] if leaves and last.base == "BRA" and target else []
        following.append(jump if always else [*next_block, *jump])
    return Function(blocks, following)


# ---------------------------------------------------------------------------------------------------- what is in flight


def loads_ahead(path: Iterable[Instruction]) -> int:
    """How many loads are issued before the first is waited for."""
    pending: set[int] = set()
    count = 0
    for one in path:
        if one.base == "DEPBAR" or pending.intersection(one.reads):
            break
        if one.is_load:
            count += 1
            pending.update(one.fills if one.base == "LDG" else ())
    return count


def latencies(path: Sequence[Instruction], streamed: str, turns: int = 16) -> float:
    """How many latencies of memory an iteration waits for, one after the other, once the loop is under way."""
    now = 0
    arrival: dict[int, int] = {}  # of registers
    groups = [0]  # of asynchronous copies, when they arrive; the last one is open
    ends = []
    for _ in range(turns):
        for one in path:
            if one.base == "LDGDEPBAR":
                groups.append(0)
            elif one.base == "DEPBAR":
                most = re.search(r", (0x\w+)", one.operands)
                closed = len(groups) - 1 - (int(most[1], 16) if most else 0)
                now = max(now, 0, *groups[: max(0, closed)])
            now = max(now, 0, *(arrival.pop(register, 0) for register in one.reads))
            if one.opcode == streamed and one.base == "LDGSTS":
                groups[-1] = now + 1
            elif one.opcode == streamed:
                arrival.update(dict.fromkeys(one.fills, now + 1))
        ends.append(now)
    return (ends[-1] - ends[turns // 2 - 1]) / (turns - turns // 2)


def sent(path: Iterable[Instruction]) -> int:
    """Bytes that the stores of a path send to L2.

    Threads beside each other store beside each other. Where a thread stores a run of numbers one by one, each store of
    a warp touches all sectors that the runs of its threads lie in.
    """

    def of_runs(widths: dict[int, int]) -> int:
        total, run = 0, list[int]()
        for offset in sorted(widths):
            run.append(widths[offset])
            if offset + widths[offset] not in widths:
                total += sum(max(width, min(sum(run), SECTOR)) for width in run)
                run = []
        return total

    total = 0
    places: dict[str, dict[int, int]] = {}
    for one in path:
        if one.base == "STG" and (place := re.search(r"\[(R\d+)[^+\]]*\+?(-?0x\w+)?", one.operands)):
            register, offset = place[1], int(place[2] or "0", 16)
            # The same offset again: the register holds another address by now.
            if offset in places.get(register, {}):
                total += of_runs(places.pop(register))
            places.setdefault(register, {})[offset] = one.width
    return total + sum(map(of_runs, places.values()))


# ---------------------------------------------------------------------------------------------------------- predictions


@dataclass(frozen=True)
class Reading:
    """What is read off a loop, and off its kernel: registers, spills, warps resident, generic accesses.

    Attributes:
        wide, other: loads of 16 bytes from global memory in an iteration, and of fewer.
        ahead: loads issued before the first is waited for.
        width: bytes of a streamed load; 0 of a loop that streams nothing.
        in_flight: bytes on a multiprocessor.
        instructions, float64, conversions, clocks: for a coordinate.
    """

    loop: Loop
    registers: int
    spills: int
    warps: int
    generic: int
    wide: int
    other: int
    ahead: int
    width: int
    in_flight: float
    instructions: float
    float64: float
    conversions: float
    clocks: float


@dataclass(frozen=True)
class Prediction:
    """Of a case, with its floor in clocks for a coordinate."""

    case: Case
    readings: list[Reading]
    floor: float

    @property
    def clocks(self) -> float:
        """For a coordinate."""
        return sum(reading.clocks for reading in self.readings)

    @property
    def share(self) -> float:
        """Of the floor in the time: one where nothing is lost."""
        return self.floor / self.clocks


def resident(registers: int, shared: int, threads: int = BLOCK) -> int:
    """Blocks on a multiprocessor. A warp takes registers in units of 256."""
    of_block = threads // 32 * (-(-32 * registers // 256) * 256)
    return min(REGISTERS // of_block, THREADS // threads, SHARED // (shared + RESERVED))


def read(loop: Loop, code: Function, registers: int, stack: int) -> Reading:
    """A loop, in the code of its kernel."""
    first = loop.holds[0]
    path = code.hot_path(code.loop(loop.holds), stores=any(opcode.startswith("STG") for opcode in loop.holds))
    everything = Counter(one.base for block in code.blocks for one in block)
    opcodes, bases = Counter(one.opcode for one in path), Counter(one.base for one in path)
    coordinates = opcodes[first] / loop.times
    operations = sum(bases[base] for base in ("DADD", "DMUL", "DFMA", "DSETP"))
    on_tensor_cores = bases["DMMA"] * FUSED
    loads = [one for one in path if one.is_load]
    blocks = resident(registers, loop.shared, loop.block)

    width = next((one.width for one in loads if one.opcode == first and loop.streams), 0)
    loaded, stored = opcodes[first] * width, sum(one.width for one in path if one.base == "STG")
    waits = latencies(path, first) if width else 0
    in_flight = loaded / waits * loop.threads * blocks if waits else 0.0
    bounds = (
        max((loaded + stored) / BANDWIDTH, loaded * LATENCY / in_flight if in_flight else 0.0),
        (loaded + sent(path)) / PORT,
        operations / FLOAT64,
        on_tensor_cores / TENSOR,
        bases["F2F"] / CONVERSIONS,
        len(path) / ISSUED,
    )
    return Reading(
        loop=loop,
        registers=registers,
        spills=stack + everything["LDL"] + everything["STL"],
        warps=blocks * loop.block // 32,
        generic=everything["LD"] + everything["ST"] + everything["ATOM"],
        wide=sum(one.width == 16 for one in loads),
        other=sum(one.width != 16 for one in loads),
        ahead=loads_ahead(path),
        width=width,
        in_flight=in_flight,
        instructions=len(path) / coordinates,
        float64=(operations + on_tensor_cores) / coordinates,
        conversions=bases["F2F"] / coordinates,
        clocks=hypot(*bounds) / coordinates,
    )


def tool(name: str) -> str | None:
    """Where a tool of NVIDIA's is: on the path, or in its wheel."""
    package = find_spec("nvidia")
    places = (package.submodule_search_locations or ()) if package else ()
    in_wheel = (str(path) for place in places for path in Path(place).glob(f"*/bin/{name}"))
    return shutil.which(name) or next(in_wheel, None)


def missing() -> str | None:
    """What is not there, if anything."""
    if find_spec("grokcurv._cuda") is None:
        return "grokcurv._cuda was not built"
    absent = [name for name in ("cuobjdump", "nvdisasm") if tool(name) is None]
    return f"no {absent[0]} here: pip install nvidia-cuda-{absent[0]}" if absent else None


def said(name: str, *arguments: str | Path, folder: str | Path | None = None) -> str:
    """What a tool of NVIDIA's prints."""
    command = [tool(name) or name, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def module() -> Path:
    """The extension that was built."""
    return Path(import_module("grokcurv._cuda").__file__ or "")


@cache
def listings() -> dict[str, tuple[str, int, int]]:
    """For each kernel of the extension, by mangled name: its code for sm_90, registers, and bytes of stack."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        said("cuobjdump", "-xelf", "sm_90", module(), folder=folder)
        for cubin in Path(folder).iterdir():
            resources = re.findall(r"Function (\w+):\s+REG:(\d+) STACK:(\d+)", said("cuobjdump", "-res-usage", cubin))
            sizes = {name: (int(registers), int(stack)) for name, registers, stack in resources}
            code = sections(said("nvdisasm", "-c", cubin))
            found.update({name: (section, *sizes[name]) for name, section in code if name in sizes})
    return found


def kernels(part: str) -> list[tuple[Function, int, int]]:
    """Code, registers and bytes of stack of those with this part in their mangled names."""
    return [(function(section), *sizes) for name, (section, *sizes) in listings().items() if part in name]


def predict(cases: Sequence[Case] = CASES) -> list[Prediction]:
    predictions = []
    for case in cases:
        readings = []
        for loop in case.loops:
            (found,) = kernels(loop.kernel)
            readings.append(read(loop, *found))
        predictions.append(Prediction(case, readings, max(case.bytes / BANDWIDTH, case.flops / 2 / FLOAT64)))
    return predictions


# ------------------------------------------------------------------------------------------------------------ the table

COLUMNS = (
    *("case", "loop", "registers", "spills", "shared KB", "warps", "generic", "128-bit loads", "other loads"),
    *("loads ahead", "KB in flight", "instructions", "float64", "conversions", "of its time", "of the floor"),
)


def rows(prediction: Prediction) -> Iterator[list[str]]:
    """A row for each loop; what the case comes to stands in its first."""
    for n, one in enumerate(prediction.readings):
        counts = (one.warps, one.generic, one.wide, one.other, one.ahead)
        yield [
            *("" if n else prediction.case.name, one.loop.name),
            *(str(one.registers), str(one.spills), f"{one.loop.shared / 1024:.1f}", *map(str, counts)),
            f"{one.in_flight / 1024:.1f}" if one.in_flight else "",
            *(f"{number:.1f}" for number in (one.instructions, one.float64, one.conversions)),
            *(f"{one.clocks / prediction.clocks:.0%}", "" if n else f"{prediction.share:.0%}"),
        ]


def main(out: Annotated[Path | None, tyro.conf.arg(help="a .csv that is to have the table too")] = None) -> None:
    """Print the table, as Markdown."""
    if problem := missing():
        sys.exit(problem)
    table = [row for prediction in predict() for row in rows(prediction)]
    for row in (COLUMNS, ("---",) * 2 + ("---:",) * (len(COLUMNS) - 2), *table):
        print(f"| {' | '.join(row)} |")
    if out is not None:
        with out.open("w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *table])


if __name__ == "__main__":
    tyro.cli(main)
