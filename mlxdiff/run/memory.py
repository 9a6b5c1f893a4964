"""Estimates the memory of a run before anything is loaded, and refuses a run that will not fit.

Weights are counted tensor by tensor, as the backend will keep them. The values that the networks
hold while they run follow from ``cost.operations``: at each layer the values held for later, its
inputs and outputs, and its scratch space as the backend bounds it. The constants are those of
backends/numpy_layers.py and mlx_layers.py; benchmarks/memory.py compares the result with measured
peaks (docs/performance.md has the table).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

from mlxdiff.convert import Component
from mlxdiff.errors import UsageError, argument
from mlxdiff.machine import threads
from mlxdiff.networks.condition import Frames
from mlxdiff.networks.config import AutoencoderKLConfig, ComponentConfig, UpscalerConfig
from mlxdiff.networks.cost import WHOLE, operations
from mlxdiff.networks.recorder import Operation
from mlxdiff.networks.tiling import BAND_BYTES
from mlxdiff.run.kind import Network, stage_of
from mlxdiff.store.recipes import Recipe, quantized_model
from mlxdiff.weights.tensors import LazyTensor, QuantizedTensor

SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}
PROCESS = 100_000_000
"""Bytes of a Python process with the libraries loaded, beside all arrays."""

TILE_PIXELS = 256 * 256
"""Above this many pixels a CPU decodes in bands."""

# Scratch space, in bytes: NumPy's attention and convolutions, MLX's where it has no fused kernel.
_NUMPY_SCORES, _NUMPY_COLUMNS, _MLX_WORK = 1 << 22, 1 << 25, 64 << 20


@dataclass(frozen=True)
class Device:
    """The device that computes, as far as memory depends on it.

    Attributes:
        backend: "mlx" or "numpy".
        gpu: whether it is a GPU.
        dtype: of weights and activations; a VAE may have its own (``device_of``).
    """

    backend: str
    gpu: bool
    dtype: str


class Held(NamedTuple):
    """A network whose weights are held.

    Attributes:
        network: the network.
        refiner: it is one of the second model of a run.
    """

    network: Network
    refiner: bool = False

    def __str__(self) -> str:
        return f"refiner {self.network}" if self.refiner else str(self.network)


@dataclass(frozen=True)
class Estimate:
    """Bytes of a run.

    Attributes:
        weights: of each network, in the order in which they are needed.
        work: held in each stage beside weights; the stages are text_encoder, image, unet and vae,
            then those of additions.
        low_memory: whether each stage's networks leave memory after it.
    """

    weights: dict[Held, int]
    work: dict[str, int]
    low_memory: bool = False

    @property
    def stages(self) -> dict[str, int]:
        """The most bytes held in each stage, weights included."""
        loaded: set[Held] = set()
        totals = {}
        for stage, work in self.work.items():
            needs = "vae" if stage == "image" else stage
            own = {held for held in self.weights if stage_of(held.network) == needs}
            loaded |= own
            if self.low_memory:
                totals[stage] = work + self._most_together(own)
            else:
                totals[stage] = work + sum(self.weights[held] for held in loaded)
        return totals

    def _most_together(self, held: Iterable[Held]) -> int:
        """The most bytes of these weights that are in memory together, in low memory.

        One network comes after the other, but a U-Net stays with what is added to it.
        """
        together: dict[Any, int] = {}
        for one in held:
            group = one.refiner if stage_of(one.network) == "unet" else one
            together[group] = together.get(group, 0) + self.weights[one]
        return max(together.values(), default=0)

    @property
    def peak(self) -> int:
        """The most bytes of arrays at once."""
        return max(self.stages.values())

    @property
    def stage(self) -> str:
        """The stage that needs the most."""
        stages = self.stages
        return max(stages, key=lambda name: stages[name])

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        weights = {str(held): size for held, size in self.weights.items()}
        return {"peak_bytes": self.peak, "stages": self.stages, "weights": weights}


@dataclass(frozen=True)
class UNetRun:
    """The inputs to the memory estimate of an addition.

    Attributes:
        device: what computes.
        unet: config of the U-Net.
        latent: (h, w) of the latents.
        size: (height, width) of the picture, in pixels.
        batch: predictions of an evaluation.
        pictures: the most pictures that an IP-Adapter is given.
    """

    device: Device
    unet: Any
    latent: tuple[int, int]
    size: tuple[int, int]
    batch: int
    pictures: int = 1


class Work(NamedTuple):
    """Bytes that an addition takes, beside its weights.

    Attributes:
        before: held once, before the U-Net runs for the first time.
        beside: held while the U-Net runs, beside the U-Net's own values.
    """

    before: int = 0
    beside: int = 0


class Estimated(Protocol):
    """A model, as far as its memory is estimated: see ``run.model.Model``."""

    source: Any
    additions: Any


def estimate(
    model: Estimated,
    device: Device,
    height: int,
    width: int,
    *,
    batch: int = 1,
    image: bool = False,
    pictures: int = 1,
    refiner: Estimated | None = None,
    low_memory: bool = False,
    band_bytes: int | None = None,
    recipe: Recipe | None = None,
    frames: Frames = WHOLE,
    decoded: int = 1,
) -> Estimate:
    """The memory of a run.

    Args:
        model: the model.
        device: what it will run on.
        height, width: of the picture, in pixels.
        batch: of the U-Net: 2 under guidance.
        image: whether a picture is encoded first.
        pictures: the most pictures that an IP-Adapter is given.
        refiner: a second model that draws the last part.
        low_memory: as for ``mlxdiff.load``.
        band_bytes: the VAE decodes in bands of this size (``mlxdiff.networks.tiling``); None: the
            whole at once.
        recipe: quantize the weights first; None: they are as they are.
        frames: of the video that is drawn.
        decoded: frames that a VAE for videos decodes together.
    """
    weights: dict[Held, int] = {}
    work: dict[str, int] = {}
    models = [(model, False)] if refiner is None else [(model, False), (refiner, True)]
    factor = 1
    if "vae" in model.source.components:
        factor = _network(model, "vae", recipe).config.factor
    latent = height // factor, width // factor
    for one, second in models:
        for name in one.source.components:
            if name == "vae" and second:
                continue  # the model's own decodes
            component = _network(one, name, recipe)
            config, tensors = component.config, component.tensors()
            kind = device_of(device, config)
            held = Held(Network(name), second)
            weights[held] = weight_bytes(tensors, kind, keep_stored=low_memory or None)
            largest = max(tensor.nbytes for tensor in tensors.values())  # read, then converted
            if name == "unet":
                expands = low_memory or any(
                    isinstance(tensor, QuantizedTensor) for tensor in tensors.values()
                )
                need = activation_bytes(
                    config, kind, *latent, batch=batch, expands=expands, frames=frames
                )
                rows = batch * frames.count
                run = UNetRun(kind, config, latent, (height, width), rows, pictures)
                extra = one.additions.work(run)
                need = max(need + extra.beside, extra.before)
            elif name == "vae":
                need = activation_bytes(config, kind, *latent, frames=Frames(decoded))
                if band_bytes is not None:
                    need = min(need, tiled_bytes(config, kind, *latent, band_bytes))
                if image:
                    encode = activation_bytes(config, kind, height, width, encode=True)
                    work["image"] = max(encode, largest)
            else:
                need = activation_bytes(config, kind)
            stage = stage_of(name)
            work[stage] = max(work.get(stage, 0), need, largest)
        for network, (_, part) in one.additions.networks.items():
            size = weight_bytes(part.tensors(), device, low_memory or None)
            weights[Held(network, second)] = size
    order = [s for s in ("text_encoder", "image", "unet", "vae") if s in work]
    for addition in model.additions.items:
        for stage, size in addition.stages(device, height, width, low_memory).items():
            work[stage] = max(work.get(stage, 0), size)
            order += [stage] if stage not in order else []
    return Estimate(weights, {stage: work[stage] for stage in order}, low_memory)


def _network(model: Estimated, name: str, recipe: Recipe | None) -> Component:
    """One of the model's own networks, quantized, with the additions in it."""
    source = model.source if recipe is None else quantized_model(model.source, recipe)
    own = Component(source.config(name), lambda: source.tensors(name), source.provenance)
    changed: Component = model.additions.change(name, own)
    return changed


