"""``python -m splitbundle``: the same as the command ``splitbundle``."""

from __future__ import annotations

import sys

from splitbundle.cli.main import main

sys.exit(main())
