"""Training over the wire equals local training to the bit, and a lost server voids a step as a whole."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import splitbundle
from splitbundle import BundleError, StageServer
from splitbundle.backends.torch.pipeline import Pipeline
from splitbundle.remote.training import TrainingLink
from splitbundle.serving.stage_server import Budget, Trainer
from splitbundle.training import label_count, next_labels, token_loss
from splitbundle.wire.messages import Backward, Forward, Message, Step, Train
from tests.support.stage_servers import Dropped, Proxy, StageProcess
from tests.support.stage_servers import Forward as Ask

pytestmark = pytest.mark.usefixtures("one_thread")
CUT = (1, 5)
RATE = 1e-3


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, and a mask with ragged rows."""
    drawn = torch.Generator().manual_seed(step)
    ids = torch.randint(0, 640, (3, 7), generator=drawn)
    mask = torch.ones_like(ids)
    mask[1, 4:] = 0
    return ids, mask


class Parts:
    """Bottom, trunk and top, and the optimizers of those that are here."""

    def __init__(self, bundle: splitbundle.Bundle, url: str | None, **remote: Any) -> None:
        ends = {"trainable": True}
        self.bottom = bundle.stage(layers=(0, CUT[0]), embeds=True, head=False, **ends)
        self.top = bundle.stage(layers=(CUT[1], 6), embeds=False, head=True, **ends)
        inner = {"embeds": False, "head": False}
        self.trunk: Any = bundle.stage(
            layers=CUT, trainable=True, **inner, **({} if url is None else {"remote": url, **remote})
        )
        self.pipeline = Pipeline([self.bottom, self.trunk, self.top])
        here = [self.bottom, self.top] + ([self.trunk] if url is None else [])
        self.optimizers = [torch.optim.AdamW(part.parameters(), lr=RATE, weight_decay=0.0) for part in here]
        self.remote = url is not None

    def loss(self, step: int) -> torch.Tensor:
        ids, mask = batch(step)
        labels = next_labels(ids, mask.sum(1).tolist())
        return token_loss(self.pipeline(ids, attention_mask=mask), labels, label_count(labels))

    def step(self, step: int) -> float:
        """Take a step of two micro-batches."""
        total = 0.0
        for micro in (2 * step, 2 * step + 1):
            loss = self.loss(micro)
            loss.backward()
            total += float(loss.detach())
        if self.remote:
            self.trunk.step()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return total

    def forget(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state(self) -> dict[str, torch.Tensor]:
        return {
            name: value.detach().clone() for part in (self.bottom, self.top) for name, value in part.named_parameters()
        }


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def weights(stage: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in stage.named_parameters()}


def test_loss_and_gradients_are_the_local_ones(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer(learning_rate=RATE)) as server:
        near, far = Parts(every_cut, None), Parts(every_cut, server.url)
        for parts in (near, far):
            parts.loss(0).backward()
        for mine, theirs in ((near.bottom, far.bottom), (near.top, far.top), (near.trunk, server.stage)):
            for (name, a), (_, b) in zip(mine.named_parameters(), theirs.named_parameters(), strict=True):
                assert a.grad is not None, name
                assert torch.equal(a.grad, b.grad), name
        assert not list(far.trunk.parameters())
        far.trunk.zero_grad()
        assert all(parameter.grad is None for parameter in server.stage.parameters())


@pytest.mark.parametrize("steps", [12, pytest.param(300, marks=pytest.mark.long)])
def test_steps_over_the_wire_are_local_steps(every_cut: splitbundle.Bundle, steps: int) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer(learning_rate=RATE)) as server:
        near, far = Parts(every_cut, None), Parts(every_cut, server.url)
        for step in range(steps):
            assert near.step(step) == far.step(step)
        assert same(near.state(), far.state())
        assert same(weights(near.trunk), weights(server.stage))
        assert far.trunk.training_link.number == steps
        assert not same(weights(near.trunk), weights(every_cut.stage(layers=CUT, embeds=False, head=False)))


@pytest.mark.parametrize("wire", ["bfloat16", "float16", "int8"])
def test_gradients_in_narrow_encodings_are_near(every_cut: splitbundle.Bundle, wire: str) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer()) as server:
        near, far = Parts(every_cut, None), Parts(every_cut, server.url, wire=wire)
        for parts in (near, far):
            parts.loss(0).backward()
        mine, theirs = (torch.cat([p.grad.flatten() for p in parts.bottom.parameters()]) for parts in (near, far))
        assert 0 < float((mine - theirs).norm() / mine.norm()) < 5e-2


def test_a_frozen_bottom_still_trains_the_trunk(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer()) as server:
        far = Parts(every_cut, server.url)
        far.bottom.requires_grad_(False)
        before = weights(server.stage)
        far.loss(0).backward()
        assert far.trunk.step() == 1
        assert not same(before, weights(server.stage))


