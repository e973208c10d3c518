"""Hold a tokenizer against the golden texts and chats of its bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from splitbundle.errors import BundleError, Problem, quoted
from splitbundle.format.text_document import FILE

if TYPE_CHECKING:
    from splitbundle.text.huggingface import TextTokenizer

_HINT = "The tokenizer was changed, or this version of the library tokenizers reads it in another way"


def check(tokenizer: TextTokenizer, *, chats: bool) -> int:
    """Encode and decode every golden text of a bundle, and render every golden chat.

    Args:
        tokenizer: the bundle's tokenizer.
        chats: whether to render the golden chats. This needs the library jinja2.

    Returns:
        The number of texts and chats that were checked.

    Raises:
        BundleError: ``text.ids`` with every difference; ``text.template``, ``text.tokenizer``.
    """
    document = tokenizer.document
    if document is None:
        return 0
    problems = []
    for i, case in enumerate(document.cases):
        found = {
            "ids": tuple(tokenizer.encode(case.text)),
            "control_ids": tuple(tokenizer.encode(case.text, control_tokens=True)),
            "decoded": tokenizer.decode(case.control_ids),
        }
        problems += [
            _problem(f"/cases/{i}/{name}", getattr(case, name), value, f"the text {quoted(case.text)}")
            for name, value in found.items()
            if value != getattr(case, name)
        ]
    for i, chat in enumerate(document.chats if chats else ()):
        messages = [{"role": role, "content": content} for role, content in chat.messages]
        ids = tuple(tokenizer.apply_chat_template(messages, add_generation_prompt=chat.add_generation_prompt))
        if ids != chat.ids:
            what = f"the chat that begins with {quoted(chat.messages[0][1])}"
            problems.append(_problem(f"/chats/{i}/ids", chat.ids, ids, what))
    if problems:
        raise BundleError(problems)
    return len(document.cases) + (len(document.chats) if chats else 0)


def _problem(pointer: str, expected: Sequence[object], got: Sequence[object], what: str) -> Problem:
    """Return the problem of a difference, with the values from shortly before the first place where they differ."""
    pairs = enumerate(zip(expected, got, strict=False))
    place = next((i for i, (one, other) in pairs if one != other), min(len(expected), len(got)))
    first = max(0, place - 2)
    wanted, found = (f"{quoted(each[first : first + 8])} from place {first} on" for each in (expected, got))
    return Problem(code="text.ids", file=FILE, pointer=pointer, expected=f"{wanted}, for {what}", got=found, hint=_HINT)
