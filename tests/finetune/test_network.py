from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from voxelstem.backbones.convolution import ConvNorm
from voxelstem.card import Card
from voxelstem.errors import ConfigError
from voxelstem.finetune.config import FinetuneConfig
from voxelstem.finetune.network import build, carry, restore
from voxelstem.model import Model, make_model

TWO = ("T1w", "FLAIR")


def rows(contrasts: int) -> torch.Tensor:
    return torch.randn(2, contrasts, 16, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["unet", "disentangled"])
@pytest.mark.parametrize(("contrasts", "fusion"), [((), "early"), (TWO, "early"), (TWO, "late")])
@pytest.mark.parametrize("voxels", [True, False])
def test_every_backbone_fuses_contrasts_either_way_for_either_kind_of_task(
    request: pytest.FixtureRequest, kind: str, contrasts: tuple[str, ...], fusion: str, voxels: bool
) -> None:
    model, config = request.getfixturevalue(kind), FinetuneConfig(contrasts=contrasts, fusion=fusion)
    net, card = build(model, out=3, config=config, voxels=voxels, seed=0)
    logits = net(rows(config.channels))
    assert logits.shape == ((2, 3, 16, 16, 16) if voxels else (2, 3))
    encoder, rest = net.groups()
    assert encoder
    assert rest
    # What the run keeps is enough to make the network again.
    again = restore(replace(make_model(card, seed=5), card=card), net.own(), out=3, config=config, voxels=voxels)
    again.backbone.load_state_dict(net.backbone.state_dict())
    assert torch.allclose(again(rows(config.channels)), net.eval()(rows(config.channels)), atol=1e-5)


def test_a_repeated_stem_says_of_equal_contrasts_what_it_said_of_one(unet: Model) -> None:
    one, _ = build(unet, out=1, config=FinetuneConfig(), voxels=True, seed=0)
    three, card = build(unet, out=1, config=FinetuneConfig(contrasts=("a", "b", "c")), voxels=True, seed=0)
    assert card.architecture["channels"] == 3
    assert torch.allclose(three(rows(1).expand(-1, 3, -1, -1, -1)), one(rows(1)), atol=1e-4)


def test_late_fusion_begins_as_the_mean_of_what_each_contrast_says(unet: Model) -> None:
    net, _ = build(unet, out=2, config=FinetuneConfig(contrasts=TWO, fusion="late"), voxels=True, seed=0)
    x = rows(2)
    alone = [net.backbone.decode(net.backbone.features(x[:, [index]])) for index in range(2)]
    assert torch.allclose(net(x), (alone[0] + alone[1]) / 2, atol=1e-5)


def test_what_a_disentangled_network_says_of_the_subject_is_averaged_and_the_rest_kept_apart(
    disentangled: Model,
) -> None:
    config = FinetuneConfig(contrasts=("a", "b", "c", "d"), fusion="late")
    net, _ = build(disentangled, out=2, config=config, voxels=False, seed=0)
    assert net.head is not None
    assert net.head.narrow.in_features == 4 * (1 + 4)


def test_weights_are_taken_over_and_what_does_not_fit_is_new(unet: Model) -> None:
    net, card = build(unet, out=3, config=FinetuneConfig(), voxels=True, seed=1)
    old, new = unet.backbone.state_dict(), net.backbone.state_dict()
    fresh = [name for name in new if new[name].shape != old[name].shape]
    assert {name.split(".")[1] for name in fresh} == {"seg_layers"}
    assert all(torch.equal(new[name], old[name]) for name in new if name not in fresh)
    assert (card.parent, card.spec, card.architecture["out_channels"]) == ("a" * 64, unet.spec, 3)
    alone, _ = build(unet, out=3, config=FinetuneConfig(transfer="encoder"), voxels=True, seed=1)
    kept = alone.backbone.state_dict()
    assert all(torch.equal(kept[name], old[name]) for name in kept if name.startswith("encoder."))
    assert not torch.equal(kept["decoder.transpconvs.0.weight"], old["decoder.transpconvs.0.weight"])


