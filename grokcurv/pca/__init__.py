"""Principal components of a trajectory that grows one row at a time: :class:`StreamingPCA`.

Each method has a file of its own: :mod:`grokcurv.pca.gram`, :mod:`grokcurv.pca.incremental`,
:mod:`grokcurv.pca.sketch`.
"""

from grokcurv.pca.streaming import StreamingPCA

__all__ = ["StreamingPCA"]
