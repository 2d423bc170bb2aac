"""What small networks learn of phantom brains whose truth is known: about five minutes on one core."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count, islice, permutations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from voxelstem.backbones.convolution import resize_convolutions
from voxelstem.backbones.disentangled import Disentangled, DisentangledConfig
from voxelstem.backbones.experts import ContrastSet, SetConfig, encode_set, index_contrasts
from voxelstem.backbones.trajectory import TrajectoryConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.chance import Chance
from voxelstem.change import Follower
from voxelstem.engine.optim import OptimConfig, make_optimizer, set_rate
from voxelstem.losses.masked import smooth_l1
from voxelstem.losses.overlap import overlap
from voxelstem.metrics import auroc
from voxelstem.objectives.anatomy import Anatomy, AnatomyConfig
from voxelstem.objectives.disentangle import Disentangle, DisentangleConfig
from voxelstem.objectives.longitudinal import Longitudinal, LongitudinalConfig
from voxelstem.objectives.segmentation_prior import SegmentationPrior, SegmentationPriorConfig
from voxelstem.probes import disentanglement
from voxelstem.protocols import Batch
from voxelstem.sources.brain import INTRACRANIAL, VOLUME_LABEL, BrainConfig, Contrast, brain_subject
from voxelstem.study import InputSpec, Study
from voxelstem.tasks.regress import pearson
from voxelstem.views.intensity import limits, window
from voxelstem.views.synthesis import SynthesisConfig

pytestmark = pytest.mark.slow
GRID, EDGE_MM = (16, 16, 16), 10.0
SPEC = InputSpec(modality="MR", spacing_mm=(EDGE_MM,) * 3, block_ijk=GRID, normalisation="unit99")
STRUCTURES = ("ventricles", "csf", "grey_matter", "white_matter")
"""Hippocampi are too small for voxels of this size."""
WEIGHTED: tuple[Contrast, ...] = ("T1w", "T2w")
HELD_FROM = 1_000_000
"""Seeds of people that nothing is learned from."""
SAMPLES, STEPS = 8, 200
OPTIM = OptimConfig(kind="muon", momentum=0.95, lr=3e-3)


@dataclass(frozen=True)
class Brains:
    """Two sessions of some people whose ventricles grow or shrink by up to a fifth a year."""

    scans: Tensor
    """(person, session, contrast, 1, i, j, k) in [0, 1]."""
    shares: Tensor
    """(person, session, structure) of the volume inside the skull."""
    years: Tensor
    """(person, 1) from the first to the second session."""


def volume(study: Study, structure: str) -> float:
    return float(study.labels[VOLUME_LABEL + structure])


def draw(first: int, people: int) -> Brains:
    scans, shares, years = [], [], []
    for seed in range(first, first + people):
        rate = float(np.random.default_rng(seed).uniform(-0.2, 0.2))
        like = BrainConfig(seed=seed, shape_ijk=GRID, spacing_mm=SPEC.spacing_mm, pathology="none")
        studies = brain_subject(seed, sessions=2, contrasts=WEIGHTED, like=replace(like, ventricle_growth=rate))
        arrays = [study.volumes[0].array for study in studies]
        seen = torch.stack([window(torch.from_numpy(array), limits(array, SPEC)) for array in arrays])
        scans.append(seen.unflatten(0, (2, len(WEIGHTED))))
        visits = studies[:: len(WEIGHTED)]
        shares.append([[volume(one, name) / volume(one, INTRACRANIAL) for name in STRUCTURES] for one in visits])
        before, after = (one.volumes[0].acquisition.age_years for one in visits)
        years.append([after - before])
    return Brains(torch.stack(scans), torch.tensor(shares), torch.tensor(years))


def some(known: Brains, step: int, rng: np.random.Generator) -> Batch:
    """Pairs of sessions in one contrast, in either order."""
    rows = rng.choice(len(known.scans), SAMPLES, replace=False)
    kind, first = rng.integers(len(WEIGHTED), size=SAMPLES), rng.integers(2, size=SAMPLES)
    views = {name: known.scans[rows, at, kind][:, None] for name, at in (("global", first), ("other", 1 - first))}
    shares = known.shares / known.shares.flatten(0, 1).std(dim=0)
    targets = {
        "copy": torch.zeros(SAMPLES, 1),
        "years": torch.from_numpy(1.0 - 2 * first).float()[:, None] * known.years[rows],
        "age": torch.full((SAMPLES, 2), torch.nan),
        "volumes": shares[rows, first],
        "volumes_other": shares[rows, 1 - first],
    }
    return Batch(views=views, places_mm={}, seed=step, targets=targets)


def follower(seed: int = 0) -> Follower:
    known, rng = draw(0, 96), np.random.default_rng(0)
    network = DisentangledConfig(width=6, levels=2, latent=8, block_ijk=GRID, vae=False)
    config = LongitudinalConfig(trajectory=TrajectoryConfig(hidden=16, columns=len(STRUCTURES)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        objective = Longitudinal(config, Disentangled(network))
    optimizer = make_optimizer(objective, objective.backbone.param_groups(), OPTIM)
    for step in range(STEPS):
        set_rate(optimizer, OPTIM, progress=step / STEPS)
        optimizer.zero_grad()
        objective.step(some(known, step, rng), progress=step / STEPS).loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), OPTIM.clip_norm)
        optimizer.step()
    objective.eval()
    return Follower(network=objective.backbone, trajectory=objective.trajectory, spec=SPEC)


def test_the_change_of_ventricles_a_year_is_told_and_turns_its_sign_with_the_order() -> None:
    found, held = follower(), draw(HELD_FROM, 40)
    there, back = (
        torch.stack(
            [found.change_per_year(held.scans[:, a, kind], held.scans[:, b, kind], held.years) for kind in (0, 1)]
        )
        for a, b in ((0, 1), (1, 0))
    )
    assert torch.equal(there, -back)
    truth = (held.shares[:, 1] - held.shares[:, 0]) / held.years
    assert pearson(there.mean(dim=0)[:, 0].numpy(), truth[:, 0].numpy()) > 0.8


FINER, FINER_MM = (24, 24, 24), 7.0
"""An infarct is a few voxels of this size."""
RAW = InputSpec(modality="MR", spacing_mm=(FINER_MM,) * 3, block_ijk=FINER, normalisation="zscore")
"""Infarcts lie above the 99th percentile, where `unit99` ends."""
ALL: tuple[Contrast, ...] = ("T1w", "T2w", "FLAIR", "DWI")


def ill_and_well(first: int, people: int) -> tuple[Tensor, Tensor]:
    """Scans (person, contrast, 1, i, j, k), and who has an infarct: every second one."""
    scans, ill = [], []
    for seed in range(first, first + people):
        ill.append(seed % 2)
        like = BrainConfig(
            seed=seed, shape_ijk=FINER, spacing_mm=RAW.spacing_mm, pathology="infarct" if ill[-1] else "none"
        )
        arrays = [study.volumes[0].array for study in brain_subject(seed, sessions=1, contrasts=ALL, like=like)]
        scans.append(torch.stack([window(torch.from_numpy(array), limits(array, RAW)) for array in arrays]))
    return torch.stack(scans), torch.tensor(ill, dtype=torch.float32)


def doctor(scans: Tensor, ill: Tensor, *, seed: int = 0, steps: int = 250) -> nn.ModuleDict:
    """A network and a head for sets of contrasts, trained end to end to say who is ill."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Disentangled(DisentangledConfig(width=6, levels=2, latent=8, block_ijk=FINER, vae=False))
        both = nn.ModuleDict({"network": network, "head": ContrastSet(SetConfig(contrasts=ALL, dim=32), 8)})
    optimizer, rng = make_optimizer(both, network.param_groups(), OPTIM), np.random.default_rng(0)
    index = index_contrasts([ALL] * 12, ALL).index
    for step in range(steps):
        rows = rng.choice(len(scans), len(index), replace=False)
        set_rate(optimizer, OPTIM, progress=step / steps)
        optimizer.zero_grad()
        chance = Chance.of(step, first=0, count=len(rows))
        answers = both["head"](encode_set(network, scans[rows], index), chance=chance)[:, 0]
        nn.functional.binary_cross_entropy_with_logits(answers, ill[rows]).backward()
        nn.utils.clip_grad_norm_(both.parameters(), OPTIM.clip_norm)
        optimizer.step()
    return both.eval()


