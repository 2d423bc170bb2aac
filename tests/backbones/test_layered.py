from __future__ import annotations

import pytest
import torch

from voxelstem.backbones.layered import Layered
from voxelstem.card import Card
from voxelstem.errors import ConfigError
from voxelstem.model import make_model
from voxelstem.study import InputSpec

SPEC = InputSpec(spacing_mm=(8.0, 8.0, 8.0), block_ijk=(16, 16, 16))
ARCHITECTURE = {"name": "scan_vit", "block_ijk": (16, 16, 16), "block.dim": 24, "block.depth": 3, "block.heads": 2}


def test_it_gives_each_layer_s_tokens_in_the_order_asked_for() -> None:
    backbone = make_model(Card(architecture=ARCHITECTURE, spec=SPEC), seed=0).backbone
    blocks = torch.rand(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    seen = Layered(backbone, (3, 1))
    cls, tokens = seen.encode_blocks(blocks)
    assert seen.dim == cls.shape[-1] == tokens.shape[-1] == 48
    for place, layer in enumerate((3, 1)):
        part = slice(24 * place, 24 * (place + 1))
        ((one_cls, one_tokens),) = backbone.intermediates(blocks, [layer])
        torch.testing.assert_close(cls[:, part], one_cls)
        torch.testing.assert_close(tokens[..., part], one_tokens)
    last_cls, last_tokens = backbone.encode_blocks(blocks)
    torch.testing.assert_close(cls[:, :24], last_cls)
    torch.testing.assert_close(tokens[..., :24], last_tokens)


@pytest.mark.parametrize("layers", [(), (0,), (1, 1), (4,)])
def test_layers_that_are_not_there_are_refused(layers: tuple[int, ...]) -> None:
    backbone = make_model(Card(architecture=ARCHITECTURE, spec=SPEC), seed=0).backbone
    with pytest.raises(ConfigError, match="from 1 to 3") as caught:
        Layered(backbone, layers)
    assert "see.layers='[3]'" in caught.value.hint
