"""A model at work on a backend: its networks with all additions, and the stages of a run.

Every kind of model has this interface. A model never changes: ``with_additions`` gives another one
that shares the loaded networks. So a run keeps the additions that it began with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlxdiff.convert import Component
from mlxdiff.noise import NoiseSource
from mlxdiff.run.additions import Additions
from mlxdiff.run.additions.control import Controlled
from mlxdiff.run.additions.controlnet import ControlNet
from mlxdiff.run.additions.ip_adapter import IPAdapter
from mlxdiff.run.additions.t2i_adapter import T2IAdapter
from mlxdiff.run.kind import Kind, Network
from mlxdiff.run.network_cache import NetworkCache
from mlxdiff.store.folder import ModelSource

if TYPE_CHECKING:
    import PIL.Image
    from typing_extensions import Self

    from mlxdiff.run.options import RunOptions
    from mlxdiff.run.settings import Settings


class PromptEmbeddings(NamedTuple):
    """Prompt inputs of the U-Net, float32. The pooled ones are None if it takes none.

    Attributes:
        prompt_embeds: (1, T, D); T is 77, or a multiple of it for a long prompt in a1111 syntax.
        negative_prompt_embeds: (1, T, D); None without guidance.
        pooled_prompt_embeds: (1, P).
        negative_pooled_prompt_embeds: (1, P).
    """

    prompt_embeds: np.ndarray
    negative_prompt_embeds: np.ndarray | None = None
    pooled_prompt_embeds: np.ndarray | None = None
    negative_pooled_prompt_embeds: np.ndarray | None = None


class ImageLatents(NamedTuple):
    """A picture, encoded by a VAE and scaled for the U-Net: (1, H/f, W/f, C) float32.

    Attributes:
        mean: the latents.
        std: of the distribution around them; None where the VAE gives none (TAESD).
    """

    mean: np.ndarray
    std: np.ndarray | None

    def draw(self, noise: Callable[[], np.ndarray]) -> np.ndarray:
        """Return a sample; asks for noise only where there is a distribution."""
        return self.mean if self.std is None else self.mean + self.std * noise()


class Model(Kind):
    """A model at work: facts about it (``Kind``), its networks and its stages.

    Args:
        source: the opened model.
        backend: the backend that computes (``backends.protocol.Backend``).
        additions: what is added to it.
        cache: its networks that are loaded; None: none yet.
        vae_tiling: decode in bands, or not; None: as ``band_bytes`` chooses.
    Attributes:
        texts: its text encoders; None: it has none.
    """

    texts: Any = None

    def __init__(
        self,
        source: ModelSource,
        backend: Any,
        additions: Additions | None = None,
        cache: NetworkCache | None = None,
        vae_tiling: bool | None = None,
    ) -> None:
        self.source = source
        self.backend = backend
        self.additions = Additions() if additions is None else additions
        self.cache = NetworkCache(backend) if cache is None else cache
        self.vae_tiling = vae_tiling
        self._set_up()

    @abstractmethod
    def _set_up(self) -> None:
        """Work out the facts about the model with its additions, and what its stages need."""

    def with_additions(self, additions: Additions) -> Self:
        """Return the same model with these additions in place of its own.

        Raises: UsageError if one does not fit the model.
        """
        return type(self)(self.source, self.backend, additions, self.cache, self.vae_tiling)

    @property
    def controlnets(self) -> tuple[ControlNet, ...]:
        """The ControlNets that were added."""
        return self.additions.of(ControlNet)

    @property
    def controlled(self) -> tuple[Controlled, ...]:
        """The additions that follow a control picture, in the order of their pictures."""
        return *self.controlnets, *self.additions.of(T2IAdapter)

    @property
    def ip_adapters(self) -> tuple[IPAdapter, ...]:
        """The IP-Adapters that were added."""
        return self.additions.of(IPAdapter)

    # Networks

    def component(self, name: str, position: int | None = None) -> Any:
        """Return a network, loaded.

        Args:
            name: "unet", "vae", "text_encoder", "text_encoder_2", or the name of an added network
                ("controlnet", "ip_adapter", "image_encoder").
            position: of an added network, among those of its name.
        """
        network = Network(name, position)
        return self.cache.load(network, self.component_of(network), self.additions)

    def take(self, name: str, position: int | None = None) -> Any:
        """Return a network as ``component`` does.

        In low memory it is the caller's alone, and leaves memory with the caller.
        """
        loaded = self.component(name, position)
        if self.low_memory:
            self.cache.release(Network(name, position))
        return loaded

    def component_of(self, network: Network) -> Component:
        """Config and tensors of a network, with the additions in them."""
        if network.position is not None:
            _, component = self.additions.networks[network]
            return component
        name = network.name
        own = Component(
            self.source.config(name), lambda: self.source.tensors(name), self.source.provenance
        )
        return self.additions.change(name, own)

    def band_bytes(self, height: int, width: int, low_memory: bool) -> int | None:
        """Size of the bands that a picture of this size is decoded in; None: it is decoded whole.

        Args:
            height, width: of the picture.
            low_memory: as if the model worked so.
        """
        return None

    @property
    def load_seconds(self) -> float:
        """Time spent on reading weights so far."""
        return self.cache.load_seconds

    @property
    def low_memory(self) -> bool:
        """Return True if one stage's networks are in memory at a time, with weights as stored."""
        return self.cache.low_memory

    def save_memory(self, low_memory: bool, vae_tiling: bool | None = None) -> None:
        """Set ``low_memory`` and ``vae_tiling``; release networks that are loaded otherwise."""
        if low_memory != self.cache.low_memory:
            self.cache.release_all()
        self.cache.low_memory, self.vae_tiling = low_memory, vae_tiling

    # Stages

    @abstractmethod
    def resolve(self, asked: RunOptions, refiner: Model | None) -> Settings:
        """Check and fill in what this kind of model takes for a run.

        Args:
            asked: options of parts that the model has; sampler, steps and guidance are filled in.
            refiner: of the run; None: there is none.
        Raises: UsageError.
        """

    @abstractmethod
    def encode_prompt(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        *,
        guided: bool = True,
        clip_skip: int | None = None,
        prompt_syntax: str = "plain",
    ) -> PromptEmbeddings:
        """Run the text encoders.

        Args:
            prompt, negative_prompt: text in the given syntax. An absent negative prompt is the
                empty text, or zeros where the model's ``force_zeros_for_empty_prompt`` says so.
            prompt_2, negative_prompt_2: for SDXL's second encoder; absent: the same as the first.
            guided: whether the negative prompt is wanted.
            clip_skip: layers left out at the encoders' end. As in the reference tools, in plain
                syntax of the prompt alone, in a1111 syntax of the negative prompt as well.
            prompt_syntax: "plain" (text beyond 77 tokens is cut, with a warning) or "a1111".
        Raises: UsageError if there is no text encoder, or the prompt changes from step to step.
        """

    @abstractmethod
    def prompt_timeline(
        self,
        prompt: str,
        negative_prompt: str | None = None,
        prompt_2: str | None = None,
        negative_prompt_2: str | None = None,
        *,
        guided: bool = True,
        clip_skip: int | None = None,
        prompt_syntax: str = "plain",
        steps: int = 1000,
    ) -> list[tuple[int, PromptEmbeddings]]:
        """Run the text encoders on every text that the prompts are in the course of a run.

        Args: as of ``encode_prompt``, and
            steps: of the run, for prompts that change (a1111 syntax).
        Returns: (last, embeddings) in order: they count for every step, from 0, up to and with
            ``last``; the last of them for the rest.
        """

    @abstractmethod
    def encode_image(self, image: Any, seed: int | None = None) -> np.ndarray:
        """Return latents of an image, scaled for the U-Net.

        Args:
            image: path, PIL image or uint8 array (H, W, 3); its sides must be multiples of the
                VAE factor.
            seed: draws a sample of the encoder's distribution, if it has one; None takes its mean.
        Returns: (1, H/f, W/f, C) float32.
        Raises: UsageError if there is no VAE, or it does not divide the sides.
        """

    @abstractmethod
    def image_latents(self, pixels: np.ndarray) -> ImageLatents:
        """Encode a picture (H, W, 3) uint8 whose sides the VAE divides."""

    @abstractmethod
    def encode_pixels(self, pixels: np.ndarray, *, scaled: bool = True) -> ImageLatents:
        """Encode a picture (1, H, W, 3) float32 in [-1, 1].

        Args:
            scaled: scale the latents for the U-Net; False: leave them as the VAE gives them.
        Raises: UsageError unless the VAE divides the sides.
        """

    @abstractmethod
    def load_decoder(self) -> None:
        """Load the network that decodes, if there is one."""

    @abstractmethod
    def decode(self, latents: np.ndarray) -> list[PIL.Image.Image]:
        """Return pictures of latents (B, H/f, W/f, C) as the U-Net draws them."""

    @abstractmethod
    def decode_pixels(self, latents: np.ndarray) -> np.ndarray:
        """Decode latents (H/f, W/f, C): (H, W, 3) float32, about [-1, 1]."""

    @abstractmethod
    def sketch(self, latents: np.ndarray) -> PIL.Image.Image:
        """Return a quick picture of latents (H/f, W/f, C)."""


def draw_noise(
    generator: NoiseSource, shape: tuple[int, ...], channels: int | None = None
) -> np.ndarray:
    """The next noise of a picture: (1, H, W, C), drawn in the reference's order (1, C, H, W).

    Args:
        shape: (H, W, C).
        channels: in place of C.
    """
    h, w, c = shape
    c = c if channels is None else channels
    return np.ascontiguousarray(generator.randn((1, c, h, w)).transpose(0, 2, 3, 1))
