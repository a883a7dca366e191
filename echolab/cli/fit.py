"""`echolab fit NETWORK DATA OUT`: fit the demo networks that stand in for large released ones."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from echolab.arguments import argument, parse
from echolab.atomic_io import check_writable
from echolab.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class FitArguments:
    """Fit a demo network on a small raw dataset.

    autoencoder: pixels to latents and back.  sync: lips and speech, for Sync-C_demo.  frames and
    clips: features for FID_demo and FVD_demo, which need drawn talkers, whose visemes are known.
    The same command resumes a fit that was stopped.
    """

    network: Literal["autoencoder", "sync", "frames", "clips"] = argument("network to fit")
    data: Path = argument("raw dataset")
    out: Path = argument("file of the fitted network, .safetensors")
    steps: int = argument("optimizer steps", 800, ge=1)
    first_clip: int = argument("first clip to fit on, from 0", 0, ge=0)
    num_clips: int | None = argument("clips to fit on", None, ge=1, default_text="all others")
    vae: Path | None = argument(
        "autoencoder; sync: fit on its reconstructions of the clips as well", None,
        default_text="none", aka=("autoencoder",),
    )  # fmt: skip
    seed: int = argument("seed of initialization and batches", 0, ge=0)
    format: Literal["text", "json"] = argument("summary format", "text")


def main(argv: list[str]) -> int:
    """Parse and check the arguments, then import torch, fit and print a summary."""
    arguments = parse(FitArguments, argv, command="echolab fit",
                      positional=("network", "data", "out"))  # fmt: skip
    if arguments.vae and arguments.network != "sync":
        raise ConfigError(f"vae={arguments.vae}: is for the network sync; leave it out")
    check_writable(arguments.out)
    from echolab.inference.fit import fit_network, read_clips

    clips = read_clips(arguments.data, arguments.first_clip, arguments.num_clips, arguments.vae)
    loss = fit_network(
        arguments.network, clips, arguments.out, steps=arguments.steps, seed=arguments.seed
    )
    figures = {"out": str(arguments.out), "steps": arguments.steps, "loss": loss}
    plain = f"{arguments.out}: {arguments.network} after {arguments.steps} steps, loss {loss:.4f}"
    print(json.dumps(figures) if arguments.format == "json" else plain)
    return 0
