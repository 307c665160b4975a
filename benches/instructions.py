"""Instructions that the CPU core takes, counted by valgrind: the same on a busy machine as on an idle one.

    python benches/instructions.py        # the kernels of `grokcurv bench --quick`
    python benches/instructions.py --shrink 1000 --only "filtered gradient"

Prints a table in Markdown. What a case asks of the core is recorded, and asked once and twice by a process without
PyTorch, which valgrind would take minutes to load; the difference is one call. Valgrind (apt-get install valgrind)
knows no AVX-512, so that the instruction set is v3 at most.
"""

import ctypes
import os
import pickle
import re
import subprocess
import sys
from argparse import ArgumentParser
from collections.abc import Callable
from functools import cache
from importlib import machinery, util
from typing import Any
from unittest import mock


def ask(path: str, times: str) -> None:
    """What valgrind watches: the calls are read from the standard input."""
    loader = machinery.ExtensionFileLoader("_cpu", path)
    core = util.module_from_spec(machinery.ModuleSpec("_cpu", loader, origin=path))
    loader.exec_module(core)
    buffers = []

    def address(content: bytes | int) -> int:
        buffers.append(ctypes.create_string_buffer(content))
        return ctypes.addressof(buffers[-1])

    workspace = cache(lambda doubles: address(8 * doubles))
    recorded = pickle.load(sys.stdin.buffer)
    calls = [(kernel, [address(x) if isinstance(x, bytes) else x for x in task]) for kernel, task in recorded]
    for _ in range(int(times)):
        for kernel, task in calls:
            getattr(core, kernel)(workspace, 1, *task)


def count(run: Callable[[], object]) -> int:
    """Instructions of the kernels that ``run`` calls."""
    from grokcurv.ops import _dispatch

    core, address = _dispatch.cpu_core, _dispatch._address
    calls: list[tuple[str, list[Any]]] = []
    arrays: dict[int, bytes] = {}

    def read(tensor: Any) -> int:
        arrays[address(tensor)] = ctypes.string_at(address(tensor), tensor.nbytes)
        return address(tensor)

    class Recorder:
        def __getattr__(self, kernel: str) -> Callable[..., None]:
            def call(allocate: Callable[[int], int], threads: int, *task: Any) -> None:
                calls.append((kernel, [arrays.get(x, x) if type(x) is int else x for x in task]))
                getattr(core, kernel)(allocate, threads, *task)

            return call

    with mock.patch.multiple(_dispatch, cpu_core=Recorder(), _address=read):
        run()
    totals = []
    for times in ("1", "2"):
        command = [sys.executable, "-S", __file__, "ask", core.__file__, times]
        watched = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={os.devnull}", *command]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
        done = subprocess.run(watched, input=pickle.dumps(calls), env=environment, stderr=subprocess.PIPE, check=True)
        totals += map(int, re.findall(rb"Collected : (\d+)", done.stderr))
    return totals[1] - totals[0]


def main(shrink: int, only: list[str]) -> None:
    import torch

    from grokcurv.bench import plan

    large, demo, wide = 10_000_000 // shrink, plan.DEMO // shrink, 8 * (plan.MATRIX // shrink)
    units = {
        **dict.fromkeys(("perturb", "defect", "split", "sketch", "draw"), large),
        **dict.fromkeys(("rounding-terms", "defect-on-basis", "filter"), demo),
        **{"gram-row": 60 * wide, "gram-matrix": 1830 * wide, "rotate": 288 * demo, "eigh": 8, "eigh-prefixes": 299},
    }
    torch.set_num_threads(1)
    print("| case | instructions | of each |\n| --- | ---: | ---: |")
    for case in plan.of_table(10_000_000, 96, shrink):
        if case.name in units and any(word in case.title for word in only):
            total = count(case.build(torch.Generator().manual_seed(0)).implementations[0].run)
            print(f"| {case.title} | {total:,} | {total / units[case.name]:,.3g} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["ask"]:
        raise SystemExit(ask(*sys.argv[2:]))
    parser = ArgumentParser(description="Count the instructions of the kernels.")
    parser.add_argument("--shrink", type=int, default=1, help="by how much all vectors are shorter")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the titles of the cases to run")
    main(**vars(parser.parse_args()))
