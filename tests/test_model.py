from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import voxelstem as vs
from voxelstem.card import Card, write_weights
from voxelstem.errors import CheckpointError, ConfigError, IngestError
from voxelstem.model import Model, load, make_model
from voxelstem.sources import nifti
from voxelstem.sources.phantom import PhantomConfig, phantom, turn_from_ras
from voxelstem.study import InputSpec, Provenance, Study, Volume
from voxelstem.views.tile import cover, split_blocks, tile

SPEC = InputSpec(spacing_mm=(8.0, 8.0, 8.0), low_hu=-200.0, high_hu=300.0, block_ijk=(16, 16, 16))
ARCHITECTURE = {
    "name": "scan_vit",
    "block_ijk": (16, 16, 16),
    "block.dim": 24,
    "block.depth": 1,
    "block.heads": 2,
    "scan.dim": 12,
    "scan.depth": 1,
    "scan.heads": 2,
}


def model(*, trained: tuple[str, ...] = ("block",), spec: InputSpec = SPEC, seed: int = 0) -> Model:
    return make_model(Card(architecture=ARCHITECTURE, spec=spec, trained=trained), seed=seed)


def volume(
    shape: tuple[int, ...], *, spacing: tuple[float, float, float] = (8.0, 8.0, 8.0), modality: str = "CT"
) -> Volume:
    array = np.random.default_rng(0).uniform(-200, 300, size=(1, *shape)).astype(np.float32)
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = -50.0, 20.0, 300.0
    provenance = Provenance(source_format="phantom", sha256="0" * 64, orientation="RAS")
    return Volume(array=array, affine_ras=affine, modality=modality, provenance=provenance)


@pytest.mark.parametrize(
    ("shape", "grid"),
    [((1, 1, 1), (1, 1, 1)), ((5, 16, 17), (1, 1, 2)), ((33, 2, 16), (3, 1, 1)), ((20, 20, 20), (2, 2, 2))],
)
def test_a_scan_of_any_shape_is_seen_whole(shape: tuple[int, ...], grid: tuple[int, ...]):
    embedding = model().embed(volume(shape), tokens=True)
    assert embedding.grid == grid
    assert embedding.coverage == 1.0
    assert embedding.scan.shape == (48,)
    assert embedding.blocks.shape == (int(np.prod(grid)), 48)
    assert embedding.tokens is not None
    assert embedding.tokens.shape == (*(4 * count for count in grid), 24)
    assert all(np.isfinite(part).all() and part.dtype == np.float32 for part in (embedding.scan, embedding.tokens))


def test_the_scan_level_pools_only_where_it_was_trained():
    scan = volume((20, 16, 16))
    blocks_only, both = model().embed(scan), model(trained=("block", "scan")).embed(scan)
    assert (blocks_only.scan.shape, blocks_only.blocks.shape) == ((48,), (2, 48))
    assert (both.scan.shape, both.blocks.shape) == ((24,), (2, 12))


def test_without_a_scan_level_a_scan_is_the_mean_of_its_blocks_by_seen_voxels():
    # 33 layers in 3 blocks of 16: 15 of padding behind.
    embedding = model().embed(volume((33, 16, 16)))
    seen = np.array([16, 16, 1]) / 33
    assert np.allclose(embedding.scan, (embedding.blocks * seen[:, None]).sum(axis=0), atol=1e-5)


def test_with_a_scan_level_a_scan_is_its_cls_and_the_mean_of_its_blocks():
    embedding = model(trained=("block", "scan")).embed(volume((33, 16, 16)))
    assert np.allclose(embedding.scan[12:], embedding.blocks.mean(axis=0), atol=1e-6)


def test_how_many_blocks_go_in_one_pass_does_not_matter():
    scan = volume((40, 20, 20))
    one = replace(model(), blocks_per_pass=1).embed(scan, tokens=True)
    many = model().embed(scan, tokens=True)
    assert np.allclose(one.scan, many.scan, atol=1e-5)
    assert np.allclose(one.tokens, many.tokens, atol=1e-5)


def test_the_same_scan_gives_the_same_bytes_and_is_left_as_it_was():
    scan = volume((20, 16, 16))
    before = scan.array.copy()
    assert model().embed(scan).scan.tobytes() == model().embed(scan).scan.tobytes()
    assert np.array_equal(before, scan.array)


