"""Make ``text.json``: the chat templates of a checkpoint, how it generates, and golden texts of its tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from tokenizers import Tokenizer

from splitbundle.errors import BundleError
from splitbundle.format.text_document import (
    DEFAULT,
    MAX_TEXT,
    GoldenChat,
    GoldenText,
    TextDocument,
)
from splitbundle.text.chat_template import ChatTemplate
from splitbundle.text.control_tokens import ControlTokens
from splitbundle_converter.errors import line
from splitbundle_converter.options import Note
from splitbundle_converter.text import slow_tokenizer
from splitbundle_converter.text.source_texts import chat_templates, generation_defaults

TEXTS: Final = (
    *slow_tokenizer.PROBES,
    "",
    "Hello, world! How are you today?",
    "¿Dónde está la biblioteca? Ça va très bien, merci. Straße, Æther, Ţară, İstanbul.",
    "Το γρήγορο καφέ αλεπού; Съешь ещё этих мягких французских булок; Ґанок, їжак.",
    "שלום עולם, كيف حالك اليوم؟ ۱۲۳ ٤٥٦",
    "ภาษาไทยไม่มีช่องว่าง ພາສາລາວ ភាសាខ្មែរ မြန်မာဘာသာ བོད་ཡིག",
    "नमस्ते दुनिया, বাংলা ভাষা, தமிழ் மொழி, తెలుగు, ಕನ್ನಡ, മലയാളം, ਪੰਜਾਬੀ, ગુજરાતી",
    "ქართული ენა, Հայերեն, አማርኛ, ᏣᎳᎩ, ᐃᓄᒃᑎᑐᑦ",
    "我能吞下玻璃而不伤身体。私はガラスを食べられます。나는 유리를 먹을 수 있어요. 𠮷野家",
    "👍🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇺🇳 ☃️ ✌🏿 🫠",
    "a\u0300 \u00e0 \uff21\uff22\uff23 \ufb03 \u2126 \u00a0\u2003\u200d\u202e\ufffd",
    "x = [i ** 2 for i in range(10)]  # comment\nif (a && b) { return \"s\\n\"; }\t\t<p class='q'>&amp;</p>",
    "https://example.org/a?b=c&d=%20#e user@example.org 192.168.0.1 2026-01-31T12:34:56Z",
    "0 1 12 123 1234 12345 1234567 3.14159 1e-10 ½ Ⅷ ²",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa !!!!!!!! ........ --------",
    "MiXeD CaSe ALLCAPS camelCaseWords snake_case_words kebab-case-words",
    " ",
    "   ",
    "\t",
    "\r\n",
    "line one\nline two\n\nline four\n",
)
"""Texts in many scripts, with spaces, line ends, symbols and code."""
MAX_SPECIAL: Final = 8
"""The largest number of special tokens that are spelled in golden texts."""
MAX_OTHERS: Final = 4
"""The largest number of other control tokens that are."""
_VARIABLES: Final = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
_CHATS: Final[tuple[tuple[tuple[tuple[str, str], ...], bool], ...]] = (
    ((("user", "Hello, who are you?"),), True),
    ((("system", "You are brief."), ("user", "What is 2 + 2?")), True),
    ((("user", " a\n"), ("assistant", "Yes — b."), ("user", "数字 🙂 and {{ braces }} {% x %}")), True),
    ((("user", "What is the capital of France?"), ("assistant", "Paris.")), False),
)
_TELLS_THE_TIME: Final = "strftime_now"


def text_document(
    files: Mapping[str, bytes],
    model_type: str,
    vocab_size: int,
    generation: bytes | None,
    notes: Note | None,
    *,
    golden: bool,
) -> TextDocument:
    """Return the text document of a checkpoint that has a tokenizer.

    Args:
        files: The tokenizer files by name, ``tokenizer.json`` among them.
        model_type: The type of the model, which tells the tokenizer's class.
        vocab_size: The number of token ids that the model has.
        generation: The content of ``generation_config.json``, or None.
        notes: A function that is called with a sentence for each thing that was left out.
        golden: Whether to add golden texts and golden chats. A chat is compared with what transformers makes of it.

    Raises:
        BundleError: ``json.*`` for a ``generation_config.json`` that isn't JSON.
    """
    say = notes or (lambda text: None)
    config = slow_tokenizer.tokenizer_config(files)
    variables = _variables(config, slow_tokenizer.parsed(files.get("special_tokens_map.json", b"{}")))
    templates = chat_templates(files, config, say)
    own = templates.get(DEFAULT)
    return TextDocument(
        variables=variables,
        templates=templates,
        defaults=generation_defaults(generation, say),
        cases=_cases(files, vocab_size, tuple(templates.values())) if golden else (),
        chats=_chats(files, model_type, own, variables, say) if golden and own is not None else (),
    )


def _cases(files: Mapping[str, bytes], vocab_size: int, templates: tuple[str, ...]) -> tuple[GoldenText, ...]:
    own = slow_tokenizer.library_tokenizer(files)
    control = ControlTokens(own, templates)
    tokens = [token for _, token in sorted(control.tokens.items())]
    # A library that keeps special tokens out of texts may still let the others in.
    special = [token.content for token in tokens if token.special][:MAX_SPECIAL]
    others = [token.content for token in tokens if not token.special][:MAX_OTHERS]
    spelled = [text for token in (*special, *others) for text in (f"a{token}b", f" {token} ", f"{token}{token}")]
    cases = [_case(own, control, text) for text in dict.fromkeys((*TEXTS, *spelled)) if len(text) <= MAX_TEXT]
    return tuple(case for case in cases if max((*case.ids, *case.control_ids), default=0) < vocab_size)


def _case(own: Tokenizer, control: ControlTokens, text: str) -> GoldenText:
    own.encode_special_tokens = True
    ids = control.as_text(text, own.encode(text).ids)
    own.encode_special_tokens = False
    control_ids = own.encode(text).ids
    decoded = own.decode(control_ids, skip_special_tokens=True)
    return GoldenText(text=text, ids=tuple(ids), control_ids=tuple(control_ids), decoded=decoded)


def _chats(
    files: Mapping[str, bytes], model_type: str, source: str, variables: Mapping[str, str], say: Note
) -> tuple[GoldenChat, ...]:
    """Return the chats that the template accepts, and that transformers renders to the same text."""
    if _TELLS_THE_TIME in source:
        return ()
    try:
        template = ChatTemplate(source, file="chat template", variables=variables)
    except BundleError as error:
        say(f"The chat template can't be used: {error}")
        return ()
    own, loaded, made = slow_tokenizer.library_tokenizer(files), None, []
    for turns, prompted in _CHATS:
        messages = [{"role": role, "content": content} for role, content in turns]
        try:
            text = str.__str__(template.render(messages, add_generation_prompt=prompted))
        except BundleError:
            continue  # many templates take no system message, or want turns in another order
        # transformers sets no limits, but this template has just been rendered within ours.
        try:
            loaded = loaded or slow_tokenizer.load_class(files, model_type)
            theirs = loaded.apply_chat_template(
                messages, chat_template=source, add_generation_prompt=prompted, tokenize=False
            )
        except Exception as error:  # noqa: BLE001  # a class may raise any error for files that do not suit it
            say(f"transformers can't use the chat template, so its chats were not compared. The reason: {line(error)}")
            return ()
        if theirs != text:
            say("transformers renders the chat template to another text, so the bundle has no golden chats.")
            return ()
        ids = tuple(own.encode(text, add_special_tokens=False).ids)
        made.append(GoldenChat(messages=turns, add_generation_prompt=prompted, ids=ids))
    return tuple(made)


def _variables(config: Mapping[str, Any], special: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _VARIABLES:
        value = config.get(name, special.get(name))
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str) and len(value) <= MAX_TEXT:
            found[name] = value
    return found
