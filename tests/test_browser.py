"""The report's page in a real browser: every picture decodes, nothing is fetched, nothing overflows."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread
from typing import Any

import numpy as np
import pytest
import synthetic_reproduction
import synthetic_run
import synthetic_sweep
from matplotlib.image import imread

from grokcurv.report import write_report
from grokcurv.report.figures import DARK, LIGHT

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here; on Debian: apt-get install chromium")

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)

PROBE = """
<script>
addEventListener("load", () => {
  const found = {
    pictures: [...document.images].map(image => [image.complete, image.naturalWidth, image.naturalHeight]),
    fetched: performance.getEntriesByType("resource").map(entry => entry.name),
    overflow: document.documentElement.scrollWidth - innerWidth,
    width: innerWidth,
    heading: document.querySelector("h1").textContent,
  };
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>
"""


EXPECTED = {
    "run": ("add mod 97, seed 42", 5),
    "lr": ("lr", 3),
    "reproduction": ("The claims, measured again", 11),
}
"""By the folder's name: the heading and the number of pictures."""


@pytest.fixture(scope="module", params=EXPECTED)
def page(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / str(request.param)
    if request.param == "run":
        return write_report(synthetic_run.write_run(folder))
    if request.param == "reproduction":
        return synthetic_reproduction.page(folder)
    folder.mkdir()
    return write_report(synthetic_sweep.published(folder))


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The folder over HTTP, and its address: of files that a page reads by ``file:`` the browser keeps no list."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def site(page: Path) -> Iterator[str]:
    with serve(page.parent) as address:
        yield address


def browse(url: str, *flags: str) -> str:
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [str(BROWSER), *FLAGS, f"--user-data-dir={profile}", *flags, url]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def probe(page: Path, site: str, width: int, script: str = PROBE) -> dict[str, Any]:
    """What a script finds in a copy of the page that lets it run; the page itself permits none but its own."""
    copy = page.with_name("probed.html")
    permitted = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text())
    copy.write_text(permitted.replace("</body>", script + "</body>"))
    dumped = browse(f"{site}/{copy.name}", "--dump-dom", f"--window-size={width},900")
    found = re.search(r"<pre id=\"found\">(.*?)</pre>", dumped)
    assert found, "the browser did not run the probe"
    return dict(json.loads(found[1]))


def test_pictures_decode_and_nothing_is_fetched(page: Path, site: str) -> None:
    found = probe(page, site, 1200)
    assert (found["heading"], len(found["pictures"])) == EXPECTED[page.parent.name]
    for complete, width, height in found["pictures"]:
        assert complete
        assert (width, height > 240) == (768, True)  # eight inches
    assert found["fetched"] == []
    assert found["overflow"] <= 0


USE = """
<script>
addEventListener("load", () => {
  const tables = document.querySelectorAll("table.sortable"), table = tables[tables.length - 1];
  const column = name => [...table.tHead.rows[0].cells].findIndex(head => head.textContent === name);
  const values = name => [...table.tBodies[0].rows].filter(row => !row.hidden)
    .map(row => row.cells[column(name)].textContent.trim());
  const press = name => table.tHead.rows[0].cells[column(name)].querySelector("button").click();
  const found = {before: values("run")};
  press("grok step");
  found.up = values("grok step");
  press("grok step");
  found.down = values("grok step");
  press("op");
  found.words = values("op");
  const filter = table.closest("section").querySelector("input");
  filter.value = "MUL 0.001";
  filter.dispatchEvent(new Event("input"));
  found.left = values("run");
  found.said = filter.nextSibling.textContent;
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>
"""


@pytest.mark.parametrize("page", ["lr"], indirect=True)
def test_a_sweep_s_table_is_sorted_and_filtered(page: Path) -> None:
    """By the page's own script, which its policy permits; numbers before words, what is empty last."""
    assert "script-src 'sha256-" in page.read_text()
    found = probe(page, page.parent.as_uri(), 1200, USE)
    assert len(found["before"]) == 54
    for way, order in ((1, found["up"]), (-1, found["down"])):
        numbers = [float(cell.replace(",", "")) for cell in order if cell[:1].isdigit()]
        assert numbers == sorted(numbers, reverse=way < 0)
        rest = order[len(numbers) :]
        assert 0 < len(numbers) < len(order)
        assert rest == ["never"] * rest.count("never") + [""] * rest.count("")
    assert found["words"] == sorted(found["words"])
    assert found["left"] == ["mul-0.001-42", "mul-0.001-137", "mul-0.001-2024"]
    assert found["said"].strip() == "3 of 54"


def test_the_probe_sees_what_is_fetched_and_what_fails(page: Path, site: str) -> None:
    broken = page.with_name("broken.html")
    extra = "<img src='elsewhere.png'><img src='data:image/png;base64,AAAA'><div style='width:9000px'>wide</div>"
    broken.write_text(page.read_text().replace("</body>", extra + "</body>"))
    found = probe(broken, site, 1200)
    assert [width for _, width, _ in found["pictures"]][-2:] == [0, 0]
    assert any(name.endswith("elsewhere.png") for name in found["fetched"])
    assert found["overflow"] > 0


def test_a_narrow_window(page: Path, site: str) -> None:
    found = probe(page, site, 500)
    assert found["width"] <= 500
    assert found["overflow"] <= 0


FRAME = """
<iframe src="report.html" style="width: 420px; height: 900px"></iframe>
<script>
addEventListener("load", () => {
  const shown = document.querySelector("iframe").contentDocument;
  const found = {
    pictures: [...shown.images].map(image => [image.clientWidth, image.naturalWidth]),
    overflow: shown.documentElement.scrollWidth - 420,
  };
  document.body.innerHTML = "<pre id=found>" + JSON.stringify(found) + "</pre>";
});
</script>
"""


def test_a_telephone(page: Path, site: str) -> None:
    """The page fits, and the type of its figures, 9 points of 4.75 inches, is as large as 9.5 pixels."""
    page.with_name("frame.html").write_text(f"<body>{FRAME}</body>")
    dumped = browse(f"{site}/frame.html", "--dump-dom", "--window-size=600,900")
    found = json.loads(re.search(r"<pre id=\"found\">(.*?)</pre>", dumped)[1])
    assert found["overflow"] <= 0
    assert len(found["pictures"]) == EXPECTED[page.parent.name][1]
    for shown, natural in found["pictures"]:
        assert natural == 456
        assert 12 * shown / natural >= 9.5


@pytest.mark.parametrize(("scheme", "theme"), [("1", LIGHT), ("0", DARK)], ids=["light", "dark"])
def test_it_is_drawn_in_both_colour_schemes(page: Path, scheme: str, theme: Any) -> None:
    shot = page.with_name(f"{scheme}.png")
    browse(
        page.as_uri(),
        f"--screenshot={shot}",
        "--window-size=1000,3000",
        f"--blink-settings=preferredColorScheme={scheme}",
    )
    pixels = np.round(255 * imread(shot)[..., :3]).astype(int)
    assert pixels.shape == (3000, 1000, 3)

    def share(colour: str) -> float:
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        return float((np.abs(pixels - wanted).max(axis=-1) <= 3).mean())

    assert share(theme.paper) > 0.5
    third = theme.green if page.parent.name == "run" else theme.purple
    for colour in (theme.blue, theme.orange, third):  # lines of the figures
        assert share(colour) > 1e-4
