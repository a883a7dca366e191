"""One raw file to its clips: every second of it ends in a clip or in a refusal with its reason."""

import hashlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_prep.cut import cut_span
from data_prep.filter import (
    CUT_SHORT,
    DAMAGED,
    MESH_PRESENCE,
    Refusal,
    audible,
    clip_scores,
    find_subject,
    frame_reasons,
    runs,
    silence,
    still_lips,
)
from data_prep.normalize import Grid, heard, make_grid, sound_of
from data_prep.options import RunOptions
from data_prep.pack import (
    cut_out,
    encode_members,
    frame_head,
    frame_whole,
    in_frame,
)
from echolab.data.media import FPS, RATE_HZ, Sound, read_sound
from echolab.errors import MediaError
from echolab.geometry import WAN
from echolab.vision.faces import FaceDetector, FaceMesh, boxes, mouth_from_corners
from echolab.vision.probe import Probe, probe
from echolab.vision.track import SceneCuts, Track, Tracker
from echolab.vision.video_reader import VideoReader

DETECT_PIXELS = 640  # longer side of the picture that the detector sees
# Shares of the work on one file, the first for its hash.
HASHING, PROBING, LISTENING, TRACKING, CUTTING = (
    (0.0, 0.05), (0.05, 0.25), (0.25, 0.3), (0.3, 0.65), (0.65, 1.0),
)  # fmt: skip

Progress = Callable[[float], None]  # share of a file that is done


class Models(NamedTuple):
    """The two face networks, by their files."""

    yunet: Path
    mesh: FaceMesh


class Source(NamedTuple):
    """One raw file."""

    path: Path
    name: str  # its path in the source folder
    sha256: str
    caption: str

    def key(self) -> str:
        """Return what the keys of its clips begin with: the same file in two places has two."""
        digest = hashlib.sha256(f"{self.name}\0{self.sha256}".encode()).hexdigest()
        return f"{re.sub(r'[^A-Za-z0-9_-]+', '_', self.path.stem)[:48]}-{digest[:12]}"


class Clip(NamedTuple):
    """One sample to be written."""

    key: str
    members: dict[str, bytes]


class Span(NamedTuple):
    """Frames of the grid that show one face and no fault."""

    first: int
    last: int
    track: Track


class Opened(NamedTuple):
    """A file with all that was found out about it, and what its clips shall be."""

    probe: Probe
    grid: Grid
    sound: Sound | None
    options: RunOptions
    models: Models
    facts: dict[str, Any]  # what the json of every clip says


def read_source(
    source: Source, options: RunOptions, models: Models, progress: Progress
) -> Iterator[Clip | Refusal]:
    """All clips and refusals of one file; raises OSError if it cannot be read, and MemoryError."""
    try:
        found = probe(source.path, _between(progress, *PROBING))
    except MediaError as error:
        yield Refusal(0.0, 0.0, str(error))
        return
    try:
        facts = {"source": source.name, "source_sha256": source.sha256, "rate": RATE_HZ, "fps": FPS}
        facts["caption"] = source.caption
        sound = _sound_of(found, _between(progress, *LISTENING))
        opened = Opened(found, make_grid(found), sound, options, models, facts)
        for first, last in found.damaged:
            if last > found.end:
                yield Refusal(max(first, found.end), last, CUT_SHORT)
        refused_whole = _refused_whole(opened)
        if refused_whole:
            yield from refused_whole
            return
        scenes, tracks = _track(opened, _between(progress, *TRACKING))
        spans: list[Span] = []
        for part in _spans(opened, scenes, tracks):
            if isinstance(part, Refusal):
                yield part
            else:
                spans.append(part)
        yield from _clips(opened, spans, source.key(), _between(progress, *CUTTING))
    except MediaError as error:
        yield Refusal(float(found.times[0]), found.end, str(error))


def _between(progress: Progress, first: float, last: float) -> Progress:
    """Return the progress of a part of the work that goes from share `first` to `last`."""
    return lambda share: progress(first + share * (last - first))


def _sound_of(found: Probe, advance: Progress) -> Sound | None:
    if not found.has_sound:
        return None
    try:
        return read_sound(found.path, RATE_HZ, advance)
    except MediaError as error:
        what = str(error).removeprefix(f"{found.path}: ")
        kind = "no sound" if what.startswith("the sound track is empty") else "damaged"
        raise MediaError(f"{kind}: {what}") from error


def _refused_whole(opened: Opened) -> list[Refusal]:
    """The refusals of a file in which no face need be looked for; none for the others."""
    grid, sound = opened.grid, opened.sound
    if sound is None:
        reason = "no sound: the file has no sound track"
    elif len(opened.probe.times) < 2:
        reason = "too short: a single picture"
    elif not audible(sound.samples):
        reason = silence(sound.samples)
    else:
        return []
    damaged = [DAMAGED if is_damaged else reason for is_damaged in grid.damaged]
    return [
        Refusal(grid.seconds(first), grid.seconds(last), damaged[first])
        for first, last in runs(damaged)
    ]


