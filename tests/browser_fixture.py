"""Chromium without a window, driven through a pipe by its DevTools protocol: no other package."""

import base64
import json
import os
import select
import shutil
import subprocess
import time

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
CODES = {"Enter": 13, "Escape": 27, "Tab": 9, "ArrowDown": 40, "ArrowUp": 38, "ArrowRight": 39,
         "ArrowLeft": 37, "Home": 36, "End": 35}


class Browser:
    """One page; `complaints` holds what its console and the browser's log had to say."""

    def __init__(self, profile, width=1280, height=900):
        (theirs, self.to), (self.back, out) = os.pipe(), os.pipe()

        def pipes():  # the browser reads commands from 3 and answers on 4
            high = [os.dup(each) for each in (theirs, out)]
            for there, each in zip((3, 4), high):
                os.dup2(each, there)

        options = ["--headless=new", "--remote-debugging-pipe", f"--user-data-dir={profile}",
                   "--no-first-run", "--disable-gpu", "--disable-background-networking",
                   *(["--no-sandbox"] if os.geteuid() == 0 else []), "about:blank"]
        self.process = subprocess.Popen(
            [BROWSER, *options], preexec_fn=pipes, pass_fds=(3, 4), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        os.close(theirs), os.close(out)
        self.buffer, self.n, self.session, self.complaints = b"", 0, None, []
        target = next(t for t in self.do("Target.getTargets")["targetInfos"] if t["type"] == "page")
        found = self.do("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self.session = found["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.do(f"{domain}.enable")
        self.size(width, height)

    def message(self, seconds):
        """The browser's next message."""
        until = time.monotonic() + seconds
        while b"\0" not in self.buffer:
            if not select.select([self.back], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError("the browser says nothing")
            if not (read := os.read(self.back, 1 << 20)):
                raise EOFError(f"the browser ended with status {self.process.wait()}")
            self.buffer += read
        line, _, self.buffer = self.buffer.partition(b"\0")
        message = json.loads(line)
        kind, given = message.get("method"), message.get("params", {})
        if kind == "Runtime.exceptionThrown":
            self.complaints.append(given["exceptionDetails"])
        elif kind == "Log.entryAdded" and given["entry"]["level"] in ("error", "warning"):
            self.complaints.append(given["entry"])
        elif kind == "Runtime.consoleAPICalled" and given["type"] in ("error", "warning"):
            self.complaints.append(given["args"])
        return message

    def do(self, method, **given):
        self.n += 1
        command = {"id": self.n, "method": method, "params": given}
        if self.session:
            command["sessionId"] = self.session
        os.write(self.to, json.dumps(command).encode() + b"\0")
        while (message := self.message(60)).get("id") != self.n:
            pass
        assert "error" not in message, (method, message["error"])
        return message["result"]

    def js(self, expression):
        """An expression's value; a promise's is waited for."""
        found = self.do("Runtime.evaluate", expression=expression, returnByValue=True,
                        awaitPromise=True)
        assert "exceptionDetails" not in found, (expression, found["exceptionDetails"])
        return found["result"].get("value")

    def wait(self, expression, seconds=20):
        """Until an expression holds."""
        until = time.monotonic() + seconds
        while not self.js(expression):
            assert time.monotonic() < until, (expression, self.complaints)
            time.sleep(0.02)

    def open(self, path, fragment=""):
        self.do("Page.navigate", url="about:blank")
        self.do("Page.navigate", url=path.resolve().as_uri() + fragment)
        self.wait("document.readyState === 'complete'")

    def press(self, *keys):
        for key in keys:
            text = {"Enter": "\r"}.get(key, key if len(key) == 1 else "")
            named = {"key": key, "text": text, "windowsVirtualKeyCode": CODES.get(key, 0)}
            self.do("Input.dispatchKeyEvent", type="keyDown" if text else "rawKeyDown", **named)
            self.do("Input.dispatchKeyEvent", type="keyUp", key=key)

    def size(self, width, height=900, scale=1):
        self.do("Emulation.setDeviceMetricsOverride", width=width, height=height,
                deviceScaleFactor=scale, mobile=width < 600)

    def scheme(self, name):
        self.do("Emulation.setEmulatedMedia",
                features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self, path):
        path.write_bytes(base64.b64decode(self.do("Page.captureScreenshot")["data"]))

    def end(self):
        self.process.terminate()
        self.process.wait()
        os.close(self.to), os.close(self.back)
