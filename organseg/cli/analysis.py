"""`organseg report RUN attention | receptive-field | prior`: what a trained network looks at, and what it was told."""

from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import lightning as L
import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import nn

from organseg.batch import WholeCase
from organseg.cli.modules import load_module
from organseg.cli.training import quieten
from organseg.data.cache import CachedCase
from organseg.data.patches import patch_start
from organseg.errors import StorageError, UsageError
from organseg.files import publish
from organseg.methods import PriorModule
from organseg.methods.base import SegmentationModule
from organseg.networks.receptive_field import effective_receptive_field, theoretical_receptive_field
from organseg.report import cache_folder, case_file, read_config
from organseg.report.attention import attention_maps, draw_attention, draw_receptive_field, padded_size
from organseg.report.figures import png
from organseg.report.priors import draw_placed, draw_priors
from organseg.report.views import Slice, busiest, window_of
from organseg.volumes import Normalisation


def attention(arguments: Namespace) -> Path:
    """Draw the attention of one voxel of a case; returns the picture's path.

    Raises:
        UsageError: If the network has no attention, or there is no such case or voxel.
    """
    run = Path(arguments.run)
    config = read_config(run)
    if not arguments.case:
        raise UsageError("attention: say whose, --case DATASET/ID, one of the cases in the run's cache")
    cached = CachedCase(case_file(run, config, arguments.case))
    module = _seeing_images(run)
    arrays, spacing = cached.arrays(), cached.header.spacing
    voxel = _voxel(arguments.voxel, arrays.label, len(cached.header.organs))
    normalised = module.preprocessing.normalisation_of(arrays.image)
    part, place = seen_around(arrays.image, voxel, module.preprocessing.window, normalised)
    image = torch.from_numpy(normalised(part))[None]
    image = image if module.dims == 2 else image[None]
    maps = attention_maps(module.network, image, place[-module.dims :])
    if not maps:
        raise UsageError(f"{run}: its network has no attention; train one, for example btcv_100_utransformer")
    z, y, x = (int(index) for index in voxel)
    view = Slice(f"{arguments.case}\nvoxel z {z}, y {y}, x {x}", "A", part[place[0]], (spacing[1], spacing[2]))
    window = window_of(arrays.image, cached.header.modality)
    figure = draw_attention(view, window, place[-module.dims :], padded_size(module.network, image.shape[2:]), maps)
    return _write(run, f"attention_{arguments.case.replace('/', '_')}_{z}_{y}_{x}.png", figure)


def seen_around(
    image: NDArray[Any], voxel: NDArray[np.int64], window: Sequence[int] | None, normalisation: Normalisation
) -> tuple[NDArray[Any], list[int]]:
    """What the network is shown of a case around a voxel: its slice, or a patch, with air where the case is shorter.

    Args:
        image: [Z, Y, X], not normalised.
        voxel: [3] index in it.
        window: [Z, Y, X] of the patch, or None for the slice.
        normalisation: Of the case; it says what air is.

    Returns:
        [D, H, W] likewise, and the voxel's index in it.
    """
    shape = np.array(image.shape)
    size = np.array(window or (1, *shape[1:]))
    start = patch_start(voxel, size, shape)
    low, high = np.maximum(start, 0), np.minimum(start + size, shape)
    inside = image[tuple(map(slice, low, high))]
    around = np.stack([low - start, start + size - high], axis=1)
    air = np.floor(normalisation.window[0])
    return np.pad(inside, around, constant_values=air), [int(index) for index in voxel - start]


def _voxel(given: Sequence[int] | None, label: NDArray[np.uint8], organs: int) -> NDArray[np.int64]:
    """The wanted voxel, or one in the middle of the largest organ of the slice that shows most organs."""
    if given is not None:
        if any(not 0 <= index < length for index, length in zip(given, label.shape, strict=True)):
            raise UsageError(f"--voxel {given}: outside of the cached image, whose size is {label.shape}")
        return np.array(given)
    z = busiest(label, organs)[0]
    counts = np.bincount(label[z].ravel(), minlength=256)[1 : organs + 1]
    pixels = np.argwhere(label[z] == counts.argmax() + 1) if counts.any() else np.argwhere(label[z] >= 0)
    nearest = np.abs(pixels - pixels.mean(axis=0)).sum(axis=1).argmin()
    return np.array([z, *pixels[nearest]])


def receptive_field(arguments: Namespace) -> Path:
    """Draw what the middle of a layer sees; returns the picture's path.

    Raises:
        UsageError: If the network has no such layer, or what it gives is no map.
    """
    run, layer = Path(arguments.run), arguments.layer
    config = read_config(run)
    module = _seeing_images(run)
    size = _trained_size(run, config, module)
    name = _named(module.network, layer)
    try:
        effective = effective_receptive_field(module.network, module.network.get_submodule(name), size)
    except ValueError as error:
        raise UsageError(f"--layer {layer}: {error}; {_layers(module.network)}") from error
    theoretical = theoretical_receptive_field(module.network, name, size)
    shape = " x ".join(map(str, size))
    seeing, of = ("the bottleneck", "") if layer == "bottom" else (layer, f"_{layer}")
    title = f"{run.resolve().name}: the middle of {seeing}, 20 random inputs of {shape}"
    return _write(run, f"receptive_field{of}.png", draw_receptive_field(effective, theoretical, title))


