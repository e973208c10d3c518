/** A bundle that a person chose in a page: by `<input webkitdirectory>`, or by a directory picker. */

import { BundleError, problem } from "../reader/problems.js";

/**
 * The files of `<input type="file" webkitdirectory>`. The browser has left out links, pipes and empty
 * directories.
 *
 * @implements {import("../reader/bundle.js").Source}
 */
export class FileListSource {
  #files = new Map();

  /** @param {Iterable<File>} files with `webkitRelativePath` */
  constructor(files) {
    for (const file of files) {
      const path = file.webkitRelativePath || file.name;
      // The first part is the chosen directory itself.
      this.#files.set(path.includes("/") ? path.slice(path.indexOf("/") + 1) : path, file);
    }
  }

  async stat(path) {
    const file = this.#files.get(path);
    if (file) {
      return { kind: "file", size: file.size };
    }
    const below = [...this.#files.keys()].some((other) => other.startsWith(`${path}/`));
    return below ? { kind: "directory", size: 0 } : null;
  }

  read(path, start, end) {
    return readSlice(this.#files.get(path), path, start, end);
  }

  async list() {
    return [...this.#files.keys()].map((path) => ({ path, kind: "file" }));
  }
}

/**
 * A directory that was chosen with `showDirectoryPicker`, or one of the page's own file system. Handles are
 * files or directories, and nothing else.
 *
 * @implements {import("../reader/bundle.js").Source}
 */
export class DirectoryHandleSource {
  #root;

  /** @param {FileSystemDirectoryHandle} directory */
  constructor(directory) {
    this.#root = directory;
  }

  async stat(path) {
    const handle = await this.#handle(path);
    if (handle === null || handle.kind === "directory") {
      return handle && { kind: "directory", size: 0 };
    }
    return { kind: "file", size: (await handle.getFile()).size };
  }

  async read(path, start, end) {
    const handle = await this.#handle(path);
    return readSlice(handle?.kind === "file" ? await handle.getFile() : undefined, path, start, end);
  }

  async list() {
    const found = [];
    const visit = async (directory, prefix) => {
      for await (const [name, handle] of directory.entries()) {
        found.push({ path: prefix + name, kind: handle.kind });
        if (handle.kind === "directory") {
          await visit(handle, `${prefix}${name}/`);
        }
      }
    };
    await visit(this.#root, "");
    return found;
  }

  async #handle(path) {
    let directory = this.#root;
    const parts = path.split("/");
    for (const [i, name] of parts.entries()) {
      const last = i === parts.length - 1;
      try {
        const next = await (last ? fileOrDirectory(directory, name) : directory.getDirectoryHandle(name));
        if (last) {
          return next;
        }
        directory = next;
      } catch (error) {
        if (error.name === "NotFoundError" || error.name === "TypeMismatchError") {
          return null;
        }
        throw new BundleError(problem("file.unreadable", path, "a file that can be read", error.name));
      }
    }
    return null;
  }
}

async function fileOrDirectory(directory, name) {
  try {
    return await directory.getFileHandle(name);
  } catch (error) {
    if (error.name === "TypeMismatchError") {
      return directory.getDirectoryHandle(name);
    }
    throw error;
  }
}

async function readSlice(file, path, start, end) {
  if (!file) {
    throw new BundleError(problem("file.missing", path, "the file", "nothing"));
  }
  try {
    return new Uint8Array(await file.slice(start, end).arrayBuffer());
  } catch (error) {
    throw new BundleError(problem("file.unreadable", path, "a file that can be read", error.name));
  }
}
