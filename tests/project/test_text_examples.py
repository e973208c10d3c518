"""The programs in examples/text print the texts that a pipeline completes.

Each runs where one backend, tokenizers and jinja2 are the only libraries.
"""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import splitbundle
import splitbundle_converter
from tests.support.paths import ROOT, TESTS

EXAMPLES = ROOT / "examples" / "text"
BARRED = TESTS / "environments" / "barred.py"
PROMPT = "Licensed under the Apache License"
SECONDS = 600
both_backends = pytest.mark.parametrize("backend", ["onnxruntime", pytest.param("torch", marks=pytest.mark.long)])


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The license model as three shards, with graphs."""
    output = tmp_path_factory.mktemp("examples") / "license.splitbundle"
    source = ROOT / "examples" / "license-gpt2"
    return splitbundle_converter.convert(source, output, split=[2, 4], onnx=True, check=False)


@pytest.fixture(scope="module")
def complete(bundle: splitbundle.Bundle) -> Callable[..., str]:
    """Returns the text that follows a prompt."""
    pipeline = bundle.pipeline(backend="onnxruntime", threads=1)
    return lambda prompt, **options: pipeline.complete_text(prompt, **options).text


def run(*command: str | Path, stdin: str = "", **settings: Any) -> str:
    """Return what a command prints. It must end well, and say nothing on stderr."""
    done = subprocess.run(
        [str(part) for part in command], input=stdin, capture_output=True, text=True, timeout=SECONDS, **settings
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def barred(libraries: str, name: str) -> list[str | Path]:
    """Return the command of an example, which can import these libraries alone."""
    return [sys.executable, BARRED, f"{libraries},text", EXAMPLES / name]


@pytest.mark.parametrize("backend", ["torch", "onnxruntime"])
def test_ten_lines(backend: str, bundle: splitbundle.Bundle, complete: Callable[..., str]) -> None:
    out = run(*barred(backend, "ten_lines.py"), bundle.path, PROMPT)
    assert out == complete(PROMPT, max_new_tokens=40) + "\n"
    assert out.startswith(', Version 2.0 (the "License");')
    code = [
        line for line in (EXAMPLES / "ten_lines.py").read_text("utf-8").partition('"""\n\n')[2].splitlines() if line
    ]
    assert len(code) <= 10


@pytest.mark.parametrize(
    "name", ["ten_lines", "thread_pool", "forked_worker", "asyncio_server", "pipe_client", "pipe_trunk"]
)
def test_without_arguments_a_usage_line(name: str) -> None:
    done = subprocess.run(
        [sys.executable, EXAMPLES / f"{name}.py"], capture_output=True, encoding="utf-8", timeout=SECONDS
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"usage: python {name}.py BUNDLE")
    assert len(done.stderr.splitlines()) == 1


@both_backends
def test_threads_with_sessions_of_their_own(
    backend: str, bundle: splitbundle.Bundle, complete: Callable[..., str]
) -> None:
    """There are more prompts than threads, so that sessions are used again."""
    first = ("Licensed under", "You may obtain", "limitations under", "Unless required", "WITHOUT", "a copy of")
    prompts = [*first, *(f"{prompt} the" for prompt in first), *first]
    out = run(*barred(backend, "thread_pool.py"), bundle.path, *prompts)
    one_by_one = [repr(prompt + complete(prompt, max_new_tokens=24)) for prompt in prompts]
    assert out.splitlines() == one_by_one


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@both_backends
def test_a_forked_worker(backend: str, bundle: splitbundle.Bundle, complete: Callable[..., str]) -> None:
    out = run(*barred(backend, "forked_worker.py"), bundle.path, PROMPT)
    assert out == complete(PROMPT, max_new_tokens=40) + "\n"