def _trained_size(run: Path, config: Mapping[str, Any], module: SegmentationModule) -> Sequence[int]:
    """Of what the network was trained on: its patches, or slices; of the first case where each has its own size."""
    preprocessing = module.preprocessing
    if preprocessing.window:
        return preprocessing.window
    if preprocessing.grid.size:
        return (preprocessing.grid.size, preprocessing.grid.size)
    cache = cache_folder(run, config)
    names = config["data"]["init_args"].get("datasets") or ["*"]
    cases = [path for name in names for path in cache.glob(f"{name}/*.h5")]
    if not cases:
        raise UsageError(
            f"{cache}: found no case of the run's data sets, whose slices say how large its inputs were; put the cache "
            f"back, or correct data.init_args.cache of {run / 'config.yaml'}"
        )
    return CachedCase(min(cases)).shape[1:]


def _seeing_images(run: Path) -> SegmentationModule:
    """A run's method whose network sees images and nothing else.

    Raises:
        UsageError: If it sees further maps.
    """
    module = load_module(run / "checkpoints" / "last.ckpt")
    if isinstance(module, PriorModule) and module.use - {"activation"}:
        raise UsageError(f"{run}: its network also sees {', '.join(sorted(module.use - {'activation'}))}: no picture")
    return module


def prior(arguments: Namespace) -> Path:
    """Draw a run's priors, or with a case where they are placed in it; returns the picture's path.

    Raises:
        UsageError: If the run has no priors, or there is no such case.
    """
    run = Path(arguments.run)
    config = read_config(run)
    module = load_module(run / "checkpoints" / "last.ckpt")
    if not isinstance(module, PriorModule) or module.known is None:
        raise UsageError(f"{run}: its method has no prior; train one, for example btcv_30_stipple0")
    of_all = module.seen_by(arguments.case or "")
    channels = [k for k, found in enumerate(of_all) if found is not None]
    priors = [found for found in of_all if found is not None]
    if not priors:
        raise UsageError(f"{run}: it was trained without a prior of any organ")
    if not arguments.case:
        return _write(run, "prior.png", draw_priors(priors))
    quieten()
    module.trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    cached = CachedCase(case_file(run, config, arguments.case))
    arrays, header = cached.arrays(), cached.header
    normalise = module.preprocessing.normalisation_of(arrays.image)
    case = WholeCase(
        key=arguments.case,
        number=0,
        image=arrays.image,
        normalise=normalise,
        shape=arrays.label.shape,
        spacing=header.spacing,
        affine=np.asarray(header.affine),
        truth=None,
        annotated=np.zeros(len(module.organs), dtype=bool),
        window=module.preprocessing.window,
        floor=normalise.floor,
    )
    centres = module.centres_of(case)[channels]
    lookup = np.zeros(256, dtype=np.uint8)
    for value, organ in enumerate(header.organs, start=1):
        if organ in header.annotated and organ in [found.organ for found in priors]:
            lookup[value] = [found.organ for found in priors].index(organ) + 1
    window = window_of(arrays.image, header.modality)
    found = "as the coarse model finds it" + module.placed_by_others * ", or the other organs say"
    source = "as it was trained with" if arguments.case in module.centres else found
    outline = "the outline is what the data set annotates, also where that was hidden from the run"
    title = f"{run.resolve().name}, {arguments.case}, {source}; {outline}"
    label = lookup[arrays.label]
    figure = draw_placed(priors, module.floor, centres, arrays.image, header.spacing, window, label, title)
    return _write(run, f"prior_{arguments.case.replace('/', '_')}.png", figure)


def _named(network: nn.Module, layer: str) -> str:
    """Whole name of a layer, also of one that is inside of what attention was put into."""
    names: list[str] = [name for name, _ in network.named_modules() if f".{name}".endswith(f".{layer}")]
    if not layer or not names:
        raise UsageError(f"--layer {layer}: no such layer; {_layers(network)}")
    return min(names, key=lambda name: name.count("."))


def _layers(network: nn.Module) -> str:
    """The layers of a network by their names, without what its blocks are made of."""

    def inside_a_block(name: str) -> bool:
        parent = network.get_submodule(name.rpartition(".")[0])
        return not (isinstance(parent, nn.ModuleList) or hasattr(parent, "features"))

    named = [name for name, module in network.named_modules() if name and not isinstance(module, nn.ModuleList)]
    return f"the network has {', '.join(name for name in named if not inside_a_block(name))}"


def _write(run: Path, name: str, figure: Figure) -> Path:
    folder = run / "report"
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise StorageError(f"{folder}: cannot be written: {error.strerror or error}") from error

    def write(file: BinaryIO) -> None:
        file.write(png(figure))

    publish(folder / name, write)
    return folder / name
