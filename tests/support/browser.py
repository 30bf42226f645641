"""A headless Chromium, by its debugging protocol: what a page shows, asks for and complains of."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from serving import LoopThread, loop_thread

__all__ = ["Page", "browser", "chromium"]

_POLL_S = 0.05
_PATIENCE_S = 30.0


def chromium() -> str | None:
    """The program, if this machine has one."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")


class Page:
    """One tab.

    Attributes:
        requests: addresses of everything that was asked for.
        complaints: what the console and the page's code complained of.
        dialogs: messages of ``alert`` and the like.
    """

    def __init__(self, thread: LoopThread, address: str) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.dialogs: list[str] = []
        self._first = ""
        self._thread = thread
        self._numbers = itertools.count(1)
        self._answers: dict[int, Any] = {}
        self._socket: aiohttp.ClientWebSocketResponse = thread.run(self._connect(address))
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self._do(f"{domain}.enable")

    async def _connect(self, address: str) -> aiohttp.ClientWebSocketResponse:
        self._session = aiohttp.ClientSession()
        return await self._session.ws_connect(address, max_msg_size=0)

    async def _ask(self, method: str, parameters: dict[str, Any]) -> Any:  # noqa: ANN401 - any JSON
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": parameters})
        while True:
            message = await self._socket.receive_json()
            if message.get("id") == number:
                return message
            self._note(message.get("method", ""), message.get("params", {}))

    def _note(self, event: str, about: dict[str, Any]) -> None:
        if event == "Network.requestWillBeSent":
            self.requests.append(about["request"]["url"])
        elif event == "Runtime.exceptionThrown":
            self.complaints.append(json.dumps(about["exceptionDetails"]))
        elif event in ("Runtime.consoleAPICalled", "Log.entryAdded"):
            self.complaints.append(json.dumps(about))
        elif event == "Page.javascriptDialogOpening":
            self.dialogs.append(about["message"])

    def _do(self, method: str, **parameters: object) -> Any:  # noqa: ANN401 - any JSON
        answer = self._thread.run(self._ask(method, parameters))
        assert "error" not in answer, answer
        return answer["result"]

    def begin(self, script: str) -> None:
        """Forget everything; the pages that follow begin with a script."""
        self._do("Page.navigate", url="about:blank")
        if self._first:
            self._do("Page.removeScriptToEvaluateOnNewDocument", identifier=self._first)
        added = self._do("Page.addScriptToEvaluateOnNewDocument", source=script)
        self._first = added["identifier"]
        for noted in (self.requests, self.complaints, self.dialogs):
            noted.clear()

    def open(self, url: str) -> None:
        """Go there."""
        self._do("Page.navigate", url=url)

    def value(self, expression: str) -> Any:  # noqa: ANN401 - any JSON
        """What an expression gives in the page."""
        found = self._do(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait_for(self, expression: str) -> None:
        """Until it is true."""
        give_up_at = time.monotonic() + _PATIENCE_S
        while not self.value(expression):
            assert time.monotonic() < give_up_at, (expression, self.text(), self.complaints)
            time.sleep(_POLL_S)

    def text(self, selector: str = "body") -> str:
        """What somebody reads there."""
        return str(self.value(f"document.querySelector({json.dumps(selector)}).innerText"))

    def accessible(self) -> list[dict[str, str]]:
        """Role and name of everything that assistive technology is told of."""
        nodes = self._do("Accessibility.getFullAXTree")["nodes"]
        return [
            {key: str(node.get(key, {}).get("value", "")) for key in ("role", "name")}
            for node in nodes
            if not node["ignored"]
        ]

    def look_like(self, *, width: int = 1240, height: int = 900, dark: bool = False) -> None:
        """On a screen of this size, and in a theme."""
        self._do(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self._do("Emulation.setEmulatedMedia", features=[theme])

    def shoot(self, file: Path, *, whole: bool = True) -> None:
        """A picture of the page."""
        shot = self._do("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """Leave."""
        self._thread.run(self._session.close())


@contextlib.contextmanager
def browser(folder: Path) -> Iterator[Page]:
    """A new browser that has nothing of anybody's, with one tab."""
    program = chromium()
    assert program, "expected chromium"
    log = folder / "chromium.log"
    arguments = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    arguments += [
        "--hide-scrollbars",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-extensions",
    ]
    arguments += ["--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, *arguments, "about:blank"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"HOME": str(folder)},
        )
    try:
        with loop_thread() as thread:
            page = Page(thread, thread.run(_address(_port(folder, process, log))))
            try:
                yield page
            finally:
                page.close()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _port(folder: Path, process: subprocess.Popen[bytes], log: Path) -> str:
    file = folder / "profile" / "DevToolsActivePort"
    give_up_at = time.monotonic() + _PATIENCE_S
    while not (file.exists() and "\n" in file.read_text("utf-8")):
        assert process.poll() is None, log.read_text("utf-8")[-2000:]
        assert time.monotonic() < give_up_at, log.read_text("utf-8")[-2000:]
        time.sleep(_POLL_S)
    return file.read_text("utf-8").splitlines()[0]


async def _address(port: str) -> str:
    async with (
        aiohttp.ClientSession() as session,
        session.get(f"http://127.0.0.1:{port}/json/list") as answer,
    ):
        tabs = await answer.json()
    return str(next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page"))
