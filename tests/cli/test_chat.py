"""The commands for text: chat on a terminal and through a pipe, chats in a file, and perplexity."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import pty
import re
import select
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle_converter
from splitbundle.cli import chat_terminal, main, perplexity
from splitbundle.cli.console import Console
from tests.support.paths import ROOT

EXAMPLE = ROOT / "examples" / "license-gpt2"
TEMPLATE = """{%- for m in messages -%}
{%- if m.role not in ('system', 'user', 'assistant') %}{{ raise_exception('no such role') }}{% endif -%}
{{- m.content }}{% if m.role == 'system' %}<|endoftext|>{% endif %}
{%- endfor -%}"""
QUESTION = "Licensed under the Apache"
pytestmark = pytest.mark.usefixtures("one_thread")
ANSWER = " License, Ver"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained example with a chat template that puts the messages one after another."""
    place = tmp_path_factory.mktemp("chat")
    source = Path(shutil.copytree(EXAMPLE, place / "source"))
    (source / "chat_template.jinja").write_text(TEMPLATE)
    return splitbundle_converter.convert(source, place / "chat.splitbundle", split=[2, 4]).path


@pytest.fixture
def talk(bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """A function that gives lines to the command, and returns its exit status, its stdout and its stderr."""

    def run(lines: str, *options: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode()), "utf-8"))
        status = main.main(["chat", str(bundle), "-n", "5", *options])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_answers_through_a_pipe(talk: Any) -> None:
    status, out, err = talk(f"{QUESTION}\n\n sion\n")
    assert (status, out.splitlines()[0]) == (0, ANSWER)
    assert len(out.splitlines()) >= 2
    computed = re.findall(r"for (\d+) new tokens of a prompt of (\d+)\]", err)
    assert [int(total) for _, total in computed] == [int(computed[0][1]), int(computed[1][1])]
    assert computed[0][0] == computed[0][1]
    assert int(computed[1][0]) < int(computed[0][0]) + 5  # the second turn computes what is new
    assert "The answer ends after 5 tokens, as --max-new-tokens says." in err


def test_json_has_pieces_and_messages(talk: Any) -> None:
    status, out, _ = talk(f"{QUESTION}\n", "--json", "--quiet")
    documents = [json.loads(line) for line in out.splitlines()]
    assert status == 0
    assert "".join(each["text"] for each in documents[:-1]) == ANSWER
    assert documents[-1]["content"] == ANSWER
    assert (documents[-1]["role"], documents[-1]["finish_reason"], documents[-1]["new_tokens"]) == (
        "assistant",
        "length",
        5,
    )


