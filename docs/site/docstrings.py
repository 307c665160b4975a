"""Docstrings for the site: the reStructuredText that ``help()`` shows becomes Markdown.

Roles become links where the site has their target, and names of pages become links; mathematics becomes MathML, which
browsers draw without a script, simple tables become tables, examples become code, and ``a, b: ...`` among the arguments
an entry for each.
"""

from __future__ import annotations

import re
from typing import Any

import griffe
from latex2mathml.converter import convert

ROLE = re.compile(r":(?:attr|class|data|exc|func|meth|mod):`(?P<name>[^`]+)`")
MATH = re.compile(r":math:`(?P<latex>[^`]+)`")
BLOCK = re.compile(r"^\.\. math::(?P<latex>.*(?:\n+ {4}.*)*)", re.MULTILINE)
TABLE = re.compile(
    r"^(?P<rule>=+(?: +=+)+)\n(?:(?P<head>.+)\n(?P=rule)\n)?(?P<rows>(?:.+\n)+?)(?P=rule)$", re.MULTILINE
)
EXAMPLE = re.compile(r"^(?P<indent> *)>>> .*(?:\n(?P=indent) *\S.*)*", re.MULTILINE)
OPTION = re.compile(r" +# doctest: .*")
INLINE = re.compile(r"((?::math:)?`+.+?`+)")
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
    text = EXAMPLE.sub(_example, text)
    text = BLOCK.sub(lambda found: f"\n{_mathml(found['latex'], 'block')}\n", text)
    text = MATH.sub(lambda found: _mathml(found["latex"], "inline"), text)
    text = ROLE.sub(lambda found: _link(found["name"], scope), text)
    text = PAGE.sub(r'<a href="../\g<page>.html">docs/\g<page>.md</a>', text)  # the API's pages are in api/
    return LITERAL.sub(":", text)


def _mathml(latex: str, display: str) -> str:
    mathml: str = convert(" ".join(latex.split()), display=display)
    # Markdown takes <math> at the beginning of a line for a paragraph.
    return mathml if display == "block" else f"<span>{mathml}</span>"


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


def _example(found: re.Match[str]) -> str:
    indent = found["indent"]
    return f"{indent}```pycon\n{OPTION.sub('', found[0])}\n{indent}```"


def _table(found: re.Match[str]) -> str:
    starts = [mark.start() for mark in re.finditer(r"=+", found["rule"])]
    ends = [*starts[1:], None]
    rows: list[list[str]] = []
    for line in found["rows"].splitlines():
        cells = [line[start:end].strip() for start, end in zip(starts, ends, strict=True)]
        if rows and (not cells[0] or rows[-1][0].endswith(",")):  # goes on with the row above
            rows[-1] = [f"{above} {cell}".strip() for above, cell in zip(rows[-1], cells, strict=True)]
        else:
            rows.append(cells)
    head = [(found["head"] or "")[start:end].strip() for start, end in zip(starts, ends, strict=True)]
    marks = ["---"] * len(starts)
    return "\n".join(f"| {' | '.join(map(_cell, row))} |" for row in (head, marks, *rows))


def _cell(text: str) -> str:
    """Bars are no bars of the table, and angles no tags, but for those in code, which Markdown knows by itself."""
    parts = INLINE.split(text)
    plain = [re.sub(r"\\?\|", "&#124;", part).replace("<", "&lt;") for part in parts]
    plain[1::2] = [MATH.sub(lambda found: _mathml(found["latex"], "inline"), part) for part in parts[1::2]]
    return "".join(plain)
