"""Every lesson as a learner meets it: opened in JupyterLab in a real browser, run by Run > Run All Cells, saved, looked at.

Each lesson begins with an empty results folder, as for a learner who opens it first (test_notebooks.py runs them in order). For a
person to look at, set ``MEDQUAD_SCREENSHOTS`` to a folder: pictures of every page, run and as committed, in light and dark, go there.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import nbformat
import pytest
from conftest import chromium
from playwright.sync_api import BrowserContext, Page
from test_places import headings

from medquad_utils import course

HERE = Path(__file__).parent
NOTEBOOKS = HERE.parent / "notebooks"
LESSONS = sorted(NOTEBOOKS.glob("0*_*.ipynb"))
TABLE = tomllib.loads((HERE / "notebooks.toml").read_text(encoding="utf-8"))
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
SETTINGS = {
    "notebook-extension/tracker": {"windowingMode": "none"},  # every cell is in the page, seen or not
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},  # no question, no request
    "docmanager-extension/plugin": {"autosave": False},  # only Ctrl+S writes
}
# Prompts of the cells with code, the kernel's state, what a dialog says; then where each of our own images stands.
STATE = """() => ({
  prompts: [...document.querySelectorAll('.jp-Notebook .jp-CodeCell .jp-InputPrompt')].map(e => e.innerText.trim()),
  kernel: document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status ?? '',
  dialog: document.querySelector('.jp-Dialog')?.innerText ?? '',
})"""
IMAGES = """() => [...document.querySelectorAll('.jp-Notebook img')]
  .filter(i => ['data:', 'blob:'].includes(new URL(i.src).protocol) || new URL(i.src).host === location.host)
  .map(i => ({src: i.src.slice(0, 120), width: i.naturalWidth, shown: i.clientWidth, output: i.closest('.jp-OutputArea') !== null}))"""
# Text that is too faint on what is behind it, by WCAG's contrast (4.5 to 1).
FAINT = """() => {
  const parse = c => { const n = c.match(/[\\d.]+/g).map(Number); return n.length < 4 ? [...n, 1] : n; };
  const over = (a, b) => [0, 1, 2].map(i => a[i] * a[3] + b[i] * (1 - a[3]));
  const lit = c => c.map(v => v / 255).map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = e => {
    const layers = [];
    for (; e; e = e.parentElement) layers.unshift(parse(getComputedStyle(e).backgroundColor));
    return layers.reduce((under, layer) => over(layer, under), [255, 255, 255]);
  };
  const at = '.jp-OutputArea-output', outputs = `${at} .jp-RenderedHTMLCommon *, ${at}.jp-RenderedHTMLCommon *, ${at} pre`;
  return [...document.querySelectorAll(outputs)]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim()) && e.getClientRects().length)
    .map(e => {
      const back = behind(e), ink = over(parse(getComputedStyle(e).color), back), [low, high] = [lit(ink), lit(back)].sort((a, b) => a - b);
      return {text: e.textContent.trim().slice(0, 60), tag: e.tagName, ratio: (high + 0.05) / (low + 0.05)};
    }).filter(e => e.ratio < 4.5);
}"""
# Our own figures drawn on a canvas: the least alpha of any sampled pixel, and how far the lightness of its pixels spreads.
PICTURES = """() => [...document.querySelectorAll('.jp-OutputArea img')]
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
  return {alt: i.alt.slice(0, 60), alpha, dark, light, filter: getComputedStyle(i).filter};
})"""
ACTIVE = "n => document.querySelectorAll('.jp-Notebook .jp-Cell')[n].classList.contains('jp-mod-active')"
THEMES = {"light": "JupyterLab Light", "dark": "JupyterLab Dark"}
LOADED = "() => [...document.querySelectorAll('.jp-Notebook img')].every(i => i.complete)"

Say = Callable[[str], None]


@dataclass
class Lab:
    """A running JupyterLab, the folder that it shows, and where its kernels write results."""

    url: str
    token: str
    root: Path
    runs: Path


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"  # a page that needs the network shows it
    with chromium(alone) as opened:
        context = opened.new_context(viewport={"width": 1280, "height": 1500})
        context.set_default_timeout(120_000)  # two busy cores
        yield context


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    folder = tmp_path_factory.mktemp("lab")
    shutil.copytree(NOTEBOOKS, folder / "root" / "notebooks", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))
    shutil.copytree(NOTEBOOKS, folder / "root" / "committed", ignore=shutil.ignore_patterns(".ipynb_checkpoints"))  # to look at
    for lesson in LESSONS:
        parameters = TABLE[lesson.stem]["parameters"] | {"out": str(folder / "runs" / lesson.stem)}
        _prepare(folder / "root" / "notebooks" / lesson.name, parameters)
    for name, values in SETTINGS.items():
        file = folder / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values), encoding="utf-8")
    process = _serve(folder)
    try:
        info = _wait_for_server(process, folder)
        yield Lab(info["url"], info["token"], folder / "root", folder / "runs")
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _prepare(path: Path, parameters: dict[str, Any]) -> None:
    """Take out the outputs and counts that a lesson is committed with: what is there afterwards, the browser's run has made."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count, cell.outputs = None, []
        if "parameters" in cell.metadata.get("tags", ()):
            cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    nbformat.write(notebook, path)


