"""The former name of ``splitbundle.text.huggingface``. It stays for one release; import from the new name."""

from __future__ import annotations

from splitbundle.text.huggingface import TextStream, TextTokenizer

__all__ = ["TextStream", "TextTokenizer"]
