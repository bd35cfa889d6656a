"""The lessons in JupyterLab in a real browser: one is run there, all are looked at as committed.

``MEDQUAD_SCREENSHOTS=FOLDER`` keeps pictures of every page, in light and dark, for a person.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pytest
from conftest import REPO, chromium
from playwright.sync_api import BrowserContext, Page

pytestmark = pytest.mark.full

NOTEBOOKS = REPO / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0*_*.ipynb"))
SETTINGS: dict[str, dict[str, Any]] = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
    "docmanager-extension/plugin": {"autosave": False},  # only Ctrl+S writes
}
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
LOADED = "() => [...document.querySelectorAll('.jp-Notebook img')].every(i => i.complete)"
# Prompts of the code cells, the kernel's state, and what a dialog says.
STATE = """() => ({
  prompts: [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')]
    .map(e => e.innerText.trim()),
  kernel: document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status ?? '',
  dialog: document.querySelector('.jp-Dialog')?.innerText ?? '',
})"""
# Output text whose contrast with what is behind it is under 4.5 to 1 (WCAG 2.2, 1.4.3).
FAINT = """() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n[3] ?? n.push(1), n; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const linear = v => v <= 10.3 ? v / 3294.6 : ((v / 255 + .055) / 1.055) ** 2.4;
  const lit = c => .2126 * linear(c[0]) + .7152 * linear(c[1]) + .0722 * linear(c[2]);
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const said = e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
  return [...document.querySelectorAll('.jp-OutputArea-output *')]
    .filter(e => said(e) && e.getClientRects().length && !e.closest('svg')).map(e => {
      const back = behind(e), ink = over(parse(getComputedStyle(e).color), back);
      const [low, high] = [lit(ink), lit(back)].sort((a, b) => a - b);
      return {text: e.textContent.trim().slice(0, 60), ratio: (high + .05) / (low + .05)};
    }).filter(e => e.ratio < 4.5);
}"""
# Figures with a see-through pixel, or without contrast.
FLAT = """() => [...document.querySelectorAll('.jp-OutputArea img')]
  .filter(i => i.src.startsWith('data:image/png') && i.naturalWidth > 8).map(i => {
  const c = document.createElement('canvas');
  [c.width, c.height] = [i.naturalWidth, i.naturalHeight];
  const g = c.getContext('2d');
  g.drawImage(i, 0, 0);
  const d = g.getImageData(0, 0, c.width, c.height).data;
  let alpha = 255, dark = 255, light = 0;
  for (let k = 0; k < d.length; k += 4) {
    alpha = Math.min(alpha, d[k + 3]);
    dark = Math.min(dark, d[k + 1]);
    light = Math.max(light, d[k + 1]);
  }
  return {alt: i.alt.slice(0, 60), alpha, spread: light - dark};
}).filter(i => i.alpha < 255 || i.spread < 128)"""


@dataclass
class Lab:
    """A running JupyterLab, and the folder that it shows."""

    url: str
    token: str
    root: Path


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    # Nothing but this machine can be reached: a page that needs the network shows it.
    with chromium("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1") as opened:
        context = opened.new_context(viewport={"width": 1280, "height": 1500})
        context.set_default_timeout(120_000)  # two busy cores
        yield context


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """JupyterLab as ``make lab`` starts it, on a copy of the notebooks."""
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "root" / "notebooks")
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    kinds = ("SETTINGS", "WORKSPACES")
    keep = {f"JUPYTERLAB_{k}_DIR": k.lower() for k in kinds}
    keep |= {f"JUPYTER_{k}_DIR": k.lower() for k in ("CONFIG", "DATA", "RUNTIME")}
    keep |= {"IPYTHONDIR": "ipython", "MEDQUAD_OUT": "runs"}
    env = {**os.environ, "PYTHONPATH": str(REPO)} | {k: str(folder / v) for k, v in keep.items()}
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"]
    command += ["--ip=127.0.0.1", "--port=0", f"--ServerApp.root_dir={folder / 'root'}"]
    command += ["--LabApp.extension_manager=readonly"]
    command += ["--MappingKernelManager.transport_encryption=auto"]
    with (folder / "server.log").open("wb") as log:
        process = subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=folder)
    try:
        yield wait_for_server(process, folder)
    finally:
        process.terminate()
        process.wait(60)


def wait_for_server(process: subprocess.Popen[bytes], folder: Path, seconds: float = 240) -> Lab:
    """JupyterLab's address and token, as soon as its port answers."""
    file, end = folder / "runtime" / f"jpserver-{process.pid}.json", time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            socket.create_connection(("127.0.0.1", info["port"]), 5).close()
            return Lab(info["url"], info["token"], folder / "root")
        except (FileNotFoundError, json.JSONDecodeError, ConnectionError):
            time.sleep(0.1)
    log = (folder / "server.log").read_text(errors="replace")
    raise AssertionError(f"JupyterLab did not start:\n{log[-3000:]}")


