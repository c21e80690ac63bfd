"""TIFFs of many bands, DICOM, HEIC, deep PNGs and arrays, each against an oracle."""

import io
import struct
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from test_data import encode, picture
from test_hostile_images import little_memory

from attacks.formats import SETTINGS, _read, deep_png, hostile, valid, values
from attacks.image_files import array, saved
from attacks.mutations import chunk
from util.data import formats
from util.data.formats import ReadSettings, codestreams, decode, describe
from util.data.formats import dicom as dicoms
from util.data.formats import heic as heics
from util.data.formats import tiff as tiffs
from util.data.formats.codestreams import stream_header
from util.data.recognition import HEAD, starts_like_image


def bands_first(image):
    return np.moveaxis(image.reshape(*image.shape[:2], -1), 2, 0)


def same(found, expected):
    return found.shape == expected.shape and np.array_equal(found.numpy().astype("f8"), expected.astype("f8"))


# --- TIFF ---


def tiff_of(image, **options):
    tifffile = pytest.importorskip("tifffile")
    pytest.importorskip("imagecodecs")
    given = {"photometric": "minisblack", "metadata": None}
    if image.shape[-1] <= 5:
        given["planarconfig"] = "contig"  # bands, not pages
    file = io.BytesIO()
    tifffile.imwrite(file, image, **(given | options))
    return file.getvalue()


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
@pytest.mark.parametrize("bands", [1, 2, 3, 5])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("big", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile": (16, 32), "compression": "lzw"},
        {"compression": "zlib", "rowsperstrip": 5},
        {"tile": (16, 16), "planarconfig": "separate"},
    ],
    ids=["strip", "tiles", "strips", "planar"],
)
def test_tiffs_have_the_values_that_were_written(kind, bands, order, big, options):
    image = (values("<u2", bands) // (300 if kind[1] == "1" else 1)).astype(kind)
    if kind[0] in "if":
        image -= image.max() // 2
    given = image
    if "planarconfig" in options:
        given = np.moveaxis(image, 2, 0)
    if bands == 1:
        given = image[..., 0]
        options = {name: value for name, value in options.items() if name != "planarconfig"}
    data = tiff_of(given, byteorder=order, bigtiff=big, **options)
    found = decode(data, ReadSettings(bands))
    assert same(found, bands_first(image))
    depths = {"u1": torch.uint8, "i1": torch.int16, "u2": torch.uint16, "i2": torch.int16}
    assert found.dtype == depths.get(kind, torch.float32)
    assert describe(data, ReadSettings(bands)) == (found.dtype, bands, 1, False, 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "CMYK", "1", "I;16"])
@pytest.mark.parametrize("compression", ["raw", "tiff_lzw", "tiff_adobe_deflate"])
def test_what_pil_reads_keeps_its_bits(mode, compression, monkeypatch):
    monkeypatch.setattr(tiffs, "_by_tifffile", None)
    image = picture(1).convert("RGB")
    image = Image.fromarray(values("<u2", 1)[..., 0]) if mode == "I;16" else image.convert(mode)
    data = saved(image, "TIFF", compression=compression)
    for channels in (1, 3) if mode == "I;16" else (1, 3, 4):
        read = ReadSettings(channels)
        assert torch.equal(decode(data, read), formats.pil.decode_by_pil(data, read))


def test_further_bands_are_not_lost_and_colours_of_8_bits_are_pils():
    image = values("<u1", 4)
    data = tiff_of(image, photometric="rgb", extrasamples=[0])  # near infrared beside RGB
    assert same(decode(data, ReadSettings(4)), bands_first(image))
    assert same(decode(data, ReadSettings(1, (3,))), bands_first(image)[3:])
    assert same(decode(data, ReadSettings(3)), bands_first(image)[:3])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_as_pil_turns_them(orientation):
    image = values("<u2", 3)
    tag = [(274, "H", 1, orientation, True)]
    found = decode(tiff_of(image, photometric="rgb", extratags=tag))
    by_pil = decode(tiff_of(image.astype("u1"), photometric="rgb", extratags=tag))
    assert torch.equal(found.int() % 256, by_pil.int())


