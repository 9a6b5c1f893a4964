"""The blocks that the networks share.

A sum is taken in place where its first term is a new array, so that NumPy makes one array less.
Inputs are never written to.
"""

from __future__ import annotations

from collections.abc import Sequence

from mlxdiff.networks.condition import Condition
from mlxdiff.networks.layers import Array, Layers, Module


class TimestepEmbedding(Module):
    """Two linear layers on a sinusoidal embedding.

    Args:
        sample: (B, in_channels).
        condition: (B, cond_proj_dim), added through a linear layer first (a distilled model's
            guidance scale); None: nothing is added.
    Returns: (B, time_embed_dim).
    """

    def __init__(
        self, nn: Layers, in_channels: int, time_embed_dim: int, cond_proj_dim: int | None = None
    ) -> None:
        super().__init__(nn)
        self.linear_1 = nn.Linear(in_channels, time_embed_dim)
        if cond_proj_dim is not None:
            self.cond_proj = nn.Linear(cond_proj_dim, in_channels, bias=False)
        self.linear_2 = nn.Linear(time_embed_dim, time_embed_dim)

    def __call__(self, sample: Array, condition: Array | None = None) -> Array:
        if condition is not None:
            sample = sample + self.cond_proj(condition)
        return self.linear_2(self.nn.silu(self.linear_1(sample)))


class ResnetBlock2D(Module):
    """Two normalized 3x3 convolutions with a timestep shift between them, and a shortcut.

    With ``scale_shift`` the timestep scales and shifts what the second norm gives (Dhariwal and
    Nichol 2021, section 3.1).

    Args:
        x: (B, H, W, in_channels).
        temb: timestep embedding, (B, temb_channels); None in the VAE.
    Returns: (B, H, W, out_channels).
    Source: Rombach et al. 2022, appendix E; diffusers models/resnet.py ResnetBlock2D.
    """

    def __init__(
        self,
        nn: Layers,
        in_channels: int,
        out_channels: int,
        temb_channels: int | None,
        groups: int,
        eps: float,
        scale_shift: bool = False,
    ) -> None:
        super().__init__(nn)
        self.scale_shift = scale_shift
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        if temb_channels is not None:
            self.time_emb_proj = nn.Linear(temb_channels, (1 + scale_shift) * out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = None
        if in_channels != out_channels:
            self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: Array, temb: Condition | None = None) -> Array:
        h = self.norm1.silu(x)
        shift = None
        if temb is not None:
            (shift,) = temb.made_by(self, self._shift)
            if (frames := temb.frames.count) > 1:
                repeated = self.nn.concatenate([shift[:, None]] * frames, axis=1)
                shift = repeated.reshape(-1, *shift.shape[1:])
        if self.scale_shift and shift is not None:
            scale, shift = self.nn.split(shift, 2, axis=-1)
            h = self.norm2(self.conv1(h))
            h *= 1 + scale
            h += shift
            h = self.nn.silu(h)
        else:
            h = self.norm2.silu(self.conv1(h, shift))
        if self.conv_shortcut is None:
            return self.conv2(h, x)
        # A function: NumPy makes the shortcut after conv2, and does not hold it meanwhile.
        shortcut = self.conv_shortcut
        return self.conv2(h, lambda: shortcut(x))

    def _shift(self, temb: Array) -> tuple[Array]:
        """Make the shift of each channel: (B, temb_channels) -> (B, 1, 1, C)."""
        return (self.time_emb_proj(self.nn.silu(temb))[:, None, None, :],)


class Downsample2D(Module):
    """3x3 convolution of stride 2: (B, H, W, C) -> (B, H', W', C).

    Args:
        padding: 1, or 0 for a row and a column of zeros at the lower and right edges only (the
            VAE).
    """

    def __init__(self, nn: Layers, channels: int, padding: int) -> None:
        super().__init__(nn)
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def __call__(self, x: Array) -> Array:
        if self.padding == 0:
            x = self.nn.pad(x, [(0, 0), (0, 1), (0, 1), (0, 0)])
        return self.conv(x)


class Upsample2D(Module):
    """Nearest-neighbour upsampling, then a 3x3 convolution.

    Args:
        x: (B, H, W, C).
        size: height and width of the output; None: twice those of x.
    Returns: (B, height, width, C).
    """

    def __init__(self, nn: Layers, channels: int) -> None:
        super().__init__(nn)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: Array, size: tuple[int, ...] | None = None) -> Array:
        height, width = (2 * x.shape[1], 2 * x.shape[2]) if size is None else size
        return self.conv(self.nn.upsample_nearest(x, height, width))


