"""The documents of an answer: whole ones, and the chunks of a stream.

The forms are those of https://platform.openai.com/docs/api-reference/chat and …/completions. Streams are server-sent
events (https://html.spec.whatwg.org/multipage/server-sent-events.html).
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from typing import Any, Final

from splitbundle.serving.web.choices import Chance, Part
from splitbundle.serving.web.requests import Request

DONE: Final = b"data: [DONE]\n\n"


def event(document: Any) -> bytes:
    """Return a document as a server-sent event."""
    return b"data: " + encoded(document) + b"\n\n"


def encoded(document: Any) -> bytes:
    """Return a document as JSON."""
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def usage(generations: Iterable[Any], prompts: int) -> dict[str, Any]:
    """Return the numbers of tokens. Choices of one prompt count its tokens once."""
    made = list(generations)
    each = len(made) // max(prompts, 1)
    prompt_tokens = sum(len(one.prompt_ids) for one in made[:: max(each, 1)])
    new = sum(len(one.ids) for one in made)
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": new,
        "total_tokens": prompt_tokens + new,
        "prompt_tokens_details": {"cached_tokens": sum(one.reused for one in made[:: max(each, 1)])},
    }


class Answer:
    """The documents of one request's answer."""

    def __init__(self, request: Request, tokenizer: Any) -> None:
        self._request, self._tokenizer = request, tokenizer
        kind = "chat.completion" if request.is_chat else "text_completion"
        self._common = {
            "id": f"{'chatcmpl' if request.is_chat else 'cmpl'}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": request.model,
        }
        self._chunk = {**self._common, "object": "chat.completion.chunk"} if request.is_chat else self._common
        self._offsets: dict[int, int] = {}

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """Return the chunk before the text of a choice; None for completions, which have none."""
        if not self._request.is_chat:
            return None
        return self._of_choice({"index": index, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})

    def chunks(self, part: Part) -> list[dict[str, Any]]:
        """Return the chunks for what has been added to a choice."""
        request, made = self._request, []
        if not request.is_chat:
            choice = {"index": part.index, "text": part.text, "finish_reason": part.finish_reason}
            return [self._of_choice(choice | {"logprobs": self._completion_chances(part)})]
        delta: dict[str, Any] = {}
        if part.thinking:
            delta["reasoning_content"] = part.thinking
        if part.text:
            delta["content"] = part.text
        if part.tool_calls:
            delta["tool_calls"] = [{"index": i, **_call(call)} for i, call in part.tool_calls]
        chances = self._chat_chances(part.chances)
        if delta or (part.chances and part.finish_reason is None):
            made.append({"index": part.index, "delta": delta, "finish_reason": None} | chances)
            chances = self._chat_chances(None)
        if part.finish_reason is not None:  # apart, as clients expect it
            made.append({"index": part.index, "delta": {}, "finish_reason": part.finish_reason} | chances)
        return [self._of_choice(choice) for choice in made]

    def usage_chunk(self, generations: Iterable[Any]) -> dict[str, Any]:
        """Return the last chunk, which has the numbers of tokens and no choice."""
        return {**self._chunk, "choices": [], "usage": usage(generations, len(self._request.prompts))}

    def whole(self, parts: Sequence[Sequence[Part]], generations: Sequence[Any], echoes: Sequence[Part]) -> Any:
        """Return the whole answer.

        Args:
            parts: the parts of each choice.
            generations: the generations of the choices.
            echoes: the prompt of each choice as a part, if it is wanted; otherwise none.
        """
        choices = []
        for i, own in enumerate(parts):
            joined = [echoes[i], *own] if echoes else own
            choices.append(self._whole_chat(joined) if self._request.is_chat else self._whole_completion(joined))
        return {**self._common, "choices": choices, "usage": usage(generations, len(self._request.prompts))}

    def _of_choice(self, choice: dict[str, Any]) -> dict[str, Any]:
        made: dict[str, Any] = {**self._chunk, "choices": [choice]}
        if self._request.usage_in_stream:
            made["usage"] = None
        return made

    def _whole_chat(self, parts: Sequence[Part]) -> dict[str, Any]:
        calls = [_call(call) for part in parts for _, call in part.tool_calls]
        text, thinking = "".join(part.text for part in parts), "".join(part.thinking for part in parts)
        message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None, "refusal": None}
        if thinking:
            message["reasoning_content"] = thinking
        if calls:
            message["tool_calls"] = calls
        chances = None if self._request.logprobs is None else _joined(parts)
        choice = {"index": parts[-1].index, "message": message, "finish_reason": parts[-1].finish_reason}
        return choice | {"logprobs": None} | self._chat_chances(chances)

    def _whole_completion(self, parts: Sequence[Part]) -> dict[str, Any]:
        last = parts[-1]
        whole = Part(
            index=last.index,
            text="".join(part.text for part in parts),
            chances=None if self._request.logprobs is None else _joined(parts),
            finish_reason=last.finish_reason,
        )
        choice = {"index": whole.index, "text": whole.text, "finish_reason": whole.finish_reason}
        return choice | {"logprobs": self._completion_chances(whole)}

    def _spelled(self, token: int) -> str:
        spelled: str = self._tokenizer.decode([token], control_tokens=True)
        return spelled

    def _chat_chances(self, chances: Sequence[Chance] | None) -> dict[str, Any]:
        if chances is None:
            return {}

        def entry(token: int, logprob: float) -> dict[str, Any]:
            spelled = self._spelled(token)
            data = None if "\ufffd" in spelled else list(spelled.encode("utf-8"))  # a part of a character has no text
            return {"token": spelled, "logprob": logprob, "bytes": data}

        content = [
            entry(token, logprob) | {"top_logprobs": [entry(*each) for each in top]} for token, logprob, top in chances
        ]
        return {"logprobs": {"content": content, "refusal": None}}

    def _completion_chances(self, part: Part) -> dict[str, Any] | None:
        if part.chances is None:
            return None
        made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        offset = self._offsets.get(part.index, 0)
        for token, logprob, top in part.chances:
            spelled = self._spelled(token)
            made["tokens"].append(spelled)
            # The first token of a prompt has none before it, and so no probability.
            made["token_logprobs"].append(None if logprob != logprob else logprob)
            made["top_logprobs"].append({self._spelled(each): value for each, value in top} if top else None)
            made["text_offset"].append(offset)
            offset += len(spelled)
        self._offsets[part.index] = offset
        return made


def _joined(parts: Sequence[Part]) -> tuple[Chance, ...]:
    return tuple(chance for part in parts for chance in part.chances or ())


def _call(call: Any) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