def test_pages_are_counted_and_the_first_is_read():
    stack = values("<u2", 3).transpose(2, 0, 1)
    data = tiff_of(stack)
    assert same(decode(data, ReadSettings(1)), stack[:1]) and describe(data).pages == 3
    assert describe(tiff_of(stack, planarconfig="separate", photometric="rgb")).pages == 1
    bands = np.stack([values("<u2", 5)] * 2)
    assert describe(tiff_of(bands)) == (torch.uint16, 5, 2, False, 1)


def test_a_circle_of_directories_is_counted_once():
    data = bytearray(tiff_of(values("<u2", 5)))
    first = struct.unpack_from("<I", data, 4)[0]
    count = struct.unpack_from("<H", data, first)[0]
    struct.pack_into("<I", data, first + 2 + 12 * count, first)
    assert describe(bytes(data)).pages == 1 and decode(bytes(data), ReadSettings(5)).shape == (5, 37, 53)


def with_field(data, tag, value):
    """Change the value of a field of four bytes in a little-endian TIFF."""
    data = bytearray(data)
    first = struct.unpack_from("<I", data, 4)[0]
    for at in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", data, first)[0], 12):
        if struct.unpack_from("<H", data, at)[0] == tag:
            struct.pack_into("<HII", data, at + 2, 4, 1, value)
    return bytes(data)


@pytest.mark.parametrize(
    "tag, value, message",
    [
        (256, 60_000, "it has 12 of 11250 strips or tiles"),
        (257, 3_000_000, "3000000 x 53 pixels are more than `max_pixels` 100000000"),
        (277, 60_000, "60000 bands do not give 5 channels"),
        (322, 200_000_000, "strips or tiles of"),
        (325, 4_000_000_000, "outside of the file|of 12 strips or tiles"),
        (324, 4_000_000_000, "outside of the file|of 12 strips or tiles"),
        (259, 50_001, "compression 50001 is not read: use one of none, LZW"),
        (258, 0, "0 x|has 37"),
    ],
)
def test_tiffs_that_claim_too_much_are_refused_before_memory_is_taken(tag, value, message):
    data = with_field(tiff_of(values("<u2", 5), tile=(16, 16), compression="zlib"), tag, value)
    with little_memory(), pytest.raises(ValueError, match=message):
        decode(data, ReadSettings(5))


def test_many_bands_of_the_budget_are_too_many():
    data = with_field(tiff_of(values("<u2", 5), compression="zlib"), 277, 65_000)
    with little_memory(), pytest.raises(ValueError, match="values are more than"):
        decode(data, ReadSettings(3, (0, 1, 2), max_pixels=100_000))


# --- absent packages ---


def absent(name):
    raise ImportError(name)


def test_one_line_names_the_package(monkeypatch):
    monkeypatch.setattr(tiffs, "import_module", absent)
    tiffs._imported.cache_clear()
    monkeypatch.setattr(dicoms, "import_module", absent)
    dicoms._pydicom.cache_clear()
    monkeypatch.setattr(heics, "import_module", absent)
    heics._library.cache_clear()
    files = {
        b"\0" * 128 + b"DICM": "a DICOM file needs .*: pip install pydicom$",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic": "a HEIC or HEIF file needs .*: pip install pi-heif$",
    }
    for data, message in files.items():
        with pytest.raises(ValueError, match=message):
            decode(data)
    with pytest.raises(
        ValueError, match=r"a TIFF of 5 bands of 16 bits \(uint16\) needs .*install tifffile$"
    ):
        decode(tiff_of(values("<u2", 5)), ReadSettings(5))


# --- DICOM ---


def dicom_of(image, **elements):
    pydicom = pytest.importorskip("pydicom")
    dataset = pydicom.Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    frames, height, width = (1, *image.shape)[-3:]
    kept = dict(Rows=height, Columns=width, SamplesPerPixel=1, PhotometricInterpretation="MONOCHROME2")
    kept |= dict(
        BitsAllocated=16, BitsStored=16, HighBit=15, PixelRepresentation=int(image.dtype.kind == "i")
    )
    if frames > 1:
        kept |= dict(NumberOfFrames=frames)
    for name, value in (kept | elements).items():
        setattr(dataset, name, value)
    dataset.PixelData = image.tobytes()
    dataset["PixelData"].VR = "OW"
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=False, overwrite=True)
    data = file.getvalue()
    return data if data[128:132] == b"DICM" else bytes(128) + b"DICM" + data


