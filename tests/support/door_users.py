"""Users of an HTTP server for tests: many at once, some of whom hang up, read slowly, or cancel."""

from __future__ import annotations

import http.client
import json
import random
import threading
import time
from collections import Counter

from tests.support.server_process import ServerProcess


class DoorProcess(ServerProcess):
    """``splitbundle serve`` in a process of its own."""

    command = "serve"


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
