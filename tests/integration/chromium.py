"""A headless Chromium that is driven through the DevTools protocol, over pipes: no driver, no port, no dependency.

Protocol: https://chromedevtools.github.io/devtools-protocol/. With `--remote-debugging-pipe` the browser reads messages
from descriptor 3 and writes them to descriptor 4, each as JSON that a zero byte ends.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")

OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--disable-extensions",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--remote-debugging-pipe",
)  # fmt: skip

LONGEST = 60.0
"""Seconds that the browser has for an answer, on a machine that is busy with other tests."""


def find_browser() -> str:
    """Return the path of an installed browser."""
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    assert found, f"no browser to look at pages with ({', '.join(BROWSERS)}): apt-get install chromium"
    return found


class Page:
    """A page in the browser, and everything that it reported: requests, errors and lines of its console."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing = reading, writing
        self._rest = b""
        self._number = 0
        self._session: dict[str, str] = {}
        self.requests: list[str] = []
        """The addresses that were asked for."""
        self.problems: list[str] = []
        """Uncaught errors, and lines that the browser or the page wrote to the console."""
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command, and return its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._writing, json.dumps(message).encode() + b"\0")
        while (reply := self._next()).get("id") != self._number:
            self._note(reply)
        assert "error" not in reply, f"{method}: {reply['error']}"
        result: dict[str, Any] = reply["result"]
        return result

    def open(self, address: str, width: int = 1280, height: int = 800) -> None:
        """Show an address in a window of this size, and wait until it is loaded."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.send("Page.navigate", url=address)
        self.wait_for("document.readyState == 'complete' && location.href != 'about:blank'")

    def run(self, script: str) -> Any:
        """Return the value of a script in the page."""
        done = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done["exceptionDetails"]
        return done["result"].get("value")

    def wait_for(self, script: str) -> None:
        """Wait until a script's value is true."""
        start = time.monotonic()
        while not self.run(script):
            assert time.monotonic() - start < LONGEST, f"never true: {script}"
            time.sleep(0.05)

    def write(self, text: str) -> None:
        """Type text where the cursor is."""
        self.send("Input.insertText", text=text)

    def press_enter(self, *, shift: bool = False) -> None:
        """Press Enter, or Shift and Enter."""
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r", "modifiers": 8 * shift}
        self.send("Input.dispatchKeyEvent", type="keyDown", **key)
        self.send("Input.dispatchKeyEvent", type="keyUp", **{**key, "text": ""})

    def save_picture(self, file: Path) -> None:
        """Write a PNG of the page."""
        file.write_bytes(base64.b64decode(self.send("Page.captureScreenshot", format="png")["data"]))

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._reading], [], [], LONGEST)
            assert ready, "the browser does not answer"
            part = os.read(self._reading, 2**16)
            assert part, "the browser has ended"
            self._rest += part
        message, _, self._rest = self._rest.partition(b"\0")
        value: dict[str, Any] = json.loads(message)
        return value

    def _note(self, event: dict[str, Any]) -> None:
        said = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests.append(said["request"]["url"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.problems.append(str(said["exceptionDetails"]))
        elif event.get("method") == "Runtime.consoleAPICalled":
            self.problems.append(str(said["args"]))
        elif event.get("method") == "Log.entryAdded":
            self.problems.append(f"{said['entry']['level']}: {said['entry']['text']} ({said['entry'].get('url')})")


def _pipe() -> tuple[int, int]:
    """Return the ends of a pipe, to read and to write. Their numbers are not those that the browser gets."""
    ends = os.pipe()
    reading, writing = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in ends)
    for end in ends:
        os.close(end)
    return reading, writing


@contextmanager
def open_page(folder: Path) -> Iterator[Page]:
    """Start a browser with an empty profile in `folder`, and open a page in it, while the block lasts."""
    command, answer = _pipe(), _pipe()
    arguments = [find_browser(), *OPTIONS, f"--user-data-dir={folder / 'profile'}"]
    quiet = os.open(os.devnull, os.O_WRONLY)
    process = os.posix_spawn(
        arguments[0], arguments, os.environ, setsid=True,
        file_actions=[
            (os.POSIX_SPAWN_DUP2, command[0], 3), (os.POSIX_SPAWN_DUP2, answer[1], 4),
            (os.POSIX_SPAWN_DUP2, quiet, 1), (os.POSIX_SPAWN_DUP2, quiet, 2),
        ],
    )  # fmt: skip
    for end in (command[0], answer[1], quiet):
        os.close(end)
    try:
        yield Page(answer[0], command[1])
    finally:
        # With all the processes that it has started, which are in one session.
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
        os.close(answer[0])
        os.close(command[1])
