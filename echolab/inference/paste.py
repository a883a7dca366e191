"""Put the given pixels of a local task back around what was generated.

A video that has gone through the autoencoder and the sampler differs from its source everywhere,
also where the source was known.  For tasks that generate a part of each frame (lip_sync,
avatar_sync) the known part is the source's own, and the edge is blended within the generated part.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from echolab.data.media import Frames

FEATHER = 8.0  # pixels, the side of a latent: the mask that the network sees is that coarse
FEATHER_SHARE = 0.25  # of the radius of the generated part, if that is less: its middle stays


def known_weight(known: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Return how much of each pixel [Y, X] is the source's: 1 where `known`, falling to 0 inside.

    The weight falls linearly over FEATHER pixels of distance from the known part, or over
    FEATHER_SHARE of the largest such distance in the frame.
    """
    distance = cv2.distanceTransform((~known).astype(np.uint8), cv2.DIST_L2, 5)
    width = min(FEATHER, FEATHER_SHARE * float(distance.max()))
    return np.asarray(np.clip(1 - distance / (width + 1), 0, 1), np.float32)


def paste_known(generated: Frames, source: Frames, known: NDArray[np.bool_]) -> Frames:
    """Return frames [T, Y, X, 3] with the source's pixels where `known` [T, Y, X]."""
    pasted = np.empty_like(generated)
    for number, (made, given, mask) in enumerate(zip(generated, source, known, strict=True)):
        weight = known_weight(mask)[..., None]
        pasted[number] = (weight * given + (1 - weight) * made).round().astype(np.uint8)
    return pasted