FORK = """
import os, signal, sys, threading
import splitbundle
from splitbundle.stages.text_pipeline import TextPipeline

bundle = splitbundle.open(sys.argv[1])
pipeline, loading, go = TextPipeline(), threading.Event(), threading.Event()

class Slow:
    def tokenizer(self):
        loading.set()
        go.wait()
        return bundle.tokenizer()

pipeline.bundle = Slow()
thread = threading.Thread(target=pipeline.tokenizer)
thread.start()
loading.wait()
child = os.fork()
if not child:
    signal.alarm(120)  # a child that hangs ends by this signal
    own = TextPipeline()
    own.bundle = bundle
    print(len(own.tokenizer().encode("Licensed under")), flush=True)
    os._exit(0)
status = os.waitpid(child, 0)[1]
go.set()
thread.join()
sys.exit(os.waitstatus_to_exitcode(status) != 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_another_thread_loads_a_tokenizer(bundle: splitbundle.Bundle) -> None:
    assert run(sys.executable, "-c", FORK, bundle.path) == "4\n"


@pytest.mark.parametrize(
    "backends",
    [
        ("onnxruntime", "onnxruntime"),
        pytest.param(("onnxruntime", "torch"), marks=pytest.mark.long),
        pytest.param(("torch", "onnxruntime"), marks=pytest.mark.long),
    ],
)
def test_two_processes_and_a_pipe(
    backends: tuple[str, str], bundle: splitbundle.Bundle, complete: Callable[..., str], tmp_path: Path
) -> None:
    """Each process has the files of its own shards, and a backend of its own."""
    ends = bundle.extract(tmp_path / "ends.splitbundle", "bottom", "top", text=True)
    trunk = bundle.extract(tmp_path / "trunk.splitbundle", "trunk")
    here, there = (f"{backend},numpy" for backend in backends)
    command = [*barred(here, "pipe_client.py"), ends.path, PROMPT, *barred(there, "pipe_trunk.py"), trunk.path]
    assert run(*command) == complete(PROMPT, max_new_tokens=40) + "\n"


@both_backends
def test_an_asyncio_server(backend: str, bundle: splitbundle.Bundle, complete: Callable[..., str]) -> None:
    command = [str(part) for part in (*barred(backend, "asyncio_server.py"), bundle.path, "0")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        assert server.stderr is not None
        try:
            port = int(server.stdout.readline().rpartition(" ")[2])
            prompts = [PROMPT, "You may obtain", "word " * 400]
            clients = [socket.create_connection(("localhost", port), timeout=SECONDS) for _ in prompts]
            for client, prompt in zip(clients, prompts, strict=True):
                client.sendall(f"{prompt}\n".encode())
            answers = [client.makefile("rb").read().decode() for client in clients]
        finally:
            server.terminate()
        assert server.stderr.read() == ""
    assert answers[:2] == [complete(prompt) for prompt in prompts[:2]]
    assert answers[2].startswith("error: [input.position]")


def example(name: str) -> ModuleType:
    """Import an example."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Recording:
    """A pipeline that remembers the generations that it began."""

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.begun: list[Any] = []

    def stream_text(self, *args: Any, **options: Any) -> Any:
        self.begun.append(self.pipeline.stream_text(*args, **options))
        return self.begun[-1]


@pytest.fixture(params=["torch", "onnxruntime"])
def recording(request: pytest.FixtureRequest, bundle: splitbundle.Bundle) -> Recording:
    return Recording(bundle.pipeline(backend=request.param, threads=1))


def test_a_cancelled_task_ends_its_generation(recording: Recording, complete: Callable[..., str]) -> None:
    stream = example("asyncio_server").stream
    pieces: list[str] = []

    async def collect() -> None:
        async for piece in stream(recording, PROMPT):
            pieces.append(piece)
            if len(pieces) == 3:
                task.cancel()

    async def main() -> None:
        nonlocal task
        task = asyncio.create_task(collect())
        with pytest.raises(asyncio.CancelledError):
            await task

    task: asyncio.Task[None]
    asyncio.run(main())  # it waits for the thread, too
    (generation,) = recording.begun
    assert generation.finish_reason == "cancelled"
    assert complete(PROMPT).startswith("".join(pieces))
    assert generation.text.startswith("".join(pieces))
    assert len(generation.ids) < 10
    assert next(generation, None) is None


