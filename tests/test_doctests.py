"""The examples in docstrings are run; what takes minutes or several processes is skipped, beside lines that are."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[1] / "grokcurv"
FILES = sorted(path.relative_to(HOUSE.parent) for path in HOUSE.rglob("*.py") if ">>>" in path.read_text())
NEEDED = {"lightning.py": "lightning", "huggingface.py": "transformers"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples(file: Path) -> None:
    if file.name in NEEDED:
        pytest.importorskip(NEEDED[file.name])
    module = import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    found = doctest.testmod(module, extraglobs={"sampler": list})
    assert found.failed == 0
    assert found.attempted > 0
