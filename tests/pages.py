"""Pages under test: what they load, their errors and warnings, how legible and how wide they are."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.browser import Browser, find_chromium

_SECONDS = 300
"""For everything that a test does with a page; the machine may be busy."""

LEGIBILITY = """
(() => {
  const parse = text => {
    const c = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
    c.clearRect(0, 0, 1, 1); c.fillStyle = text; c.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = c.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const cache = new Map();
  const colour = text => { if (!cache.has(text)) cache.set(text, parse(text)); return cache.get(text); };
  const light = ([r, g, b]) => {
    const f = v => (v /= 255) <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    return 0.2126 * f(r) + 0.7152 * f(g) + 0.0722 * f(b);
  };
  const behind = element => {
    for (let e = element; e; e = e.parentElement) {
      const c = colour(getComputedStyle(e).backgroundColor);
      if (c[3] > 0.99) return c;
    }
    return [255, 255, 255, 1];
  };
  let worst = {ratio: 99, text: ''}, seen = 0;
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const element = node.parentElement, text = node.data.trim();
    if (!text || ['SCRIPT', 'STYLE', 'TITLE', 'OPTION'].includes(element.tagName.toUpperCase())) continue;
    if (!element.getClientRects().length) continue;
    const style = getComputedStyle(element), svg = element.closest('svg');
    const a = light(colour(svg ? style.fill : style.color)), b = light(behind(element));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (ratio < worst.ratio) worst = {ratio, text: text.slice(0, 60), tag: element.tagName};
  }
  return {...worst, seen};
})()
"""
"""The lowest contrast (WCAG 2: relative luminances) of any visible text with its background."""

OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth;
  const outside = [...document.querySelectorAll('body *')].filter(e => {
    if (e.getBoundingClientRect().right <= width + 1) return false;
    for (let p = e.parentElement; p; p = p.parentElement)
      if (['auto', 'scroll', 'hidden'].includes(getComputedStyle(p).overflowX)) return false;
    return true;
  });
  const page = document.documentElement.scrollWidth;
  return {page, window: width, outside: outside.map(e => e.outerHTML.slice(0, 80))};
})()
"""
"""Widths of page and window, and elements that overflow without their own scroll bar."""


class Page(Browser):
    """A page in a separate browser.

    `complaints` are errors and warnings of the console, exceptions, and failed loads; `requests` are all requested
    addresses.
    """

    def __init__(self, folder: Path) -> None:
        self.complaints: list[str] = []
        self.requests: list[str] = []
        super().__init__(folder, "about:blank", _SECONDS)
        for domain in ("Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.call("Emulation.setScrollbarsHidden", hidden=True)

    def open(self, file: Path) -> None:
        """Opens a file and waits until it is loaded."""
        self._seen.discard("Page.loadEventFired")
        self.call("Page.navigate", url=file.absolute().as_uri())
        while "Page.loadEventFired" not in self._seen:
            self._next()

    def window(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Sets the size of the window in CSS pixels, and the colour scheme that the user prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def screenshot(self, file: Path, whole: bool = True) -> None:
        """Writes a PNG of the whole page or of the window."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        file.write_bytes(base64.b64decode(data))

    def _next(self) -> dict[str, Any]:
        message = super()._next()
        event, about = message.get("method", ""), message.get("params", {})
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(about["exceptionDetails"]["text"])
        elif event == "Log.entryAdded" and about["entry"]["level"] in ("error", "warning"):
            self.complaints.append(about["entry"]["text"])
        elif event == "Runtime.consoleAPICalled" and about["type"] in ("error", "warning", "assert"):
            self.complaints.append(str(about["args"]))
        return message


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A page in a new headless Chromium whose profile is `folder`; skips the test if there is no Chromium."""
    if find_chromium() is None:
        pytest.skip("no Chromium on PATH (Debian: apt-get install chromium)")
    with Page(folder) as page:
        yield page
