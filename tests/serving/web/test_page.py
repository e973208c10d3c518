"""The page of ``splitbundle serve``, in a browser, against a server that stands in."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from splitbundle.cli.text_options import read_messages
from tests.support import chromium
from tests.support.chromium import Chromium, Page
from tests.support.stand_in_door import PAGE, StandInDoor, bundle, page_files

needs_chromium = pytest.mark.skipif(chromium.PATH is None, reason="chromium isn't installed")
IDLE = "document.getElementById('stop').hidden"
READY = "document.getElementById('model').disabled === false"
SHARDS = "document.querySelector('.shards')"
PHONE = 360
UNWANTED = "script, style, link, img, svg, iframe, object, embed, form, input, video, audio, a, base, meta"
"""Elements that no answer may make."""
DEADLINE = chromium.PATIENCE


@pytest.fixture(scope="module")
def browser() -> Iterator[Chromium]:
    with Chromium() as started:
        yield started


@pytest.fixture
def door() -> Iterator[StandInDoor]:
    with StandInDoor() as started:
        yield started


@pytest.fixture
def page(browser: Chromium, door: StandInDoor) -> Iterator[Page]:
    """The page on a wide screen, with its models. The test fails if there is a problem in the console."""
    with browser.page(door.url) as opened:
        opened.wait(READY)
        yield opened
        assert opened.problems == []


@pytest.fixture(scope="module")
def modules(browser: Chromium) -> Iterator[Page]:
    """The page, for tests that call its modules and change nothing of it."""
    with StandInDoor() as started, browser.page(started.url) as opened:
        yield opened


def write(page: Page, text: str) -> None:
    page.run("document.getElementById('question').focus()")
    page.type(text)


def ask(page: Page, question: str) -> None:
    """Send a question, and wait until its answer has ended."""
    before = page.run("document.querySelectorAll('.turn').length")
    write(page, question)
    page.press("Enter")
    page.wait(f"document.querySelectorAll('.turn').length > {before} && {IDLE}")


def choose(page: Page, selector: str, value: str) -> None:
    """Choose an option of a list, as a reader does."""
    page.run(
        f"(() => {{ const list = document.querySelector('{selector}'); list.value = {json.dumps(value)};"
        "list.dispatchEvent(new Event('change', { bubbles: true })) })()"
    )


def test_the_files_of_the_page_have_nothing_that_makes_markup_of_text() -> None:
    """The policy of the server would stop most of these; the page doesn't rely on it."""
    bad = (
        r"\.(inner|outer)HTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|DOMParser|setHTML|style="
    )
    for path in page_files():
        assert path.suffix in (".html", ".css", ".js"), path
        text = path.read_text("utf-8")
        assert re.findall(bad, text) == [], path
        assert [line for line in text.splitlines() if len(line) > 120] == [], path
        assert set(re.findall(r"https?://[^\s'\"]*", text)) <= {"http://www.w3.org/2000/svg"}, path
    index = (PAGE / "index.html").read_text("utf-8")
    assert re.findall(r"<script(?! type=\"module\" src=\"page\.js\"></script>)|\son\w+=|<style", index) == []


@needs_chromium
def test_the_page_loads(page: Page, door: StandInDoor) -> None:
    wanted = {"/", *(f"/{path.name}" for path in page_files() if path.name != "index.html")}
    page.wait("document.getElementById('status').textContent")
    api = {"/v1/models", "/api/bundles", "/api/status"}
    assert {each.path for each in door.requests} == wanted | api
    assert page.run("[...document.getElementById('model').options].map((each) => each.value)") == list(door.models)
    assert page.text("#status") == "3 of 8 rows busy · 1 waiting · 41.2 tokens/s in all"
    unlabelled = "[...document.querySelectorAll('input, select, textarea')].filter((each) => "
    unlabelled += "!each.labels?.length && !each.ariaLabel).map((each) => each.id)"
    assert page.run(unlabelled) == []
    assert page.console == []


