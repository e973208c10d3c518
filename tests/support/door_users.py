"""Users of an HTTP server for tests: many at once, some of whom hang up, read slowly, or cancel."""

from __future__ import annotations

import http.client
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any, Final

START: Final = 120.0
"""The seconds in which a server starts, on a busy machine."""


class DoorProcess:
    """``splitbundle serve`` in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "splitbundle", "serve", *map(str, arguments), "--json"]
        command += ["--listen", "127.0.0.1:0"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        line: list[str] = []
        reader = threading.Thread(target=lambda: line.append(self.process.stdout.readline()))  # type: ignore[union-attr]
        reader.start()
        reader.join(START)
        if not line or not line[0].strip():
            self.process.kill()
            raise RuntimeError(f"the server didn't start: {self.process.communicate()[1]}")
        self.facts: dict[str, Any] = json.loads(line[0])
        if not self.facts["ok"]:
            self.process.wait()
            raise RuntimeError(f"the server didn't start: {self.facts}")
        self.url: str = self.facts["url"]
        self.port = int(self.url.rpartition(":")[2])

    @property
    def held(self) -> dict[str, int]:
        """Return what the process holds: file descriptors, threads, and memory in KiB."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("utf-8")
        values = dict(line.split(":", 1) for line in status.splitlines())
        descriptors = len(os.listdir(f"/proc/{self.process.pid}/fd"))
        return {
            "descriptors": descriptors,
            "threads": int(values["Threads"]),
            "memory": int(values["VmRSS"].split()[0]),
        }

    def end(self) -> int:
        """End the process as a system does, and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.communicate()
        return self.process.returncode

    def __enter__(self) -> DoorProcess:
        return self

    def __exit__(self, *error: object) -> None:
        self.end()


def get(port: int, path: str) -> tuple[int, bytes]:
    """Return the status and the body of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", path)
    answer = connection.getresponse()
    found = answer.status, answer.read()
    connection.close()
    return found


class Users:
    """Users who ask until a time is over. ``results`` counts what they saw."""

    def __init__(self, port: int, prompts: list[str], number: int, seconds: float) -> None:
        self.results: Counter[str] = Counter()
        self.first_tokens: list[float] = []
        self.wrong: list[str] = []
        self._port, self._prompts = port, prompts
        self._texts: dict[str, str] = {}
        self._lock = threading.Lock()
        self._until = time.monotonic() + seconds
        threads = [threading.Thread(target=self._use, args=(i,)) for i in range(number)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _use(self, number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < self._until:
            kind = draw.choice(("whole", "stream", "stream", "hang-up", "slow", "cancel", "early"))
            try:
                result = self._ask(kind, draw)
            except Exception as error:  # noqa: BLE001  # it is a result, too
                result = f"{kind}: {type(error).__name__}: {error}"
            with self._lock:
                self.results[result] += 1
            if result.endswith("429"):
                time.sleep(draw.uniform(0.1, 0.5))

    def _ask(self, kind: str, draw: random.Random) -> str:
        prompt, tokens = draw.choice(self._prompts), draw.choice((1, 8, 24))
        body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": kind != "whole"}
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=120)
        try:
            began = time.monotonic()
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            if kind == "early":  # it goes away before there is an answer
                time.sleep(draw.uniform(0, 0.05))
                return "early"
            answer = connection.getresponse()
            if answer.status != 200:
                return f"{answer.status}"
            if kind == "whole":
                return self._compared(prompt, tokens, json.loads(answer.read())["choices"][0]["text"], "whole")
            text = ""
            for number, line in enumerate(answer):
                if line.startswith(b"data: {"):
                    chunk = json.loads(line[6:])
                    if "error" in chunk:
                        return f"{kind}: {chunk['error']['code']}"
                    text += chunk["choices"][0]["text"]
                    if number == 0:
                        with self._lock:
                            self.first_tokens.append(time.monotonic() - began)
                if kind == "hang-up" and number > draw.randint(0, 8):
                    return "hang-up"
                if kind == "cancel":
                    return "cancel"
                if kind == "slow":
                    time.sleep(0.05)
            return self._compared(prompt, tokens, text, kind)
        finally:
            connection.close()

    def _compared(self, prompt: str, tokens: int, text: str, kind: str) -> str:
        with self._lock:
            known = self._texts.setdefault(f"{tokens} {prompt}", text)
            if known != text:
                self.wrong.append(f"{prompt!a}, {tokens} tokens: {text!a}, and {known!a} before")
        return kind