@pytest.mark.parametrize("spacing", [(8.0, 8.0, 8.0), (4.0, 6.0, 10.0)])
def test_a_bright_landmark_changes_the_token_that_lies_at_its_place(spacing: tuple[float, float, float]):
    dark = volume((30, 25, 21), spacing=spacing)
    dark.array[:] = 0.0
    at = np.array([23, 8, 14])
    bright = replace(dark, array=dark.array.copy())
    bright.array[(0, *at)] = 3000.0
    want_mm = dark.affine_ras[:3, :3] @ at + dark.affine_ras[:3, 3]
    one, two = (model().embed(scan, tokens=True) for scan in (dark, bright))
    assert one.tokens is not None
    assert two.tokens is not None
    assert two.tokens_affine_ras is not None
    change = np.abs(two.tokens - one.tokens).sum(axis=-1)
    token = np.array(np.unravel_index(change.argmax(), change.shape))
    centre_mm = two.tokens_affine_ras[:3, :3] @ token + two.tokens_affine_ras[:3, 3]
    # Half a patch of 4 voxels of 8 mm, along each axis.
    assert (np.abs(centre_mm - want_mm) <= 16.0 + 1e-6).all()


def test_tokens_cover_the_scan_from_its_low_corner_on():
    embedding = model().embed(volume((20, 16, 10)), tokens=True)
    affine = embedding.tokens_affine_ras
    assert affine is not None
    assert np.allclose(np.diag(affine), [32, 32, 32, 1])
    # The first patch of 4 voxels has its centre at voxel 1.5.
    assert affine[:3, 3].tolist() == [-50 + 8 * 1.5, 20 + 8 * 1.5, 300 + 8 * 1.5]


def test_however_the_file_s_axes_run_the_embedding_is_the_same(tmp_path: Path):
    source = phantom(PhantomConfig(seed=3, spacing_mm=(8.0, 8.0, 10.0))).volumes[0]
    found = []
    for orientation in ("RAS", "LPS", "SAR", "PIL", "IRP"):
        path = tmp_path / f"{orientation}.nii.gz"
        nifti.write(path, *turn_from_ras(source.array[0].astype(np.int16), source.affine_ras, orientation))
        found.append(model().embed(vs.read(path), tokens=True))
    for other in found[1:]:
        assert other.scan.tobytes() == found[0].scan.tobytes()
        assert np.allclose(other.tokens_affine_ras, found[0].tokens_affine_ras, atol=1e-3)


def test_values_beyond_the_window_make_no_difference():
    scan = volume((16, 16, 16))
    clipped = replace(scan, array=np.where(scan.array > 299, 4000.0, scan.array).astype(np.float32))
    level = replace(scan, array=np.where(scan.array > 299, 300.0, scan.array).astype(np.float32))
    assert np.array_equal(model().embed(clipped).scan, model().embed(level).scan)


def test_an_mr_scan_is_refused_at_the_door_of_ct_weights():
    with pytest.raises(ConfigError, match="trained on CT, the scan is MR") as caught:
        model().embed(volume((16, 16, 16), modality="MR"))
    assert "MR" in caught.value.hint


def test_a_study_of_one_volume_is_embedded_and_one_of_two_is_not():
    scan = volume((16, 16, 16))
    alone = model().embed(Study(subject="s", volumes=(scan,)))
    assert np.array_equal(alone.scan, model().embed(scan).scan)
    with pytest.raises(ConfigError, match="2 volumes"):
        model().embed(Study(subject="s", volumes=(scan, scan)))


def test_bf16_is_close_to_fp32_and_other_precisions_are_refused():
    scan = volume((16, 16, 16))
    full, half = (model().embed(scan, precision=precision).scan for precision in ("fp32", "bf16"))
    assert half.dtype == np.float32
    assert float(full @ half) / np.linalg.norm(full) / np.linalg.norm(half) > 0.999
    with pytest.raises(ConfigError, match="fp32 or bf16"):
        model().embed(scan, precision="fp8")


