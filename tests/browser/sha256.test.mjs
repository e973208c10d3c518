import assert from "node:assert/strict";
import { createHash, randomBytes } from "node:crypto";
import { test } from "node:test";

import { Sha256, sha256 } from "../../runtime/browser/reader/sha256.js";

const expected = (bytes) => createHash("sha256").update(bytes).digest("hex");

test("digests of every length around a block", () => {
  for (let length = 0; length <= 200; length++) {
    const bytes = randomBytes(length);
    assert.equal(sha256(bytes), expected(bytes), `${length} bytes`);
  }
});

test("pieces give the digest of the whole", () => {
  const bytes = randomBytes(3_000_000);
  const digest = new Sha256();
  for (let at = 0, step = 0; at < bytes.length; at += step) {
    step = (step * 7 + 13) % 70_001;
    digest.update(bytes.subarray(at, at + step));
  }
  assert.equal(digest.hex(), expected(bytes));
});
