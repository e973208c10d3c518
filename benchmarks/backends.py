"""Both backends beside their peers, in one interleaved run: first token, loading, prefill, decoding, private memory.

    python -m benchmarks.backends --model gpt2 --context 256 --rounds 5

makes a checkpoint of random float32 weights and a bundle of it with graphs; then, round by round, each contender runs
in a process of its own, on the same tokens, with a cache and the last position's logits alone. Contenders that aren't
installed are left out; onnxruntime-genai builds what it runs of the same checkpoint. The table has medians, and ratios
to the first contender with the spread of the rounds: machines differ, and shared ones are noisy.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

MODELS: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    "gpt2": ("gpt2", {}),
    "llama-124m": (
        "llama",
        {
            "vocab_size": 50257,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
    ),
    "qwen2-0.5b": (
        "qwen2",
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
            "eos_token_id": 151643,
        },
    ),
}
"""Name -> the family, and the fields of its configuration. (onnxruntime-genai doesn't know GPT-2.)"""
CONTENDERS: Final = (
    "splitbundle torch",
    "splitbundle onnxruntime",
    "splitbundle onnxruntime prepacked",
    "transformers",
    "onnxruntime-genai",
    "onnxruntime-genai on the bundle",
)
MEASURES: Final = ("first token", "load", "prefill", "decode")
"""Seconds: from the process's start, of loading, a token of the prompt, a token after it."""
WARM: Final = 2
TOKENS: Final = 12


def main() -> int:
    """Runs every contender in turn, and prints a table, or one JSON document."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backends", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="gpt2")
    parser.add_argument("--context", type=int, default=256, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each contender (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="that compute (default: %(default)s)")
    parser.add_argument("--directory", help="where to write, and to find what an earlier run wrote")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--only", metavar="NAME,NAME", help="of the contenders")
    parser.add_argument("--contender", choices=CONTENDERS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.contender:
        print(json.dumps(_measure(args)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        args.directory = args.directory or temporary
        wanted = None if args.only is None else args.only.split(",")
        there = [name for name in _prepare(args) if wanted is None or name in wanted]
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in there}
        for i in range(args.rounds):
            for name in there:
                print(f"round {i + 1} of {args.rounds}: {name}", file=sys.stderr)
                runs[name].append(_run(args, name))
    _report(args, runs)
    return 0


def _prepare(args: argparse.Namespace) -> list[str]:
    """Makes the checkpoint and what is made of it; gives the contenders that can run."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import splitbundle_converter

    root = Path(args.directory)
    checkpoint, bundle, built = root / args.model, root / f"{args.model}.splitbundle", root / f"{args.model}-genai"
    if not checkpoint.exists():
        family, fields = MODELS[args.model]
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **fields)).float().save_pretrained(checkpoint)
        for path in (Path(__file__).parents[1] / "examples" / "license-gpt2").glob("tokenizer*.json"):
            shutil.copy(path, checkpoint)  # onnxruntime-genai's builder wants one; no text is computed
    if not bundle.exists():
        splitbundle_converter.convert(checkpoint, bundle, check=False, genai=True)
    there = [name for name in CONTENDERS if not name.startswith("onnxruntime-genai")]
    if importlib.util.find_spec("onnxruntime_genai") is None:
        return there
    there.append("onnxruntime-genai on the bundle")
    if not built.exists():
        command = ["-m", "onnxruntime_genai.models.builder", "-m", args.model, "-i", checkpoint, "-o", built]
        command += ["-p", "fp32", "-e", "cpu", "-c", root / "cache"]
        done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
        if done.returncode:
            print(f"left out: onnxruntime-genai: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            return there
    return [*there, "onnxruntime-genai"]


def _run(args: argparse.Namespace, name: str) -> dict[str, float]:
    options = ("model", "context", "threads", "directory")
    given = [part for option in options for part in (f"--{option}", str(getattr(args, option)))]
    started = time.time()
    command = [sys.executable, "-m", "benchmarks.backends", *given, "--contender", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    found["first token"] -= started
    return found


def _measure(args: argparse.Namespace) -> dict[str, float]:
    """One contender's figures, in this process."""
    import random

    chance = random.Random(0)
    ids = [chance.randrange(50000) for _ in range(args.context)]
    clock = time.perf_counter
    start = clock()
    feed = _LOADERS[args.contender](args)
    found = {"load": clock() - start}
    feed(ids[:1], True)
    found["first token"] = time.time()
    times = []
    for _ in range(2):
        start = clock()
        feed(ids, True)
        times.append((clock() - start) / len(ids))
    found["prefill"] = min(times)
    times = []
    for token in ids[: WARM + TOKENS]:
        start = clock()
        feed([token], False)
        times.append(clock() - start)
    found["decode"] = statistics.median(times[WARM:])
    with open("/proc/self/status") as status:
        anonymous = next(line for line in status if line.startswith("RssAnon"))
    return found | {"RssAnon": int(anonymous.split()[1]) * 1024}


Feed = Callable[[list[int], bool], None]
"""Computes some tokens, after those before or anew."""


def _torch(args: argparse.Namespace) -> Feed:
    import torch

    import splitbundle

    torch.set_num_threads(args.threads)
    return _splitbundle(args, splitbundle.open(_bundle(args)).pipeline(), torch.no_grad)


def _onnxruntime(args: argparse.Namespace, *, prepack: bool = False) -> Feed:
    import contextlib

    import splitbundle

    whole = splitbundle.open(_bundle(args))
    pipeline = whole.pipeline(backend="onnxruntime", threads=args.threads, prepack=prepack)
    return _splitbundle(args, pipeline, contextlib.nullcontext)


def _bundle(args: argparse.Namespace) -> Path:
    return Path(args.directory) / f"{args.model}.splitbundle"


def _splitbundle(args: argparse.Namespace, pipeline: Any, around: Callable[[], Any]) -> Feed:
    capacity = args.context + WARM + TOKENS
    session: Any = None

    def feed(ids: list[int], anew: bool) -> None:
        nonlocal session
        if anew:
            session = pipeline.session(1, capacity)
        with around():
            pipeline(pipeline.token_ids([ids]), session=session, logits="last")

    return feed


def _transformers(args: argparse.Namespace) -> Feed:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(Path(args.directory) / args.model, dtype=torch.float32).eval()
    past: Any = None

    def feed(ids: list[int], anew: bool) -> None:
        nonlocal past
        with torch.no_grad():
            out = model(torch.tensor([ids]), past_key_values=None if anew else past, use_cache=True, logits_to_keep=1)
        past = out.past_key_values

    return feed


def _genai(args: argparse.Namespace, kind: str = "-genai") -> Feed:
    import numpy
    import onnxruntime_genai as genai

    config = genai.Config(str(Path(args.directory) / f"{args.model}{kind}"))
    # By default it takes half of the processors.
    options = {"model": {"decoder": {"session_options": {"intra_op_num_threads": args.threads}}}}
    config.overlay(json.dumps(options))
    model = genai.Model(config)
    generator: Any = None

    def feed(ids: list[int], anew: bool) -> None:
        nonlocal generator
        if anew:
            parameters = genai.GeneratorParams(model)
            parameters.set_search_options(max_length=args.context + WARM + TOKENS, do_sample=False)
            generator = genai.Generator(model, parameters)
        generator.append_tokens(numpy.array(ids, dtype=numpy.int32))
        generator.get_logits()

    return feed


_LOADERS: Final[dict[str, Callable[[argparse.Namespace], Feed]]] = {
    "splitbundle torch": _torch,
    "splitbundle onnxruntime": _onnxruntime,
    "splitbundle onnxruntime prepacked": lambda args: _onnxruntime(args, prepack=True),
    "transformers": _transformers,
    "onnxruntime-genai": _genai,
    "onnxruntime-genai on the bundle": lambda args: _genai(args, ".splitbundle"),
}


def _report(args: argparse.Namespace, runs: dict[str, list[dict[str, float]]]) -> None:
    if args.json:
        print(json.dumps({"model": args.model, "context": args.context, "threads": args.threads, "runs": runs}))
        return
    print(f"{args.model}, {args.context} tokens of context, {args.threads} threads, {args.rounds} rounds: seconds, and")
    print("how many times as fast as the first row (least to greatest of the rounds)\n")
    first = next(iter(runs.values()))
    for measure in MEASURES:
        print(measure)
        for name, own in runs.items():
            seconds = statistics.median(run[measure] for run in own)
            ratios = sorted(a[measure] / b[measure] for a, b in zip(first, own, strict=True))
            spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
            print(f"  {name:36} {seconds:10.5f}  {statistics.median(ratios):6.2f} x  ({spread})")
    print("private memory (RssAnon) at the end, MiB")
    for name, own in runs.items():
        print(f"  {name:36} {statistics.median(run['RssAnon'] for run in own) / 2**20:10.0f}")


if __name__ == "__main__":
    sys.exit(main())
