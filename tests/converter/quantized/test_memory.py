"""Converting quantized weights holds one weight at a time: more layers, or more experts, take no more memory."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

from tests.converter.quantized.test_quantized_checkpoints import checkpoint
from tests.converter.test_conversion_memory import MEBI, over
from tests.support.quantized_models import FORMS, WEIGHTS

ROOM: Final = 24 * MEBI
FORMATS: Final = tuple(form for form in FORMS if form != "mxfp4")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
@pytest.mark.long
@pytest.mark.parametrize("form", FORMATS)
def test_more_layers_take_no_more_memory(tmp_path: Path, form: str) -> None:
    taken, sizes = {}, {}
    for layers in (10, 22):  # the program cuts at layer 10
        source = tmp_path / f"{layers}"
        checkpoint(source, form, num_hidden_layers=layers, hidden_size=512, intermediate_size=1088)
        (taken[layers],) = over(source, tmp_path / f"{layers}.splitbundle")
        sizes[layers] = (source / WEIGHTS).stat().st_size
    print(form, {layers: f"{size / MEBI:.1f} MiB" for layers, size in taken.items()}, sizes)
    assert taken[22] <= taken[10] + ROOM


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_more_experts_take_no_more_memory(tmp_path: Path) -> None:
    taken = {}
    for experts in (8, 64):
        source = tmp_path / f"{experts}"
        sizes = {"num_local_experts": experts, "hidden_size": 256, "intermediate_size": 512}
        checkpoint(source, "mxfp4", num_hidden_layers=12, **sizes)
        (taken[experts],) = over(source, tmp_path / f"{experts}.splitbundle")
    print({experts: f"{size / MEBI:.1f} MiB" for experts, size in taken.items()})
    assert taken[64] <= taken[8] + ROOM
