"""An app that calls every public function of the runtime, to be frozen: ``app BACKEND BUNDLE``."""

from __future__ import annotations

import copy
import pickle
import sys

import splitbundle
from splitbundle.__main__ import run

backend, path = sys.argv[1:]
bundle = splitbundle.open(path)
pipeline = bundle.pipeline(backend=backend, threads=1)
prompt = pipeline.token_ids([[44, 308, 68]])
tokens = [int(token[0]) for token in pipeline.generate(prompt, max_new_tokens=3)]

session = pipeline.session(1, 16)
first = pipeline(prompt, session=session, logits="last")
second = copy.copy(session)
session.rollback(1)
session.reorder([0])
pickle.loads(pickle.dumps(second))
x = prompt
for shard in bundle.shards:
    stage = bundle.stage(shard.name, backend=backend)
    x = stage(x, logits="last")
assert float(abs(x - first).max()) < 1e-3

assert bundle.verify(exact=True).files
assert splitbundle.open(path, verify="always").id == bundle.id
assert bundle.run_vectors(backend=backend)
try:
    bundle.stage("no such shard")
except splitbundle.BundleError as error:
    codes = error.codes
assert codes == ("stage.name",)
for command in (["inspect", path], ["verify", path, "--run"], ["generate", path, "--ids", "44,308,68", "-n", "3"]):
    sys.argv[1:] = [*command, "--json", *(["--backend", backend] if command[0] != "inspect" else [])]
    assert run() == 0
sys.stderr.write(f"all done {tokens}\n")
