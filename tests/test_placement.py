"""Networks at the start of a run: one copy in the memory of a node, the same values on any
device.
"""

import json
import math
import re
import time
from pathlib import Path

import encoded
import pytest
import rank_placement
import tiny
import torch
from forked import ForkServer
from safetensors.torch import save_file
from torch import nn

from echolab.config import build, networks
from echolab.config.compose import compose
from echolab.errors import ConfigError, DataError
from echolab.models.loading import load_released
from echolab.models.state_dict import AUDIO_PARTS, IMAGE_PARTS, initial_values, meta_network
from echolab.training.engine.machine import Machine
from echolab.training.engine.placement import (
    Placement,
    _socket_address,
    check_device,
    filled_network,
    initialized_network,
    placement_of,
    share_on_node,
)
from echolab.training.guards.host_memory import used

WORLD = 4
LIMIT = 1.3  # of one copy of the weights in fp32


def test_initialization_equals_drawing_into_the_parameters() -> None:
    """Earlier versions drew into the parameters, in this order."""
    net, generator = tiny.net(initialized=False), torch.Generator().manual_seed(5)
    layers = dict(net.named_modules())
    names = [name for name, _ in net.named_parameters()]
    with torch.no_grad():
        for name in sorted(names, key=lambda name: name.endswith("modulation")):
            parameter, layer = net.get_parameter(name), layers[name.rpartition(".")[0]]
            if isinstance(layer, nn.LayerNorm | nn.RMSNorm):
                parameter.fill_(float(name.endswith("weight")))
            elif name.endswith("modulation"):
                parameter.normal_(0, 1 / math.sqrt(parameter.shape[-1]), generator=generator)
            elif name.endswith("bias") or name.startswith("head.") or "v_audio" in name:
                parameter.zero_()
            elif re.search(r"\.k_audio\.", name):
                parameter.zero_()
            elif name.startswith(("text_embedding", "time_embedding")):
                parameter.normal_(0, 0.02, generator=generator)
            else:
                nn.init.xavier_uniform_(parameter.flatten(1), generator=generator)
    built = initialized_network(tiny.SIZES, 5)
    assert rank_placement.digest(built.named_parameters()) == rank_placement.digest(
        net.named_parameters()
    )
    assert all(p.requires_grad and not p.is_meta for p in built.parameters())


def test_initialization_needs_memory_for_one_tensor_only() -> None:
    """It needs no more if the network is on the meta device."""
    net, generator = meta_network(tiny.SIZES), torch.Generator().manual_seed(0)
    values = dict(initial_values(net, generator))
    assert rank_placement.digest(
        (n, values[n]) for n, _ in net.named_parameters()
    ) == rank_placement.digest(tiny.net().named_parameters())
    assert all(parameter.is_meta for parameter in net.parameters())


def test_a_checkpoint_of_another_network_is_refused() -> None:
    tensors = tiny.net().state_dict()
    tensors.pop("head.modulation")
    with pytest.raises(RuntimeError, match=r"head\.modulation"):
        filled_network(tiny.SIZES, tensors)


