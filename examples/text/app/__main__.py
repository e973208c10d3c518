"""Answer each line of standard input. The app needs onnxruntime and tokenizers; for chats, also jinja2.

    python examples/text/app license.splitbundle
    python examples/text/app/build.py zipapp app.pyz
    python examples/text/app/build.py pyinstaller dist

A line is a message of a chat if the bundle has a chat template. Otherwise the model continues it. The session keeps
what was computed, so the earlier turns of a chat aren't computed again.
"""

from __future__ import annotations

import sys
from typing import Any

import splitbundle


def main() -> int:
    """Return the exit status."""
    if len(sys.argv) != 2:
        print("usage: app BUNDLE", file=sys.stderr)
        return 2
    try:
        bundle = splitbundle.open(sys.argv[1])
        pipeline = bundle.pipeline(backend="onnxruntime")
        document = pipeline.tokenizer().document
        chats = document is not None and "default" in document.templates
        messages: list[dict[str, Any]] = []
        session = pipeline.session()
        for line in sys.stdin:
            text = line.rstrip("\r\n")
            messages.append({"role": "user", "content": text})
            with pipeline.stream_text(messages if chats else text, max_new_tokens=40, session=session) as answer:
                for piece in answer:
                    print(piece, end="", flush=True)
            print(flush=True)
            messages.append({"role": "assistant", "content": answer.text})
    except splitbundle.BundleError as error:
        print(f"app: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    for each in (sys.stdin, sys.stdout):
        each.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # whatever the system's setting says
    sys.exit(main())
