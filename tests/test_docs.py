"""The site: it builds without a warning, fetches nothing, and what its tutorial says to type works."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
import synthetic_run
from test_browser import BROWSER, probe, serve
from test_names import PUBLIC
from test_report import Page

from grokcurv import cli
from grokcurv.report.summary import Summary
from grokcurv.runs import open_run

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings_handlers.python", "latex2mathml"):
        pytest.importorskip(module, reason=f"no {module} here; pip install 'grokcurv[docs]'")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return folder


def test_lines_are_no_longer_than_those_of_code() -> None:
    """Tables aside, links that are longer by themselves, and records, which are as a program printed them."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "csrc").glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for number, line in enumerate(page.read_text().splitlines(), 1):
            whole = line.startswith("|") or page.parent.name == "measurements" or " " not in line.strip()
            assert whole or len(line) <= 120, f"{page.relative_to(ROOT)}:{number}"


def test_every_page_is_there(site: Path) -> None:
    for page in (ROOT / "docs").rglob("*.md"):
        assert site.joinpath(page.relative_to(ROOT / "docs")).with_suffix(".html").is_file()
    for name in ("docstrings.py", "hooks.py"):
        assert not list(site.rglob(name))


def test_docstrings_are_drawn(site: Path) -> None:
    """Roles are links, mathematics is MathML; nothing of their source is left."""
    pages = {page.stem: page.read_text() for page in (site / "api").glob("*.html")}
    assert 'href="geometry.html#grokcurv.StreamingPCA"' in pages["measuring"]
    assert 'href="#grokcurv.CurvatureMonitor.step"' in pages["measuring"]
    assert "<mi>&#x003B8;</mi>" in pages["interventions"]
    for name, source in pages.items():
        assert not re.search(r":(class|data|func|math|meth|mod):|\.\. math|={8}|&amp;#|doctest:", source), name
        assert "<blockquote>" not in source, name  # what Markdown takes >>> for


def test_modules_and_columns_are_shown(site: Path) -> None:
    """Formulas of modules stand before what is computed by them; a column and its unit are cells of a row."""
    page = (site / "api" / "measuring.html").read_text()
    module, probe = (page.index(f'id="grokcurv.{name}"') for name in ("commutator", "CommutatorProbe"))
    assert "<math" in page[module:probe]
    assert 'id="grokcurv.integrations.sharded.distributed"' in page
    cells = r"<td><code>bracket_norm</code></td>\s*(<td>\(N,\)</td>\s*)?<td>loss\^2 / theta\^3</td>"
    assert len(re.findall(cells, page)) == 2  # of the records and of the probe's
    assert "&lt;v_j, w_j" in page  # no tag


def test_public_names_are_on_a_page_of_the_api(site: Path) -> None:
    ids = {e["id"] for path in (site / "api").glob("*.html") for _, e in Page(path).elements if "id" in e}
    shown = {(each or "").rpartition(".")[2] for each in ids}
    for module, names in PUBLIC.items():
        assert {*names} <= shown, (module, {*names} - shown)


def test_every_link_leads_somewhere(site: Path) -> None:
    """To a file of the site, and to a place in it: pages, docstrings and signatures alike."""
    pages = {path.resolve(): Page(path) for path in site.rglob("*.html") if path.name != "404.html"}
    places = {path: {element["id"] for _, element in page.elements if "id" in element} for path, page in pages.items()}
    for path, page in pages.items():
        for target in {element.get("href") or "" for element in page.of("a")} - {"", "."}:
            address, _, place = target.partition("#")
            if not re.match(r"\w+:", address):
                file = (path.parent / unquote(address)).resolve() if address else path
                assert file.is_file(), (path, target)
                assert not place or unquote(place) in places[file], (path, target)


def test_nothing_is_fetched(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = Page(path)
        fetched = [
            element["src"] for tag in ("script", "img", "iframe") for element in page.of(tag) if "src" in element
        ]
        fetched += [element["href"] for element in page.of("link")]
        assert not [address for address in fetched if re.match(r"(https?:)?//", address or "")], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", path.read_text()), path


@pytest.mark.skipif(BROWSER is None, reason="no chromium here; on Debian: apt-get install chromium")
@pytest.mark.parametrize("name", ["index.html", "tutorial.html", "gallery.html", "api/measuring.html"])
def test_in_a_browser(site: Path, name: str) -> None:
    """What its scripts do is seen as well: every address asked for is the site's own, and pictures decode."""
    page = site / name
    with serve(site) as address:
        found = probe(page, f"{address}/{Path(name).parent}", 1300)
    assert all(fetched.startswith(address) for fetched in found["fetched"])
    assert any(fetched.endswith(".css") for fetched in found["fetched"])
    assert all(complete and width for complete, width, _ in found["pictures"])
    assert found["overflow"] <= 0


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TUTORIAL.read_text().replace("\\\n", ""), re.DOTALL)


def test_the_python_of_the_tutorial_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    synthetic_run.write_run(tmp_path / "runs" / "first")
    reading, loop = blocks("python")
    exec(reading, {})
    summary = Summary(open_run("runs/first"))
    assert summary.grok is not None
    assert summary.onset is not None
    assert capsys.readouterr().out.startswith(f"{summary.grok} {summary.onset} {summary.grok - summary.onset}\n")
    names: dict[str, Any] = {}
    exec(loop, names)
    assert names["records"]["reliable"].all()
    assert (tmp_path / "defect.png").stat().st_size > 1000


def test_the_commands_of_the_tutorial_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As they stand, but for the number of steps."""
    monkeypatch.chdir(tmp_path)
    commands = [line for block in blocks("bash") for line in block.splitlines() if line.startswith("grokcurv ")]
    assert len(commands) == 5
    for command in commands:
        words = shlex.split(command, comments=True)[1:]
        assert cli.main([*words, "--steps", "100"] if words[0] == "train" else words) == 0
    for name in ("first", "control"):
        assert (tmp_path / "runs" / name / "report.html").is_file()
        assert (tmp_path / "runs" / name / "figures" / "grokking.png").is_file()