def stored(kind, bits):
    signed = kind[1] == "i"
    low = -(2 ** (bits - 1)) if signed else 0
    return np.random.default_rng(0).integers(low, low + 2**bits, (9, 11)).astype(kind)


@pytest.mark.parametrize(
    "kind, bits, slope, intercept, depth",
    [
        ("<u2", 12, None, None, torch.uint16),
        ("<u2", 12, "1", "-1024", torch.int16),
        ("<u2", 16, None, None, torch.uint16),
        ("<u2", 16, "1", "-1024", torch.float32),
        ("<i2", 16, None, None, torch.int16),
        ("<i2", 12, "2", "0", torch.int16),
        ("<i2", 12, None, "5000", torch.uint16),
        ("<u2", 12, "0.5", "0", torch.float32),
        ("<u2", 8, None, None, torch.uint8),
        ("<i2", 12, "-1", "0", torch.int16),
    ],
)
def test_dicom_has_the_values_of_its_modality(kind, bits, slope, intercept, depth):
    image = stored(kind, bits)
    elements = dict(BitsStored=bits, HighBit=bits - 1)
    elements |= {} if slope is None else dict(RescaleSlope=slope)
    elements |= {} if intercept is None else dict(RescaleIntercept=intercept)
    data = dicom_of(image, **elements)
    expected = image * float(slope or 1) + float(intercept or 0)
    found = decode(data, ReadSettings(1))
    assert found.dtype == depth == describe(data).depth and same(found, expected[None])
    # MONOCHROME1 is inverted over the stored range.
    low = -(2 ** (bits - 1)) if kind[1] == "i" else 0
    inverted = (2 * low + 2**bits - 1 - image.astype("f8")) * float(slope or 1) + float(intercept or 0)
    data = dicom_of(image, PhotometricInterpretation="MONOCHROME1", **elements)
    assert same(decode(data, ReadSettings(1)), inverted[None])


def test_overlays_in_unused_bits_are_masked_and_frames_counted():
    image = stored("<u2", 12)
    data = dicom_of(np.stack([image | 0xF000, image]), BitsStored=12, HighBit=11)
    assert same(decode(data, ReadSettings(1)), image[None]) and describe(data).pages == 2


def test_dicom_agrees_with_pydicom_on_its_files():
    pydicom = pytest.importorskip("pydicom")
    from pydicom.pixels import apply_modality_lut, pixel_array

    files = [file for file in valid() if file.suffix == ".dcm"]
    assert len(files) > 10
    for file in files:
        dataset = pydicom.dcmread(io.BytesIO(file.data))
        expected = pixel_array(dataset, index=0)
        if expected.ndim == 2:
            expected = apply_modality_lut(expected, dataset)
        facts = describe(file.data)
        found = decode(file.data, ReadSettings(facts.bands))
        assert same(found, bands_first(expected).astype("f4")) and found.dtype == facts.depth, file.what