@needs_chromium
def test_an_answer_streams(page: Page, door: StandInDoor) -> None:
    write(page, "slow")
    page.press("Enter")
    page.wait("document.querySelector('.answer .markdown').innerText.includes('word9')")
    assert page.run("document.querySelector('.answer').getAttribute('aria-busy')") == "true"
    assert not page.run(IDLE)
    door.go_on.set()
    page.wait(IDLE)
    assert page.run("document.querySelector('.answer').getAttribute('aria-busy')") == "false"
    told = page.text(".numbers")
    assert re.fullmatch(
        r"\d+ tokens · [\d.,]+ tokens/s · first after .* · prompt of 20 tokens, 12 of them cached", told
    )
    assert door.asked == [
        {
            "model": "tiny-chat",
            "messages": [{"role": "user", "content": "slow"}],
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    assert "You said: slow" in page.text("#announcer")


@needs_chromium
@pytest.mark.parametrize("way", ["button", "Escape"])
def test_stop_ends_an_answer(way: str, page: Page, door: StandInDoor) -> None:
    write(page, "slow")
    page.click("#send")
    page.wait("document.querySelector('.answer .markdown').innerText.includes('word9')")
    if way == "button":
        page.click("#stop")
    else:
        page.press("Escape")
    page.wait(IDLE)
    assert door.left.wait(DEADLINE)
    assert page.text(".numbers").startswith("stopped after")
    said = page.text(".answer .markdown")
    ask(page, "and now")
    assert [each["role"] for each in door.asked[-1]["messages"]] == ["user", "assistant", "user"]
    assert door.asked[-1]["messages"][1]["content"].strip() == said.strip()


@needs_chromium
def test_an_answer_makes_no_markup(page: Page, door: StandInDoor) -> None:
    ask(page, "hostile")
    shown = page.text(".answer .markdown")
    for text in (
        "<script>window.injected = 1</script>",
        "<img src=x onerror=",
        "[click me](javascript:",
        "<svg onload=",
    ):
        assert text in shown
    assert page.run("window.injected") is None
    assert page.run(f"document.querySelectorAll('#log :is({UNWANTED})').length") == 0
    named = "[...new Set([...document.querySelectorAll('#log *')].flatMap((each) => each.getAttributeNames()))]"
    assert set(page.run(named)) <= {
        "class",
        "type",
        "tabindex",
        "aria-label",
        "aria-live",
        "aria-busy",
        "hidden",
        "start",
    }
    assert not door.seen(path="/x*")


@needs_chromium
def test_thinking_is_folded(page: Page, door: StandInDoor) -> None:
    ask(page, "think")
    assert page.text(".thinking summary").startswith("Thought for")
    assert not page.run("document.querySelector('.thinking').open")
    assert page.run("document.querySelector('.thinking pre').textContent") == "Let me see. <b>2</b> "
    ask(page, "more")
    assert "Let me" not in json.dumps(door.asked[-1])


@needs_chromium
def test_a_phone_has_no_sideways_scroll(browser: Chromium, door: StandInDoor) -> None:
    with browser.page(door.url, width=PHONE, height=740) as page:
        page.wait(READY)

        def fits() -> bool:
            return bool(page.run("document.documentElement.scrollWidth <= innerWidth && innerWidth === " + str(PHONE)))

        assert fits()
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        assert fits()
        for question in ("markdown", "hostile", "w" * 300, "break"):
            ask(page, question)
            assert fits(), question
        page.click("#to-bundle")
        page.wait(SHARDS)
        page.run("document.querySelectorAll('details').forEach((each) => { each.open = true })")
        assert fits()
        assert page.problems == []


@needs_chromium
def test_the_theme_follows_the_system(browser: Chromium, door: StandInDoor) -> None:
    brightness = []
    for dark in (False, True):
        with browser.page(door.url, dark=dark) as page:
            color = page.run("getComputedStyle(document.body).backgroundColor")
            brightness.append(sum(map(int, re.findall(r"\d+", color)[:3])))
    assert brightness[0] > 3 * 200
    assert brightness[1] < 3 * 50


@needs_chromium
def test_the_bundle_view_shows_the_shards(page: Page, door: StandInDoor) -> None:
    page.click("#to-bundle")
    page.wait(SHARDS)
    facts = page.text(".facts")
    for text in (
        "llama, 135 million parameters in float32",
        "8,192 tokens",
        "SHA-256",
        "sha256:9f86d0",
    ):
        assert text in facts
    rows = page.run("[...document.querySelectorAll('.shards tbody')].map((each) => each.innerText)")
    shards = bundle("tiny-chat", chat=True)["shards"]
    for row, shard, held in zip(rows, shards, ("layers 0–1", "layers 2–27", "layers 28–29"), strict=True):
        assert shard["name"] in row
        assert held in row
        assert f"{shard['milliseconds']:.1f} ms" in row
    assert "grpcs://trunk.example:7000" in rows[1]
    widths = page.run("[...document.querySelectorAll('.shards .filled')].map((each) => each.style.width)")
    assert widths[2] == "100%"
    page.click(".shards summary")
    assert shards[2]["files"][0]["sha256"] in page.text(".shards .files")
    choose(page, "#model", "tiny-base")
    page.wait("document.querySelector('#bundle h2').textContent === 'tiny-base'")
    assert "nothing: the files were taken as they are" in page.text(".facts")
    assert "not measured yet" in page.text(".shards")


@needs_chromium
@pytest.mark.parametrize(
    ("question", "message", "advice"),
    [
        ("busy", "All 8 rows are busy.", "Try again in 7 seconds."),
        ("proxy", "The server answered with status 502.", "its log says more"),
        ("break", "The stage “trunk” went away.", "What came so far stays."),
        ("cut", "The connection ended before the answer did.", "What came so far stays."),
    ],
)
def test_errors_say_what_to_do(question: str, message: str, advice: str, page: Page, door: StandInDoor) -> None:
    ask(page, question)
    shown = page.text(".note.error")
    assert message in shown
    assert advice in shown
    if question in ("break", "cut"):
        assert page.text(".answer .markdown").startswith("You said:")
    else:
        ask(page, "another")  # the question without an answer isn't sent along
        assert door.asked[-1]["messages"] == [{"role": "user", "content": "another"}]


@needs_chromium
def test_endings_are_explained(page: Page) -> None:
    ask(page, "length")
    assert "The answer was cut" in page.text(".note")
    ask(page, "tools")
    assert "The model asks for a tool." in page.text(".note")
    assert page.text(".answer pre code") == 'look_up {"place": "<b>"}'


@needs_chromium
def test_a_server_that_is_gone(browser: Chromium) -> None:
    with StandInDoor() as door:
        opened = browser.page(door.url)
        opened.wait(READY)
    with opened as page:
        ask(page, "hello")
        assert "The server can’t be reached." in page.text(".note.error")
        page.click("#to-bundle")
        page.wait("!document.getElementById('notice').hidden")
        assert "See whether it still runs, then try again." in page.text("#notice")


@needs_chromium
def test_a_key_is_asked_for_and_kept_in_the_tab(browser: Chromium) -> None:
    with StandInDoor(key="sesame") as door, browser.page(door.url, width=PHONE, height=740) as page:
        for key in ("wrong", "sesame"):
            page.wait("document.activeElement.id === 'key'")
            page.type(key)
            page.press("Enter")
            if key == "wrong":
                page.wait("document.getElementById('key-message').textContent.includes('doesn’t accept')")
        page.wait(READY)
        ask(page, "hello")
        assert "You said: hello" in page.text(".answer .markdown")
        page.go(door.url)
        page.wait(READY)
        assert page.run("document.querySelectorAll('.turn').length") == 0
        page.click("#forget-key")
        ask(page, "hello")
        page.wait("!document.getElementById('key-form').hidden")
        assert page.run("document.documentElement.scrollWidth <= innerWidth")
        page.type("sesame")
        page.click("#key-form button")
        page.wait("document.querySelector('.answer .markdown').innerText.includes('You said: hello')")
        assert page.problems == []


@needs_chromium
def test_keys_of_the_keyboard(page: Page, door: StandInDoor) -> None:
    assert page.run("document.activeElement.id") == "question"
    page.type("one")
    page.press("Enter", shift=True)
    page.type("two")
    assert door.asked == []
    page.press("Enter")
    page.wait("document.querySelector('.turn')")
    page.wait(IDLE)
    assert door.asked[0]["messages"][-1]["content"] == "one\ntwo"
    assert page.run("document.activeElement.id") == "question"
    page.press("Tab")
    assert page.run("document.activeElement.id") == "send"


@needs_chromium
def test_retry_edit_and_a_new_chat(page: Page, door: StandInDoor) -> None:
    page.run("document.getElementById('system').value = 'Be brief.'")
    ask(page, "first")
    ask(page, "second")
    page.click(".turn button", "Retry")
    page.wait(f"{IDLE} && document.querySelectorAll('.turn')[1].innerText.includes('Retry')")
    assert len(door.asked) == 3
    assert door.asked[1] == door.asked[2]
    page.click(".turn button", "Edit")
    assert page.run("document.getElementById('question').value") == "second"
    page.type(" changed")
    page.press("Enter")
    page.wait(f"{IDLE} && document.querySelectorAll('.turn')[1].innerText.includes('You said: second changed')")
    roles = [(each["role"], each["content"].strip()) for each in door.asked[-1]["messages"]]
    assert roles == [
        ("system", "Be brief."),
        ("user", "first"),
        ("assistant", "You said: first"),
        ("user", "second changed"),
    ]
    page.click(".turn button", "Edit")
    page.press("Escape")
    assert page.run("document.getElementById('question').value") == ""
    page.click("#new-chat")
    assert page.run("document.querySelectorAll('.turn').length") == 0
    ask(page, "third")
    assert [each["content"] for each in door.asked[-1]["messages"]] == ["Be brief.", "third"]


@needs_chromium
def test_only_touched_controls_are_sent(page: Page, door: StandInDoor) -> None:
    def fill(name: str, text: str) -> None:
        page.run(f"document.getElementById({json.dumps(name)}).select()")
        page.type(text)

    page.click("#sampling-panel > summary")
    fill("sampling-temperature", "0.7")
    fill("sampling-top_k", "40")
    fill("stop-texts", "END\n\\n\\n")
    assert page.text("#sampling-panel summary") == "Sampling · 3 set"
    ask(page, "hello")
    usual = {"model", "messages", "stream", "stream_options"}
    sent = {name: value for name, value in door.asked[-1].items() if name not in usual}
    assert sent == {"temperature": 0.7, "top_k": 40, "stop": ["END", "\n\n"]}
    fill("sampling-top_p", "7")
    ask(page, "hello")
    assert "“Top P” takes a number from 0.01 to 1." in page.text(".note.error")
    assert page.run("document.activeElement.id") == "sampling-top_p"
    assert len(door.asked) == 1
    page.click("#sampling-reset")
    ask(page, "hello")
    assert door.asked[-1].keys() == usual


@needs_chromium
def test_a_model_without_a_chat_template_continues_texts(page: Page, door: StandInDoor) -> None:
    choose(page, "#model", "tiny-base")
    page.wait("document.getElementById('mode').value === 'text'")
    choose(page, "#mode", "chat")
    ask(page, "Once upon")
    assert "no chat template" in page.text(".note.error")
    page.click(".note button", "Continue this text instead")
    page.wait(f"{IDLE} && document.querySelector('.turn.text')")
    usual = {"model": "tiny-base", "stream": True, "stream_options": {"include_usage": True}}
    assert door.asked[-1] == usual | {"prompt": "Once upon", "max_tokens": 512}
    assert page.text(".turn.text .answer > .plain").startswith("You said: Once upon")
    page.click(".turn button", "Go on")
    page.wait("document.querySelectorAll('.turn').length === 2")
    page.wait(IDLE)
    assert door.asked[-1]["prompt"] == "Once uponYou said: Once upon "


@needs_chromium
def test_a_saved_chat_can_be_read_by_the_command(page: Page, tmp_path: Path) -> None:
    page.downloads_to(tmp_path)
    ask(page, "hello")
    page.click("#save-chat")
    page.wait(IDLE)
    saved: list[Path] = []
    while not saved:
        saved = list(tmp_path.glob("chat-tiny-chat-*.json"))
        page.run("new Promise((done) => setTimeout(done, 20))")
    messages, tools = read_messages(str(saved[0]))
    assert messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "You said: hello "}]
    assert tools is None


