"""Array aliases, and Protocols: what a process, a model or a sampler must offer.

Shapes are jaxtyping's: b images (rows of a batch), h w c pixels or latents. Time t is
[b], a float in [0, 1] for continuous processes and an integer step for discrete ones.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

from jaxtyping import Array, Float, Int, Key, Num, PyTree

Batch: TypeAlias = Float[Array, "b h w c"]  # data, noise or noisy data
PerImage: TypeAlias = Float[Array, " b"]
Labels: TypeAlias = Int[Array, " b"]
Time: TypeAlias = Num[Array, " b"]
Keys: TypeAlias = Key[Array, " b"]  # one random key for each image
Params: TypeAlias = PyTree[Array]

# t -> (alpha, sigma) of x_t = alpha * data + sigma * noise; 0 is noise, 1 is data
Path: TypeAlias = Callable[[Any], tuple[Any, Any]]
# (x, t) -> the network's output, with labels and guidance bound
Net: TypeAlias = Callable[[Batch, Time], Float[Array, "b h w _"]]
# (x, t, labels) -> the network's output
ModelApply: TypeAlias = Callable[[Batch, Time, Labels], Float[Array, "b h w _"]]
# step number -> standard normal noise for that step of a sampler
StepNoise: TypeAlias = Callable[[Any], Batch]
# (t, x) -> dx/dt, over trees of arrays
Slope: TypeAlias = Callable[[Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class NamedFunction:
    """A function together with what code needs to know about it.

    Subclasses add fields. Used as a decorator, so that a config stores the result by
    its name, as it stores any other function:

        @partial(Prediction, singular_at_ends=False)
        def velocity(path, t): ...
    """

    function: Callable[..., Any]

    def __post_init__(self) -> None:
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            object.__setattr__(self, name, getattr(self.function, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return self.function.__qualname__

    def __reduce__(self) -> str:
        return (
            self.function.__qualname__
        )  # pickled and copied by name, as functions are


@runtime_checkable
class Process(Protocol):
    """What a network is trained on, and which times there are."""

    @property
    def max_time(self) -> float: ...  # times lie in [0, max_time)

    def sample_times(self, key: Array, n: int) -> Time: ...

    def losses(
        self, net: Net, data: Batch, noise: Batch, t: Time
    ) -> dict[str, PerImage]: ...

    def progress(self, t: Time) -> PerImage: ...  # from 0, noise, to 1, data


@runtime_checkable
class ContinuousProcess(Process, Protocol):
    """A process along a path in continuous time, which ODEs and SDEs can sample."""

    @property
    def path(self) -> Path: ...

    def prediction_fn(self, net: Net, target: Any) -> Net: ...

    def train_interval(self) -> tuple[float, float]: ...

    def time_interval(
        self, *, by_score: bool = False, last_step: float = 0.0, reverse: bool = False
    ) -> tuple[float, float]: ...


@runtime_checkable
class DiscreteProcess(Process, Protocol):
    """A chain of numbered steps, which DDPM and DDIM can sample."""

    @property
    def num_timesteps(self) -> int: ...

    @property
    def timestep_map(self) -> tuple[int, ...]: ...

    def posterior(
        self, net: Net, x: Batch, t: Time, denoised_fn: Any = None
    ) -> Any: ...

    def respace(self, steps: Any) -> "DiscreteProcess": ...


@runtime_checkable
class Sampler(Protocol):
    """Turns noise into data with a network; deterministic, all noise is handed in."""

    @property
    def integrates_null_half(self) -> bool: ...

    def num_noise_draws(self, process: Process) -> int: ...

    def __call__(
        self,
        net: Net,
        process: Any,
        noise: Batch,
        step_noise: StepNoise | None = None,
    ) -> Any: ...


@runtime_checkable
class ODESampler(Sampler, Protocol):
    """A sampler that can follow any ordinary differential equation."""

    def solve(self, slope: Slope, start: Any, t0: float, t1: float) -> Any: ...


@runtime_checkable
class TimestepSampler(Protocol):
    """Chooses the times that are trained on, and may remember losses for it."""

    def init(self, process: Any) -> Any: ...

    def sample(
        self, process: Any, key: Array, state: Any, n: int
    ) -> tuple[Time, PerImage | None]: ...

    def update(self, state: Any, t: Time, loss: PerImage) -> Any: ...


@runtime_checkable
class MaskedModel(Protocol):
    """A network that is also trained on images with hidden tokens, as MDT is."""

    def pass_inputs(
        self, key: Array, shape: Sequence[int]
    ) -> Mapping[str, Mapping[str, Array]]: ...

    def bucket_inputs(
        self, inputs: Mapping[str, Any], shape: Sequence[int]
    ) -> tuple[Any, list[Mapping[str, Any]]]: ...


@runtime_checkable
class Codec(Protocol):
    """Between images and what the network sees; a pytree, so it may hold weights."""

    @property
    def scale(self) -> float | None: ...  # that latents of variance about 1 need

    @property
    def encoder_sha256(self) -> str | None: ...  # None where there is no encoder

    def encode(self, images: Any) -> Any: ...

    def sample(self, key: Array, moments: Any) -> Any: ...

    def decode(self, data: Any) -> Any: ...

    def record(self) -> dict[str, Any]: ...  # what a manifest says of it
