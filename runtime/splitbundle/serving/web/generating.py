"""From the threads that make texts to the event loop that sends them. A client that goes away stops its texts."""

from __future__ import annotations

import asyncio
import functools
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from splitbundle.serving.web.choices import Chance, Choice, Part
from splitbundle.serving.web.errors import invalid, unsupported
from splitbundle.serving.web.models import Model
from splitbundle.serving.web.requests import Request
from splitbundle.stages.scoring import scored
from splitbundle.stages.shared_pipeline import SharedPipeline
from splitbundle.stages.text_generation import context_of

THREADS: Final = 512
"""The texts that can be made or wait at once. A shared pipeline refuses before that."""
_END: Final = object()


class Job:
    """The choices of one request. Threads make them, and an event loop reads their parts."""

    def __init__(self, model: Model, pipeline: SharedPipeline, request: Request, client: str) -> None:
        self.model, self.request = model, request
        self._pipeline = pipeline.of(client)
        self.tokenizer = pipeline.tokenizer()
        self.choices: list[Choice] = []
        self.echoes: list[Part] = []
        self.first_token: float | None = None
        self.last_token: float | None = None
        self._cancelled = threading.Event()
        self._scores: dict[tuple[int, ...], tuple[Chance, ...]] = {}

    def begin(self) -> None:
        """Read the prompts, and begin to continue them.

        Raises:
            BundleError: ``input.*``, ``text.*``, ``server.full``.
        """
        request = self.request
        self._check_size()
        try:
            for number, prompt in enumerate(request.prompts):
                for copy in range(request.number):
                    if self._cancelled.is_set():
                        return
                    index = number * request.number + copy
                    self.choices.append(Choice(index, request, self.tokenizer, self._begin(prompt, copy)))
        except BaseException:
            self.cancel()
            raise
        if self._cancelled.is_set():  # while the last one was begun
            self.cancel()
        elif request.echo:
            self.echoes = [self._echo(choice) for choice in self.choices]

    def _check_size(self) -> None:
        """Refuse what can't fit before anything is computed for it.

        Raises:
            RequestError: for more choices than one client may have at once, or a text that is longer than the longest
                tokens could make the context.
        """
        request, most = self.request, getattr(self._pipeline, "most_texts", None)
        if most is not None and len(request.prompts) * request.number > most:
            got = f"{len(request.prompts)} prompts with {request.number} choices each"
            raise invalid("n", f"at most {most} texts in a request", got)
        context = context_of(self._pipeline)
        if context is None:
            return
        longest = context * self.tokenizer.longest_token
        for prompt in request.prompts:
            texts = [prompt] if isinstance(prompt, str) else []
            if request.is_chat:
                texts = [each["content"] for each in prompt if isinstance(each.get("content"), str)]
            if sum(map(len, texts)) > longest:
                name = "messages" if request.is_chat else "prompt"
                raise invalid(name, f"at most {context} tokens, the model's context", "a much longer text")

    def _begin(self, prompt: Any, copy: int) -> Any:
        request = self.request
        chat: dict[str, Any] = {}
        if request.is_chat:
            chat = {"tools": request.tools, "template_variables": request.template_variables}
        # Choices of one prompt must differ, and each must be the same again.
        seed = None if request.seed is None else request.seed + copy
        return self._pipeline.stream_text(
            prompt,
            max_new_tokens=request.max_tokens,
            stop=request.stop,
            stop_ids=request.stop_ids,
            logprobs=request.logprobs,
            seed=seed,
            **chat,
            **request.sampling,
        )

    def _echo(self, choice: Choice) -> Part:
        """Return the prompt of a choice as a part, with the log-probabilities of its tokens if they are wanted."""
        ids, chances = choice.generation.prompt_ids, None
        if self.request.logprobs is not None:
            if not hasattr(self._pipeline, "run"):
                raise unsupported("logprobs", "with echo, it needs a pipeline of this process")
            chances = self._scored(ids)
        return Part(index=choice.index, text=self.tokenizer.decode(ids), chances=chances)

    def _scored(self, ids: tuple[int, ...]) -> tuple[Chance, ...]:
        """Return the tokens of a prompt with their log-probabilities. Choices of one prompt share them."""
        if ids not in self._scores:
            made: list[Chance] = [(ids[0], float("nan"), ())]
            for each in scored(self._pipeline.pipeline, ids, self.request.logprobs or 0, self._pipeline.run):
                if self._cancelled.is_set():
                    break
                made.append(each)
            self._scores[ids] = tuple(made)
        return self._scores[ids]

    def make(self, choice: Choice, emit: Callable[[Part], None]) -> None:
        """Make one choice, and emit its parts."""
        for part in choice.parts():
            self.last_token = time.perf_counter()
            if self.first_token is None:
                self.first_token = self.last_token
            emit(part)

    def cancel(self) -> None:
        """Stop all choices. Any thread may call this."""
        self._cancelled.set()
        for choice in list(self.choices):
            choice.generation.cancel()

    @property
    def prompt_tokens(self) -> int:
        """Return the number of tokens of the prompts."""
        return sum(len(choice.generation.prompt_ids) for choice in self.choices[:: self.request.number])

    @property
    def new_tokens(self) -> int:
        """Return the number of tokens that were made."""
        return sum(len(choice.generation.ids) for choice in self.choices)


async def parts_of(job: Job, pool: ThreadPoolExecutor) -> AsyncIterator[Part]:
    """Yield the parts of all choices of a job, in the order in which they are made.

    Raises:
        BundleError: what ends a choice.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Queue[Any] = asyncio.Queue()

    def put(value: Any) -> None:
        try:
            loop.call_soon_threadsafe(found.put_nowait, value)
        except RuntimeError:  # the loop has ended, with everybody who waits
            job.cancel()

    def make(choice: Choice) -> None:
        try:
            job.make(choice, put)
        except BaseException as error:  # noqa: BLE001  # it is raised where the parts are read
            put(error)
        put(_END)

    for choice in job.choices:
        pool.submit(functools.partial(make, choice))
    left = len(job.choices)
    try:
        while left:
            value = await found.get()
            if value is _END:
                left -= 1
            elif isinstance(value, BaseException):
                raise value
            else:
                yield value
    finally:
        job.cancel()
