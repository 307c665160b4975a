"""The paper's claims, one by one: what was published, what its arithmetic gives here, what can be trusted.

>>> from grokcurv.reproduce import reproduce
>>> reproduce(["pc1", "onset"], out="runs/reproduce-quick").table  # doctest: +SKIP
"""

from grokcurv.reproduce.driver import reproduce
from grokcurv.reproduce.page import Reproduction
from grokcurv.reproduce.plan import CLAIMS, PROFILES, Block, Profile

__all__ = ["CLAIMS", "PROFILES", "Block", "Profile", "Reproduction", "reproduce"]
