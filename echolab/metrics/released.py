"""The functions of the metrics with released networks or none, which conf/metrics/released.yaml
names.

Each builds one metric of a setup.  It raises WeightsError if a file of its network is missing.
`weights` is `released`, or `random` for the real network with seeded random weights, to test all
of an evaluation; the card says so.  FID and FVD have their functions in their own modules.
"""

from echolab.metrics.drift import ColorDrift, Seams
from echolab.metrics.fidelity import Fidelity, FirstFrame
from echolab.metrics.identity import Csim, FaceEmbedder
from echolab.metrics.metric import VideoMetric
from echolab.metrics.motion import Flicker, MotionAmount
from echolab.metrics.one_face import OneFace
from echolab.metrics.setup import Setup
from echolab.metrics.sync import SyncScore, random_syncnet, released_syncnet
from echolab.metrics.weights import check_weights
from echolab.model_files import find_model_file
from echolab.vision.face_models import YUNET


def sync(setup: Setup, *, weights: str = "released", detect: bool = False) -> VideoMetric:
    """Build Sync-C, Sync-D and the offset of SyncNet.

    With `detect` YuNet detects faces as in the published pipeline, else they are the tracked
    boxes of the held-out clips.
    """
    # A generated face may leave the tracked box, but a detector may miss it.
    check_weights(weights)
    network = random_syncnet() if weights == "random" else released_syncnet(setup.networks)
    yunet = find_model_file(YUNET, setup.networks) if detect else None
    return SyncScore(setup.num_clips, network, yunet=yunet)


def csim(setup: Setup, *, network: str, every: int = 5) -> VideoMetric:
    """Build the identity similarity to the reference image by an ArcFace file of `networks`."""
    # The detector aligns the faces for the embedding.
    face = OneFace(find_model_file(YUNET, setup.networks))
    return Csim(setup.num_clips, FaceEmbedder(face, setup.file(network)), every)


def fidelity(setup: Setup) -> VideoMetric:
    """Build PSNR and SSIM against the recorded clips."""
    return Fidelity(setup.num_clips)


def first_frame(setup: Setup) -> VideoMetric:
    """Build the PSNR of the first frame."""
    return FirstFrame(setup.num_clips)


def motion(setup: Setup) -> VideoMetric:
    """Build the amount of motion."""
    return MotionAmount(setup.num_clips)


def flicker(setup: Setup) -> VideoMetric:
    """Build the flicker of brightness."""
    return Flicker(setup.num_clips)


def color_drift(setup: Setup) -> VideoMetric:
    """Build the drift of colors over the clip."""
    return ColorDrift(setup.num_clips)


def seams(setup: Setup) -> VideoMetric:
    """Build the scores of window borders."""
    return Seams(setup.num_clips)
