"""Drives Debian's chromium, without a window, over its DevTools protocol.

The protocol goes through two pipes (``--remote-debugging-pipe``): messages are JSON, and each ends with a zero byte. So
this needs no library, and no port is open.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from typing_extensions import Self

PATH: Final = shutil.which("chromium")
"""Where chromium is, or None."""
PATIENCE: Final = 120.0
"""The seconds after which a step counts as hanging."""
_OPTIONS: Final = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--remote-debugging-pipe",
)
_CHILD: Final = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)
"""chromium reads commands from descriptor 3, and writes to 4."""
_KEYS: Final = {"Enter": (13, "\r"), "Escape": (27, ""), "Tab": (9, ""), "ArrowDown": (40, "")}
_SHIFT: Final = 8


class Chromium:
    """A browser with an empty profile. It is a context manager."""

    def __init__(self) -> None:
        self._answers: dict[int, dict[str, Any]] = {}
        self._pages: dict[str, Page] = {}
        self._changed = threading.Condition()
        self._number, self._ended = 0, False

    def __enter__(self) -> Self:
        assert PATH is not None
        self._profile = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        ends = (*os.pipe(), *os.pipe())
        theirs_in, ours_out, ours_in, theirs_out = (fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 10) for each in ends)
        for each in ends:
            os.close(each)  # one of them could be 3 or 4
        command = [PATH, *_OPTIONS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _CHILD, str(theirs_in), str(theirs_out), *command],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out = os.fdopen(ours_out, "wb", buffering=0)
        self._reader = threading.Thread(target=self._read, args=(ours_in,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._ended:
            self.call("Browser.close")
        try:
            self._process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._out.close()
        self._profile.cleanup()

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, "rb", buffering=0) as pipe:
            rest = b""
            while data := pipe.read(2**16):
                *messages, rest = (rest + data).split(b"\0")
                for message in map(json.loads, messages):
                    with self._changed:
                        if "id" in message:
                            self._answers[message["id"]] = message
                        elif message.get("sessionId") in self._pages:
                            self._pages[message["sessionId"]].hear(message["method"], message["params"])
                        self._changed.notify_all()
        with self._changed:
            self._ended = True
            self._changed.notify_all()

    def call(self, method: str, session: str | None = None, **parameters: Any) -> Any:
        """Send a command, and return its result."""
        with self._changed:
            self._number += 1
            number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self._out.write(json.dumps(message).encode() + b"\0")
        with self._changed:
            assert self._changed.wait_for(lambda: number in self._answers or self._ended, PATIENCE), method
            assert number in self._answers, "chromium ended"
            answer = self._answers.pop(number)
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]

    def page(self, url: str, *, width: int = 1200, height: int = 800, dark: bool = False) -> Page:
        """Open a page in a tab of its own, with a session storage of its own."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session, target)
        with self._changed:
            self._pages[session] = page
        for domain in ("Page", "Runtime", "Log"):
            page.call(f"{domain}.enable")
        page.call("Page.setLifecycleEventsEnabled", enabled=True)
        page.resize(width, height)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        page.call("Emulation.setEmulatedMedia", features=[scheme])
        page.go(url)
        return page

    def wait_for(self, page: Page, document: str) -> None:
        """Wait until a document of a page is loaded, by its id."""
        with self._changed:
            assert self._changed.wait_for(lambda: document in page.loaded or self._ended, PATIENCE), "it never loads"


class Page:
    """A tab.

    Attributes:
        problems: errors of JavaScript and violations of the content policy, as texts.
        console: what scripts wrote to the console.
        loaded: the ids of the documents that were loaded whole.
        requested: the URLs that it asked for, from ``call("Network.enable")`` on.
    """

    def __init__(self, browser: Chromium, session: str, target: str) -> None:
        self._browser, self._session, self._target = browser, session, target
        self.problems: list[str] = []
        self.console: list[str] = []
        self.loaded: set[str] = set()
        self.requested: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._browser.call("Target.closeTarget", targetId=self._target)

    def hear(self, method: str, told: dict[str, Any]) -> None:
        """Take an event."""
        if method == "Runtime.exceptionThrown":
            details = told["exceptionDetails"]
            self.problems.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Log.entryAdded" and told["entry"]["source"] != "network":  # the page shows those itself
            self.problems.append(told["entry"]["text"])
        elif method == "Page.lifecycleEvent" and told["name"] == "load":
            self.loaded.add(told["loaderId"])
        elif method == "Network.requestWillBeSent":
            self.requested.append(told["request"]["url"])
        elif method == "Runtime.consoleAPICalled":
            self.console.append(" ".join(str(each.get("value")) for each in told["args"]))

    def call(self, method: str, **parameters: Any) -> Any:
        """Send a command to the tab, and return its result."""
        return self._browser.call(method, self._session, **parameters)

    def go(self, url: str) -> None:
        """Load a page, or the same one again."""
        self._browser.wait_for(self, self.call("Page.navigate", url=url)["loaderId"])

    def resize(self, width: int, height: int) -> None:
        """Set the size of the window, in CSS pixels. Below 600 the tab is a phone's."""
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )

    def run(self, code: str) -> Any:
        """Return the value of an expression of JavaScript. A promise is awaited."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, code: str) -> None:
        """Wait until an expression of JavaScript is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.run(f"Boolean({code})"):
            if time.monotonic() > deadline:
                shown = self.run("document.body.innerText")
                raise AssertionError(f"{code} never came true. Problems: {self.problems}. The page shows:\n{shown}")
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        """Return the text that an element shows. Of several, it is the last."""
        return str(self.run(f"[...document.querySelectorAll({json.dumps(selector)})].at(-1)?.innerText ?? ''"))

    def click(self, selector: str, text: str = "") -> None:
        """Click on an element. Of several that have the text, it is the last."""
        wanted = f"[...document.querySelectorAll({json.dumps(selector)})]"
        wanted += f".filter((each) => each.checkVisibility() && each.textContent.includes({json.dumps(text)})).at(-1)"
        self.wait(wanted)
        place = self.run(
            f"""(async () => {{
                const it = {wanted};
                it.scrollIntoView({{ block: 'center', behavior: 'instant' }});
                for (let before = null; ; ) {{
                    const {{ x, y, width, height }} = it.getBoundingClientRect();
                    const now = [x + width / 2, y + height / 2];
                    if (before && String(now) === String(before)) return now; // it stands still
                    before = now;
                    await new Promise(requestAnimationFrame);
                }}
            }})()"""
        )
        for kind in ("mousePressed", "mouseReleased"):
            self.call("Input.dispatchMouseEvent", type=kind, x=place[0], y=place[1], button="left", clickCount=1)

    def type(self, text: str) -> None:
        """Write a text where the focus is."""
        self.call("Input.insertText", text=text)

    def press(self, key: str, *, shift: bool = False) -> None:
        """Press a key where the focus is."""
        code, text = _KEYS[key]
        common: dict[str, Any] = {"key": key, "code": key, "windowsVirtualKeyCode": code, "modifiers": _SHIFT * shift}
        self.call("Input.dispatchKeyEvent", type="keyDown", **common, **({"text": text} if text else {}))
        self.call("Input.dispatchKeyEvent", type="keyUp", **common)

    def downloads_to(self, directory: Path) -> None:
        """Let files that the browser saves go to a directory."""
        self._browser.call("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(directory))

    def screenshot(self, path: Path, *, whole: bool = False) -> None:
        """Save a picture of the window, or of the whole page."""
        data = self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))
