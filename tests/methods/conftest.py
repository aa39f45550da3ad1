"""A cache, a coarse model and a fitted PriorModule, for the tests of the prior."""

from pathlib import Path

import pytest
from stippled import coarse_of, data_of, method, trainer
from synthetic import make_cache, write_dataset

from organseg.data import SliceDataModule
from organseg.methods import PriorModule


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prior")
    return make_cache(write_dataset(folder / "set", 8), folder / "cache")


@pytest.fixture(scope="module")
def coarse(cache, tmp_path_factory) -> Path:
    return coarse_of(data_of(cache), tmp_path_factory.mktemp("coarse") / "last.ckpt")


@pytest.fixture(scope="module")
def fitted(cache, coarse, tmp_path_factory) -> tuple[PriorModule, SliceDataModule, Path]:
    folder = tmp_path_factory.mktemp("run")
    module, data = method(coarse), data_of(cache)
    trainer(folder).fit(module, data)
    return module.eval(), data, folder
