"""Bugs to plant in the JavaScript reader: frames and encodings of the protocol."""

from __future__ import annotations

from typing import Final

from tests.support.seeded_bugs import bug

WIRE: Final = "runtime/browser/wire"

EXCHANGING: Final = (
    bug(
        "halves are rounded up",
        f"{WIRE}/encodings.js",
        "return below % 2 === 0 ? below : below + 1;",
        "return below + 1;",
        "wire/encodings/int8-ties",
    ),
    bug(
        "a scale of zero divides",
        f"{WIRE}/encodings.js",
        "scale === 0 ? 0 : roundHalfToEven(",
        "roundHalfToEven(",
        "wire/encodings/int8-denormals",
        "wire/encodings/int8-zeros",
    ),
    bug(
        "NaN is a number of every encoding",
        f"{WIRE}/encodings.js",
        "if ((each & INFINITY_32) === INFINITY_32) refuseNumber(encoding);",
        "if (each === INFINITY_32) refuseNumber(encoding);",
        "wire/encodings/int8-nan",
        "wire/encodings/bfloat16-nan",
    ),
    bug(
        "bfloat16 is cut off",
        f"{WIRE}/encodings.js",
        "(bits + 0x7fff + ((bits >>> 16) & 1)) >>> 16",
        "bits >>> 16",
        "wire/encodings/bfloat16-",
    ),
    bug(
        "halves of float16 are rounded up",
        f"{WIRE}/encodings.js",
        "(rest === half && kept % 2 === 1)",
        "rest === half",
        "wire/encodings/float16-ties",
    ),
    bug(
        "small numbers of float16 are zero",
        f"{WIRE}/encodings.js",
        "if (exponent < -10) return sign;",
        "if (exponent < 1) return sign;",
        "wire/encodings/float16-denormals",
    ),
    bug(
        "float16 overflows to infinity",
        f"{WIRE}/encodings.js",
        "return rounded >= 0x7c00 ? null :",
        "return rounded > 0x7c00 ? null :",
        "wire/encodings/float16-overflow",
    ),
    bug(
        "scales without their bytes",
        f"{WIRE}/encodings.js",
        "tokens * (SCALE_BYTES + width) :",
        "tokens * width :",
        "wire/reject/payload-int8-without-scales",
    ),
    bug(
        "a byte more than a frame may have",
        f"{WIRE}/frames.js",
        "if (frame.length > limit)",
        "if (frame.length > limit + 1)",
        "wire/reject/frame-above-the-limit",
    ),
    bug(
        "headers of any length",
        f"{WIRE}/frames.js",
        "export const MOST_HEADER = 2 ** 17;",
        "export const MOST_HEADER = 2 ** 24;",
        "wire/reject/header-too-long",
    ),
    bug(
        "bytes after the payload",
        f"{WIRE}/frames.js",
        "if (payload.length !== size) {",
        "if (payload.length < size) {",
        "wire/reject/payload-long",
        "wire/reject/payload-of-train",
    ),
    bug(
        "kinds of messages in a plain object",
        f"{WIRE}/frames.js",
        "else if (!Object.hasOwn(KINDS, op))",
        "else if (!(op in KINDS))",
        "wire/reject/op-",
    ),
    bug(
        "members of messages in a plain object",
        f"{WIRE}/messages.js",
        "if (!Object.hasOwn(table, name)) {",
        "if (!(name in table)) {",
        "wire/reject/member-",
    ),
    bug(
        "a hello of another protocol is read as one of this",
        f"{WIRE}/frames.js",
        'if (op === "hello" && Number.isInteger(protocol)',
        'if (op === "" && Number.isInteger(protocol)',
        "wire/accept/hello-of-another-protocol",
    ),
    bug(
        "texts of messages in UTF-16",
        f"{WIRE}/messages.js",
        "value.length > MOST_TEXT && [...value].length > MOST_TEXT",
        "value.length > MOST_TEXT",
        "wire/accept/error-text",
    ),
    bug(
        "a row more than a message may have",
        f"{WIRE}/messages.js",
        "const MOST_ROWS = 4096;",
        "const MOST_ROWS = 4097;",
        "wire/reject/open-rows-4097",
        "wire/reject/count-4097",
    ),
    bug(
        "more tokens than the sequence",
        f"{WIRE}/messages.js",
        "if (most > message.sequence) {",
        "if (most < 0) {",
        "wire/reject/sequence-short",
    ),
    bug(
        "any padding",
        f"{WIRE}/messages.js",
        "const MOST_PADDED = 2 ** 28;",
        "const MOST_PADDED = 2 ** 80;",
        "wire/reject/sequence-padding",
    ),
    bug(
        "a lease of zero",
        f"{WIRE}/messages.js",
        "value > 0 && value <= MOST_LEASE",
        "value >= 0 && value <= MOST_LEASE",
        "wire/reject/lease-zero",
    ),
)
