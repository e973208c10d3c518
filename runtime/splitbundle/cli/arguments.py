"""Types of arguments for argparse, and arguments that several commands share."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable
from fractions import Fraction
from typing import Final, Literal

from splitbundle.format import names

_LISTEN: Final = re.compile(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):([0-9]{1,5})")
_SIZE: Final = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,9})?)(?:([kmgtp])(i?b)?|b)?", re.ASCII | re.IGNORECASE)


def add_strict_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--strict``."""
    parser.add_argument(
        "--strict",
        action="store_true",
        help="read every needed file into memory once, hash it there, and compute only on these bytes",
    )


def add_threads_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads``."""
    parser.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="the number of threads that compute; by default one for each core that this process may use",
    )


def add_compute_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--threads`` and ``--kernels``."""
    add_threads_argument(parser)
    parser.add_argument(
        "--kernels",
        metavar="KERNELS",
        help="torch's kernels for a few rows: auto, torch, or what the command kernels prints; by default auto",
    )


def add_cut_arguments(group: argparse._MutuallyExclusiveGroup, verb: str) -> None:
    """Add ``--equal`` and ``--max-shard-size``, which choose cuts. The verb begins their help."""
    group.add_argument(
        "--equal", type=positive, metavar="N", help=f"{verb} N shards; the largest is as small as possible"
    )
    group.add_argument(
        "--max-shard-size",
        type=size,
        metavar="SIZE",
        help=f"{verb} the fewest shards of at most this size, such as 2GB or 500MiB",
    )


def verify_when(args: argparse.Namespace) -> Literal["never", "always"]:
    """Return the argument ``verify`` of ``splitbundle.open`` for ``--strict``."""
    return "always" if args.strict else "never"


def listen_address(text: str) -> tuple[str, int]:
    """Parse ``HOST:PORT`` for argparse. A host of version 6 stands in brackets."""
    found = _LISTEN.fullmatch(text)
    if found is None or int(found[2]) >= 2**16:
        raise argparse.ArgumentTypeError(f"expected HOST:PORT, got {text!r}")
    return found[1].strip("[]"), int(found[2])


def integers(text: str) -> tuple[int, ...]:
    """Parse ``1,2,3`` for argparse."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected integers with commas between them, got {text!r}") from None


def bundle_id(text: str) -> str:
    """Parse ``sha256:`` and 64 digits for argparse."""
    if not text.startswith("sha256:") or not names.SHA256.fullmatch(text.removeprefix("sha256:")):
        raise argparse.ArgumentTypeError(f"expected sha256: and 64 digits of 0-9a-f, got {text!r}")
    return text


def positive(text: str) -> int:
    """Parse a number from 1 for argparse."""
    if not text.isascii() or not text.isdigit() or len(text) > 18 or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, of at most 18 digits, got {text!r}")
    return int(text)


def size(text: str) -> int:
    """Parse a number of bytes for argparse: ``1024``, ``500MB``, ``8GiB``, ``1.5G``. Letters may be small or capital.

    KB, MB, GB, TB and PB are powers of 1000. K, M, G, T and P, and KiB to PiB, are powers of 1024, as in du and rsync.
    """
    found = _SIZE.fullmatch(text.strip())
    value = 0
    if found is not None:
        number, prefix, unit = found.groups()
        base = 1000 if (unit or "").lower() == "b" else 1024
        value = int(Fraction(number) * base ** ("kmgtp".index(prefix.lower()) + 1 if prefix else 0))
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a size from 1 byte, as 8GB, 8GiB, 500MB or 1024, got {text!r}")
    return value


def sizes(text: str) -> tuple[int, ...]:
    """Parse ``8GB,16GB`` for argparse."""
    return tuple(size(part) for part in text.split(","))


def temperature(text: str) -> float:
    """Parse a finite number from 0 for argparse."""
    value = _number(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number from 0, got {text!r}")
    return value


def probability(text: str) -> float:
    """Parse a number above 0, and at most 1, for argparse."""
    value = _number(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0, and at most 1, got {text!r}")
    return value


def number_in(least: float, most: float) -> Callable[[str], float]:
    """Return a parser of a number in a closed range for argparse."""

    def parse(text: str) -> float:
        value = _number(text)
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"expected a number from {least:g} to {most:g}, got {text!r}")
        return value

    return parse


def number_of(least: int, most: int) -> Callable[[str], int]:
    """Return a parser of an integer in a closed range for argparse."""

    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or not least <= int(text[:18]) <= most:
            raise argparse.ArgumentTypeError(f"expected a number from {least} to {most}, got {text!r}")
        return int(text)

    return parse


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")  # not in any range
