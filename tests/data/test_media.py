"""mp4 files: what goes in comes out, muxing leaves packets alone, and bad files say what is wrong with them."""

import io
import struct
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition

import data.media
from data.media import MediaError, mux, read_audio, read_video, stream_hashes, write_mp4

RATE = 16_000


def picture(n: int = 8, size: int = 64, shade: int = 0) -> np.ndarray:
    """Frames of growing brightness, so that each can be told from the others."""
    levels = np.linspace(30 + shade, 200 + shade, n).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (n, size, size, 3)).copy()


def tone(seconds: float = 2.0, hertz: float = 440.0) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)).astype(np.float32)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    write_mp4(tmp_path / "one.mp4", picture(), 4, tone())
    return tmp_path / "one.mp4"


def packets(path: Path, kind: str) -> list[tuple[bytes, int, int]]:
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return [(bytes(p), p.pts * p.time_base, p.dts * p.time_base) for p in container.demux(stream) if p.size]


def with_b_frames(path: Path, rate: int = 48_000) -> None:
    """A file as cameras write it: B-frames, 25 fps, 48 kHz stereo."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=25, options={"x264-params": "bframes=3:b-adapt=0"})
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=rate, layout="stereo")
        for i, image in enumerate(picture(50)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        wave = np.interp(np.arange(2 * rate) / rate, np.arange(2 * RATE) / RATE, tone()).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


def test_same_input_gives_the_same_bytes(one: Path, tmp_path: Path) -> None:
    write_mp4(tmp_path / "again.mp4", picture(), 4, tone())
    write_mp4(tmp_path / "other.mp4", picture(), 4, tone(hertz=450))
    assert one.read_bytes() == (tmp_path / "again.mp4").read_bytes()
    assert stream_hashes(one)[0] == stream_hashes(tmp_path / "other.mp4")[0]
    assert stream_hashes(one)[1] != stream_hashes(tmp_path / "other.mp4")[1]


WRITE = """
import hashlib, sys
import numpy as np
from data.media import write_mp4
if sys.argv[1] == "dirty":  # memory that is handed out again with other content than zeros
    kept = [np.full(n, 254, np.uint8) for n in (1 << k for k in range(4, 23)) for _ in range(20)]
    del kept
