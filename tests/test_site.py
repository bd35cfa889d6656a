"""The course as a site: every page is there, its search works, and nothing comes from elsewhere."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import REPO, chromium

pytestmark = pytest.mark.full

LESSONS = sorted((REPO / "notebooks").glob("0*_*.ipynb"))
PAGES = [path.stem for path in LESSONS] + ["index", "Colab", "DATA", "COSTS", "SCALE", "DEMO"]
PAGES += ["ERRORS", "GLOSSARY", "TEACHING"]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as ``make site`` builds it; its strict mode refuses broken links."""
    out = tmp_path_factory.mktemp("site")
    config = REPO / ".github" / "site" / "mkdocs.yml"
    command = [sys.executable, "-m", "mkdocs", "build", "-q", "-f", str(config), "-d", str(out)]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    handler = functools.partial(Quiet, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/"
        server.shutdown()


def test_every_lesson_and_page_is_in_the_menu(site: Path) -> None:
    menu = (site / "index.html").read_text("utf-8")
    assert [name for name in PAGES if not (site / f"{name}.html").is_file()] == []
    assert [path.stem for path in LESSONS if f'href="{path.stem}.html"' not in menu] == []


def test_a_link_out_of_the_notebooks_leads_to_the_repository(site: Path) -> None:
    pages = "".join((site / f"{name}.html").read_text("utf-8") for name in ("index", "TEACHING"))
    assert re.findall(r'href="(?:\.\./)*(?:medquad_utils|tests|\.github)/', pages) == []


def test_formulas_are_drawn_without_a_script(site: Path) -> None:
    page = (site / "03_attach_lora.html").read_text("utf-8")
    text = re.sub(r"<(script|style|pre|code)\b.*?</\1>", "", page, flags=re.DOTALL)
    assert "$" not in text
    assert "<mfrac><mrow><mi>&#x003B1;</mi></mrow><mrow><mi>r</mi></mrow></mfrac>" in text


def test_the_search_finds_double_quantisation_and_the_page_turns_dark(address: str) -> None:
    # Nothing but this machine can be reached: a page that needs the network shows it.
    with chromium("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") as browser:
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.fill("input[name=query]", "double quantisation")
        found = page.locator(".md-search-result__link").first
        found.wait_for()
        assert "02_quantize_to_4_bits" in (found.get_attribute("href") or "")
        page.keyboard.press("Escape")
        page.locator("label[title='Dark mode']").click()
        assert page.locator("body").get_attribute("data-md-color-scheme") == "slate"
        assert [url for url in asked if not url.startswith((address, "data:", "blob:"))] == []
