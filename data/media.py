"""Reading and writing mp4 files with PyAV: frames, sound, and packet-exact muxing.

    write_mp4("a.mp4", frames, fps=4, wave=wave)      # H.264 + AAC, the same bytes for the same input
    frames = read_video("a.mp4", fps=2)               # uint8 (n, 3, h, w)
    wave = read_audio("a.mp4")                        # float32 (samples,), 16 kHz
    mux("a.mp4", "b.mp4", "ab.mp4")                   # the picture of a with the sound of b, nothing re-encoded
    video_sha256, audio_sha256 = stream_hashes("ab.mp4")

Every failure is a `MediaError` with one sentence that names the file and what to do.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np
from av.sidedata.sidedata import Type
from av.stream import Disposition

from data.clips import DataError

RATE = 16_000
SILENT_PEAK = 1e-3  # -60 dB of full scale: below this nothing can be heard
AUDIO_BIT_RATE = 64_000
# One thread: x264 gives the same bytes only for the same number of threads. No B-frames: decoding order is display order.
# cpu-independent: x264 otherwise takes code by the processor, which rounds differently, and its AVX-512 code (macroblock-tree) reads
# memory that nobody wrote at most frame widths, so that bytes depended on what the process had done before.
X264 = {"crf": "20", "preset": "veryfast", "x264-params": "threads=1:bframes=0:scenecut=0:cpu-independent=1", "threads": "1"}
MP4 = {"fflags": "+bitexact"}
# A copy writes its edit lists on a clock that divides the usual sample rates and frame rates: on the default one, milliseconds, every copy of
# a copy moved its picture.
COPY = {**MP4, "movie_timescale": "480000"}
# What `mux` writes into its files. In a swap neither stream may begin at 0 (a picture that comes late with a sound that comes late): there the
# first of both is not where the clip begins.
FROM_ZERO = "times count from zero"
APART = 0.04  # seconds by which a time stamp must be off before samples are moved: a token of sound; less is jitter of the stamps
PAUSE = 10  # seconds in which neither stream has anything: FFmpeg's own threshold for a clock that was set anew
PRIMING = 0.1  # seconds by which pictures come late in many files, since the sound's encoder puts silence before it
JUMP = 1  # seconds; times that go back by more are not one recording
LOUDEST = 8.0  # times full scale: what coding adds stays below, integers called floating point do not
CONVERT = "Convert it first, for instance: ffmpeg -i OLD -c:v libx264 -pix_fmt yuv420p -c:a aac NEW.mp4"
UNNAMED = {3: "2.1", 4: "4.0", 5: "5.0", 6: "5.1", 7: "6.1", 8: "7.1"}  # FFmpeg's own defaults for so many channels
OTHER_HASH = (
    "the file was exchanged, or the row was written before hashes held times and lengths: build the folder again, or write its rows anew "
    "with data.media.stream_hashes"
)
LISTS = ("concat", "hls", "dash", "sdp")  # FFmpeg follows them, whatever the file's name
BOXES = {b"ftyp", b"moov", b"mdat", b"moof", b"free", b"skip", b"wide", b"udta", b"uuid", b"meta", b"mfra", b"sidx", b"styp", b"pdin"}


EBML, SEGMENT = b"\x1a\x45\xdf\xa3", b"\x18\x53\x80\x67"


class MediaError(DataError):
    """A media file that cannot be used. The message names the file and the remedy."""


def _check_boxes(path: Path | str) -> None:
    """Raise if an mp4 (or mov) ends inside one of its top-level boxes, or a Matroska file inside its segment: FFmpeg opens such files, and
    reads what is there."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        at = 0
        while at < size:
            file.seek(at)
            head = file.read(16)
            if at == 0 and head[:4] == EBML:
                at = _segment_end(file) or size
                break
            if at == 0 and head[4:8] != b"ftyp":
                return  # another container
            length = int.from_bytes(head[:4], "big")
            if length == 1:  # a 64-bit length follows
                length = int.from_bytes(head[8:16], "big")
            if length == 0 or head[4:8] not in BOXES:  # the last box, up to the end of the file; or what a maker of phones puts behind all boxes
                return
            at += max(length, 8)
        if at > size or size == 0:
            raise MediaError(f"{path} is truncated: at least {max(1, at - size)} bytes are missing. Copy or build it again.")


