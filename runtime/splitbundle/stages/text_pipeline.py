"""The methods of a pipeline for text: continue a prompt or a chat, and score a text."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from splitbundle.errors import BundleError, Problem, quoted, wrong_argument
from splitbundle.stages import text_batch, text_generation
from splitbundle.stages.sampling import with_defaults
from splitbundle.stages.text_generation import Completion, TextGeneration

if TYPE_CHECKING:
    from splitbundle.stages.session import Session


class _Loading:
    lock = threading.Lock()


def _after_fork() -> None:
    _Loading.lock = threading.Lock()  # a thread of the parent may hold the other one forever


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


class TextPipeline:
    """The half of a pipeline that takes and gives text. ``bundle`` is what it was loaded from, if it was."""

    bundle: Any = None
    _tokenizer: Any = None

    @property
    def context_length(self) -> int | None:
        """Return the number of tokens that the model was made for, or None if the bundle doesn't say."""
        return None if self.bundle is None else self.bundle.manifest.model.context_length

    def tokenizer(self) -> Any:
        """Return the bundle's tokenizer. It is loaded once.

        Raises:
            BundleError: ``text.none`` without a tokenizer; the errors of ``Bundle.tokenizer``.
        """
        if self.bundle is None:
            expected, got = (
                "a pipeline of a bundle, or a tokenizer as an argument",
                "a pipeline that was made of stages",
            )
            raise BundleError(Problem(code="text.none", argument="tokenizer", expected=expected, got=got))
        with _Loading.lock:
            if self._tokenizer is None:
                self._tokenizer = self.bundle.tokenizer()
        return self._tokenizer

    def stream_text(
        self,
        prompt: str | Sequence[Mapping[str, Any]] | Sequence[int],
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = (),
        stop_ids: Sequence[int] | None = None,
        session: Session | None = None,
        logprobs: int | None = None,
        defaults: bool = True,
        beyond_context: bool = False,
        prompt_lookup: int | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_variables: Mapping[str, Any] | None = None,
        tokenizer: Any = None,
        **sampling: Any,
    ) -> TextGeneration:
        """Continue a text, or answer in a chat, and yield the new text piece by piece.

        Args:
            prompt: a text, the messages of a chat, or token ids.
            max_new_tokens: the largest number of new tokens; by default as many as the model's context has room for.
            stop: texts that end the answer. They aren't part of it.
            stop_ids: tokens that end the answer; by default those of the bundle.
            session: a session of one row, of ``session()``. What it holds of the prompt isn't computed again; what it
                holds beyond that is discarded. It is extended where it is too small. By default a new one.
            logprobs: the number of likeliest tokens to report for each new token, with the logarithms of their
                probabilities; 0 for that of the new token alone; None for none.
            defaults: whether the model's own way of sampling holds for arguments that aren't given
                (``generation_config.json`` of the source).
            beyond_context: whether the text may go beyond the context length that the model was made for.
            prompt_lookup: the number of tokens to guess from the text itself, as for ``generate``.
            tools: for a chat, the tools that the model may call, as JSON schemas.
            chat_template: for a chat, the name or the text of another template.
            template_variables: for a chat, further variables of the template.
            tokenizer: the tokenizer; by default the bundle's.
            sampling: as for ``generate``: ``temperature``, ``top_k``, ``seed`` and so on.

        Returns:
            An iterator of pieces. It also has the text, the ids, the reason of the end, and ``close``.

        Raises:
            BundleError: ``input.value``; ``input.position`` for a prompt that is longer than the context; the errors of
                the tokenizer and of ``generate``.
        """
        own = self.tokenizer() if tokenizer is None else tokenizer
        ids = _prompt_ids(own, prompt, tools=tools, chat_template=chat_template, variables=template_variables)
        return TextGeneration(
            self,
            own,
            ids,
            max_new_tokens=max_new_tokens,
            stop=stop,
            stop_ids=stop_ids,
            session=session,
            logprobs=logprobs,
            beyond_context=beyond_context,
            prompt_lookup=prompt_lookup,
            sampling=_sampling(sampling, own.document if defaults else None),
        )

    def row_steps(self, prompt_ids: Sequence[int], **options: Any) -> Any:
        """Begin to continue one row, and return its steps.

        Args:
            prompt_ids: the prompt.
            options: ``session``, and the arguments of ``steps``.

        Returns:
            An iterator of ``Step``, with ``reused`` and ``close``.

        Raises:
            BundleError: as ``steps``.
        """
        return text_generation.row_steps(self, prompt_ids, **options)

    def complete_text(self, prompt: str | Sequence[Mapping[str, Any]] | Sequence[int], **options: Any) -> Completion:
        """Continue a text, or answer in a chat, and return the whole answer.

        Args:
            prompt: a text, the messages of a chat, or token ids.
            options: those of ``stream_text``.

        Raises:
            BundleError: as for ``stream_text``.
        """
        return self.stream_text(prompt, **options).completion()

    def complete_texts(
        self, prompts: Sequence[str | Sequence[Mapping[str, Any]] | Sequence[int]], **options: Any
    ) -> list[Completion]:
        """Continue several texts at once, and return the whole answers, in the order of the prompts.

        A call of the pipeline computes a token of every text, so this is faster than one text after another. Without
        draws, the texts are those of ``complete_text``, up to the rounding of a batch. With a ``seed``, the first text
        is, and the others have draws of their own. Each row has a KV cache: for many prompts, call this several times.

        Args:
            prompts: texts, the messages of chats, or token ids.
            options: those of ``stream_text``, without ``session`` and ``prompt_lookup``.

        Raises:
            BundleError: as for ``stream_text``; ``input.value`` for a single text, which needs ``complete_text``.
        """
        if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable):
            raise wrong_argument("prompts", "a list of prompts", quoted(prompts))
        for name in ("session", "prompt_lookup"):
            if options.pop(name, None) is not None:
                raise wrong_argument(name, "None for several texts", "another value")
        return self._complete_texts(list(prompts), options)

    def _complete_texts(self, prompts: list[Any], options: dict[str, Any]) -> list[Completion]:
        given = {name: options.pop(name, default) for name, default in _PROMPTS.items()}
        own = given["tokenizer"] or self.tokenizer()
        rows = [
            _prompt_ids(
                own,
                prompt,
                tools=given["tools"],
                chat_template=given["chat_template"],
                variables=given["template_variables"],
            )
            for prompt in prompts
        ]
        common = {name: options.pop(name, default) for name, default in _COMMON.items()}
        sampling = _sampling(options, own.document if given["defaults"] else None, "complete_texts")
        return text_batch.complete_batch(self, own, rows, sampling, **common)

    def log_probabilities(self, token_ids: Any, *, last: int | None = None) -> list[list[float]]:
        """Return the natural logarithm of the probability of each token, given those before it.

        *Shape:* (batch, sequence) -> batch lists of ``sequence - 1`` numbers, or of ``last``.

        Args:
            token_ids: rows of ids, as ``token_ids`` makes them.
            last: the number of tokens at the end to score; by default all but the first, which has none before it.

        Raises:
            BundleError: ``input.*``.
        """
        shape = tuple(getattr(token_ids, "shape", ()))
        if len(shape) != 2 or shape[1] < 2:
            raise wrong_argument("token_ids", "rows of at least two tokens", quoted(shape))
        wanted = shape[1] - 1 if last is None else last
        if type(wanted) is not int or not 0 < wanted < shape[1]:
            raise wrong_argument("last", f"a number from 1 to {shape[1] - 1}", quoted(last))
        with self._without_gradients():  # type: ignore[attr-defined]
            logits = self.forward(token_ids, logits=wanted + 1)  # type: ignore[attr-defined]
            scores = self._scores(logits[:, :-1], token_ids[:, shape[1] - wanted :])  # type: ignore[attr-defined]
        return scores.tolist()  # type: ignore[no-any-return]


