"""The fingerprint that `prepare` writes and `plan` reads."""

import json

import pytest
import yaml
from synthetic import SHAPE, SPACING, make_cache, write_dataset

from organseg.cli import run
from organseg.cli.configs import load_config
from organseg.data.fingerprint import Fingerprint, read_fingerprint
from organseg.errors import IntegrityError
from organseg.networks import NNUNet, UTransformer
from organseg.volumes import WorkingGrid


def test_medians_by_hand():
    found = Fingerprint(((10, 20, 30), (12, 20, 34), (40, 22, 31)), ((1.0, 2, 3), (5.0, 2, 3), (2.0, 2.5, 3)))
    assert found.median_shape == (12, 20, 31) and found.median_spacing == (2.0, 2.0, 3.0)


def test_prepare_writes_it_for_the_working_grid(tmp_path):
    cache = make_cache(write_dataset(tmp_path / "set", 3), tmp_path / "cache", WorkingGrid(16))
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    found = read_fingerprint([folder])
    assert found.shapes == ((SHAPE[0], 16, 16),) * 3
    assert found.spacings == ((SPACING[0], 2 * SPACING[1], 2 * SPACING[2]),) * 3
    assert json.loads((folder / "fingerprint.json").read_text())["median_shape"] == [SHAPE[0], 16, 16]
    assert len(read_fingerprint([folder, folder]).shapes) == 6


def entry(shape, spacing):
    return json.dumps({"cases": {"a": {"shape": shape, "spacing_mm": spacing}}})


@pytest.mark.parametrize("content", [
    None, "", "{", "[]", '{"cases": {}}', '{"cases": {"a": {"shape": [1, 2]}}}', entry([0, 4, 4], [1, 1, 1]),
    entry([4, 4, 4], [0, 1, 1]), entry([4, 4, 4], [1e999, 1, 1]), entry(["x", 4, 4], [1, 1, 1]),
])  # fmt: skip
def test_a_missing_or_damaged_one_is_an_error(tmp_path, content):
    if content is not None:
        (tmp_path / "fingerprint.json").write_text(content)
    with pytest.raises(IntegrityError, match="organseg prepare"):
        read_fingerprint([tmp_path])


@pytest.mark.parametrize("dims", [2, 3])
def test_plan_is_a_config(tmp_path, capsys, dims):
    cache = make_cache(write_dataset(tmp_path / "set", 3), tmp_path / "cache")
    assert run(["plan", str(cache), "--dims", str(dims), "--width", "4", "--out", str(tmp_path / "plan.yaml")]) == 0
    config = load_config(tmp_path / "plan.yaml")
    assert config["data"]["init_args"]["batch_size"] >= 2
    assert len(config["data"]["init_args"].get("patch_size", ())) == (3 if dims == 3 else 0)
    sizes = config["model"]["init_args"]["network"]["init_args"]
    strides = NNUNet(1, 5, **sizes).strides
    assert "class_path" not in config["data"]  # or it would drop the experiment's other options
    capsys.readouterr()
    run(["plan", str(cache), "--dims", str(dims), "--width", "4", "--transformer"])
    network = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["network"]
    assert UTransformer(1, 5, heads=2, levels=1, **network).backbone.strides == strides
    capsys.readouterr()
    run(["plan", str(cache), "--dims", str(dims), "--width", "4"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load((tmp_path / "plan.yaml").read_text())


def test_what_cannot_be_planned_is_one_line(tmp_path, capsys):
    assert run(["plan", str(tmp_path)]) == 2
    assert "no prepared data set" in capsys.readouterr().err
    cache = make_cache(write_dataset(tmp_path / "set", 3), tmp_path / "cache")
    assert run(["plan", str(cache), "--memory_gb", "0.1"]) == 2
    assert "choose a smaller width" in capsys.readouterr().err