grain = np.random.default_rng(0).integers(0, 256, (8, 42, 42, 3), dtype=np.uint8)
for size in (168, 224):
    frames = np.kron(grain, np.ones((1, size // 42 + 1, size // 42 + 1, 1), np.uint8))[:, :size, :size]
    write_mp4(sys.argv[2], frames, 4, np.sin(np.arange(32000) / 5).astype(np.float32))
    print(hashlib.sha256(open(sys.argv[2], "rb").read()).hexdigest())
"""


def test_every_process_gives_the_same_bytes(tmp_path: Path) -> None:
    """Whatever its memory holds from before."""
    runs = [
        subprocess.run([sys.executable, "-c", WRITE, state, str(tmp_path / "x.mp4")], capture_output=True, text=True, check=True).stdout.split()
        for state in ("clean", "dirty", "clean", "dirty")
    ]
    assert len(runs[0]) == 2 and all(run == runs[0] for run in runs)


@pytest.mark.parametrize("size", [64, 168, 224])
def test_every_processor_gives_the_same_bytes(size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """x264 told to take its code for processors without SIMD, with SSE2, with AVX, and for this one."""
    frames = np.random.default_rng(size).integers(0, 256, (8, size, size, 3), dtype=np.uint8)
    hashes = set()
    params = data.media.X264["x264-params"]
    for asm in ("", ":asm=0", ":asm=SSE2", ":asm=AVX"):
        monkeypatch.setitem(data.media.X264, "x264-params", params + asm)
        write_mp4(tmp_path / "x.mp4", frames, 4, None)
        hashes.add(stream_hashes(tmp_path / "x.mp4")[0])
    assert len(hashes) == 1


def test_codecs(one: Path) -> None:
    with av.open(str(one)) as container:
        assert [(s.codec_context.name, s.type) for s in container.streams] == [("h264", "video"), ("aac", "audio")]
        assert container.streams.video[0].codec_context.pix_fmt == "yuv420p"
        assert container.streams.audio[0].codec_context.sample_rate == RATE


def test_picture_comes_back(one: Path) -> None:
    frames = read_video(one, fps=4)
    assert frames.shape == (8, 3, 64, 64) and frames.dtype == np.uint8
    assert np.abs(frames.astype(int) - picture().transpose(0, 3, 1, 2)).max() <= 4
    # 2 a second: every other frame; a third of one a second still gives two: at 0 s and the last.
    assert np.array_equal(read_video(one, fps=2), frames[::2])
    assert np.array_equal(read_video(one, fps=1 / 3), frames[[0, 7]])
    # Faster than the file: each frame is shown until the next one begins.
    assert np.array_equal(read_video(one, fps=8), frames.repeat(2, axis=0))


def test_sound_comes_back_in_time(one: Path, tmp_path: Path) -> None:
    wave = read_audio(one)
    assert wave.shape == (2 * RATE,) and wave.dtype == np.float32
    assert np.sqrt(np.mean((wave - tone())[800:-800] ** 2)) < 0.02
    # A click shows any shift: AAC's priming, 1024 samples, must be gone.
    click = np.zeros(2 * RATE, dtype=np.float32)
    click[5000] = 0.9
    write_mp4(tmp_path / "click.mp4", picture(), 4, click)
    assert abs(int(np.abs(read_audio(tmp_path / "click.mp4")).argmax()) - 5000) <= 16  # 1 ms
    assert read_audio(one, rate=8000).shape == (RATE,)


def test_camera_file(tmp_path: Path) -> None:
    path = tmp_path / "camera.mp4"
    with_b_frames(path)
    frames = read_video(path, fps=25)
    assert frames.shape == (50, 3, 64, 64)
    assert (np.diff(frames.mean((1, 2, 3))) > 0).all()  # display order, though coded in another
    wave = read_audio(path)
    assert abs(len(wave) - 2 * RATE) <= 80  # 5 ms
    # Stereo of equal channels becomes the same mono, in phase with what was written.
    assert np.abs(wave[1600:30_000] - tone()[1600:30_000]).max() < 0.1


def test_pictures_of_unequal_length(tmp_path: Path) -> None:
    """A slide show: three pictures, shown for 1, 2 and 3 seconds."""
    path = tmp_path / "slides.mp4"
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=1, options={"x264-params": "bframes=0"})
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        coded = []
        for image, at in zip(picture(3), (0, 1, 3), strict=True):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = at, Fraction(1)
            coded += video.encode(frame)
        coded += video.encode(None)
        coded[-1].duration = 3
        container.mux(coded)
    levels = read_video(path, 1).mean((1, 2, 3))
    assert np.abs(levels - [30, 115, 115, 200, 200, 200]).max() < 4


def test_mux_copies_packets(one: Path, tmp_path: Path) -> None:
    camera, out = tmp_path / "camera.mp4", tmp_path / "out.mp4"
    with_b_frames(camera)
    hashes = mux(camera, one, out)
    assert packets(out, "video") == packets(camera, "video")
    assert packets(out, "audio") == packets(one, "audio")
    assert hashes == stream_hashes(out) == (stream_hashes(camera)[0], stream_hashes(one)[1])
    assert np.array_equal(read_video(out, 25), read_video(camera, 25))
    assert np.array_equal(read_audio(out), read_audio(one))
    assert packets(mux_and(one, camera, tmp_path), "audio") == packets(camera, "audio")


def mux_and(video: Path, audio: Path, folder: Path) -> Path:
    mux(video, audio, folder / "mirror.mp4")
    return folder / "mirror.mp4"


@pytest.mark.parametrize(("frames", "seconds"), [(16, 4.0), (4, 1.0)])
def test_each_stream_keeps_its_length(one: Path, tmp_path: Path, frames: int, seconds: float) -> None:
    """Longer sound is not cut at the picture's end: the same sound would be another in each cell of a grid."""
    write_mp4(tmp_path / "other.mp4", picture(frames), 4, tone(seconds))
    made = mux(one, tmp_path / "other.mp4", tmp_path / "made.mp4")
    assert made == stream_hashes(tmp_path / "made.mp4") == (stream_hashes(one)[0], stream_hashes(tmp_path / "other.mp4")[1])
    assert np.array_equal(read_audio(tmp_path / "made.mp4"), read_audio(tmp_path / "other.mp4"))
    assert np.array_equal(read_video(tmp_path / "made.mp4", 4), read_video(one, 4))


def test_late_sound_stays_late(one: Path, tmp_path: Path) -> None:
    late = tmp_path / "late.mp4"
    with av.open(str(one)) as source, av.open(str(late), "w") as container:
        targets = {s.index: container.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.size:
                if packet.stream.type == "audio" and packet.pts is not None and packet.dts is not None:
                    packet.pts += RATE // 2
                    packet.dts += RATE // 2
                packet.stream = targets[packet.stream.index]
                container.mux(packet)
    wave = read_audio(late)
    assert np.abs(wave[: RATE // 2 - 1100]).max() < 1e-3 < np.abs(wave[RATE // 2 + 100 : RATE]).max()


def test_no_sound_track(one: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare.mp4"
    write_mp4(bare, picture(), 4, None)
    with pytest.raises(MediaError, match=r'bare\.mp4 has no sound track\. Mux one, or call the clip "muted" in clips\.jsonl\.'):
        read_audio(bare)
    with pytest.raises(MediaError, match=r"bare\.mp4 has no sound track"):
        mux(one, bare, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()
    assert np.array_equal(read_audio(bare, muted=True), np.zeros(2 * RATE, dtype=np.float32))
    write_mp4(tmp_path / "longer.mp4", picture(12), 4, None)
    assert stream_hashes(bare)[1] != stream_hashes(tmp_path / "longer.mp4")[1]  # silence of another length
    write_mp4(tmp_path / "other.mp4", picture(shade=9), 4, None)
    assert stream_hashes(bare)[1] == stream_hashes(tmp_path / "other.mp4")[1]


def test_no_video_stream(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        audio = container.add_stream("aac", rate=RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(tone()[None], format="fltp", layout="mono")
        frame.sample_rate = RATE
        container.mux(audio.encode(frame))
        container.mux(audio.encode(None))
    (tmp_path / "sound.mp4").write_bytes(buffer.getvalue())
    with pytest.raises(MediaError, match=r"sound\.mp4 has no video stream"):
        read_video(tmp_path / "sound.mp4", 4)


@pytest.mark.parametrize("level", [0.0, 2e-4])
def test_silent_sound_track(tmp_path: Path, level: float) -> None:
    path = tmp_path / "quiet.mp4"
    write_mp4(path, picture(), 4, tone() * np.float32(level))
    with pytest.raises(MediaError, match=r'quiet\.mp4 has a silent sound track\. Mux a sound, or call the clip "muted"'):
        read_audio(path)
    assert read_audio(path, muted=True).shape == (2 * RATE,)


def test_quiet_but_audible_is_not_silent(tmp_path: Path) -> None:
    write_mp4(tmp_path / "soft.mp4", picture(), 4, tone() * np.float32(0.01))
    assert np.abs(read_audio(tmp_path / "soft.mp4")).max() > 0.003


def front(path: Path) -> bytes:
    """The file with its index first, as on the web: then a truncated copy can still be opened."""
    rewritten = path.with_name("front.mp4")
    with av.open(str(path)) as source, av.open(str(rewritten), "w", options={"movflags": "+faststart"}) as container:
        targets = {s.index: container.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.size:
                packet.stream = targets[packet.stream.index]
                container.mux(packet)
    return rewritten.read_bytes()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("index_first", [False, True])
def test_truncated(one: Path, tmp_path: Path, share: float, index_first: bool) -> None:
    if index_first:  # noise does not compress: the packets are most of the file, and the picture comes before the sound's end
        write_mp4(one, np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), 4, tone())
    whole = front(one) if index_first else one.read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: int(len(whole) * share)])

    def read_all() -> None:
        read_video(cut, 4)
        read_audio(cut)

    with pytest.raises(MediaError, match=r"cut\.mp4 .*truncated"):
        read_all()
    with pytest.raises(MediaError, match=r"cut\.mp4 .*truncated"):
        mux(cut, cut, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


def test_whole_file_with_index_first_is_fine(one: Path) -> None:
    (one.parent / "copy.mp4").write_bytes(front(one))
    assert np.array_equal(read_audio(one.parent / "copy.mp4"), read_audio(one))


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match=r"nowhere\.mp4 does not exist"):
        read_audio(tmp_path / "nowhere.mp4")
    (tmp_path / "text.mp4").write_text("no film " * 200)
    with pytest.raises(MediaError, match=r"text\.mp4 cannot be read as media"):
        read_video(tmp_path / "text.mp4", 4)


@pytest.mark.parametrize("kind", ["concat", "hls"])
def test_a_list_of_other_files_is_no_clip(kind: str, one: Path) -> None:
    """FFmpeg goes by what is in a file: it would read others through one that is called an mp4, and these could be exchanged unseen."""
    (one.parent / "list.mp4").write_text(
        {
            "concat": f"ffconcat version 1.0\nfile {one.name}\n",
            "hls": f"#EXTM3U\n#EXT-X-VERSION:7\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\n{one.name}\n#EXT-X-ENDLIST\n",
        }[kind]
    )
    for read in (read_audio, lambda p: read_video(p, 4), stream_hashes):
        with pytest.raises(MediaError, match=r"list\.mp4 (is a list of other files|cannot be read as media)"):
            read(one.parent / "list.mp4")


def test_no_space_left(one: Path) -> None:
    with pytest.raises(MediaError, match=r"/dev/full cannot be written \(No space left on device\)"):
        write_mp4("/dev/full", picture(), 4, tone())
    with pytest.raises(MediaError, match=r"/dev/full cannot be written"):
        mux(one, one, "/dev/full")
    assert Path("/dev/full").is_char_device()


def test_bad_frames(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="even height and width"):
        write_mp4(tmp_path / "odd.mp4", picture(size=63), 4, None)
    with pytest.raises(MediaError, match="must be uint8"):
        write_mp4(tmp_path / "float.mp4", picture().astype(np.float32), 4, None)


def test_half_filled(one: Path, tmp_path: Path) -> None:
    """A download that was given its full size and stopped half way: zeros where packets should be."""
    write_mp4(one, np.random.default_rng(0).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8), 4, tone())
    whole = bytearray(one.read_bytes())
    begin, end = whole.index(b"mdat") + 4, whole.index(b"moov") - 4
    middle = (begin + end) // 2
    whole[middle:end] = bytes(end - middle)
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(bytes(whole))
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        read_video(cut, 4)
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        read_audio(cut)


# What players show ------------------------------------------------------------------------------------------------------------------------------


def again(source: Path, name: str, *, later: dict[str, float] | None = None, without: tuple[str, float, float] | None = None) -> Path:
    """The packets of a file in another, some streams moved by seconds, the packets of one stream between two times left out."""
    out = source.parent / name
    with av.open(str(source)) as container, av.open(str(out), "w") as target:
        streams = {s.index: target.add_stream_from_template(s) for s in container.streams}
        for packet in container.demux():
            if packet.size:
                assert packet.pts is not None and packet.dts is not None
                kind, time = packet.stream.type, float(packet.pts * packet.time_base)
                if without is None or kind != without[0] or not without[1] <= time < without[2]:
                    by = round((later or {}).get(kind, 0.0) / packet.time_base)
                    packet.pts, packet.dts = packet.pts + by, packet.dts + by
                    packet.stream = streams[packet.stream_index]
                    target.mux(packet)
    return out


def coded(path: Path, channels: np.ndarray, layout: str = "stereo", codec: str = "pcm_f32le", rate: int = RATE) -> Path:
    """A file with this sound, (channels, samples), and a picture."""
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("libx264", rate=4), out.add_stream(codec, rate=rate, layout=layout)
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for i, image in enumerate(picture()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 4)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(channels.T.reshape(1, -1).astype(np.float32).copy(), format="flt", layout=layout)
        sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    return path


def beep_at(path: Path) -> float:
    return float(np.flatnonzero(np.abs(read_audio(path)) > 0.1)[0]) / RATE


def beep(at: float, seconds: float = 4.0) -> np.ndarray:
    t = np.arange(round(seconds * RATE)) / RATE
    return np.where((t >= at) & (t < at + 0.5), 0.5 * np.sin(2 * np.pi * 880 * t), 0).astype(np.float32)


MATRICES: dict[str, tuple[Sequence[int], str]] = {
    "not turned": ((1, 0, 0, 1), "left"),
    "90 clockwise": ((0, 1, -1, 0), "top"),
    "180": ((-1, 0, 0, -1), "right"),
    "90 anticlockwise": ((0, -1, 1, 0), "bottom"),
    "mirrored": ((-1, 0, 0, 1), "right"),
    "upside down mirrored": ((1, 0, 0, -1), "left"),
}


@pytest.mark.parametrize("name", MATRICES)
def test_display_matrix(name: str, tmp_path: Path) -> None:
    """A strip that is coded on the left and, darker, above."""
    (a, b, c, d), side = MATRICES[name]
    frames = np.full((8, 64, 96, 3), 30, np.uint8)
    frames[:, :20] = 90
    frames[:, :, :24] = 220
    write_mp4(tmp_path / "x.mp4", frames, 4, tone())
    plain = stream_hashes(tmp_path / "x.mp4")
    data = bytearray((tmp_path / "x.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    (tmp_path / "x.mp4").write_bytes(data)
    mux(tmp_path / "x.mp4", tmp_path / "x.mp4", tmp_path / "swap.mp4")
    hashes = [stream_hashes(tmp_path / f) for f in ("x.mp4", "swap.mp4")]
    assert hashes[0] == hashes[1] and (hashes[0][0] == plain[0]) == (name == "not turned") and hashes[0][1] == plain[1]
    # By the definition: the pixel at (x, y) goes to (a x + c y, b x + d y), moved so that the least is 0.
    y, x = np.mgrid[:64, :96]
    x_new, y_new = a * x + c * y, b * x + d * y
    expected = np.zeros((64, 96) if a else (96, 64), np.uint8)
    expected[y_new - y_new.min(), x_new - x_new.min()] = frames[0, :, :, 0]
    for file in ("x.mp4", "swap.mp4"):
        got = read_video(tmp_path / file, 4)
        assert got.shape == (8, 3, *expected.shape)
        assert np.abs(got[0].mean(0) - expected).mean() < 3
        strips = {"left": got[0, :, :, :8], "right": got[0, :, :, -8:], "top": got[0, :, :8], "bottom": got[0, :, -8:]}
        assert max(strips, key=lambda k: strips[k].mean()) == side


def test_a_matrix_that_turns_by_45_degrees_is_refused(tmp_path: Path) -> None:
    write_mp4(tmp_path / "x.mp4", picture(), 4, tone())
    data = bytearray((tmp_path / "x.mp4").read_bytes())
    at = data.index(b"tkhd") + 44
    half = round(0.7071 * 65536)
    data[at : at + 36] = struct.pack(">9i", half, half, 0, -half, half, 0, 0, 0, 1 << 30)
    (tmp_path / "x.mp4").write_bytes(data)
    with pytest.raises(MediaError, match=r"x\.mp4 is to be shown turned by 45 degrees"):
        read_video(tmp_path / "x.mp4", 4)


@pytest.mark.parametrize(("aspect", "size"), [(Fraction(4, 3), (60, 80)), (Fraction(1, 2), (120, 60)), (Fraction(1), (60, 60))])
@pytest.mark.parametrize("ending", ["mp4", "mkv"])
def test_pixel_aspect(aspect: Fraction, size: tuple[int, int], ending: str, tmp_path: Path) -> None:
    """Pixels that are not square: the shorter side grows."""
    path = tmp_path / f"x.{ending}"
    with av.open(str(path), "w") as out:
        video = out.add_stream("libx264", rate=4)
        video.width, video.height, video.pix_fmt = 60, 60, "yuv420p"
        video.codec_context.sample_aspect_ratio = aspect
        for i, image in enumerate(picture(size=60)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 4)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    assert read_video(path, 4).shape == (8, 3, *size)
    write_mp4(tmp_path / "sound.mp4", picture(), 4, tone())
    mux(path, tmp_path / "sound.mp4", tmp_path / "swap.mp4")
    assert read_video(tmp_path / "swap.mp4", 4).shape == (8, 3, *size)


@pytest.mark.parametrize("ending", ["mp4", "mkv", "ts"])
def test_a_gap_in_the_sound_is_silence(ending: str, tmp_path: Path) -> None:
    write_mp4(tmp_path / "whole.mp4", picture(16), 4, beep(0.0) + beep(3.0))
    gap = again(tmp_path / "whole.mp4", f"gap.{ending}", without=("audio", 1.0, 2.5))
    wave, whole = read_audio(gap), read_audio(tmp_path / "whole.mp4")
    # Other containers than mp4 play the encoder's priming, 64 ms, and the picture comes later by as much.
    shift = 0 if ending == "mp4" else 1024
    assert abs(len(wave) - shift - len(whole)) <= 1024
    assert np.abs(wave[shift + 17_000 : shift + 38_000]).max() < 1e-3
    late = np.flatnonzero(np.abs(wave) > 0.1)
    assert abs(late[late > 20_000][0] - shift - 3 * RATE) < 100


def test_one_clock(tmp_path: Path) -> None:
    """Flash and beep at 2 s. A common beginning, of whatever time, is taken off; a stream that begins later than the other stays later."""
    frames = np.full((32, 64, 64, 3), 30, np.uint8)
    frames[16:20] = 230
    write_mp4(tmp_path / "whole.mp4", frames, 8, beep(2.0))
    for name, later, without, sound, flash in (
        ("whole.mp4", {}, None, 2.0, 2.0),
        ("together.mp4", {"video": 1.4, "audio": 1.4}, None, 2.0, 2.0),
        ("together.ts", {"video": 1.4, "audio": 1.4}, None, 2.0, 2.0),
        ("hour.mkv", {"video": 3600.0, "audio": 3600.0}, None, 2.0, 2.0),
        ("sound_late.mp4", {"audio": 1.0}, None, 3.0, 2.0),
        ("picture_late.mp4", {"video": 1.0}, None, 2.0, 3.0),
        ("picture_late.mkv", {}, ("video", -1.0, 2.0), 2.0, 2.0),  # its first picture is the one at 2 s
    ):
        path = tmp_path / name if name == "whole.mp4" else again(tmp_path / "whole.mp4", name, later=later, without=without)
        lit = read_video(path, 8).mean((1, 2, 3)) > 150
        assert abs(beep_at(path) - sound) < 0.07, name  # the priming, where a container does not take it off
        assert abs(float(np.flatnonzero(lit)[0]) / 8 - flash) < 0.07, name
        assert lit.sum() == 4, name
    black = read_video(tmp_path / "picture_late.mp4", 8)
    assert not black[:8].any() and black[8:].all()


def test_times_that_jump_back_are_refused(tmp_path: Path) -> None:
    write_mp4(tmp_path / "one.mp4", picture(16), 4, tone(4.0))
    again(tmp_path / "one.mp4", "one.ts")
    (tmp_path / "two.ts").write_bytes((tmp_path / "one.ts").read_bytes() * 2)
    for read in (read_audio, lambda p: read_video(p, 4), stream_hashes):
        with pytest.raises(MediaError, match=r"two\.ts: .*jump back"):
            read(tmp_path / "two.ts")


def test_out_of_phase_stereo_is_heard(tmp_path: Path) -> None:
    bark, hiss = tone(), 0.005 * np.random.default_rng(0).standard_normal(2 * RATE)
    for left, right in ((bark, -bark), (bark + hiss, hiss - bark), (bark, -0.7 * bark)):
        wave = read_audio(coded(tmp_path / "x.mov", np.stack([left, right])))
        wanted = np.sqrt(np.mean((np.abs(left - right) / 2) ** 2))  # half the difference
        assert np.sqrt(np.mean(wave**2)) == pytest.approx(wanted, rel=0.05)
    # The first second in phase, the second not: both as loud as each channel.
    sign = np.where(np.arange(2 * RATE) < RATE, 1, -1)
    wave = read_audio(coded(tmp_path / "x.mov", np.stack([bark, bark * sign])))
    assert np.abs(wave[:14_000]).max() == pytest.approx(0.5, abs=0.02) and np.abs(wave[18_000:]).max() == pytest.approx(0.5, abs=0.05)
    # Out of phase beside another sound in phase: both are there.
    low, high = tone(hertz=300), tone(hertz=2000)
    wave = read_audio(coded(tmp_path / "x.mov", np.stack([low + high, low - high])))
    spectrum = np.abs(np.fft.rfft(wave)) * 2 / len(wave)
    assert spectrum[600] == pytest.approx(0.5, abs=0.03) and spectrum[4000] == pytest.approx(0.5, abs=0.05)


def test_ordinary_stereo_stays_the_mean(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    left, right = 0.2 * random.standard_normal((2, 4 * RATE)).astype(np.float32)
    for one, two in ((left, right), (left, left), (left, 0 * left), (left + right, left - 0.5 * right)):
        wave = read_audio(coded(tmp_path / "x.mov", np.stack([one, two])))
        assert np.array_equal(wave, np.float32([one, two]).mean(0))


def test_surround(tmp_path: Path) -> None:
    """FL FR FC LFE BL BR; a sound in one channel is as loud as two loudspeakers would play it: 0.5, 0.5, 0.707, 0.5, 0.354, 0.354 of it."""
    for channel, factor in enumerate((0.5, 0.5, 0.707, 0.5, 0.3535, 0.3535)):
        channels = np.zeros((6, 2 * RATE), np.float32)
        channels[channel] = tone()
        wave = read_audio(coded(tmp_path / "x.mkv", channels, "5.1"))
        assert np.abs(wave).max() == pytest.approx(0.5 * factor, rel=0.02), channel
    wave = read_audio(coded(tmp_path / "x.mkv", np.tile(2 * tone(), (6, 1)), "5.1"))
    assert np.abs(wave).max() == pytest.approx(1.0, abs=0.01)  # no louder than full scale


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e4])
def test_samples_that_are_no_sound_are_refused(bad: float, tmp_path: Path) -> None:
    wave = tone()
    wave[100] = bad
    with pytest.raises(MediaError, match=rf"x\.mov has samples .*{'no numbers' if not np.isfinite(bad) else 'full scale'}"):
        read_audio(coded(tmp_path / "x.mov", wave[None], "mono"), muted=True)


def test_the_default_track_and_no_cover(tmp_path: Path) -> None:
    """A cover picture before the film, and two sounds of which the second is marked."""
    path = tmp_path / "x.mkv"
    with av.open(str(path), "w") as out:
        cover, video = out.add_stream("mjpeg", rate=1), out.add_stream("libx264", rate=4)
        sounds = [out.add_stream("aac", rate=RATE, layout="mono") for _ in range(2)]
        cover.width = cover.height = 32
        cover.pix_fmt = "yuvj420p"
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        cover.disposition, video.disposition = Disposition.attached_pic, Disposition.default
        sounds[0].disposition, sounds[1].disposition = Disposition(0), Disposition.default
        frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), 250, np.uint8), format="rgb24")
        frame.pts, frame.time_base = 0, Fraction(1)
        packets = [*cover.encode(frame), *cover.encode(None)]
        for i, image in enumerate(picture()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 4)
            packets += video.encode(frame)
        packets += video.encode(None)
        for stream, hertz in zip(sounds, (300, 1000), strict=True):
            sound = av.AudioFrame.from_ndarray(tone(hertz=hertz)[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
            packets += [*stream.encode(sound), *stream.encode(None)]
        out.mux(packets)
    assert read_video(path, 4).shape == (8, 3, 64, 64)
    for file in (path, mux_and(path, path, tmp_path)):
        assert np.abs(np.fft.rfft(read_audio(file)[:RATE])).argmax() == pytest.approx(1000, abs=2)


@pytest.mark.parametrize(("codec", "ending"), [("wmv2", "avi"), ("flv", "flv"), ("h263", "avi"), ("libvpx", "webm")])
def test_what_an_mp4_cannot_hold(one: Path, codec: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{ending}"
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=25)
        video.width, video.height, video.pix_fmt = 128, 96, "yuv420p"
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((96, 128, 3), 20 * i, np.uint8), format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 25)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    assert read_video(path, 4).shape[0] == 2
    with pytest.raises(MediaError, match=rf"/x\.{ending}: its picture is \w+, which an mp4 cannot hold\. Convert it first"):
        mux(path, one, tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("kind", ["video", "audio"])
@pytest.mark.parametrize("way", ["zeros", "noise"])
def test_damage_in_the_middle(kind: str, way: str, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    frames = random.integers(0, 256, (32, 64, 64, 3), dtype=np.uint8)
    write_mp4(tmp_path / "x.mp4", frames, 8, tone(4.0))
    write_mp4(tmp_path / "good.mp4", frames, 8, tone(4.0))
    data = bytearray((tmp_path / "x.mp4").read_bytes())
    with av.open(str(tmp_path / "x.mp4")) as container:
        places = [(p.pos, p.size) for p in container.demux(**{kind: 0}) if p.size and 2 <= float((p.pts or 0) * p.time_base) < 3]
    for pos, size in places:
        assert pos is not None
        data[pos : pos + size] = bytes(size) if way == "zeros" else random.integers(0, 256, size, dtype=np.uint8).tobytes()
    (tmp_path / "x.mp4").write_bytes(data)
    pair = ("x.mp4", "good.mp4") if kind == "video" else ("good.mp4", "x.mp4")
    for read in (lambda: read_video(tmp_path / "x.mp4", 8) if kind == "video" else read_audio(tmp_path / "x.mp4"),
                 lambda: mux(tmp_path / pair[0], tmp_path / pair[1], tmp_path / "out.mp4")):  # fmt: skip
        with pytest.raises(MediaError, match=r"/x\.mp4 is damaged or truncated: its \w+ cannot be decoded after (1\.[89]|2\.\d) s"):
            read()
    assert not (tmp_path / "out.mp4").exists()


def test_equal_hashes_are_equal_media(one: Path, tmp_path: Path) -> None:
    """The same packets at other times, or trimmed otherwise, are another stream; a copy of a copy is the same."""
    late = again(one, "late.mp4", later={"audio": 1.0})
    assert stream_hashes(late)[0] == stream_hashes(one)[0] and stream_hashes(late)[1] != stream_hashes(one)[1]
    together = again(one, "together.mp4", later={"audio": 1.0, "video": 1.0})
    assert len(read_audio(together)) - len(read_audio(one)) in range(2 * 1024)
    mp3 = _mp3(tmp_path / "mp3.mkv")
    copies = [mux_and(mp3, mp3, tmp_path)]
    mux(copies[0], copies[0], tmp_path / "copy.mp4")
    files = [mp3, *copies, tmp_path / "copy.mp4"]
    for a in files:
        for b in files:
            assert (stream_hashes(a)[1] == stream_hashes(b)[1]) <= np.array_equal(read_audio(a), read_audio(b)), (a, b)
    assert stream_hashes(copies[0]) == stream_hashes(tmp_path / "copy.mp4")


def _mp3(path: Path) -> Path:
    with av.open(str(path), "w") as out:
        video, audio = out.add_stream("libx264", rate=4), out.add_stream("libmp3lame", rate=RATE, layout="stereo")
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for i, image in enumerate(picture()):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 4)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(np.stack([tone(), tone()]), format="fltp", layout="stereo")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        out.mux(audio.encode(sound))
        out.mux(audio.encode(None))
    return path


def test_lengths_are_those_of_the_packets(one: Path, tmp_path: Path) -> None:
    """Headers that say another length than the file has."""
    for box, offset, size in ((b"mvhd", 20, 4), (b"tkhd", 24, 4), (b"mdhd", 20, 4)):
        data = bytearray(one.read_bytes())
        at = data.index(box) + offset
        data[at : at + size] = struct.pack(">I", 1)
        (tmp_path / "short.mp4").write_bytes(data)
        assert np.array_equal(read_video(tmp_path / "short.mp4", 4), read_video(one, 4)), box
        assert len(read_audio(tmp_path / "short.mp4")) == len(read_audio(one)), box


def test_bytes_behind_the_boxes_are_no_truncation(one: Path) -> None:
    """What some phones put at a file's end."""
    wave = read_audio(one)
    one.write_bytes(one.read_bytes() + b"\x00\x00\x00\xffSEFH" + bytes(20))
    assert np.array_equal(read_audio(one), wave)


def test_frames_are_reduced_one_by_one(one: Path) -> None:
    shapes = []

    def half(frames: np.ndarray) -> np.ndarray:
        shapes.append(frames.shape)
        return frames[:, :, ::2, ::2]

    assert np.array_equal(read_video(one, 8, half), read_video(one, 8)[:, :, ::2, ::2])
    assert shapes == [(1, 3, 64, 64)] * 8  # each picture once, though shown twice


def coded_pictures(path: Path, codec: str, times: Sequence[float], options: dict[str, str] | None = None, pix: str = "yuv420p") -> Path:
    """Pictures of growing brightness at these times, in milliseconds of the file's clock where its container has one."""
    unit = Fraction(1, 10) if path.suffix == ".avi" else Fraction(1, 1000)
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=10, options=options or {})
        video.width, video.height, video.pix_fmt, video.bit_rate = 64, 64, pix, 800_000
        video.codec_context.time_base = unit
        for shade, at in zip(np.linspace(20, 220, len(times)).round(), times, strict=True):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), shade, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(at / unit), unit
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    return path


@pytest.mark.parametrize(("codec", "options"), [("mpeg4", {"bf": "0"}), ("mpeg4", {"bf": "2"}), ("libx264", {"x264-params": "bframes=3:b-adapt=0"})])
def test_avi(codec: str, options: dict[str, str], one: Path, tmp_path: Path) -> None:
    """No presentation times in the file; 40 pictures at 10 a second, every fifth is asked for."""
    path = coded_pictures(tmp_path / "x.avi", codec, [i / 10 for i in range(40)], options)
    wanted = np.linspace(20, 220, 40).round()[::5]
    mux(path, one, tmp_path / "out.mp4")
    for file in (path, tmp_path / "out.mp4"):
        assert np.abs(read_video(file, 2).mean((1, 2, 3)) - wanted).max() < 4  # one picture is 5


def test_variable_frame_rate_and_other_codecs(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.2, 0.9, 1.0, 2.5, 2.6, 3.7]
    shades = np.linspace(20, 220, 8).round()
    for name, codec, pix in (("a.mp4", "libx264", "yuv420p"), ("b.mkv", "libx264", "yuv420p10le"), ("c.webm", "libvpx-vp9", "yuv420p")):
        got = read_video(coded_pictures(tmp_path / name, codec, times, pix=pix), 2).mean((1, 2, 3))
        # At 0, 0.5, 1, ... seconds the last that began: numbers 0, 2, 4, 4, 4, 5, 6, 6 of them.
        assert np.abs(got[:8] - shades[[0, 2, 4, 4, 4, 5, 6, 6]]).max() < 5, name


def ticking(path: Path, rate: Fraction, late: Fraction, hertz: int, b_frames: int = 0, sound_late: Fraction = Fraction(0)) -> None:
    """Two seconds at `rate` pictures a second whose first comes `late` seconds after zero, sound at `hertz` that comes `sound_late` after it."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"x264-params": f"bframes={b_frames}:b-adapt=0"})
        video.width = video.height = 64
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=hertz, layout="mono")
        for i, image in enumerate(picture(round(2 * rate))):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = round(late * rate) + i, 1 / rate
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        wave = np.interp(np.arange(2 * hertz) / hertz, np.arange(2 * RATE) / RATE, tone()).astype(np.float32)
        sound = av.AudioFrame.from_ndarray(wave[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = hertz, round(sound_late * hertz), Fraction(1, hertz)
        container.mux(audio.encode(sound))
        container.mux(audio.encode(None))


@pytest.mark.parametrize(
    ("rate", "late", "hertz", "sound_late"),
    [
        (Fraction(10), Fraction(1), 16_000, Fraction(1)),
        (Fraction(25), Fraction(1), 44_100, Fraction(1)),
        (Fraction(30_000, 1001), Fraction(1001, 30_000), 16_000, Fraction(0)),
        (Fraction(24), Fraction(1, 6), 22_050, Fraction(1, 9)),
    ],
)
@pytest.mark.parametrize("b_frames", [0, 2])
def test_a_copy_is_copied_exactly(rate: Fraction, late: Fraction, hertz: int, sound_late: Fraction, b_frames: int, tmp_path: Path) -> None:
    """Copies of copies keep every packet's time: what `mux` returns for the first is what every later one has."""
    ticking(tmp_path / "0.mp4", rate, late, hertz, b_frames, sound_late)
    chain = [mux(tmp_path / f"{i}.mp4", tmp_path / f"{i}.mp4", tmp_path / f"{i + 1}.mp4") for i in range(4)]
    assert len(set(chain)) == 1
    for kind in ("video", "audio"):
        copies = [packets(tmp_path / f"{i}.mp4", kind) for i in range(1, 5)]
        assert all(copy == copies[0] for copy in copies)


@pytest.mark.parametrize("ending", ["mkv", "webm", "flv", "ts"])
def test_truncated_without_boxes(ending: str, tmp_path: Path) -> None:
    """Matroska says how long its segment is, flv how long it lasts, a transport stream's packets are of one length: what is cut off is missed,
    and no short clip is made of the rest."""
    whole = tmp_path / f"whole.{ending}"
    with av.open(str(whole), "w", format="matroska" if ending == "mkv" else None) as out:
        video = out.add_stream("libvpx" if ending == "webm" else "libx264", rate=4)
        audio = out.add_stream("libopus" if ending == "webm" else "aac", rate=48_000 if ending == "webm" else 44_100, layout="mono")
        video.width, video.height, video.pix_fmt = 64, 64, "yuv420p"
        for i, image in enumerate(picture(16)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, 4)
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        sound = av.AudioFrame.from_ndarray(tone(4.0)[None], format="fltp", layout="mono")
        sound.sample_rate, sound.pts, sound.time_base = RATE, 0, Fraction(1, RATE)
        for piece in [*av.AudioResampler("fltp", "mono", audio.rate, audio.frame_size or 960).resample(sound), None]:
            out.mux(audio.encode(piece))
    assert read_video(whole, 4).shape[0] in (16, 17) and 3.9 < len(read_audio(whole)) / RATE < 4.2
    for share in (0.2, 0.4, 0.6):
        (tmp_path / f"cut.{ending}").write_bytes(whole.read_bytes()[: int(whole.stat().st_size * share)])
        for read in (read_audio, lambda p: read_video(p, 4), stream_hashes):
            with pytest.raises(MediaError, match=rf"cut\.{ending} is (damaged or )?truncated"):
                read(tmp_path / f"cut.{ending}")


def test_a_live_recording_says_no_length(one: Path, tmp_path: Path) -> None:
    """As a browser's MediaRecorder writes it: a segment of unknown size, no duration."""
    with av.open(str(one)) as source, av.open(str(tmp_path / "live.mkv"), "w", format="matroska", options={"live": "1"}) as out:
        targets = {s.index: out.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.size:
                packet.stream = targets[packet.stream.index]
                out.mux(packet)
    assert b"\x18\x53\x80\x67\x01" + b"\xff" * 7 in (tmp_path / "live.mkv").read_bytes()
    assert read_video(tmp_path / "live.mkv", 4).shape[0] in (8, 9)