def _serve(folder: Path) -> subprocess.Popen[bytes]:
    """JupyterLab on a free port; whatever it keeps for a user, it keeps in ``folder``."""
    keep = {"JUPYTERLAB_SETTINGS_DIR": "settings", "JUPYTERLAB_WORKSPACES_DIR": "workspaces", "JUPYTER_CONFIG_DIR": "config",
            "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "runtime", "IPYTHONDIR": "ipython", "MEDQUAD_OUT": "runs"}  # fmt: skip
    env = {**os.environ, "HF_HUB_OFFLINE": "1", **{k: str(folder / v) for k, v in keep.items()}}
    try:
        importlib.metadata.distribution("medquad-qlora")
    except importlib.metadata.PackageNotFoundError:
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    command += [f"--ServerApp.root_dir={folder / 'root'}", "--LabApp.extension_manager=readonly"]
    command += ["--MappingKernelManager.transport_encryption=auto"]  # as ``make lab`` starts it
    with (folder / "server.log").open("wb") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, cwd=folder)


def _wait_for_server(process: subprocess.Popen[bytes], folder: Path, seconds: float = 240) -> dict[str, Any]:
    """What the server says about itself (URL with the port that it got, token), as soon as it says so."""
    file, end = folder / "runtime" / f"jpserver-{process.pid}.json", time.monotonic() + seconds
    while process.poll() is None and time.monotonic() < end:
        try:
            info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            socket.create_connection(("127.0.0.1", info["port"]), 5).close()  # the file is there before the port is served
            return info
        except (FileNotFoundError, json.JSONDecodeError, ConnectionError):
            time.sleep(0.1)
    raise AssertionError("JupyterLab did not start:\n" + (folder / "server.log").read_text(errors="replace")[-3000:])


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Say:
    """Print now, past pytest's capture: a lesson takes minutes."""

    def line(text: str) -> None:
        with capsys.disabled():
            print(f"\n  {text}", end="", flush=True)

    return line


