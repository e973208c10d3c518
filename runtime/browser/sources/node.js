/** A bundle in a directory, for Node. Nothing but regular files is ever opened (SB-D-004). */

import { constants } from "node:fs";
import { lstat, open, readdir, stat } from "node:fs/promises";
import { join } from "node:path";

import { BundleError, problem } from "../reader/problems.js";

/** @implements {import("../reader/bundle.js").Source} */
export class DirectorySource {
  #handles = new Map();

  /** @param {string} directory */
  constructor(directory) {
    this.directory = directory;
  }

  /**
   * @param {string} path
   * @returns {Promise<{kind: "file" | "directory" | "link" | "other", size: number, hanging?: boolean} | null>}
   */
  async stat(path) {
    const parts = path.split("/");
    for (let i = 1; i <= parts.length; i++) {
      const found = await this.#lstat(parts.slice(0, i).join("/"));
      if (found === null || i === parts.length || found.kind !== "directory") {
        // What isn't a directory on the way is reported in place of the file.
        return found && i < parts.length ? { ...found, kind: found.kind === "file" ? "other" : found.kind } : found;
      }
    }
    return null;
  }

  async #lstat(path) {
    const place = join(this.directory, path);
    try {
      const found = await lstat(place);
      const kind = kindOf(found);
      if (kind !== "link") {
        return { kind, size: found.size };
      }
      const hanging = await stat(place).then(
        () => false,
        () => true,
      );
      return { kind, size: 0, hanging };
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
    try {
      const handle = await this.#handle(path);
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
    }
  }

  /** Keeps the last file open: most reads are of the same one. */
  async #handle(path) {
    const known = this.#handles.get(path);
    if (known) {
      return known;
    }
    await this.close();
    // Between `stat` and here, the file may have been exchanged: this neither follows a link nor waits for a pipe.
    const handle = await open(
      join(this.directory, path),
      constants.O_RDONLY | (constants.O_NOFOLLOW ?? 0) | (constants.O_NONBLOCK ?? 0),
    );
    if (kindOf(await handle.stat()) !== "file") {
      await handle.close();
      throw new BundleError(problem("file.kind", path, "a regular file", "something else"));
    }
    this.#handles.set(path, handle);
    return handle;
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

  /** Close the file that is open. */
  async close() {
    for (const handle of this.#handles.values()) {
      await handle.close();
    }
    this.#handles.clear();
  }
}

function kindOf(entry) {
  if (entry.isSymbolicLink()) {
    return "link";
  }
  return entry.isFile() ? "file" : entry.isDirectory() ? "directory" : "other";
}

function unreadable(path, error) {
  return new BundleError(problem("file.unreadable", path, "a file that can be read", error.code ?? error.message));
}