def test_an_infarct_is_told_from_any_set_that_shows_it_and_from_no_other() -> None:
    both, (scans, ill) = doctor(*ill_and_well(0, 240)), ill_and_well(HELD_FROM, 100)

    def answers(*contrasts: Contrast) -> np.ndarray:
        places, names = [ALL.index(name) for name in contrasts], [contrasts] * len(scans)
        with torch.inference_mode():
            seen = encode_set(both["network"], scans[:, places], index_contrasts(names, ALL).index)
            return both["head"](seen)[:, 0].numpy()

    truth = ill.numpy() > 0
    for shows in (ALL, ("FLAIR", "DWI"), ("DWI",)):
        assert auroc(truth, answers(*shows)) > 0.8
    assert abs(auroc(truth, answers("T1w")) - 0.5) < 0.2
    np.testing.assert_allclose(answers(*ALL), answers(*reversed(ALL)), atol=1e-5)


@dataclass(frozen=True)
class People:
    """One session of some people in all contrasts."""

    scans: Tensor
    """(person, contrast, 1, i, j, k) in [0, 1]."""
    ventricles: Tensor
    """(person, 1), standardised."""

    @classmethod
    def drawn(cls, first: int, people: int) -> People:
        scans, shares = [], []
        for seed in range(first, first + people):
            like = BrainConfig(seed=seed, shape_ijk=GRID, spacing_mm=SPEC.spacing_mm, pathology="none")
            studies = brain_subject(seed, sessions=1, contrasts=ALL, like=like)
            arrays = [study.volumes[0].array for study in studies]
            scans.append(torch.stack([window(torch.from_numpy(array), limits(array, SPEC)) for array in arrays]))
            shares.append([volume(studies[0], "ventricles") / volume(studies[0], INTRACRANIAL)])
        # What is usual among these drawings, so that training and held-out people have one scale.
        return cls(torch.stack(scans), (torch.tensor(shares) - 0.04) / 0.02)

    def pairs(self, step: int, rng: np.random.Generator) -> Batch:
        """Two contrasts of each of some people."""
        rows = rng.choice(len(self.scans), 16, replace=False)
        kinds = np.stack([rng.choice(len(ALL), 2, replace=False) for _ in rows])
        views = {name: self.scans[rows, kinds[:, at]][:, None] for at, name in enumerate(("global", "other"))}
        contrast = torch.from_numpy(kinds).float()
        return Batch(
            views=views, places_mm={}, seed=step, targets={"copy": torch.zeros(len(rows), 1), "contrast": contrast}
        )


