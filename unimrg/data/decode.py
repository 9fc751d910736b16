"""Bytes of a file -> pixels, or a SampleError that says why not. Nothing here trusts its input.

Sizes are read from the header and checked before anything is decoded, so that a few kilobytes can't ask for
gigabytes. Decoding takes 5 to 18 bytes a pixel (WebP most), and threads take turns with large pictures.
Formats are a fixed list: Pillow's rarer readers are slow, unmaintained or start other programs.
"""

from __future__ import annotations

import contextlib
import io
import math
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unimrg.errors import SampleError

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM", "JPEG2000")
START_OF_SCAN = b"\xff\xda"  # of a JPEG (ITU-T T.81, table B.1)
MOST_SCANS = 100  # encoders write up to 20; each takes a walk over the whole picture, and 26 bytes
MAX_MAP_PIXELS = 64 << 20
AT_ONCE = 64 << 20  # pixels that all threads of a process decode at a time; a larger picture goes alone
BAND = 1 << 20  # pixels that are converted at a time
BACKGROUND = 127  # grey, as the padding: what is transparent is as empty as what is outside


class Turns:
    """Lets threads in as long as what they hold adds up to at most `most`."""

    def __init__(self, most: int) -> None:
        self.most, self.held = most, 0
        self.changed = threading.Condition()

    @contextlib.contextmanager
    def __call__(self, size: int) -> Iterator[None]:
        size = min(size, self.most)
        with self.changed:
            self.changed.wait_for(lambda: self.held + size <= self.most)
            self.held += size
        try:
            yield
        finally:
            with self.changed:
                self.held -= size
                self.changed.notify_all()


_turns = Turns(AT_ONCE)


def decode_image(raw: bytes, max_bytes: int, max_pixels: int, max_side: int) -> np.ndarray:
    """An encoded picture as uint8 [H, W, 3] RGB, its longer side at most `max_side`.

    EXIF orientation is applied; of an animation the first frame counts; transparency is laid over grey 127.
    Raises SampleError: empty-file, too-large (bytes, or pixels by the header), not-an-image, corrupt-image.

    Shrinking uses Lanczos after an integer box reduction (`reducing_gap`): plain box averaging aliases for
    factors between 1 and 2 and blurs the edges that the segmentation teacher looks for; Lanczos keeps them,
    and the reduction makes it as cheap as averaging. JPEG is shrunk inside its decoder first, which saves
    most of the time for photographs of many megapixels.
    """
    if len(raw) > max_bytes:
        raise SampleError("too-large", f"{len(raw)} bytes, at most {max_bytes}")
    image = _open(raw, max_pixels)
    with _turns(image.width * image.height):
        return _decode(image, max_side)


def decode_verbatim(raw: bytes, max_bytes: int, max_pixels: int) -> np.ndarray:
    """As `decode_image`, but as plain readers do: in full size, not turned, transparency just dropped."""
    if len(raw) > max_bytes:
        raise SampleError("too-large", f"{len(raw)} bytes, at most {max_bytes}")
    image = _open(raw, max_pixels)
    with _turns(image.width * image.height):
        try:
            return np.array(image.convert("RGB"))
        except Exception as error:
            raise _undecodable(error) from error


def _decode(image: Image.Image, max_side: int) -> np.ndarray:
    width, height = image.size
    ratio = max_side / max(width, height)
    if ratio < 1 and image.format == "JPEG":
        image.draft(None, (math.ceil(2 * ratio * width), math.ceil(2 * ratio * height)))
    try:
        image.load()
        image = _colours(_upright(image))
    except Exception as error:  # Pillow's readers raise anything: OSError, SyntaxError, struct.error, …
        raise _undecodable(error) from error
    if ratio < 1:
        # From the size in the file, so that the decoder's rounding doesn't show.
        size = [max(1, round(ratio * length)) for length in (width, height)]
        if (image.width > image.height) != (width > height) and image.width != image.height:
            size.reverse()  # turned by EXIF
        image = image.resize((size[0], size[1]), Image.Resampling.LANCZOS, reducing_gap=3.0)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def decode_map(raw: bytes, max_pixels: int = MAX_MAP_PIXELS) -> np.ndarray:
    """A depth map, [H, W] uint16 or float32: bright (large) = near.

    Reads grey pictures of 8 or 16 bits (values kept: only their order and ratios matter later), of colour
    pictures the first channel, float TIFF, and `.npy` of numbers [H, W], [H, W, 1] or [1, H, W].
    Raises SampleError: empty-file, too-large, not-an-image, corrupt-image (also for NaN and infinity).
    """
    with _numbers(raw, max_pixels) as array:
        if array.ndim == 3:
            array = array[..., 0]
        if array.dtype in (np.uint8, np.uint16, np.bool_):
            return array.astype(np.uint16)
        array = array.astype(np.float32)
    if not np.isfinite(array).all():
        raise SampleError("corrupt-image", "the map holds NaN or infinity")
    return array