_PROMPTS: Final[dict[str, Any]] = {
    **dict.fromkeys(("tools", "chat_template", "template_variables", "tokenizer")),
    "defaults": True,
}
_COMMON: Final[dict[str, Any]] = {
    **dict.fromkeys(("max_new_tokens", "stop_ids", "logprobs")),
    "stop": (),
    "beyond_context": False,
}
"""The options of ``complete_texts`` with their defaults: those about prompts, and those of each text."""


def _prompt_ids(
    tokenizer: Any,
    prompt: object,
    *,
    tools: object,
    chat_template: str | None,
    variables: Mapping[str, Any] | None,
) -> list[int]:
    if isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        return tokenizer.apply_chat_template(  # type: ignore[no-any-return]
            prompt, tools=tools, add_generation_prompt=True, chat_template=chat_template, **(variables or {})
        )
    for name, value in (("tools", tools), ("chat_template", chat_template), ("template_variables", variables)):
        if value is not None:
            raise wrong_argument(name, "None for a prompt that isn't a list of messages", quoted(value))
    if isinstance(prompt, str):
        return tokenizer.encode(prompt)  # type: ignore[no-any-return]
    if isinstance(prompt, bytes | bytearray) or not isinstance(prompt, Iterable):
        raise wrong_argument("prompt", "a text, a list of messages, or token ids", quoted(prompt))
    return list(prompt)


def _sampling(given: Mapping[str, Any], document: Any, call: str = "stream_text") -> dict[str, Any]:
    unknown = sorted(given.keys() - set(text_generation.SAMPLING))
    if unknown:
        raise TypeError(f"{call}() got an unexpected keyword argument {unknown[0]!r}")
    return with_defaults(given, document)
