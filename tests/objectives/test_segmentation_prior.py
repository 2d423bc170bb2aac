from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from voxelstem.backbones.scan_vit import ScanVitConfig
from voxelstem.backbones.unet import UNet, UNetConfig
from voxelstem.errors import ConfigError
from voxelstem.losses.segmentation import soft_segmentation, soft_volumes, volume_consistency
from voxelstem.objectives.segmentation_prior import LABELS, SegmentationPrior, SegmentationPriorConfig
from voxelstem.protocols import Batch
from voxelstem.sources.brain import BrainConfig, brain
from voxelstem.sources.brain_anatomy import CLASSES
from voxelstem.views.crop import ViewKind
from voxelstem.views.synthesis import apply_synthesis, draw_synthesis

NAMES = ("background", *CLASSES.values())
SIZES = UNetConfig(
    features=(4, 8, 16), depths=(1, 1, 1), strides=(1, 2, 2), block_ijk=(16, 16, 16), out_channels=len(NAMES)
)
CONFIG = SegmentationPriorConfig(classes=NAMES)
EDGE_MM = 10.0


def network(seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return UNet(SIZES)


def batch_of(seeds, contrast="T1w", step=0):
    """Whole brains at 16^3 voxels of 10 mm, with their label maps."""
    studies = [
        brain(BrainConfig(seed=seed, contrast=contrast, shape_ijk=(16, 16, 16), spacing_mm=(EDGE_MM,) * 3))
        for seed in seeds
    ]
    scans = torch.stack([torch.from_numpy(one.volumes[0].array) for one in studies])[:, None]
    labels = torch.stack([torch.from_numpy(one.volumes[0].labels.array) for one in studies])[:, None, None]
    places = torch.tensor([[0.0] * 3, [16 * EDGE_MM] * 3]).expand(len(seeds), 1, 2, 3)
    views = {"global": scans / scans.amax((1, 2, 3, 4, 5), keepdim=True), LABELS: labels.float()}
    return Batch(views=views, places_mm={"global": places}, seed=step)


def test_each_term_is_its_formula():
    objective, batch = SegmentationPrior(CONFIG, network()), batch_of((0, 1))
    output = objective.step(batch, progress=0.0)
    truth, scans = batch.views[LABELS][:, 0, 0].long(), batch.views["global"][:, 0]

    def segment(images):
        return objective.backbone.decode(objective.backbone.features(images))

    plan = draw_synthesis(CONFIG.synthesis, batch.chance.blocks(1), classes=len(NAMES))
    wanted = {"segmentation": soft_segmentation(segment(apply_synthesis(truth, plan)), truth)}
    voxel = torch.full((2,), EDGE_MM**3)
    counts = torch.stack([torch.bincount(row.flatten(), minlength=len(NAMES)) for row in truth]) * EDGE_MM**3
    counts[:, 0] = torch.nan
    wanted["volumes"] = volume_consistency(soft_volumes(segment(scans), voxel), counts).value
    here, there = (segment(images).softmax(dim=1) for images in (scans, scans.flip(2)))
    left, right = NAMES.index("hippocampus_left"), NAMES.index("hippocampus_right")
    back = there.flip(2).clone()
    back[:, [left, right]] = back[:, [right, left]]
    wanted["symmetry"] = (here - back).square().mean()
    for name, value in wanted.items():
        assert output.scalars[f"loss/{name}"] == pytest.approx(float(value.detach()), rel=1e-3, abs=1e-7)
    total = wanted["segmentation"] + 0.01 * wanted["volumes"] + 0.1 * wanted["symmetry"]
    assert float(output.loss.detach()) == pytest.approx(float(total.detach()), rel=1e-3)


def test_terms_without_weight_are_not_computed():
    only = replace(CONFIG, volumes_weight=0.0, symmetry_weight=0.0)
    objective = SegmentationPrior(only, network())
    seen = []
    features = objective.backbone.features
    objective.backbone.features = lambda images: (seen.append(len(images)), features(images))[1]
    output = objective.step(batch_of((0, 1)), progress=0.0)
    assert seen == [2]
    assert set(output.scalars) == {"loss/segmentation"}


def test_a_batch_without_label_maps_or_with_unnamed_values_is_refused():
    objective, batch = SegmentationPrior(CONFIG, network()), batch_of((0,))
    with pytest.raises(ConfigError, match="the batch holds none"):
        objective.step(replace(batch, views={"global": batch.views["global"]}), progress=0.0)
    wild = {**batch.views, LABELS: batch.views[LABELS] + 9}
    with pytest.raises(ConfigError, match=r"the value 1\d, and objective\.classes names 10"):
        objective.step(replace(batch, views=wild), progress=0.0)


def test_a_network_that_does_not_paint_the_classes_is_refused():
    with pytest.raises(ConfigError, match="paints 10 classes"):
        SegmentationPrior(CONFIG, UNet(replace(SIZES, out_channels=3)))
    view = ViewKind(size_ijk=(16, 16, 16))
    CONFIG.check(view, view, batch=1, backbone=SIZES)
    for wrong in (ScanVitConfig(), replace(SIZES, out_channels=2), replace(SIZES, decoder=False)):
        with pytest.raises(ValueError, match="out_channels=10"):
            CONFIG.check(view, view, batch=1, backbone=wrong)
    with pytest.raises(ValueError, match="multiple of 4"):
        CONFIG.check(ViewKind(size_ijk=(18, 16, 16)), view, batch=1, backbone=SIZES)


@pytest.mark.parametrize(
    "wrong", [{"classes": ("background",)}, {"classes": ("a", "left x")}, {"segmentation_weight": 0.0}]
)
def test_settings_that_cannot_be_are_refused(wrong):
    with pytest.raises(ValueError, match=r"classes|side|weight"):
        SegmentationPriorConfig(**wrong)


@pytest.mark.slow
def test_what_is_learned_from_made_images_segments_contrasts_that_were_never_seen():
    config = replace(CONFIG, volumes_weight=0.0, symmetry_weight=0.05)
    objective = SegmentationPrior(config, network())
    optimiser = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    batches = [batch_of(range(4 * part, 4 * part + 4)) for part in range(5)]
    for step in range(300):
        optimiser.zero_grad()
        objective.step(replace(batches[step % 5], seed=step), progress=0.0).loss.backward()
        optimiser.step()
    white, grey, csf = (NAMES.index(name) for name in ("white_matter", "grey_matter", "ventricles"))
    for contrast in ("T1w", "T2w", "FLAIR"):
        batch = batch_of((101, 102, 103, 104), contrast)
        with torch.no_grad():
            found = objective.backbone.decode(objective.backbone.features(batch.views["global"][:, 0])).argmax(dim=1)
        truth = batch.views[LABELS][:, 0, 0].long()
        dice = [
            float(2 * ((found == kind) & (truth == kind)).sum() / ((found == kind).sum() + (truth == kind).sum()))
            for kind in (white, grey, csf)
        ]
        assert min(dice) > 0.5, (contrast, dice)