def test_a_compressed_dicom_names_the_package():
    pydicom = pytest.importorskip("pydicom")
    data = dicom_of(stored("<u2", 12))
    plain, lossless = (b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.4.80")
    assert plain in data
    at = data.index(plain) - 2
    changed = data[:at] + struct.pack("<H", len(lossless)) + lossless + data[at + 2 + len(plain) :]
    if pydicom.pixels.get_decoder(lossless.decode()).is_available:
        pytest.skip("its decoder is installed")
    with pytest.raises(ValueError, match=r"JPEG-LS .* needs a package .*: pip install pyjpegls$"):
        decode(changed, ReadSettings(1))


def rle_of(height, width, *segments, starts=None):
    """A DICOM file of 8 bits whose frame has these segments of PackBits."""
    pydicom = pytest.importorskip("pydicom")
    if starts is None:
        starts = [64 + sum(map(len, segments[:n])) for n in range(len(segments))]
    frame = struct.pack("<I15I", len(starts), *starts, *[0] * (15 - len(starts))) + b"".join(segments)
    image = np.zeros((height, width), "u1")
    dataset = pydicom.dcmread(io.BytesIO(dicom_of(image, BitsAllocated=8, BitsStored=8, HighBit=7)))
    if len(starts) > 1:
        dataset.SamplesPerPixel, dataset.PhotometricInterpretation = len(starts), "RGB"
        dataset.PlanarConfiguration = 0
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.RLELossless
    dataset.PixelData = pydicom.encaps.encapsulate([frame + b"\0" * (len(frame) % 2)])
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    file = io.BytesIO()
    pydicom.dcmwrite(file, dataset, enforce_file_format=False, overwrite=True)
    return file.getvalue()


def literally(values):
    """PackBits without a run."""
    data = values.tobytes()
    parts = (data[at : at + 128] for at in range(0, len(data), 128))
    return b"".join(bytes([len(part) - 1]) + part for part in parts)


def test_rle_of_dicom_has_its_values():
    image = np.random.default_rng(0).integers(0, 256, (1100, 1100, 3), "u1")
    grey = image[..., 0]
    data = rle_of(*grey.shape, b"\x80" + literally(grey))  # walked: 80 stands for nothing
    assert same(decode(data, ReadSettings(1)), grey[None])
    runs = b"\x81\x07" * 8 + literally(grey.ravel()[1024:])  # 8 x 128 sevens
    expected = grey.copy()
    expected.ravel()[:1024] = 7
    assert same(decode(rle_of(*grey.shape, runs), ReadSettings(1)), expected[None])
    segments = [literally(band) for band in bands_first(image)]
    assert same(decode(rle_of(*grey.shape, *segments)), bands_first(image))


@pytest.mark.parametrize(
    "height, segments, starts, message",
    [
        (1100, [b"\x81\0" * 1_200_000], None, "a segment of its frame unpacks to more than 67108864 bytes"),
        (1100, [b"\0\0", b"\x81\0" * 1_200_000, b"\0\0"], None, "unpacks to more than 67108864 bytes"),
        (1100, [b"\x81\0" * 500_000], [64, 0, 64], "segments of its frame overlap"),
        (1, [b"\x80" * 10_000], None, "its frame of 10064 bytes is too long for 1100 bytes"),
    ],
)
def test_rle_of_dicom_does_not_unpack_to_more_than_pixels(height, segments, starts, message):
    data = rle_of(height, 1100, *segments, starts=starts)
    with little_memory(60), pytest.raises(ValueError, match=message):
        decode(data, ReadSettings(1))


# --- which files are images ---


@pytest.mark.parametrize("file", valid(), ids=lambda file: file.what)
def test_what_is_decoded_begins_like_an_image(file):
    assert starts_like_image(file.data[:HEAD]) == (file.suffix != ".npz")


@pytest.mark.parametrize("mode", ["1", "L", "I", "RGB", "F"])
def test_files_of_netpbm_begin_like_images(mode):
    data = encode(picture().convert(mode), "PPM")
    assert starts_like_image(data[:HEAD]) and data[:2] in (b"P4", b"P5", b"P6", b"Pf")
    assert decode(data).shape == (3, 40, 48)


@pytest.mark.parametrize("head", [b"P1\n2 2\n0 1 1 0", b"P2 #a\n2 2", b"P3\r\n# by hand\n", b"P6\n2\t#b\n2"])
def test_plain_netpbm_with_comments_begins_like_an_image(head):
    assert starts_like_image(head)


@pytest.mark.parametrize(
    "head",
    [
        *(b"P1", b"P5\n", b"P6 of the plan", b"P2 3 apples", b"P7\n2 2\n", b"P5x 2 2", b"Pf a", b"P0 1 2"),
        *(b"PK\3\4", b"", b"II", b"\xff\xd8", b"BM" + bytes(40), b"RIFF\0\0\0\0WAVE", b"GIF"),
        *(b"\0\0\0\x18ftyp" + major + b"\0\0\0\0mp41isom" for major in (b"isom", b"qt  ", b"crx ", b"av01")),
    ],
)
def test_other_files_do_not_begin_like_images(head):
    assert not starts_like_image(head)


@pytest.mark.parametrize(
    "brand", ["heic", "heix", "heim", "heis", "hevc", "hevx", "mif1", "msf1", "avif", "avis"]
)
def test_every_brand_that_is_decoded_begins_like_an_image(brand):
    """One table serves the reader and the listing."""
    head = b"\0\0\0\x18ftyp" + brand.encode() + b"\0\0\0\0miafMiHE"
    assert starts_like_image(head) and heics.is_heif(head) == (brand[:3] != "avi")
    # The brand may be one of the further ones.
    head = b"\0\0\0\x18ftypmiaf\0\0\0\0MiHE" + brand.encode()
    assert starts_like_image(head) and heics.is_heif(head) == (brand[:3] != "avi")


@pytest.mark.parametrize("before", [b"\xff\x01", b"\xff\xd0", b"\xff\xe0\0\1", b"\xff\x02\0\2", b"\xff\xd9"])
def test_jpegs_whose_segments_are_out_of_order_have_no_header(before):
    """Decoders read them differently; of padding they agree."""
    data = encode(picture(1, size=(48, 40)), "JPEG")
    padded = data[:2] + b"\xff\xff" + data[2:]
    assert stream_header(data) == stream_header(padded) == (40, 48, 3, 8)
    assert stream_header(data[:2] + before + data[2:]) is None
    lossless = b"\xff\xd8\xff\xf7" + struct.pack(">HBHHB", 11, 12, 30, 20, 1) + bytes(9)
    assert stream_header(lossless) == (30, 20, 1, 12)
    # C4 is a table, C8 and CC are no frames.
    for marker in (0xC4, 0xC8, 0xCC):
        segment = bytes([0xFF, marker, 0, 11]) + bytes(9)
        assert stream_header(lossless[:2] + segment + lossless[2:]) == (30, 20, 1, 12)


# --- PNG of 16 bits ---


@pytest.mark.parametrize("bands", [2, 3, 4])
def test_deep_pngs_keep_their_values(bands):
    image = values("<u2", bands)
    data = deep_png(image)
    found = decode(data, ReadSettings(bands))
    assert found.dtype == torch.uint16 and same(found, bands_first(image))
    assert describe(data) == (torch.uint16, bands, 1, bands != 3, 1)
    colours = bands_first(image)[: bands - (bands != 3)]
    if bands != 2:
        assert same(decode(data, ReadSettings(3)), colours)
    assert same(
        decode(data, ReadSettings(4))[-1:], bands_first(image)[-1:] * (bands != 3) + 65535 * (bands == 3)
    )


def test_every_filter_of_deep_pngs():
    imagecodecs = pytest.importorskip("imagecodecs")
    for bands in (2, 3, 4):
        image = values("<u2", bands)
        for kind in (0x08, 0x10, 0x20, 0x40, 0x80, 0xF8):
            data = imagecodecs.png_encode(image, level=9, filter=kind)
            assert same(decode(data, ReadSettings(bands)), bands_first(image))


@pytest.mark.parametrize("background, value", [("white", 65535), ("black", 0)])
def test_deep_transparency_is_laid_on_a_background(background, value):
    image = np.random.default_rng(0).integers(0, 65536, (20, 30, 4)).astype("<u2")
    image[:5, :, 3] = 0
    image[5:10, :, 3] = 65535
    colours, alpha = np.split(image.astype("i8"), [3], axis=2)
    expected = (colours * alpha + value * (65535 - alpha) + 32767) // 65535
    found = decode(deep_png(image), ReadSettings(3, transparency=background))
    assert same(found, bands_first(expected))
    assert same(decode(deep_png(image), ReadSettings(3)), bands_first(image)[:3])
    clear = chunk(b"tRNS", image[0, 0, :3].astype(">u2").tobytes())
    found = decode(deep_png(image[..., :3], clear), ReadSettings(3, transparency=background))
    assert (found[:, 0, 0] == value).all() and same(found[:, 1:], bands_first(image)[:3, 1:])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_deep_pngs_are_turned_as_those_of_8_bits(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = values("<u2", 3)
    deep = deep_png(image, chunk(b"eXIf", exif.tobytes()[6:]))
    plain = saved(Image.fromarray((image // 256).astype("u1")), "PNG", exif=exif)
    for read in (ReadSettings(), ReadSettings(exif="apply")):
        assert torch.equal(decode(deep, read).int() // 256, decode(plain, read).int())
    assert describe(deep).orientation == orientation == describe(plain).orientation


# --- HEIC and JPEG 2000 ---


def test_heic_is_read_with_its_depth_and_nothing_is_registered():
    pillow_heif = pytest.importorskip("pillow_heif")
    image = picture(1, size=(48, 40))
    file = io.BytesIO()
    pillow_heif.from_pillow(image).save(file, quality=95)
    found = decode(file.getvalue())
    difference = (found.int() - torch.from_numpy(bands_first(np.asarray(image)).astype("i4"))).abs()
    assert found.dtype == torch.uint8 and found.shape == (3, 40, 48) and difference.float().mean() < 20
    assert "HEIF" not in Image.OPEN
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (53, 37), values("<u2", 3).tobytes()).save(file)
    assert decode(file.getvalue()).dtype == torch.uint16 == describe(file.getvalue()).depth
    with pytest.raises(ValueError, match="37 x 53 pixels are more than `max_pixels` 1000"):
        decode(file.getvalue(), ReadSettings(max_pixels=1000))


@pytest.mark.skipif("JPEG2000" not in formats.PIL_FORMATS, reason="this Pillow has no JPEG 2000")
def test_jpeg_2000_keeps_16_bits_and_its_codestream_is_checked():
    image = values("<u2", 1)
    data = saved(Image.fromarray(image[..., 0]), "JPEG2000")
    assert same(decode(data, ReadSettings(1)), bands_first(image)) and describe(data).depth == torch.uint16
    at = data.index(b"\xff\x4f\xff\x51") + 8
    huge = data[:at] + struct.pack(">II", 60_000, 60_000) + data[at + 8 :]
    with little_memory(), pytest.raises(ValueError, match="60000 x 60000 pixels"):
        decode(huge, ReadSettings(1))


@pytest.mark.skipif("JPEG2000" not in formats.PIL_FORMATS, reason="this Pillow has no JPEG 2000")
@pytest.mark.parametrize("bands", [2, 3, 4])
def test_jpeg_2000_of_many_bits_in_colour_is_refused_instead_of_cut(bands):
    codec = pytest.importorskip("imagecodecs")
    image = values("<u2", bands)
    for bits in (12, 16):
        data = codec.jpeg2k_encode(image & (1 << bits) - 1, level=0, bitspersample=bits)
        for read in (decode, describe):
            with pytest.raises(ValueError, match=f"of {bands} components of {bits} bits"):
                read(data, ReadSettings(3))
    data = codec.jpeg2k_encode((image >> 8).astype("u1"), level=0)
    if bands != 2:
        assert same(decode(data, ReadSettings(bands)), bands_first((image >> 8).astype("u1")))


# --- arrays ---


@pytest.mark.parametrize("kind", ["u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8"])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("fortran", [False, True])
@pytest.mark.parametrize("first", [False, True])
def test_arrays_have_numpys_values(kind, order, fortran, first):
    image = np.random.default_rng(0).integers(0, 120, (7, 9, 5)).astype(order + kind)
    given = np.moveaxis(image, 2, 0) if first else image
    given = np.asfortranarray(given) if fortran else np.ascontiguousarray(given)
    packed = io.BytesIO()
    np.savez_compressed(packed, image=given, mask=given[0])
    single = io.BytesIO()
    np.savez(single, given)
    for data in (array(given), packed.getvalue(), single.getvalue()):
        found = decode(data, ReadSettings(5))
        assert same(found, bands_first(image)) and found.dtype == describe(data, ReadSettings(5)).depth
        assert same(decode(data, ReadSettings(2, (4, 0), 5)), bands_first(image)[[4, 0]])


@pytest.mark.parametrize(
    "members, message",
    [({"a": 0, "b": 0}, "holds 2 arrays: call the image's `image`"), ({}, "holds no array")],
)
def test_archives_without_the_array(members, message):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("image", b"a text")
        for name in members:
            archive.writestr(f"{name}.npy", array(values("<u1", 3)))
    with pytest.raises(ValueError, match=message):
        decode(file.getvalue())


def test_both_orders_that_fit_are_refused():
    with pytest.raises(ValueError, match="both orders fit its shape"):
        decode(array(np.zeros((3, 9, 3), "u1")))


def test_products_of_sides_do_not_overflow():
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (2, 1, %d), }\n" % 2**63
    data = b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(100)
    with little_memory(), pytest.raises(ValueError, match=f"needs {2**64} bytes, and 100 follow"):
        decode(data, ReadSettings(1, (2,)))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_counted(value):
    image = np.ones((4, 5, 3), "f4")
    image[1, 2] = value
    with pytest.raises(ValueError, match=r"3 of its 60 values are not finite"):
        decode(array(image))
    with pytest.raises(ValueError, match="1 of its 1 values are not finite"):
        decode(array(np.full((1, 1), 1e300)), ReadSettings(1))


# --- all formats ---


def made(suffix):
    """A file of a suffix; its package may be absent."""
    image = picture(1, size=(48, 40))
    for file in valid():
        if file.suffix == suffix.replace("dicom", "dcm").replace("heif", "heic").replace("hif", "heic"):
            return file.data
    kind = Image.registered_extensions().get(suffix)
    if suffix in (".npy", ".npz"):
        return array(values("<u1", 3))
    if kind is None:
        return pytest.importorskip({".dcm": "pydicom", ".dicom": "pydicom"}.get(suffix, "pillow_heif"))
    if suffix == ".pfm":
        image = image.convert("F")
    return encode(image.convert("P") if kind == "GIF" else image, kind)


@pytest.mark.parametrize("suffix", [suffix.decode() for suffix in formats.IMAGE_SUFFIXES])
def test_a_file_of_every_suffix_is_read(suffix):
    Image.init()
    data = made(suffix)
    facts = describe(data, ReadSettings(5) if suffix in (".npy", ".npz") else formats.DEFAULT)
    channels = facts.bands if facts.depth != torch.uint8 or suffix[:3] in (".np", ".ti") else 3
    assert decode(data, ReadSettings(channels)).dtype == facts.depth


@pytest.mark.parametrize("file", valid(), ids=lambda file: file.what)
def test_training_reads_the_same_as_decode(file):
    """Training reads files of many bands or bits into writable memory, and hands that over."""
    for read in (ReadSettings(1), ReadSettings(3), ReadSettings(5), ReadSettings(channels=(0,))):
        found = []
        for data in (file.data, memoryview(bytearray(file.data))):
            try:
                image = formats.decode(data, read)
                found.append((image.dtype, image.tolist()))
            except ValueError as error:
                found.append(str(error))
        assert found[0] == found[1]


@pytest.mark.parametrize("mode, clear", [("L", 7), ("RGB", (7, 7, 7)), ("I;16", 700)])
@pytest.mark.parametrize("background", ["white", "black"])
def test_the_clear_value_of_a_png_is_laid_on_a_background(mode, clear, background):
    dtype = np.uint16 if mode == "I;16" else np.uint8
    values = np.full((4, 4, 3) if mode == "RGB" else (4, 4), 99, dtype)
    values[1, 2] = np.max(clear)
    file = io.BytesIO()
    Image.fromarray(values).save(file, "PNG", transparency=clear)
    found = formats.decode(file.getvalue(), ReadSettings(1, transparency=background))[0].numpy()
    expected = np.full((4, 4), 99, dtype)
    expected[1, 2] = np.iinfo(dtype).max * (background == "white")
    assert (found == expected).all()


def test_many_pages_of_a_tiff_are_not_all_counted():
    pages = [Image.new("L", (4, 4), i % 256) for i in range(300)]
    file = io.BytesIO()
    pages[0].save(file, "TIFF", save_all=True, append_images=pages[1:])
    assert formats.describe(file.getvalue(), ReadSettings(1)).pages == 100


def test_a_codestream_behind_a_smaller_one_counts():
    imagecodecs = pytest.importorskip("imagecodecs")
    small = imagecodecs.jpeg2k_encode(np.zeros((8, 8), "u1"), codecformat="j2k")
    large = imagecodecs.jpeg2k_encode(np.zeros((90, 100), "u1"), codecformat="jp2")
    box = struct.pack(">I4s", 8 + 16 + len(small), b"uuid") + bytes(16) + small
    at = large.index(b"jp2h") - 4
    data = large[:at] + box + large[at:]
    assert codestreams.stream_header(data) == codestreams.Stream(90, 100, 1, 8)
    with pytest.raises(ValueError, match="90 x 100 pixels are more"):
        codestreams.check_stream(data, 8999)


@pytest.mark.parametrize("file", valid(), ids=lambda file: file.what)
def test_headers_tell_what_is_decoded(file):
    for read in SETTINGS:
        assert not _read(file.data, read)


@pytest.mark.parametrize("file", hostile(), ids=lambda file: file.what)
def test_hostile_files_take_little_memory(file):
    with little_memory(), pytest.raises(ValueError, match="not a readable image"):
        decode(file.data, SETTINGS[1])
