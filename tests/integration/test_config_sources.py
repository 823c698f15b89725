"""Configurations as the usual libraries read them. The full environment has all of these."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import jdcore

EXPECTED = jdcore.get_aggregator("upgrad", pref_vector=torch.tensor([0.25, 0.75]), solver="native")

YAML = """
aggregator:
  name: upgrad
  pref_vector: [0.25, 0.75]
  solver: native
"""
TOML = """
[aggregator]
name = "UPGrad"
pref_vector = [0.25, 0.75]
solver = "native"
"""
JSON = '{"aggregator": {"name": "up-grad", "pref_vector": [0.25, 0.75], "solver": "native"}}'


def from_yaml() -> Any:
    return pytest.importorskip("yaml").safe_load(YAML)


def from_toml() -> Any:
    return pytest.importorskip("tomllib", reason="part of Python since 3.11").loads(TOML)


def from_json() -> Any:
    return json.loads(JSON)


def from_omegaconf() -> Any:
    return pytest.importorskip("omegaconf").OmegaConf.create(YAML)


def from_hydra(tmp_path: Path, overrides: list[str]) -> Any:
    hydra = pytest.importorskip("hydra")
    (tmp_path / "config.yaml").write_text(YAML)
    with hydra.initialize_config_dir(str(tmp_path), version_base=None):
        return hydra.compose("config", overrides=overrides)


@pytest.mark.parametrize("read", [from_yaml, from_toml, from_json, from_omegaconf])
def test_a_configuration_file_makes_the_aggregator(read: Any) -> None:
    assert repr(jdcore.get_aggregator(read()["aggregator"])) == repr(EXPECTED)


def test_hydra_overrides_reach_the_aggregator(tmp_path: Path) -> None:
    config = from_hydra(tmp_path, ["aggregator.pref_vector=[1,2]"])

    assert jdcore.get_weighting(config.aggregator).pref_vector.tolist() == [1.0, 2.0]


def test_a_mistake_in_a_hydra_override_is_named_by_its_path(tmp_path: Path) -> None:
    config = from_hydra(tmp_path, ["+aggregator.prefvector=[1,2]"])

    with pytest.raises(jdcore.ParameterError, match=r"`config\.prefvector` must be an argument"):
        jdcore.get_aggregator(config.aggregator)


def test_a_configuration_survives_omegaconf() -> None:
    omegaconf = pytest.importorskip("omegaconf").OmegaConf

    written = omegaconf.to_yaml(omegaconf.create(jdcore.to_config(EXPECTED)))

    assert repr(jdcore.get_aggregator(omegaconf.create(written))) == repr(EXPECTED)
