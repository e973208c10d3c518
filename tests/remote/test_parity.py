"""Remote pipelines give the results of local ones, to the bit: at every cut, in both backends and mixed."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy
import pytest
import torch

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.backends.onnxruntime.pipeline import Pipeline as NumpyPipeline
from splitbundle.backends.torch.pipeline import Pipeline
from tests.remote.conftest import LAYERS
from tests.support.tiers import thinned

pytestmark = pytest.mark.usefixtures("one_thread")
CUTS = list(itertools.combinations(range(LAYERS + 1), 2))
IDS = [[44, 308, 68, 455, 270], [618, 44, 308, 0, 0], [270, 0, 0, 0, 0]]
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


@contextmanager
def pipelines(
    bundle: splitbundle.Bundle, cut: tuple[int, int], ends: str, middle: str, **remote: Any
) -> Iterator[tuple[Any, Any, StageServer]]:
    """Yield a local pipeline, and the same one with its middle on a server."""
    start, stop = cut
    kernels = {"kernels": "torch"}

    def part(layers: tuple[int, int], backend: str, **ends: bool) -> Any:
        own = kernels if backend == "torch" else {}
        return bundle.stage(layers=layers, backend=backend, **ends, **own)  # type: ignore[call-overload]

    bottom, top = part((0, start), ends, embeds=True, head=False), part((stop, LAYERS), ends, embeds=False, head=True)
    inner = {"embeds": False, "head": False}
    with StageServer(bundle, layers=cut, backend=middle) as server:
        kind = "torch" if ends == middle == "torch" else "onnxruntime"
        far = bundle.stage(layers=cut, backend=kind, remote=server.url, **inner, **remote)  # type: ignore[call-overload]
        made = Pipeline if kind == "torch" else NumpyPipeline
        yield made([bottom, part(cut, middle, **inner), top]), made([bottom, far, top]), server


def _pickled(session: Any) -> Any:
    return pickle.loads(pickle.dumps(session))


def equal(a: Any, b: Any) -> bool:
    return bool((a == b).all()) and a.shape == b.shape


CASES = [
    *((cut, "torch", "torch") for cut in CUTS),
    *((cut, "onnxruntime", "onnxruntime") for cut in CUTS),
    *((cut, *kinds) for cut in CUTS for kinds in (("torch", "onnxruntime"), ("onnxruntime", "torch"))),
]
SHORT = [case for case in CASES if case[1:] == ("torch", "torch") or case[0] in ((0, LAYERS), (1, 4))]


@pytest.mark.parametrize("case", thinned(CASES, SHORT), ids=str)
def test_a_remote_pipeline_is_a_local_one(
    every_cut: splitbundle.Bundle, case: tuple[tuple[int, int], str, str]
) -> None:
    """Padding, sessions, rollback, reordering, rows, copies, pickles, growth, and a session that the server lost."""
    with pipelines(every_cut, *case) as (local, far, server), torch.no_grad():
        ids, mask = (
            numpy.array(rows) if isinstance(local, NumpyPipeline) else torch.tensor(rows) for rows in (IDS, MASK)
        )
        assert equal(local(ids, attention_mask=mask), far(ids, attention_mask=mask))
        assert equal(local(ids[:1], logits=3), far(ids[:1], logits=3))
        both = local.session(3, 16, grows=True), far.session(3, 16, grows=True)

        def step(pair: Any, width: int = 5) -> None:
            given = {"attention_mask": mask[:, :width], "logits": "last"}
            assert equal(*(p(ids[:, :width], session=s, **given) for p, s in zip((local, far), pair, strict=True)))

        step(both)
        step(both, 2)
        for session in both:
            session.rollback([3, 0, 1])
        step(both)
        for session in both:
            session.reorder([2, 0, 0])
        step(both, 1)
        for session in both:
            session.reorder([1, 2, 0])
            session.reorder([2, 2, 1])
        step(both)  # the session grows
        for rows, width in (([2], 5), ([1], 1), ([2, 0], 3), ([0, 1, 2], 1)):
            given = {"rows": rows, "logits": "last"}
            chosen = ids[: len(rows), :width]
            assert equal(*(p(chosen, session=s, **given) for p, s in zip((local, far), both, strict=True)))
        for session in both:
            session.reorder([1, 1, 2])
        server.service.sessions.end_all()
        step(both)
        copies, pickles = [[way(session) for session in both] for way in (copy.copy, _pickled)]
        for pair in (both, copies, pickles):
            step(pair)
        assert server.service.counts["run", "session.unknown"] == 1
        assert all(result in ("ok", "session.unknown") for _, result in server.service.counts)


@pytest.mark.parametrize("middle", ["torch", "onnxruntime"])
def test_bundle_pipelines_take_addresses(every_cut: splitbundle.Bundle, middle: str) -> None:
    with (
        StageServer(every_cut, "trunk-2", backend=middle) as one,
        StageServer(every_cut, "trunk-5", backend=middle) as two,
    ):
        remote = {"trunk-2": one.url, "trunk-5": [two.url, one.url]}
        far = every_cut.pipeline(backend=middle, remote=remote)
        near = every_cut.pipeline(backend=middle)
        ids = near.token_ids([IDS[0]])
        given = {"max_new_tokens": 12, "seed": 3, "temperature": 0.8}
        assert [t.tolist() for t in far.generate(ids, **given)] == [t.tolist() for t in near.generate(ids, **given)]
        assert far.bundle is every_cut
        mixed = every_cut.pipeline(backend={"bottom": "onnxruntime"}, remote=remote)
        assert numpy.abs(mixed(numpy.array(IDS[:1])) - numpy.array(near(ids).tolist())).max() < 1e-4


def test_merged_replay_is_near(every_cut: splitbundle.Bundle) -> None:
    with pipelines(every_cut, (1, 5), "torch", "torch", replay="merged") as (local, far, server), torch.no_grad():
        ids, mask = torch.tensor(IDS), torch.tensor(MASK)
        mine, theirs = local.session(3, 64), far.session(3, 64)
        for _ in range(3):
            expected = local(ids, attention_mask=mask, session=mine)
            got = far(ids, attention_mask=mask, session=theirs)
            assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())
            for session in (mine, theirs):
                session.rollback([2, 1, 0])
                session.reorder([1, 0, 2])
            before = server.service.counts["run", "ok"]
            server.service.sessions.end_all()
        far(ids[:, :1], session=theirs)
        assert server.service.counts["run", "ok"] == before + 2  # one call refills, one goes on


@pytest.mark.parametrize("wire", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize("kind", ["torch", "onnxruntime"])
def test_narrow_encodings_are_near(every_cut: splitbundle.Bundle, wire: str, kind: str) -> None:
    with pipelines(every_cut, (1, 4), kind, kind, wire=wire) as (local, far, server), torch.no_grad():
        ids = local.token_ids(IDS)
        expected, got = local(ids), far(ids)
        limit = {"float16": 2e-3, "bfloat16": 2e-2, "int8": 4e-2}[wire]
        assert 0 < float(abs(got - expected).max()) <= limit * float(abs(expected).max())
        session = far.session(3, 16)
        first = far(ids, session=session)
        assert equal(first, got)
        server.service.sessions.end_all()
        again = far.session(3, 16)
        assert equal(far(ids, session=again), got)
        assert equal(far(ids[:, :1], session=session), far(ids[:, :1], session=again))


def test_numbers_that_an_encoding_cannot_hold(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, "trunk-2") as server:
        for backend in ("torch", "onnxruntime"):
            stage: Any = every_cut.stage("trunk-2", backend=backend, remote=server.url, wire="float16")
            hidden = torch.full((1, 1, 96), 7e4)
            with pytest.raises(BundleError, match=r"\[wire.value\] .*numbers that float16 can hold"), torch.no_grad():
                stage(hidden if backend == "torch" else hidden.numpy())
        assert ("run", "ok") not in server.service.counts


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_are_exact(every_cut: splitbundle.Bundle, dtype: str) -> None:
    """A stage that computes in 16 bits sends 16 bits, and nothing is lost."""
    with StageServer(every_cut, "trunk-3", dtype=dtype) as server, torch.no_grad():
        local = every_cut.stage("trunk-3", dtype=dtype, kernels="torch")
        far = every_cut.stage("trunk-3", remote=server.url)
        assert far.dtype == local.dtype
        hidden = torch.randn(2, 4, 96).to(local.dtype)
        assert torch.equal(far(hidden, count=[4, 2]), local(hidden, count=[4, 2]))
        arrays: Any = every_cut.stage("trunk-3", backend="onnxruntime", remote=server.url)
        given = hidden.float().numpy()
        assert equal(arrays(given, count=[4, 2]), local.over_numpy()(given, count=[4, 2]))


def test_a_prompt_above_the_longest_message_goes_in_pieces(every_cut: splitbundle.Bundle) -> None:
    from splitbundle.serving.stage_server import Budget

    with StageServer(every_cut, "trunk-2", budget=Budget(message=2**17 + 8 + 8 * 384)) as server, torch.no_grad():
        far, near = every_cut.stage("trunk-2", remote=server.url), every_cut.stage("trunk-2", kernels="torch")
        hidden = torch.randn(1, 30, 96)
        with pytest.raises(BundleError, match=r"\[wire.size\]"):
            far(hidden)
        cache = far.cache(1, 32)
        assert float((far(hidden, cache=cache) - near(hidden)).abs().max()) < 1e-5
        assert server.service.counts["run", "ok"] == 4


def test_what_a_remote_stage_refuses(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, "trunk-2") as server:
        for name, given, message in (
            ("bottom", {}, r"\[stage.range\] remote: expected a part between"),
            ("trunk-2", {"threads": 1}, r"\[stage.backend\] threads: expected nothing for a remote stage"),
            ("trunk-2", {"trainable": True}, r"\[train.refused\]"),
            ("trunk-2", {"wire": "float8"}, r"\[input.value\] wire"),
            ("trunk-2", {"replay": "some"}, r"\[input.value\] replay"),
            ("trunk-2", {"timeout": 0}, r"\[input.value\] timeout"),
            ("trunk-3", {}, r"\[peer.layers\] stage trunk-3 at .*expected \(2, 3\), got \(1, 2\)"),
        ):
            with pytest.raises(BundleError, match=message):
                every_cut.stage(name, remote=server.url, **given)  # type: ignore[call-overload]
        with pytest.raises(BundleError, match=r"\[input.value\] tls: expected nothing without remote="):
            every_cut.stage("trunk-2", tls="keys")  # type: ignore[call-overload]
        far = every_cut.stage("trunk-2", remote=server.url)
        with pytest.raises(BundleError, match=r"\[input.grad\]"):
            far(torch.zeros(1, 1, 96, requires_grad=True))
        with pytest.raises(BundleError, match=r"\[input.cache\]"), torch.no_grad():
            far(torch.zeros(1, 1, 96), cache=every_cut.stage("trunk-2").cache(1, 4))
        assert not [op for op, _ in server.service.counts if op not in ("hello",)]
