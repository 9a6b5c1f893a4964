"""CLIP's text encoder (Radford et al. 2021), OpenCLIP's included.

Shape letters: B batch, T tokens, D hidden_size, P projection_dim.
Source: transformers models/clip/modeling_clip.py.
"""

from __future__ import annotations

from typing import NamedTuple

from mlxdiff.networks.config import CLIPTextConfig, CLIPVisionConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes

CLIPConfig = CLIPTextConfig | CLIPVisionConfig


class CLIPTextOutput(NamedTuple):
    """The states of a text encoder for a prompt.

    Attributes:
        last_hidden_state: (B, T, D), after the final layer norm.
        hidden_states: num_hidden_layers + 1 arrays (B, T, D), before the final layer norm; the
            first is the embeddings.
        pooled: (B, D), last_hidden_state at the end of the text.
        text_embeds: (B, P), pooled and projected; None where the model has no projection.
    """

    last_hidden_state: Array
    hidden_states: tuple[Array, ...]
    pooled: Array
    text_embeds: Array | None


class CLIPTextEmbeddings(Module):
    """Token and position embeddings: (B, T) int -> (B, T, D).

    Ids beyond the vocabulary, and those below 0, take the rows of ``vectors`` (N, D), from the
    first on: ``vocab_size + k`` and ``-1 - k`` both take row k (textual inversion).
    """

    def __init__(self, nn: Layers, config: CLIPTextConfig) -> None:
        super().__init__(nn)
        self.vocab_size = config.vocab_size
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, input_ids: Array, vectors: Array | None = None) -> Array:
        positions = self.position_embedding(self.nn.arange(input_ids.shape[1]))
        if vectors is None:
            return self.token_embedding(input_ids) + positions
        beyond = input_ids >= self.vocab_size
        beside = beyond | (input_ids < 0)
        rows = self.nn.where(beyond, input_ids - self.vocab_size, -1 - input_ids)
        tokens = self.token_embedding(self.nn.where(beside, 0, input_ids))
        own = self.nn.cast(vectors[self.nn.where(beside, rows, 0)], tokens.dtype)
        return self.nn.where(beside[..., None], own, tokens) + positions


class CLIPAttention(Module):
    """Multi-head self-attention: x (B, T, D), mask (T, T) or None -> (B, T, D)."""

    def __init__(self, nn: Layers, config: CLIPConfig) -> None:
        super().__init__(nn)
        self.heads = config.num_attention_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        return self.out_proj(
            self.nn.attention(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask)
        )


class CLIPMLP(Module):
    """Two linear layers with the config's activation between them."""

    def __init__(self, nn: Layers, config: CLIPConfig) -> None:
        super().__init__(nn)
        self.activation = nn.activation(config.hidden_act)
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Array) -> Array:
        return self.fc2(self.activation(self.fc1(x)))


class CLIPEncoderLayer(Module):
    """A transformer layer, normalized before attention and before the MLP."""

    def __init__(self, nn: Layers, config: CLIPConfig) -> None:
        super().__init__(nn)
        self.self_attn = CLIPAttention(nn, config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = CLIPMLP(nn, config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, x: Array, mask: Array | None) -> Array:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class CLIPEncoder(Module):
    """All layers. Returns the input and the output of each layer, num_hidden_layers + 1 arrays."""

    def __init__(self, nn: Layers, config: CLIPConfig) -> None:
        super().__init__(nn)
        self.layers = [CLIPEncoderLayer(nn, config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: Array, mask: Array | None) -> list[Array]:
        hidden_states = [x]
        for layer in self.layers:
            hidden_states.append(layer(hidden_states[-1], mask))
        return hidden_states


class CLIPTextTransformer(Module):
    """Embeddings, causal encoder, final layer norm, and the state at the end of the text."""

    def __init__(self, nn: Layers, config: CLIPTextConfig) -> None:
        super().__init__(nn)
        self.eos_token_id = config.eos_token_id
        self.embeddings = CLIPTextEmbeddings(nn, config)
        self.encoder = CLIPEncoder(nn, config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)

    def __call__(self, input_ids: Array, vectors: Array | None = None) -> CLIPTextOutput:
        length = input_ids.shape[1]
        positions = self.nn.arange(length)
        causal = positions[:, None] >= positions
        hidden_states = self.encoder(self.embeddings(input_ids, vectors), causal)
        last = self.final_layer_norm(hidden_states[-1])
        # Configs with the legacy eos_token_id 2 come with tokenizers whose end is the largest id.
        legacy = self.eos_token_id == 2
        end = input_ids.max(axis=1, keepdims=True) if legacy else self.eos_token_id
        # The first such position; 0 where there is none.
        where = self.nn.where(input_ids == end, positions, length).min(axis=1) % length
        pooled = last[self.nn.arange(len(last)), where]
        return CLIPTextOutput(last, tuple(hidden_states), pooled, None)


class CLIPTextModel(Module):
    """The text encoder, with a projection of the pooled state where the config has one.

    Args:
        input_ids: (B, T) int, T at most max_position_embeddings.
        vectors: (N, D), for ids that are not in the vocabulary; see CLIPTextEmbeddings.
    Returns: CLIPTextOutput, in the dtype of the weights.
    """

    def __init__(self, nn: Layers, config: CLIPTextConfig) -> None:
        super().__init__(nn)
        self.text_model = CLIPTextTransformer(nn, config)
        self.text_projection = None
        if config.with_projection:
            self.text_projection = nn.Linear(config.hidden_size, config.projection_dim, bias=False)

    def __call__(self, input_ids: Array, vectors: Array | None = None) -> CLIPTextOutput:
        output = self.text_model(input_ids, vectors)
        if self.text_projection is None:
            return output
        return output._replace(text_embeds=self.text_projection(output.pooled))

    def run_once(self, sizes: Sizes) -> CLIPTextOutput:
        return self(sizes.array(sizes.batch, sizes.tokens))
