"""The former place of ``splitbundle.text.huggingface``. It stays for one release; import from there."""

from __future__ import annotations

from splitbundle.text.huggingface import TextStream, TextTokenizer

__all__ = ["TextStream", "TextTokenizer"]
