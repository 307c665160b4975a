"""The reader of machine code on small loops written by hand, and what the suite holds the kernels' machine code to."""

from __future__ import annotations

import csv
from collections.abc import Callable
from math import hypot
from pathlib import Path

import machine_code
import pytest
from machine_code import CASES, Function, Instruction, Loop, Prediction, Reading, function

# ------------------------------------------------------------------------------------------------------ loops by hand


def listed(text: str) -> str:
    """Lines as nvdisasm prints them: instructions have an address and end with a semicolon, labels stand alone."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return "\n".join(
        line if line.endswith(":") else f"        /*{n:04x}*/     {line} ;" for n, line in enumerate(lines)
    )


def path(text: str) -> list[Instruction]:
    """Instructions in a row."""
    (block,) = function(listed(text)).blocks
    return list(block)


QUADS = """
    LDC R1, c[0x0][0x28]
.L_x_0:
    @P0 BRA `(.L_x_1)
    @P1 LDG.E R4, desc[UR4][R2.64]
    @P2 LDG.E R5, desc[UR4][R2.64+0x4]
    BRA `(.L_x_2)
.L_x_1:
    LDG.E.128 R4, desc[UR4][R2.64]
.L_x_2:
    BSYNC B0
    BRA.DIV UR5, `(.L_x_4)
.L_x_5:
    DFMA R8, R4, R6, R8
    @!P3 BRA `(.L_x_3)
    STG.E desc[UR4][R12.64], R8
.L_x_3:
    IADD3 R2, P4, R2, UR6, RZ
    @P4 BRA P5, `(.L_x_0)
    EXIT
.L_x_4:
    SHFL.BFLY PT, R8, R9, 0x1, 0x1f
    BRA `(.L_x_5)
