/** A bundle in a directory, for Node. Nothing but regular files is ever opened (SB-D-004). */

import { constants } from "node:fs";
import { lstat, open, readdir } from "node:fs/promises";
import { join } from "node:path";

import { BundleError, problem } from "../reader/problems.js";

/** Where a system has these: a link isn't followed, and a pipe isn't waited for. */
const FLAGS = constants.O_RDONLY | (constants.O_NOFOLLOW ?? 0) | (constants.O_NONBLOCK ?? 0);

/** @implements {import("../reader/bundle.js").Source} */
export class DirectorySource {
  /** @param {string} directory */
  constructor(directory) {
    this.directory = directory;
  }

  /**
   * @param {string} path
   * @returns {Promise<{kind: "file" | "directory" | "link" | "other", size: number} | null>} of a path
   *   below something that is no directory, the kind of that
   */
  async stat(path) {
    const parts = path.split("/");
    for (let i = 1; i < parts.length; i++) {
      const above = await this.#lstat(parts.slice(0, i).join("/"));
      if (above?.kind !== "directory") {
        return above && { ...above, kind: above.kind === "file" ? "other" : above.kind };
      }
    }
    return this.#lstat(path);
  }

  async #lstat(path) {
    try {
      const found = await lstat(join(this.directory, path));
      return { kind: kindOf(found), size: found.size };
    } catch (error) {
      if (error.code === "ENOENT" || error.code === "ENOTDIR") {
        return null;
      }
      throw unreadable(path, error);
    }
  }

  /**
   * @param {string} path
   * @param {number} start
   * @param {number} end
   * @returns {Promise<Uint8Array>} fewer bytes if the file ends before
   */
  async read(path, start, end) {
    let handle;
    try {
      handle = await open(join(this.directory, path), FLAGS);
      // Since `stat` was asked, something else may have come to stand there.
      if (kindOf(await handle.stat()) !== "file") {
        throw new BundleError(problem("file.kind", path, "a regular file", "something else"));
      }
      const bytes = new Uint8Array(end - start);
      let at = 0;
      while (at < bytes.length) {
        const { bytesRead } = await handle.read(bytes, at, bytes.length - at, start + at);
        if (!bytesRead) {
          break;
        }
        at += bytesRead;
      }
      return bytes.subarray(0, at);
    } catch (error) {
      throw error instanceof BundleError ? error : unreadable(path, error);
    } finally {
      await handle?.close();
    }
  }

  /** Everything in the directory. Links aren't followed. */
  async list() {
    const found = [];
    const visit = async (directory, prefix) => {
      for (const entry of await readdir(directory, { withFileTypes: true })) {
        const path = prefix + entry.name;
        found.push({ path, kind: kindOf(entry) });
        if (entry.isDirectory()) {
          await visit(join(directory, entry.name), `${path}/`);
        }
      }
    };
    await visit(this.directory, "");
    return found;
  }
}

function kindOf(entry) {
  if (entry.isSymbolicLink()) {
    return "link";
  }
  return entry.isFile() ? "file" : entry.isDirectory() ? "directory" : "other";
}

function unreadable(path, error) {
  const got = error.code ?? error.message;
  return new BundleError(problem("file.unreadable", path, "a file that can be read", got));
}