def test_a_server_with_lora(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer(lora_rank=2, optimizer="sgd", learning_rate=0.1)) as server:
        far, before = Parts(every_cut, server.url), weights(server.stage)
        for step in range(2):
            far.loss(step).backward()
            far.trunk.step(0.5)
        moved = [name for name, value in weights(server.stage).items() if not torch.equal(value, before[name])]
        assert moved
        assert all("lora" in name or ".up" in name or ".down" in name for name in moved)
        assert server.service.training.number == 2  # type: ignore[union-attr]


def test_sessions_end_when_weights_move(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer(learning_rate=0.05)) as server:
        far = Parts(every_cut, server.url)
        hidden = torch.randn(1, 3, 96)
        with torch.no_grad():
            cache = far.trunk.cache(1, 8)
            first = far.trunk(hidden, cache=cache)
        far.loss(0).backward()
        far.trunk.step()
        with torch.no_grad():
            after = far.trunk(hidden[:, :1], past=[3], cache=cache)
            fresh = far.trunk.cache(1, 8)
            assert not torch.equal(far.trunk(hidden, cache=fresh), first)
            assert torch.equal(far.trunk(hidden[:, :1], past=[3], cache=fresh), after)


def test_one_client_trains_at_a_time(every_cut: splitbundle.Bundle) -> None:
    tokens = {"alice": "a" * 20, "bob": "b" * 20}
    with StageServer(
        every_cut, layers=CUT, trainer=Trainer(), tokens=tokens, budget=Budget(lease=1.0, tickets=2)
    ) as server:
        alice = Parts(every_cut, server.url, token=tokens["alice"])
        bob = Parts(every_cut, server.url, token=tokens["bob"], timeout=0.3)
        alice.loss(0).backward()
        with pytest.raises(BundleError, match=r"\[peer.unreachable\] .*one client that trains at a time"):
            bob.loss(0)
        alice.trunk.step()
        alice.loss(1)
        alice.loss(2)
        with pytest.raises(BundleError, match=r"\[peer.unreachable\] .*|\[server.full\] .*at most 2 forward calls"):
            alice.loss(3)


# A server that is lost.


class Lost:
    """A proxy's fault that restarts the server once, before or after a message reaches it."""

    def __init__(self, kind: type[Message], moment: str) -> None:
        self.kind, self.moment, self.restart, self.armed = kind, moment, lambda: "", False

    def __call__(self, message: Message, data: bytes, ask: Ask) -> bytes:
        if not (self.armed and isinstance(message, self.kind)):
            return ask(data)
        self.armed = False
        if self.moment == "after":
            ask(data)
        self.restart()
        raise Dropped


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("kind", [Train, Forward, Backward, Step], ids=lambda kind: kind.op)
def test_a_server_that_restarts_at_a_moment_of_a_step(
    every_cut: splitbundle.Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[Message],
    moment: str,
) -> None:
    """Both sides are at the step before or after, and going on gives what a quiet run gives."""
    from splitbundle.remote import peers

    monkeypatch.setattr(peers, "FIRST_WAIT", 0.5)
    trainer = Trainer(learning_rate=RATE, checkpoints=tmp_path / "steps")
    servers = [StageServer(every_cut, layers=CUT, trainer=trainer)]
    servers[0].start()
    port = int(servers[0].url.rpartition(":")[2])
    fault = Lost(kind, moment)

    def restart() -> str:
        servers[-1].stop()
        servers.append(StageServer(every_cut, layers=CUT, trainer=trainer, port=port))
        servers[-1].start()
        return ""

    fault.restart = restart
    near = Parts(every_cut, None)
    with Proxy(servers[0].url, fault) as proxy:
        far = Parts(every_cut, proxy.url)
        losses = []
        if kind is not Train:
            losses.append(far.step(0))
        fault.armed = True
        for step in range(len(losses), 4):
            while True:
                before, number = far.state(), far.trunk.training_link.number
                try:
                    losses.append(far.step(step))
                except BundleError as error:
                    _is_lost(error)
                    assert same(before, far.state())
                    assert servers[-1].service.training.number == step  # type: ignore[union-attr]
                    assert number in (step, None)
                    far.forget()
                    continue
                break
        assert not fault.armed
    assert losses == [near.step(step) for step in range(4)]
    assert same(near.state(), far.state())
    assert same(weights(near.trunk), weights(servers[-1].stage))
    assert servers[-1].service.training.number == 4  # type: ignore[union-attr]
    servers[-1].stop()


