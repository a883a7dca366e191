"""Cut one raw file into clips; every second ends up in a clip or in a refusal with a reason."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.filter import (
    CUT_SHORT,
    DAMAGED,
    MESH_PRESENCE,
    Refusal,
    clip_scores,
    find_subject,
    frame_reasons,
    is_audible,
    runs,
    silence_reason,
    still_lips_reason,
)
from data_prep.options import RunOptions
from echolab.data.media import (
    FPS,
    RATE_HZ,
    AudioTrack,
    encode_flac,
    encode_mp4,
    encode_tracks,
    read_audio_track,
)
from echolab.errors import MediaError
from echolab.geometry import WAN
from echolab.vision.faces import (
    FaceDetector,
    FaceMesh,
    Mesh,
    Rows,
    SceneCuts,
    Track,
    Tracker,
    boxes,
    mouth_from_corners,
)
from echolab.vision.normalize import (
    Crop,
    Grid,
    audio_of,
    boxes_in_crop,
    crop_frame,
    crop_full,
    crop_head,
    has_audio,
    make_grid,
)
from echolab.vision.video_reader import Probe, VideoReader, probe

DETECT_PIXELS = 640  # longer side of the detector's input, pixels
# Fraction of a file's work that is done at the beginning and end of each step.
HASHING, PROBING, READING_AUDIO, TRACKING, CUTTING = (
    (0.0, 0.05), (0.05, 0.25), (0.25, 0.3), (0.3, 0.65), (0.65, 1.0),
)  # fmt: skip

Progress = Callable[[float], None]  # called with the fraction of a file that is done


class Models(NamedTuple):
    """The two face networks; YuNet as a path, since it is loaded again for each frame size."""

    yunet: Path
    mesh: FaceMesh


class Source(NamedTuple):
    """One raw file, with its hash and caption."""

    path: Path
    name: str  # path relative to the source folder
    sha256: str
    caption: str

    def key(self) -> str:
        """Return the prefix of its clips' keys; copies of a file at two paths have two prefixes."""
        digest = hashlib.sha256(f"{self.name}\0{self.sha256}".encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', self.path.stem)[:48]}-{digest[:12]}"


class Clip(NamedTuple):
    """One sample to write."""

    key: str
    members: dict[str, bytes]


class Span(NamedTuple):
    """Consecutive usable frames of the grid with one face."""

    first: int
    last: int
    track: Track


class ProbedFile(NamedTuple):
    """A file with its measurements, and the options for its clips."""

    probe: Probe
    grid: Grid
    audio: AudioTrack | None
    options: RunOptions
    models: Models
    facts: dict[str, Any]  # metadata common to the json of all clips


def read_source(
    source: Source, options: RunOptions, models: Models, progress: Progress
) -> Iterator[Clip | Refusal]:
    """Yield all clips and refusals of one file.

    Raise OSError if the file cannot be read, and MemoryError.
    """
    # A file without decodable frames has no grid, so it is refused as one span.
    try:
        probed = probe(source.path, _step_progress(progress, *PROBING))
    except MediaError as error:
        yield Refusal(0.0, 0.0, str(error))
        return
    try:
        facts = {"source": source.name, "source_sha256": source.sha256, "rate": RATE_HZ, "fps": FPS}
        facts["caption"] = source.caption
        audio = _read_audio(probed, _step_progress(progress, *READING_AUDIO))
        file = ProbedFile(probed, make_grid(probed), audio, options, models, facts)

        # Apply the checks that need no face detection.
        for first, last in probed.damaged:
            if last > probed.end:
                yield Refusal(max(first, probed.end), last, CUT_SHORT)
        refusals = _file_refusals(file)
        if refusals:
            yield from refusals
            return

        # Track faces, divide the file into spans with one face, and cut the spans into clips.
        scenes, tracks = _track(file, _step_progress(progress, *TRACKING))
        spans: list[Span] = []
        for part in _find_spans(file, scenes, tracks):
            if isinstance(part, Refusal):
                yield part
            else:
                spans.append(part)
        yield from _cut_spans(file, spans, source.key(), _step_progress(progress, *CUTTING))
    except MediaError as error:
        yield Refusal(float(probed.times[0]), probed.end, str(error))


def _step_progress(progress: Progress, first: float, last: float) -> Progress:
    """Return the progress of one step, which runs from fraction `first` to `last` of the file."""
    return lambda fraction: progress(first + fraction * (last - first))


def _read_audio(probed: Probe, advance: Progress) -> AudioTrack | None:
    """Return the audio track, None without one; raise MediaError with the kind of its damage."""
    if not probed.has_audio:
        return None
    try:
        return read_audio_track(probed.path, RATE_HZ, advance)
    except MediaError as error:
        problem = str(error).removeprefix(f"{probed.path}: ")
        kind = "no audio" if problem.startswith("the audio track is empty") else "damaged"
        raise MediaError(f"{kind}: {problem}") from error


def _file_refusals(file: ProbedFile) -> list[Refusal]:
    """Return the refusals of a file that is refused before face detection, else an empty list."""
    grid, audio = file.grid, file.audio
    if audio is None:
        reason = "no audio: the file has no audio track"
    elif len(file.probe.times) < 2:
        reason = "too short: a single frame"
    elif not is_audible(audio.samples):
        reason = silence_reason(audio.samples)
    else:
        return []
    # Refuse undecodable frames as damaged, the others for the fault of the file.
    damaged = [DAMAGED if is_damaged else reason for is_damaged in grid.damaged]
    return [
        Refusal(grid.seconds(first), grid.seconds(last), damaged[first])
        for first, last in runs(damaged)
    ]


def _track(file: ProbedFile, progress: Progress) -> tuple[NDArray[np.int64], list[Track]]:
    """Return the scene of each frame, and the tracks in pixels of the full frame."""
    # Detect on frames of reduced size.
    probed, indices, every = file.probe, file.grid.indices, file.options.detect_every
    scale = min(1.0, DETECT_PIXELS / max(probed.width, probed.height))
    width, height = round(probed.width * scale), round(probed.height * scale)
    detector = FaceDetector(file.models.yunet, width, height)
    cuts, tracker, scene = SceneCuts(), Tracker(), -1
    scenes = np.zeros(len(indices), np.int64)
    for k, image in enumerate(VideoReader(probed, width, height).read(indices)):
        begins = cuts.begins(image)
        if begins:
            tracker.cut(k)
            scene += 1
        scenes[k] = scene
        if begins or k % every == 0:
            tracker.add(k, detector.detect(image))
        progress(k / len(indices))

    # Scale the tracks back to the full frame: x and y of box and landmarks, not the score.
    back = np.array([probed.width / width, probed.height / height] * 7 + [1], np.float32)
    tracks = tracker.finish(len(indices), every)
    return scenes, [track._replace(rows=track.rows * back) for track in tracks]


def _find_spans(
    file: ProbedFile, scenes: NDArray[np.int64], tracks: list[Track]
) -> Iterator[Span | Refusal]:
    """Yield the spans with one usable face in one scene, and refusals of the other frames."""
    grid = file.grid
    assert file.audio is not None
    subject = find_subject(tracks, len(grid.indices))
    covered = has_audio(file.audio, grid)
    reasons = frame_reasons(grid, covered, subject, file.options.min_face_pixels)
    for first, last in runs(reasons):
        if reasons[first]:
            yield Refusal(grid.seconds(first), grid.seconds(last), reasons[first])
            continue
        # A new scene or another largest face begins a new span.
        labels = scenes[first:last] * (len(tracks) + 1) + subject.track[first:last]
        for begin, end in runs(labels):
            yield Span(first + begin, first + end, tracks[subject.track[first + begin]])


def _cut_spans(
    file: ProbedFile, spans: list[Span], key: str, progress: Progress
) -> Iterator[Clip | Refusal]:
    """Yield the clips of all spans, and refusals of parts that are too short, silent or still."""
    index, options, probed, done_fraction = 0, file.options, file.probe, 0.0
    min_frames = options.min_frames or options.frames
    # Report progress, though of unknown size, while frames up to the next clip are decoded.
    reader = VideoReader(probed, probed.width, probed.height, lambda _: progress(done_fraction))
    for done, span in enumerate(spans):
        cuts, rest = cut_span(span.first, span.last, options.frames, min_frames)
        for first, last in cuts:
            members = _make_clip(file, reader, span.track, first, last)
            if isinstance(members, Refusal):
                yield members
            else:
                yield Clip(f"{key}-{index:04d}", members)
                index += 1
            fraction = (last - span.first) / (span.last - span.first)
            done_fraction = (done + fraction) / len(spans)
            progress(done_fraction)
        if rest < span.last:
            yield _too_short(file.grid, rest, span.last, min_frames, bool(cuts))


def cut_span(
    first: int, last: int, frames: int, min_frames: int
) -> tuple[list[tuple[int, int]], int]:
    """Return the clips (first, end) of a span, `frames` long each, and the end of the last clip.

    The remainder yields a shorter clip of 4n+1 frames if it has at least `min_frames`.
    """
    # Full clips first, then one shorter clip if the remainder is long enough.
    clips = []
    while last - first >= frames:
        clips.append((first, first + frames))
        first += frames
    rest = WAN.frames(WAN.latent_frames(last - first))
    if last > first and rest >= min_frames:
        clips.append((first, first + rest))
        first += rest
    return clips, first


def _too_short(grid: Grid, first: int, last: int, min_frames: int, is_rest: bool) -> Refusal:
    """Return the refusal of a span with too few frames."""
    count = last - first
    subject = "the rest after the last clip" if is_rest else "a span with one face"
    # The shortest possible clip has five frames.
    hint = (
        f"; min_frames={WAN.frames(WAN.latent_frames(count))} would take it" if count >= 5 else ""
    )
    reason = f"too short: {subject} has {count} frames, a clip needs {min_frames}{hint}"
    return Refusal(grid.seconds(first), grid.seconds(last), reason)


def _make_clip(
    file: ProbedFile, reader: VideoReader, track: Track, first: int, last: int
) -> dict[str, bytes] | Refusal:
    """Return the members of one clip, or the refusal of a silent clip or of still lips."""
    # Check the audio first, since that is cheap.
    grid = file.grid
    assert file.audio is not None
    span = grid.seconds(first), grid.seconds(last)
    samples = audio_of(file.audio, grid, first, last)
    if reason := silence_reason(samples):
        return Refusal(*span, reason)

    # Decode and crop the frames, and measure the mouth in each.
    rows = track.rows[first - track.first : last - track.first]
    crop = _clip_crop(file, boxes(rows))
    frames, meshes = [], []
    for row, image in zip(rows, reader.read(grid.indices[first:last]), strict=True):
        meshes.append(file.models.mesh.find(image, row))
        frames.append(crop_frame(image, crop))
    opening = np.array([mesh.opening for mesh in meshes]) / rows[:, 3]
    if reason := still_lips_reason(opening, np.array([mesh.presence for mesh in meshes])):
        return Refusal(*span, reason)

    # Encode the members of the sample.
    facts = file.facts | {
        "start_seconds": round(span[0], 4),
        "end_seconds": round(span[1], 4),
        "frames": last - first,
        "width": crop.width,
        "height": crop.height,
        "crop": [round(v, 2) for v in crop.box],
        "scores": clip_scores(rows, opening, samples),
    }
    face, lips = (boxes_in_crop(b, crop) for b in (boxes(rows), _lip_boxes(meshes, rows)))
    return {
        "mp4": encode_mp4(np.stack(frames), crf=file.options.crf),
        "flac": encode_flac(samples),
        "tracks.npz": encode_tracks(face, lips, None, {"opening": opening.astype(np.float32)}),
        "json": json.dumps(facts, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace"),
    }


def _clip_crop(file: ProbedFile, faces: NDArray[np.float32]) -> Crop:
    """Return the crop of a clip whose face boxes [T, 4] are `faces`."""
    # A head crop contains all face boxes of the clip, so that the crop does not move.
    width, height = file.probe.width, file.probe.height
    if file.options.crop == "head":
        return crop_head(faces, width, height, file.options.size)
    return crop_full(width, height, file.options.size)


def _lip_boxes(meshes: list[Mesh], rows: Rows) -> NDArray[np.float32]:
    """Return lip boxes [T, 4] from the mesh, or from the detector if the mesh does not fit."""
    return np.stack(
        [
            mesh.lips if mesh.presence >= MESH_PRESENCE else mouth_from_corners(row)
            for mesh, row in zip(meshes, rows, strict=True)
        ]
    )
