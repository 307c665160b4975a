"""The native ops, registered as ``torch.ops.grokcurv.*``: checks, one call, and what ``torch.compile`` needs to know.

:mod:`grokcurv.reference` defines each op; shapes and names are the same here. What holds for all of them:

* Vectors are float32, float64 or bfloat16; sums are float64. N, P, K and S may be 0.
* An argument is a tensor or any other :class:`Array`, whose memory is then used where it lies. Results are tensors;
  what an op writes into, ``out`` or in place, is returned as the object that was given.
* Every tensor is contiguous, on one device and requires no gradient (the ops have no derivative); outputs overlap no
  input. Anything else is a ``TypeError`` or ``ValueError`` that names the argument.
* ``theta`` and the ``values`` of a basis are one-dimensional for all N vectors, or have a row for each.
* Tables of indices (``segments``, ``rows``) are on the CPU wherever the vectors are: so they are checked before the
  launch, and a GPU is never waited for. The integers of ``draw`` are numbers like those of vectors: on a GPU nobody
  looks at them, so that a graph may change them.
* Results are bitwise the same for any number of threads, any instruction set and any batching of the N vectors; on
  GPUs from run to run and for any GPU. Between CPU and GPU the order of sums differs.
* On a GPU work goes to the current stream; memory comes from torch's allocator; nothing waits, so that all of it can be
  captured in a CUDA graph.

Each op has two halves in the file of its name: ``_<op>_fake`` checks what tensors say of themselves and allocates the
outputs (all that tracing needs), ``_<op>_fill`` checks the values of tables too and has a core, ``_cpu`` or ``_cuda``,
fill them in. What the ops have in common is done where they are registered, in ``_dispatch.py``.
"""

from grokcurv.ops._arguments import Array
from grokcurv.ops.commutator import commutator
from grokcurv.ops.draw import draw
from grokcurv.ops.eigh import eigh
from grokcurv.ops.gram import gram
from grokcurv.ops.perturb import perturb
from grokcurv.ops.rotate import rotate, rotate_
from grokcurv.ops.sketch import sketch
from grokcurv.ops.subspace import subspace_filter_, subspace_split

__all__ = [
    "Array",
    "commutator",
    "draw",
    "eigh",
    "gram",
    "perturb",
    "rotate",
    "rotate_",
    "sketch",
    "subspace_filter_",
    "subspace_split",
]
