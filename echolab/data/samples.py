"""What the tensors of one sample must be: one rule for verifying, training and validation.

    encoded      latents [C, F, H, W]; for each task but t2v known.<task>, known_latents.<task>
    preference   chosen, rejected, known_latents [C, F, H, W]; known
    both         text [L, D], image [N, D], face [P], weight [1, F, H, W], known [S, F, H, W],
                 audio [2 T, D], or Flash's [T, layers, D]

F latent frames are T = S (F - 1) + 1 video frames, and P = (H / p) (W / p) tokens; the time
stride S and the patch p are those of the dataset's geometry, 4 and 2 for Wan.  Batches are
stacked, so all samples of a dataset have the shapes of its first ones.  `tensors.take_sample`
checks values.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from echolab.data.member_reader import Pieces
from echolab.data.validate_member import Undecodable, tensor_header
from echolab.geometry import WAN, LatentGeometry

CONDITIONS = ("text", "image", "audio", "face", "weight")
TENSORS = {
    "encoded": ("latents", *CONDITIONS),
    "preference": ("chosen", "rejected", "known", "known_latents", *CONDITIONS),
}
TRIED, COMPARED = 100, 3  # of the first samples, at most; and the good ones that are enough

Shapes = Mapping[str, Sequence[int]]
Header = Mapping[str, tuple[str, list[int], int, int]]  # as `tensor_header` gives it


def shapes_of(
    pieces: Pieces, kind: str, geometry: LatentGeometry = WAN
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a sample's tensors by name; raise Undecodable if they do not fit."""
    shapes = {name: tuple(shape) for name, (_, shape, _, _) in header_of(pieces).items()}
    check_shapes(kind, shapes, geometry)
    return shapes


def usual(shapes: Sequence[Shapes]) -> Shapes:
    """Return the shapes that most of some samples have; of several, those seen first."""
    texts = Counter(json.dumps({name: list(shape) for name, shape in s.items()}) for s in shapes)
    return dict(json.loads(texts.most_common(1)[0][0])) if texts else {}


def header_of(pieces: Pieces) -> Header:
    """Return the header of a member that nothing was taken of yet; raise Undecodable."""
    return tensor_header(lambda _, size: pieces.take(size).tobytes(), pieces.size)


def take_about(pieces: Pieces) -> dict[str, Any]:
    """Return a sample's json member; raise Undecodable unless it is an object."""
    try:
        about = json.loads(pieces.rest())
    except (ValueError, RecursionError) as error:
        raise Undecodable(f"json: {error}") from error
    if not isinstance(about, dict):
        raise Undecodable("json: no object")
    return about


def check_shapes(kind: str, shapes: Shapes, geometry: LatentGeometry = WAN) -> None:
    """Raise Undecodable unless the tensors of a sample of this kind are there and fit each other.

    Other kinds hold what they like.
    """
    for name in TENSORS.get(kind, ()):
        if name not in shapes:
            raise Undecodable(f"no tensor {name!r}")
    if kind not in TENSORS:
        return
    main = "latents" if kind == "encoded" else "chosen"
    latents = tuple(shapes[main])
    patch = geometry.patch
    if len(latents) != 4 or min(latents) < 1 or latents[2] % patch or latents[3] % patch:
        raise Undecodable(
            f"tensor {main} {list(latents)}: must be [C, F, H, W], H and W multiples of {patch}"
        )
    for name, wanted in _wanted(kind, latents, shapes, geometry):
        if name not in shapes:
            raise Undecodable(f"no tensor {name!r}")
        if tuple(shapes[name]) != wanted:
            raise Undecodable(
                f"tensor {name} {list(shapes[name])}: must be {list(wanted)} beside {main} "
                f"{list(latents)}"
            )
    for name in ("text", "image"):
        if len(shapes[name]) != 2 or min(shapes[name]) < 1:
            raise Undecodable(f"tensor {name} {list(shapes[name])}: must be [tokens, width]")
    _check_audio(shapes["audio"], geometry.frames(latents[1]), main, latents)


def _wanted(
    kind: str, latents: tuple[int, ...], names: Collection[str], geometry: LatentGeometry
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield each tensor whose shape follows from that of the latents, and this shape."""
    places, mask_channels = latents[1:], geometry.time_stride
    yield "face", (geometry.tokens(*places[1:]),)
    yield "weight", (1, *places)
    if kind == "preference":
        yield "rejected", latents
        yield "known", (mask_channels, *places)
        yield "known_latents", latents
    if "lips" in names:
        yield "lips", (1, *places)
    tasks = {name.partition(".")[2] for name in names if name.startswith(("known.", "known_lat"))}
    for task in sorted(tasks - {""}):
        yield f"known.{task}", (mask_channels, *places)
        yield f"known_latents.{task}", latents


def _check_audio(shape: Sequence[int], frames: int, main: str, latents: tuple[int, ...]) -> None:
    whole = len(shape) == 2 and shape[0] == 2 * frames  # two tokens a frame
    layered = len(shape) == 3 and shape[0] == frames  # all layers of each frame
    if not (whole or layered) or min(shape) < 1:
        raise Undecodable(
            f"tensor audio {list(shape)}: must be [{2 * frames}, width], or [{frames}, layers, "
            f"width] for Flash, for the {frames} video frames of {main} {list(latents)}"
        )


def check_like(shapes: Shapes, like: Shapes) -> None:
    """Raise Undecodable where a tensor has another shape than in the dataset's other samples."""
    for name in sorted(set(shapes) & set(like)):
        if tuple(shapes[name]) != tuple(like[name]):
            raise Undecodable(
                f"tensor {name} {list(shapes[name])}, in other samples {list(like[name])}: "
                "clips of different sizes are different datasets"
            )