class Attention(Module):
    """Multi-head attention with its four projections.

    A feature map (B, H, W, C), as in the VAE and the U-Net without text, is normalized first where
    there are ``norm_num_groups``, attends to itself, and is added to the result.

    Args:
        x: tokens, the rows of all samples in one matrix (B * L, query_dim), or a feature map.
        encoder_hidden_states: x attends to these states, (B, S, context_dim). None: to itself.
        batch: B; None where x is a feature map.
        inputs: knows changes of the inputs of the projections (ControlNet-LLLite).
    Returns: the shape of x.
    Source: diffusers models/attention_processor.py Attention.
    """

    def __init__(
        self,
        nn: Layers,
        query_dim: int,
        heads: int,
        context_dim: int | None = None,
        bias: bool = False,
        norm_num_groups: int | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(nn)
        context_dim = query_dim if context_dim is None else context_dim
        self.heads = heads
        self.group_norm = None
        if norm_num_groups is not None:
            self.group_norm = nn.GroupNorm(norm_num_groups, query_dim, eps)
        self.to_q = nn.Linear(query_dim, query_dim, bias)
        self.to_k = nn.Linear(context_dim, query_dim, bias)
        self.to_v = nn.Linear(context_dim, query_dim, bias)
        self.to_out = [nn.Linear(query_dim, query_dim)]

    def __call__(
        self,
        x: Array,
        encoder_hidden_states: Condition | None = None,
        batch: int | None = None,
        inputs: Condition | None = None,
    ) -> Array:
        def changed(name: str) -> Array:
            return tokens if inputs is None else inputs.changed_input(self, name, tokens)

        tokens = x if self.group_norm is None else self.group_norm(x)
        if batch is None:
            batch, tokens = len(x), tokens.reshape(-1, x.shape[-1])
        if encoder_hidden_states is None:
            k, v = self.to_k(changed("to_k")), self.to_v(changed("to_v"))
        else:
            k, v = encoder_hidden_states.made_by(self, self._kept_keys_values)
        q = self.to_q(changed("to_q"))
        out = self.nn.attention(q, k, v, self.heads, batch=batch)
        if encoder_hidden_states is not None:
            for k, v, scale in encoder_hidden_states.beside(self):
                out = out + scale * self.nn.attention(q, k, v, self.heads, batch=batch)
        out = self.to_out[0](out)
        if x.ndim == 4:
            out = out.reshape(x.shape)
            out += x
        return out

    def _keys_values(self, context: Array) -> tuple[Array, Array]:
        return self.to_k(context), self.to_v(context)

    def _kept_keys_values(self, context: Array) -> tuple[Array, Array]:
        """Make keys and values (B, S, ...) that many evaluations use."""
        return self._padded(*self._keys_values(context))

    def _padded(self, k: Array, v: Array) -> tuple[Array, Array]:
        return self.nn.pad_heads(k, self.heads), self.nn.pad_heads(v, self.heads)

    def keep_beside(self, text: Condition, k: Array, v: Array, scale: float) -> None:
        """Attend to other keys and values (B, S, ...) beside those of a text, in all evaluations.

        Args:
            scale: factor of that attention.
        """
        k, v = self._padded(k, v)
        self.nn.evaluate(k, v)
        text.put_beside(self, k, v, scale)

    def absorb(self, texts: Sequence[Condition]) -> None:
        """Make the keys and values of these texts, then drop the layers that make them."""
        for text in texts:
            self.nn.evaluate(text.made_by(self, self._kept_keys_values))
        del self.to_k, self.to_v


class GEGLU(Module):
    """One half of a linear map, gated by the gelu of the other (Shazeer 2020)."""

    def __init__(self, nn: Layers, dim_in: int, dim_out: int) -> None:
        super().__init__(nn)
        self.proj = nn.Linear(dim_in, 2 * dim_out)

    def __call__(self, x: Array) -> Array:
        return self.nn.geglu(self.proj(x))


class FeedForward(Module):
    """GEGLU to four times the width and back."""

    def __init__(self, nn: Layers, dim: int) -> None:
        super().__init__(nn)
        # The second entry is dropout's place in the parameter names: net.0.proj, net.2.
        self.net = [GEGLU(nn, dim, 4 * dim), nn.Module(), nn.Linear(4 * dim, dim)]

    def __call__(self, x: Array) -> Array:
        return self.net[2](self.net[0](x))