@pytest.mark.long
def test_a_killed_process_goes_on_from_its_checkpoint(every_cut: splitbundle.Bundle, tmp_path: Path) -> None:
    """The same with ``kill -9`` at random moments, while a step is on its way."""
    options = ["--trainable", "--learning-rate", str(RATE), "--checkpoints", str(tmp_path / "steps"), "--threads", "1"]
    drawn = random.Random(1)
    shard = "trunk-3"
    server = StageProcess(every_cut.path, shard, *options)
    port, near_losses, losses = server.port, [], []
    bottom_top = [((0, 2), True, False), ((3, 6), False, True)]

    def parts(url: str | None) -> Any:
        made = Parts.__new__(Parts)
        made.bottom, made.top = (
            every_cut.stage(layers=layers, embeds=embeds, head=head, trainable=True)
            for layers, embeds, head in bottom_top
        )
        made.trunk = every_cut.stage(shard, trainable=True, **({} if url is None else {"remote": url, "timeout": 60}))
        made.pipeline = Pipeline([made.bottom, made.trunk, made.top])
        here = [made.bottom, made.top] + ([made.trunk] if url is None else [])
        made.optimizers = [torch.optim.AdamW(part.parameters(), lr=RATE, weight_decay=0.0) for part in here]
        made.remote = url is not None
        return made

    near, far = parts(None), parts(server.url)
    running = [server]

    def restart(wait: float) -> None:
        time.sleep(wait)
        running[-1].kill()
        running.append(StageProcess(every_cut.path, shard, *options, port=port))

    lost = 0
    for step in range(40):
        again: threading.Thread | None = None
        if step % 8 == 5:
            again = threading.Thread(target=restart, args=(drawn.random() * 0.03,))
            again.start()
        while len(losses) == step:
            before = far.state()
            try:
                losses.append(far.step(step))
            except BundleError as error:
                lost += _is_lost(error) and same(before, far.state())
                far.forget()
        if again is not None:
            again.join()
        near_losses.append(near.step(step))
    for each in running:
        each.end()
    assert losses == near_losses
    assert len(running) == 6
    assert 0 < lost <= 5
    assert same(near.state(), far.state())


def _is_lost(error: BundleError) -> bool:
    if error.codes != ("train.lost",) or "No weight has moved" not in str(error):
        raise error
    return True


def test_what_training_refuses(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, "trunk-2") as quiet, StageServer(every_cut, "trunk-2", trainer=Trainer()) as server:
        with pytest.raises(BundleError, match=r"\[train.refused\] trunk-2: expected a server that trains"):
            every_cut.stage("trunk-2", remote=quiet.url, trainable=True)
        with pytest.raises(BundleError, match=r"\[train.refused\] stage trunk-2: expected one server"):
            every_cut.stage("trunk-2", remote=[server.url, server.url], trainable=True)
        stage = every_cut.stage("trunk-2", remote=server.url, trainable=True)
        with pytest.raises(BundleError, match=r"\[train.lost\] .*nothing was computed since the last step"):
            stage.step()
        plain = every_cut.stage("trunk-2", remote=server.url)
        with pytest.raises(BundleError, match=r"\[train.refused\]"):
            plain.step()
        made = stage(torch.zeros(1, 1, 96))
        with pytest.raises(BundleError, match=r"\[train.ticket\] .*a gradient for every forward call, got 1 without"):
            stage.step()
        made.sum().backward()
        assert isinstance(stage.training_link, TrainingLink)
        assert stage.step() == 1
    for wrong in ({"optimizer": "lion"}, {"lora_rank": 0}):
        with pytest.raises(BundleError, match=r"\[input.value\]"):
            StageServer(every_cut, "trunk-2", trainer=Trainer(**wrong))


def test_gradients_that_are_not_finite_move_nothing(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer()) as server:
        far, before = Parts(every_cut, server.url), weights(server.stage)
        (far.loss(0) * float("inf")).backward()
        with pytest.raises(BundleError, match=r"\[train.value\] .*finite gradients"):
            far.trunk.step()
        assert same(before, weights(server.stage))
        far.forget()
        assert far.step(0) == Parts(every_cut, None).step(0)


def test_a_run_that_is_left_holds_nothing(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer(), budget=Budget(lease=0.3)) as server:
        far, training = Parts(every_cut, server.url), server.service.training
        loss = far.loss(0)
        assert training is not None
        assert training.tickets == 1
        deadline = time.monotonic() + 20
        while training.tickets and time.monotonic() < deadline:
            time.sleep(0.05)
        assert training.tickets == 0
        with pytest.raises(BundleError, match=r"\[train.lost\]"):
            loss.backward()


