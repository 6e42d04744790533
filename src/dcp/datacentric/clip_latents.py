"""A folder of clips turned into latents, once, and the latents as samples to train on.

::

    encoder = open_encoder("weights/wan-vae")       # a folder that diffusers saved; None pools
    encode_folder("clips", "latents", encoder)      # goes on where it was stopped
    samples = LatentFolder("latents")               # samples.sizes(), samples[3], samples.captions

Files are cut, scaled and cropped to the bucket they belong to, of Open-Sora's resolutions, aspect
ratios and frame counts (:func:`dcp.datacentric.buckets.pixel_bucket`).
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dcp.datacentric.buckets import FRAMES, RESOLUTIONS, PixelBucket, pixel_bucket
from dcp.datacentric.clip_files import Clip, clip_paths, open_clip, read_frames
from dcp.datacentric.clips import pooled_latents

FORMAT, INDEX = "dcp latents of clips 1", "index.json"


class Encoder(Protocol):
    """Makes latents of pixels.

    Attributes:
        identity: what its latents depend on.
        pixels: that a latent covers, each way.
        frames: counts that it can encode, near those of Open-Sora.
    """

    identity: dict[str, Any]
    pixels: int
    frames: tuple[int, ...]

    def check_frames(self, count: int) -> None:
        """Raises ``ValueError`` for a number of frames that it cannot encode."""

    def encode(self, video: Tensor) -> Tensor:
        """Latents ``[channels, frames, rows, columns]`` of pixels ``[3, frames, height, width]``,
        float32 in -1..1."""


def open_encoder(
    folder: str | Path | None,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Encoder:
    """The autoencoder that diffusers saved in ``folder``; without one, pixels are averaged.

    Averaged pixels are good to try a job with, not to train a model that is to draw: a warning
    says so. Nothing is downloaded. Raises ``ValueError`` for a folder that has no video
    autoencoder.
    """
    if folder is not None:
        return VideoAutoencoder(folder, device=device, dtype=dtype)
    warnings.warn(
        "no autoencoder is given: latents are AVERAGED PIXELS, from which no video can be drawn; "
        "give a folder with one of diffusers', such as the vae of a Wan or CogVideoX checkpoint",
        stacklevel=2,
    )
    return AveragedPixels()


class AveragedPixels:
    """Means of cells of pixels in the place of an autoencoder's latents, and their spread."""

    frames: tuple[int, ...] = FRAMES

    def __init__(self, *, pixels: int = 8, frames_per_latent: int = 3) -> None:
        self.pixels, self.frames_per_latent = pixels, frames_per_latent
        self.identity = {"kind": "averaged pixels", "pixels": pixels, "frames": frames_per_latent}

    def check_frames(self, count: int) -> None:
        if count > 1 and count % self.frames_per_latent:
            raise ValueError(
                f"{count} frames are no multiple of the {self.frames_per_latent} that a latent "
                f"averages: give frames such as {', '.join(map(str, self.frames))}"
            )

    def encode(self, video: Tensor) -> Tensor:
        clip = (video.permute(1, 2, 3, 0).numpy() + 1) / 2
        frames = min(self.frames_per_latent, len(clip))
        return torch.from_numpy(pooled_latents(clip, frames=frames, pixels=self.pixels))