def faults(browser: BrowserContext, lab: Lab, path: str, timeout: float, say: Say) -> list[str]:
    """Open a notebook of the lab, run all its cells as a learner would, save it, and say what is wrong with it now."""
    name = Path(path).stem
    page = browser.new_page()
    try:
        page.goto(f"{lab.url}lab/tree/{quote(path)}?reset&token={lab.token}")
        page.get_by_text("Python 3 (ipykernel) | Idle", exact=True).wait_for()  # the status bar: before, nothing would run
        stopped = _run_all(page, name, timeout, say)
        page.wait_for_function(LOADED)
        images = page.evaluate(IMAGES)
        _screenshots(page, name)
        if stopped:
            return [stopped]
        with page.expect_response(lambda r: r.request.method == "PUT" and "/api/contents/" in r.url) as saving:
            page.keyboard.press("Control+s")
        assert saving.value.ok, f"JupyterLab could not save {path}: {saving.value.status}"
        return wrong_with(nbformat.read(lab.root / path, as_version=4), images)
    finally:
        _close(page, browser, lab)


def _close(page: Page, browser: BrowserContext, lab: Lab) -> None:
    """Close a page and end the kernel that JupyterLab started for it."""
    page.close()
    header = {"Authorization": f"token {lab.token}"}
    for session in browser.request.get(f"{lab.url}api/sessions", headers=header).json():
        browser.request.delete(f"{lab.url}api/sessions/{session['id']}", headers=header)


def _run_all(page: Page, name: str, timeout: float, say: Say) -> str:
    """Run > Run All Cells, then wait until no cell waits and the kernel rests; returns what stopped it, "" if nothing did."""
    page.locator(".lm-MenuBar-itemLabel", has_text="Run").first.click()
    page.locator(".lm-Menu-itemLabel").get_by_text("Run All Cells", exact=True).click()
    started, told, quiet = time.monotonic(), 0.0, 0
    while quiet < 3:
        page.wait_for_timeout(250)
        state, took = page.evaluate(STATE), time.monotonic() - started
        if state["dialog"]:
            page.wait_for_timeout(500)  # its title and its text do not come at once
            return f"after {took:.0f} s JupyterLab asks: {' '.join(page.evaluate(STATE)['dialog'].split())}"
        ran = sum(p.strip("[]:").isdigit() for p in state["prompts"])
        rests = ran > 0 and "[*]:" not in state["prompts"] and state["kernel"] == "idle"
        quiet = quiet + 1 if rests else 0
        if took - told >= 20 or quiet == 3:
            say(f"{name}: {ran} of {len(state['prompts'])} cells, {took:.0f} s")
            told = took
        if took > timeout:
            return f"after {timeout:.0f} s only {ran} of {len(state['prompts'])} cells had run"
    return ""


def wrong_with(notebook: Any, images: list[dict[str, Any]]) -> list[str]:
    """What a person would find wrong in a saved notebook that was run once, and in the images on its page; [] if nothing."""
    found = []
    cells = [c for c in notebook.cells if c.cell_type == "code" and c.source.strip()]
    outputs = [(number, o) for number, c in enumerate(cells, start=1) for o in c.outputs]
    for number, cell in enumerate(cells, start=1):
        if cell.execution_count != number:
            found.append(f"code cell {number} did not run in its turn: {cell.source.splitlines()[0]}")
    found += [f"code cell {number} failed: {o.ename}: {o.evalue}" for number, o in outputs if o.output_type == "error"]
    drawn, shown = sum("image/png" in o.get("data", {}) for _, o in outputs), sum(i["output"] for i in images)
    if shown < drawn:
        found.append(f"{drawn} figures are in the outputs, {shown} on the page")
    found += [f"image cannot be seen: {i['src']}" for i in images if not (i["width"] > 0 and i["shown"] > 0)]
    return found


def _screenshots(page: Page, name: str) -> None:
    """Write the whole page as pictures into ``$MEDQUAD_SCREENSHOTS``, a screenful each, from top to bottom, if that is set."""
    if not (wanted := os.environ.get("MEDQUAD_SCREENSHOTS")):
        return
    folder = Path(wanted)
    folder.mkdir(parents=True, exist_ok=True)
    move = """(y) => {
      const area = document.querySelector('.jp-Notebook .jp-WindowedPanel-outer');
      area.scrollTop = y;
      return [area.clientHeight, area.scrollHeight];
    }"""
    page.mouse.move(0, 0)  # nothing is highlighted
    number, top, height = 0, 0, 1
    while top < height:
        screen, height = page.evaluate(move, top)
        number += 1
        page.screenshot(path=folder / f"{name}-{number:02d}.png")
        top += screen