def device_of(device: Device, config: ComponentConfig) -> Device:
    """The same with the widest type that this network may be computed in."""
    if isinstance(config, AutoencoderKLConfig) and config.force_upcast is not False:
        return replace(device, dtype="float32")
    return device


def weight_bytes(
    tensors: Mapping[str, LazyTensor], device: Device, keep_stored: bool | None = None
) -> int:
    """Bytes of a network's weights, as ``Backend.load`` keeps them; ``keep_stored`` as there."""
    size, total = SIZES[device.dtype], 0
    for tensor in tensors.values():
        quantized = isinstance(tensor, QuantizedTensor)
        kept = (device.gpu and quantized) if keep_stored is None else keep_stored
        expanded = tensor.size * size
        kept = kept and (quantized or len(tensor.shape) > 1)
        total += min(tensor.nbytes, expanded) if kept else expanded
    return total


def activation_bytes(
    config: ComponentConfig,
    device: Device,
    height: int = 1,
    width: int = 1,
    *,
    batch: int = 1,
    encode: bool = False,
    expands: bool = False,
    frames: Frames = WHOLE,
) -> int:
    """The most bytes that one evaluation of a network holds beside its weights.

    Args: as for ``cost.operations``, the device, and
        expands: a GPU expands convolutions' weights when it uses them.
    """
    work = operations(config, height, width, batch=batch, encode=encode, frames=frames)
    if device.backend == "numpy":
        return max(map(_numpy_bytes, work), default=0)
    size = SIZES[device.dtype]
    return _gpu_bytes(work, size, expands) if device.gpu else _cpu_bytes(work, size)