.L_x_6:
    BRA `(.L_x_6)
"""
"""A loop over quads, the last of which may be cut, that stores if it is asked to."""


def opcodes(code: list[Instruction]) -> list[str]:
    return [one.opcode for one in code if one.base not in ("BRA", "BSYNC", "IADD3")]


def test_the_hot_path_takes_whole_quads_and_leaves_out_what_it_can() -> None:
    code = function(listed(QUADS))
    (head,) = code.loops
    assert opcodes(code.hot_path(head, stores=False)) == ["LDG.E.128", "DFMA"]
    assert opcodes(code.hot_path(head, stores=True)) == ["LDG.E.128", "DFMA", "STG.E"]


def test_a_loop_is_found_by_what_it_holds() -> None:
    """The smallest that does, however often it is asked for."""
    code = function(
        listed("""
        .L_x_0:
            LDG.E.128 R4, desc[UR4][R2.64]
        .L_x_1:
            LDG.E.128 R8, desc[UR4][R2.64+0x10]
            @!P0 BRA `(.L_x_1)
            STS.64 [R3], R8
            @!P1 BRA `(.L_x_0)
            EXIT
        """)
    )
    assert sorted(map(sorted, code.loops.values())) == [[0, 1, 2], [1]]
    assert code.loop(["LDG.E.128"]) == 1
    assert code.loop(["LDG.E.128"] * 2) == code.loop(["LDG.E.128", "STS.64"]) == 0
    assert len(opcodes(code.hot_path(0, stores=False))) == 3
    with pytest.raises(ValueError, match=r"no loop holds LDG\.E: CASES describes another kernel"):
        code.loop(["LDG.E"])


def test_kernels_of_a_listing() -> None:
    listing = "\n".join(f'\t.section\t.text.{name},"ax",@progbits\n.text.{name}:\n{listed(QUADS)}' for name in "fg")
    assert [(name, len(function(section).blocks)) for name, section in machine_code.sections(listing)] == [
        ("f", 11),
        ("g", 11),
    ]


LOAD = "LDG.E R{0}, desc[UR4][R2.64]"
USE = "DADD R20, R20, R{0}"


@pytest.mark.parametrize(
    ("order", "ahead", "waited"),
    [
        ("L4 U4 L5 U5 L6 U6", 1, 3),
        ("L4 L5 L6 U4 U5 U6", 3, 1),
        ("L4 L5 U4 L6 U5 L7 U6 U7", 2, 2),  # a window of two
        ("U4 L4 U5 L5", 2, 1),  # used a turn later
    ],
)
def test_latencies_that_a_loop_waits_for(order: str, ahead: int, waited: float) -> None:
    text = "\n".join({"L": LOAD, "U": USE}[one[0]].format(one[1:]) for one in order.split())
    assert machine_code.latencies(path(text), "LDG.E") == waited
    assert machine_code.loads_ahead(path(text) * 2) == ahead


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_asynchronous_copies_are_waited_for_by_group(stages: int) -> None:
    copy = "LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]"
    code = path(f"{copy}\n{copy}\nLDGDEPBAR\nDEPBAR.LE SB0, {stages - 1:#x}\nLDS.64 R6, [R7]")
    assert machine_code.latencies(code, "LDGSTS.E.BYPASS.128") == 1 / stages
    assert machine_code.loads_ahead(code) == 2


@pytest.mark.parametrize(
    ("stores", "expected"),
    [
        (["STG.E.128 desc[UR4][R2.64], R8"], 16),
        ([f"STG.E desc[UR4][R2.64+{4 * n:#x}], R{8 + n}" for n in range(4)], 4 * 16),
        ([f"STG.E desc[UR4][R2.64+{n}], R8" for n in ("-0x8", "-0x4", "0x4")], 2 * 8 + 4),
        ([f"STG.E desc[UR4][R{2 * n}.64], R8" for n in range(4)], 4 * 4),
        (["STG.E desc[UR4][R2.64], R8", "STG.E desc[UR4][R2.64], R9"], 2 * 4),
        ([f"STG.E.64 desc[UR4][R2.64+{8 * n:#x}], R8" for n in range(8)], 8 * 32),
    ],
)
def test_stores_send_whole_sectors(stores: list[str], expected: int) -> None:
    assert machine_code.sent(path("\n".join(stores))) == expected


@pytest.mark.parametrize(
    ("registers", "shared", "blocks"),
    [(16, 0, 8), (40, 0, 6), (64, 33 * 1024, 4), (128, 34 * 1024, 2), (32, 100 << 10, 2)],
)
def test_resident_blocks(registers: int, shared: int, blocks: int) -> None:
    assert machine_code.resident(registers, shared) == blocks


def test_resident_blocks_of_fewer_threads() -> None:
    assert machine_code.resident(254, 34 * 1024, threads=128) == 2
    assert machine_code.resident(32, 0, threads=128) == 16


def test_what_is_predicted_of_a_loop() -> None:
    """With 64 registers, four blocks and so 1024 threads are there, half of which load 16 bytes a latency: 8 KB."""
    loop = Loop("vectors", "", ("LDG.E.128",), times=1 / 4, threads=128)
    reading = machine_code.read(loop, function(listed(QUADS)), registers=64, stack=0)
    assert (reading.warps, reading.wide, reading.other, reading.generic, reading.spills) == (32, 1, 0, 0, 0)
    assert (reading.ahead, reading.width, reading.in_flight) == (1, 16, 8192)
    assert (reading.float64, reading.conversions, reading.instructions) == (0.25, 0, 8 / 4)
    bytes_a_clock = 8192 / (0.6e-6 * 1.755e9)
    assert bytes_a_clock < 3e12 / 132 / 1.755e9
    expected = hypot(4 / bytes_a_clock, 4 / 64, 0.25 / 64, 2 / 128)
    assert reading.clocks == pytest.approx(expected, rel=1e-12)


def test_spills_and_generic_accesses_are_counted_in_the_whole_kernel() -> None:
    begins = "LD.E.64 R8, desc[UR4][R2.64]\nST.E desc[UR4][R2.64], R8\nSTL [R1], R8\nLDL R8, [R1]\n"
    code: Function = function(listed(begins + QUADS))
    reading = machine_code.read(Loop("", "", ("LDG.E.128",), 0.25), code, registers=32, stack=8)
    assert (reading.generic, reading.spills) == (2, 8 + 2)


# --------------------------------------------------------------------------------------------------------- the kernels

PROPERTIES: dict[str, Callable[[Reading], bool]] = {
    "no spill": lambda reading: reading.spills == 0,
    "no generic access": lambda reading: reading.generic == 0,
    "vector loads only": lambda reading: reading.width in (0, 16),
    "32 KB in flight": lambda reading: reading.width == 0 or reading.in_flight >= 32 * 1024,
}
"""What every loop of these kernels is to have in the end."""
ALL = frozenset(PROPERTIES)

HELD = {
    "commutator": ALL,
    "commutator with theta": ALL,
    "commutator on a basis of 16": ALL,
    "perturb": ALL,
    "perturb, many from one theta": ALL,
    "subspace_split": ALL,
    "subspace_filter_": ALL,
    "gram, 32 rows": ALL,
    "rotate_, 32 rows to 32": ALL,
    "rotate_, 32 rows to 16": ALL,
    "sketch": {"no spill", "no generic access"},  # a shift turns coordinates by any number
}
"""What they have, and so may not lose. Who gives a kernel more adds it here."""


@pytest.fixture(scope="module")
def predictions() -> dict[str, Prediction]:
    if problem := machine_code.missing():
        pytest.skip(f"{problem}: the machine code of the CUDA kernels was not read")
    return {one.case.name: one for one in machine_code.predict([case for case in CASES if case.name in HELD])}


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine_code, "find_spec", lambda name: name)
    monkeypatch.setattr(machine_code, "tool", {"cuobjdump": "cuobjdump"}.get)
    assert machine_code.missing() == "no nvdisasm here: pip install nvidia-cuda-nvdisasm"
    monkeypatch.setattr(machine_code, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=r"grokcurv\._cuda was not built"):
        machine_code.main()


def test_every_case_is_held_to_something() -> None:
    assert {case.name for case in CASES} == HELD.keys()


def test_kernels_keep_what_they_have(predictions: dict[str, Prediction]) -> None:
    lost = [
        (name, reading.loop.name, held)
        for name, prediction in predictions.items()
        for reading in prediction.readings
        for held in HELD[name]
        if not PROPERTIES[held](reading)
    ]
    assert lost == []


def test_eigh_knows_which_memory_it_reads(predictions: dict[str, Prediction]) -> None:
    """It streams nothing, so that it is no case; but a load whose memory is not known would lengthen its chains."""
    found = machine_code.kernels("EighMatrix")
    assert len(found) == 2  # all of a matrix in shared memory, or nothing
    for code, _, stack in found:
        assert not stack
        assert {"LD", "ST", "LDL", "STL"}.isdisjoint(one.base for block in code.blocks for one in block)


def test_the_table(
    predictions: dict[str, Prediction],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(machine_code, "predict", lambda: list(predictions.values()))
    machine_code.main(tmp_path / "table.csv")
    printed = capsys.readouterr().out.splitlines()
    with (tmp_path / "table.csv").open(newline="") as file:
        table = list(csv.reader(file))
    assert {len(row) for row in table} == {len(machine_code.COLUMNS)}
    assert [row[0] for row in table[1:] if row[0]] == list(HELD)
    assert printed[0].strip("| ").split(" | ") == table[0]
    assert len(printed) == 1 + len(table)  # and a line between head and rows
    assert all(0.1 < prediction.share < 1 for prediction in predictions.values())