MARKDOWN: dict[str, str] = {
    "": "",
    "a *b* **c** ***d*** `e`": "<p>a <em>b</em> <strong>c</strong> <strong><em>d</em></strong> <code>e</code></p>",
    "**a *b* c** and *a **b** c*": "<p><strong>a <em>b</em> c</strong> and <em>a <strong>b</strong> c</em></p>",
    "snake_case_name, _it_ and 2 * 3 * 4": "<p>snake_case_name, <em>it</em> and 2 * 3 * 4</p>",
    "**open, *open, `open": "<p>**open, *open, `open</p>",
    r"\*a\* \(x\)": r"<p>*a* \(x\)</p>",
    "``a ` b`` and `**c**`": "<p><code>a ` b</code> and <code>**c**</code></p>",
    "one\ntwo\r\n\r\nthree": "<p>one<br>two</p><p>three</p>",
    "# A\n### B *c*\n#no": "<h4>A</h4><h6>B <em>c</em></h6><p>#no</p>",
    "text:\n- a\n- b\n  more": "<p>text:</p><ul><li><p>a</p></li><li><p>b<br>more</p></li></ul>",
    "3. a\n   - b\n4. c": '<ol start="3"><li><p>a</p><ul><li><p>b</p></li></ul></li><li><p>c</p></li></ol>',
    "in\n1999. Yes": "<p>in<br>1999. Yes</p>",
    "> a\n> b\n\n---": "<blockquote><p>a<br>b</p></blockquote><hr>",
    "<b>&amp;</b> [a](javascript:b) ![c](d)": "<p>&lt;b&gt;&amp;amp;&lt;/b&gt; [a](javascript:b) ![c](d)</p>",
}