def network_bytes(config: UpscalerConfig, device: Device, height: int, width: int) -> int:
    """The same of a network that enlarges a picture, which is filled up to whole squares."""
    rows, columns = (side + -side % config.shuffle for side in (height, width))
    return activation_bytes(config, device, rows, columns)


def tiled_bytes(
    config: ComponentConfig, device: Device, height: int, width: int, band_bytes: int
) -> int:
    """The same of a VAE that decodes in bands: what a layer keeps, and what it replaces.

    Args: as for ``activation_bytes``, and
        band_bytes: as for ``mlxdiff.networks.tiling.decode``.
    """
    size = SIZES[device.dtype]
    work = [op for op in operations(config, height, width) if op.kind == "convolution"]
    if not device.gpu:
        return max(size * (op.held + min(op.inputs, op.outputs)) for op in work) + 2 * _MLX_WORK

    def beside(op: Operation) -> int:
        """A convolution of one band, or the squares of those that are in flight."""
        largest = max(op.inputs, op.outputs)
        share = min(1.0, band_bytes / (4 * largest))
        own = size * share * (op.inputs + op.outputs) + share * _winograd_bytes(op, size)
        return int(max(own, min(4 * largest, _COMMANDS * band_bytes)))

    return max(size * (op.held + min(op.inputs, op.outputs)) + beside(op) for op in work)


