"""Shapes of the tensors of one sample: one rule for verifying, training and validation.

    encoded      latents [C, F, H, W]; for each task but t2v known.<task>, known_latents.<task>
    preference   chosen, rejected, known_latents [C, F, H, W]; known
    both         text [L, D], image [N, D], face [P], weight [1, F, H, W], known [S, F, H, W],
                 audio [2 T, D], or Flash's [T, layers, D]

F latent frames are T = S (F - 1) + 1 video frames, and P = (H / p) (W / p) tokens; the time
stride S and the patch p are those of the dataset's geometry, 4 and 2 for Wan.  Batches are
stacked, so all samples of a dataset have the shapes of its first ones.  `collate.take_sample`
checks values.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from echolab.data.member_reader import MemberError, MemberReader, read_header
from echolab.geometry import WAN, LatentGeometry

CONDITIONS = ("text", "image", "audio", "face", "weight")
TENSORS = {
    "encoded": ("latents", *CONDITIONS),
    "preference": ("chosen", "rejected", "known", "known_latents", *CONDITIONS),
}
TRIED, COMPARED = 100, 3  # of the first samples, at most; and the good ones that are enough

Shapes = Mapping[str, Sequence[int]]


def shapes_of(
    member: MemberReader, kind: str, geometry: LatentGeometry = WAN
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a sample's tensors by name; raise MemberError if they do not fit."""
    shapes = {name: tuple(shape) for name, (_, shape, _, _) in read_header(member).items()}
    check_shapes(kind, shapes, geometry)
    return shapes


def most_common_shapes(shapes: Sequence[Shapes]) -> Shapes:
    """Return the shapes that most of some samples have; of several, the first."""
    texts = Counter(json.dumps({name: list(shape) for name, shape in s.items()}) for s in shapes)
    return dict(json.loads(texts.most_common(1)[0][0])) if texts else {}


def read_metadata(member: MemberReader) -> dict[str, Any]:
    """Return a sample's json member; raise MemberError unless it is an object."""
    try:
        metadata = json.loads(member.rest())
    except (ValueError, RecursionError) as error:
        raise MemberError(f"json: {error}") from error
    if not isinstance(metadata, dict):
        raise MemberError("json: no object")
    return metadata


def check_shapes(kind: str, shapes: Shapes, geometry: LatentGeometry = WAN) -> None:
    """Raise MemberError unless a sample of this kind has its tensors and they fit each other.

    Samples of other kinds may hold anything.
    """
    for name in TENSORS.get(kind, ()):
        if name not in shapes:
            raise MemberError(f"no tensor {name!r}")
    if kind not in TENSORS:
        return
    # The latents, on which the other shapes depend.
    main = "latents" if kind == "encoded" else "chosen"
    latents = tuple(shapes[main])
    patch = geometry.patch
    if len(latents) != 4 or min(latents) < 1 or latents[2] % patch or latents[3] % patch:
        raise MemberError(
            f"tensor {main} {list(latents)}: must be [C, F, H, W], H and W multiples of {patch}"
        )
    for name, expected in _expected_shapes(kind, latents, shapes, geometry):
        if name not in shapes:
            raise MemberError(f"no tensor {name!r}")
        if tuple(shapes[name]) != expected:
            raise MemberError(
                f"tensor {name} {list(shapes[name])}: must be {list(expected)} for {main} "
                f"{list(latents)}"
            )
    # The features of the encoders.
    for name in ("text", "image"):
        if len(shapes[name]) != 2 or min(shapes[name]) < 1:
            raise MemberError(f"tensor {name} {list(shapes[name])}: must be [tokens, width]")
    _check_audio(shapes["audio"], geometry.frames(latents[1]), main, latents)


def _expected_shapes(
    kind: str, latents: tuple[int, ...], names: Collection[str], geometry: LatentGeometry
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor whose shape follows from that of the latents, and this shape."""
    positions, mask_channels = latents[1:], geometry.time_stride
    yield "face", (geometry.tokens(*positions[1:]),)
    yield "weight", (1, *positions)
    if kind == "preference":
        yield "rejected", latents
        yield "known", (mask_channels, *positions)
        yield "known_latents", latents
    if "lips" in names:
        yield "lips", (1, *positions)
    tasks = {name.partition(".")[2] for name in names if name.startswith(("known.", "known_lat"))}
    for task in sorted(tasks - {""}):
        yield f"known.{task}", (mask_channels, *positions)
        yield f"known_latents.{task}", latents


def _check_audio(shape: Sequence[int], frames: int, main: str, latents: tuple[int, ...]) -> None:
    two_tokens = len(shape) == 2 and shape[0] == 2 * frames  # a frame
    layered = len(shape) == 3 and shape[0] == frames  # all layers of each frame
    if not (two_tokens or layered) or min(shape) < 1:
        raise MemberError(
            f"tensor audio {list(shape)}: must be [{2 * frames}, width], or [{frames}, layers, "
            f"width] for Flash, for the {frames} video frames of {main} {list(latents)}"
        )


def check_same_shapes(shapes: Shapes, common: Shapes) -> None:
    """Raise MemberError if a tensor has another shape than in the dataset's other samples."""
    for name in sorted(set(shapes) & set(common)):
        if tuple(shapes[name]) != tuple(common[name]):
            raise MemberError(
                f"tensor {name} {list(shapes[name])}, in other samples {list(common[name])}: "
                "clips of different sizes are different datasets"
            )
