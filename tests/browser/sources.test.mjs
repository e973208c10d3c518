import assert from "node:assert/strict";
import { mkdtempSync, mkdirSync, readFileSync, rmSync, symlinkSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, before, test } from "node:test";

import { openBundle } from "../../runtime/browser/reader/bundle.js";
import { DirectoryHandleSource, FileListSource } from "../../runtime/browser/sources/files.js";
import { BundleError } from "../../runtime/browser/reader/problems.js";
import { HttpSource } from "../../runtime/browser/sources/http.js";
import { DirectorySource } from "../../runtime/browser/sources/node.js";
import { MemorySource, bundleDirectory, refused } from "./support.mjs";

const tiny = new MemorySource("tiny").files;
let server;
let address;
const asked = [];

/** `/tiny/` answers ranges; `/whole/` ignores them; `/unsized/` gives no length to HEAD. */
function answer(request, response) {
  const [, way, ...parts] = request.url.split("/");
  const bytes = tiny.get(parts.join("/"));
  asked.push(`${request.method} ${request.url} ${request.headers.range ?? ""}`.trim());
  if (!bytes) {
    response.writeHead(404).end();
  } else if (request.method === "HEAD") {
    response.writeHead(200, way === "unsized" ? {} : { "Content-Length": bytes.length }).end();
  } else if (request.headers.range && way !== "whole") {
    const [start, end] = request.headers.range.slice("bytes=".length).split("-").map(Number);
    const part = bytes.subarray(start, end + 1);
    response.writeHead(206, {
      "Content-Range": `bytes ${start}-${start + part.length - 1}/${bytes.length}`,
      "Content-Length": part.length,
    });
    response.end(part);
  } else {
    response.writeHead(200, { "Content-Length": bytes.length }).end(bytes);
  }
}

before(async () => {
  server = createServer(answer);
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  address = `http://127.0.0.1:${server.address().port}`;
});
after(() => {
  server.closeAllConnections();
  server.close();
});

test("a bundle over HTTP is read by ranges", async () => {
  asked.length = 0;
  const bundle = await openBundle(new HttpSource(`${address}/tiny`));
  await bundle.loadStage("top");
  const tensors = await bundle.tensors("bottom");
  const first = tensors[0];
  const bytes = await bundle.readRange(first.file, first.offset, first.offset + first.length);
  assert.deepEqual(bytes, tiny.get(first.file).slice(first.offset, first.offset + first.length));
  const gets = asked.filter((line) => line.startsWith("GET"));
  assert.ok(gets.every((line) => line.includes("bytes=")));
  assert.equal(asked.filter((line) => line === "HEAD /tiny/embedding.safetensors").length, 1);
  const { unlisted, absent } = await bundle.verify();
  assert.deepEqual([unlisted, absent], [[], []]);
  await assert.rejects(() => bundle.verify({ exact: true }), (error) => {
    assert.ok(error instanceof BundleError);
    assert.deepEqual([error.problems[0].code, error.problems[0].argument], ["input.value", "exact"]);
    assert.match(error.message, /HTTP/);
    return true;
  });
});

test("a size may come with a range alone", async () => {
  const source = new HttpSource(`${address}/unsized/`);
  assert.deepEqual(await source.stat("README.md"), { kind: "file", size: tiny.get("README.md").length });
  assert.equal(await source.stat("nothing"), null);
});

test("a server that ignores ranges is refused", async () => {
  await refused(() => openBundle(new HttpSource(`${address}/whole/`)), "network.answer", "manifest.json");
  const nowhere = new HttpSource(`${address}/tiny/nowhere/`);
  await refused(() => openBundle(nowhere), "file.missing", "manifest.json");
});

test("a file that was exchanged since its size was asked for is refused", async () => {
  const source = new HttpSource(`${address}/tiny/`);
  const bundle = await openBundle(source);
  await bundle.readRange("README.md", 0, 1);
  const kept = tiny.get("README.md");
  tiny.set("README.md", new Uint8Array(9999));
  await refused(() => bundle.readRange("README.md", 0, 1), "file.size", "README.md");
  tiny.set("README.md", kept);
});

test("a chosen directory", async () => {
  const files = [...tiny].map(([path, bytes]) => {
    return Object.assign(new Blob([bytes]), { name: "x", webkitRelativePath: `chosen/${path}` });
  });
  const source = new FileListSource(files);
  const bundle = await openBundle(source);
  assert.deepEqual((await bundle.verify({ exact: true })).unlisted, []);
  assert.deepEqual(await source.stat("tokenizer"), { kind: "directory", size: 0 });
  assert.equal(await source.stat("token"), null);
});

/** A directory handle of the file system API over the files of a bundle. */
function handle(prefix) {
  const own = [...tiny.keys()].filter((path) => path.startsWith(prefix));
  const below = own.map((path) => path.slice(prefix.length));
  const names = new Set(below.map((path) => path.split("/")[0]));
  const directories = new Set(below.filter((path) => path.includes("/")).map((path) => path.split("/")[0]));
  const fail = (name) => {
    throw Object.assign(new Error(name), { name });
  };
  const directory = {
    kind: "directory",
    getFileHandle: async (name) => {
      if (!names.has(name) || directories.has(name)) {
        fail(names.has(name) ? "TypeMismatchError" : "NotFoundError");
      }
      return { kind: "file", getFile: async () => new Blob([tiny.get(prefix + name)]) };
    },
    getDirectoryHandle: async (name) => {
      return directories.has(name) ? handle(`${prefix}${name}/`) : fail("NotFoundError");
    },
    entries: async function* () {
      for (const name of names) {
        const kind = directories.has(name) ? "Directory" : "File";
        yield [name, await directory[`get${kind}Handle`](name)];
      }
    },
  };
  return directory;
}

test("a directory of the file system API", async () => {
  const source = new DirectoryHandleSource(handle(""));
  assert.deepEqual((await (await openBundle(source)).verify({ exact: true })).absent, []);
  assert.deepEqual(await source.stat("tokenizer"), { kind: "directory", size: 0 });
  assert.equal(await source.stat("a/b/c"), null);
});

test("links are neither followed nor opened", { skip: process.platform === "win32" }, async () => {
  const root = mkdtempSync(join(tmpdir(), "splitbundle-"));
  try {
    writeFileSync(join(root, "secret"), "secret");
    mkdirSync(join(root, "bundle"));
    symlinkSync("../secret", join(root, "bundle", "link"));
    symlinkSync("../nowhere", join(root, "bundle", "hanging"));
    symlinkSync("..", join(root, "bundle", "up"));
    const source = new DirectorySource(join(root, "bundle"));
    assert.equal((await source.stat("link")).kind, "link");
    assert.equal((await source.stat("hanging")).kind, "link");
    assert.equal((await source.stat("up/secret")).kind, "link");
    await refused(() => source.read("link", 0, 1), "file.unreadable", "link");
    assert.deepEqual((await source.list()).map(({ kind }) => kind), ["link", "link", "link"]);
    assert.equal(await source.stat("nothing"), null);
  } finally {
    rmSync(root, { recursive: true });
  }
});

test("a directory on disk gives the same bytes as memory", async () => {
  const source = new DirectorySource(bundleDirectory("tiny"));
  const path = "layer-000.safetensors";
  const wanted = new Uint8Array(readFileSync(join(bundleDirectory("tiny"), path)));
  assert.deepEqual(await source.read(path, 8, 500), wanted.slice(8, 500));
  assert.equal((await source.read(path, wanted.length - 1, wanted.length + 9)).length, 1);
});
