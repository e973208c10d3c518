// The client of a stage: what it sends, and what it does when answers are lost, refused or wrong.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { test } from "node:test";

import { StageClient } from "../../runtime/browser/wire/client.js";
import { pack, unpack } from "../../runtime/browser/wire/frames.js";
import { HttpCarrier, Lost } from "../../runtime/browser/wire/http_carrier.js";
import { StandInServer, FINGERPRINT } from "./stand_in_server.mjs";

const EXPECTED = { name: "trunk", fingerprint: FINGERPRINT, layers: [1, 3], width: 2 };
const DIALOGUES = new URL("../conformance/wire/dialogues/", import.meta.url);

const floats = (...numbers) => Float32Array.from(numbers);
const called = (past, ...numbers) => ({ hidden: floats(...numbers), past, count: numbers.length / 2 });

async function connected(server, options) {
  const client = new StageClient(server, EXPECTED, options);
  await client.connect();
  return client;
}

async function code(promise) {
  try {
    await promise;
  } catch (failure) {
    return failure.problems?.[0].code ?? failure.name;
  }
  return "nothing";
}

test("a wait of two seconds is told, and that it has ended", async (context) => {
  context.mock.timers.enable({ apis: ["setTimeout"] });
  const server = new StandInServer();
  const told = [];
  const client = await connected(server, { onWait: (waits) => told.push(waits) });
  let answer;
  const call = server.call.bind(server);
  server.call = async (frame) => {
    await new Promise((resolve) => (answer = resolve));
    return call(frame);
  };
  const answered = client.connect();
  context.mock.timers.tick(1999);
  assert.deepEqual(told, []);
  context.mock.timers.tick(1);
  assert.deepEqual(told, [true]);
  answer();
  await answered;
  assert.deepEqual(told, [true, false]);
});

test("the stand-in answers as the dialogues say", async () => {
  let compared = 0;
  for (const name of ["hello", "steps", "sessions", "positions"]) {
    const { steps } = JSON.parse(readFileSync(new URL(`${name}.json`, DIALOGUES), "utf-8"));
    const server = new StandInServer();
    const names = new Map();
    let frame;
    for (const [i, step] of steps.entries()) {
      if (step.wait !== undefined || (step.owner ?? "alice") !== "alice") break; // one client, and no clock
      const { op, session, rows, order } = step.request ?? {};
      const lacks = (op && !server[op]) || session === null || (op === "run" && (rows || order));
      if (step.frame !== undefined || lacks) break;
      compared += 1;
      if (!step.again) {
        const request = Object.fromEntries(
          Object.entries(step.request).map(([key, value]) => [key, names.get(value) ?? value]),
        );
        frame = rawFrame(request, floats(...(step.numbers ?? [])));
      }
      const { message, payload } = unpack(await server.call(frame));
      for (const [key, value] of Object.entries(step.answer ?? {})) {
        if (typeof value === "string" && value.startsWith("$")) names.set(value, message[key]);
        else assert.deepEqual(message[key], value, `${name}, step ${i}: ${key}`);
      }
      if (step.result !== undefined) {
        assert.deepEqual([...new Float32Array(payload.slice().buffer)], step.result);
      }
      if (step.calls !== undefined) assert.equal(server.calls, step.calls, `${name}, step ${i}`);
    }
  }
  assert.ok(compared > 25, `${compared} steps`);
});

/** A frame of any request, also of a wrong one. */
function rawFrame(request, numbers) {
  const header = Buffer.from(JSON.stringify(request));
  const prefix = Buffer.from("SBW1\0\0\0\0", "latin1");
  prefix.writeUInt32LE(header.length, 4);
  return Uint8Array.from(Buffer.concat([prefix, header, Buffer.from(numbers.buffer)]));
}

test("steps, a rollback and the end of a session", async () => {
  const server = new StandInServer();
  const session = (await connected(server)).begin();
  assert.deepEqual([...(await session.run(called(0, 1, 2, 10, 20))).hidden], [1, 2, 11, 22]);
  assert.deepEqual([...(await session.run(called(2, 100, 200))).hidden], [111, 222]);
  assert.deepEqual([...(await session.run(called(1, 5, 5))).hidden], [6, 7]);
  assert.equal(session.held, 2);
  assert.deepEqual(server.ops, ["hello", "open", "run", "run", "run"]);
  assert.equal(await code(session.run(called(3, 1, 1))), "input.position");
  await session.end();
  assert.equal(server.sessions.size, 0);
});

test("nothing is sent to a server of another model", async () => {
  for (const [change, expected] of [
    [{ fingerprint: `sha256:${"e".repeat(64)}` }, "peer.fingerprint"],
    [{ layers: [1, 4] }, "peer.layers"],
    [{ width: 4 }, "peer.layers"],
  ]) {
    const server = new StandInServer();
    const client = new StageClient(server, { ...EXPECTED, ...change });
    assert.equal(await code(client.connect()), expected);
    assert.deepEqual(new Set(server.ops), new Set(["hello"]));
  }
  // A server may welcome whatever is asked: the client compares by itself (SB-X-010).
  for (const [change, expected] of [
    [{ fingerprint: `sha256:${"e".repeat(64)}` }, "peer.fingerprint"],
    [{ layers: [0, 3] }, "peer.layers"],
    [{ width: 3 }, "peer.layers"],
    [{ protocol: 2 }, "peer.protocol"],
    [{ number: 7 }, "peer.fingerprint"],
    [{ encodings: ["int8"] }, "peer.encoding"],
  ]) {
    const server = new StandInServer({ lies: change });
    assert.equal(await code(new StageClient(server, EXPECTED).connect()), expected);
  }
});

