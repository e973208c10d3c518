"""The tensors that an architecture implies are those of the specification's table."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable

import pytest

from splitbundle.format.architecture import attention, feedforward, norms, positions, rotary
from splitbundle.format.architecture import decoder as architectures
from splitbundle.format.architecture.experts import Experts
from tests.support.paths import ROOT
from tests.support.variants import VARIANTS, facts

SPEC = {"decoder.md": (ROOT / "spec" / "v1" / "decoder.md").read_text("utf-8")}


def test_bases_and_variants_have_every_choice() -> None:
    documents = [json.loads(facts(name).to_bytes()) for name in ("gpt2", "llama3", *VARIANTS)]
    kinds = [kind for document in documents for kind in document["layer_kinds"].values()]
    positions = [kind["attention"]["position"] for kind in kinds]
    own_norms = [kind["attention"]["query_key_norm"] for kind in kinds if kind["attention"]["query_key_norm"]]
    assert {kind["placement"] for kind in kinds} == set(norms.PLACEMENTS)
    assert {kind["mlp"]["activation"] for kind in kinds} == set(feedforward.ACTIVATIONS)
    assert {kind["norm"]["kind"] for kind in kinds} == set(norms.NORM_KINDS)
    assert {its["width"] for its in own_norms} == set(attention.QUERY_KEY_WIDTHS)
    assert {position["kind"] for position in positions} == {"none", "rotary", "alibi"}
    assert {position.get("layout", "half") for position in positions} == set(rotary.ROTARY_LAYOUTS)
    assert {position.get("scaling", {"kind": "none"})["kind"] for position in positions} == {*rotary.SCALINGS}
    assert {document["embedding"]["position"]["kind"] for document in documents} == {"none", "learned", "sinusoidal"}


@pytest.mark.rule("SB-C-018", "SB-C-021")
@pytest.mark.parametrize("name", ["gpt2", "llama3", *VARIANTS])
def test_tensors_are_those_of_the_table(name: str) -> None:
    section = SPEC["decoder.md"].partition("\n## Tensors\n")[2]
    rows = re.findall(r"^\| (.*?) \| `(.*?)` \| \[(.*?)\] \| (.*?) \|$", section, flags=re.MULTILINE)
    shapes = re.findall(r"^\| `(\w+)` \| .* \| \[(.*?)\] \| \[(.*?)\] \|$", SPEC["decoder.md"], flags=re.MULTILINE)
    widths = {width: {"query_norm": query, "key_norm": key} for width, query, key in shapes}
    assert widths.keys() == set(attention.QUERY_KEY_WIDTHS)
    architecture = facts(name)
    embedding, head = architecture.embedding, architecture.head
    for layer, kind_name in enumerate(architecture.layers):
        kind = architecture.layer_kinds[kind_name]
        sizes = architecture_sizes(architecture, kind)
        own, gate = kind.attention.query_key_norm, kind.attention.output_gate
        for unit, title in (("embedding", "embedding"), (architecture.layer_unit(layer), "layer i"), ("head", "head")):
            there = {
                "always": True,
                "positions are learned": isinstance(embedding.position, positions.Learned),
                "token_size isn't hidden_size": embedding.token_size != architecture.hidden_size,
                "the embedding has a norm": embedding.norm is not None,
                "qkv_bias": kind.attention.qkv_bias,
                "query_key_norm": own is not None,
                "sinks": kind.attention.sinks,
                **{
                    f"output_gate, width {width}": gate is not None and gate.width == width
                    for width in ("head", "channel")
                },
                "output_gate with a bias": gate is not None and gate.bias,
                "output_bias": kind.attention.output_bias,
                "activation is xielu": kind.mlp.activation == "xielu",
                **mlp_conditions(kind.mlp),
                "the head has a norm": head.norm is not None,
                "the head isn't tied": not head.tied,
                "the head has a bias": head.bias,
            }
            expected = {}
            for group, tensor, shape, condition in rows:
                module, part = tensor.split(".")[-2:]
                placements = re.findall(r"[a-z_]+", condition.removeprefix("placement "))
                wanted = kind.placement in placements if condition.startswith("placement ") else there[condition]
                if group.strip("`") != title or not wanted:
                    continue
                if module in ("query_norm", "key_norm") and own is not None:
                    its: norms.Norm | None = own.norm
                    shape = widths[own.width][module]
                else:
                    its = {"embedding": embedding.norm, "layer i": kind.norm, "head": head.norm}[title]
                if module.endswith("norm") and its is not None and not (its.affine if part == "weight" else its.bias):
                    continue
                expected[tensor.replace("layers.i.", f"layers.{layer}.")] = tuple(map(sizes, shape.split(", ")))
            assert list(architecture.unit_tensors()[unit].items()) == list(expected.items())


def mlp_conditions(mlp: feedforward.Mlp | Experts) -> dict[str, bool]:
    dense, gated, bias = isinstance(mlp, feedforward.Mlp), mlp.gated, mlp.bias
    router, shared = (None, None) if isinstance(mlp, feedforward.Mlp) else (mlp.router, mlp.shared)
    return {
        "dense": dense,
        "dense, gated": dense and gated,
        "dense, and mlp has biases": dense and bias,
        "dense, gated, and mlp has biases": dense and gated and bias,
        "experts": not dense,
        "experts, and the router has a bias": router is not None and router.bias,
        "experts, and correction isn't null": router is not None and router.correction is not None,
        "experts, gated": not dense and gated,
        "experts, gated, with biases": not dense and gated and bias,
        "experts with biases": not dense and bias,
        "shared": shared is not None,
        "shared, gated": shared is not None and gated,
        "shared, gated, with biases": shared is not None and gated and bias,
        "shared with biases": shared is not None and bias,
        "shared, with a gate": shared is not None and shared.gate,
    }


def architecture_sizes(architecture: architectures.Architecture, kind: architectures.LayerKind) -> Callable[[str], int]:
    """Evaluate a dimension of the table: a name, a number, a product or a sum."""
    position = architecture.embedding.position
    named = {
        "vocab_size": architecture.vocab_size,
        "hidden_size": architecture.hidden_size,
        "token_size": architecture.embedding.token_size,
        "count": position.count if isinstance(position, positions.Learned) else 0,
        "offset": position.offset if isinstance(position, positions.Learned) else 0,
        "heads": kind.attention.heads,
        "kv_heads": kind.attention.kv_heads,
        "head_dim": kind.attention.head_dim,
        "value_dim": kind.attention.value_size,
        "intermediate_size": kind.mlp.intermediate_size,
        "experts": kind.mlp.count if isinstance(kind.mlp, Experts) else 0,
        "shared_size": kind.mlp.shared.intermediate_size if isinstance(kind.mlp, Experts) and kind.mlp.shared else 0,
        "1": 1,
    }
    return lambda size: sum(math.prod(named[factor] for factor in term.split("·")) for term in size.split(" + "))
