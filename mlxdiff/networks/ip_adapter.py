"""IP-Adapter (Ye et al. 2023).

Pictures become tokens beside the text's: a projection of CLIP's features, and keys and
values of their own in every layer of the U-Net that attends to the text. Shape letters: B
batch, F width of CLIP's features, N tokens, D width of the text states.
Source: diffusers models/embeddings.py and attention_processor.py (IPAdapterAttnProcessor).
"""

from __future__ import annotations

from typing import Any

from mlxdiff.networks.config import IPAdapterConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes


class ImageProjection(Module):
    """One vector as several tokens: (B, F) -> (B, N, D)."""

    def __init__(self, nn: Layers, config: IPAdapterConfig) -> None:
        super().__init__(nn)
        self.tokens = config.num_tokens
        width = config.cross_attention_dim
        self.image_embeds = nn.Linear(config.feature_dim, config.num_tokens * width)
        self.norm = nn.LayerNorm(width)

    def __call__(self, features: Array) -> Array:
        tokens = self.image_embeds(features).reshape(len(features), self.tokens, -1)
        return self.norm(tokens)


class GELU(Module):
    """A linear map, then gelu."""

    def __init__(self, nn: Layers, dim_in: int, dim_out: int, bias: bool) -> None:
        super().__init__(nn)
        self.proj = nn.Linear(dim_in, dim_out, bias)

    def __call__(self, x: Array) -> Array:
        return self.nn.gelu(self.proj(x))


class FeedForward(Module):
    """Two linear maps with gelu between them."""

    def __init__(
        self, nn: Layers, dim_in: int, dim_inner: int, dim_out: int, bias: bool = True
    ) -> None:
        super().__init__(nn)
        # The second entry is dropout's place in the parameter names: net.0.proj, net.2.
        self.net = [
            GELU(nn, dim_in, dim_inner, bias),
            nn.Module(),
            nn.Linear(dim_inner, dim_out, bias),
        ]

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))


class IPAdapterFullImageProjection(Module):
    """Every vector of a picture as a token: (B, N, F) -> (B, N, D)."""

    def __init__(self, nn: Layers, config: IPAdapterConfig) -> None:
        super().__init__(nn)
        width = config.cross_attention_dim
        self.ff = FeedForward(nn, config.feature_dim, config.feature_dim, width)
        self.norm = nn.LayerNorm(width)

    def __call__(self, features: Array) -> Array:
        return self.norm(self.ff(features))


class PerceiverAttention(Module):
    """Latents attend to a picture's vectors and themselves: (B, N, H), (B, M, H) -> (B, N, H)."""

    def __init__(self, nn: Layers, dim: int, inner: int, heads: int) -> None:
        super().__init__(nn)
        self.heads = heads
        self.to_q = nn.Linear(dim, inner, bias=False)
        self.to_k = nn.Linear(dim, inner, bias=False)
        self.to_v = nn.Linear(dim, inner, bias=False)
        self.to_out = [nn.Linear(inner, dim, bias=False)]

    def __call__(self, latents: Array, context: Array) -> Array:
        q, k, v = self.to_q(latents), self.to_k(context), self.to_v(context)
        return self.to_out[0](self.nn.attention(q, k, v, self.heads))


class IPAdapterPlusImageProjectionBlock(Module):
    """A layer of the resampler: attention and feed-forward, each normalized first and added."""

    def __init__(self, nn: Layers, config: IPAdapterConfig) -> None:
        super().__init__(nn)
        dim = config.hidden_dim
        self.ln0 = nn.LayerNorm(dim)
        self.ln1 = nn.LayerNorm(dim)
        self.attn = PerceiverAttention(nn, dim, config.inner_dim, config.num_attention_heads)
        self.ff = [nn.LayerNorm(dim), FeedForward(nn, dim, config.ff_dim, dim, bias=False)]

    def __call__(self, x: Array, latents: Array) -> Array:
        queries = self.ln1(latents)
        context = self.nn.concatenate([self.ln0(x), queries], axis=1)
        latents = self.attn(queries, context) + latents
        norm, feed_forward = self.ff
        return feed_forward(norm(latents)) + latents


class IPAdapterPlusImageProjection(Module):
    """A picture's vectors, resampled: (B, M, F) -> (B, N, D)."""

    def __init__(self, nn: Layers, config: IPAdapterConfig) -> None:
        super().__init__(nn)
        dim, width = config.hidden_dim, config.cross_attention_dim
        self.latents = nn.parameter(1, config.num_tokens, dim)
        self.proj_in = nn.Linear(config.feature_dim, dim)
        self.layers = [IPAdapterPlusImageProjectionBlock(nn, config) for _ in range(config.depth)]
        self.proj_out = nn.Linear(dim, width)
        self.norm_out = nn.LayerNorm(width)

    def __call__(self, features: Array) -> Array:
        x = self.proj_in(features)
        latents = self.nn.broadcast_to(self.latents, (len(x), *self.latents.shape[1:]))
        for layer in self.layers:
            latents = layer(x, latents)
        return self.norm_out(self.proj_out(latents))


class ImageKeysValues(Module):
    """Keys and values of image tokens for one layer of the U-Net."""

    def __init__(self, nn: Layers, width: int, out: int) -> None:
        super().__init__(nn)
        self.to_k_ip = nn.Linear(width, out, bias=False)
        self.to_v_ip = nn.Linear(width, out, bias=False)

    def __call__(self, tokens: Array) -> tuple[Array, Array]:
        return self.to_k_ip(tokens), self.to_v_ip(tokens)


class IPAdapterModel(Module):
    """Turns pictures into keys and values for a U-Net.

    Args:
        features: CLIP's vectors of B pictures: (B, F), or (B, M, F) if the config's kind is not
            "image".
    Returns: for each layer of the U-Net that attends to the text (the way down, the way up, the
        middle), keys and values (B, N, width).
    """

    def __init__(self, nn: Layers, config: IPAdapterConfig) -> None:
        super().__init__(nn)
        self.config = config
        self.image_proj = _PROJECTIONS[config.kind](nn, config)
        # Files count every attention of the U-Net; those without text, the even ones, have none.
        self.ip_adapter = []
        for width in config.layer_widths:
            self.ip_adapter += [nn.Module(), ImageKeysValues(nn, config.cross_attention_dim, width)]

    def tokens(self, features: Array) -> Array:
        """The pictures as tokens: (B, N, D)."""
        return self.image_proj(self.nn.cast(features, self.dtype))

    def keys_values(self, tokens: Array) -> list[tuple[Array, Array]]:
        """Tokens (B, N, D) -> the result."""
        return [layer(tokens) for layer in self.ip_adapter[1::2]]

    def __call__(self, features: Array) -> list[tuple[Array, Array]]:
        return self.keys_values(self.tokens(features))

    def run_once(self, sizes: Sizes) -> list[tuple[Array, Array]]:
        vectors = () if self.config.kind == "image" else (sizes.tokens,)
        return self(sizes.array(sizes.batch, *vectors, self.config.feature_dim))


_PROJECTIONS: dict[str, Any] = {
    "image": ImageProjection,
    "plus": IPAdapterPlusImageProjection,
    "full": IPAdapterFullImageProjection,
}
