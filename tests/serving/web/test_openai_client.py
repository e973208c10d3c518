"""The client ``openai`` against the server: what it sends is understood, and what it reads is what was made."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest

from splitbundle.serving.web.web_server import WebServer
from tests.serving.web.conftest import client_of
from tests.support.scripted_pipeline import wait_until

PROMPT = "Licensed under the Apache License"
TOOLS: Any = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Says the weather",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]
CALL = '<tool_call>\n{"name": "weather", "arguments": {"town": "Zürich"}}\n</tool_call>'
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def client(server: WebServer) -> openai.OpenAI:
    return client_of(server)


def user(text: str) -> Any:
    return [{"role": "user", "content": text}]


def completed(client: openai.OpenAI, **given: Any) -> Any:
    return client.completions.create(
        **{"model": "license", "prompt": PROMPT, "max_tokens": 12, "temperature": 0} | given
    )


def answered(client: openai.OpenAI, **given: Any) -> Any:
    request = {"model": "license", "messages": user(PROMPT), "max_tokens": 12, "temperature": 0} | given
    return client.chat.completions.create(**request)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("license", "model", "splitbundle")
    assert client.models.retrieve("license").id == "license"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_a_completion_is_that_of_the_pipeline(client: openai.OpenAI, pipeline: Any) -> None:
    made, own = completed(client), pipeline.complete_text(PROMPT, max_new_tokens=12)
    (choice,) = made.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (own.text, "length", 0, None)
    usage = made.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(own.prompt_ids), 12)
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert made.object == "text_completion"
    assert made.model == "license"


def test_a_prompt_of_ids_and_several_prompts(client: openai.OpenAI, pipeline: Any) -> None:
    ids = pipeline.tokenizer().encode(PROMPT)
    alone = completed(client).choices[0].text
    assert completed(client, prompt=ids).choices[0].text == alone
    several = completed(client, prompt=[PROMPT, "You may", PROMPT])
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert several.choices[0].text == several.choices[2].text == alone
    assert several.choices[1].text == pipeline.complete_text("You may", max_new_tokens=12).text
    assert completed(client, prompt=[ids, ids]).choices[1].text == alone
    assert several.usage.completion_tokens == 36


def test_the_default_is_sixteen_tokens(client: openai.OpenAI) -> None:
    assert client.completions.create(model="license", prompt=PROMPT, temperature=0).usage.completion_tokens == 16


@pytest.mark.parametrize("stop", ["License,", ["nothing", "Version"]])
def test_stop_strings_streamed_and_not(client: openai.OpenAI, pipeline: Any, stop: Any) -> None:
    own = pipeline.complete_text(PROMPT, max_new_tokens=40, stop=stop)
    made = completed(client, stop=stop, max_tokens=40).choices[0]
    assert (made.text, made.finish_reason) == (own.text, "stop" if own.finish_reason == "stop" else "length")
    chunks = list(completed(client, stop=stop, max_tokens=40, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == own.text
    assert chunks[-1].choices[0].finish_reason == made.finish_reason


def test_a_stream_has_usage_only_where_it_is_asked_for(client: openai.OpenAI) -> None:
    chunks = list(completed(client, stream=True))
    assert all(chunk.usage is None for chunk in chunks)
    chunks = list(completed(client, stream=True, stream_options={"include_usage": True}))
    assert [bool(chunk.choices) for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    assert chunks[-1].usage.completion_tokens == 12
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    reasons = [choice.finish_reason for chunk in chunks for choice in chunk.choices]
    assert reasons == [None] * (len(reasons) - 1) + ["length"]


def test_log_probabilities_of_a_completion(client: openai.OpenAI, pipeline: Any) -> None:
    own = pipeline.complete_text(PROMPT, max_new_tokens=12, logprobs=2)
    found = completed(client, logprobs=2).choices[0].logprobs
    assert found.token_logprobs == pytest.approx(own.logprobs, abs=2e-5)
    assert "".join(found.tokens) == own.text
    assert [max(top.values()) for top in found.top_logprobs] == pytest.approx(own.logprobs, abs=2e-5)
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(12)]
    chunks = [chunk.choices[0].logprobs for chunk in completed(client, logprobs=2, stream=True)]
    assert [token for each in chunks for token in each.tokens] == found.tokens
    assert [offset for each in chunks for offset in each.text_offset] == found.text_offset
    zero = completed(client, logprobs=0).choices[0].logprobs
    assert zero.top_logprobs == [None] * 12


def test_an_echo_has_the_prompt_with_its_probabilities(client: openai.OpenAI, pipeline: Any) -> None:
    tokenizer = pipeline.tokenizer()
    ids = tokenizer.encode(PROMPT)
    own = pipeline.log_probabilities(pipeline.token_ids([ids]))[0]
    made = completed(client, echo=True, logprobs=1, max_tokens=1)
    (choice,) = made.choices
    assert choice.text.startswith(PROMPT)
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1:-1] == pytest.approx(own, abs=2e-5)
    assert len(choice.logprobs.tokens) == len(ids) + 1
    nothing = completed(client, echo=True, max_tokens=0).choices[0]
    assert (nothing.text, nothing.finish_reason) == (PROMPT, "length")
    streamed = list(completed(client, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed).startswith(PROMPT)


def test_seeds_give_the_same_text_again(client: openai.OpenAI, pipeline: Any) -> None:
    drawn = {"temperature": 3.0, "top_p": 0.95}
    texts = [completed(client, seed=seed, **drawn).choices[0].text for seed in (5, 5, 6)]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0] == pipeline.complete_text(PROMPT, max_new_tokens=12, seed=5, **drawn).text


def test_several_choices(client: openai.OpenAI, pipeline: Any) -> None:
    drawn = {"temperature": 3.0, "seed": 5}
    made = completed(client, n=3, **drawn)
    assert [choice.index for choice in made.choices] == [0, 1, 2]
    assert made.choices[0].text != made.choices[1].text
    assert made.choices[1].text == pipeline.complete_text(PROMPT, max_new_tokens=12, temperature=3.0, seed=6).text
    assert made.usage.prompt_tokens == len(pipeline.tokenizer().encode(PROMPT))
    texts = ["", "", ""]
    for chunk in completed(client, n=3, stream=True, **drawn):
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [choice.text for choice in made.choices]


def test_penalties_and_biases(client: openai.OpenAI, pipeline: Any) -> None:
    token = pipeline.tokenizer().encode(" Version")[0]
    given: dict[str, Any] = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {str(token): -100.0}}
    own = pipeline.complete_text(
        PROMPT, max_new_tokens=12, presence_penalty=0.7, frequency_penalty=0.3, logit_bias={token: -100.0}
    )
    assert completed(client, **given).choices[0].text == own.text
    extra = {"top_k": 3, "min_p": 0.01, "repetition_penalty": 1.3, "typical_p": 0.9}
    own = pipeline.complete_text(PROMPT, max_new_tokens=12, temperature=1.0, seed=1, **extra)
    assert completed(client, temperature=1.0, seed=1, extra_body=extra).choices[0].text == own.text
    every = completed(client, temperature=1.0, seed=1, extra_body={"top_k": 0}).choices[0].text
    assert every == completed(client, temperature=1.0, seed=1, extra_body={"top_k": -1}).choices[0].text


def test_a_chat(client: openai.OpenAI, pipeline: Any) -> None:
    own = pipeline.complete_text(user(PROMPT), max_new_tokens=12)
    made = answered(client)
    (choice,) = made.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", own.text, "length")
    assert choice.message.tool_calls is None
    assert made.object == "chat.completion"
    assert made.usage.prompt_tokens == len(own.prompt_ids)
    parts = [{"type": "text", "text": PROMPT[:9]}, {"type": "text", "text": PROMPT[9:]}]
    assert answered(client, messages=[{"role": "user", "content": parts}]).choices[0].message.content == own.text
    newer = {"max_tokens": openai.omit, "max_completion_tokens": 5}
    assert answered(client, **newer).usage.completion_tokens == 5


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    whole = answered(client).choices[0].message.content
    chunks = list(answered(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:-1])
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-2].choices[0].delta.content is None
    assert chunks[-1].usage.completion_tokens == 12
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}


def test_the_helper_for_streams(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {"model": "license", "messages": user(PROMPT), "temperature": 0, "stop": ["Version"]}
    with client.chat.completions.stream(**request) as stream:
        for _ in stream:
            pass
        found = stream.get_final_completion()
    assert found.choices[0].message.content == answered(client, stop=["Version"]).choices[0].message.content


def test_log_probabilities_of_a_chat(client: openai.OpenAI, pipeline: Any) -> None:
    own = pipeline.complete_text(user(PROMPT), max_new_tokens=12, logprobs=2)
    found = answered(client, logprobs=True, top_logprobs=2).choices[0].logprobs.content
    assert [each.logprob for each in found] == pytest.approx(own.logprobs, abs=2e-5)
    assert "".join(each.token for each in found) == own.text
    assert all(bytes(each.bytes).decode() == each.token for each in found)
    assert [len(each.top_logprobs) for each in found] == [2] * 12
    streamed = answered(client, logprobs=True, top_logprobs=2, stream=True)
    chunks = [chunk.choices[0].logprobs for chunk in streamed]
    tokens = [each.token for chunk in chunks if chunk is not None for each in chunk.content]
    assert tokens == [each.token for each in found]
    assert answered(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs == []


def test_the_next_turn_reuses_the_last_one(client: openai.OpenAI) -> None:
    messages = user("Unless required by applicable law")
    for turn in range(3):
        made = answered(client, messages=messages)
        if turn:
            details = made.usage.prompt_tokens_details
            assert details.cached_tokens >= made.usage.prompt_tokens - 8
        messages += [{"role": "assistant", "content": made.choices[0].message.content}, *user(" and")]


def test_a_call_of_a_tool(scripted: Callable[..., WebServer]) -> None:
    client = client_of(scripted(f"I ask.{CALL}{CALL}"))
    ask: dict[str, Any] = {"model": "script", "messages": user("weather?"), "tools": TOOLS}
    (choice,) = client.chat.completions.create(**ask).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "I ask."
    calls = choice.message.tool_calls
    assert [(call.function.name, json.loads(call.function.arguments)) for call in calls] == [
        ("weather", {"town": "Zürich"})
    ] * 2
    assert len({call.id for call in calls}) == 2
    text, names, indexes = "", [], []
    for chunk in client.chat.completions.create(**ask, stream=True):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for call in delta.tool_calls or ():
            names.append(call.function.name)
            indexes.append(call.index)
    assert (text, names, indexes) == ("I ask.", ["weather"] * 2, [0, 1])
    assert chunk.choices[0].finish_reason == "tool_calls"
    without = client.chat.completions.create(**ask | {"tools": openai.omit}).choices[0].message
    assert without.content == f"I ask.{CALL}{CALL}"
    assert client.chat.completions.create(**ask, tool_choice="none").choices[0].message.tool_calls is None


def test_tools_and_variables_reach_the_template(scripted: Callable[..., WebServer]) -> None:
    client = client_of(scripted(lambda prompt: prompt))
    ask: dict[str, Any] = {"model": "script", "messages": user("hi")}
    assert client.chat.completions.create(**ask, tools=TOOLS).choices[0].message.content == "hi tools: 1"
    found = client.chat.completions.create(**ask, extra_body={"chat_template_kwargs": {"shout": "loud"}})
    assert found.choices[0].message.content == "hi loud"
    said = [
        *user("weather?"),
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Bern"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "1", "content": "sun"},
    ]
    found = client.chat.completions.create(model="script", messages=said, tools=TOOLS)
    assert found.choices[0].message.content == "weather?sun tools: 1"


@pytest.mark.parametrize("seed", [2**53 + 1, 2**64, -(2**63)])
def test_seeds_of_64_bits(server: WebServer, seed: int) -> None:
    client = client_of(server)
    texts = [
        client.completions.create(model="license", prompt="You", max_tokens=4, temperature=3.0, seed=each)
        .choices[0]
        .text
        for each in (seed, seed)
    ]
    assert texts[0] == texts[1]


def test_thinking_comes_apart(scripted: Callable[..., WebServer]) -> None:
    client = client_of(scripted("<think>Well.\n</think>Yes."))
    message = client.chat.completions.create(model="script", messages=user("?")).choices[0].message
    assert (message.reasoning_content, message.content) == ("Well.\n", "Yes.")
    thought = text = ""
    for chunk in client.chat.completions.create(model="script", messages=user("?"), stream=True):
        thought += getattr(chunk.choices[0].delta, "reasoning_content", None) or ""
        text += chunk.choices[0].delta.content or ""
    assert (thought, text) == ("Well.\n", "Yes.")


@pytest.mark.parametrize(
    ("given", "param"),
    [
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": TOOLS, "tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"n": 0}, "n"),
        ({"n": 99}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 2}, "top_p"),
        ({"stop": [1]}, "stop"),
        ({"stop": ["a"] * 100}, "stop"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 99}, "top_logprobs"),
        ({"seed": "x"}, "seed"),
        ({"seed": 2**64 + 1}, "seed"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stop_token_ids": [2**60]}, "stop_token_ids"),
        ({"repetition_penalty": 1e-300}, "repetition_penalty"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"stream": 1}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"tools": [{"type": "web"}]}, "tools[0].type"),
    ],
)
def test_what_is_wrong_or_missing_here_is_named(client: openai.OpenAI, given: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        answered(client, extra_body=given)
    assert caught.value.param == param
    assert param.partition("[")[0] in str(caught.value)


def test_a_template_that_refuses_says_why(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="no such role"):
        answered(client, messages=[{"role": "judge", "content": "x"}])


def test_a_prompt_that_is_too_long_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        completed(client, prompt=PROMPT * 60)
    assert caught.value.code == "input.position"


def test_another_model_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        completed(client, model="gpt-9")
    assert caught.value.param == "model"
    assert "license" in caught.value.message


def test_fields_without_effect_are_named_in_a_header(client: openai.OpenAI) -> None:
    given = {"max_tokens": 1, "user": "me", "extra_body": {"foo": 1, "store": True}}
    found = client.completions.with_raw_response.create(model="license", prompt=PROMPT, **given)
    assert found.headers["splitbundle-ignored"] == "foo, store, user"
    assert found.parse().usage.completion_tokens == 1
    plain = client.completions.with_raw_response.create(model="license", prompt=PROMPT, max_tokens=1)
    assert "splitbundle-ignored" not in plain.headers


def test_twelve_at_once_are_those_of_each_alone(client: openai.OpenAI, pipeline: Any) -> None:
    prompts = [f"{PROMPT}{' x' * i}" for i in range(12)]
    own = [pipeline.complete_text(prompt, max_new_tokens=12).text for prompt in prompts]
    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda prompt: completed(client, prompt=prompt).choices[0].text, prompts))
    assert found == own


def test_the_asynchronous_client(server: WebServer, client: openai.OpenAI) -> None:
    async def run() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0) as own:

            async def one(stream: bool) -> str:
                made = await own.chat.completions.create(
                    model="license", messages=user(PROMPT), max_tokens=12, temperature=0, stream=stream
                )
                if not stream:
                    return made.choices[0].message.content or ""
                return "".join([chunk.choices[0].delta.content or "" async for chunk in made])

            return await asyncio.gather(one(True), one(False), one(True))

    assert asyncio.run(run()) == [answered(client).choices[0].message.content] * 3


def test_who_goes_away_frees_the_row(scripted: Callable[..., WebServer]) -> None:
    server = scripted("a long answer " * 40, seconds=0.05)
    client = client_of(server)
    stream = client.chat.completions.create(model="script", messages=user("?"), stream=True)
    next(iter(stream))
    stream.response.close()
    steps = server.scripted.made[0]  # type: ignore[attr-defined]
    wait_until(steps.cancelled.is_set)
    with pytest.raises(openai.APITimeoutError):  # without a stream, likewise
        client_of(server, timeout=0.3).chat.completions.create(model="script", messages=user("?"))
    wait_until(server.scripted.made[-1].cancelled.is_set)  # type: ignore[attr-defined]
    wait_until(lambda: server._door.running == 0)


def test_a_stream_that_fails_says_so(scripted: Callable[..., WebServer], pipeline: Any) -> None:
    server = scripted("one two three four", seconds=0.01)
    made = server.scripted  # type: ignore[attr-defined]

    class Failing:
        reused = 0

        def __iter__(self) -> Any:
            yield from made_steps
            raise RuntimeError("a stage is lost")

        def cancel(self) -> None:
            return

        close = cancel

    made_steps = list(made.row_steps([1], max_new_tokens=2))
    made.row_steps = lambda *args, **given: Failing()
    found = []
    with pytest.raises(openai.APIError, match="RuntimeError in the server"):
        for chunk in client_of(server).chat.completions.create(model="script", messages=user("?"), stream=True):
            found.append(chunk)
    assert found
    with pytest.raises(openai.InternalServerError):
        client_of(server).chat.completions.create(model="script", messages=user("?"))


def test_a_full_server_says_when_to_come_again(chat_bundle: Any, pipeline: Any) -> None:
    from splitbundle import SharedPipeline
    from splitbundle.serving.web.models import Model, Models
    from splitbundle.serving.web.opening import open_web_server

    load = lambda: SharedPipeline(pipeline, rows=1, waiting=1)  # noqa: E731
    with open_web_server(Models({"m": Model("m", chat_bundle, load)})) as server:
        client = client_of(server)
        ask = {"model": "m", "prompt": PROMPT, "max_tokens": 200, "extra_body": {"stop_token_ids": []}}
        threads = [threading.Thread(target=lambda: client.completions.create(**ask)) for _ in range(2)]
        with server._door.models.using("m") as (_, shared):
            for i, thread in enumerate(threads):
                thread.start()
                wait_until(
                    lambda n=i: shared.state["active"] + shared.state["waiting"] > n or shared.state["texts"] > n
                )
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**ask)
        assert caught.value.code == "server.full"
        assert caught.value.response.headers["retry-after"] == "1"
        for thread in threads:
            thread.join()
