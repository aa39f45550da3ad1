"""One row of FAULTS.md section 3 each: the header's own fields."""

import numpy as np
import pytest

from organseg.errors import InputError
from organseg.volumes import read_image, read_label, to_canonical

SIX = [1, 1, 1]

REFUSED = {
    "no axes": (dict(dim=[0, 7, 6, 5, *SIX, 1]), "dim", "0 axes"),
    "two axes": (dict(dim=[2, 7, 6, 5, *SIX, 1]), "dim", "2 axes of 7 x 6"),
    "two frames": (dict(dim=[4, 7, 6, 5, 2, *SIX]), "dim", "4 axes of 7 x 6 x 5 x 2"),
    "no frame": (dict(dim=[4, 7, 6, 5, 0, *SIX]), "dim", "7 x 6 x 5 x 0"),
    "five axes": (dict(dim=[5, 7, 6, 5, 1, 1, 1, 1]), "dim", "5 axes"),
    "eight axes": (dict(dim=[8, 7, 6, 5, *SIX, 1]), "dim", "8 axes"),
    "negative axes": (dict(dim=[-3, 7, 6, 5, *SIX, 1]), "dim", "-3 axes"),
    "empty axis": (dict(dim=[3, 7, 0, 5, *SIX, 1]), "dim", "7 x 0 x 5"),
    "negative axis": (dict(dim=[3, 7, -6, 5, *SIX, 1]), "dim", "7 x -6 x 5"),
    "axis above 4096": (dict(dim=[3, 4097, 6, 5, *SIX, 1]), "dim", "4097 x 6 x 5"),
    "more than 2^31 voxels": (dict(dim=[3, 4096, 4096, 129, *SIX, 1]), "dim", "4096 x 4096 x 129"),
    "product overflows 32 bits to a small one": (dict(dim=[3, 4096, 4096, 256, *SIX, 1]), "dim", "4096 x 4096 x 256"),
    "more voxels than bytes": (dict(dim=[3, 70, 60, 500, *SIX, 1]), "length", "70 x 60 x 500"),
    "one slice fewer than stored": (dict(dim=[3, 7, 6, 4, *SIX, 1]), "length", "more bytes"),
    "one slice more than stored": (dict(dim=[3, 7, 6, 6, *SIX, 1]), "length", "420 of 504 bytes"),
    "RGB": (dict(datatype=128, bitpix=24), "datatype", "128 (RGB)"),
    "RGBA": (dict(datatype=2304, bitpix=32), "datatype", "RGBA"),
    "complex": (dict(datatype=32, bitpix=64), "datatype", "complex64"),
    "double complex": (dict(datatype=1792, bitpix=128), "datatype", "complex128"),
    "float128": (dict(datatype=1536, bitpix=128), "datatype", "float128"),
    "bits": (dict(datatype=1, bitpix=1), "datatype", "binary"),
    "no type": (dict(datatype=0), "datatype", "0 (unknown)"),
    "undefined type": (dict(datatype=77), "datatype", "77 (undefined)"),
    "offset 0": (dict(vox_offset=0), "vox_offset", "0"),
    "offset inside the header": (dict(vox_offset=348), "vox_offset", "348"),
    "negative offset": (dict(vox_offset=-352), "vox_offset", "-352"),
    "broken offset": (dict(vox_offset=352.5), "vox_offset", "352.5"),
    "NaN offset": (dict(vox_offset=np.nan), "vox_offset", "nan"),
    "endless offset": (dict(vox_offset=np.inf), "vox_offset", "inf"),
    "huge offset": (dict(vox_offset=1e9), "vox_offset", "1e+09"),
    "infinite slope": (dict(scl_slope=np.inf), "scl_slope", "inf"),
    "infinite negative slope": (dict(scl_slope=-np.inf), "scl_slope", "-inf"),
    "NaN intercept": (dict(scl_inter=np.nan), "scl_inter", "nan"),
    "infinite intercept": (dict(scl_inter=np.inf), "scl_inter", "inf"),
    "header of a pair": (dict(magic=b"ni1\0"), "magic", "pair"),
    "Analyze": (dict(magic=b"\0\0\0\0"), "magic", "Analyze"),
    "other magic": (dict(magic=b"n+3\0"), "magic", "n+3"),
    "no NIfTI": (dict(sizeof_hdr=349), "header", "no NIfTI header"),
}

WARNED = {
    "4D with one frame": (dict(dim=[4, 7, 6, 5, 1, *SIX]), "dim"),
    "NaN slope": (dict(scl_slope=np.nan, scl_inter=np.nan), "scl_slope"),
    "wrong bitpix": (dict(bitpix=8), "bitpix"),
}