def band_bytes(
    config: ComponentConfig,
    device: Device,
    height: int,
    width: int,
    *,
    memory: int | None,
    low_memory: bool,
    tiling: bool | None = None,
) -> int | None:
    """Choose the size of the bands that a VAE decodes in; None: it decodes the whole at once.

    On a GPU bands cost kernels, waits and bytes, so they are for pictures that take too much of its
    memory otherwise, and as large as it allows. On a CPU they keep the data in the cache.

    Args:
        config: of the VAE.
        device: what computes.
        height, width: of the latents.
        memory: bytes that arrays can take together; None: unknown.
        low_memory: save memory rather than time.
        tiling: what the user asks for; None: nothing.
    """
    if tiling is False or not isinstance(config, AutoencoderKLConfig):
        return None  # a TAESD's features are small
    if not device.gpu:
        pixels = config.factor**2 * height * width
        return BAND_BYTES if tiling or low_memory or pixels > TILE_PIXELS else None
    if tiling is None and not low_memory and memory is not None:
        kind = device_of(device, config)
        if activation_bytes(config, kind, height, width) <= memory // 4:
            return None  # several times as much may be in flight
    most = (64 if low_memory else 256) << 20
    return most if memory is None else max(BAND_BYTES, min(most, memory // 64))


def _numpy_bytes(op: Operation) -> int:
    values = op.held + op.inputs + op.outputs
    if op.kind == "convolution" and op.scratch:
        values += op.inputs + min(op.scratch, max(_NUMPY_COLUMNS // 4, op.row))  # padded; unfolded
    elif op.kind == "attention":
        scores = threads.count() * _NUMPY_SCORES // 4
        values += op.outputs + min(op.scratch, max(scores, op.row))  # scaled queries
    return 4 * values


def _cpu_bytes(work: Sequence[Operation], size: int) -> int:
    """MLX on a CPU, which hands out memory to some fifty kernels before the first has run.

    Only what is computed in parts (its scratch space would be larger than _MLX_WORK) waits for all
    before it. A part's scratch space is still there when the next one gets its own.
    """
    most, window = 0, deque[tuple[int, int]]()
    for op in work:
        own, in_parts = size * op.outputs, 4 * op.scratch > _MLX_WORK
        if op.kind == "elementwise":
            own = 8 * op.inputs  # norms are taken in float32
        elif op.scratch:
            own += min(4 * op.scratch, 2 * max(_MLX_WORK, 4 * op.row))
        if in_parts:
            window.clear()
            if op.kind == "convolution":  # padded, and sliced; the parts, and the whole
                own += size * (2 * op.inputs + op.outputs)
        window.append((own, _KERNELS[op.kind]))
        while len(window) > 1 and sum(kernels for _, kernels in window) > _AHEAD:
            window.popleft()
        most = max(most, size * (op.held + op.inputs) + sum(bytes_ for bytes_, _ in window))
        if in_parts:
            window.clear()
    return most


# Kernels of an operation in MLX, about, and how many get their memory ahead of time.
_KERNELS = {"convolution": 4, "linear": 2, "attention": 10, "elementwise": 20}
_AHEAD = 50


# Metal takes commands in portions of about so many bytes of inputs. The CPU waits for it when so
# many portions are not done (MLX 0.32: device.cpp, transforms.cpp), or when MLX's memory limit is
# reached. So ten larger operations need not fit: they wait for each other.
_COMMAND_BYTES, _COMMANDS = 50 << 20, 10
_WINOGRAD_PIXELS = 4096  # of a batch: for fewer MLX convolves directly


def _gpu_bytes(work: Sequence[Operation], size: int, expands: bool) -> int:
    """MLX on a GPU, which runs behind the CPU: what is in flight is held too."""
    most, window, in_flight = 0, deque[tuple[int, int]](), 0
    for op in work:
        own, read = size * op.outputs, size * (op.inputs + op.weights)
        if op.kind == "convolution":
            workspace = _winograd_bytes(op, size) + (size * op.weights if expands else 0)
            own, read = own + workspace, read + workspace
        elif op.kind == "attention":
            own += 2 * size * op.inputs  # heads zero-padded to a dimension that kernels take
        elif op.kind == "elementwise":
            own += size * op.inputs  # a norm's groups, as rows
        window.append((own, read))
        in_flight += read
        while len(window) > 1 and in_flight - window[0][1] > _COMMANDS * _COMMAND_BYTES:
            in_flight -= window.popleft()[1]
        most = max(most, size * (op.held + op.inputs) + sum(bytes_ for bytes_, _ in window))
    return most


def _winograd_bytes(op: Operation, size: int) -> int:
    """The workspace of Winograd's method: tiles of 6x6 results take 8x8 values, kernels too."""
    if not op.scratch or op.macs < _WINOGRAD_PIXELS * op.weights:
        return 0
    return size * (64 * (op.inputs + op.outputs) // 36 + 64 * op.weights // 9)


# ------------------------------------------------------------------------------------ does it fit?

_NAMES = {
    "text_encoder": "text encoder",
    "image": "VAE's encoder",
    "unet": "U-Net",
    "vae": "VAE's decoder",
    "upscaler": "upscaler",
    "judge": "judge",
}


def fits(needed: Estimate, most: int) -> bool:
    """Return True if a run fits into this many bytes, with the process around it."""
    return needed.peak + PROCESS <= most


def require(
    needed: Estimate,
    available: int | None,
    limit: float | None = None,
    alternatives: Mapping[str, Callable[[], Estimate]] | None = None,
) -> None:
    """Raise UsageError, with advice, where a run will not fit.

    Args:
        needed: what it takes.
        available: bytes that the machine has; None: unknown.
        limit: gigabytes that the user allows; None: what the machine has.
        alternatives: what could be done instead -> what that takes; the first two that fit are
            advised.
    """
    most = available if limit is None else int(limit * 1e9)
    if most is None or fits(needed, most):
        return
    whose = "this machine has" if limit is None else f"{argument('memory_limit')} allows"
    helps = [how for how, make in (alternatives or {}).items() if fits(make(), most)][:2]
    raise UsageError(
        f"this would take about {(needed.peak + PROCESS) / 1e9:.2f} GB of memory (the most in the "
        f"{_NAMES[needed.stage]}), and {whose} {most / 1e9:{'.2f' if most >= 1e7 else '.3g'}} GB; "
        + (f"these fit: {'; '.join(helps)}" if helps else "a smaller model is needed")
    )