@pytest.fixture
def page(browser: BrowserContext, lab: Lab) -> Iterator[Page]:
    """A new page; its kernels end with it."""
    opened = browser.new_page()
    yield opened
    opened.close()
    header = {"Authorization": f"token {lab.token}"}
    for session in browser.request.get(f"{lab.url}api/sessions", headers=header).json():
        browser.request.delete(f"{lab.url}api/sessions/{session['id']}", headers=header)


def open_notebook(page: Page, lab: Lab, path: str) -> None:
    page.goto(f"{lab.url}lab/tree/{quote(path)}?reset&token={lab.token}")
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()


def run_all(page: Page, seconds: float) -> str:
    """Run > Run All Cells, until the kernel rests; what a dialog asks, or ""."""
    # The status bar: before it says so, the kernel is not connected and a click runs nothing.
    page.get_by_text("Python 3 (ipykernel) | Idle", exact=True).wait_for()
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    end, quiet = time.monotonic() + seconds, 0
    while quiet < 3:
        page.wait_for_timeout(250)
        state = page.evaluate(STATE)
        if state["dialog"]:
            return str(state["dialog"])
        ran = any(prompt.strip("[]:").isdigit() for prompt in state["prompts"])
        rests = ran and "[*]:" not in state["prompts"] and state["kernel"] == "idle"
        quiet = quiet + 1 if rests else 0
        assert time.monotonic() < end, f"still running after {seconds:.0f} s: {state['prompts']}"
    return ""


def save(page: Page, lab: Lab, path: str) -> Any:
    """Save with Ctrl+S; returns the notebook as JupyterLab wrote it."""
    with page.expect_response(lambda r: r.request.method == "PUT" and "/contents/" in r.url):
        page.keyboard.press("Control+s")
    page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    return nbformat.read(lab.root / path, as_version=4)


def take_picture(page: Page, name: str) -> None:
    """Keep the top of the page as a picture, if somebody wants to look."""
    if wanted := os.environ.get("MEDQUAD_SCREENSHOTS"):
        Path(wanted).mkdir(parents=True, exist_ok=True)
        page.screenshot(path=Path(wanted) / f"{name}.png")


def test_a_lesson_runs_in_jupyterlab_and_is_saved(page: Page, lab: Lab) -> None:
    path = "notebooks/02_quantize_to_4_bits.ipynb"
    notebook = nbformat.read(lab.root / path, as_version=4)
    for cell in notebook.cells:  # what is there afterwards, the browser's run has made
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, lab.root / path)
    open_notebook(page, lab, path)
    assert run_all(page, 600) == ""
    page.wait_for_function(LOADED)
    take_picture(page, "02-run")
    ran = [c for c in save(page, lab, path).cells if c.cell_type == "code"]
    assert [c.execution_count for c in ran] == list(range(1, len(ran) + 1))
    outputs = [o for c in ran for o in c.outputs]
    assert [o.evalue for o in outputs if o.output_type == "error"] == []
    drawn = sum("image/png" in o.get("data", {}) for o in outputs)
    assert page.locator(".jp-OutputArea img").count() == drawn > 0


def test_a_failing_cell_is_seen_in_jupyterlab(page: Page, lab: Lab) -> None:
    """The test above would notice: a cell that fails leaves an error, and the next does not run."""
    made = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "P"}}
    )
    made.cells = [nbformat.v4.new_code_cell(source) for source in ("1 / 0", "print('never')")]
    nbformat.write(made, lab.root / "failing.ipynb")
    open_notebook(page, lab, "failing.ipynb")
    assert run_all(page, 60) == ""
    first, second = save(page, lab, "failing.ipynb").cells
    assert first.outputs[0].evalue == "division by zero"
    assert second.execution_count is None


@pytest.mark.parametrize("lesson", LESSONS, ids=lambda p: p.stem)
def test_committed_outputs_can_be_read_in_light_and_dark(
    lesson: Path, page: Page, lab: Lab
) -> None:
    (lab.root / "committed").mkdir(exist_ok=True)
    shutil.copyfile(lesson, lab.root / "committed" / lesson.name)
    open_notebook(page, lab, f"committed/{lesson.name}")
    for theme, name in THEMES.items():
        page.locator(".lm-MenuBar-itemLabel", has_text="Settings").first.click()
        page.locator(".lm-Menu-itemLabel").get_by_text("Theme", exact=True).hover()
        page.locator(".lm-Menu-itemLabel").get_by_text(name, exact=True).click()
        light = str(theme == "light").lower()
        page.locator(f"body[data-jp-theme-light={light}]").wait_for(state="attached")
        page.wait_for_function(LOADED)
        page.wait_for_timeout(300)  # the theme's colours arrive a little later
        assert page.evaluate(FAINT) == []
        assert page.evaluate(FLAT) == []
        take_picture(page, f"{lesson.stem}-{theme}")
    page.keyboard.press("Control+Shift+k")  # the table of contents
    items = page.locator(".jp-TableOfContents-tree .jp-tocItem-content")
    items.first.wait_for()
    listed = [text.strip() for text in items.all_inner_texts()]
    for cell in nbformat.read(lesson, as_version=4).cells:
        if cell.cell_type == "markdown":
            for heading in re.findall(r"^#+ (.+)$", cell.source, re.MULTILINE):
                assert re.sub(r"[`*]", "", heading) in listed