def _segment_end(file: BinaryIO) -> int | None:
    """Where the segment of a Matroska file (or webm), which holds all media, ends; None where it does not say (recorded live)."""
    file.seek(0)
    head = file.read(1024)
    at = len(EBML)
    for element in (b"", SEGMENT):  # the header, then the segment
        if element and head[at : at + 4] != element:
            return None
        at += len(element)
        if at >= len(head) or head[at] == 0:
            return None
        digits = 9 - head[at].bit_length()  # the leading zeros of the first byte say how many bytes the number has
        length = int.from_bytes(head[at : at + digits], "big") & ((1 << 7 * digits) - 1)
        if length == (1 << 7 * digits) - 1 or (element and length == 0):
            return None
        at += digits + length
    return at


@contextlib.contextmanager
def _opened(path: Path | str) -> Iterator[Any]:
    """A container open for reading; whatever fails inside the block becomes a MediaError that names the file."""
    try:
        _check_boxes(path)
        with av.open(str(path), metadata_errors="ignore") as container:
            if container.format.name in LISTS:
                raise MediaError(f"{path} is a list of other files ({container.format.name}), whose media could change behind it. {CONVERT}")
            if container.format.name == "mpegts" and all(os.path.getsize(path) % length for length in (188, 192, 204)):
                raise MediaError(f"{path} is truncated: it ends inside a packet. Copy or build it again.")
            yield container
    except (DataError, MemoryError):
        raise
    except FileNotFoundError as error:
        raise MediaError(f"{path} does not exist. Put the file there, or take its line out of clips.jsonl.") from error
    except Exception as error:  # FFmpeg's errors, and what PyAV raises on media that it did not expect (ValueError, TypeError, ...)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise MediaError(f"{path} cannot be read as media ({reason}): it is truncated or of another kind. Copy or build it again.") from error


@dataclass
class _Stream:
    """What the packets of a stream say, in seconds on the file's clock: stated lengths and headers are hints, and are not asked."""

    index: int
    default: bool
    step: Fraction
    """How long a packet lasts that does not say so: as long as the one before."""
    packets: int = 0
    starts: Fraction = Fraction(0)
    ends: Fraction = Fraction(0)
    decoded: Fraction | None = None
    gaps: list[tuple[Fraction, Fraction]] = field(default_factory=list)

    def add(self, path: Path | str, packet: Any) -> None:
        """One more packet, as it comes. Raises MediaError where times go back by more than `JUMP`."""
        self.packets += 1
        shown = packet.pts if packet.pts is not None else packet.dts
        order = packet.dts if packet.dts is not None else packet.pts
        if shown is None or order is None:
            start, order = self.ends, self.ends  # raw streams: one after the other
        else:
            start, order = shown * packet.time_base, order * packet.time_base
        if self.decoded is not None and order < self.decoded - JUMP:
            raise MediaError(f"{path}: its times jump back by {float(self.decoded - order):.1f} s, so nothing has one place. {CONVERT}")
        last, self.decoded = self.decoded, order if self.decoded is None else max(self.decoded, order)
        if packet.is_discard:  # before an edit list's beginning, or after its end: decoded, never shown
            return
        if packet.duration:
            self.step = packet.duration * packet.time_base
        elif last is not None and order > last:
            self.step = order - last
        end = start + self.step
        if packet.stream.type == "audio":
            start += Fraction(_skipped(packet)[0], packet.stream.codec_context.sample_rate or 1)
        if self.starts == self.ends:
            self.starts, self.ends = start, end
        if start - self.ends > PAUSE:
            self.gaps.append((self.ends, start))
        self.starts, self.ends = min(self.starts, start), max(self.ends, end)


@dataclass(frozen=True)
class _Tracks:
    """The picture and the sound that a player would choose."""

    video: _Stream | None
    audio: _Stream | None
    from_zero: bool = False
    """A file of `mux`, whose times are those of the clips that it was made of."""

    @property
    def zero(self) -> Fraction:
        """When a player begins: with the first of both, but for files of `mux`."""
        if self.from_zero:
            return Fraction(0)
        return min((s.starts for s in (self.video, self.audio) if s), default=Fraction(0))

    @property
    def video_seconds(self) -> Fraction:
        """When the picture ends, from `zero` on."""
        return self.video.ends - self.zero if self.video else Fraction(0)


