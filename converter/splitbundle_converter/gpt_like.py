"""What the families that come from GPT share: the facts under whichever field names, and tables of tensor names."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final

from splitbundle.architecture import Architecture, Embedding, Head, LayerKind, Mlp, Norm
from splitbundle.manifest import SourceName
from splitbundle_converter.config_reader import ConfigReader
from splitbundle_converter.family import (
    ACTIVATIONS,
    Family,
    Modules,
    assemble,
    attention,
    divide,
    embedding,
    head,
    layer_count,
    layer_kind,
    layer_norm,
    names,
)

TRAINING: Final = frozenset(
    [
        "activation_dropout",
        "attention_dropout",
        "attention_probs_dropout_prob",
        "attn_pdrop",
        "classifier_dropout",
        "dropout",
        "embd_pdrop",
        "embed_dropout",
        "embedding_dropout",
        "hidden_dropout",
        "hidden_dropout_prob",
        "init_std",
        "layerdrop",
        "resid_dropout",
        "resid_pdrop",
        "residual_dropout",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
    ]
)
"""Fields of training, and of heads that classify: they change no number of a language model in inference."""
TORCH_EPS: Final = 1e-5
"""What ``torch.nn.LayerNorm`` adds to the variance where a family doesn't say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Basics:
    """What every configuration says, under whichever names."""

    hidden: int
    heads: int
    head_dim: int
    layers: int
    norm: Norm
    mlp: Mlp


def basics(
    config: ConfigReader,
    *,
    hidden: str = "hidden_size",
    heads: str = "num_attention_heads",
    layers: str = "num_hidden_layers",
    inner: str | None = "intermediate_size",
    activation: str | None = "hidden_act",
    eps: str | None = "layer_norm_eps",
    mlp_bias: bool = True,
    **of_norm: Any,
) -> Basics:
    """Reads what all families share.

    Args:
        config: the configuration.
        hidden: the field of the hidden size; as the next ones, by default what Llama calls it.
        heads: of the number of heads.
        layers: of the number of layers.
        inner: of the width of the feed-forward block; None, or a null there, is four times the hidden size.
        activation: of its activation; None where there is no choice, and GELU.
        eps: of the norm's epsilon; None where there is no choice.
        mlp_bias: whether it has biases.
        of_norm: arguments of ``layer_norm``.
    """
    config.inert(TRAINING)
    size, count = config.integer(hidden), config.integer(heads)
    head_dim = divide(config, hidden, size, heads, count)
    mlp = Mlp(
        gated=False,
        activation="gelu" if activation is None else config.choice(activation, ACTIVATIONS),
        intermediate_size=4 * size if inner is None or config.raw(inner) is None else config.integer(inner),
        bias=mlp_bias,
    )
    norm = layer_norm(TORCH_EPS if eps is None else config.number(eps), **of_norm)
    return Basics(hidden=size, heads=count, head_dim=head_dim, layers=layer_count(config, layers), norm=norm, mlp=mlp)


def build(
    config: ConfigReader,
    basic: Basics,
    *,
    placement: str = "pre",
    of_embedding: Embedding | None = None,
    of_head: Head | None = None,
    of_layer: Callable[[int], dict[str, Any]] = lambda layer: {},
    **of_attention: Any,
) -> Architecture:
    """The architecture; by default the head is the norm and a projection, tied as ``tie_word_embeddings`` says.

    Args:
        config: the configuration.
        basic: what was read of it.
        placement: of the norms.
        of_embedding: by default, tokens without positions.
        of_head: the head, if it isn't the default.
        of_layer: arguments of ``attention`` that vary by layer.
        of_attention: arguments of ``attention`` that all layers share.
    """

    def layer(index: int) -> LayerKind:
        own = attention(heads=basic.heads, head_dim=basic.head_dim, **(of_attention | of_layer(index)))
        return layer_kind(own, basic.mlp, basic.norm, placement=placement)

    return assemble(
        vocab_size=config.integer("vocab_size"),
        hidden_size=basic.hidden,
        embedding=embedding(basic.hidden) if of_embedding is None else of_embedding,
        layers=[layer(index) for index in range(basic.layers)],
        head=head(basic.norm, tied=config.boolean("tie_word_embeddings")) if of_head is None else of_head,
    )


def fused(
    modules: Modules, *, groups: int | None = None, transposed: Iterable[str] = ()
) -> Callable[[Architecture], tuple[SourceName, ...]]:
    """A name table in which queries, keys and values are one tensor, by default each key head's together."""

    def table(architecture: Architecture) -> tuple[SourceName, ...]:
        by_head = architecture.kind_of(0).attention.kv_heads
        return names(modules, groups=by_head if groups is None else groups, transposed=transposed)

    return table


QUERY_KEY_VALUE: Final = tuple(f"layers.{{layer}}.attention.{part}" for part in ("query", "key", "value"))


def megatron_modules(
    base: str, *, table: str, layers: str, attention: str, last: str, projection: str = "lm_head"
) -> dict[str, str | tuple[str, ...]]:
    """The names that Megatron-LM gave; what stands around a layer's parts, each family calls as it likes."""
    layer = f"{base}.{layers}.{{layer}}"
    return {
        f"{base}.{table}": "embedding.token",
        f"{layer}.input_layernorm": "layers.{layer}.attention_norm",
        f"{layer}.{attention}.query_key_value": QUERY_KEY_VALUE,
        f"{layer}.{attention}.dense": "layers.{layer}.attention.output",
        f"{layer}.post_attention_layernorm": "layers.{layer}.mlp_norm",
        f"{layer}.mlp.dense_h_to_4h": "layers.{layer}.mlp.up",
        f"{layer}.mlp.dense_4h_to_h": "layers.{layer}.mlp.down",
        f"{base}.{last}": "head.norm",
        projection: "head.projection",
    }


def row(
    model_type: str,
    facts: Callable[[ConfigReader], Architecture],
    table: Callable[[Architecture], tuple[SourceName, ...]],
    *dropped: str,
    base: str = "transformer",
    layers: str = "h",
) -> Family:
    """A row whose base model is ``base``, with its layers in ``layers``."""
    return Family(
        model_type=model_type,
        facts=facts,
        names=table,
        prefix=f"{base}.",
        layers=f"{base}.{layers}",
        dropped=dropped,
    )