def test_scratch_is_the_same_architecture_untrained_and_drawn_by_its_seed():
    source = model(trained=("block", "scan"), seed=5)
    one, two, other = (source.scratch(seed=seed).backbone.state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    assert one.keys() == source.backbone.state_dict().keys()
    scratch = source.scratch(seed=1)
    assert scratch.card.trained == ()
    assert scratch.spec == source.spec
    assert scratch.card.sha256 != source.scratch(seed=2).card.sha256


def test_weights_load_as_they_were_written(tmp_path: Path):
    source = model(seed=4)
    write_weights(tmp_path / "w", source.backbone.state_dict(), source.card)
    loaded = load(tmp_path / "w")
    scan = volume((16, 20, 16))
    assert loaded.embed(scan).scan.tobytes() == source.embed(scan).scan.tobytes()
    assert not any(parameter.requires_grad for parameter in loaded.backbone.parameters())
    assert not loaded.backbone.training


def test_tensors_of_another_architecture_are_refused(tmp_path: Path):
    source = model()
    card = replace(source.card, architecture=ARCHITECTURE | {"block.dim": 48})
    write_weights(tmp_path / "w", source.backbone.state_dict(), card)
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        load(tmp_path / "w")


def test_a_folder_without_weights_is_a_clear_error(tmp_path: Path):
    with pytest.raises(CheckpointError, match="is not a weights folder"):
        load(tmp_path)


def test_a_scan_of_several_channels_is_refused_by_weights_for_one() -> None:
    card = Card(architecture={"name": "scan_vit"}, spec=InputSpec(block_ijk=(32, 32, 32)))
    volume = Volume(
        array=np.zeros((2, 8, 8, 8), np.float32),
        affine_ras=np.eye(4),
        modality="CT",
        provenance=Provenance(source_format="nifti", sha256="", orientation="RAS"),
    )
    with pytest.raises(ConfigError, match=r"1 channel\(s\), the scan has 2"):
        make_model(card, seed=0).embed(volume)


def test_scratch_goes_the_same_way_through_the_network() -> None:
    both = model(trained=("block", "scan"))
    scratch = both.scratch(seed=1)
    assert both.use_scan_level
    assert scratch.use_scan_level
    assert scratch.card.trained == ()
    assert not model(trained=("block",)).scratch(seed=1).use_scan_level


def unit(scan: Volume) -> torch.Tensor:
    """The window of `SPEC`, spelt out."""
    return ((torch.from_numpy(scan.array) + 200) / 500).clamp(0, 1)


@pytest.mark.parametrize("shape", [(35, 16, 47), (20, 9, 33), (5, 16, 17)])
def test_like_spectre_is_the_centre_crop_with_every_token_in_the_mean(shape: tuple[int, ...]):
    scan, both = volume(shape), model(trained=("block", "scan"))
    embedding = both.embed(scan, like_spectre=True, tokens=True)
    assert embedding.grid == tuple(max(size // 16, 1) for size in shape)
    voxels = unit(scan)
    for axis, size in enumerate(shape, start=1):
        short = max(16 - size, 0)
        pad = [0] * 6
        pad[6 - 2 * axis], pad[7 - 2 * axis] = short // 2, short - short // 2
        voxels = torch.nn.functional.pad(voxels, pad)
        whole = voxels.shape[axis] // 16 * 16
        voxels = voxels.narrow(axis, voxels.shape[axis] // 2 - whole // 2, whole)
    cls, patches = both.backbone.encode_blocks(split_blocks(voxels, (16, 16, 16)))
    described = torch.cat([cls, patches.mean(dim=1)], dim=1)
    whole, rows = both.backbone.look_at_scan(described[None], embedding.grid)
    assert np.allclose(embedding.blocks, rows[0], atol=1e-5)
    assert np.allclose(embedding.scan, torch.cat([whole[0], rows[0].mean(dim=0)]), atol=1e-5)
    kept = [min(size, size // 16 * 16 or size) / size for size in shape]
    assert embedding.coverage == pytest.approx(np.prod(kept))


def test_patches_of_nothing_but_padding_stay_out_of_the_mean():
    scan, one = volume((16, 16, 6)), model()
    tiling = cover((16, 16, 6), (16, 16, 16))
    cls, patches = one.backbone.encode_blocks(tile(unit(scan), tiling, fill=0.0))
    # Along k patches of 4: one is scan, one is half, two are padding.
    share = torch.tensor([1.0, 0.5, 0.0, 0.0]).repeat(16)
    mean = (patches[0] * share[:, None]).sum(dim=0) / share.sum()
    assert np.allclose(one.embed(scan).scan, torch.cat([cls[0], mean]), atol=1e-5)


@pytest.mark.parametrize("trained", [("block",), ("block", "scan")])
def test_a_pool_keeps_cls_or_mean_or_both(trained: tuple[str, ...]):
    scan, one = volume((20, 16, 16)), model(trained=trained)
    both, cls, mean = (one.embed(scan, pool=kind).scan for kind in ("cls-mean", "cls", "mean"))
    assert np.array_equal(both, np.concatenate([cls, mean]))
    with pytest.raises(ConfigError, match="pool must be one of"):
        one.embed(scan, pool="max")  # pyright: ignore[reportArgumentType]


def test_the_facts_say_what_was_seen_and_how():
    facts = model().embed(volume((20, 16, 16), spacing=(8.0, 8.0, 8.0))).facts
    assert facts is not None
    assert (facts.seen_mm, facts.spacing_mm) == ((160.0, 128.0, 128.0), (8.0, 8.0, 8.0))
    assert (facts.compute, facts.precision, facts.relative_error, facts.warnings) == ("reference", "fp32", 0.0, ())
    assert facts.effective_rank == pytest.approx(1.0, abs=1e-6)  # two blocks lie on a line
    assert facts.hu == "not-judged"  # so few voxels
    alone = model().embed(volume((16, 16, 16))).facts
    assert alone is not None
    assert alone.effective_rank is None
    half = model().embed(volume((16, 16, 16)), precision="bf16").facts
    assert half is not None
    assert half.precision == "bf16"
    assert 0 < half.relative_error <= 1e-2


@pytest.mark.parametrize(
    ("shape", "spacing", "how", "words"),
    [
        ((16, 16, 16), (8.0, 8.0, 17.0), {}, ("thick: voxels are 17 mm apart head-foot",)),
        ((16, 10, 16), (8.0, 8.0, 8.0), {}, ("small: 10 of the 16 voxels of a block front-back",)),
        ((16, 16, 17), (8.0, 8.0, 8.0), {"like_spectre": True}, ("cut: the centre crop leaves 5.9%",)),
        ((32, 32, 32), (4.0, 4.0, 4.0), {"spec": replace(SPEC, resampling="native")}, ("spacing: fed at 4 x 4 x 4",)),
        ((16, 16, 16), (8.1, 8.0, 8.0), {}, ()),
    ],
)
def test_what_the_weights_never_saw_is_warned_of(shape, spacing, how, words: tuple[str, ...]):
    facts = model().embed(volume(shape, spacing=spacing), **how).facts
    assert facts is not None
    assert len(facts.warnings) == len(words)
    assert all(found.startswith(word) for found, word in zip(facts.warnings, words, strict=True))


FIT = replace(SPEC, resampling="fit")


def test_tokens_of_a_stretched_scan_lie_where_their_voxels_do():
    scan = volume((40, 24, 8), spacing=(2.0, 3.0, 5.0))
    scan.array[:] = -1000.0
    scan.array[0, 4:36, 2:18, :] = 100.0
    embedding = model(spec=FIT).embed(scan, tokens=True)
    assert embedding.tokens is not None
    assert embedding.tokens.shape == (4, 4, 4, 24)
    # A patch of 4 voxels spans 4 * 32 / 16 voxels of the scan along i, 4 along j and 2 along k.
    for token in ((0, 0, 0), (3, 1, 2)):
        voxel = np.array([4, 2, 0]) + (np.array(token) + 0.5) * (8, 4, 2) - 0.5
        assert np.allclose(embedding.tokens_affine_ras @ [*token, 1], scan.affine_ras @ [*voxel, 1])


def test_the_facts_of_a_stretched_scan_count_the_air_that_was_cut_off():
    scan = volume((40, 24, 8), spacing=(2.0, 3.0, 5.0))
    scan.array[:] = -1000.0
    scan.array[0, 4:36, 2:18, :] = 100.0
    embedding = model(spec=FIT).embed(scan)
    facts = embedding.facts
    assert facts is not None
    assert embedding.grid == (1, 1, 1)
    assert embedding.coverage == pytest.approx(32 * 16 / (40 * 24))
    assert facts.seen_mm == pytest.approx((64.0, 48.0, 40.0))
    assert facts.spacing_mm == pytest.approx((4.0, 3.0, 2.5))
    assert facts.warnings == ()  # 5 mm are twice 2.5 mm, and no more
    thick = model(spec=FIT).embed(replace(scan, array=scan.array[..., :7])).facts
    assert thick is not None
    assert thick.warnings == ("thick: voxels are 5 mm apart head-foot, stretched to 2.19 mm",)
    by_spacing = model(spec=FIT).embed(scan, spec=replace(SPEC, spacing_mm=(4.0, 3.0, 2.5))).facts
    assert by_spacing is not None
    assert by_spacing.warnings == ("spacing: fed at 4 x 3 x 2.5 mm, the weights saw each scan fit to one block",)


@pytest.mark.parametrize("spec", [FIT, replace(SPEC, frame_ijk=(16, 16, 16))])
def test_a_centre_crop_of_what_fits_one_block_or_a_frame_is_refused(spec: InputSpec):
    with pytest.raises(ConfigError, match="like_spectre has no meaning"):
        model(spec=spec).embed(volume((16, 16, 16)), like_spectre=True)


def test_a_frame_warns_of_what_it_leaves_out_and_of_scans_fed_without_it():
    scan = volume((40, 24, 20), spacing=(8.0, 8.0, 8.0))
    scan.array[:] = -1000.0
    scan.array[0, 4:36, 2:18, 2:18] = 100.0
    framed = replace(SPEC, frame_ijk=(16, 16, 16))
    embedding = model(spec=framed).embed(scan, tokens=True)
    assert embedding.facts is not None
    assert embedding.facts.warnings == ("cut: the frame about the body leaves 50.0% of its box out",)
    assert embedding.coverage == pytest.approx(16**3 / (40 * 24 * 20))
    assert embedding.tokens_affine_ras is not None
    # The first patch of 4 voxels begins at voxel 12 of the scan along i, and at 2 along j and k.
    assert np.allclose(embedding.tokens_affine_ras @ [0, 0, 0, 1], scan.affine_ras @ [13.5, 3.5, 3.5, 1])
    whole = model(spec=framed).embed(scan, spec=SPEC).facts
    assert whole is not None
    assert whole.warnings[-1] == "frame: fed in whole, the weights saw a box of (16, 16, 16) voxels about the body"


def test_values_that_are_no_hounsfield_units_are_recorded_and_warned_of():
    body = phantom(PhantomConfig(seed=1, spacing_mm=(8.0, 8.0, 8.0))).volumes[0]
    good, shifted = (model().embed(replace(body, array=body.array + by)).facts for by in (0.0, 1024.0))
    assert good is not None
    assert shifted is not None
    assert (good.hu, shifted.hu) == ("fits", "no-rescale")
    assert shifted.warnings == ("hu: the values are not Hounsfield units (no-rescale)",)


def test_a_scan_with_a_hole_of_nan_is_refused():
    scan = volume((16, 16, 16))
    scan.array[0, 3, 3, 3] = np.nan
    with pytest.raises(IngestError) as caught:
        model().embed(scan)
    assert caught.value.code == "not-finite"


def test_air_is_computed_once_and_counts_as_it_would_alone():
    scan = volume((48, 16, 16))
    scan.array[:, 16:] = -1000.0
    embedding = model().embed(scan)
    air = volume((16, 16, 16))
    air.array[:] = -500.0
    assert np.array_equal(embedding.blocks[1], embedding.blocks[2])
    assert np.allclose(embedding.blocks[1], model().embed(air).blocks[0], atol=1e-6)


@pytest.mark.parametrize(
    ("architecture", "spec", "why"),
    [
        ({"block.depth": 10**8}, {}, r"1\d{8} layers"),
        ({"block.dim": 6 * 10**12}, {}, "sizes beyond every memory"),
        ({"patch_ijk": (10**7,) * 3, "block_ijk": (10**7,) * 3}, {}, "sizes beyond every memory"),
        ({"name": "i3resnet", "depths": (10**8, 8, 36, 3)}, {}, r"1\d{8} layers"),
        ({}, {"block_ijk": (15, 16, 16)}, "which patches"),
        ({}, {"block_ijk": (16000, 16000, 16000)}, "blocks of"),
    ],
)
def test_a_card_of_a_network_that_cannot_be_is_refused_before_it_is_built(
    tmp_path: Path, architecture: dict[str, object], spec: dict[str, object], why: str
):
    bare = {} if "name" in architecture else ARCHITECTURE
    card = Card(architecture={**bare, **architecture}, spec=replace(SPEC, **spec), trained=("block",))
    write_weights(tmp_path / "weights", model().backbone.state_dict(), card)
    with pytest.raises(CheckpointError, match=f"no network that can be: it says .*{why}"):
        load(tmp_path / "weights")