def _skipped(packet: Any) -> tuple[int, int]:
    """Samples that decoding a packet takes off, at its beginning (priming) and end (padding)."""
    if not packet.has_sidedata("skip_samples"):
        return 0, 0
    return struct.unpack("<II", bytes(packet.get_sidedata("skip_samples"))[:8])


def _best(container: Any, kind: str) -> list[Any]:
    """The streams of a kind that a player may choose: no cover pictures, no thumbnails."""
    no = Disposition.attached_pic | Disposition.timed_thumbnails
    return [s for s in container.streams if s.type == kind and not s.disposition & no]


def _tracks(path: Path | str, container: Any) -> _Tracks:
    """One pass over all packets. The container is at its end afterwards."""
    streams = [*_best(container, "video"), *_best(container, "audio")]
    found = {}
    for stream in streams:
        rate = stream.average_rate if stream.type == "video" else None
        found[stream.index] = _Stream(stream.index, bool(stream.disposition & Disposition.default), 1 / rate if rate else Fraction(0))
    for packet in container.demux(streams) if streams else ():
        if packet.size:
            found[packet.stream.index].add(path, packet)
    if container.format.name == "flv" and container.duration:  # whose end looks like any other place in it
        stated, read = container.duration / av.time_base, max((s.ends for s in found.values()), default=Fraction(0))
        if stated - read > max(0.5, 0.1 * stated):
            raise MediaError(f"{path} is truncated: it says that it lasts {stated:.1f} s, and {float(read):.1f} s are there. Copy or build it again.")
    chosen = []
    for kind in ("video", "audio"):
        mine = [found[s.index] for s in streams if s.type == kind and found[s.index].packets]
        chosen.append(min(mine, key=lambda s: (not s.default, s.index), default=None))
    video, audio = chosen
    for a, b in video.gaps if video and audio else ():
        for c, d in audio.gaps if audio else ():
            if min(b, d) - max(a, c) > PAUSE:
                raise MediaError(f"{path}: nothing is shown or heard for {float(min(b, d) - max(a, c)):.0f} s: its clock was set anew. {CONVERT}")
    return _Tracks(video, audio, "mp4" in container.format.name and container.metadata.get("comment") == FROM_ZERO)