def test_a_chat_is_saved_and_goes_on(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    _, _, err = talk(f"{QUESTION}\n/save {path}\n/save {path}\n/save\n/save {tmp_path}/no/x\n", "--system", "Be brief")
    assert "The chat was written to" in err
    assert "exists already. Give another name." in err
    assert "Give the name of a file" in err
    assert "can't be written: No such file or directory" in err
    assert [each.name for each in tmp_path.iterdir()] == ["chat.json"]
    saved = json.loads(path.read_text())
    answer = saved["messages"][-1]["content"]
    assert saved == {
        "messages": [
            {"role": "system", "content": "Be brief"},
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": answer},
        ]
    }
    assert answer.startswith(" License")
    other = tmp_path / "other.json"
    talk(f" 2\n/undo\n/save {other}\n", "--messages", str(path))
    assert json.loads(other.read_text()) == saved
    last = tmp_path / "last.json"
    talk(f"/reset\n{QUESTION}\n/system\n/save {last}\n", "--messages", str(path))
    assert json.loads(last.read_text()) == {"messages": []}


def test_several_lines_are_one_message(talk: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    _, _, err = talk(f'a \\\nb\n"""\nc\n\n/d\n"""\n /nothing\n/nothing\n/etc/x\n/save "{path}"\n/exit\nmore\n')
    questions = [each["content"] for each in json.loads(path.read_text())["messages"] if each["role"] == "user"]
    assert questions == ["a \nb", "c\n\n/d", " /nothing", "/etc/x"]
    assert "There is no command '/nothing': /help lists them." in err


@pytest.mark.parametrize(
    "lines", ['"""\nLicensed under\nthe Apache', "Licensed under\\\nthe Apache", "Licensed under the\\"]
)
def test_the_end_of_the_input_ends_a_message(talk: Any, lines: str) -> None:
    status, out, err = talk(lines)
    assert (status, "[5 tokens" in err) == (0, True)
    assert out.strip()


def test_a_line_on_a_terminal_that_is_no_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python raises or keeps surrogates, as the locale is. readline may leave the bytes out."""
    lines = [UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "no"), "caf\udce9", "caf\udcc3\udca9", EOFError()]

    def read(prompt: str) -> str:
        line = lines.pop(0)
        if isinstance(line, Exception):
            raise line
        return str(line)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(chat_terminal, "on_terminal", lambda console: True)
    err = io.StringIO()
    assert list(chat_terminal.questions(Console(as_json=False, quiet=False, err=err))) == ["café"]
    assert err.getvalue().count("This line isn't UTF-8. It was left out.") == 2


def test_a_chat_is_saved_where_files_have_one_name(talk: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path = tmp_path / "chat.json"
    _, _, err = talk(f"{QUESTION}\n/save {path}\n/save {path}\n")
    assert len(json.loads(path.read_text())["messages"]) == 2
    assert "exists already" in err
    assert [each.name for each in tmp_path.iterdir()] == ["chat.json"]


def test_a_chat_that_is_too_long_loses_its_oldest_turns(talk: Any) -> None:
    long = "Licensed under the Apache License, Version 2.0 (the License) you may not use this file except " * 2
    status, out, err = talk(f"{long}\n" * 4, "--system", "Be brief")
    assert (status, len(out.splitlines()) >= 4) == (0, True)
    assert "The oldest turn was left out: the chat is longer than the model's context of 256 tokens." in err
    status, _, err = talk("a b c d " * 200 + "\n")
    assert status == 1
    assert "[input.position] prompt: expected at most 256 tokens, the model's context" in err


def test_a_template_that_refuses_says_why(talk: Any, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps([{"role": "oracle", "content": "a"}]))
    status, _, err = talk("b\n", "--messages", str(tmp_path / "x.json"))
    assert (status, "no such role" in err) == (1, True)
    (tmp_path / "x.json").write_text(json.dumps([{"role": "user", "content": QUESTION}]), encoding="utf-8-sig")
    assert talk("b\n", "--messages", str(tmp_path / "x.json"))[0] == 0
    (tmp_path / "x.json").write_text(json.dumps([{"role": "user", "content": QUESTION}, 3]))
    status, _, err = talk("b\n", "--messages", str(tmp_path / "x.json"))
    assert (status, "got 3 as messages[1]" in err) == (2, True)
    assert talk("b\n", "--messages", "-")[0] == 2
    for content in ("{", "[]", "[1]", '{"messages": [{"role": "user"}], "tools": 3}', b"\xff".decode("latin-1")):
        (tmp_path / "x.json").write_text(content, encoding="latin-1")
        assert talk("b\n", "--messages", str(tmp_path / "x.json"))[0] == 2
    assert talk("b\n", "--messages", str(tmp_path / "none.json"))[0] == 2


def test_thinking_is_shown_apart_or_hidden() -> None:
    for hidden, expected in ((False, "[thinking]\nso\n[answer]\nthis\n"), (True, "this\n")):
        out = io.StringIO()
        view = chat_terminal.View(Console(as_json=False, quiet=False, out=out), hidden=hidden)
        for thinks, text in ((True, "s"), (True, "o"), (False, "\n"), (False, "\nth"), (False, "is")):
            view.show(thinks, text)
        view.end()
        assert out.getvalue() == expected


def test_generate_answers_a_chat_of_a_file(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chat.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": QUESTION}]}))
    assert main.main(["generate", str(bundle), "--messages", str(path), "-n", "5"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"
    command = ["generate", str(bundle), "--messages", str(path), "-n", "60", "--stop", "Version 2", "--json"]
    assert main.main([*command, "--logprobs", "2"]) == 0
    last = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (last["text"], last["ended_by"], last["stopped_by"]) == (" License, ", "stop", "Version 2")
    assert [each["id"] for each in last["logprobs"]] == last["ids"]
    assert all(each["top"][0]["id"] == each["id"] and len(each["top"]) == 2 for each in last["logprobs"])
    with pytest.raises(SystemExit):
        main.main(["generate", str(bundle), "x", "--min-p", "2"])
    wrong: tuple[tuple[str, ...], ...] = (
        ("x", "--messages", str(path)),
        ("x", "--chat-template", "default"),
        ("x", "--logprobs", "2"),
        ("--ids", "1,2", "--stop", "4"),
    )
    for options in wrong:
        assert main.main(["generate", str(bundle), *options]) == 2
    with pytest.raises(SystemExit):
        main.main(["generate", str(bundle), "x", "--logit-bias", "1:2,1:3"])
    capsys.readouterr()


def test_verify_checks_the_texts_of_a_part(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, options, some in (("with", ["--text"], True), ("without", [], False)):
        part = str(tmp_path / name)
        assert main.main(["extract", str(bundle), "--shard", "bottom", "-o", part, "-q", *options]) == 0
        capsys.readouterr()
        assert main.main(["verify", part, "--json"]) == 0
        assert (json.loads(capsys.readouterr().out)["golden_texts"] > 0) is some


def test_messages_from_standard_input(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = json.dumps([{"role": "user", "content": QUESTION}]).encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(chat), "utf-8"))
    assert main.main(["generate", str(bundle), "--messages", "-", "-n", "5"]) == 0
    assert capsys.readouterr().out == f"{ANSWER}\n"


def test_sampling_by_the_command(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def text(*options: str) -> str:
        assert main.main(["generate", str(bundle), QUESTION, "-n", "12", "-q", *options]) == 0
        return capsys.readouterr().out

    greedy = text()
    assert text("--seed", "1") == greedy
    # A filter without a temperature draws at temperature 1.
    assert text("--top-k", "9", "--seed", "2") == text("--top-k", "9", "--seed", "2", "--temperature", "1")
    assert len({text("--top-k", "400", "--logit-bias", "12:9", "--seed", str(seed)) for seed in range(6)}) > 1
    assert text("--top-k", "9", "--seed", "2", "--temperature", "0") == greedy
    assert text("--temperature", "3", "--top-k", "1") == greedy
    assert text("--temperature", "3", "--min-p", "1") == greedy
    assert text("--temperature", "3", "--seed", "1") != greedy
    assert text("--temperature", "3", "--seed", "1") == text("--temperature", "3", "--seed", "1")
    assert main.main(["generate", str(bundle), QUESTION, "-n", "1", "-q", "--json"]) == 0
    (first,) = json.loads(capsys.readouterr().out.splitlines()[-1])["ids"]
    assert text("--logit-bias", f"{first}:-100") != greedy
    assert text("--repetition-penalty", "1e6", "-n", "40") != text("-n", "40")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there are no pseudo-terminals")
@pytest.mark.parametrize("ending", ["exit", pytest.param("SIGTERM", marks=pytest.mark.long)])
def test_ctrl_c_stops_the_answer_and_not_the_program(bundle: Path, ending: str) -> None:
    """On a terminal: a long answer is stopped, and the next question is answered. SIGTERM ends the program."""
    primary, secondary = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "splitbundle", "chat", str(bundle), "--stop", "nothing ends it", "--threads", "1"],
        stdin=secondary,
        stdout=secondary,
        stderr=secondary,
        start_new_session=True,
        preexec_fn=lambda: __import__("fcntl").ioctl(0, __import__("termios").TIOCSCTTY, 0),
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(secondary)
    seen = ""

    def until(text: str) -> None:
        nonlocal seen
        while text not in seen:
            if not select.select([primary], [], [], 120)[0]:
                pytest.fail(f"{text!r} didn't come after {seen!r}")
            seen += os.read(primary, 4096).decode("utf-8", "replace")
        seen = seen.partition(text)[2]

    try:
        until("write a message, or /help.")
        until("> ")
        os.write(primary, b"/help\n")
        until("/undo")
        os.write(primary, f"{QUESTION}\n".encode())
        until("Version")  # the answer has begun
        os.write(primary, b"\x03")
        until("The answer was stopped.")
        until("> ")
        while not select.select([primary], [], [], 1)[0]:
            # A signal that comes just before readline waits is seen after the next key, so it may take another one.
            os.write(primary, b"\x03")
        until("To end, write /exit, or press Ctrl-D.")
        os.write(primary, b"/save /no/such/place\n")
        until("can't be written")
        if ending == "exit":
            os.write(primary, b"/exit\n")
            assert process.wait(60) == 0
        else:
            for _ in range(60):
                process.terminate()  # again, as one that comes just before readline waits is seen after the next key
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                    break
            assert process.returncode == 130
    finally:
        process.kill()
        os.close(primary)


def test_perplexity(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second half of each window is scored, as llama.cpp does it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = tmp_path / "text.txt"
    path.write_text((ROOT / "LICENSE").read_text()[:3000])
    model, tokenizer = AutoModelForCausalLM.from_pretrained(EXAMPLE), AutoTokenizer.from_pretrained(EXAMPLE)
    ids = tokenizer(path.read_text()).input_ids
    window, scores = 64, []
    for start in range(0, len(ids) - window + 1, window):
        row = torch.tensor([ids[start : start + window]])
        with torch.no_grad():
            logs = torch.log_softmax(model(row).logits[0].double(), dim=-1)
        scores += [float(logs[i, row[0, i + 1]]) for i in range(window // 2, window - 1)]
    assert main.main(["perplexity", str(bundle), str(path), "--window", str(window), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(math.exp(-sum(scores) / len(scores)), rel=1e-5)
    assert (found["scored_tokens"], found["tokens"]) == (len(scores), len(ids))
    assert main.main(["perplexity", str(bundle), str(path), "--window", str(window), "--per-token"]) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) == len(scores) + 1
    path.write_text("Licensed under the Apache License")
    assert main.main(["perplexity", str(bundle), str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["scored_tokens"] == 6
    for wrong in (["--window", "257"], ["--window", "3"]):
        assert main.main(["perplexity", str(bundle), str(path), *wrong]) == 2
    path.write_bytes(b"\xff")
    assert main.main(["perplexity", str(bundle), str(path)]) == 2
    path.write_text("")
    assert main.main(["perplexity", str(bundle), str(path)]) == 2
    assert main.main(["perplexity", str(bundle), str(tmp_path / "none")]) == 2


def test_windows() -> None:
    assert perplexity.divided(list(range(10)), 4) == [(0, 4, 3), (4, 8, 3)]
    assert perplexity.divided(list(range(3)), 4) == [(0, 3, 1)]
    assert perplexity.divided(list(range(8)), 8) == [(0, 8, 5)]
