"""The examples in docstrings are run, in a folder of their own; none is skipped."""

from __future__ import annotations

import doctest
import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from test_names import OPTIONAL, PUBLIC

ROOT = Path(__file__).parents[1]
HOUSE = ROOT / "grokcurv"
FILES = sorted(path.relative_to(ROOT) for path in HOUSE.rglob("*.py") if ">>>" in path.read_text())
NEEDED = {"lightning.py": "lightning", "huggingface.py": "transformers"}


@pytest.mark.parametrize("file", FILES, ids=str)
def test_examples(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # where they write
    if file.name in NEEDED:
        pytest.importorskip(NEEDED[file.name])
    module = import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    found = doctest.testmod(module)
    assert found.failed == 0
    assert found.attempted > 0


def test_no_example_is_skipped() -> None:
    files = [*HOUSE.rglob("*.py"), *(ROOT / "docs").rglob("*.md")]
    assert len(files) > len(FILES)
    assert [path for path in files if "+SKIP" in path.read_text()] == []


def shown() -> Iterator[Any]:
    """What the pages of the API name, and what their modules have of their own; the pinned names too."""
    pages = "".join(page.read_text() for page in (ROOT / "docs" / "api").glob("*.md"))
    named = re.findall(r"^::: (\S+)(?:\n    options: .*?members: (\[[^]]+\]|false))?", pages, re.M)
    for name, members in [*named, *((module, "") for module in PUBLIC)]:
        if name in OPTIONAL:
            pytest.importorskip(OPTIONAL[name])
        package, _, last = name.rpartition(".")
        try:
            thing: Any = import_module(name)
        except ModuleNotFoundError:
            thing = getattr(import_module(package), last)
        yield thing
        if inspect.ismodule(thing):
            own = [n for n, x in vars(thing).items() if n[0] != "_" and getattr(x, "__module__", None) == name]
            chosen = re.findall(r"\w+", members) if members else getattr(thing, "__all__", own)
            yield from (getattr(thing, n) for n in chosen if n != "false")


def test_each_class_has_an_example() -> None:
    """In its docstring, or in that of its module.

    Not needed: of what a function returns (dataclasses and tuples), which that function's example looks at; of what is
    raised; of protocols, of which the classes that follow them have one.
    """
    classes = {thing for thing in shown() if inspect.isclass(thing)}
    assert len(classes) > 60
    for each in classes:
        recorded = is_dataclass(each) or issubclass(each, tuple | BaseException) or getattr(each, "_is_protocol", False)
        module = inspect.getdoc(import_module(each.__module__)) or ""
        by_module = ">>>" in module and re.search(rf"\b{each.__name__}\b", module.partition(">>>")[2])
        assert recorded or ">>>" in (each.__doc__ or "") or by_module, f"{each.__module__}.{each.__name__}"
