"""mp4 files: what goes in comes out, muxing leaves packets alone, and bad files say what is wrong with them."""

import hashlib
import io
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

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