class VideoAutoencoder:
    """A video autoencoder of diffusers: the mode of its latents, scaled as its pipelines do."""

    def __init__(
        self, folder: str | Path, *, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        import diffusers

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ValueError(f"{path} has no config.json: give a folder saved by diffusers")
        name = json.loads((path / "config.json").read_text()).get("_class_name")
        kind: Any = getattr(diffusers, str(name), None)
        if kind is None or not hasattr(kind, "encode"):
            raise ValueError(f"{path} holds a {name}, which is no autoencoder of diffusers")
        try:
            model = kind.from_pretrained(str(path), local_files_only=True, torch_dtype=dtype)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the autoencoder in {path} cannot be opened: {error}") from error
        self.model: Any = model.to(device).eval().requires_grad_(False)
        config = self.model.config
        ratio = _first(
            getattr(self.model, "temporal_compression_ratio", None),
            config.get("temporal_compression_ratio"),
            config.get("scale_factor_temporal"),
        )
        if ratio is None:
            raise ValueError(f"{path} holds a {name}, which encodes no videos")
        self.frames_per_latent = int(ratio)
        self.pixels = int(
            _first(
                getattr(self.model, "spatial_compression_ratio", None),
                config.get("scale_factor_spatial"),
                2 ** (len(config.get("block_out_channels", ())) - 1),
            )
        )
        self.frames = tuple(
            (n - 1) // self.frames_per_latent * self.frames_per_latent + 1 for n in FRAMES
        )
        self.identity = {
            "kind": name,
            "dtype": str(dtype).removeprefix("torch."),
            "weights": _digest_of(path),
        }

    def check_frames(self, count: int) -> None:
        if (count - 1) % self.frames_per_latent:
            raise ValueError(
                f"{count} frames cannot be encoded: the first has a latent of its own, and then "
                f"{self.frames_per_latent} share one; give frames such as "
                f"{', '.join(map(str, self.frames))}"
            )

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        pixels = video[None].to(self.model.device, self.model.dtype)
        latents = self.model.encode(pixels).latent_dist.mode().float()
        config, buffers = self.model.config, dict(self.model.named_buffers())
        mean, std = (
            _first(config.get(name), buffers.get(name), default)
            for name, default in (("latents_mean", 0.0), ("latents_std", 1.0))
        )
        mean, std = (_per_channel(value, latents) for value in (mean, std))
        shift, scale = config.get("shift_factor") or 0.0, config.get("scaling_factor") or 1.0
        return ((latents - shift - mean) / std * scale)[0].cpu()


# --------------------------------------------------------------------------- encoding


@dataclass
class Encoded:
    """What :func:`encode_folder` did: clips encoded now, those that were there, and why others are
    not, by path."""

    new: int = 0
    kept: int = 0
    unusable: dict[str, str] = field(default_factory=dict)


def encode_folder(
    folder: str | Path,
    out: str | Path,
    encoder: Encoder,
    *,
    resolutions: Sequence[str] = tuple(RESOLUTIONS),
    frames: Sequence[int] | None = None,
    patch: int = 2,
    skip_unusable: bool = False,
) -> Encoded:
    """Latents of all clips below ``folder``, in ``out``, for :class:`LatentFolder`.

    A clip whose latents are there is left alone, so that a job which was stopped goes on. A clip
    that is damaged, or fits no bucket, keeps nobody else waiting: all others are encoded, and then
    ``ValueError`` names each with its reason. With ``skip_unusable`` they are left out instead, and
    returned.

    Args:
        resolutions, frames: of the buckets; None: the encoder's own.
        patch: latents that a token of the model covers, each way; sides of buckets are multiples.
    """
    frames = encoder.frames if frames is None else frames
    for count in frames:
        encoder.check_frames(count)
    source, target = Path(folder), Path(out)
    (target / "latents").mkdir(parents=True, exist_ok=True)
    found, rows = Encoded(), []
    for path in clip_paths(source):
        name = path.relative_to(source).as_posix()
        try:
            clip = open_clip(path)
            bucket = pixel_bucket(
                clip.shape,
                resolutions=resolutions,
                frames=frames,
                multiple=patch * encoder.pixels,
            )
            file = target / "latents" / f"{_digest(path, name, bucket, encoder)}.safetensors"
            latents = _latents_in(file)
            if latents is None:
                latents = encoder.encode(pixels_of(clip, bucket)).contiguous()
                _write(file, latents)
                found.new += 1
            else:
                found.kept += 1
        except ValueError as error:
            found.unusable[name] = str(error)
            continue
        shape = list(latents.shape[1:])
        rows.append({"clip": name, "latents": file.name, "bucket": bucket.name, "shape": shape,
                     "caption": clip.caption})  # fmt: skip
    if rows:
        index = {"format": FORMAT, "encoder": encoder.identity, "clips": rows}
        draft = target / f"{INDEX}.partial"
        draft.write_text(json.dumps(index, indent=1) + "\n")
        os.replace(draft, target / INDEX)
    _refuse_unusable(source, found, len(rows), skip_unusable)
    return found


def pixels_of(clip: Clip, bucket: PixelBucket) -> Tensor:
    """The clip scaled to cover its bucket and cropped to its middle: float32 ``[3, frames, height,
    width]`` in -1..1."""
    count, height, width = bucket.shape
    pixels = torch.from_numpy(read_frames(clip, count)).permute(0, 3, 1, 2).float()
    scale = max(height / pixels.shape[2], width / pixels.shape[3])
    size = [max(round(side * scale), least) for side, least in
            zip(pixels.shape[2:], (height, width), strict=True)]  # fmt: skip
    scaled = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    cropped = scaled[:, :, top : top + height, left : left + width]
    return (cropped.clamp(0, 255) / 127.5 - 1).permute(1, 0, 2, 3)


def _refuse_unusable(source: Path, found: Encoded, usable: int, skip: bool) -> None:
    reasons = "".join(f"\n  {name}: {reason}" for name, reason in found.unusable.items())
    if not usable:
        raise ValueError(f"{source} has no clip that can be used{':' if reasons else ''}{reasons}")
    if reasons and not skip:
        raise ValueError(
            f"{len(found.unusable)} clips of {source} cannot be used; the latents of the other "
            f"{usable} are kept. Mend them, or give skip_unusable=True:{reasons}"
        )


def _digest(path: Path, name: str, bucket: PixelBucket, encoder: Encoder) -> str:
    """Of all that latents depend on; a file that was changed has another size or time."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    states = [(each.name, each.stat().st_size, each.stat().st_mtime_ns) for each in files]
    content = [name, states, bucket.shape, encoder.identity]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]


def _digest_of(folder: Path) -> str:
    """Of an autoencoder's configuration and the sizes of its weights' files."""
    state = [(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]
    text = (folder / "config.json").read_text() + json.dumps(state)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _write(file: Path, latents: Tensor) -> None:
    draft = file.with_suffix(".partial")
    save_file({"latents": latents}, draft)
    os.replace(draft, file)


def _latents_in(file: Path) -> Tensor | None:
    """None where they are not there, or not whole."""
    try:
        return load_file(file)["latents"] if file.is_file() else None
    except (SafetensorError, KeyError, OSError):
        return None


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _per_channel(value: Any, like: Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=like.dtype, device=like.device).reshape(-1, 1, 1, 1)


# --------------------------------------------------------------------------- training


class LatentFolder:
    """Samples that :func:`encode_folder` left: ``[i]`` is latents ``[channels, frames, rows,
    columns]``.

    Attributes:
        names, captions: of the clips.
        bucket_of: ``"240p 0.56 x 51"`` of each.

    Raises ``ValueError`` for a folder without a whole index.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        path = self.folder / INDEX
        try:
            content = json.loads(path.read_text())
            if content["format"] != FORMAT:
                raise ValueError(f"its format is not {FORMAT!r}")
            rows = content["clips"]
            self.encoder: dict[str, Any] = dict(content["encoder"])
            self.names, self._files, self.bucket_of, self.captions = (
                [str(row[key]) for row in rows] for key in ("clip", "latents", "bucket", "caption")
            )
            self._sizes = [tuple(int(n) for n in row["shape"]) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no index of latents: {error}; run encode_folder") from None

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, sample: int) -> Tensor:
        file = self.folder / "latents" / Path(self._files[sample]).name
        latents = _latents_in(file)
        if latents is None or tuple(latents.shape[1:]) != self._sizes[sample]:
            raise ValueError(
                f"the latents of {self.names[sample]} in {file} are missing or damaged: run "
                "encode_folder again, which keeps all others"
            )
        return latents

    def sizes(self) -> list[tuple[int, ...]]:
        """Latent frames, rows and columns of every sample."""
        return list(self._sizes)