test("a lost answer is asked for again, and the step is computed once", async () => {
  const server = new StandInServer();
  const session = (await connected(server)).begin();
  await session.run(called(0, 1, 2));
  for (const fault of ["before", "after", "damaged", "other"]) {
    server.faults = [fault];
    const before = server.calls;
    await session.run(called(session.held, 1, 1));
    assert.equal(server.calls, before + 1, fault);
  }
  assert.deepEqual([...(await session.run(called(5, 0, 0))).hidden], [5, 6]);
  assert.equal(server.sessions.size, 1);
});

test("a lost session is begun anew, with the same calls", async () => {
  const server = new StandInServer();
  const session = (await connected(server)).begin();
  await session.run(called(0, 1, 2, 10, 20));
  await session.run(called(2, 100, 200, 7, 7));
  await session.run(called(3, 1, 1)); // the second token of the call before is forgotten
  server.sessions.clear();
  server.ops = [];
  server.pasts = [];
  assert.deepEqual([...(await session.run(called(4, 0, 0))).hidden], [112, 223]);
  assert.deepEqual(server.ops, ["run", "hello", "open", "run", "run", "run", "run"]);
  assert.deepEqual(server.pasts, [0, 2, 3, 4]);
});

test("a session may get more slots, up to the limit", async () => {
  const server = new StandInServer();
  const session = (await connected(server)).begin();
  await session.run(called(0, 1, 2));
  session.capacity = 1; // as if it had been opened for one token
  server.sessions.get(session.id).capacity = 1;
  await session.run(called(1, 1, 2));
  assert.ok(server.sessions.get(session.id).capacity >= 2);
  assert.equal(
    await code(session.run({ hidden: new Float32Array(80), past: 2, count: 40 })), "session.capacity",
  );
  assert.deepEqual([...(await session.run(called(2, 1, 1))).hidden], [3, 5]);
});

test("what a client does goes by the retry of an error", async () => {
  for (const [retry, expected] of [["never", "server.failed"], ["same", "peer.unreachable"]]) {
    const server = new StandInServer();
    const session = (await connected(server, { patience: 0.05 })).begin();
    await session.run(called(0, 1, 2));
    server.refusal = { code: "server.failed", retry };
    assert.equal(await code(session.run(called(1, 1, 1))), expected);
    server.refusal = null;
    assert.deepEqual([...(await session.run(called(1, 1, 1))).hidden], [2, 3]); // the session is usable
  }
});

test("a server that is gone is given up in time, and a stop is heeded at once", async () => {
  const server = new StandInServer();
  const session = (await connected(server, { patience: 0.2 })).begin();
  await session.run(called(0, 1, 2));
  const dead = server.call;
  server.call = async () => {
    throw new Lost("nobody");
  };
  const began = Date.now();
  assert.equal(await code(session.run(called(1, 1, 1))), "peer.unreachable");
  assert.ok(Date.now() - began < 2000);
  const stop = new AbortController();
  setTimeout(() => stop.abort(), 20);
  session.client.patience = 60_000;
  assert.equal(await code(session.run(called(1, 1, 1), stop.signal)), "AbortError");
  server.call = dead;
  assert.deepEqual([...(await session.run(called(1, 1, 1))).hidden], [2, 3]);
});

test("a lease is renewed, and a session that has ended is begun anew", async () => {
  const server = new StandInServer();
  const session = (await connected(server)).begin();
  await session.renew(); // nothing has begun
  await session.run(called(0, 1, 2));
  await session.renew();
  server.sessions.clear();
  await session.renew();
  assert.equal(session.id, null);
  assert.deepEqual([...(await session.run(called(1, 1, 1))).hidden], [2, 3]);
});

test("what the gateway says by its status", async () => {
  const answered = (status) => async () => new Response(new Uint8Array(3), { status });
  for (const [status, expected] of [
    [401, "peer.identity"], [404, "peer.unreachable"], [413, "wire.size"],
    [429, "Lost"], [503, "Lost"], [500, "Lost"],
  ]) {
    const carrier = new HttpCarrier("stages/trunk", { fetch: answered(status) });
    assert.equal(await code(carrier.call(new Uint8Array(1))), expected, `${status}`);
  }
  const asked = [];
  const fetch = async (url, options) => {
    asked.push([url, options]);
    return new Response(Uint8Array.of(1, 2, 3));
  };
  const carrier = new HttpCarrier("stages/trunk", { fetch, headers: () => ({ Authorization: "Bearer k" }) });
  assert.deepEqual([...(await carrier.call(Uint8Array.of(7)))], [1, 2, 3]);
  const [url, { method, headers, body, credentials, redirect }] = asked[0];
  assert.deepEqual(
    [url, method, [...body], credentials, redirect], ["stages/trunk", "POST", [7], "omit", "error"],
  );
  assert.deepEqual(headers, { "Content-Type": "application/vnd.splitbundle.frame", Authorization: "Bearer k" });
  carrier.send(Uint8Array.of(8));
  assert.equal(asked[1][1].keepalive, true);
  const broken = async () => {
    throw new TypeError("fetch failed");
  };
  assert.equal(await code(new HttpCarrier("x", { fetch: broken }).call(new Uint8Array(1))), "Lost");
  const stop = new AbortController();
  stop.abort();
  assert.equal(await code(carrier.call(new Uint8Array(1), stop.signal)), "AbortError");
});

test("an encoding in fewer bits is used if it is asked for", async () => {
  const server = new StandInServer({ lies: { encodings: ["float32", "float16"] } });
  const client = await connected(server, { encoding: "float16" });
  assert.equal(client.encoding, "float16");
  const frame = pack({ op: "hello", protocol: 1, fingerprint: null, layers: null });
  assert.equal(unpack(await server.call(frame)).message.dtype, "float32");
});
