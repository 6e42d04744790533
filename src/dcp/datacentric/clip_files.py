"""Clips on disk: videos, folders of frames, and single images.

Videos are decoded by PyAV, images by imageio (``pip install dynamic-context-parallel[video]``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import av
import imageio.v3 as iio
import numpy as np
from av.error import FFmpegError

VIDEOS = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


class DamagedClip(ValueError):
    """A file that is no clip, or not all of one."""


@dataclass(frozen=True)
class Clip:
    """A video, an image, or a folder whose files are its frames in order of their names.

    Attributes:
        shape: frames, height and width.
        caption: content of the text file beside it that has its name; "" without one.
    """

    path: Path
    shape: tuple[int, int, int]
    caption: str


def clip_paths(folder: Path) -> list[Path]:
    """Everything below ``folder`` that is a clip by its name, in order.

    Images that lie in ``folder`` itself are clips of one frame; a folder in it with images, and
    nothing but images and texts, is one clip. Other files are none of ours.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of clips")
    return list(_paths(folder, is_top=True))


def _paths(folder: Path, *, is_top: bool) -> Iterator[Path]:
    inside = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    images = [path for path in inside if path.suffix.lower() in IMAGES]
    others = [path for path in inside if path.suffix.lower() in VIDEOS or path.is_dir()]
    if images and not others and not is_top:
        yield folder
        return
    for path in sorted(images + others):
        if path.is_dir():
            yield from _paths(path, is_top=False)
        else:
            yield path


def open_clip(path: Path) -> Clip:
    """Size and caption of a clip; its frames are not decoded.

    Raises :class:`DamagedClip`, which says what is wrong.
    """
    with _named(path):
        if path.is_dir():
            frames = _frames_in(path)
            height, width, _ = _image(frames[0]).shape
            shape = (len(frames), height, width)
        elif path.stat().st_size == 0:
            raise DamagedClip(f"{path} is empty")
        elif path.suffix.lower() in IMAGES:
            height, width, _ = _image(path).shape
            shape = (1, height, width)
        else:
            shape = _video_shape(path)
    text = path.with_suffix(".txt")
    return Clip(path, shape, text.read_text().strip() if text.is_file() else "")


def read_frames(clip: Clip, count: int) -> np.ndarray:
    """The first ``count`` frames, uint8 ``[count, height, width, 3]``.

    Raises :class:`DamagedClip` where they cannot be decoded, or are not that many.
    """
    with _named(clip.path):
        if clip.path.is_dir():
            frames = [_image(path) for path in _frames_in(clip.path)[:count]]
        elif clip.path.suffix.lower() in IMAGES:
            frames = [_image(clip.path)]
        else:
            frames = list(islice(_decoded(clip.path), count))
        if len(frames) < count:
            raise DamagedClip(f"{clip.path} ends after {len(frames)} of {clip.shape[0]} frames")
        if len(sizes := {frame.shape for frame in frames}) > 1:
            raise DamagedClip(f"{clip.path} has frames of several sizes: {sorted(sizes)}")
        return np.stack(frames)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Whatever goes wrong with a file names it, and is one kind of error."""
    try:
        yield
    except DamagedClip:
        raise
    except (FFmpegError, OSError, ValueError, IndexError, SyntaxError) as error:
        # a broken PNG is a SyntaxError to Pillow, a folder without images an IndexError
        raise DamagedClip(f"{path} cannot be read: {error}") from error


def _frames_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES)


def _image(path: Path) -> np.ndarray:
    pixels: np.ndarray = iio.imread(path, plugin="pillow", mode="RGB")
    return pixels


def _video_shape(path: Path) -> tuple[int, int, int]:
    """Frames, counted by their packets, and the size of the first, which is decoded."""
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise DamagedClip(f"{path} has no video in it")
        packets = container.demux(container.streams.video[0])
        count = sum(1 for packet in packets if packet.size)
    first = next(_decoded(path), None)
    if first is None:
        raise DamagedClip(f"{path} has no frame that can be decoded")
    return count, first.shape[0], first.shape[1]


def _decoded(path: Path) -> Iterator[np.ndarray]:
    with av.open(str(path)) as container:
        for frame in container.decode(video=0):
            if frame.rotation:
                raise DamagedClip(
                    f"{path} is to be turned by {frame.rotation} degrees: write it upright first"
                )
            yield frame.to_ndarray(format="rgb24")
