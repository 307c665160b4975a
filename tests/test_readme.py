"""The README's Python is run as it stands, and prints what the page says."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

README = Path(__file__).parents[1] / "README.md"


def table(text: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(text), sep=r"\s+")


def test_the_loop_prints_what_the_page_says(capsys: pytest.CaptureFixture[str]) -> None:
    page, names = README.read_text(), dict[str, object]()
    loop, said = re.search(r"```python\n(.*?)```\n\n```\n(.*?)```", page, re.DOTALL).groups()
    exec(loop, names)
    found, wanted = table(capsys.readouterr().out), table(said)
    assert list(found) == list(wanted)
    assert len(names["monitor"].records()) == 8
    assert found[["step", "reliable"]].equals(wanted[["step", "reliable"]])
    # Another processor rounds otherwise: the defects are known to their floors, and the floors to a factor.
    error = (found["defect_median"] - wanted["defect_median"]).abs()
    assert (error <= found["noise_floor"] + wanted["noise_floor"] + 1e-4).all()
    assert np.allclose(found["gap_ratio"], wanted["gap_ratio"], rtol=1e-3, equal_nan=True)
    (attached,) = re.findall(r"`(gc\.attach\(.*?\))`", page, re.DOTALL)
    with eval(attached, names) as monitor:
        names["optimizer"].step()
    assert len(monitor.records()) == 1


def test_it_is_short() -> None:
    assert len(README.read_text().splitlines()) <= 80


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"(?:\]\(|src=\"|srcset=\")([^)#\"]+)", README.read_text()):
        assert target.startswith("https://") or (README.parent / target).exists(), target
