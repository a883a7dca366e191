"""Build a network on the device of its rank, with at most one copy in the host memory of a node.

A network is created on the meta device, without values, and filled tensor by tensor: from
memory-mapped files, whose pages all ranks of a node share, or from values that one rank draws for
all ranks of the node (`share_on_node`).  Values depend neither on the device nor on the number of
ranks.
"""

import contextlib
import math
import os
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from echolab.errors import ConfigError
from echolab.models.state_dict import assign_parameters, initial_values, meta_network
from echolab.models.transformer import EchoTransformer
from echolab.training.engine.machine import Machine

ALIGNMENT = 64  # bytes, as torch aligns tensors in host memory
PATIENCE = 600.0  # timeout in seconds for ranks of a node that wait for each other
Values = Iterable[tuple[str, Tensor]]  # by parameter name


class Placement(NamedTuple):
    """The device of a rank's network, and the number of ranks on its node."""

    device: torch.device = torch.device("cpu")
    local_rank: int = 0
    local_world: int = 1

    @property
    def on_cpu(self) -> bool:
        """True if the network is in host memory."""
        return self.device.type == "cpu"


HOST = Placement()


def check_device(machine: Machine) -> None:
    """Raise ConfigError if this rank's device does not exist."""
    if machine.device != "cuda":
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"trainer.accelerator={machine.accelerator}: no GPU here; use trainer=cpu"
        )
    if (count := torch.cuda.device_count()) < machine.devices:
        raise ConfigError(
            f"trainer.devices={machine.devices}: {count} GPUs are visible here; "
            f"use trainer.devices={count}"
        )


def placement_of(machine: Machine) -> Placement:
    """Return this rank's placement from its launcher's environment, before ranks can communicate.

    A process without a launcher shares with no other ranks, even if its settings have several.
    """
    launched = "LOCAL_RANK" in os.environ
    local = int(os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or 0)
    gpu = machine.device == "cuda"
    device = torch.device("cuda", local) if gpu else torch.device(machine.device)
    return Placement(device, local, machine.devices if launched else 1)


def initialized_network(
    architecture: Mapping[str, Any], seed: int, placement: Placement = HOST
) -> EchoTransformer:
    """Return a network with Wan's initialization, drawn on the CPU by one rank of each node."""
    net = meta_network(architecture)

    def values() -> Values:
        return initial_values(net, torch.Generator().manual_seed(seed))

    assign_parameters(
        net, share_on_node(net, values, placement, f"initialization {seed}"), placement.device
    )
    return net


def filled_network(
    architecture: Mapping[str, Any], tensors: Mapping[str, Tensor], placement: Placement = HOST
) -> EchoTransformer:
    """Return a network with the values of `tensors`, by parameter name, such as a checkpoint's."""
    net = meta_network(architecture)
    # A checkpoint of another network fails here, before memory is allocated.
    missing = {name for name, _ in net.named_parameters()} ^ set(tensors)
    if missing:  # torch's own error names them
        net.load_state_dict(tensors, assign=True)
    place_shared(net, tensors.items, placement, "checkpoint")
    return net


def place_shared(
    net: nn.Module, values: Callable[[], Values], placement: Placement, subject: str
) -> None:
    """Load `values()`, which come from mapped files, into `net` on its rank's device.

    A GPU copies directly from the file.  Ranks on the CPU share the values, since each rank would
    otherwise hold its own converted copy.
    """
    shared = share_on_node(net, values, placement, subject) if placement.on_cpu else values()
    assign_parameters(net, shared, placement.device)


# -- one copy for all ranks of a node -------------------------------------------------------------


def share_on_node(
    net: nn.Module, values: Callable[[], Values], placement: Placement, subject: str
) -> Values:
    """Return `values()`, computed once on each node and mapped into memory by all its ranks.

    `values()` yields all parameters of `net`, which may be on the meta device; only local rank 0
    calls it.  Local rank 0 writes the values to an unnamed file and sends the file descriptor to
    the other ranks of the node through a socket, so that no file remains, however a rank ends.
    Tensors are mapped privately: a rank that trains them changes its own copy, page by page.  If
    sharing fails (no space for the file, a rank that does not respond), each rank calls `values`
    itself.  `subject` must differ between the networks that a launch shares.
    """
    if placement.local_world == 1:
        return values()
    try:
        if placement.local_rank == 0:
            return _serve_values(net, values, placement.local_world - 1, _socket_address(subject))
        return _receive_values(net, _socket_address(subject))
    except OSError:
        return values()


