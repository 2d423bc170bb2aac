from __future__ import annotations

import dataclasses

import pytest
from torch import nn

from voxelstem.backbones import BACKBONES
from voxelstem.errors import ConfigError


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_line_is_a_network_with_a_config_that_knows_its_name(name: str) -> None:
    network = BACKBONES[name]
    assert issubclass(network, nn.Module)
    assert dataclasses.is_dataclass(network.Config)
    assert network.Config().name == name


def test_a_misspelt_backbone_gets_a_suggestion() -> None:
    with pytest.raises(ConfigError, match="did you mean 'scan_vit'"):
        BACKBONES["scan_vti"]