def unseen(page: Page) -> list[str]:
    """What cannot be seen of the outputs on a page in the theme that is on; [] if all can."""
    found = [f"{e['ratio']:.1f} to 1 is too faint: {e['tag']} {e['text']!r}" for e in page.evaluate(FAINT)]
    for image in page.evaluate(PICTURES):
        if image["alpha"] < 255 or image["light"] - image["dark"] < 128:
            found.append(f"see-through or flat: {image}")
    return found


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_is_seen_in_light_and_dark_with_a_table_of_contents(path: Path, browser: BrowserContext, lab: Lab) -> None:
    """The committed lesson with its outputs, not run: every picture and table in both themes, the headings in their panel."""
    page = browser.new_page()
    try:
        page.goto(f"{lab.url}lab/tree/committed/{quote(path.name)}?reset&token={lab.token}")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        for theme, name in THEMES.items():
            page.locator(".lm-MenuBar-itemLabel", has_text="Settings").first.click()
            page.locator(".lm-Menu-itemLabel").get_by_text("Theme", exact=True).hover()
            page.locator(".lm-Menu-itemLabel").get_by_text(name, exact=True).click()
            page.locator(f"body[data-jp-theme-light={'true' if theme == 'light' else 'false'}]").wait_for(state="attached")
            page.wait_for_function(LOADED)
            page.wait_for_timeout(500)
            assert unseen(page) == []
            _screenshots(page, f"{path.stem}-{theme}")
        page.keyboard.press("Control+Shift+k")
        items = page.locator(".jp-TableOfContents-tree .jp-tocItem-content")
        items.first.wait_for()
        listed = [text.strip() for text in items.all_inner_texts()]
        wanted = [text for _, text in headings(json.loads(path.read_text(encoding="utf-8")))]
        rest = iter(listed)  # headings of outputs stand among them: lesson 08 shows a model card
        assert all(text.replace("`", "") in rest for text in wanted), listed
    finally:
        _close(page, browser, lab)


@pytest.mark.parametrize("path", LESSONS, ids=lambda p: p.stem)
def test_run_all_in_jupyterlab_starts_cold_and_ends_without_an_error(path: Path, browser: BrowserContext, lab: Lab, say: Say) -> None:
    assert faults(browser, lab, f"notebooks/{path.name}", TABLE[path.stem]["timeout"], say) == []
    (written,) = (lab.runs / path.stem).glob(f"*/metrics/{course.metrics_file(path, lab.runs).name}")
    assert json.loads(written.read_text(encoding="utf-8"))["headline"]