def _socket_address(subject: str) -> bytes:
    """Return the name of an abstract Unix socket that only this launch uses."""
    keys = ("ECHOLAB_LAUNCH", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")
    launch = [os.environ.get(key, "") for key in keys]
    text = repr([os.getuid(), subject, *launch])
    return b"\0echolab-" + blake2b(text.encode(), digest_size=12).hexdigest().encode()


def _serve_values(
    net: nn.Module, values: Callable[[], Values], followers: int, address: bytes
) -> Values:
    """Write the values to a file, send it to the other ranks, and map it."""
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(address)  # before computing the values, so that other ranks can connect
        listener.listen(followers)
        listener.settimeout(PATIENCE)
        # The file is unlinked at once: the kernel frees it when no rank uses it any more.
        file = stack.enter_context(tempfile.TemporaryFile())
        offsets, size = _file_layout(net)
        # Reserve the space: a full disk raises an error now, instead of a bus error later.
        os.posix_fallocate(file.fileno(), 0, size)
        # Write one tensor at a time, to limit host memory.
        for name, tensor in values():
            file.seek(offsets[name])
            file.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        file.flush()
        # Send the descriptor to every rank of the node; the file then outlives this process.
        for _ in range(followers):
            connection = _accept_same_user(listener)
            with connection:
                socket.send_fds(connection, [b"."], [file.fileno()])
        return _map_parameters(net, file.fileno())


def _accept_same_user(listener: socket.socket) -> socket.socket:
    """Return the next connection from a process of this user; refuse other users."""
    while True:
        connection, _ = listener.accept()
        if _is_same_user(connection):
            return connection
        connection.close()


def _is_same_user(connection: socket.socket) -> bool:
    # The kernel reports (pid, uid, gid) of the peer.
    sent = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return bool(struct.unpack("3i", sent)[1] == os.getuid())


def _receive_values(net: nn.Module, address: bytes) -> Values:
    """Get the file from local rank 0 and map it."""
    deadline = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(PATIENCE)
        while True:
            try:
                connection.connect(address)
                break
            except ConnectionRefusedError:  # local rank 0 does not listen yet
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
        # Abstract sockets have no permissions, so any user of the host could listen there.
        if not _is_same_user(connection):
            raise PermissionError("the socket belongs to another user")
        _, descriptors, _, _ = socket.recv_fds(connection, 1, 1)
    if not descriptors:
        raise ConnectionResetError("local rank 0 ended")
    try:
        return _map_parameters(net, descriptors[0])
    finally:
        os.close(descriptors[0])


def _file_layout(net: nn.Module) -> tuple[dict[str, int], int]:
    """Return the offset in bytes of each parameter, and the size of the file."""
    offsets, size = {}, 0
    for name, parameter in net.named_parameters():
        offsets[name] = size
        size += math.ceil(parameter.nbytes / ALIGNMENT) * ALIGNMENT
    return offsets, size


def _map_parameters(net: nn.Module, descriptor: int) -> Iterator[tuple[str, Tensor]]:
    """Map the parameters in a file privately; the file may be closed afterwards."""
    offsets, size = _file_layout(net)
    path = str(Path("/proc/self/fd") / str(descriptor))
    storage = torch.UntypedStorage.from_file(path, shared=False, nbytes=size)

    def tensor_of(name: str, parameter: Tensor) -> Tensor:
        # Return a view into the mapping.
        start = offsets[name] // parameter.element_size()
        empty = torch.empty(0, dtype=parameter.dtype)
        return empty.set_(storage, start, parameter.shape)  # type: ignore[call-overload]

    return iter([(name, tensor_of(name, p)) for name, p in net.named_parameters()])