@needs_chromium
def test_markdown(modules: Page) -> None:
    shown = modules.run(
        f"""import('./markdown.js').then(({{ MarkdownView }}) => {json.dumps(list(MARKDOWN))}.map((text) => {{
            const place = document.createElement('div');
            const view = new MarkdownView(place);
            for (let end = 0; end < text.length; end += 1) view.update(text.slice(0, end)); // as a stream brings it
            view.update(text);
            return place.innerHTML;
        }}))"""
    )
    assert dict(zip(MARKDOWN, shown, strict=True)) == MARKDOWN


@needs_chromium
def test_code_blocks(modules: Page) -> None:
    cases = {
        "```python\na = '*b*'\n\n```\nc": ["a = '*b*'\n", "c"],
        "~~~\n```\n~~~": ["```"],
        "````\n```\n````": ["```"],
        "```\nnot closed": ["not closed"],
        "- a\n  ```\n  b\n   c\n  ```": ["b\n c"],
    }
    shown = modules.run(
        f"""import('./markdown.js').then(({{ MarkdownView }}) => {json.dumps(list(cases))}.map((text) => {{
            const place = document.createElement('div');
            new MarkdownView(place).update(text);
            return [...place.querySelectorAll('pre, :scope > p')].map((each) => each.textContent);
        }}))"""
    )
    assert dict(zip(cases, shown, strict=True)) == cases