def decode_label(raw: bytes, max_pixels: int = MAX_MAP_PIXELS) -> np.ndarray:
    """What a teacher said, [H, W]: uint8 as it is, one bit as 0 and 255, anything wider as `decode_map`.

    Raises SampleError as `decode_map` does.
    """
    with _numbers(raw, max_pixels) as array:
        if array.dtype in (np.uint8, np.bool_):
            grey = array[..., 0] if array.ndim == 3 else array
            return grey.astype(np.uint8) * (255 if grey.dtype == np.bool_ else 1)
    return decode_map(raw, max_pixels)


def decode_masks(raw: bytes, max_pixels: int = MAX_MAP_PIXELS) -> np.ndarray:
    """Instance ids, int32 [H, W], 0 = background.

    Grey pictures of 8 or 16 bits as they are; of palette pictures the index, not the colour; colour pictures
    with equal channels as grey, others as R + 256 G + 65536 B (COCO's panoptic form); `.npy` of integers.
    Raises SampleError: empty-file, too-large, not-an-image, corrupt-image (also for fractions).
    """
    with _numbers(raw, max_pixels) as array:
        if array.dtype.kind == "f":
            raise SampleError("corrupt-image", "instance ids must be integers")
        if array.ndim == 3 and array.shape[2] >= 3:
            red, green, blue = (array[..., i] for i in range(3))
            if np.array_equal(red, green) and np.array_equal(red, blue):
                return red.astype(np.int32)
            return red + 256 * green.astype(np.int32) + 65536 * blue.astype(np.int32)
        if array.ndim == 3:
            array = array[..., 0]
        if array.size and (int(array.min()) < 0 or int(array.max()) > np.iinfo(np.int32).max):
            raise SampleError("corrupt-image", "instance ids must lie in 0..2147483647")
        return array.astype(np.int32)


def _open(raw: bytes, max_pixels: int) -> Image.Image:
    """A picture whose header is read and whose size is bearable; not decoded yet."""
    if not raw:
        raise SampleError("empty-file", "0 bytes")
    try:
        image = Image.open(io.BytesIO(raw), formats=FORMATS)
    except UnidentifiedImageError as error:
        raise SampleError("not-an-image", f"{len(raw)} bytes starting with {raw[:8]!r}") from error
    except Exception as error:
        raise _undecodable(error) from error
    width, height = image.size
    if width * height > max_pixels:
        raise SampleError("too-large", f"{width} x {height} pixels, at most {max_pixels}")
    if width < 1 or height < 1:
        raise SampleError("corrupt-image", f"{width} x {height} pixels")
    if image.format in ("JPEG", "MPO") and (scans := raw.count(START_OF_SCAN)) > MOST_SCANS:
        raise SampleError("corrupt-image", f"a JPEG of {scans} scans, at most {MOST_SCANS}")
    return image


def _undecodable(error: Exception) -> SampleError:
    if isinstance(error, SampleError):
        return error
    if isinstance(error, MemoryError | Image.DecompressionBombError | Image.DecompressionBombWarning):
        return SampleError("too-large", str(error)[:200])
    return SampleError("corrupt-image", f"{type(error).__name__}: {error}"[:200])


def _upright(image: Image.Image) -> Image.Image:
    with contextlib.suppress(Exception):  # broken EXIF is no reason to lose a good picture
        ImageOps.exif_transpose(image, in_place=True)
    return image


