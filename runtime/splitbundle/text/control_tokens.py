"""Encode a rendered chat so that only its template makes control tokens, with the library ``tokenizers``."""

from __future__ import annotations

import re
import secrets
import threading
from collections.abc import Sequence
from typing import Final

from tokenizers import AddedToken, Encoding, Tokenizer

from splitbundle.errors import BundleError, Problem, quoted

TEMPLATE: Final = 0
"""The mark of a character that the chat template wrote."""
MODEL: Final = 1
"""The mark of a character that the model wrote."""
_MARKER: Final = re.compile(r"<[|｜].*[|｜]>", re.DOTALL)


class ControlTokens:
    """The control tokens of a tokenizer: the special ones, those written ``<|…|>``, and those in chat templates."""

    def __init__(self, tokenizer: Tokenizer, templates: Sequence[str]) -> None:
        """Find the control tokens.

        Args:
            tokenizer: the tokenizer. It isn't changed.
            templates: the texts of the bundle's chat templates.
        """
        self._source = tokenizer
        self.tokens: dict[int, AddedToken] = {
            number: token
            for number, token in tokenizer.get_added_tokens_decoder().items()
            if token.special or _MARKER.fullmatch(token.content) or any(token.content in text for text in templates)
        }
        self._lock = threading.Lock()
        self._plain: Tokenizer | None = None
        # A text can't guess these, so it can't spell them.
        secret = secrets.token_hex(16)
        self._gap = f"\ue000gap-{secret}\ue000"
        self._stand_ins = {
            (left, right): f"\ue000{left:d}{right:d}-{secret}\ue000"
            for left in (False, True)
            for right in (False, True)
        }

    def encode(self, text: str, marks: bytes, whole: Encoding) -> list[int]:
        """Return the ids of a text in which control tokens that the template didn't write are text.

        Args:
            text: the text of a rendered chat.
            marks: who wrote each character: 0 the template, 1 the model, 2 anyone else. In what the model wrote, tokens
                such as ``<think>`` are tokens: they aren't special, and not written ``<|…|>``.
            whole: the text with all its control tokens, as the tokenizer encodes it.

        Raises:
            BundleError: ``text.token`` if text can't be kept from becoming a control token.
        """
        kept: list[tuple[int, int, int]] = []
        forged: list[int] = []
        ids = whole.ids
        # Only few tokens are control tokens. A list of all offsets would take a fifth of the library's own time.
        for place in [place for place, number in enumerate(ids) if number in self.tokens]:
            number, (start, stop) = ids[place], whole.token_to_chars(place) or whole.offsets[place]
            token = self.tokens[number]
            at = text.find(token.content, start, stop)  # the offsets may include spaces around it
            first, end = (start, stop) if at < 0 else (at, at + len(token.content))
            mark = max(marks[first:end], default=TEMPLATE)
            if mark == TEMPLATE or (mark == MODEL and _is_of_the_model(token)):
                kept.append((first, end, number))
            else:
                forged.append(first + 1)
        if not forged:
            return list(ids)
        # Most tokenizers need no gap. Those that have control tokens in their vocabulary may find them in any text.
        for gaps in ((), forged):
            made = self._ids(text, kept, gaps)
            if made is not None:
                return made
        expected, got = "a text that can be encoded without control tokens", "one whose spelling always becomes one"
        hint = f"Leave this out of the messages: {quoted(text[forged[0] - 1 : forged[0] + 30])}"
        raise BundleError(Problem(code="text.token", argument="messages", expected=expected, got=got, hint=hint))

    def as_text(self, text: str, ids: list[int], *, around: bool = True) -> list[int]:
        """Return the ids of a text in which no control token is one.

        Args:
            text: the text.
            ids: its ids with the special tokens as text. These are returned if they hold no other control token.
            around: whether ``ids`` have the tokens that the tokenizer adds before and after a text.
        """
        if not any(number in self.tokens and not self.tokens[number].special for number in ids):
            return ids
        return list(self._without_control_tokens().encode(text, add_special_tokens=around).ids)

    def _ids(self, text: str, kept: Sequence[tuple[int, int, int]], gaps: Sequence[int]) -> list[int] | None:
        """Return the ids with the kept control tokens and no others; None if that can't be."""
        tokenizer = self._without_control_tokens()
        edits = [
            (first, end, self._stand_ins[self.tokens[number].lstrip, self.tokens[number].rstrip])
            for first, end, number in kept
        ]
        edits += [(at, at, self._gap) for at in gaps]
        pieces, at = [], 0
        for first, end, stand_in in sorted(edits):
            pieces += [text[at:first], stand_in]
            at = end
        ids = tokenizer.encode("".join((*pieces, text[at:])), add_special_tokens=False).ids
        places = {tokenizer.token_to_id(stand_in) for stand_in in self._stand_ins.values()}
        gap, numbers, found = tokenizer.token_to_id(self._gap), iter([number for _, _, number in kept]), []
        for number in ids:
            if number in places:
                found.append(next(numbers))
            elif number in self.tokens:
                return None
            elif number != gap:
                found.append(number)
        return found

    def _without_control_tokens(self) -> Tokenizer:
        """Return a copy of the tokenizer that reads every control token as text, and the stand-ins as tokens."""
        with self._lock:
            if self._plain is None:
                plain = Tokenizer.from_str(self._source.to_str())
                plain.no_truncation()
                plain.no_padding()
                # The library passes over special tokens, and a token that is added again as special is special.
                plain.add_special_tokens(
                    [AddedToken(token.content, special=True, normalized=False) for token in self.tokens.values()]
                )
                plain.add_tokens(
                    [
                        AddedToken(text, special=False, normalized=False, lstrip=left, rstrip=right)
                        for (left, right), text in self._stand_ins.items()
                    ]
                    + [AddedToken(self._gap, special=False, normalized=False)]
                )
                plain.encode_special_tokens = True
                self._plain = plain
            return self._plain


def _is_of_the_model(token: AddedToken) -> bool:
    """Return whether a model may write a token into its message: it thinks, or calls a tool, and begins no turn."""
    return not token.special and not _MARKER.fullmatch(token.content)
