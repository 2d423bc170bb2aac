"""The shapes that plug-ins agree on. A backbone, objective or task satisfies these; it inherits nothing of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from voxelstem.chance import Chance
from voxelstem.study import LabelMap, Survival


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Views of one training step, already windowed to [0, 1].

    `views` maps the name of a kind of view (`global`, `local`) to a tensor
    (sample, view, channel, i, j, k), and `places_mm` says where each lies in its scan: its low corner and its
    extent in millimetres along R, A and S (negative along an axis that was mirrored).

    Processes that train together each hold a share of one whole batch: samples number `first` and following. `seed`
    is the whole batch's: what an objective draws by `chance` is replayable and does not depend on the sharing.
    `texts` are what was said about each sample's scan, where a recipe asks for reports; otherwise there are none.
    `targets` are named facts of each sample's scans, where a recipe asks for them (`views/pair.py` lists the names):
    NaN where nobody knows.

    `known` says how many values each term of a loss rests on in a micro-batch, on average over all micro-batches and
    processes of the step, where that changes from sample to sample. Who cuts a batch into micro-batches gets it from
    the objective, which may have `known(batch)` for it, before the first of them; a term that is not named here rests
    on what is known in the batch itself.
    """

    views: Mapping[str, Float[Tensor, "sample view channel i j k"]]
    places_mm: Mapping[str, Float[Tensor, "sample view 2 3"]]
    seed: int
    first: int = 0
    texts: tuple[str, ...] = ()
    targets: Mapping[str, Float[Tensor, "sample value"]] = field(default_factory=dict[str, Tensor])
    known: Mapping[str, Float[Tensor, ""]] = field(default_factory=dict[str, Tensor])

    def __len__(self) -> int:
        """Samples of this share."""
        return len(next(iter(self.views.values())))

    @property
    def chance(self) -> Chance:
        """A key for each sample of this share, on the views' device."""
        view = next(iter(self.views.values()))
        return Chance.of(self.seed, first=self.first, count=len(view)).to(view.device)

    def part(self, start: int, stop: int) -> Batch:
        """Samples `start` to `stop` of this share, counted within it."""
        return Batch(
            views={name: view[start:stop] for name, view in self.views.items()},
            places_mm={name: place[start:stop] for name, place in self.places_mm.items()},
            seed=self.seed,
            first=self.first + start,
            texts=self.texts[start:stop],
            targets={name: values[start:stop] for name, values in self.targets.items()},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class StepOutput:
    """What one step of an objective gives back: the loss with its graph, and named numbers for the journal."""

    loss: Tensor
    scalars: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """What a backbone makes of the blocks of a scan (n = grid i * j * k, C-order, k fastest)."""

    cls: Float[Tensor, "batch n dim"]
    """One vector for each block."""
    patches: Float[Tensor, "batch n patch dim"]
    """One vector for each (kept) patch of each block."""
    blocks: Float[Tensor, "batch n scan_dim"] | None = None
    """Block tokens after the scan-level transformer looked at all of them, if there is one."""
    scan: Float[Tensor, "batch scan_dim"] | None = None
    """The scan-level cls token, if there is a scan-level transformer."""


@runtime_checkable
class Backbone(Protocol):
    """A network that turns the blocks of a scan into embeddings: each block by itself, then all together."""

    config: Any
    dim: int
    patch_ijk: tuple[int, int, int]

    @property
    def has_scan_level(self) -> bool:
        """Whether there is a second level that looks at all blocks of a scan."""
        ...

    def encode(
        self,
        blocks: Float[Tensor, "batch n channel i j k"],
        grid: tuple[int, int, int],
        *,
        masked: Bool[Tensor, "batch n patch"] | None = None,
        keep: Int[Tensor, "batch n kept"] | None = None,
        chance: Chance | None = None,
    ) -> Tokens:
        """Both levels. `masked` patches are hidden behind a token, patches outside `keep` never enter.

        `chance` holds a key for each scan: what a backbone changes in training it draws from there; without it
        nothing is left to chance.
        """
        ...

    def encode_blocks(
        self,
        blocks: Float[Tensor, "row channel i j k"],
        *,
        masked: Bool[Tensor, "row patch"] | None = None,
        keep: Int[Tensor, "row kept"] | None = None,
        chance: Chance | None = None,
    ) -> tuple[Float[Tensor, "row dim"], Float[Tensor, "row patch dim"]]:
        """First level only: cls and patch tokens of each block."""
        ...

    def look_at_scan(
        self,
        described: Float[Tensor, "batch n 2*dim"],
        grid: tuple[int, int, int],
        *,
        chance: Chance | None = None,
    ) -> tuple[Float[Tensor, "batch scan_dim"], Float[Tensor, "batch n scan_dim"]]:
        """Second level only: the scan's token and the blocks' tokens, from concat(cls, mean of patches) of each."""
        ...

    def param_groups(self) -> list[tuple[int, list[tuple[str, nn.Parameter]]]]:
        """Parameters by depth, 0 the nearest to the input, for layer-wise decay of the learning rate."""
        ...


@runtime_checkable
class Objective(Protocol):
    """A self-supervised objective: the loop knows `step` and `after_step`, and nothing else."""

    @property
    def learner(self) -> Backbone:
        """The backbone that gradients train."""
        ...

    @property
    def backbone(self) -> Backbone:
        """The backbone that is kept; another one than `learner` where there is a teacher."""
        ...

    @property
    def trains_scan_level(self) -> bool:
        """Whether the second level learns too."""
        ...

    def step(self, batch: Batch, *, progress: float) -> StepOutput:
        """Compute the loss of one batch; `progress` runs from 0 to 1 over the whole run."""
        ...

    def after_step(self, *, progress: float) -> None:
        """Do what must follow the optimiser's step: a teacher follows its student."""
        ...


@runtime_checkable
class Features(Protocol):
    """What a task sees of a scan: `model.Embedding` has it, and so has every baseline."""

    @property
    def scan(self) -> Float[np.ndarray, "dim"]:
        """One vector for the whole scan."""
        ...

    @property
    def tokens(self) -> Float[np.ndarray, "ti tj tk dim"] | None:
        """One vector for each patch, if they were asked for."""
        ...

    @property
    def tokens_affine_ras(self) -> Float[np.ndarray, "4 4"] | None:
        """Places token index (the centre of its patch) in the patient, in millimetres."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """One scan of a subject with its frozen features and, where an expert gave it, the truth."""

    subject: str
    key: str
    features: Features
    affine_ras: Float[np.ndarray, "4 4"]
    label: str | None = None
    """For scan-level tasks."""
    findings: Mapping[str, bool] | None = None
    """For scan-level tasks that ask of many things whether they are there; what nobody knows is not named."""
    value: float | None = None
    """For scan-level tasks that predict a number."""
    survival: Survival | None = None
    """For scan-level tasks that predict when an event comes."""
    labels: LabelMap | None = None
    """For voxel-level tasks, on the scan's own grid."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Head:
    """A fitted task head as plain arrays and facts, so that it rests on disk without a pickle."""

    mode: str
    classes: tuple[str, ...]
    arrays: dict[str, np.ndarray]
    facts: dict[str, float | str] = field(default_factory=dict)


@runtime_checkable
class Measured(Protocol):
    """Features of which some or all columns are values in units of their own, and not a network's."""

    @property
    def measured(self) -> Bool[np.ndarray, "dim"]:
        """Which columns of `scan` these are."""
        ...


@runtime_checkable
class Task(Protocol):
    """What is predicted from frozen features, how its head is fitted and how it is scored.

    A task is a frozen dataclass whose fields are its settings.
    """

    modes: ClassVar[tuple[str, ...]]
    """The ways to adapt that this task knows; the first is the usual one."""
    metrics: ClassVar[tuple[str, ...]]
    """Names that `statistic` knows; the first is the headline."""
    voxels: ClassVar[bool]
    """True if truth and prediction are voxel labels, False if they are one label per scan."""

    def fit(self, examples: Sequence[Example], classes: tuple[str, ...], *, mode: str, seed: int) -> Head:
        """Fit a head to labelled examples."""
        ...

    def outcome(self, head: Head, example: Example) -> Any:
        """Predict one example and compare with its truth."""
        ...

    def combine(self, outcomes: Sequence[Any]) -> Any:
        """Make one outcome of the outcomes of several scans of one subject."""
        ...

    def statistic(self, metric: str) -> Callable[[Sequence[Any]], float]:
        """Turn outcomes, one for each subject, into a figure."""
        ...