def _toy(lab: Lab, name: str, *cells: str) -> str:
    """Write a small notebook into the lab: a picture, a heading, ``cells``; committed outputs are there, and are an error."""
    kernel = {"name": "python3", "display_name": "Python 3 (ipykernel)", "language": "python"}
    toy = nbformat.v4.new_notebook(metadata={"kernelspec": kernel})
    stale = nbformat.v4.new_output("error", ename="Stale", evalue="of an earlier run", traceback=[])
    picture = f"from IPython.display import Image\nfrom base64 import b64decode\nImage(b64decode({PNG!r}), width=40)"
    toy.cells = [nbformat.v4.new_markdown_cell("# Toy\n![badge](https://example.org/badge.svg)\n![a dot](dot.svg)")]
    toy.cells += [nbformat.v4.new_code_cell(source, outputs=[stale]) for source in (picture, *cells)]
    folder = lab.root / "toys"
    folder.mkdir(exist_ok=True)
    (folder / "dot.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><circle r="4"/></svg>')
    nbformat.write(toy, folder / f"{name}.ipynb")
    return f"toys/{name}.ipynb"


def test_the_checker_finds_nothing_wrong_with_a_sound_notebook(browser: BrowserContext, lab: Lab, say: Say) -> None:
    path = _toy(lab, "sound", "import time\ntime.sleep(1.5)", "", "print('late')\n1 + 1")
    assert faults(browser, lab, path, 60, say) == []
    last = nbformat.read(lab.root / path, as_version=4).cells[-1]
    assert [o.get("text") or o["data"]["text/plain"] for o in last.outputs] == ["late\n", "2"]


@pytest.mark.parametrize(
    ("cell", "message"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("from medquad_utils import profiles\nprofiles.resolve('tiny')\nprofiles.resolve('huge')", "CourseError: "),
    ],
    ids=["a plain error", "one of the course's own"],
)
def test_the_checker_finds_failing_cells_the_cells_they_kept_from_running_and_missing_images(
    cell: str, message: str, browser: BrowserContext, lab: Lab, say: Say
) -> None:
    missing = 'from IPython.display import HTML\nHTML(\'<img src="missing.svg" alt="nothing">\')'
    stopped, failed, unseen = faults(browser, lab, _toy(lab, "failing", missing, cell, "print('never')"), 60, say)
    assert stopped == "code cell 4 did not run in its turn: print('never')"
    assert failed.startswith(f"code cell 3 failed: {message}")
    assert unseen.startswith("image cannot be seen: ") and "missing.svg" in unseen


def test_the_checker_finds_a_kernel_that_died(browser: BrowserContext, lab: Lab, say: Say) -> None:
    (found,) = faults(browser, lab, _toy(lab, "dead", "import os\nos._exit(1)", "print('never')"), 60, say)
    assert "JupyterLab asks: " in found and "appears to have died" in found


def test_a_lesson_can_be_done_from_the_keyboard(browser: BrowserContext, lab: Lab) -> None:
    """Lesson 02 up to its first prediction, no mouse: run cell by cell, type a guess, run it, save, find the headings."""
    path = lab.root / "committed" / "02_quantize_to_4_bits.ipynb"
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    predict = next(n for n, cell in enumerate(cells) if "predict" in cell["metadata"].get("tags", ()))
    lines = "".join(cells[predict]["source"]).splitlines()
    line = next(n for n, text in enumerate(lines) if text.startswith("my_guess ="))
    page = browser.new_page()
    try:
        page.goto(f"{lab.url}lab/tree/committed/{path.name}?reset&token={lab.token}")
        page.locator(".jp-Notebook .jp-CodeCell").first.wait_for()
        page.locator('.jp-Notebook-ExecutionIndicator[data-status="idle"]').wait_for(state="attached")
        page.wait_for_function("() => document.activeElement.closest('.jp-Cell') !== null")  # JupyterLab puts the focus there itself
        for _ in range(100):  # a key that is pressed too early is lost, for a person too
            if page.evaluate(ACTIVE, predict):
                break
            page.keyboard.press("Shift+Enter")
            page.wait_for_timeout(500)
        cell = page.locator(".jp-Notebook .jp-Cell").nth(predict)
        page.keyboard.press("Enter")
        page.locator(".jp-Notebook.jp-mod-editMode").wait_for()
        page.keyboard.press("Control+Home")
        for _ in range(line):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Shift+End")
        page.keyboard.type("my_guess = 7.0  # mine")
        page.keyboard.press("Shift+Enter")
        cell.locator(".jp-OutputArea-output", has_text="You said 7").wait_for()
        page.keyboard.press("Control+s")
        page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
        page.keyboard.press("Control+Shift+k")
        page.locator(".jp-TableOfContents-tree .jp-tocItem-content").first.wait_for()
    finally:
        _close(page, browser, lab)
    saved = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][predict]["source"]).splitlines()
    assert saved == [*lines[:line], "my_guess = 7.0  # mine", *lines[line + 1 :]]