def test_a_pause_between_two_steps_costs_nothing(every_cut: splitbundle.Bundle) -> None:
    """The lease runs out, and nothing is lost: no gradient was on the server."""
    with StageServer(every_cut, layers=CUT, trainer=Trainer(learning_rate=RATE), budget=Budget(lease=0.3)) as server:
        near, far = Parts(every_cut, None), Parts(every_cut, server.url)
        for step in range(3):
            assert near.step(step) == far.step(step)
            time.sleep(0.8)
        assert same(weights(near.trunk), weights(server.stage))


def test_trained_weights_are_other_weights(every_cut: splitbundle.Bundle) -> None:
    """A client that only computes isn't given numbers of weights that its bundle doesn't have."""
    with StageServer(every_cut, layers=CUT, trainer=Trainer(learning_rate=RATE)) as server:
        inner = {"embeds": False, "head": False, "remote": server.url}
        before = every_cut.stage(layers=CUT, timeout=0.5, **inner)  # type: ignore[call-overload]
        hidden = torch.randn(1, 2, 96)
        with torch.no_grad():
            cache = before.cache(1, 8)
            before(hidden, cache=cache)
            with torch.enable_grad():
                Parts(every_cut, server.url).step(0)
            with pytest.raises(BundleError, match=r"\[peer.fingerprint\] .*weights that were trained for 1 steps"):
                before(hidden, past=[2], cache=cache)
            with pytest.raises(BundleError, match=r"\[peer.fingerprint\]"):
                every_cut.stage(layers=CUT, **inner)  # type: ignore[call-overload]
            after = every_cut.stage(layers=CUT, same_weights=False, **inner)  # type: ignore[call-overload]
            assert torch.equal(after(hidden), server.stage.eval()(hidden))


def test_an_interrupted_step_is_not_made_twice_nor_forgotten(
    every_cut: splitbundle.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C while the answer is on its way: the server has made the step, and the client is told."""
    from splitbundle.remote.channel import Channel

    with StageServer(every_cut, layers=CUT, trainer=Trainer(learning_rate=RATE)) as server:
        near, far = Parts(every_cut, None), Parts(every_cut, server.url)
        ask = Channel.step

        def interrupted(self: Channel, frame: bytes, timeout: float) -> bytes:
            answer = ask(self, frame, timeout)
            if b'"op":"step"' in frame:
                raise KeyboardInterrupt
            return answer

        for micro in (0, 1):
            far.loss(micro).backward()
        monkeypatch.setattr(Channel, "step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            far.trunk.step()
        monkeypatch.setattr(Channel, "step", ask)
        with pytest.raises(BundleError, match=r"\[train.gap\] .*expected step\(\) again"):
            far.loss(2)
        assert far.trunk.step() == 1
        for optimizer in far.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        near.step(0)
        assert near.step(1) == far.step(1)
        assert same(weights(near.trunk), weights(server.stage))


def test_a_step_whose_answer_is_lost_for_long_is_made_once(every_cut: splitbundle.Bundle) -> None:
    """The link is down for longer than the timeout. ``step`` again finds out, and anything else is refused."""
    down = [False]

    def fault(message: Message, data: bytes, ask: Ask) -> bytes:
        answer = ask(data)
        if down[0] or isinstance(message, Step):
            down[0] = True
            raise ConnectionResetError
        return answer

    with (
        StageServer(every_cut, layers=CUT, trainer=Trainer(learning_rate=RATE)) as server,
        Proxy(server.url, fault) as proxy,
    ):
        near, far = Parts(every_cut, None), Parts(every_cut, proxy.url, timeout=0.5)
        for micro in (0, 1):
            far.loss(micro).backward()
        with pytest.raises(BundleError, match=r"\[peer.unreachable\]"):
            far.trunk.step()
        proxy._fault = lambda message, data, ask: ask(data)
        with pytest.raises(BundleError, match=r"\[train.gap\]"):
            far.loss(0)
        assert far.trunk.step() == 1
        for optimizer in far.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        near.step(0)
        assert near.step(1) == far.step(1)
        assert same(weights(near.trunk), weights(server.stage))


def test_wrong_uses_of_training(every_cut: splitbundle.Bundle) -> None:
    with StageServer(every_cut, layers=CUT, trainer=Trainer()) as server:
        far = Parts(every_cut, server.url)
        loss = far.loss(0)
        loss.backward(retain_graph=True)
        with pytest.raises(BundleError, match=r"\[train.ticket\] .*one gradient for each forward call"):
            loss.backward()
        for rate in (float("nan"), 0, -1, "fast"):
            with pytest.raises(BundleError, match=r"\[input.value\] learning_rate"):
                far.trunk.step(rate)
        assert far.trunk.step(torch.tensor(1e-3)) == 1
        with pytest.raises(BundleError, match=r"\[train.lost\] .*nothing was computed since the last step"):
            far.trunk.step()