@needs_chromium
def test_no_text_keeps_the_page_busy(modules: Page) -> None:
    """Each of these takes minutes or more where the parser is quadratic."""
    many = 200_000
    repeated = ["*a ", "**", "_a", "`", "` `` ", "[", "> ", "- ", "# ", "***a", "\\", "```a", " - a\n", "**a* "]
    texts = [each * (many // len(each)) for each in repeated]
    texts += ["```" + "a" * many + "`", "`` " + "a" * many + "``", "-" * many + "a", "`" + " " * many + "`"]
    modules.run(
        f"""import('./markdown.js').then(({{ MarkdownView }}) => {{
            for (const text of {json.dumps(texts)}) new MarkdownView(document.createElement('div')).update(text);
        }})"""
    )


@needs_chromium
def test_events_are_read_however_they_are_cut(modules: Page) -> None:
    stream = ": hello\ndata: one\n\ndata:two\r\ndata: ä€\r\n\r\nevent: x\rdata: three\r\rdata: dropped"
    expected = ["one", "two\nä€", "three"]
    found: Any = modules.run(
        f"""import('./stream.js').then(async ({{ events }}) => {{
            const bytes = new TextEncoder().encode({json.dumps(stream)});
            const all = [];
            for (let size = 1; size <= bytes.length; size += 1) {{
                const body = new ReadableStream({{ start(control) {{
                    for (let at = 0; at < bytes.length; at += size) control.enqueue(bytes.slice(at, at + size));
                    control.close();
                }} }});
                const found = [];
                for await (const data of events(body)) found.push(data);
                all.push(JSON.stringify(found));
            }}
            return [...new Set(all)].map((each) => JSON.parse(each));
        }})"""
    )
    assert found == [expected]
