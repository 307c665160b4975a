"""Docstrings for the site: the reStructuredText that ``help()`` shows becomes Markdown.

Roles become links where the site has their target, and names of pages become links; mathematics becomes MathML, which
browsers draw without a script, simple tables become tables, and ``a, b: ...`` among the arguments an entry for each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<name>[^`]+)`")
MATH = re.compile(r":math:`(?P<latex>[^`]+)`")
BLOCK = re.compile(r"^\.\. math::(?P<latex>.*(?:\n+ {4}.*)*)", re.MULTILINE)
TABLE = re.compile(r"^(?P<rule>=+ +=+)\n(?P<rows>(?:.+\n)+?)(?P=rule)$", re.MULTILINE)
ITEMS = re.compile(r"^ {4}(?P<names>\w+(?:, \w+)+): (?P<text>.*(?:\n {8}.*)*)", re.MULTILINE)
PAGE = re.compile(r"(?P<ticks>`*)docs/(?P<page>[\w-]+)\.md(?P=ticks)")
LITERAL = re.compile(r"::$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites every docstring once the package is read."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        self._walk(pkg)

    def _walk(self, thing: griffe.Object) -> None:
        if thing.docstring:
            thing.docstring.value = markdown(thing.docstring.value, thing)
        for member in thing.members.values():
            if isinstance(member, griffe.Object):
                self._walk(member)


def markdown(text: str, scope: griffe.Object) -> str:
    """The docstring of ``scope`` as Markdown, with the HTML of links and mathematics in it."""
    text = ITEMS.sub(
        lambda found: "\n".join(f"    {name}: {found['text']}" for name in found["names"].split(", ")), text
    )
    text = TABLE.sub(_table, text)
    text = BLOCK.sub(lambda found: f"\n{_mathml(found['latex'], 'block')}\n", text)
    text = MATH.sub(lambda found: _mathml(found["latex"], "inline"), text)
    text = ROLE.sub(lambda found: _link(found["name"], scope), text)
    text = PAGE.sub(r'<a href="../\g<page>.html">docs/\g<page>.md</a>', text)  # the API's pages are in api/
    return LITERAL.sub(":", text)


def _mathml(latex: str, display: str) -> str:
    return convert(" ".join(latex.split()), display=display)


def _link(name: str, scope: griffe.Object) -> str:
    """A link to the object, found as Python would from ``scope`` on; no link, and no warning, if no page has it."""
    label = name.rpartition(".")[2] if name.startswith("~") else name
    target = name = name.removeprefix("~")
    first = name.partition(".")[0]
    around: griffe.Object | None = scope
    while around is not None and first != "grokcurv":
        if first in around.members:
            target = f"{around.path}.{name}"
            break
        around = around.parent
    return f'<autoref optional identifier="{target}"><code>{label}</code></autoref>'


def _table(found: re.Match[str]) -> str:
    starts = [mark.start() for mark in re.finditer(r"=+", found["rule"])]
    ends = [*starts[1:], None]
    rows = [
        [row[start:end].strip() for start, end in zip(starts, ends, strict=True)] for row in found["rows"].splitlines()
    ]
    return "\n".join(["| | |", "|---|---|", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)])


def _cell(text: str) -> str:
    """Bars of formulas are no bars of the table."""
    return MATH.sub(lambda found: _mathml(found["latex"], "inline").replace("|", "&#124;"), text)
