"""A real browser without a window, driven over the DevTools protocol; used by tests of the page."""

from __future__ import annotations

import asyncio
import base64
import itertools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

START_SECONDS = 60
ANSWER_SECONDS = 60
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it has none to offer inside most containers
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-extensions",
    "--hide-scrollbars",
    "--remote-debugging-port=0",
)


def find_browser() -> str | None:
    """The browser to test with: `$ENTROPI_BROWSER`, or the first that is installed; None if there is none."""
    return os.environ.get("ENTROPI_BROWSER") or next((path for name in NAMES if (path := shutil.which(name))), None)


class Tab:
    """One page in the browser: what it asked of the network, and what it complained about."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._loaded = asyncio.Event()
        self.requests: list[str] = []
        self.complaints: list[str] = []

    async def listen(self) -> None:
        """Sort what the browser says until it goes."""
        async for message in self._socket:
            said = message.json()
            parameters = said.get("params", {})
            if "id" in said:
                self._answers.pop(said["id"]).set_result(said)
            elif said["method"] == "Network.requestWillBeSent":
                self.requests.append(parameters["request"]["url"])
            elif said["method"] == "Runtime.exceptionThrown":
                self.complaints.append(str(parameters["exceptionDetails"]))
            elif said["method"] == "Log.entryAdded" and parameters["entry"]["level"] in ("error", "warning"):
                self.complaints.append(parameters["entry"]["text"])
            elif said["method"] == "Runtime.consoleAPICalled":
                self.complaints.append(str(parameters["args"]))
            elif said["method"] == "Page.javascriptDialogOpening":
                self.complaints.append(f"dialog: {parameters['message']}")
                await self._socket.send_json({"id": 0, "method": "Page.handleJavaScriptDialog"})
            elif said["method"] == "Page.loadEventFired":
                self._loaded.set()

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One command of the protocol; its result."""
        number = next(self._numbers)
        self._answers[number] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        said = await asyncio.wait_for(self._answers[number], ANSWER_SECONDS)
        assert "error" not in said, f"{method}: {said['error']}"
        return dict(said["result"])

    async def open(self, page: Path) -> None:
        """Load a file; requests and complaints are counted from here."""
        self.requests.clear()
        self.complaints.clear()
        self._loaded.clear()
        await self.call("Page.navigate", url=page.resolve().as_uri())
        await asyncio.wait_for(self._loaded.wait(), ANSWER_SECONDS)

    async def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression in the page; not subject to the page's own policy."""
        result = await self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    async def look(self, width: int, height: int = 900, dark: bool = False) -> None:
        """Give the window a size and the user a preference."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def hover(self, selector: str) -> None:
        """Move the mouse over the middle of an element, scrolling there first."""
        box = await self.evaluate(
            f"(async () => {{ const e = document.querySelector({selector!r}); e.scrollIntoView({{block: 'center'}});"
            " for (let i = 0; i < 3; i++) await new Promise(requestAnimationFrame);"  # until the page knows it scrolled
            " const b = e.getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        await self.call("Input.dispatchMouseEvent", type="mouseMoved", x=box[0], y=box[1])

    async def press(self, key: str) -> None:
        """Press and let go of a key that writes nothing, such as ArrowLeft."""
        code = {"End": 35, "Home": 36, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40, "Escape": 27}
        for kind in ("rawKeyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code.get(key, 9)
            )

    async def screenshot(self, path: Path, whole: bool = True) -> Path:
        """Write what is seen as a PNG file: all of the page, or what the window shows."""
        taken = await self.call("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))
        return path


@asynccontextmanager
async def browser_tab(browser: str) -> AsyncIterator[Tab]:
    """A tab of a browser started for it, with a profile of its own; both are gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="entropi-browser-", ignore_cleanup_errors=True) as profile:
        with open(Path(profile) / "log", "wb") as log:
            process = subprocess.Popen(
                [browser, *FLAGS, f"--user-data-dir={profile}/user", "about:blank"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            address = await _address(process, Path(profile) / "log")
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://{address}/json/list") as answer:
                    pages = [page for page in await answer.json() if page["type"] == "page"]
                async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                    tab = Tab(socket)
                    listening = asyncio.create_task(tab.listen())
                    try:
                        for domain in ("Page", "Runtime", "Log", "Network", "DOM", "Accessibility"):
                            await tab.call(f"{domain}.enable")
                        yield tab
                    finally:
                        listening.cancel()
                        with suppress(asyncio.CancelledError):
                            await listening
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    """HOST:PORT of the DevTools, which the browser writes to its log."""
    for _ in range(10 * START_SECONDS):
        text = log.read_text(encoding="utf-8", errors="replace")
        if match := re.search(r"DevTools listening on ws://([^/]+)/", text):
            return match[1]
        if process.poll() is not None:
            break
        await asyncio.sleep(0.1)
    raise RuntimeError(f"the browser did not start: {text[-500:]}")