def test_new_parts_follow_the_seed(unet: Model) -> None:
    first, same, other = (
        build(unet, out=2, config=FinetuneConfig(), voxels=False, seed=seed)[0].own()["head.answer.weight"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_only_wider_inputs_are_repeated() -> None:
    old = {"stem": torch.randn(4, 1, 3, 3, 3), "last": torch.randn(1, 4, 1, 1, 1)}
    new = {"stem": torch.zeros(4, 2, 3, 3, 3), "last": torch.zeros(3, 4, 1, 1, 1)}
    kept = carry(old, new)
    assert torch.allclose(kept["stem"], old["stem"].expand(-1, 2, -1, -1, -1) / 2)
    assert not kept["last"].any()


def test_another_patch_is_the_new_weights_block_and_nothing_else_of_the_spec_moves(unet: Model) -> None:
    _, card = build(unet, out=2, config=FinetuneConfig(patch_ijk=(8, 8, 8)), voxels=True, seed=0)
    assert card.spec == replace(unet.spec, block_ijk=(8, 8, 8))
    assert card.architecture["block_ijk"] == (8, 8, 8)


def vit_like(model: Model) -> Model:
    block = {"block.dim": 24, "block.depth": 2, "block.heads": 2, "scan.depth": 0}
    return make_model(
        Card(architecture={"name": "scan_vit", "block_ijk": (16, 16, 16)} | block, spec=model.spec), seed=0
    )


def test_a_backbone_without_a_decoder_labels_voxels_from_its_tokens(unet: Model) -> None:
    vit = vit_like(unet)
    for voxels, shape in ((True, (2, 3, 16, 16, 16)), (False, (2, 3))):
        net, card = build(vit, out=3, config=FinetuneConfig(), voxels=voxels, seed=0)
        assert net(rows(1)).shape == shape
        again = restore(
            replace(make_model(card, seed=5), card=card), net.own(), out=3, config=FinetuneConfig(), voxels=voxels
        )
        again.backbone.load_state_dict(net.backbone.state_dict())
        assert torch.allclose(again(rows(1)), net.eval()(rows(1)), atol=1e-5)


def test_low_rank_changes_alone_are_trained_and_change_nothing_before(unet: Model) -> None:
    vit, config = vit_like(unet), FinetuneConfig(changes="low_rank")
    net, _ = build(vit, out=2, config=config, voxels=True, seed=0)
    plain, _ = build(vit, out=2, config=FinetuneConfig(), voxels=True, seed=0)
    assert torch.allclose(net(rows(1)), plain(rows(1)), atol=1e-6)
    encoder, rest = net.groups()
    assert {tuple(parameter.shape) for parameter in encoder} == {(8, 24), (72, 8), (96, 8)}  # of qkv and fc1
    assert sum(p.numel() for p in encoder) < 0.3 * sum(p.numel() for p in plain.groups()[0])
    assert rest


def test_a_network_without_the_named_layers_has_no_adapters(unet: Model) -> None:
    with pytest.raises(ConfigError, match="no linear layer of this network is called 'qkv'"):
        build(unet, out=2, config=FinetuneConfig(changes="low_rank"), voxels=True, seed=0)


def test_a_patch_embedding_is_not_drawn_anew_for_more_contrasts(unet: Model) -> None:
    with pytest.raises(ConfigError, match="takes 1 channel"):
        build(vit_like(unet), out=2, config=FinetuneConfig(contrasts=TWO), voxels=True, seed=0)
    net, _ = build(vit_like(unet), out=2, config=FinetuneConfig(contrasts=TWO, fusion="late"), voxels=True, seed=0)
    assert net(rows(2)).shape == (2, 2, 16, 16, 16)


def test_convolutions_brought_to_a_fresh_draw_s_size_answer_as_before(unet: Model) -> None:
    large = make_model(replace(unet.card, sha256="b" * 64), seed=3)
    for name, parameter in large.backbone.named_parameters():
        if "conv.weight" in name:
            parameter.data.mul_(5.0)
    kept, _ = build(large, out=2, config=FinetuneConfig(), voxels=True, seed=0)
    drawn, _ = build(large, out=2, config=FinetuneConfig(sizes="drawn"), voxels=True, seed=0)
    x = rows(1)
    torch.testing.assert_close(drawn(x), kept(x), atol=2e-3, rtol=2e-3)
    norms = [m.conv.weight.flatten(1).norm(dim=1) for m in drawn.backbone.modules() if isinstance(m, ConvNorm)]
    assert torch.allclose(torch.cat(norms), torch.tensor(2 / (1 + 1e-4)).sqrt(), atol=1e-4)