def test_a_client_that_goes_away_ends_its_generation(recording: Recording, complete: Callable[..., str]) -> None:
    module = example("asyncio_server")

    async def ask(port: int, *, stay: bool) -> bytes:
        reader, writer = await asyncio.open_connection("localhost", port)
        writer.write(f"{PROMPT}\n".encode())
        text = await (reader.read() if stay else reader.read(1))
        writer.close()
        return text

    async def main() -> list[bytes]:
        # One text at a time: the second client gets its turn only if the first generation ends.
        module.MAX_AT_ONCE = 1
        server = await asyncio.start_server(module.Server(recording).serve, "localhost", 0)
        port = server.sockets[0].getsockname()[1]
        answers = [await ask(port, stay=stay) for stay in (False, True)]
        server.close()
        return answers

    begun, answered = asyncio.run(asyncio.wait_for(main(), SECONDS))
    assert answered.decode() == complete(PROMPT)
    assert answered.startswith(begun)
    assert [generation.finish_reason for generation in recording.begun] == ["cancelled", "stop"]


@pytest.fixture(scope="module")
def chat_bundle(tmp_path_factory: pytest.TempPathFactory) -> splitbundle.Bundle:
    """The license model with a chat template that writes the messages one after the other."""
    directory = tmp_path_factory.mktemp("chat")
    source = Path(shutil.copytree(ROOT / "examples" / "license-gpt2", directory / "source"))
    config = json.loads((source / "tokenizer_config.json").read_text("utf-8"))
    config["chat_template"] = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (source / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
    return splitbundle_converter.convert(source, directory / "chat.splitbundle", onnx=True, check=False)


def check_app(
    app: list[str | Path],
    bundle: splitbundle.Bundle,
    chat_bundle: splitbundle.Bundle,
    complete: Callable[..., str],
    **settings: Any,
) -> None:
    """Check what the app prints for a text and for a chat."""
    lines = [PROMPT, "You may obtain"]
    out = run(*app, bundle.path, stdin="\n".join(lines), **settings)
    assert out == "".join(f"{complete(line, max_new_tokens=40)}\n" for line in lines)
    answer = complete(PROMPT, max_new_tokens=40)
    out = run(*app, chat_bundle.path, stdin=f"{PROMPT}\n and\n", **settings)
    assert out == f"{answer}\n{complete(f'{PROMPT}{answer} and', max_new_tokens=40)}\n"


def test_the_app(bundle: splitbundle.Bundle, chat_bundle: splitbundle.Bundle, complete: Callable[..., str]) -> None:
    check_app(barred("onnxruntime", "app/__main__.py"), bundle, chat_bundle, complete)


def test_the_app_as_a_zip(
    bundle: splitbundle.Bundle, chat_bundle: splitbundle.Bundle, complete: Callable[..., str], tmp_path: Path
) -> None:
    """The zip has the package: this checkout isn't on the path."""
    app = tmp_path / "app.pyz"
    assert run(sys.executable, EXAMPLES / "app" / "build.py", "zipapp", app).endswith(" MB in 1 files\n")
    program = f"""
import runpy, sys
sys.path = [path for path in sys.path if path and (not path.startswith({str(ROOT)!r}) or "site-packages" in path)]
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
assert "app.pyz" in sys.modules["splitbundle"].__file__
"""
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command: list[str | Path] = [sys.executable, "-c", program, app]
    check_app(command, bundle, chat_bundle, complete, cwd=tmp_path, env=clean)


@pytest.mark.long
def test_the_app_that_pyinstaller_freezes(
    bundle: splitbundle.Bundle, chat_bundle: splitbundle.Bundle, complete: Callable[..., str], tmp_path: Path
) -> None:
    subprocess.run(
        [sys.executable, EXAMPLES / "app" / "build.py", "pyinstaller", tmp_path / "dist"], check=True, timeout=SECONDS
    )
    files = {path.name for path in (tmp_path / "dist" / "app" / "_internal").iterdir()}
    assert {"onnxruntime", "tokenizers", "markupsafe"} <= files
    assert files.isdisjoint({"torch", "transformers", "onnx", "huggingface_hub"})
    check_app([tmp_path / "dist" / "app" / "app"], bundle, chat_bundle, complete, env={})