def _track(opened: Opened, progress: Progress) -> tuple[NDArray[np.int64], list[Track]]:
    """The scene of each frame, and the tracks in pixels of the full picture."""
    found, numbers, every = opened.probe, opened.grid.numbers, opened.options.detect_every
    scale = min(1.0, DETECT_PIXELS / max(found.width, found.height))
    width, height = round(found.width * scale), round(found.height * scale)
    detector = FaceDetector(opened.models.yunet, width, height)
    cuts, tracker, scene = SceneCuts(), Tracker(), -1
    scenes = np.zeros(len(numbers), np.int64)
    for k, picture in enumerate(VideoReader(found, width, height).read(numbers)):
        begins = cuts.begins(picture)
        if begins:
            tracker.cut(k)
            scene += 1
        scenes[k] = scene
        if begins or k % every == 0:
            tracker.add(k, detector.detect(picture))
        progress(k / len(numbers))
    back = np.array([found.width / width, found.height / height] * 7 + [1], np.float32)
    tracks = tracker.finish(len(numbers), every)
    return scenes, [track._replace(rows=track.rows * back) for track in tracks]


def _spans(
    opened: Opened, scenes: NDArray[np.int64], tracks: list[Track]
) -> Iterator[Span | Refusal]:
    grid = opened.grid
    assert opened.sound is not None
    subject = find_subject(tracks, len(grid.numbers))
    covered = heard(opened.sound, grid)
    reasons = frame_reasons(grid, covered, subject, opened.options.min_face_pixels)
    for first, last in runs(reasons):
        if reasons[first]:
            yield Refusal(grid.seconds(first), grid.seconds(last), reasons[first])
            continue
        # A cut within a stretch, or another face taking over, begins a new span.
        whose = scenes[first:last] * (len(tracks) + 1) + subject.track[first:last]
        for begin, end in runs(whose):
            yield Span(first + begin, first + end, tracks[subject.track[first + begin]])


def _clips(
    opened: Opened, spans: list[Span], key: str, progress: Progress
) -> Iterator[Clip | Refusal]:
    number, options, found, shown = 0, opened.options, opened.probe, 0.0
    least = options.min_frames or options.frames
    # Decoding up to the next clip is progress too, though its share is not known.
    reader = VideoReader(found, found.width, found.height, lambda _: progress(shown))
    for done, span in enumerate(spans):
        cut, rest = cut_span(span.first, span.last, options.frames, least)
        for first, last in cut:
            made = _clip(opened, reader, span.track, first, last)
            if isinstance(made, Refusal):
                yield made
            else:
                yield Clip(f"{key}-{number:04d}", made)
                number += 1
            share = (last - span.first) / (span.last - span.first)
            shown = (done + share) / len(spans)
            progress(shown)
        if rest < span.last:
            yield _too_short(opened.grid, rest, span.last, least, bool(cut))


def _too_short(grid: Grid, first: int, last: int, least: int, is_rest: bool) -> Refusal:
    count = last - first
    what = "what is left after the last clip" if is_rest else "a stretch with one sure face"
    hint = (
        f"; min_frames={WAN.frames(WAN.latent_frames(count))} would take it" if count >= 5 else ""
    )
    reason = f"too short: {what} has {count} frames, a clip needs {least}{hint}"
    return Refusal(grid.seconds(first), grid.seconds(last), reason)


def _clip(
    opened: Opened, reader: VideoReader, track: Track, first: int, last: int
) -> dict[str, bytes] | Refusal:
    """The members of one clip, unless its sound or its lips are still."""
    grid, found, options = opened.grid, opened.probe, opened.options
    assert opened.sound is not None
    at = grid.seconds(first), grid.seconds(last)
    samples = sound_of(opened.sound, grid, first, last)
    if reason := silence(samples):
        return Refusal(*at, reason)
    rows = track.rows[first - track.first : last - track.first]
    faces = boxes(rows)
    if options.crop == "head":
        framing = frame_head(faces, found.width, found.height, options.size)
    else:
        framing = frame_whole(found.width, found.height, options.size)
    pictures, meshes = [], []
    for row, picture in zip(rows, reader.read(grid.numbers[first:last]), strict=True):
        meshes.append(opened.models.mesh.find(picture, row))
        pictures.append(cut_out(picture, framing))
    presence = np.array([mesh.presence for mesh in meshes])
    opening = np.array([mesh.opening for mesh in meshes]) / rows[:, 3]
    if reason := still_lips(opening, presence):
        return Refusal(*at, reason)
    lips = np.stack([m.lips if m.presence >= MESH_PRESENCE else mouth_from_corners(row)
                     for m, row in zip(meshes, rows, strict=True)])  # fmt: skip
    facts = opened.facts | {
        "start_seconds": round(at[0], 4),
        "end_seconds": round(at[1], 4),
        "frames": last - first,
        "width": framing.width,
        "height": framing.height,
        "crop": [round(v, 2) for v in framing.box],
        "scores": clip_scores(rows, opening, samples),
    }
    tracks = in_frame(faces, framing), in_frame(lips, framing), opening
    return encode_members(np.stack(pictures), samples, tracks, facts, options.crf)
