"""What clients ask for: the bodies of ``/v1/completions`` and ``/v1/chat/completions``, checked.

The fields are those of https://platform.openai.com/docs/api-reference, and those that local servers have added:
``top_k``, ``min_p``, ``typical_p``, ``repetition_penalty``, ``stop_token_ids`` and ``chat_template_kwargs``. A field
that nobody knows changes nothing. It is ignored, and named in the header ``Splitbundle-Ignored``.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from splitbundle.errors import quoted
from splitbundle.records import record
from splitbundle.serving.web.errors import RequestError, invalid, unsupported

MOST_CHOICES: Final = 16
MOST_PROMPTS: Final = 64
MOST_TOP: Final = 20
DEFAULT_TOKENS: Final = 16
"""The new tokens of ``/v1/completions``, as in OpenAI's interface. A chat has as many as the context has room for."""
_SAMPLING: Final = (
    *("temperature", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty"),
)
_ALL: Final = 2**31
_ARGUMENTS: Final = frozenset(
    {"self", "messages", "conversation", "tools", "documents", "add_generation_prompt", "chat_template", "tokenize"}
    | {"return_tensors", "return_dict", "continue_final_message", "padding", "truncation", "max_length"}
    | {"return_assistant_tokens_mask", "tokenizer_kwargs"}
)
"""Names that arguments of ``apply_chat_template`` have, here or in transformers."""
_INSTEAD: Final = {
    "audio": "it answers with text",
    "best_of": "ask for n, and choose",
    "function_call": "use tool_choice",
    "functions": "use tools",
    "prediction": "leave it out",
    "suffix": "put all of the text into prompt",
    "verbosity": "say it in a message",
    "web_search_options": "it has no network",
}
"""Known fields that this server doesn't have -> what to do instead."""


@record(frozen=True, slots=True, kw_only=True)
class Request:
    """What both kinds of requests have."""

    model: str | None
    prompts: tuple[Any, ...]
    """For completions, texts or lists of token ids; for a chat, its list of messages alone."""
    is_chat: bool
    stream: bool
    usage_in_stream: bool
    number: int
    """The choices of each prompt."""
    max_tokens: int | None
    stop: tuple[str, ...]
    stop_ids: tuple[int, ...] | None
    logprobs: int | None
    """The number of likeliest tokens to report, or None."""
    echo: bool
    seed: int | None
    sampling: dict[str, Any]
    """The arguments of ``stream_text``, where the client gave one."""
    tools: tuple[dict[str, Any], ...] | None
    template_variables: dict[str, Any]
    ignored: tuple[str, ...]
    """The fields that have no effect."""

    def named(self, model: str) -> Request:
        """Return this request with the name of the model that answers it."""
        return Request(**{**{name: getattr(self, name) for name in type(self).__slots__}, "model": model})


class _Body:
    """The members of a body. Each that is read is taken out of it; null counts as absent."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._left = {name: value for name, value in values.items() if value is not None}

    def take(self, name: str, check: Callable[[str, Any], Any], default: Any = None) -> Any:
        return check(name, self._left.pop(name)) if name in self._left else default

    def refuse(self, names: Mapping[str, str]) -> None:
        for name, instead in names.items():
            if name in self._left:
                raise unsupported(name, instead)

    def rest(self) -> tuple[str, ...]:
        return tuple(sorted(self._left))


def parse_completion(values: Any) -> Request:
    """Return the request of a body of ``/v1/completions``.

    Raises:
        RequestError: for a wrong value, and for a parameter that this server doesn't have.
    """
    body = _Body(_object("body", values))
    model, prompts = body.take("model", _text), body.take("prompt", _prompts)
    if prompts is None:
        raise invalid("prompt", "a text, token ids, or a list of them", "nothing", reason="missing_required_parameter")
    best_of = body.take("best_of", _integer(1, MOST_CHOICES))
    number = body.take("n", _integer(1, MOST_CHOICES), 1)
    body.take("response_format", _response_format)
    body.take("modalities", _modalities)
    body.refuse({"tools": "use /v1/chat/completions", "tool_choice": "use /v1/chat/completions"})
    if best_of not in (None, number):
        raise unsupported("best_of", _INSTEAD["best_of"])
    return _request(
        body,
        model=model,
        prompts=prompts,
        is_chat=False,
        number=number,
        logprobs=body.take("logprobs", _integer(0, MOST_TOP)),
        echo=body.take("echo", _boolean, False),
        max_tokens=body.take("max_tokens", _integer(0, 2**31), DEFAULT_TOKENS),
        tools=None,
        template_variables={},
    )


def parse_chat(values: Any) -> Request:
    """Return the request of a body of ``/v1/chat/completions``. See ``parse_completion``."""
    body = _Body(_object("body", values))
    model, messages = body.take("model", _text), body.take("messages", _messages)
    if messages is None:
        raise invalid("messages", "a list of messages", "nothing", reason="missing_required_parameter")
    wanted, top = body.take("logprobs", _boolean, False), body.take("top_logprobs", _integer(0, MOST_TOP))
    if top is not None and not wanted:
        raise invalid("top_logprobs", "logprobs: true beside it", "none")
    most = body.take("max_tokens", _integer(0, 2**31))
    most = body.take("max_completion_tokens", _integer(0, 2**31), most)
    tools, choice = body.take("tools", _tools), body.take("tool_choice", _tool_choice, "auto")
    body.take("response_format", _response_format)
    body.take("modalities", _modalities)
    variables = body.take("chat_template_kwargs", _variables, {})
    if (effort := body.take("reasoning_effort", _text)) is not None:  # some templates have such a variable
        variables = {"reasoning_effort": effort, **variables}
    return _request(
        body,
        model=model,
        prompts=(messages,),
        is_chat=True,
        number=body.take("n", _integer(1, MOST_CHOICES), 1),
        logprobs=(top or 0) if wanted else None,
        echo=False,
        max_tokens=most,
        tools=tools if choice == "auto" else None,
        template_variables=dict(variables),
    )


def _request(body: _Body, **own: Any) -> Request:
    stream, options = body.take("stream", _boolean, False), body.take("stream_options", _object)
    if options is not None and not stream:
        raise invalid("stream_options", "stream: true beside it", "none")
    sampling = {name: body.take(name, _number) for name in _SAMPLING}
    sampling |= {"top_k": body.take("top_k", _top_k), "logit_bias": body.take("logit_bias", _bias)}
    usage = (options or {}).get("include_usage", False)
    rest = {
        "stream": stream,
        "usage_in_stream": _boolean("stream_options.include_usage", usage),
        "stop": body.take("stop", _stops, ()),
        "stop_ids": body.take("stop_token_ids", _ids),
        "seed": body.take("seed", _integer(-(2**63), 2**64)),
        "sampling": {name: value for name, value in sampling.items() if value is not None},
    }
    body.refuse(_INSTEAD)
    return Request(**own, **rest, ignored=body.rest())


def _wrong(name: str, expected: str, value: Any) -> RequestError:
    return invalid(name, expected, quoted(value), reason="invalid_type")


def _object(name: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(name, "an object", value)
    return value


def _variables(name: str, value: Any) -> dict[str, Any]:
    for variable in _object(name, value):
        if variable in _ARGUMENTS or not variable.isidentifier():
            raise unsupported(f"{name}.{variable}", "it isn't a variable of a template")
    return dict(value)


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _wrong(name, "a string", value)
    return value


def _boolean(name: str, value: Any) -> bool:
    if type(value) is not bool:
        raise _wrong(name, "true or false", value)
    return value


def _number(name: str, value: Any) -> float | int:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise _wrong(name, "a number", value)
    return value  # type: ignore[no-any-return]


def _top_k(name: str, value: Any) -> int:
    # Other servers take 0 and -1 for all tokens.
    return _ALL if value in (0, -1) else _integer(1, _ALL)(name, value)


def _integer(least: int, most: int) -> Callable[[str, Any], int]:
    def check(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _wrong(name, f"an integer from {least} to {most}", value)
        return value

    return check


def _ids(name: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise _wrong(name, "a list of token ids", value)
    return tuple(value)


def _prompts(name: str, value: Any) -> tuple[Any, ...]:
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value and len(value) <= MOST_PROMPTS:
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if all(isinstance(each, list) for each in value):
            return tuple(list(_ids(f"{name}[{i}]", each)) for i, each in enumerate(value))
    if isinstance(value, list) and value and all(type(each) is int for each in value):
        return (list(_ids(name, value)),)
    raise _wrong(name, f"a text, token ids, or a list of up to {MOST_PROMPTS} of them", value)


def _stops(name: str, value: Any) -> tuple[str, ...]:
    given = [value] if isinstance(value, str) else value
    if not isinstance(given, list) or not all(isinstance(each, str) and each for each in given):
        raise _wrong(name, "a text, or a list of texts, none of them empty", value)
    return tuple(given)


def _bias(name: str, value: Any) -> dict[int, float]:
    biases: dict[int, float] = {}
    for token, bias in _object(name, value).items():
        if not token.isascii() or not token.isdigit() or len(token) > 10:
            raise invalid(name, "token ids as keys", quoted(token))
        biases[int(token)] = float(_number(f"{name}.{token}", bias))
    return biases


def _messages(name: str, value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list of messages, at least one", value)
    return [_message(f"{name}[{i}]", each) for i, each in enumerate(value)]


def _message(where: str, value: Any) -> dict[str, Any]:
    message = dict(_object(where, value))
    _text(f"{where}.role", message.get("role"))
    content = message.get("content")
    if isinstance(content, list):
        parts = []
        for i, part in enumerate(content):
            kind = _object(f"{where}.content[{i}]", part).get("type")
            if kind not in ("text", "input_text"):
                raise unsupported(f"{where}.content[{i}].type", "this model reads text alone")
            parts.append(_text(f"{where}.content[{i}].text", part.get("text")))
        message["content"] = "".join(parts)
    elif content is not None:
        _text(f"{where}.content", content)
    elif not message.get("tool_calls"):
        message["content"] = ""
    if message.get("tool_calls") is not None:
        message["tool_calls"] = _tool_calls(f"{where}.tool_calls", message["tool_calls"])
    return message


def _tool_calls(name: str, value: Any) -> list[dict[str, Any]]:
    """Return calls that a model made before. Clients send arguments as JSON text, and templates want objects."""
    if not isinstance(value, list):
        raise _wrong(name, "a list", value)
    made = []
    for i, each in enumerate(value):
        call = dict(_object(f"{name}[{i}]", each))
        function = dict(_object(f"{name}[{i}].function", call.get("function")))
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError, RecursionError):  # otherwise it stays as it is
                function["arguments"] = json.loads(function["arguments"])
        made.append(call | {"function": function})
    return made


def _tools(name: str, value: Any) -> tuple[dict[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _wrong(name, "a list of tools, at least one", value)
    for i, each in enumerate(value):
        kind = _object(f"{name}[{i}]", each).get("type")
        if kind != "function":
            raise unsupported(f"{name}[{i}].type", "a tool is a function")
        _text(f"{name}[{i}].function.name", _object(f"{name}[{i}].function", each.get("function")).get("name"))
    return tuple(value)


def _tool_choice(name: str, value: Any) -> str:
    if value not in ("auto", "none"):
        raise unsupported(name, "it can be auto or none; the model decides")
    return str(value)


def _response_format(name: str, value: Any) -> None:
    kind = _object(name, value).get("type")
    if kind != "text":
        raise unsupported(name, f"it can be text; {quoted(kind)} would need a grammar. Say in a message what you want")


def _modalities(name: str, value: Any) -> None:
    if value != ["text"]:
        raise unsupported(name, "it answers with text")
