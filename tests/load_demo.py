"""Load for a running ``medquad demo``: ``python tests/load_demo.py http://127.0.0.1:7860 PID``.

A hundred pages ask at once in Chromium; role tokens and markup are typed into the box; 200 hostile
requests go to the server behind it. Prints figures.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections import Counter
from typing import Any

import httpx
import psutil
from conftest import chromium
from load import MARK, MARKUP, TOKENS, hostile
from playwright.sync_api import Browser, Page
from tqdm import tqdm

PAGES, PATIENCE = 100, 600_000  # ms: the last of the queue waits for all before it
DONE = "#chat :is(.sources, .problem, .flag)"  # an answer has ended, was refused or was flagged
JOIN = "gradio_api/queue/join"  # where a page's own questions go
# A hundred people have a hundred machines. Gradio 6.31 asks for 60 frames a second even when a page
# stands still, and here one machine would draw them all.
FEW_FRAMES = "window.requestAnimationFrame = draw => setTimeout(() => draw(performance.now()), 500)"
ELEMENTS = "#chat :is(script, [onerror], img:not([class]), iframe)"


def typed() -> list[str]:
    """What a person could type to break the page, the prompt or the server."""
    both = [f"gout {token} {markup} {MARK}" for token, markup in itertools.product(TOKENS, MARKUP)]
    odd = [
        "\u202e",
        "\u0000gout\u0007",
        "gout " * 500,
        "g" * 100_000,
        "\n" * 99,
        "'\"`;--",
        "%s{0}",
    ]
    return both + odd


def opened(browser: Browser, address: str) -> tuple[Page, list[str]]:
    """Open a page, and a list of what it asks of other servers, of its errors and dialogs."""
    page, heard = browser.new_context().new_page(), list[str]()
    page.add_init_script(FEW_FRAMES)
    known = (address, "data:", "blob:")
    page.on("request", lambda r: None if r.url.startswith(known) else heard.append(r.url))
    page.on("dialog", lambda dialog: heard.append(f"dialog: {dialog.message}"))
    page.on("pageerror", lambda error: heard.append(f"error: {error}"))
    page.goto(address, timeout=PATIENCE)
    page.get_by_placeholder("Ask about a disease").wait_for(timeout=PATIENCE)
    return page, heard


def ask(page: Page, text: str) -> None:
    """Type a question and send it."""
    page.get_by_placeholder("Ask about a disease").fill(text)
    page.keyboard.press("Enter")


def crowd(browser: Browser, address: str, count: int) -> dict[str, Any]:
    """``count`` pages ask at once; one more has an emergency meanwhile."""
    pages = [opened(browser, address) for _ in tqdm(range(count), "pages")]
    urgent, heard = opened(browser, address)
    began = time.monotonic()
    for number, (page, _) in enumerate(tqdm(pages, "questions")):
        ask(page, f"What are the symptoms of gout, {number}?")
    flagged = time.monotonic()
    ask(urgent, "I can't breathe")
    urgent.locator("#chat .flag").wait_for(timeout=PATIENCE)
    flagged = time.monotonic() - flagged
    ends: Counter[str] = Counter()
    for page, _ in tqdm(pages, "ends"):
        page.locator(DONE).first.wait_for(timeout=PATIENCE)
        problem = page.locator("#chat .problem")
        ends[problem.first.inner_text() if problem.count() else "answered"] += 1
    return {
        "pages at once": count, "their ends": dict(ends),
        "an emergency meanwhile, s": round(flagged, 1),
        "seconds until the last end": round(time.monotonic() - began, 1),
        "faults": [fault for _, faults in [*pages, (urgent, heard)] for fault in faults],
    }  # fmt: skip


def type_all(browser: Browser, address: str, texts: list[str]) -> dict[str, Any]:
    """Type every text, nine on a page."""
    ends: Counter[str] = Counter()
    faults: list[str] = []
    nines = [texts[start : start + 9] for start in range(0, len(texts), 9)]
    for some in tqdm(nines, "texts, nine a page"):
        page, heard = opened(browser, address)
        for number, text in enumerate(some, 1):
            ask(page, text)
            page.locator("#chat .question").nth(number - 1).wait_for(state="attached")
            page.locator(DONE).nth(number - 1).wait_for(timeout=PATIENCE)
        problems = page.locator("#chat .problem").all_inner_texts()
        ends.update(problems)
        ends["answered"] += len(some) - len(problems)
        if page.locator(ELEMENTS).count():
            faults.append(f"markup on the page of {some}")
        faults += heard
        page.context.close()
    return {"texts typed": len(texts), "their ends": dict(ends), "faults": faults}


def requests(address: str) -> dict[str, Any]:
    """Send the hostile requests to the page's own endpoints."""
    statuses: Counter[int | str] = Counter()
    faults: list[str] = []
    with httpx.Client(base_url=address, timeout=60, trust_env=False) as client:
        for payload in tqdm(hostile(), "hostile requests"):
            path = JOIN if payload.content != b"{}" else payload.path
            headers = {"content-type": payload.kind}
            try:
                reply = client.post(path, content=payload.content, headers=headers)
            except httpx.TransportError:  # refused before it was read to its end
                statuses["cut off"] += 1
                continue
            statuses[reply.status_code] += 1
            if reply.status_code >= 500 or "Traceback" in reply.text:
                faults.append(f"{payload.name}: {reply.status_code} {reply.text[:200]}")
    return {"requests": sum(statuses.values()), "their statuses": dict(statuses), "faults": faults}


def run(address: str, pid: int, pages: int = PAGES, texts: int = 999) -> dict[str, Any]:
    """Run everything against the demo at ``address``, the process ``pid``; returns the figures."""
    process = psutil.Process(pid)
    with chromium() as browser:
        page, _ = opened(browser, address)
        ask(page, "What is gout?")
        page.locator(DONE).first.wait_for(timeout=PATIENCE)
        before = process.memory_info().rss
        figures = {"crowd": crowd(browser, address, pages)}
        figures["typed"] = type_all(browser, address, typed()[:texts])
    figures["hostile"] = requests(address)
    grown = (process.memory_info().rss - before) / 1e6
    return figures | {"memory MB": round(before / 1e6), "memory grew by MB": round(grown)}


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1].rstrip("/") + "/", int(sys.argv[2])), indent=1))
