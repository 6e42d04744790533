"""Folders of real videos as latents: buckets, damage, going on after a stop, autoencoders."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("imageio")
pytest.importorskip("diffusers")

import av
import diffusers
import imageio.v3 as iio

from dcp.datacentric.buckets import ASPECT_RATIOS, RESOLUTIONS, pixel_bucket
from dcp.datacentric.clip_files import DamagedClip, clip_paths, open_clip, read_frames
from dcp.datacentric.clip_latents import (
    AveragedPixels,
    LatentFolder,
    encode_folder,
    open_encoder,
)

SMALL = {"resolutions": ["144p"], "frames": (1, 6, 12)}


def write_video(path, *, frames=14, height=152, width=264, codec="mpeg4"):
    """A square that moves to the right over a ramp of grey."""
    clip = np.zeros((frames, height, width, 3), dtype=np.uint8)
    clip += np.linspace(0, 200, width, dtype=np.uint8)[None, None, :, None]
    for number in range(frames):
        clip[number, 20:60, 4 * number : 4 * number + 40] = (220, 40, 90)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.bit_rate = 4_000_000
        for pixels in clip:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return clip


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        sound.rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())


@pytest.fixture
def folder(tmp_path):
    """Two videos, one of them on its side, a folder of frames, and an image with a caption."""
    clips = tmp_path / "clips"
    (clips / "frames").mkdir(parents=True)
    (clips / "more").mkdir()
    write_video(clips / "wide.mp4")
    write_video(clips / "more" / "tall.mkv", frames=7, height=264, width=152)
    for number in range(6):
        pixels = np.full((200, 200, 3), 20 * number, dtype=np.uint8)
        iio.imwrite(clips / "frames" / f"{number:03}.png", pixels)
    iio.imwrite(clips / "still.png", np.full((160, 300, 3), 99, dtype=np.uint8))
    (clips / "still.txt").write_text("a grey wall\n")
    (clips / "notes.md").write_text("no clip")
    return clips


def averaging():
    with pytest.warns(UserWarning, match="AVERAGED PIXELS"):
        return open_encoder(None)


# --------------------------------------------------------------------------- files


def test_clips_are_found_and_read(folder):
    found = {path.relative_to(folder).as_posix(): open_clip(path) for path in clip_paths(folder)}
    assert {name: clip.shape for name, clip in found.items()} == {
        "frames": (6, 200, 200),
        "more/tall.mkv": (7, 264, 152),
        "still.png": (1, 160, 300),
        "wide.mp4": (14, 152, 264),
    }
    assert found["still.png"].caption == "a grey wall"
    assert found["wide.mp4"].caption == ""
    frames = read_frames(found["wide.mp4"], 12)
    assert frames.shape == (12, 152, 264, 3)
    wanted = write_video(folder.parent / "again.mp4")[:12]
    assert abs(frames.astype(int) - wanted).mean() < 6, "what a lossy codec leaves of it"
    assert (read_frames(found["frames"], 3)[:, 0, 0, 0] == [0, 20, 40]).all()


def test_damaged_files_say_what_is_wrong(folder, tmp_path):
    whole = (folder / "wide.mp4").read_bytes()
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "half.mp4").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    write_sound(tmp_path / "sound.mp4")
    for name, reason in [
        ("empty.mp4", "is empty"),
        ("noise.mp4", "cannot be read"),
        ("half.mp4", "cannot be read"),
        ("noise.png", "cannot be read"),
        ("sound.mp4", "has no video in it"),
        ("gone.mp4", "cannot be read"),
    ]:
        with pytest.raises(DamagedClip, match=f"{name} {reason}"):
            open_clip(tmp_path / name)
    # a stream that breaks off has the frames before that
    write_video(tmp_path / "cut.mkv")
    whole = (tmp_path / "cut.mkv").read_bytes()
    (tmp_path / "cut.mkv").write_bytes(whole[: len(whole) * 7 // 10])
    cut = open_clip(tmp_path / "cut.mkv")
    assert len(read_frames(cut, 3)) == 3
    with pytest.raises(DamagedClip, match=r"cut.mkv (ends after \d+ of \d+ frames|cannot be read)"):
        read_frames(cut, 14)
    with pytest.raises(ValueError, match="no folder of clips"):
        clip_paths(folder / "wide.mp4")


# --------------------------------------------------------------------------- buckets


def test_buckets_are_those_of_open_sora():
    # published: 240p is 240 x 426 at 0.56, 320 x 320 at 1.00, 426 x 240 at 1.78
    for shape, wanted in [
        ((60, 240, 426), ("240p 0.56 x 51", (51, 240, 426))),
        ((51, 330, 330), ("240p 1.00 x 51", (51, 320, 320))),
        ((500, 1280, 720), ("720p 1.78 x 408", (408, 1280, 720))),
        ((1, 720, 1280), ("720p 0.56 x 1", (1, 720, 1280))),
        ((103, 130, 231), ("144p 0.56 x 102", (102, 144, 257))),  # 0.8 of its pixels are enough
    ]:
        bucket = pixel_bucket(shape)
        assert bucket.name == wanted[0]
        assert np.allclose(bucket.shape, wanted[1], atol=3)
    with pytest.raises(ValueError, match="50 frames of 240 x 426 fit no bucket"):
        pixel_bucket((50, 240, 426))
    with pytest.raises(ValueError, match="fit no bucket"):
        pixel_bucket((60, 80, 100))


@pytest.mark.parametrize("multiple", [1, 16, 64])
def test_every_bucket_keeps_its_ratio_and_area(multiple):
    for resolution, (height, width) in RESOLUTIONS.items():
        for ratio in ASPECT_RATIOS:
            side = 2000
            shape = (60, round(side * float(ratio) ** 0.5), round(side / float(ratio) ** 0.5))
            bucket = pixel_bucket(shape, resolutions=[resolution], multiple=multiple)
            assert bucket.name == f"{resolution} {ratio} x 51"
            _, rows, columns = bucket.shape
            assert rows % multiple == columns % multiple == 0
            if multiple <= 16:
                assert rows * columns == pytest.approx(height * width, rel=0.16)


# --------------------------------------------------------------------------- latents


def test_a_folder_becomes_latents(folder, tmp_path):
    done = encode_folder(folder, tmp_path / "out", averaging(), **SMALL)
    assert (done.new, done.kept, done.unusable) == (4, 0, {})
    samples = LatentFolder(tmp_path / "out")
    assert samples.names == ["frames", "more/tall.mkv", "still.png", "wide.mp4"]
    assert samples.bucket_of == [
        "144p 1.00 x 6",
        "144p 1.78 x 6",
        "144p 0.52 x 1",
        "144p 0.56 x 12",
    ]
    assert samples.captions[2] == "a grey wall"
    sizes = samples.sizes()
    assert sizes == [(2, 24, 24), (2, 32, 18), (1, 18, 34), (4, 18, 32)]
    assert all(rows % 2 == columns % 2 == 0 for _, rows, columns in sizes)
    assert [tuple(samples[i].shape) for i in range(4)] == [(4, *size) for size in sizes]
    grey = samples[2]
    assert torch.allclose(grey[:3], torch.tensor(2 * 99 / 255 - 1), atol=1e-5)
    assert torch.allclose(grey[3], torch.tensor(0.0), atol=1e-5)
    # frames of one colour each: three of them to a latent
    steps = torch.tensor([20 * (0 + 1 + 2) / 3, 20 * (3 + 4 + 5) / 3]) / 127.5 - 1
    assert torch.allclose(samples[0][0, :, 5, 5], steps, atol=1e-5)


def test_damage_loses_nothing_and_a_stopped_job_goes_on(folder, tmp_path):
    encoder, out = averaging(), tmp_path / "out"
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "empty.mp4").touch()
    write_video(folder / "short.mp4", frames=3)
    with pytest.raises(ValueError, match=r"3 clips of .* other 4 are kept") as failed:
        encode_folder(folder, out, encoder, **SMALL)
    for name in ("bad.mp4: ", "empty.mp4: .* is empty", "short.mp4: 3 frames of 152 x 264 fit no"):
        failed.match(name)
    assert len(LatentFolder(out)) == 4
    again = encode_folder(folder, out, encoder, **SMALL, skip_unusable=True)
    assert (again.new, again.kept) == (0, 4)
    assert sorted(again.unusable) == ["bad.mp4", "empty.mp4", "short.mp4"]
    # one is mended, one is changed, latents of one are lost and of another damaged
    write_video(folder / "bad.mp4")
    write_video(folder / "wide.mp4", frames=20)
    samples = LatentFolder(out)
    files = [out / "latents" / name for name in samples._files]
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-5])
    for sample in (0, 1):
        with pytest.raises(ValueError, match=r"missing or damaged: run encode_folder again"):
            samples[sample]
    last = encode_folder(folder, out, encoder, **SMALL, skip_unusable=True)
    assert (last.new, last.kept) == (4, 1)
    assert len(LatentFolder(out)) == 5
    (out / "index.json").write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="no index of latents: its format is not"):
        LatentFolder(out)


def test_nothing_to_encode_is_said(tmp_path):
    (tmp_path / "clips").mkdir()
    with pytest.raises(ValueError, match="has no clip that can be used"):
        encode_folder(tmp_path / "clips", tmp_path / "out", AveragedPixels(), skip_unusable=True)
    with pytest.raises(ValueError, match="50 frames are no multiple of the 3"):
        encode_folder(tmp_path / "clips", tmp_path / "out", AveragedPixels(), frames=[50])


def wan_vae(path):
    torch.manual_seed(0)
    model = diffusers.AutoencoderKLWan(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
    )  # fmt: skip
    model.save_pretrained(path)
    return model.eval()


def test_an_autoencoder_of_diffusers_encodes(folder, tmp_path):
    model = wan_vae(tmp_path / "vae")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        encoder = open_encoder(tmp_path / "vae")
    assert encoder.frames == (1, 49, 101, 201, 405)
    with pytest.raises(ValueError, match="6 frames cannot be encoded: the first has a latent of"):
        encode_folder(folder, tmp_path / "out", encoder, frames=[6])
    options = {"resolutions": ["144p"], "frames": [1, 5]}
    assert encode_folder(folder, tmp_path / "out", encoder, **options).new == 4
    samples = LatentFolder(tmp_path / "out")
    assert samples.encoder["kind"] == "AutoencoderKLWan"
    assert samples.sizes() == [(2, 24, 24), (2, 32, 18), (1, 18, 34), (2, 18, 32)]
    pixels = torch.full((1, 3, 1, 144, 272), 99 / 127.5 - 1)
    with torch.no_grad():
        raw = model.encode(pixels).latent_dist.mode()[0]
    mean, std = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    wanted = (raw - mean[:, None, None, None]) / std[:, None, None, None]
    assert torch.allclose(samples[2], wanted, atol=1e-4)


def test_what_is_no_autoencoder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json"):
        open_encoder(tmp_path)
    image = diffusers.AutoencoderKL(block_out_channels=[32], norm_num_groups=8)
    image.save_pretrained(tmp_path / "image")
    with pytest.raises(ValueError, match="holds a AutoencoderKL, which encodes no videos"):
        open_encoder(tmp_path / "image")
    wan_vae(tmp_path / "vae")
    weights = tmp_path / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="cannot be opened"):
        open_encoder(tmp_path / "vae")
