"""A synthetic dataset, a barely fitted autoencoder and a run of two steps, for tests of the
commands.
"""

from pathlib import Path
from typing import NamedTuple

import runs
import torch

from data_prep.draw import draw_dataset
from data_prep.encode import encode_dataset
from data_prep.options import DrawOptions
from echolab.data.shard_reader import open_dataset
from echolab.diffusion.objectives import Supervised
from echolab.encoders import demo
from echolab.encoders.demo import CausalAutoencoder
from echolab.encoders.encode import demo_encoders
from echolab.fitting import load_net
from echolab.inference.fit import fit_network
from echolab.inference.inputs import load_clips
from echolab.models.state_dict import initialize
from echolab.models.transformer import EchoTransformer
from echolab.tasks.curriculum import Curriculum, Stage
from echolab.training.fit import TrainConfig, fit

ARCHITECTURE = {
    "dim": 48, "ffn_dim": 64, "num_heads": 2, "num_layers": 1, "freq_dim": 16,
    "text_dim": demo.CAPTION_DIM, "image_dim": demo.IMAGE_DIM,
    "audio_dim": demo.AUDIO_DIM,
}  # fmt: skip


class SmallRun(NamedTuple):
    raw: Path
    encoded: Path
    video: Path  # the autoencoder's file
    run: Path


def make(root: Path) -> SmallRun:
    """Make all of it under `root`."""
    made = SmallRun(root / "raw", root / "encoded", root / "autoencoder.safetensors", root / "run")
    draw_dataset(DrawOptions(made.raw, num_clips=4), lambda done: None)
    fit_network("autoencoder", load_clips(made.raw), made.video, steps=2, seed=0)
    encoders = demo_encoders(load_net(made.video, CausalAutoencoder))
    encode_dataset(made.raw, made.encoded, encoders, lambda done: None)
    net = EchoTransformer(**ARCHITECTURE)  # type: ignore[arg-type]
    initialize(net, torch.Generator().manual_seed(0))
    fit(TrainConfig(
        net, ARCHITECTURE, run_dir=made.run, clips=[open_dataset(made.encoded)],
        schedule=runs.schedule(("sft", 2)), curriculum=Curriculum([Stage(1, {"i2v": 1.0})]),
        objectives={"sft": Supervised(runs.PHASES)}, batch_size=2,
    ))  # fmt: skip
    return made
