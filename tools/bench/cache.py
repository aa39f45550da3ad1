"""Reading random slices from the cache against a raw memory map and h5py with gzip, in one process.

Usage: python tools/bench/cache.py [--shape 156 512 512]. Prints milliseconds a slice (image and label) and file sizes.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from organseg.data.cache import CachedCase, CaseArrays, CaseHeader, SliceReader, write_case
from organseg.data.phantom import make_case


def milliseconds(read: Callable[[int], object], slices: int, repeats: int = 300) -> float:
    """Mean time of reading a random slice, page cache warm."""
    order = np.random.default_rng(0).integers(slices, size=repeats)
    for z in range(slices):
        read(z)
    start = time.perf_counter()
    for z in order:
        read(int(z))
    return 1e3 * (time.perf_counter() - start) / repeats


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", type=int, nargs=3, default=(156, 512, 512))
    shape = tuple(parser.parse_args().shape)
    case = make_case(0, 0, shape)
    header = CaseHeader("bench/case", "case", "CT", ("liver",) * 7, (), case.spacing, ((0.0,) * 4,) * 4, shape,
                        case.spacing, "", "", {})  # fmt: skip
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "case.h5"
        write_case(path, header, CaseArrays(case.image, case.label, None))
        reader = SliceReader([CachedCase(path)])
        size = path.stat().st_size
        rows.append(("organseg cache", milliseconds(lambda z: reader.read(0, z), shape[0]), size))
        np.save(folder / "image.npy", case.image)
        raw = np.load(folder / "image.npy", mmap_mode="r")
        size = (folder / "image.npy").stat().st_size
        rows.append(("raw memory map (image alone)", milliseconds(lambda z: raw[z].copy(), shape[0]), size))
        with h5py.File(folder / "gzip.h5", "w") as file:
            image = file.create_dataset("image", data=case.image, chunks=(1, *shape[1:]), compression="gzip",
                                        compression_opts=1, shuffle=True)  # fmt: skip
            size = image.id.get_storage_size()
            rows.append(("HDF5, shuffle + gzip 1 (image alone)", milliseconds(lambda z: image[z], shape[0]), size))
    reference = rows[0][1]
    for text, time_ms, size in rows:
        print(f"{text:<40}{time_ms:>8.2f} ms a slice{time_ms / reference:>8.2f} x{size / 1e6:>9.1f} MB")


if __name__ == "__main__":
    main()