UNTANGLE = DisentangleConfig(
    subject_weight=0.0, nt_xent_weight=2.0, temperature=0.5, leak_weight=6.0, name_weight=2.0, background="ignored"
)


def train(objective: nn.Module, batches: Iterator[Batch], *, steps: int, lr: float) -> nn.Module:
    optim = replace(OPTIM, lr=lr)
    optimizer = make_optimizer(objective, objective.learner.param_groups(), optim)
    for step, batch in enumerate(islice(batches, steps)):
        set_rate(optimizer, optim, progress=step / steps)
        optimizer.zero_grad()
        objective.step(batch, progress=step / steps).loss.backward()
        nn.utils.clip_grad_norm_(objective.parameters(), optim.clip_norm)
        optimizer.step()
    return objective.eval()


@pytest.fixture(scope="module")
def people() -> People:
    return People.drawn(0, 320)


@pytest.fixture(scope="module")
def strangers() -> People:
    return People.drawn(HELD_FROM, 60)


def painter(people: People, config: DisentangleConfig, *, steps: int = 300) -> Disentangled:
    """A network without skips that learned to paint contrasts of one person from each other."""
    network = DisentangledConfig(width=8, levels=2, latent=16, block_ijk=GRID, vae=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = Disentangle(config, Disentangled(network))
    rng = np.random.default_rng(0)
    return train(objective, (people.pairs(step, rng) for step in count()), steps=steps, lr=6e-3).backbone


@torch.inference_mode()
def swaps(network: Disentangled, held: People) -> tuple[float, float]:
    """Mean error of scan b, painted from a's subject with b's contrast, and with a's own."""
    latents = network.latents(held.scans.flatten(0, 1))
    subject, contrast = (side.unflatten(0, (-1, len(ALL))) for side in (latents.subject_mean, latents.contrast_mean))
    errors = [
        [
            float(smooth_l1(network.reconstruct(subject[:, a], contrast[:, how]), held.scans[:, b]).value)
            for how in (b, a)
        ]
        for a, b in permutations(range(len(ALL)), 2)
    ]
    right, wrong = np.mean(errors, axis=0)
    return float(right), float(wrong)


def test_only_the_true_swap_paints_the_other_contrast_and_parts_subject_from_contrast(
    people: People, strangers: People
) -> None:
    network = painter(people, UNTANGLE)
    right, wrong = swaps(network, strangers)
    assert right < 0.8 * wrong
    released, without = swaps(painter(people, replace(UNTANGLE, swap="released", repel_copies=True)), strangers)
    assert released > 0.9 * without
    assert right < 0.9 * released
    with torch.inference_mode():
        latents = network.latents(strangers.scans.flatten(0, 1))
    subject, contrast = (side.flatten(2).mean(dim=2).numpy() for side in (latents.subject_mean, latents.contrast_mean))
    whose = [str(person) for person in range(len(strangers.scans)) for _ in ALL]
    found = disentanglement(subject, contrast, contrasts=ALL * len(strangers.scans), subjects=whose)
    assert found.contrast_from_contrast.value.estimate > 0.9
    assert found.contrast_from_subject.value.estimate < 0.6
    assert found.subject_from_subject.value.estimate > 20 * found.subject_from_subject.chance
    centred = torch.from_numpy(subject - subject.mean(axis=0)).unflatten(0, (-1, len(ALL)))
    one, other = (nn.functional.normalize(centred[:, kind], dim=1) for kind in (0, 1))
    near = one @ other.T
    assert near.diagonal().mean() > near.mean() + 0.5


def test_volumes_are_read_from_people_that_were_never_seen(people: People, strangers: People) -> None:
    network = UNetConfig(features=(8, 16, 32), depths=(1, 1, 1), strides=(1, 2, 2), block_ijk=GRID)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # With half of a head hidden in training, what a whole one holds is misjudged.
        config = AnatomyConfig(mask_block=4, mask_ratio=0.25, pathology_weight=0.0, columns=1, anatomy_weight=2.0)
        objective = Anatomy(config, UNet(network))
    rng = np.random.default_rng(0)

    def batches() -> Iterator[Batch]:
        for step in count():
            rows, kinds = rng.choice(len(people.scans), 16, replace=False), rng.integers(len(ALL), size=16)
            views = {"global": people.scans[rows, kinds][:, None]}
            yield Batch(views=views, places_mm={}, seed=step, targets={"volumes": people.ventricles[rows]})

    trained = train(objective, batches(), steps=200, lr=3e-3)
    with torch.inference_mode():
        deepest = trained.backbone.features(strangers.scans.flatten(0, 1))[-1]
        said = trained.volumes(deepest[:, : trained.anatomy_count]).unflatten(0, (-1, len(ALL)))[..., 0]
    truth = strangers.ventricles
    left = ((said - truth) ** 2).sum(dim=0) / ((truth - truth.mean()) ** 2).sum()
    assert (1 - left > 0.5).all()


MARKED = UNetConfig(
    features=(8, 16, 32), depths=(1, 1, 1), strides=(1, 2, 2), block_ijk=GRID, out_channels=1 + len(STRUCTURES)
)
TARGET_DICE = 0.5
Marked = tuple[Tensor, Tensor]
"""Scans (person, 1, i, j, k) and the structure of each of their voxels (person, i, j, k), 0 for what is none."""


def marked(first: int, people: int) -> Marked:
    scans, truths = [], []
    for seed in range(first, first + people):
        like = BrainConfig(seed=seed, shape_ijk=GRID, spacing_mm=SPEC.spacing_mm, pathology="none")
        (study,) = brain_subject(seed, sessions=1, contrasts=("T1w",), like=like)
        labels, array = study.volumes[0].labels, study.volumes[0].array
        assert labels is not None
        values = {name: value for value, name in labels.classes.items()}
        truth = torch.zeros(GRID, dtype=torch.int64)
        for number, name in enumerate(STRUCTURES, start=1):
            truth[torch.from_numpy(labels.array == values[name])] = number
        truths.append(truth)
        scans.append(window(torch.from_numpy(array), limits(array, SPEC)))
    return torch.stack(scans), torch.stack(truths)


def drawn(seed: int) -> UNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(MARKED)


def synthesised(truths: Tensor, *, steps: int = 250) -> UNet:
    """A network that learned from images made of label maps; it never saw a scan."""
    config = SegmentationPriorConfig(
        classes=("background", *STRUCTURES),
        volumes_weight=0.0,
        symmetry_weight=0.0,
        synthesis=SynthesisConfig(thick=1.0),
    )
    rng = np.random.default_rng(0)

    def batches() -> Iterator[Batch]:
        for step in count():
            rows = rng.choice(len(truths), 8, replace=False)
            labels = truths[rows][:, None, None].float()
            yield Batch(views={"global": labels, "labels:global": labels}, places_mm={}, seed=step)

    return train(SegmentationPrior(config, drawn(0)), batches(), steps=steps, lr=6e-3).backbone


def steps_to(network: UNet, labelled: Marked, held: Marked, *, seed: int, most: int = 100, every: int = 5) -> int:
    """After how many steps of fine-tuning strangers' structures are found; one more than the most if never."""
    resize_convolutions(network)
    network.train().requires_grad_(True)
    optimizer, rng = torch.optim.AdamW(network.parameters(), lr=3e-3), np.random.default_rng(seed)
    for step in range(1, most + 1):
        rows = rng.choice(len(labelled[0]), 4, replace=False)
        logits = network.decode(network.features(labelled[0][rows]))
        optimizer.zero_grad()
        overlap(logits, labelled[1][rows], kind="dice_ce").backward()
        optimizer.step()
        if step % every == 0:
            with torch.inference_mode():
                said = network.decode(network.features(held[0])).argmax(dim=1)
            if dice_of(said, held[1]) >= TARGET_DICE:
                return step
    return most + 1


def dice_of(said: Tensor, truth: Tensor) -> float:
    kinds = range(1, 1 + len(STRUCTURES))
    sizes = [int((said == kind).sum() + (truth == kind).sum()) for kind in kinds]
    both = [int(((said == kind) & (truth == kind)).sum()) for kind in kinds]
    return float(np.mean([2 * shared / size for shared, size in zip(both, sizes, strict=True)]))


def test_what_learned_from_label_maps_alone_needs_fewer_steps_on_eight_labelled_people() -> None:
    labelled, held = marked(500_000, 8), marked(HELD_FROM, 16)
    pretrained = synthesised(marked(0, 64)[1])
    for seed in (0, 1, 2):
        begun = drawn(seed)
        begun.load_state_dict(pretrained.state_dict())
        needed = steps_to(begun, labelled, held, seed=seed)
        assert needed <= 100
        assert needed < steps_to(drawn(seed), labelled, held, seed=seed)
