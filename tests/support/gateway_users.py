"""A gateway in a process of its own, and what a user does on its page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.support.server_process import ServerProcess

if TYPE_CHECKING:
    from tests.support.chromium import Page


class GatewayProcess(ServerProcess):
    """``splitbundle gateway`` in a process of its own."""

    command = "gateway"


def load(page: Page) -> None:
    """Load the model that the page shows."""
    page.click("#to-text")
    page.wait("!document.getElementById('load').disabled")
    page.click("#load")
    page.wait("!document.getElementById('composer-panel').hidden || document.querySelector('#load-state .problems')")
    assert page.text("#load-state .problems") == ""


def make_text(page: Page, prompt: str, number: int) -> str:
    """Write a prompt, send it, and return what the model made of at most so many tokens."""
    before = page.run("document.querySelectorAll('.turn').length")
    page.run(f"document.getElementById('most').value = {number}")
    page.run("document.getElementById('prompt').focus()")
    page.type(prompt)
    page.click("#send")
    page.wait(f"document.querySelectorAll('.turn[data-ended]').length > {before}")
    return str(page.run("[...document.querySelectorAll('.answer')].at(-1).textContent"))


def greedy(pipeline: Any, prompt: Sequence[int], number: int, stop_ids: Sequence[int]) -> list[int]:
    """Return the likeliest tokens after a prompt, without the one that ends the text."""
    import torch

    steps = pipeline.generate(torch.tensor([list(prompt)]), max_new_tokens=number, stop_ids=stop_ids)
    made = [int(step[0]) for step in steps]
    return made[:-1] if made and made[-1] in stop_ids else made