@pytest.mark.parametrize("name", ["case.nii", "case.nii.gz"])
@pytest.mark.parametrize(("fields", "field", "found"), REFUSED.values(), ids=REFUSED)
def test_refused(make_file, hounsfield, fields, field, found, name):
    if name == "case.nii" and field == "length":
        found = ""  # the file's size already tells
    with pytest.raises(InputError) as caught:
        read_image(make_file(hounsfield, name, **fields), case="c1")
    fault = next(fault for fault in caught.value.faults if fault.field == field)
    assert fault.refused
    assert found in fault.found
    assert fault.expected
    assert fault.remedy
    with pytest.raises(InputError):
        read_label(make_file(hounsfield.astype(np.uint8), name, **fields), case="c1")


@pytest.mark.parametrize(("fields", "field"), WARNED.values(), ids=WARNED)
def test_warned(make_file, hounsfield, las, fields, field):
    volume, warnings = read_image(make_file(hounsfield, **fields), case="c1")
    assert [(fault.field, fault.refused) for fault in warnings] == [(field, False)]
    assert (volume.array == to_canonical(hounsfield, las)).all()


@pytest.mark.parametrize(
    "fields",
    [dict(scl_slope=0), dict(scl_slope=0, scl_inter=np.nan), dict(scl_slope=0, scl_inter=-1024), dict(xyzt_units=0)],
)
def test_accepted_as_the_standard_says(make_file, hounsfield, las, fields):
    volume, warnings = read_image(make_file(hounsfield, **fields), case="c1")
    assert warnings == []
    assert (volume.array == to_canonical(hounsfield, las)).all()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("dtype", ["i2", "f4", "i4", "f8", "i8"])
def test_both_versions_and_byte_orders(make_file, hounsfield, las, version, endian, dtype):
    path = make_file(hounsfield.astype(dtype), version=version, endian=endian)
    volume, warnings = read_image(path, case="c1")
    assert warnings == []
    assert volume.array.dtype == np.dtype("int16")
    assert volume.array.dtype.isnative
    assert volume.array.flags.c_contiguous
    assert (volume.array == to_canonical(hounsfield, las)).all()
    assert np.allclose(volume.affine, las, atol=1e-5)


@pytest.mark.parametrize(("ends", "accepted"), [((13, 10, 26, 10), 1), ((0, 0, 0, 0), 1), ((10, 26, 10, 0), 0)])
def test_a_nifti2_transferred_as_text_is_refused(make_file, hounsfield, ends, accepted):
    path = make_file(hounsfield, version=2, eol_check=ends)
    if accepted:
        assert read_image(path, case="c1")[1] == []
    else:
        with pytest.raises(InputError, match="magic"):
            read_image(path, case="c1")


def test_nifti2_header_is_judged_too(make_file, hounsfield):
    for fields, field in ((dict(vox_offset=352), "vox_offset"), (dict(dim=[3, 2**40, 6, 5, *SIX, 1]), "dim")):
        with pytest.raises(InputError) as caught:
            read_image(make_file(hounsfield, version=2, **fields), case="c1")
        assert field in {fault.field for fault in caught.value.faults}


@pytest.mark.parametrize("version", [1, 2])
def test_header_extensions_are_skipped(make_file, hounsfield, las, version):
    extension = b"\1\0\0\0" + (32).to_bytes(4, "little") + (6).to_bytes(4, "little") + b"Doe^John".ljust(24)
    volume, warnings = read_image(make_file(hounsfield, gap=extension, version=version), case="c1")
    assert warnings == []
    assert (volume.array == to_canonical(hounsfield, las)).all()


def test_all_faults_of_a_header_come_at_once(make_file, hounsfield):
    path = make_file(
        hounsfield, dim=[2, 7, 6, 5, *SIX, 1], datatype=128, vox_offset=7, scl_slope=np.inf, sform_code=0, qform_code=0
    )
    with pytest.raises(InputError) as caught:
        read_image(path, case="c1")
    fields = {fault.field for fault in caught.value.faults if fault.refused}
    assert fields == {"dim", "datatype", "vox_offset", "scl_slope", "affine"}


def test_a_refused_affine_does_not_hide_faults_of_the_voxels(make_file, hounsfield):
    with pytest.raises(InputError) as caught:
        read_image(make_file(np.full_like(hounsfield, 7), sform_code=0, qform_code=0), case="c1")
    assert {fault.field for fault in caught.value.faults} == {"affine", "voxels"}
