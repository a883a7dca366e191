"""Tars as other programs write them."""

import io
import subprocess
import tarfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from echolab.data.media import encode_tracks

Samples = dict[str, dict[str, bytes]]


def raw_samples(count: int = 5, seed: int = 0) -> Samples:
    """Return samples whose members have all sizes; all but video and audio can be decoded."""
    rng = np.random.default_rng(seed)
    boxes = rng.random((3, 4)).astype(np.float32)
    return {
        f"clip-{i:03d}": {
            "mp4": rng.bytes(700 + 300 * i),
            "flac": rng.bytes(512),  # no padding at all
            "tracks.npz": encode_tracks(boxes, boxes + i),
            "json": b'{"caption": "talker %d"}' % i,
            "safetensors": save({"a": rng.random((2, i)).astype(np.float16)}),
        }
        for i in range(count)
    }


def files(samples: Samples) -> list[tuple[str, bytes]]:
    """Return file names and contents, in order."""
    return [(f"{key}.{name}", data) for key, m in samples.items() for name, data in m.items()]


def pack(path: Path, members: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> Path:
    """Write with Python's tarfile, with an owner, and a time that pax keeps to fractions of a
    second.
    """
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime, info.uid, info.uname = len(data), 1700000000.25, 1000, "someone"
            tar.addfile(info, io.BytesIO(data))
    return path


def gnu_tar(path: Path, members: list[tuple[str, bytes]], source: Path, form: str = "gnu") -> Path:
    """Write with the program tar, from files in a folder `source`."""
    for name, data in members:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(data)
    names = [name for name, _ in members]
    command = ["tar", f"--format={form}", "-cf", str(path), "-C", str(source), *names]
    subprocess.run(command, check=True)
    return path
