"""A headless Chromium that tests drive over a pipe with its DevTools protocol; no driver and no web socket needed."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

SWITCHES = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)

START = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
os.dup2(pipes[0], 3), os.dup2(pipes[1], 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Moves the two pipes to where the browser expects them, commands at 3 and answers at 4, and becomes the browser."""


def find_chromium() -> str | None:
    """Path of a Chromium or Chrome on this machine."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return next((path for name in names if (path := shutil.which(name))), None)


class Browser:
    """One page in a separate browser, which ends with the `with` block.

    Args:
        folder: an empty folder for the browser's profile.
        url: what to open.
        timeout: seconds that everything may take in total.
    """

    def __init__(self, folder: Path, url: str, timeout: float) -> None:
        chromium = find_chromium()
        assert chromium is not None
        self.deadline = time.monotonic() + timeout
        self._numbers = itertools.count(1)
        self._session: str | None = None
        self._read, theirs_out = os.pipe()
        theirs_in, self._write = os.pipe()
        command = [sys.executable, "-c", START, str(theirs_in), str(theirs_out), chromium, *SWITCHES]
        self.process = subprocess.Popen(
            [*command, f"--user-data-dir={folder}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        os.set_blocking(self._read, False)
        self._unread = b""
        self._seen: set[str] = set()
        try:
            self._open(url)
        except BaseException:
            self.close()
            raise

    def _open(self, url: str) -> None:
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("Page.navigate", url=url)
        while "Page.loadEventFired" not in self._seen:
            self._next()

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the browser and the processes that it started."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._read)
        os.close(self._write)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol, and its result."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != number:
            pass  # an event
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression in the page."""
        result = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Asks until the expression is true; returns its value."""
        while not (value := self.evaluate(script)):
            time.sleep(0.05)
            self._check_time(script)
        return value

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            try:
                part = os.read(self._read, 1 << 20)
                assert part, "the browser has ended"
                self._unread += part
            except BlockingIOError:
                time.sleep(0.01)
                self._check_time("an answer")
        message, _, self._unread = self._unread.partition(b"\0")
        parsed: dict[str, Any] = json.loads(message)
        self._seen.add(parsed.get("method", ""))
        return parsed

    def _check_time(self, what: str) -> None:
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"The browser took too long for {what}.")
