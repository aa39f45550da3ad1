"""`report attention` and `receptive-field` show what the network sees: in windows, and in training."""

import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from organseg import cli
from organseg.batch import WholeCase
from organseg.cli import analysis
from organseg.cli.analysis import attention, receptive_field, seen_around
from organseg.cli.modules import build_module, trust
from organseg.cli.trusted import take_trusted
from organseg.data.cache import CaseArrays, CaseHeader, write_case
from organseg.errors import UsageError
from organseg.inference import segment_windows
from organseg.runtime.checkpoint_io import save_checkpoint
from organseg.volumes import Normalisation, Preprocessing, WorkingGrid

SHAPE, SPACING = (6, 20, 40), (3.0, 2.0, 2.0)
NORMALISATION = Normalisation((-160.0, 300.0), 10.0, 100.0)


def make_run(
    folder: Path,
    dims: int,
    grid: WorkingGrid,
    window: tuple[int, int, int] | None,
    model: dict[str, Any] | None = None,
) -> Path:
    """An untrained U-Transformer, or another method, and a cache of one case."""
    scan = np.random.default_rng(0).integers(-1000, 400, SHAPE).astype(np.int16)
    label = np.zeros(SHAPE, np.uint8)
    header = CaseHeader(
        key="toy/a", patient="a", modality="CT", organs=("liver",), annotated=("liver",), spacing=SPACING,
        affine=tuple(map(tuple, np.eye(4).tolist())), source_shape=SHAPE, source_spacing=SPACING, image_sha256="",
        label_sha256="", preprocessing={},
    )  # fmt: skip
    (folder / "cache" / "toy").mkdir(parents=True)
    write_case(folder / "cache" / "toy" / "a.h5", header, CaseArrays(scan, label, label))
    options = {"heads": 2, "levels": 2, "network": {"width": 4, "depth": 3, "dims": dims}}
    model = model or {"class_path": "organseg.methods.TransformerModule", "init_args": options}
    module = build_module(model, ["liver"])
    preprocessing = Preprocessing(grid, NORMALISATION, window).to_json()
    record = {"model": model, "organs": ["liver"], "preprocessing": preprocessing, "identity": {}}
    run = folder / "run"
    (run / "checkpoints").mkdir(parents=True)
    save_checkpoint({"state_dict": module.state_dict(), "organseg": record}, run / "checkpoints" / "last.ckpt")
    data = {"init_args": {"cache": str(folder / "cache"), "datasets": ["toy"]}}
    (run / "config.yaml").write_text(yaml.safe_dump({"data": data}))
    return run


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple]:
    """What is drawn, by the name of the function that draws it."""
    found = {}
    for name in ("draw_attention", "draw_receptive_field"):
        draw = getattr(analysis, name)
        monkeypatch.setattr(analysis, name, lambda *given, n=name, d=draw: (found.update({n: given}), d(*given))[1])
    return found


@pytest.mark.parametrize("voxel", [(0, 0, 0), (5, 19, 39), (3, 10, 20), (2, 19, 1)])
@pytest.mark.parametrize("window", [(8, 24, 16), (8, 24, 48), (4, 8, 16), (9, 20, 40)])
def test_a_patch_is_that_of_the_windows(window, voxel):
    """A case that is shorter than the patch lies in its middle, with air around; values are their own indices."""
    image = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE) + 1
    normalise = Normalisation((0.0, 1e6), 0.0, 1.0)
    case = WholeCase("a", 0, image, normalise, SHAPE, SPACING, np.eye(4), None, np.ones(1, bool), window)
    shown = []
    segment_windows(
        case,
        lambda view: (shown.append(view["image"][0, 0].numpy()), view["image"])[1],
        lambda probs: probs.argmax(1),
        device=torch.device("cpu"),
    )
    part, place = seen_around(image, np.array(voxel), window, normalise)
    assert part.shape == window and part[tuple(place)] == image[voxel]
    # All windows lie alike on the axes on which the case is shorter: air is at the same places.
    short = [axis for axis, (n, size) in enumerate(zip(SHAPE, window, strict=True)) if n <= size]
    for axis in short:
        others = tuple(other for other in range(3) if other != axis)
        assert np.array_equal((part > 0).any(axis=others), (shown[0] > 0).any(axis=others))
    if len(short) == 3:
        assert np.array_equal(part, shown[0])


