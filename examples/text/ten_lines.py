"""Continue a text, and print each piece as it comes.

python examples/text/ten_lines.py license.splitbundle "Licensed under the Apache License"
"""

import sys

import splitbundle

if len(sys.argv) != 3:
    print("usage: python ten_lines.py BUNDLE PROMPT", file=sys.stderr)
    sys.exit(2)
path, prompt = sys.argv[1:]
pipeline = splitbundle.open(path).pipeline()
for piece in pipeline.stream_text(prompt, max_new_tokens=40):
    print(piece, end="", flush=True)
print()
