"""The kernels on the CPU, called by :mod:`grokcurv.ops` alone: addresses and sizes, checked there.

Every kernel takes a function that allocates so many float64 numbers and returns their address, the number of threads,
and the task.
"""

from collections.abc import Callable

FLOAT32: int
FLOAT64: int
BFLOAT16: int
COMPILER: str
FLAGS: str
BUILD_TYPE: str
OPENMP: int
ISA: str
ISAS: dict[str, bool]

Allocate = Callable[[int], int]

def perturb(allocate: Allocate, threads: int, /, *task: float) -> None: ...
def commutator(allocate: Allocate, threads: int, /, *task: float) -> None: ...
def subspace_split(allocate: Allocate, threads: int, /, *task: float) -> None: ...
def subspace_filter(allocate: Allocate, threads: int, /, *task: float) -> None: ...
def gram(allocate: Allocate, threads: int, /, *task: float) -> None: ...
def eigh(allocate: Allocate, threads: int, /, *task: float) -> None: ...
def rotate(allocate: Allocate, threads: int, /, *task: float) -> None: ...
def sketch(allocate: Allocate, threads: int, /, *task: float) -> None: ...
