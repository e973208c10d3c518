"""The cache: hard links, several processes, damage, and what prune leaves."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

import splitbundle
import splitbundle_schemas
from splitbundle import Bundle, BundleError
from splitbundle.sharing import cache_care
from splitbundle.sharing.cache import Cache, cache_root
from splitbundle.sharing.file_server import serving
from tests.support.paths import TESTS

GOLDEN = TESTS / "golden" / "v1.0"
