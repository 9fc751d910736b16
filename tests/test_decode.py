"""Every kind of picture becomes RGB, every bad file a SampleError with the right reason; geometry."""

from __future__ import annotations

import io
import struct
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from unimrg.data import decode as module
from unimrg.data.decode import decode_image, decode_map, decode_masks
from unimrg.data.geometry import depth_target, pad_square, render_sample, segmentation_target
from unimrg.errors import ConfigError, SampleError
from unimrg.sample import Labels, Record, Sample, Task, Turn

# Pillow warns about damaged metadata, which is what these files have.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")

RNG = np.random.default_rng(0)
SMOOTH = np.array(Image.fromarray(RNG.integers(0, 256, (5, 6, 3), np.uint8)).resize((60, 40)))  # [40, 60, 3]


def encode(image: Image.Image | np.ndarray, form: str = "PNG", **options: Any) -> bytes:
    if isinstance(image, np.ndarray):
        image = Image.fromarray(image)
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def decode(
    raw: bytes, max_bytes: int = 1 << 20, max_pixels: int = 1 << 20, max_side: int = 2048
) -> np.ndarray:
    image = decode_image(raw, max_bytes, max_pixels, max_side)
    assert image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3
    return image


def png(width: int, height: int, data: bytes = b"", colour: int = 2) -> bytes:
    """A PNG of 8 bits that claims a size, whatever data it holds."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(data))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_forms(form: str) -> None:
    np.testing.assert_array_equal(decode(encode(SMOOTH, form)), SMOOTH)


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_forms(form: str) -> None:
    assert np.abs(decode(encode(SMOOTH, form, quality=95)).astype(int) - SMOOTH).mean() < 4


def test_every_mode_becomes_rgb() -> None:
    grey = SMOOTH[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode(encode(grey)), expected)
    np.testing.assert_array_equal(decode(encode(grey.astype(np.uint16) * 257)), expected)  # 16 bits
    np.testing.assert_array_equal(decode(encode(grey.astype(np.float32) / 255, "TIFF")), expected)
    np.testing.assert_array_equal(decode(encode(grey.astype(np.int32), "TIFF")), expected)
    bits = Image.fromarray(grey).convert("1")
    np.testing.assert_array_equal(decode(encode(bits))[..., 0], np.where(np.asarray(bits), 255, 0))
    palette = Image.fromarray(SMOOTH).quantize(64)
    np.testing.assert_array_equal(decode(encode(palette)), np.asarray(palette.convert("RGB")))
    cmyk = decode(encode(Image.fromarray(SMOOTH).convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - SMOOTH).mean() < 5


def test_transparency_lies_over_grey() -> None:
    alpha = np.zeros((40, 60, 4), np.uint8)
    alpha[..., :3] = SMOOTH
    alpha[:, 30:, 3] = 255
    image = decode(encode(alpha))
    assert (image[:, :30] == 127).all()
    np.testing.assert_array_equal(image[:, 30:], SMOOTH[:, 30:])
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert (decode(encode(palette, transparency=0)) == 127).all()
    layer = Image.new("LA", (4, 4), (200, 0))
    assert (decode(encode(layer)) == 127).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation)
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(SMOOTH)
    upright = np.asarray(stored if turn is None else stored.transpose(turn))
    np.testing.assert_array_equal(decode(encode(stored, exif=exif)), upright)
    small = decode(encode(stored, "JPEG", exif=exif, quality=95), max_side=30)
    assert small.shape == ((20, 30, 3) if orientation < 5 else (30, 20, 3))


def test_broken_exif_is_ignored() -> None:
    raw = encode(SMOOTH, "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xffgarbage")
    assert decode(raw).shape == SMOOTH.shape


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_first_frame_of_an_animation(form: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    raw = encode(
        frames[0],
        form,
        save_all=True,
        append_images=frames[1:],
        **({"lossless": True} if form == "WEBP" else {}),
    )
    assert decode(raw)[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_long_side_is_limited(form: str) -> None:
    ramp = np.repeat(np.linspace(0, 255, 900, dtype=np.uint8)[None, :, None], 600, axis=0).repeat(3, axis=2)
    small = decode(encode(ramp, form), max_side=100)
    assert small.shape == (67, 100, 3)
    np.testing.assert_allclose(small[30, :, 0], np.linspace(0, 255, 100), atol=4)
    assert decode(encode(ramp, form), max_side=900).shape == (600, 900, 3)  # never enlarged
    assert decode(encode(ramp[:1], form), max_side=50).shape == (1, 50, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 30_000), (30_000, 1), (30_000, 20), (2, 30_000)])
@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "BMP"])
def test_sides_of_one_and_of_thirty_thousand(size: tuple[int, int], form: str) -> None:
    image = decode(encode(Image.new("RGB", size, (10, 200, 90)), form), 4 << 20, max_side=300)
    assert image.shape[:2] == tuple(max(1, round(n * min(1, 300 / max(size)))) for n in reversed(size))
    assert np.abs(image.astype(int) - (10, 200, 90)).max() < 4
    for geometry in ("pad", "squash", "published"):
        sample = render_sample(Record("a", ((Turn("q", "a"),),), image), Labels(), 0, 32, geometry)
        assert sample.image is not None and sample.image.shape == (32, 32, 3)


def test_truncated_and_oversized_jpegs() -> None:
    whole = encode(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    for cut in range(0, len(whole) - 2, 37):
        with pytest.raises(SampleError) as caught:
            decode(whole[:cut])
        assert caught.value.reason in ("empty-file", "not-an-image", "corrupt-image")
    start = whole.index(b"\xff\xc0")  # the frame header: height and width stand 5 bytes behind it
    claims = whole[: start + 5] + struct.pack(">HH", 65_500, 65_500) + whole[start + 9 :]
    with pytest.raises(SampleError, match="too-large"):
        decode(claims)


def test_scans_without_end_are_refused() -> None:
    """A progressive JPEG may refine itself again and again: 26 bytes, and the whole picture is walked."""
    raw = encode(SMOOTH, "JPEG", progressive=True)
    last = raw[raw.rindex(b"\xff\xda") : -2]
    np.testing.assert_array_equal(decode(raw[:-2] + last * 50 + raw[-2:]).shape, SMOOTH.shape)
    for times in (100, 1000):
        with pytest.raises(SampleError, match="scans, at most 100"):
            decode(raw[:-2] + last * times + raw[-2:])


def test_what_is_converted_in_bands_has_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    alpha = RNG.integers(0, 256, (40, 60, 4), np.uint8)
    for raw in (
        encode(alpha),
        encode(alpha[..., 0].astype(np.int32) * 200, "TIFF"),
        encode(alpha[..., 0] / np.float32(256), "TIFF"),
    ):
        whole = decode(raw)
        with monkeypatch.context() as patch:
            patch.setattr(module, "BAND", 7 * 60 + 1)
            np.testing.assert_array_equal(decode(raw), whole)


def test_threads_take_turns_with_large_pictures() -> None:
    """Never more at once than fits, and the largest goes alone."""
    turns = module.Turns(10)
    inside: list[int] = []
    seen: list[int] = []

    def work(size: int) -> None:
        with turns(size):
            inside.append(size)
            seen.append(sum(inside))
            time.sleep(0.002)
            assert size < 10 or inside == [size]
            inside.remove(size)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, [3, 4, 99, 2, 5, 10, 1, 6] * 6))
    assert max(n for n in seen if n < 99) <= 10 and turns.held == 0 and len(seen) == 48
    with pytest.raises(SampleError):
        decode(PNG[:100])
    assert module._turns.held == 0


def test_shrinking_does_not_alias() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (300, 150))
    assert np.abs(decode(encode(stripes), max_side=100)[5:-5, 5:-5].astype(int) - 127).max() < 12


# Bad files

JPEG = encode(SMOOTH, "JPEG")
PNG = encode(SMOOTH)


def flipped(raw: bytes, place: int) -> bytes:
    return raw[:place] + bytes([raw[place] ^ 0xFF]) + raw[place + 1 :]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty-file"),
        (b"\0", "not-an-image"),
        (b"<html>404 Not Found</html>", "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not-an-image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not-an-image"),
        (JPEG[: len(JPEG) // 2], "corrupt-image"),
        (PNG[: len(PNG) // 2], "corrupt-image"),
        (encode(SMOOTH, "BMP")[:-500], "corrupt-image"),
        (flipped(PNG, len(PNG) // 2), "corrupt-image"),
        (png(4, 4, b"too little"), "corrupt-image"),
        (png(100_000, 100_000), "too-large"),  # 10^10 pixels in 67 bytes
        (png(1025, 1024), "too-large"),
        (png(2**31 - 1, 1), "too-large"),
        (bytes(1 << 20) + b"x", "too-large"),
    ],
)
def test_bad_files(raw: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode(raw)
    assert caught.value.reason == reason
    assert len(str(caught.value)) < 400


def test_bombs_cost_nothing() -> None:
    """The size is refused by the header; the thousandfold compressed data isn't touched."""
    raw = png(20_000, 20_000, bytes(1 << 20))
    tracemalloc.start()
    try:
        for call in (decode, decode_map, decode_masks):
            with pytest.raises(SampleError, match="too-large"):
                call(raw)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@given(
    st.binary(max_size=300),
    st.sampled_from([b"", JPEG[:200], PNG[:60], b"GIF89a", b"RIFF\x40\0\0\0WEBPVP8 ", b"BM"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_bytes_end_well(tail: bytes, head: bytes) -> None:
    for call in (decode, decode_map, decode_masks):
        try:
            call(head + tail)
        except SampleError as error:
            assert error.reason in SampleError.REASONS


@given(
    st.data(),
    st.sampled_from([JPEG, PNG, encode(SMOOTH, "WEBP"), encode(SMOOTH, "GIF"), encode(SMOOTH, "TIFF")]),
)
@settings(max_examples=150, deadline=None)
def test_any_damage_ends_well(data: st.DataObject, raw: bytes) -> None:
    for _ in range(data.draw(st.integers(1, 4))):
        raw = flipped(raw, data.draw(st.integers(0, len(raw) - 1)))
    try:
        decode(raw)
    except SampleError as error:
        assert error.reason in ("corrupt-image", "not-an-image", "too-large")


# Maps


def npy(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, array, allow_pickle=True)
    return out.getvalue()


def test_depth_maps() -> None:
    grey = SMOOTH[..., 0]
    wide = grey.astype(np.uint16) * 200
    for raw, expected in (
        (encode(grey), grey),
        (encode(wide), wide),
        (encode(SMOOTH), grey),
        (npy(wide), wide),
    ):
        depth = decode_map(raw)
        assert depth.dtype == np.uint16
        np.testing.assert_array_equal(depth, expected)
    floats = RNG.random((5, 7), np.float32)
    for array in (floats, floats[None], floats[..., None], floats.astype(np.float64)):
        depth = decode_map(npy(array))
        assert depth.dtype == np.float32
        np.testing.assert_array_equal(depth, floats)


def test_masks() -> None:
    ids = RNG.integers(0, 5, (6, 8))
    palette = Image.fromarray(ids.astype(np.uint8))
    palette.putpalette([9, 9, 9, 0, 0, 255, 255, 0, 0, 0, 255, 0, 1, 1, 1])
    coco = np.stack([ids % 256, ids * 3 % 256, ids * 0], axis=2).astype(np.uint8)
    for raw, expected in (
        (encode(ids.astype(np.uint8)), ids),
        (encode(ids.astype(np.uint16) * 1000), ids * 1000),
        (encode(palette), ids),
        (encode(np.repeat(ids[..., None], 3, axis=2).astype(np.uint8)), ids),
        (encode(coco), ids + 256 * (ids * 3)),
        (npy(ids), ids),
    ):
        masks = decode_masks(raw)
        assert masks.dtype == np.int32
        np.testing.assert_array_equal(masks, expected)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty-file"),
        (b"nothing", "not-an-image"),
        (b"\x93NUMPY", "corrupt-image"),
        (npy(np.zeros((4, 4)))[:-1], "corrupt-image"),
        (npy(np.zeros((4, 4))) + b"x", "corrupt-image"),
        (npy(np.array([{"a": 1}], object)), "corrupt-image"),
        (npy(np.array([["a"]])), "corrupt-image"),
        (npy(np.zeros((2, 3, 4))), "corrupt-image"),
        (npy(np.zeros(4)), "corrupt-image"),
        (npy(np.zeros((0, 4))), "corrupt-image"),
        (npy(np.full((2, 2), np.nan)), "corrupt-image"),
        (npy(np.zeros((4, 4))).replace(b"(4, 4)", b"(9**9,", 1), "corrupt-image"),
        (npy(np.zeros((10, 10))).replace(b"(10, 10), }      ", b"(99999, 99999), }", 1), "too-large"),
    ],
)
def test_bad_maps(raw: bytes, reason: str) -> None:
    with pytest.raises(SampleError) as caught:
        decode_map(raw)
    assert caught.value.reason == reason


@pytest.mark.parametrize("array", [np.full((2, 2), -1), np.full((2, 2), 2**40), np.full((2, 2), 0.5)])
def test_ids_that_are_none(array: np.ndarray) -> None:
    with pytest.raises(SampleError, match="instance ids"):
        decode_masks(npy(array))


# Geometry


@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_the_box_holds_only_picture(height: int, width: int, side: int) -> None:
    image = np.full((height, width, 3), 255, np.uint8)
    square, (left, top, right, bottom) = pad_square(image, side, resample=Image.Resampling.BOX)
    assert square.shape == (side, side, 3)
    assert 0 <= left < right <= side and 0 <= top < bottom <= side
    exact = min(height, width) * side >= 2 * max(height, width)  # thinner pictures fill no whole pixel
    if exact:
        assert square[top:bottom, left:right].min() >= 250
    lost = (right - left) * (bottom - top) / (side * side * min(height, width) / max(height, width))
    assert not exact or lost > 1 - 2 / ((min(height, width) * side) // max(height, width))


def test_thin_lines_survive_shrinking() -> None:
    lines = np.zeros((500, 400), np.uint8)
    lines[100, :], lines[:, 203] = 255, 255
    drawn = segmentation_target(lines, 64)
    assert (drawn[:, 7:57].max(axis=0) == 255).all()  # the horizontal line, unbroken
    assert ((drawn == 255).sum(axis=1)[1:63] >= 1).all()  # the vertical one
    assert set(np.unique(drawn[:, 7:57])) == {0, 255}
    assert ((drawn[:, 7:57] == 255).sum(axis=0) > 3).sum() == 1  # and one pixel wide
    assert (segmentation_target(lines, 64, "squash") > 0).mean() < (drawn == 255).mean()
    small = np.eye(8, dtype=np.uint8) * 255
    np.testing.assert_array_equal(segmentation_target(small, 32), np.kron(small, np.ones((4, 4), np.uint8)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_depth_target_uses_the_whole_range(dtype: type) -> None:
    ramp: np.ndarray = np.repeat(np.linspace(10, 200, 90)[None], 30, axis=0).astype(dtype)
    for geometry in ("pad", "squash"):
        drawn = depth_target(ramp, 45, geometry)
        inside = drawn[15:30] if geometry == "pad" else drawn
        assert drawn.shape == (45, 45) and drawn.dtype == np.uint8
        assert (inside.min(), inside.max()) == (0, 255)
        assert (np.diff(inside.astype(int), axis=1) >= 0).all()
    padded = depth_target(ramp, 45)
    assert (padded[:15] == 127).all() and (padded[30:] == 127).all()
    assert (depth_target(np.full((5, 5), 9, dtype), 8) == 0).all()


@pytest.mark.parametrize("geometry", ["pad", "squash"])
def test_render_sample(geometry: str) -> None:
    labels = Labels(depth=SMOOTH[..., 1], segmentation=(SMOOTH[..., 0] > 128).astype(np.uint8) * 255)
    record = Record("a", ((Turn("q", "a"),),), image=SMOOTH)
    sample = render_sample(record, labels, 17, 32, geometry)
    assert sample.valid == ((0, 6, 32, 26) if geometry == "pad" else (0, 0, 32, 32))
    assert set(sample.targets) == {Task.PIXEL, Task.DEPTH, Task.SEGMENTATION}
    assert sample.image is not None
    np.testing.assert_array_equal(sample.targets[Task.PIXEL], sample.image)
    for task in (Task.DEPTH, Task.SEGMENTATION):
        target = sample.targets[task]
        assert target.shape == (32, 32, 3) and target.dtype == np.uint8
        assert (target == target[..., :1]).all()
    again = Sample.from_row(sample.to_row())
    assert (again.id, again.position, again.valid) == ("a", 17, sample.valid)
    np.testing.assert_array_equal(again.targets[Task.DEPTH], sample.targets[Task.DEPTH])


def test_render_sample_with_less() -> None:
    talks = ((Turn("q", "a"),),)
    text = render_sample(Record("t", talks), Labels(), 0, 32)
    assert text.image is None and text.targets == {} and text.conversations == talks
    image = render_sample(Record("i", talks, image=SMOOTH), Labels(), 0, 32)
    assert set(image.targets) == {Task.PIXEL}
    half = Labels(depth=SMOOTH[::2, ::2, 0], segmentation=np.zeros((20, 30), np.uint8))
    assert len(render_sample(Record("h", talks, image=SMOOTH), half, 0, 32).targets) == 3
    with pytest.raises(ConfigError, match="choose one of pad, squash"):
        render_sample(Record("i", talks, image=SMOOTH), Labels(), 0, 32, "crop")
    with pytest.raises(SampleError, match="missing-label"):
        render_sample(Record("i", talks, image=SMOOTH), Labels(depth=SMOOTH), 0, 32)


def test_published_geometry_shows_two_pictures() -> None:
    """Questions see the padded picture; drawings are squashed, as is the picture they start from."""
    image = np.arange(40 * 20 * 3, dtype=np.uint8).reshape(40, 20, 3)
    record = Record("a", (), image)
    labels = Labels(depth=image[:, :, 0], segmentation=np.zeros((40, 20), np.uint8))
    published, squashed, padded = (
        render_sample(record, labels, 0, 16, geometry) for geometry in ("published", "squash", "pad")
    )
    assert np.array_equal(published.image, padded.image)
    assert published.valid == (0, 0, 16, 16)
    for task, target in squashed.targets.items():
        assert np.array_equal(published.targets[task], target)