@pytest.mark.parametrize("local_rank", [0, 1])
def test_a_rank_that_cannot_share_reads_the_values_itself(
    local_rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file of rank 0 has no room, or rank 0 never comes."""

    def no_room(*arguments: object) -> None:
        raise OSError(28, "no space left on device")

    monkeypatch.setattr("os.posix_fallocate", no_room)
    monkeypatch.setattr("echolab.training.engine.placement.PATIENCE", 0.1)
    net = tiny.net()
    placement = Placement(local_rank=local_rank, local_world=2)
    values = share_on_node(net, lambda: net.named_parameters(), placement, str(time.monotonic()))
    assert rank_placement.digest(values) == rank_placement.digest(net.named_parameters())


def test_a_process_without_a_launcher_waits_for_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process replays a run of eight ranks."""
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert placement_of(Machine("ddp", devices=8)).local_world == 1
    monkeypatch.setenv("LOCAL_RANK", "3")
    placement = placement_of(Machine("ddp", devices=8, accelerator="gpu"))
    assert placement == Placement(torch.device("cuda", 3), 3, 8)


def test_networks_of_different_subjects_and_launches_have_different_sockets(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = {_socket_address("a"), _socket_address("b")}
    monkeypatch.setenv("MASTER_PORT", "1")
    assert len(result | {_socket_address("a")}) == 3


def test_a_missing_gpu_is_reported_before_the_network_is_built() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match="trainer.accelerator=gpu: no GPU here; use trainer=cpu"):
        check_device(Machine(accelerator="gpu"))


def test_a_run_is_checked_in_the_order_data_device_memory_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each fault is reported although the later ones exist too; no network is built."""

    def no_network(*_: object) -> None:
        raise AssertionError("the network is built")

    monkeypatch.setattr(build, "start_of", no_network)
    clips, _ = encoded.write(tmp_path)
    words = [*encoded.SETTINGS, f"run_dir={tmp_path / 'run'}"]
    here = [*words, f"data.clips={clips}"]
    monkeypatch.setattr(networks, "capacity", lambda: 1 << 20)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DataError, match="nowhere/dataset.json: not there"):
        build.train_config_from(
            compose([*words, "data.clips=nowhere", "trainer.accelerator=gpu"]), ""
        )
    with pytest.raises(ConfigError, match="trainer.accelerator=gpu: no GPU here"):
        build.train_config_from(compose([*here, "trainer.accelerator=gpu"]), "")
    with pytest.raises(ConfigError, match="memory: .* this node has 0.0 GiB"):
        build.train_config_from(compose(here), "")
    monkeypatch.setattr(networks, "capacity", lambda: None)
    with pytest.raises(AssertionError, match="the network is built"):
        build.train_config_from(compose(here), "")


def sources(folder: Path, kind: str) -> tuple[str, str]:
    """Write the file that a network of this kind starts from; also return its expected digest."""
    alone = initialized_network(rank_placement.ARCHITECTURE, rank_placement.SEED)
    file = folder / "weights.safetensors"
    if kind == "random":
        return "", rank_placement.digest(alone.named_parameters())
    dtype = torch.bfloat16 if kind == "pretrained-bf16" else torch.float32
    save_file({name: p.detach().to(dtype) for name, p in alone.named_parameters()}, file)
    fresh = (IMAGE_PARTS, AUDIO_PARTS)
    loaded = load_released(
        file, rank_placement.ARCHITECTURE, fresh=fresh, seed=rank_placement.SEED
    ).net
    return str(file), rank_placement.digest(loaded.named_parameters())


@pytest.mark.parametrize(
    "kind", ["random", "pretrained", "pretrained-bf16", "checkpoint", "reference"]
)
def test_ranks_of_a_node_hold_one_copy_at_the_start(
    fork_server: ForkServer, tmp_path: Path, kind: str
) -> None:
    """The peak of four ranks that build 283 MB of weights and read them all stays near one copy.

    Pages that n ranks share count 1/n for each. Every rank has the values of a single process.
    """
    source, expected = sources(tmp_path, kind)
    size = 4 * sum(p.numel() for p in meta_network(rank_placement.ARCHITECTURE).parameters())
    assert 250e6 < size < 350e6
    asked = {"kind": kind.removesuffix("-bf16"), "source": source, "world": WORLD}
    ranks = fork_server.start(
        "rank_placement:build", world=WORLD, arguments={"folder": str(tmp_path), **asked}
    )
    try:
        files = [tmp_path / str(rank) for rank in range(WORLD)]
        for file in files:
            rank_placement.wait_for(file.with_suffix(".ready"))
        before = sum(map(used, ranks.pids))
        peak = before
        (tmp_path / "go").touch()
        while not all(file.with_suffix(".json").exists() for file in files):
            assert not any(ranks.codes()), ranks.outputs()
            peak = max(peak, sum(map(used, ranks.pids)))
            time.sleep(0.005)
        peak = max(peak, sum(map(used, ranks.pids)))
    finally:
        (tmp_path / "end").touch()
    assert ranks.wait() == [0] * WORLD, ranks.outputs()
    for file in files:
        report = json.loads(file.with_suffix(".json").read_text())
        assert report == {"digest": expected, "devices": ["cpu"]}
    share = (peak - before) / size
    print(f"{kind}: {share:.2f} copies of {size:,} bytes")
    assert 0.9 < share < LIMIT
