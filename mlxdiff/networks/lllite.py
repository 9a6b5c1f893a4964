"""ControlNet-LLLite (kohya 2023): small modules that change the inputs of attention layers.

The input x of a query, key or value layer becomes x + up(mid([c, down(x)])), with the embedded
control picture c. The modules are small, and c is the same in every evaluation.
Source: networks/control_net_lllite.py of kohya's sd-scripts.
"""

from __future__ import annotations

from typing import Any

from mlxdiff.networks.config import LLLiteConfig, LLLiteModuleConfig
from mlxdiff.networks.layers import Array, Layers, Module, Sizes


class LLLiteModule(Module):
    """The change of one layer's input.

    Args:
        x: (B * L, in_dim), the rows of all samples in one matrix.
        condition: the embedded picture, (1, L, cond_emb_dim).
    Returns: what is added to x.
    """

    def __init__(self, nn: Layers, config: LLLiteModuleConfig) -> None:
        super().__init__(nn)
        half, whole = config.cond_emb_dim // 2, config.cond_emb_dim
        sizes = {
            1: [(half, whole, 2)],
            2: [(half, whole, 4)],
            3: [(half, half, 4), (half, whole, 2)],
        }[config.depth]
        # Activations stand between the convolutions, and count in the parameter names.
        self.conditioning1: list[Any] = [nn.Conv2d(3, half, 4, stride=4)]
        for before, after, kernel in sizes:
            self.conditioning1 += [nn.Module(), nn.Conv2d(before, after, kernel, stride=kernel)]
        self.down = [nn.Linear(config.in_dim, config.mlp_dim)]
        self.mid = [nn.Linear(config.mlp_dim + whole, config.mlp_dim)]
        self.up = [nn.Linear(config.mlp_dim, config.in_dim)]

    def embed(self, image: Array) -> Array:
        """Embed a control picture (1, H, W, 3): (1, L, cond_emb_dim)."""
        x = self.conditioning1[0](image)
        for layer in self.conditioning1[2::2]:
            x = layer(self.nn.relu(x))
        return x.reshape(1, -1, x.shape[-1])

    def __call__(self, x: Array, condition: Array) -> Array:
        nn = self.nn
        _, length, width = condition.shape
        batch = len(x) // length
        rows = nn.broadcast_to(condition, (batch, length, width)).reshape(-1, width)
        joined = nn.concatenate([rows, nn.relu(self.down[0](x))], axis=-1)
        return self.up[0](nn.relu(self.mid[0](joined)))


class LLLiteModel(Module):
    """All modules of a ControlNet-LLLite, in the order of its config."""

    def __init__(self, nn: Layers, config: LLLiteConfig) -> None:
        super().__init__(nn)
        self.config = config
        self.lllites = [LLLiteModule(nn, module) for module in config.modules]

    def embed_image(self, image: Array) -> list[Array]:
        """Embed a control picture for each module, the same in every step.

        Args:
            image: (1, H, W, 3), RGB in [0, 1]; H and W are multiples of the config's ``factor``.
        Returns: (1, L, cond_emb_dim) for each module.
        """
        image = self.nn.cast(image * 2.0 - 1.0, self.dtype)
        return [module.embed(image) for module in self.lllites]

    def run_once(self, sizes: Sizes) -> list[Array]:
        embedded = self.embed_image(sizes.array(1, sizes.height, sizes.width, 3))
        return [
            module(sizes.array(sizes.batch * one.shape[1], config.in_dim), one)
            for module, config, one in zip(self.lllites, self.config.modules, embedded, strict=True)
        ]
