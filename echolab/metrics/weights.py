"""Released networks of the metrics: where their weights are, their licenses, and how they load.

Nothing is unpickled or executed: safetensors, state dicts of torch with `weights_only`, and
TorchScript archives through `torchscript.read_torchscript`.  A network without its released file
can be built with seeded random weights, to test all of a metric; its card says so.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from echolab.encoders.files import assign_parameters, frozen, sha256_of, weights_in
from echolab.errors import ConfigError
from echolab.metrics.torchscript import is_torchscript, read_torchscript
from echolab.model_files import ModelFile, find_model_file
from echolab.models.loading import read_pickle, read_safetensors

RANDOM = "random"  # weights of a network without its released file, for the metric card
CPU = torch.device("cpu")

# -- Frechet and kernel distances ------------------------------------------------------------------

INCEPTION = ModelFile(
    "pt_inception-2015-12-05-6726825d.pth",
    95_628_359,
    "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
    (
        "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"
        "pt_inception-2015-12-05-6726825d.pth",
    ),
    "Apache-2.0",
)
I3D = ModelFile(
    "i3d_torchscript.pt",
    51_235_320,
    "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2",
    (
        "https://huggingface.co/flateon/FVD-I3D-torchscript/resolve/main/i3d_torchscript.pt",
        "https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1",
    ),
    "unclear: weights of TF Hub, converted by StyleGAN-V (NVIDIA source code license)",
)
VIDEOMAE = ModelFile(
    "videomae-base-finetuned-kinetics",
    0,
    "",
    ("https://huggingface.co/MCG-NJU/videomae-base-finetuned-kinetics",),
    "CC-BY-NC-4.0",
)

# -- lip sync and faces ----------------------------------------------------------------------------

SYNCNET = ModelFile(
    "syncnet_v2.model",
    54_573_114,
    "961e8696f888fce4f3f3a6c3d5b3267cf5b343100b238e79b2659bff2c605442",
    ("https://www.robots.ox.ac.uk/~vgg/software/lipsync/data/syncnet_v2.model",),
    "none stated for the weights; code MIT",
)
LIGHT_ASD = ModelFile(
    "light_asd_ava.model",
    4_175_289,
    "d44bc3ea7baa8e0946fa3921311714a630ed8b90a1928fab0dbe30d918909317",
    ("https://github.com/Junhua-Liao/Light-ASD/raw/ed38c232de5e/weight/pretrain_AVA_CVPR.model",),
    "MIT",
)
ARCFACE = ModelFile(
    "w600k_r50.onnx",
    174_383_860,
    "4c06341c33c2ca1f86781dab0e829f88ad5b64be9fba56e56bc9ebdefc619e43",
    ("https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip",),
    "non-commercial research only",
)
MOBILEFACENET = ModelFile(
    "mobilefacenet_arcface.onnx",
    3_998_070,
    "b7120c095d60094f28a4a54ba6a8bf51b297a6273fb40ef6350dfec1f63d9507",
    ("https://github.com/foamliu/MobileFaceNet/raw/a6cc9032a659/weights/MobileFaceNet.onnx",),
    "Apache-2.0; trained on MS-Celeb-1M, for research",
)
DWPOSE = ModelFile(
    "dw-ll_ucoco_384.onnx",
    134_399_116,
    "724f4ff2439ed61afb86fb8a1951ec39c6220682803b4a8bd4f598cd913b1843",
    ("https://huggingface.co/yzd-v/DWPose/resolve/main/dw-ll_ucoco_384.onnx",),
    "Apache-2.0",
)
YOLOX = ModelFile(
    "yolox_l.onnx",
    216_746_733,
    "7860ae79de6c89a3c1eb72ae9a2756c0ccfbe04b7791bb5880afabd97855a411",
    ("https://huggingface.co/yzd-v/DWPose/resolve/main/yolox_l.onnx",),
    "Apache-2.0",
)

# -- image quality -------------------------------------------------------------------------------

ALEXNET = ModelFile(
    "alexnet-owt-7be5be79.pth",
    244_408_911,
    "7be5be791159472b1fbf3c69796f7cb30dca7ad8466c2df70058c37116cdee02",
    ("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",),
    "BSD-3-Clause",
)
# The linear layers of LPIPS, which torchmetrics ships.
LPIPS_ALEX = ModelFile(
    "alex.pth",
    6_009,
    "df73285e35b22355a2df87cdb6b70b343713b667eddbda73e1977e0c860835c0",
    (
        "https://raw.githubusercontent.com/richzhang/PerceptualSimilarity/master/lpips/weights/"
        "v0.1/alex.pth",
    ),
    "BSD-2-Clause",
)
Q_ALIGN = ModelFile(
    "one-align",
    0,
    "",
    ("https://huggingface.co/q-future/one-align",),
    "MIT on its page, S-Lab 1.0 (non-commercial) in its repository",
)

RELEASED = (
    INCEPTION, I3D, VIDEOMAE, SYNCNET, LIGHT_ASD, ARCFACE, MOBILEFACENET, DWPOSE, YOLOX,
    ALEXNET, LPIPS_ALEX, Q_ALIGN,
)  # fmt: skip


class Network(NamedTuple):
    """A network of a metric, with what its metric card says about it."""

    net: nn.Module  # in evaluation mode, without gradients
    architecture: str
    weights: str  # sha256 of the released file, or "random"
    license: str


def read_network(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a released file by name; raise WeightsError for other content."""
    # Decide by content between the two kinds of files that torch writes.
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    return read_torchscript(path) if is_torchscript(path) else read_pickle(path)


def released_network(
    net: nn.Module,
    model: ModelFile,
    folder: Path | None = None,
    *,
    architecture: str,
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict,
    download: bool = False,
) -> Network:
    """Fill `net` with the released weights and return it with their sha256 and license.

    `convert` maps the tensors of the file to the parameters and buffers of `net`, which both must
    have in full; counters of batches are ignored.  Raise MissingWeightsError or WeightsError.
    """
    # Every difference between the file and the network is an error.
    path = find_model_file(model, folder, download=download)
    tensors = convert(read_network(path))
    # Counters of batch norm have no effect in evaluation, and old files lack them.
    kept = {name: value for name, value in tensors.items() if not _is_counter(name)}
    counters = {name: value for name, value in net.state_dict().items() if _is_counter(name)}
    assign_parameters(net, {**kept, **counters}, path, CPU, torch.float32)
    return Network(frozen(net, CPU), architecture, weights_sha256(path), model.license)


def _is_counter(name: str) -> bool:
    return name.endswith("num_batches_tracked")


def weights_sha256(path: Path) -> str:
    """Return the sha256 of a released file, or of the weights in a released folder."""
    return sha256_of(weights_in(path) if path.is_dir() else [path])


def check_weights(weights: str) -> None:
    """Raise ConfigError unless a setting of weights is `released` or `random`."""
    if weights not in ("released", RANDOM):
        raise ConfigError(f"weights={weights}: unknown; use released or random")


def random_network(net: nn.Module, architecture: str, seed: int = 0) -> Network:
    """Fill `net` with weights that depend on the seed alone, which keep the scale of activations.

    Matrices and kernels are normal with variance 2 / fan-in, biases are zero, and all else keeps
    the value of its constructor.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.ndim > 1:
                scale = (2 * len(parameter) / parameter.numel()) ** 0.5
                parameter.normal_(generator=generator).mul_(scale)
            elif name.endswith("bias"):
                parameter.zero_()
    return Network(frozen(net, CPU), architecture, RANDOM, "")
