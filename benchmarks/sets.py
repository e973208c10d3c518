"""The sets of the benchmark that compute models: their models, contexts, contenders and goals."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, Final

from benchmarks.computing import point_name
from benchmarks.contenders import (
    COMMANDS,
    COMPILED,
    CONTENDERS,
    GENAI,
    GENAI_BUNDLE,
    GENAI_INT4,
    LLAMA,
    LLAMA_FLASH,
    LLAMA_INT4,
    LLAMA_INT8,
    ONNXRUNTIME,
    ONNXRUNTIME_INT4,
    ONNXRUNTIME_INT8,
    ONNXRUNTIME_SHARDS,
    PREPACKED,
    TORCH,
    TORCH_COMMAND,
    TORCH_INT4,
    TORCH_INT8,
    TORCH_ONE,
    TORCH_SHARDS,
    TORCH_WAITING,
    TRANSFORMERS,
)
from benchmarks.goals import Goal, Term
from benchmarks.shapes import ITEM, SHAPES

LIMIT: Final = "the machine's limit"
"""A derived contender. Its time is the time to move the necessary bytes, or to do the necessary operations."""
BYTES: Final = "as its bytes explain"
"""A derived contender. At a longer context, it is slower by the time to read the additional bytes of the cache."""
FILES: Final = "the files"
"""A derived contender. Its figures are the bytes of the weights and of the cache."""
BEST: Final = "the best of splitbundle torch"
"""A derived contender. Beside busy processes, its time is that of the fastest way to run splitbundle with torch."""
SHORTEST: Final = 64
SHORT: Final = 256
MIDDLE: Final = 2000
LONG: Final = 4000


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A measurement: prompts of ``context`` tokens in ``batch`` rows, and then ``tokens`` tokens, one at a time.

    The prompts are computed ``prefills`` times.
    """

    context: int
    batch: int = 1
    prefills: int = 1
    tokens: int = 0

    def task(self) -> dict[str, int]:
        """Return the point as JSON for the measured process."""
        return {name: getattr(self, name) for name in ("context", "batch", "prefills", "tokens")}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One table of a set."""

    set: str
    model: str
    dtype: str
    contenders: tuple[str, ...]
    reference: str
    """The contender that the ratios of the table compare with."""
    points: tuple[Point, ...] = ()
    rounds: int = 5
    figures: tuple[str, ...] = ()
    """The figures of the table, in addition to those of the points."""
    goals: tuple[Goal, ...] = field(default=())
    sample_memory: bool = False
    busy: tuple[int, ...] = ()
    """The numbers of busy processes beside which each contender is measured. Without any, all is quiet."""

    @property
    def columns(self) -> dict[str, str]:
        """Return the figure of each column, if the columns of the table are numbers of busy processes."""
        return {f"{count} busy" if count else "quiet": beside_name(f"decode {SHORTEST}", count) for count in self.busy}

    @property
    def capacity(self) -> int:
        """The number of slots that a cache needs."""
        most = max((point.context + (point.tokens + 3 if point.tokens else 0) for point in self.points), default=64)
        return max(most, 64)


def beside_name(figure: str, count: int) -> str:
    """Return the name of a figure that was measured beside some busy processes."""
    return f"{figure} beside {count} busy" if count else figure


def _cold() -> Iterator[Case]:
    everybody = (TORCH, ONNXRUNTIME, TRANSFORMERS, GENAI, GENAI_BUNDLE, LLAMA)
    first = "first token"
    goals = (
        _faster(f"{first}, torch", TORCH, TRANSFORMERS, first, 2.8),
        Goal(
            what="first token, torch, less that process's import torch",
            own=Term(TORCH, first),
            less=(Term(TORCH, "import torch"),),
            at_most=0.2,
        ),
        _faster(f"{first}, onnxruntime", ONNXRUNTIME, TRANSFORMERS, first, 6.0),
    )
    for model in ("gpt2", "llama-124m", "qwen2-0.5b"):
        yield Case(
            set="cold",
            model=model,
            dtype="float32",
            contenders=everybody,
            reference=TRANSFORMERS,
            rounds=10,
            figures=(first, "import"),
            goals=goals if model == "gpt2" else (),
        )


def _load() -> Iterator[Case]:
    private = "private after loading"
    copies = Goal(
        what="private memory that loading takes, torch, of the weights' bytes",
        own=Term(TORCH, private),
        against=Term(FILES, "weights"),
        share=True,
        at_most=0.02,
    )
    for model in ("gpt2", "llama-124m", "qwen2-0.5b"):
        goals = [copies]
        if SHAPES[model].family in CONTENDERS[GENAI].families:
            goals.append(_faster("loading, onnxruntime", ONNXRUNTIME, GENAI, "load", 10.0))
        if model == "qwen2-0.5b":
            goals.append(_faster("loading 2 GB, torch", TORCH, TRANSFORMERS, "load", 20.0))
        yield Case(
            set="load",
            model=model,
            dtype="float32",
            contenders=(TORCH, ONNXRUNTIME, PREPACKED, TRANSFORMERS, GENAI, GENAI_BUNDLE, LLAMA),
            reference=TRANSFORMERS,
            figures=("load", "import and load", "first token without imports", private),
            goals=tuple(goals),
        )


_CASES: Final = (
    ("gpt2", "float32"),
    ("llama-124m", "float32"),
    ("qwen2-0.5b", "float32"),
    ("qwen2-0.5b", "bfloat16"),
    ("qwen2-1.5b", "bfloat16"),
)
_SMALL: Final = (("gpt2", "bfloat16"), ("smollm2-135m", "float32"), ("smollm2-135m", "bfloat16"))
"""More cases of prefill and decode. Of these, only decoding with torch has a goal."""
_FLOAT32: Final = (TORCH, ONNXRUNTIME, PREPACKED, TRANSFORMERS, COMPILED, GENAI, GENAI_BUNDLE, LLAMA, LLAMA_FLASH)
_BFLOAT16: Final = (TORCH, TRANSFORMERS, COMPILED, LLAMA, LLAMA_FLASH)


def _prefill() -> Iterator[Case]:
    for model, dtype in (*_CASES, *_SMALL):
        goals = []
        for context in () if (model, dtype) in _SMALL else (256, 1024):
            figure, what = f"prefill {context}", f"prefill {context}"
            if dtype == "bfloat16":
                goals.append(_faster(f"{what}, torch, bfloat16", TORCH, TRANSFORMERS, figure, 1.15))
            elif model != "llama-124m":
                goals.append(_faster(f"{what}, torch", TORCH, TRANSFORMERS, figure, 1.15))
                goals.append(_faster(f"{what}, torch", TORCH, LIMIT, figure, 0.85))
                goals += [_faster(f"{what}, torch", TORCH, peer, figure, 1.1) for peer in (LLAMA, LLAMA_FLASH)]
            if dtype == "float32" and model != "gpt2":
                goals.append(_faster(f"{what}, onnxruntime", ONNXRUNTIME, GENAI, figure, 1.2))
        yield Case(
            set="prefill",
            model=model,
            dtype=dtype,
            contenders=_FLOAT32 if dtype == "float32" else _BFLOAT16,
            reference=TRANSFORMERS,
            points=(Point(context=256, prefills=4), Point(context=1024, prefills=3)),
            goals=tuple(goals),
        )


def _decode() -> Iterator[Case]:
    figure = f"decode {SHORT}"
    for model, dtype in (*_CASES, *_SMALL):
        goals = []
        if model in ("gpt2", "smollm2-135m"):
            goals.append(_faster("decoding, torch", TORCH, TRANSFORMERS, figure, 1.2))
        elif dtype == "float32":
            goals.append(_faster("decoding, onnxruntime", ONNXRUNTIME, GENAI, figure, 1.2))
        if (model, dtype) == ("qwen2-0.5b", "float32"):
            goals.append(_faster("decoding, torch", TORCH, LIMIT, figure, 0.9))
        if (model, dtype) == ("qwen2-0.5b", "bfloat16"):
            goals += [_faster("decoding, torch, bfloat16", TORCH, peer, figure, 1.0) for peer in (LLAMA, LLAMA_FLASH)]
        yield Case(
            set="decode",
            model=model,
            dtype=dtype,
            contenders=_FLOAT32 if dtype == "float32" else _BFLOAT16,
            reference=TRANSFORMERS,
            points=(Point(context=SHORT, tokens=24),),
            goals=tuple(goals),
        )


def _long() -> Iterator[Case]:
    figure = f"decode {LONG}"
    for model, dtype in (("qwen2-0.5b", "float32"), ("qwen2-0.5b", "bfloat16"), ("llama-124m", "float32")):
        own = (TORCH, ONNXRUNTIME) if dtype == "float32" else (TORCH,)
        goals = [_faster(f"decoding after {LONG} tokens, torch", TORCH, TRANSFORMERS, figure, 1.2)]
        for contender in own:
            what = f"decoding after {LONG} tokens, {contender.removeprefix('splitbundle ')}"
            goals.append(_faster(what, contender, f"{contender} {BYTES}", figure, 1.0))
        if dtype == "float32":
            for other in (f"prefill {MIDDLE}", f"decode {MIDDLE}"):
                goals.append(_faster(f"{other}, onnxruntime", ONNXRUNTIME, GENAI, other, 1.2))
        yield Case(
            set="long",
            model=model,
            dtype=dtype,
            contenders=(*own, TRANSFORMERS, LLAMA, *((GENAI,) if dtype == "float32" else ())),
            reference=TRANSFORMERS,
            points=(
                Point(context=SHORT, tokens=24),
                Point(context=MIDDLE, prefills=2, tokens=12),
                Point(context=LONG, tokens=24),
            ),
            rounds=3,
            goals=tuple(goals),
        )


def _batch() -> Iterator[Case]:
    one, eight = point_name("decode", SHORT, 1), point_name("decode", SHORT, 8)
    for model, dtype, times in (
        ("gpt2", "float32", 3.0),
        ("qwen2-0.5b", "float32", 3.0),
        ("qwen2-0.5b", "bfloat16", 6.0),
    ):
        own = (TORCH, ONNXRUNTIME) if dtype == "float32" else (TORCH,)
        goals = [
            Goal(
                what=f"tokens a second in 8 rows, {contender.removeprefix('splitbundle ')}, {dtype}",
                own=Term(contender, eight),
                against=Term(contender, one),
                at_least=times,
            )
            for contender in own
        ]
        yield Case(
            set="batch",
            model=model,
            dtype=dtype,
            contenders=(*own, TRANSFORMERS),
            reference=TRANSFORMERS,
            points=(Point(context=SHORT, tokens=24), Point(context=SHORT, batch=8, tokens=24)),
            goals=tuple(goals),
        )


def _shards() -> Iterator[Case]:
    pairs = {TORCH_SHARDS: TORCH, ONNXRUNTIME_SHARDS: ONNXRUNTIME}
    for model in ("gpt2", "qwen2-0.5b"):
        yield Case(
            set="shards",
            model=model,
            dtype="float32",
            contenders=(TORCH, TORCH_SHARDS, ONNXRUNTIME, ONNXRUNTIME_SHARDS),
            reference=TORCH,
            points=(Point(context=SHORT, prefills=4, tokens=48),),
            rounds=9,  # many, because the expected difference is small
            goals=tuple(
                Goal(
                    what=f"{figure}, {three.removeprefix('splitbundle ')}",
                    own=Term(three, figure),
                    against=Term(one, figure),
                    share=True,
                    at_most=1.02,
                )
                for three, one in pairs.items()
                for figure in (f"prefill {SHORT}", f"decode {SHORT}")
            ),
        )


def _memory() -> Iterator[Case]:
    for model in ("gpt2", "qwen2-0.5b"):
        yield Case(
            set="memory",
            model=model,
            dtype="float32",
            contenders=(TORCH, ONNXRUNTIME, PREPACKED, TRANSFORMERS, GENAI, GENAI_BUNDLE, LLAMA),
            reference=TRANSFORMERS,
            points=(Point(context=SHORT, tokens=24),),
            rounds=3,
            figures=("private", "private after loading", "private imports"),
            goals=tuple(
                Goal(
                    what="private memory while generating, less the imports' and the cache, "
                    f"{contender.removeprefix('splitbundle ')}, of the weights' bytes",
                    own=Term(contender, "private"),
                    less=(Term(FILES, "cache"),),
                    against=Term(FILES, "weights"),
                    share=True,
                    at_most=0.1,
                )
                for contender in (TORCH, ONNXRUNTIME)
            ),
            sample_memory=True,
        )


def _contention() -> Iterator[Case]:
    for model in ("gpt2", "smollm2-135m"):
        case = Case(
            set="contention",
            model=model,
            dtype="float32",
            contenders=(TORCH_COMMAND, TORCH_WAITING, TORCH_ONE, ONNXRUNTIME, TRANSFORMERS, LLAMA),
            reference=TRANSFORMERS,
            points=(Point(context=SHORTEST, tokens=16),),
            busy=(0, 1, 2),
        )
        own, waiting = (Term(name, case.columns["quiet"]) for name in (TORCH_COMMAND, TORCH_WAITING))
        slower = "quiet decoding, torch as the command runs it, of the time with torch's waiting"
        what, one = "decoding beside 1 busy process, torch as the command runs it", case.columns["1 busy"]
        goals = [_faster(what, TORCH_COMMAND, peer, one, least) for peer, least in ((BEST, 0.9), (TRANSFORMERS, 3.0))]
        goals.append(Goal(what=slower, own=own, against=waiting, share=True, at_most=1.1))
        yield replace(case, goals=tuple(goals))
    case = Case(
        set="contention",
        model="qwen2-0.5b",
        dtype="bfloat16",
        contenders=(*COMMANDS.values(), ONNXRUNTIME_INT8, ONNXRUNTIME_INT4, LLAMA_INT8, LLAMA_INT4),
        reference=LLAMA_INT8,
        points=(Point(context=SHORTEST, tokens=16),),
        busy=(0, 1),
    )
    pairs = [(COMMANDS[own], LLAMA_INT8 if own in (TORCH_INT8, ONNXRUNTIME_INT8) else LLAMA_INT4) for own in COMMANDS]
    busy = case.columns["1 busy"]
    goals = [_faster(f"decoding beside 1 busy process, {_way(own)}", own, peer, busy, 3.0) for own, peer in pairs]
    yield replace(case, goals=tuple(goals))


def _experts() -> Iterator[Case]:
    figures = (f"decode {SHORT}", f"prefill {SHORT}")
    goals = [
        _faster(f"{what.split()[0]} with experts, {contender.split()[1]}", contender, TRANSFORMERS, what, least)
        for contender in (TORCH, ONNXRUNTIME)
        for what, least in zip(figures, (1.5, 1.2), strict=True)
    ]
    yield Case(
        set="experts",
        model="qwen3-moe-48",
        dtype="float32",
        contenders=(TORCH, ONNXRUNTIME, TRANSFORMERS, LLAMA),
        reference=TRANSFORMERS,
        points=(Point(context=SHORT, prefills=4, tokens=48),),
        goals=tuple(goals),
    )


def _quantized() -> Iterator[Case]:
    decode, prefill = f"decode {SHORT}", f"prefill {SHORT}"
    goals = [
        _faster(f"decoding, {_way(own)}", own, against, decode, least)
        for own, against, least in (
            (ONNXRUNTIME_INT8, LLAMA_INT8, 1.3),
            (ONNXRUNTIME_INT4, LLAMA_INT4, 1.3),
            (ONNXRUNTIME_INT4, GENAI_INT4, 1.0),
            (TORCH_INT8, LLAMA_INT8, 0.7),
            (TORCH_INT4, LLAMA_INT4, 0.85),
        )
    ]
    goals += [
        _faster(f"a prompt, {_way(own)}", own, against, prefill, least)
        for own, against, least in (
            (ONNXRUNTIME_INT8, LLAMA_INT8, 2.0),
            (ONNXRUNTIME_INT4, LLAMA_INT4, 1.0),
            (TORCH_INT8, LLAMA_INT8, 3.0),
        )
    ]
    for model in ("qwen2-0.5b", "smollm2-135m"):
        yield Case(
            set="quantized",
            model=model,
            dtype="bfloat16",
            contenders=(
                *(TORCH_INT8, TORCH_INT4, ONNXRUNTIME_INT8, ONNXRUNTIME_INT4),
                *(LLAMA_INT8, LLAMA_INT4, GENAI_INT4, TORCH),
            ),
            reference=LLAMA_INT8,
            points=(Point(context=SHORT, prefills=2, tokens=24),),
            figures=("load", "first token", "private after loading"),
            goals=tuple(goals),
        )


def _way(contender: str) -> str:
    return contender.removeprefix("splitbundle ")


def _faster(what: str, own: str, against: str, figure: str, at_least: float) -> Goal:
    return Goal(
        what=f"{what}, against {against}", own=Term(own, figure), against=Term(against, figure), at_least=at_least
    )


_SETS: Final = {
    "cold": _cold,
    "load": _load,
    "prefill": _prefill,
    "decode": _decode,
    "long": _long,
    "batch": _batch,
    "shards": _shards,
    "memory": _memory,
    "contention": _contention,
    "experts": _experts,
    "quantized": _quantized,
}
NAMES: Final = tuple(_SETS)


def derive(case: Case, run: dict[str, dict[str, Any]], rates: dict[str, float] | None) -> dict[str, dict[str, Any]]:
    """Return the figures of the derived contenders in a round: ``LIMIT``, ``FILES``, ``BYTES`` and ``BEST``."""
    shape, dtype = SHAPES[case.model], case.dtype
    slots = case.capacity
    derived: dict[str, dict[str, Any]] = {
        FILES: {
            "weights": shape.parameters() * ITEM[dtype],
            "cache": shape.cache_bytes(slots, dtype),
        }
    }
    # The limit of quantized weights isn't that of their source's bytes.
    for point in case.points if rates and LLAMA_INT8 not in case.contenders else ():
        assert rates is not None
        context, batch = point.context, point.batch
        limits = derived.setdefault(LIMIT, {})
        for what, past, tokens in (("prefill", 0, context), ("decode", context + 3 + point.tokens // 2, 1)):
            moving = shape.moved(past, tokens, batch, dtype) / rates["read"]
            multiplying = shape.operations(past, tokens, batch) / rates[f"multiply {dtype}"]
            limits[point_name(what, context, batch)] = max(moving, multiplying) / tokens / batch
    if case.set == "long" and rates:
        short, long = (shape.moved(context, 1, 1, dtype) for context in (SHORT, LONG))
        for contender, figures in run.items():
            if contender.startswith("splitbundle"):
                explained = figures[f"decode {SHORT}"] + (long - short) / rates["read"]
                derived[f"{contender} {BYTES}"] = {f"decode {LONG}": explained}
    ways = [run[name] for name in (TORCH_COMMAND, TORCH_WAITING, TORCH_ONE) if name in run]
    if case.busy and len(ways) == 3:  # the best of fewer would flatter the rest
        derived[BEST] = {figure: min(way[figure] for way in ways) for figure in case.columns.values()}
    return derived


def chosen(name: str, models: tuple[str, ...] | None, dtype: str | None) -> Iterator[Case]:
    """Return the cases of a set, for some models and one dtype.

    A model that the set does not have is measured like the first model of the set, without goals.
    """
    own = list(_SETS[name]())
    for model in models or tuple(dict.fromkeys(case.model for case in own)):
        found = [case for case in own if case.model == model]
        for case in found or [replace(own[0], model=model, dtype=dtype or "float32", goals=())]:
            if dtype in (None, case.dtype):
                yield case