def test_attention_of_a_case_that_is_shorter_than_the_patch(tmp_path, drawn):
    run = make_run(tmp_path, 3, WorkingGrid(None, SPACING), (16, 24, 16))
    picture = attention(Namespace(run=str(run), case="toy/a", voxel=[1, 2, 30]))
    assert picture.name == "attention_toy_a_1_2_30.png" and picture.stat().st_size > 10_000
    view, _, place, padded, maps = drawn["draw_attention"]
    # Of 16 slices and 24 rows 5 and 2 are air before the case; of 40 columns 16 are seen, 22 to 37.
    assert place == [1 + 5, 2 + 2, 8] and padded == [16, 24, 16]
    assert view.image.shape == (24, 16) and (view.image[[0, 1, 22, 23]] == -160).all()
    assert maps[0].heads.shape == (2, 4, 6, 4)


def test_attention_of_a_slice(tmp_path, drawn):
    attention(Namespace(run=str(make_run(tmp_path, 2, WorkingGrid(), None)), case="toy/a", voxel=[1, 2, 30]))
    view, _, place, padded, _ = drawn["draw_attention"]
    assert place == [2, 30] and padded == [20, 40] and view.image.shape == (20, 40)


@pytest.mark.parametrize(
    ("dims", "grid", "window", "size"),
    [
        (2, WorkingGrid(48), None, (48, 48)),
        (2, WorkingGrid(), None, (20, 40)),  # the case's own slices
        (3, WorkingGrid(None, SPACING), (8, 16, 24), (8, 16, 24)),
    ],
)
def test_receptive_fields_are_of_the_size_that_the_network_was_trained_on(tmp_path, drawn, dims, grid, window, size):
    run = make_run(tmp_path, dims, grid, window)
    assert receptive_field(Namespace(run=str(run), layer="bottom")).stat().st_size > 10_000
    effective, theoretical, title = drawn["draw_receptive_field"]
    assert effective.shape == theoretical.shape == size
    assert title.endswith(f"20 random inputs of {' x '.join(map(str, size))}")


def test_without_a_cache_the_size_of_own_slices_is_unknown(tmp_path):
    run = make_run(tmp_path, 2, WorkingGrid(), None)
    (tmp_path / "cache" / "toy" / "a.h5").unlink()
    with pytest.raises(UsageError, match=r"found no case of the run's data sets.*put the cache back"):
        receptive_field(Namespace(run=str(run), layer="bottom"))


@pytest.mark.parametrize(("layer", "side"), [("encoder.1", 14), ("backbone.encoder.1", 14), ("encoder.0.0", 3)])
def test_any_layer_has_a_receptive_field(tmp_path, drawn, layer, side):
    run = make_run(tmp_path, 2, WorkingGrid(48), None)
    assert receptive_field(Namespace(run=str(run), layer=layer)).name == f"receptive_field_{layer}.png"
    effective, theoretical, title = drawn["draw_receptive_field"]
    assert theoretical.sum() == side**2 and not effective[~theoretical].any() and effective.any()
    assert f"the middle of {layer}, 20 random inputs of 48 x 48" in title


@pytest.mark.parametrize(("layer", "why"), [
    ("encoder.3", "no such layer"),
    ("oder.1", "no such layer"),
    ("", "no such layer"),
    ("head", "it gives no single map on the way"),
    ("encoder", "it gives no single map on the way"),
    ("bottom.query", "it gives no single map on the way"),
])  # fmt: skip
def test_a_layer_that_is_none_is_refused_with_the_names_of_all(tmp_path, layer, why):
    run = make_run(tmp_path, 2, WorkingGrid(48), None)
    with pytest.raises(UsageError, match=f"--layer {layer}: {why}.*; the network has backbone, ") as caught:
        receptive_field(Namespace(run=str(run), layer=layer))
    names = str(caught.value).partition("the network has ")[2].split(", ")
    assert {"backbone.encoder.2", "backbone.bottom", "backbone.decoder.1", "head"} < set(names) and len(names) < 20


def test_pictures_of_the_readmes_own_network(tmp_path, monkeypatch, capsys):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (text,) = re.findall(r"^```python\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE)
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    take_trusted(["--trust-import", "mine"])
    trust()
    network = {"class_path": "mine.Mine", "init_args": {"width": 4}}
    model = {"class_path": "organseg.methods.PartialLabelModule", "init_args": {"network": network}}
    report = ["report", str(make_run(tmp_path, 2, WorkingGrid(), None, model)), "--trust-import", "mine"]
    assert cli.run([*report, "attention", "--case", "toy/a"]) == 2
    assert "its network has no attention; train one" in capsys.readouterr().err
    assert cli.run([*report, "receptive-field"]) == 2
    assert "--layer bottom: no such layer; the network has body, head" in capsys.readouterr().err
    assert cli.run([*report, "receptive-field", "--layer", "body"]) == 0
    assert capsys.readouterr().out.endswith("receptive_field_body.png\n")