def _scan(path: Path | str) -> _Tracks:
    """What the packets of a file say. Hashing and reading it ask one after the other, so the last files' answers are kept."""
    try:
        stat = os.stat(path)
    except OSError:
        with _opened(path) as container:  # says what is wrong with it
            return _tracks(path, container)
    return _scanned(path, stat.st_ino, stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _scanned(path: Path | str, *_: int) -> _Tracks:
    with _opened(path) as container:
        return _tracks(path, container)


def _video_stream(path: Path | str, tracks: _Tracks, container: Any) -> Any:
    if tracks.video is None:
        covers = any(s.type == "video" and s not in _best(container, "video") for s in container.streams)
        raise MediaError(f"{path} has no video stream{' but a cover picture' if covers else ''}. Every clip needs one: mux a picture.")
    return _decodable(path, container.streams[tracks.video.index])


def _audio_stream(path: Path | str, tracks: _Tracks, container: Any) -> Any:
    if tracks.audio is None:
        raise MediaError(f'{path} has no sound track. Mux one, or call the clip "muted" in clips.jsonl.')
    return _decodable(path, container.streams[tracks.audio.index])


def _decodable(path: Path | str, stream: Any) -> Any:
    if stream.codec_context is None:
        raise MediaError(f"{path}: its {stream.type} is coded in a way that is not known here. {CONVERT}")
    return stream


def _decoded(path: Path | str, container: Any, stream: Any, zero: Fraction) -> Iterator[Any]:
    """The frames of a stream in the order in which they are shown. Raises MediaError, with the place, where decoding fails or conceals damage."""
    stream.codec_context.thread_count = 1
    at, good = 0.0, False
    try:
        for frame in container.decode(stream):
            at = float(frame.time - zero) if frame.time is not None else at
            # Where a recording begins between key frames, its first pictures lack what they refer to: no damage.
            if frame.is_corrupt and (good or getattr(frame, "key_frame", True)):
                raise MediaError(_damaged(path, stream, at))
            good = good or not frame.is_corrupt
            yield frame
    except av.error.FFmpegError as error:
        raise MediaError(_damaged(path, stream, at)) from error


def _damaged(path: Path | str, stream: Any, at: float) -> str:
    what = "picture" if stream.type == "video" else "sound"
    return f"{path} is damaged or truncated: its {what} cannot be decoded after {max(0.0, at):.1f} s. Copy or build it again."


def _write(path: Path | str, buffer: io.BytesIO) -> None:
    """Files are coded in memory and written at once, so that a full disk shows here and leaves no half a file."""
    try:
        Path(path).write_bytes(buffer.getvalue())
    except OSError as error:
        if Path(path).is_file():
            Path(path).unlink()
        raise MediaError(f"{path} cannot be written ({error.strerror}). Free some space or choose another folder, then run again.") from error


def write_mp4(path: Path | str, frames: np.ndarray, fps: float, wave: np.ndarray | None, rate: int = RATE) -> None:
    """Write frames, uint8 (n, h, w, 3), and a mono wave, float32 in [-1, 1], as H.264 (yuv420p) and AAC.

    The same input gives the same bytes (one encoder thread, no dates, no encoder tags). `wave=None` writes no sound track.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or len(frames) < 1:
        raise MediaError(f"{path}: frames must be uint8 (n, h, w, 3), not {frames.dtype} {frames.shape}.")
    if frames.shape[1] % 2 or frames.shape[2] % 2:
        raise MediaError(f"{path}: H.264 with yuv420p needs an even height and width, not {frames.shape[1]} x {frames.shape[2]}.")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options=MP4) as container:
        ratio = Fraction(fps).limit_denominator(1000)
        video: Any = container.add_stream("libx264", rate=ratio, options=X264)
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        video.gop_size = max(1, round(fps * 2))
        audio: Any = None
        if wave is not None:
            audio = container.add_stream("aac", rate=rate, layout="mono", options={"aac_coder": "fast"})  # as good here, half the time
            audio.bit_rate = AUDIO_BIT_RATE
        for i, image in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts, frame.time_base = i, 1 / ratio
            container.mux(video.encode(frame))
        container.mux(video.encode(None))
        if wave is not None:
            sound = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave, dtype=np.float32)[None], format="fltp", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = rate, 0, Fraction(1, rate)
            container.mux(audio.encode(sound))
            container.mux(audio.encode(None))
    _write(path, buffer)


def _picture(path: Path | str, frame: Any, aspect: Fraction | None, size: tuple[int, int] | None) -> np.ndarray:
    """uint8 (h, w, 3) as a player shows it: pixels made square, turned and mirrored by the display matrix; `size` (h, w) where it is given."""
    (a, b), (c, d) = _matrix(path, frame)
    height, width = frame.height, frame.width
    if aspect and aspect != 1:  # the shorter side grows, so that nothing is lost
        if not Fraction(1, 16) <= aspect <= 16:
            raise MediaError(f"{path} says that its pixels are {float(aspect):.3g} times as wide as high, which cannot be. {CONVERT}")
        height, width = (height, round(width * aspect)) if aspect > 1 else (round(height / aspect), width)
    if size is not None:  # of the first picture: some files change theirs on the way
        height, width = size if a or d else size[::-1]
    if (height, width) == (frame.height, frame.width):
        image = frame.to_ndarray(format="rgb24")
    else:
        image = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    if not (a or d):  # x' = c y, y' = b x
        image = image.transpose(1, 0, 2)
    return image[:: -1 if b < 0 or d < 0 else 1, :: -1 if a < 0 or c < 0 else 1]


def _matrix(path: Path | str, frame: Any) -> tuple[tuple[int, int], tuple[int, int]]:
    """The signs ((a, b), (c, d)) of the display matrix: a pixel at (x, y) is shown at (a x + c y, b x + d y)."""
    side = frame.side_data.get(Type.DISPLAYMATRIX)
    if side is None:
        return (1, 0), (0, 1)
    a, b, _, c, d, *_ = struct.unpack("<9i", bytes(side)[:36])
    large = max(abs(a), abs(b), abs(c), abs(d)) / 8
    signs = [int(np.sign(x)) if abs(x) > large else 0 for x in (a, b, c, d)]
    if not (signs[0] and signs[3] and not signs[1] and not signs[2]) and not (signs[1] and signs[2] and not signs[0] and not signs[3]):
        raise MediaError(f"{path} is to be shown turned by {abs(frame.rotation)} degrees; only quarter turns and mirrors are known here. {CONVERT}")
    return (signs[0], signs[1]), (signs[2], signs[3])


def read_video(path: Path | str, fps: float, resize: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray:
    """Frames at times 0, 1/fps, 2/fps, ... as a player shows them: uint8 (n, 3, h, w), n = round(length x fps) and at least 2.

    Time 0 is where the first of picture and sound begins. Each frame is the last picture shown at or before its time, or else the first
    that is shown before the next frame's time; black where there is none. Where pictures begin up to 0.1 s after a frame's time (sound has
    priming), times are counted from there. A video shorter than 2 / fps repeats its last picture.
    resize: what to make of each frame, uint8 (1, 3, h, w), as soon as it is decoded, so that full frames are never all in memory.
    """
    tracks = _scan(path)
    out: np.ndarray | None = None
    shown: Any = None
    size: tuple[int, int] | None = None
    now = 0.0
    with _opened(path) as container:
        stream = _video_stream(path, tracks, container)
        assert tracks.video is not None
        aspect, step = stream.sample_aspect_ratio, float(tracks.video.step)
        first = float(tracks.video.starts - tracks.zero)
        k = int((first + 1e-4) * fps)  # black until the step in which the first picture comes
        late = first - k / fps if first - k / fps < PRIMING else 0.0
        n = max(2, k + 1, round((float(tracks.video_seconds) - late) * fps))
        for frame in itertools.chain(_decoded(path, container, stream, tracks.zero), [None]):
            if frame is None:
                now = float("inf")
            else:
                now = float(frame.time - tracks.zero) if frame.time is not None else now + step if shown is not None else now
            image: np.ndarray | None = None
            while shown is not None and k < n and late + k / fps < now - 1e-4:
                if image is None:
                    full = _picture(path, shown, aspect, size)
                    size = full.shape[:2]
                    image = np.ascontiguousarray(full.transpose(2, 0, 1)[None])
                    try:
                        image = image if resize is None else resize(image)
                    except ValueError as error:
                        raise MediaError(f"{path}: {error}") from error
                    out = np.zeros((n, *image.shape[1:]), np.uint8) if out is None else out
                assert out is not None
                out[k] = image[0]
                k += 1
            shown = frame or shown
    if out is None:
        raise MediaError(f"{path} is truncated: no picture can be decoded. Copy or build it again.")
    return out


def read_audio(path: Path | str, rate: int = RATE, muted: bool = False) -> np.ndarray:
    """The sound track as float32 (samples,), mixed to mono and resampled to `rate`; the encoder's priming is taken off.

    Every sample lies at its time: gaps are silence, and so is what comes before a sound that begins after its picture. The mono is the
    mean of both sides, where these do not cancel each other out. A track that is missing, or silent (peak below -60 dB), raises
    MediaError unless `muted=True`: then it is returned as it is, a missing or empty one as zeros of the video's length.
    """
    tracks = _scan(path)
    if muted and tracks.audio is None:
        return np.zeros(round(float(tracks.video_seconds) * rate), dtype=np.float32)
    pieces: list[tuple[int, np.ndarray]] = []
    with _opened(path) as container:
        stream = _audio_stream(path, tracks, container)
        for start, channels, names in _pieces(path, container, stream, tracks, rate):
            pieces.append((start, _mono(channels, names)))
    total = max((start + len(piece) for start, piece in pieces), default=0)
    wave = np.zeros(max(0, total), dtype=np.float32)
    for start, piece in pieces:
        wave[max(0, start) : max(0, start + len(piece))] = piece[max(0, -start) :]
    if wave.size and not np.isfinite(wave).all():
        raise MediaError(f"{path} has samples that are no numbers in its sound track. {CONVERT}")
    if wave.size and float(np.abs(wave).max()) > LOUDEST:
        raise MediaError(f"{path} has samples of {float(np.abs(wave).max()):.3g} times full scale in its sound track. {CONVERT}")
    if not muted and (wave.size == 0 or float(np.abs(wave).max()) < SILENT_PEAK):
        raise MediaError(f'{path} has a silent sound track. Mux a sound, or call the clip "muted" in clips.jsonl.')
    if muted and wave.size == 0:
        return np.zeros(round(float(tracks.video_seconds) * rate), dtype=np.float32)
    return wave


def _pieces(path: Path | str, container: Any, stream: Any, tracks: _Tracks, rate: int) -> Iterator[tuple[int, np.ndarray, list[str]]]:
    """What is sound without a gap: (first sample, (channels, samples), names of the channels), resampled."""
    zero, kind = tracks.zero, None
    resampler: av.AudioResampler | None = None
    begin = end = float(tracks.audio.starts - zero) if tracks.audio else 0.0
    stated = begin + float(stream.duration * stream.time_base) if stream.duration is not None else float("inf")
    parts: list[np.ndarray] = []
    names: list[str] = []
    padded = 0.0  # seconds at the end of the last frame that are padding

    def piece() -> tuple[int, np.ndarray, list[str]]:
        assert resampler is not None
        rest = [f.to_ndarray() for f in resampler.resample(None)]
        wave = np.concatenate([*parts, *rest], axis=1)
        at = round(begin * rate)
        at = 0 if abs(begin) < 0.002 else at  # stamps in milliseconds
        if padded > 0:
            wave = wave[:, : round((end - padded - begin) * rate)]
        return at, wave.astype(np.float32, copy=False), names

    for frame in _decoded(path, container, stream, zero):
        if frame.samples == 0:
            continue
        now = float(frame.time - zero) if frame.time is not None else end
        form = (frame.format.name, frame.layout.name, frame.layout.nb_channels, frame.sample_rate)
        if resampler is None or form != kind or abs(now - end) > APART:
            if now < end - JUMP:
                raise MediaError(f"{path}: its sound jumps back by {end - now:.1f} s at {end:.1f} s. {CONVERT}")
            if resampler is not None:
                padded = 0.0
                yield piece()
            resampler = av.AudioResampler(format="fltp", rate=rate)
            parts, kind, names = [], form, [channel.name for channel in frame.layout.channels]
            begin = end = end if abs(now - end) <= APART else now
        parts += [f.to_ndarray() for f in resampler.resample(frame)]
        seconds = frame.samples / frame.sample_rate
        end += seconds
        padded = 0.0
        if frame.duration and frame.time_base and seconds - float(frame.duration * frame.time_base) > float(frame.time_base):
            padded = seconds - float(frame.duration * frame.time_base)
        if 0 < end - stated < seconds:
            padded = max(padded, end - stated)
    if resampler is not None:
        yield piece()


def _mono(channels: np.ndarray, names: list[str]) -> np.ndarray:
    """(samples,) of (channels, samples): the mean of what two loudspeakers play. What the mean would cancel is put back."""
    if len(channels) == 1:
        return channels[0]
    if len(channels) == 2:
        # The mean of the channels: FFmpeg's own mix to mono makes equal channels 3 dB louder, over full scale.
        return channels.mean(axis=0) + _cancelled(channels[0], channels[1])
    if not set(names) & {"FL", "FR", "FC"} and len(channels) in UNNAMED:  # a file that does not say which is which
        names = [channel.name for channel in av.AudioLayout(UNNAMED[len(channels)]).channels]
    sides = np.zeros((2, channels.shape[1]), np.float32)
    for i, (channel, name) in enumerate(zip(channels, names, strict=True)):
        left, right = _weights(name, i)
        sides += np.array([[left], [right]], np.float32) * channel
    mixed = sides.mean(axis=0) + _cancelled(sides[0], sides[1])
    limit, peak = max(1.0, float(np.abs(channels).max(initial=0.0))), float(np.abs(mixed).max(initial=0.0))
    return mixed if peak <= limit else mixed * np.float32(limit / peak)


def _weights(name: str, number: int) -> tuple[float, float]:
    """How loud a channel is in the left and in the right loudspeaker (ITU-R BS.775, and the low frequencies at -6 dB)."""
    if name in ("FL", "DL", "FR", "DR"):
        return (1.0, 0.0) if name.endswith("L") else (0.0, 1.0)
    if name in ("FC", "TC", "TFC"):
        return 0.707, 0.707
    if name in ("LFE", "LFE2", "BC", "TBC"):
        return 0.5, 0.5
    left = "L" in name if name.strip("0123456789") in {"BL", "SL", "FLC", "WL", "SDL", "TFL", "TBL", "TSL", "BFL", "SSL"} else number % 2 == 0
    return (0.707, 0.0) if left else (0.0, 0.707)


def _cancelled(left: np.ndarray, right: np.ndarray) -> np.ndarray | float:
    """What to add to the mean of two channels so that nothing is lost where one is the other's inverse: miswired cables, pseudo-stereo.

    Times (0.2 s) and bands (80 Hz at 16 kHz) at which the channels' correlation is below -0.7 take half their difference instead. 0.0
    where less than a thousandth of the sound is there: ordinary stereo stays as it is.
    """
    if len(left) < 1024 or float(np.square(left - right).sum()) < 1e-6 * float(np.square(left).sum() + np.square(right).sum()):
        return 0.0
    from scipy.ndimage import uniform_filter
    from scipy.signal import istft, stft

    more = np.zeros_like(left)
    for at in range(0, len(left), 1 << 19):  # half a minute at 16 kHz at a time, so that memory stays small
        one, two = left[at : at + (1 << 19)], right[at : at + (1 << 19)]
        if len(one) < 1024:
            continue
        a, b = (stft(x, nperseg=1024, noverlap=768)[2] for x in (one, two))
        near = (5, 13)  # bands and frames
        cross, power = uniform_filter((a * b.conj()).real, near), uniform_filter(abs(a) ** 2, near) * uniform_filter(abs(b) ** 2, near)
        lost = cross < -0.7 * np.sqrt(np.maximum(power, 1e-30))
        side, mid = (a - b) / 2, (a + b) / 2
        if (abs(side[lost]) ** 2).sum() > 1e-3 * (abs(side) ** 2 + abs(mid) ** 2).sum():
            back = istft(np.where(lost, side - mid, 0), nperseg=1024, noverlap=768)[1]
            more[at : at + len(one)] = back[: len(one)]
    return more


@lru_cache(maxsize=4096)
def _check_decodes(path: str, kind: str, changed: int, size: int) -> None:
    """Raise unless every packet of the stream can be decoded. Once for a file as it is: many swaps are made of one clip."""
    tracks = _scan(path)
    with _opened(path) as container:
        stream = _video_stream(path, tracks, container) if kind == "video" else _audio_stream(path, tracks, container)
        if sum(1 for _ in _decoded(path, container, stream, tracks.zero)) == 0:
            raise MediaError(f"{path} is truncated: nothing of its {kind} can be decoded. Copy or build it again.")


def _packets(path: Path | str, container: Any, stream: Any, zero: Fraction) -> list[Any]:
    """A stream's packets in decoding order, their times counted from `zero`."""
    packets = [p for p in container.demux(stream) if p.size]  # the flushing packet at the end is empty
    if any(p.is_corrupt for p in packets):
        raise MediaError(f"{path} is truncated: its {stream.type} stream is damaged. Copy or build it again.")
    if any(p.pts is None for p in packets):
        raise MediaError(f"{path}: packets of its {stream.type} have no time, and a copy has to say when each is shown. {CONVERT}")
    for packet in packets:
        later = round(zero / packet.time_base)
        packet.pts -= later
        if packet.dts is not None:
            packet.dts -= later
    return packets


def mux(video_from: Path | str, audio_from: Path | str, out: Path | str) -> tuple[str, str]:
    """Write the video stream of one file with the audio stream of another into an mp4, packet by packet, nothing re-encoded.

    Each stream keeps its place on its own file's clock, and its length: a longer sound stays longer, so that it is the same in every cell
    of a grid. Both are decoded first; damage, and what an mp4 cannot hold, raises MediaError. Returns the hashes of the new file's
    streams: those of `video_from` and `audio_from`, unless their container says something that an mp4 says otherwise (mkv: times
    in milliseconds); a file that `mux` wrote is copied exactly.
    """
    for path, kind in ((video_from, "video"), (audio_from, "audio")):
        _scan(path)  # says what is wrong with files that are not there
        status = os.stat(path)
        _check_decodes(str(path), kind, status.st_mtime_ns, status.st_size)
    buffer = io.BytesIO()
    seen, heard = _scan(video_from), _scan(audio_from)
    with _opened(video_from) as pictures:
        video = _video_stream(video_from, seen, pictures)
        video_packets = _packets(video_from, pictures, video, seen.zero)
        with _opened(audio_from) as sounds:
            audio = _audio_stream(audio_from, heard, sounds)
            audio_packets = _packets(audio_from, sounds, audio, heard.zero)
            try:
                with av.open(buffer, "w", format="mp4", options=COPY) as container:
                    container.metadata["comment"] = FROM_ZERO
                    targets = [_copied(container, path, stream) for path, stream in ((video_from, video), (audio_from, audio))]
                    for packets, target in zip((video_packets, audio_packets), targets, strict=True):
                        for packet in packets:
                            packet.stream = target
                            container.mux(packet)
            except (DataError, MemoryError):
                raise
            except Exception as error:
                raise MediaError(
                    f"{video_from} and {audio_from} cannot be copied into one mp4 "
                    f"({getattr(error, 'strerror', None) or error}): {video.codec_context.name} and {audio.codec_context.name}. {CONVERT}"
                ) from error
    _write(out, buffer)
    return stream_hashes(out)


def _copied(container: Any, path: Path | str, stream: Any) -> Any:
    """A stream of the mp4 to copy this one's packets into."""
    try:
        target = container.add_stream_from_template(stream, opaque=True)
    except ValueError as error:
        what = "picture" if stream.type == "video" else "sound"
        raise MediaError(f"{path}: its {what} is {stream.codec_context.name}, which an mp4 cannot hold. {CONVERT}") from error
    if stream.type == "video" and stream.sample_aspect_ratio:
        target.codec_context.sample_aspect_ratio = stream.sample_aspect_ratio
    return target


def _parameters(path: Path | str, stream: Any) -> tuple[Any, ...]:
    """What decides, beside the packets, what is decoded and how it is shown."""
    codec = stream.codec_context
    # What VP8 and VP9 need is in their packets; an mp4 adds a summary.
    extra = b"" if codec.name.startswith(("vp8", "vp9", "libvpx")) else bytes(codec.extradata or b"")
    if stream.type == "audio":
        return extra, codec.sample_rate, codec.layout.nb_channels
    with _opened(path) as container:
        frames = _decoded(path, container, container.streams[stream.index], Fraction(0))
        matrix = next((_matrix(path, frame) for frame in frames), None)
    return extra, codec.width, codec.height, str(stream.sample_aspect_ratio or 1), matrix


def stream_hashes(path: Path | str) -> tuple[str, str]:
    """(sha256 of the video stream, sha256 of the audio stream): the same only for what is decoded to the same pictures and samples at
    the same times, whatever file carries it.

    Made of all that decides that: packets, their times from the clip's beginning, what is cut off at either end, the decoder's
    parameters, and for the picture display matrix and pixel aspect. A file without a sound track has, as its second, the hash of
    silence of the picture's length.
    """
    tracks = _scan(path)
    with _opened(path) as container:
        _video_stream(path, tracks, container)
        streams = {track.index: _decodable(path, container.streams[track.index]) for track in (tracks.video, tracks.audio) if track}
        digests = {index: hashlib.sha256(repr(_parameters(path, stream)).encode()) for index, stream in streams.items()}
        # Places in samples of the sound's own rate and microseconds of the picture: finer than any container's clock.
        units = {index: stream.codec_context.sample_rate if stream.type == "audio" else 1_000_000 for index, stream in streams.items()}
        for packet in container.demux(list(streams.values())):
            if packet.size:
                index = packet.stream.index
                at = None if packet.pts is None else round((packet.pts * packet.time_base - tracks.zero) * units[index])
                length = round((packet.duration or 0) * packet.time_base * units[index])
                digests[index].update(repr((at, length, packet.is_discard, _skipped(packet), packet.size)).encode())
                digests[index].update(bytes(packet))
    silence = hashlib.sha256(f"no sound for {round(tracks.video_seconds * 1_000_000)} us".encode())
    video, audio = (digests.get(track.index, silence) if track else silence for track in (tracks.video, tracks.audio))
    return video.hexdigest(), audio.hexdigest()