def _colours(image: Image.Image) -> Image.Image:
    """Any mode of Pillow as RGB, or as L where it is grey."""
    if image.mode.startswith("I") or image.mode == "F":
        return Image.fromarray(_eight_bits(np.asarray(image)))
    if image.has_transparency_data:
        return _over_grey(image)
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _over_grey(image: Image.Image) -> Image.Image:
    """A picture with transparent parts over BACKGROUND, RGB; band by band, which saves 8 bytes a pixel."""
    opaque = Image.new("RGB", image.size)
    for top, bottom in _bands(image.height, image.width):
        layer = image.crop((0, top, image.width, bottom)).convert("RGBA")
        ground = Image.new("RGBA", layer.size, (BACKGROUND, BACKGROUND, BACKGROUND, 255))
        opaque.paste(Image.alpha_composite(ground, layer).convert("RGB"), (0, top))
    return opaque


def _bands(height: int, width: int) -> list[tuple[int, int]]:
    """(first row, row behind the last) of pieces of BAND pixels."""
    rows = max(1, BAND // width)
    return [(top, min(top + rows, height)) for top in range(0, height, rows)]


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """Grey of 16 bits, 32 bits or floats as uint8 [H, W]; wide types by the range their maximum suggests."""
    if values.dtype.kind == "u" and values.dtype.itemsize == 2:
        return np.rint(np.arange(65536) * (255.0 / 65535)).astype(np.uint8)[values]
    bands = [values[top:bottom] for top, bottom in _bands(*values.shape)]
    largest = max(float(_finite(band).max(initial=0.0)) for band in bands)
    if values.dtype.kind == "f" and largest <= 1:
        full = 1.0
    else:
        full = 255.0 if largest <= 255 else 65535.0
    grey = np.empty(values.shape, np.uint8)
    for (top, bottom), band in zip(_bands(*values.shape), bands, strict=True):
        grey[top:bottom] = np.clip(np.rint(_finite(band) * (255.0 / full)), 0, 255)
    return grey


def _finite(values: np.ndarray) -> np.ndarray:
    """As float64, 0 for NaN and infinity."""
    return np.nan_to_num(values.astype(np.float64), posinf=0.0, neginf=0.0)


@contextlib.contextmanager
def _numbers(raw: bytes, max_pixels: int) -> Iterator[np.ndarray]:
    """The stored numbers of a map, [H, W] or [H, W, C], without turning or colour conversion.

    Large maps take turns, as long as they are in use.
    """
    if raw.startswith(b"\x93NUMPY"):
        with _turns(len(raw) // 4):
            yield _npy(raw, max_pixels)
        return
    image = _open(raw, max_pixels)
    with _turns(image.width * image.height):
        try:
            image.load()
            array = np.asarray(image)
        except Exception as error:
            raise _undecodable(error) from error
        yield array


def _npy(raw: bytes, max_pixels: int) -> np.ndarray:
    """A `.npy` array of numbers, [H, W]; the header's claims are checked against the bytes that are there."""
    file = io.BytesIO(raw)
    try:
        version = np.lib.format.read_magic(file)
        read: Any = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(file)
    except Exception as error:
        raise SampleError("corrupt-image", f"npy header: {error}"[:200]) from error
    if dtype.hasobject or dtype.kind not in "fiub":
        raise SampleError("corrupt-image", f"npy of {dtype}; numbers are needed")
    count = math.prod(shape)
    if count > max_pixels:
        raise SampleError("too-large", f"npy {shape}, at most {max_pixels} numbers")
    if len(shape) > 3 or count < 1 or count * dtype.itemsize != len(raw) - file.tell():
        raise SampleError("corrupt-image", f"npy {shape} of {dtype} in {len(raw)} bytes")
    file.seek(0)
    array = np.asarray(np.load(file, allow_pickle=False))
    if array.ndim == 3 and 1 in (array.shape[0], array.shape[2]):
        array = array[0] if array.shape[0] == 1 else array[..., 0]
    if array.ndim != 2:
        raise SampleError("corrupt-image", f"npy {shape}; a map is [H, W]")
    return array
