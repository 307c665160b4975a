"""The paper's claims, one by one: what was published, what its arithmetic gives here, what can be trusted.

A profile says which runs there are, and a claim which of them it reads. Trained and judged in one call::

    found = reproduce(["pc1", "onset"], profile="quick", out="runs/reproduce-quick")
    found.table  # one row a claim; the page is in out

>>> from grokcurv.reproduce import CLAIMS, PROFILES
>>> CLAIMS[:4], list(PROFILES)
(('pc1', 'rho', 'exec-random', 'control-ratio'), ['quick', 'add', 'paper'])
>>> [block.seeds for block in PROFILES["quick"].runs["control"]]
[{'add': (42,), 'mul': (42,)}]
"""

from grokcurv.reproduce.driver import reproduce
from grokcurv.reproduce.page import Reproduction
from grokcurv.reproduce.plan import CLAIMS, PROFILES, Block, Profile

__all__ = ["CLAIMS", "PROFILES", "Block", "Profile", "Reproduction", "reproduce"]
