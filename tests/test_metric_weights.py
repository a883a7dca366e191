"""Released weights of metrics: searching, pinned digests, and archives that are never executed."""

import hashlib
import os
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from echolab import model_files
from echolab.errors import MissingWeightsError, WeightsError
from echolab.metrics.torchscript import is_torchscript, read_torchscript
from echolab.metrics.weights import (
    I3D,
    RELEASED,
    random_network,
    read_network,
    released_network,
)
from echolab.model_files import ModelFile, find_model_file


class Unit(nn.Module):
    """A convolution with batch norm and odd attributes, as real archives have them."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, 4, 3, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.register_buffer("steps", torch.arange(6).view(2, 3).t())  # not contiguous
        self.sizes = [3, 4]
        self.rates = [0.5, 0.25]
        self.names = {"a": 1}
        self.scale: float = 0.5

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)) * self.scale


class Tower(nn.Module):
    """Two units, one shared weight, and a buffer in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Unit(3)
        self.rest = nn.Sequential(nn.ReLU(), Unit(4))
        self.head = nn.Linear(5, 5)
        self.tied = nn.Linear(5, 5)
        self.tied.weight = self.head.weight
        self.register_buffer("fp16", torch.randn(3).half())
        self.register_buffer("empty", torch.zeros(0, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.rest(self.stem(x))


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Save a scripted network."""
    torch.jit.script(Tower()).save(tmp_path / "net.pt")
    return tmp_path / "net.pt"


def test_an_archive_has_the_tensors_that_torch_loads(archive: Path) -> None:
    """The oracle is torch.jit.load, which executes the archive; echolab never calls it."""
    expected = torch.jit.load(archive).state_dict()
    tensors = read_torchscript(archive)
    assert list(tensors) == list(expected)
    for name, value in expected.items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value), name


def test_a_traced_archive_is_read_too(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv3d(3, 2, 2), nn.BatchNorm3d(2), nn.ReLU()).eval()
    torch.jit.trace(net, torch.zeros(1, 3, 2, 2, 2)).save(tmp_path / "net.pt")
    tensors = read_torchscript(tmp_path / "net.pt")
    assert all(torch.equal(tensors[name], value) for name, value in net.state_dict().items())
    assert list(tensors) == list(net.state_dict())


def test_every_format_of_a_network_gives_the_same_tensors(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    torch.jit.script(net).save(tmp_path / "script.pt")
    torch.save(net.state_dict(), tmp_path / "dict.pth")
    torch.save(net.state_dict(), tmp_path / "old.model", _use_new_zipfile_serialization=False)
    save_file(net.state_dict(), tmp_path / "safe.safetensors")
    for name in ("script.pt", "dict.pth", "old.model", "safe.safetensors"):
        assert is_torchscript(tmp_path / name) == (name == "script.pt")
        tensors = read_network(tmp_path / name)
        assert set(tensors) == set(net.state_dict())
        assert all(torch.equal(tensors[key], value) for key, value in net.state_dict().items())


# -- hostile archives ------------------------------------------------------------------------------


class Hostile:
    """A pickle of this runs a command when it is loaded."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.trace),)


def planted(archive: Path, parts: Mapping[str, bytes], **how: Any) -> Path:
    """Copy an archive with some of its parts replaced."""
    hostile = archive.with_name("hostile.pt")
    with zipfile.ZipFile(archive) as source, zipfile.ZipFile(hostile, "w", **how) as copy:
        for info in source.infolist():
            part = info.filename.partition("/")[2]
            copy.writestr(info.filename, parts.get(part, source.read(info)))
    return hostile


def test_a_planted_pickle_is_refused_and_not_run(archive: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    for protocol in (0, 1, 2, 3, 4, 5):
        data = pickle.dumps({"weight": Hostile(trace)}, protocol=protocol)
        with pytest.raises(WeightsError, match="hostile.pt: .*nothing in it was run"):
            read_torchscript(planted(archive, {"data.pkl": data}))
        assert not trace.exists()
    # The same pickle does run where it is loaded: the test can fail.
    pickle.loads(data)  # noqa: S301
    assert trace.exists()


PROTO, END = b"\x80\x02", b"."
CONV = b"3"  # the storage of the first convolution
FLOAT = b"ctorch\nFloatStorage\n"


def tensor_of(key: bytes, offset: int, size: int, stride: int) -> bytes:
    """Return the opcodes of a rebuilt tensor of one dimension."""
    key_text = b"X" + len(key).to_bytes(4, "little") + key
    number = [b"J" + n.to_bytes(4, "little", signed=True) for n in (offset, size, stride)]
    storage = b"(X\x07\x00\x00\x00storage" + FLOAT + key_text + b"X\x03\x00\x00\x00cpuK\x04tQ"
    shape = number[0] + number[1] + b"\x85" + number[2] + b"\x85"
    rest = b"\x89" + b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + shape + rest + b"tR"


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (b"cbuiltins\nexec\n", "names builtins.exec"),
        (b"ctorch\nload\n", "names torch.load"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n)\x81", "an object of"),
        (b"cos\nsystem\nX\x04\x00\x00\x00true\x85R", "names os.system"),
        (b"c__torch__\nNet\nX\x04\x00\x00\x00true\x85R", "a call of"),
        (b"(X\x04\x00\x00\x00trueios\nsystem\n", "opcode INST"),
        (b"\x82\x01", "opcode EXT1"),
        (b"X\x02\x00\x00\x00osX\x06\x00\x00\x00system\x93", "opcode STACK_GLOBAL"),
        (b"]]b", "a list for a dict"),
        (b"}" * 3 + b"h\x07", "damaged"),
        (b"X\x01\x00\x00\x00xQ", "a str for a tuple"),
        (tensor_of(b"../../etc", 0, 2, 1), "a storage"),
        (tensor_of(b"99", 0, 2, 1), "damaged"),
        (tensor_of(CONV, 0, 10**6, 1), "elements in a storage"),
        (tensor_of(CONV, 10**6, 2, 1), "elements in a storage"),
        (tensor_of(CONV, 0, 10**9, 0), "elements in a storage"),
        (tensor_of(CONV, -4, 2, 1), "size"),
        (tensor_of(CONV, 0, 2, -1), "size"),
        (b"", "damaged"),
    ],
)
def test_content_that_is_not_a_module_of_tensors_is_refused(
    archive: Path, body: bytes, fault: str
) -> None:
    hostile = planted(archive, {"data.pkl": PROTO + body + END})
    with pytest.raises(WeightsError, match=f"hostile.pt: .*{fault}.*; nothing in it was run"):
        read_torchscript(hostile)


def test_a_sound_tensor_of_opcodes_is_read(archive: Path) -> None:
    """The faults above are not faults of the opcodes that the test writes."""
    body = b"}X\x01\x00\x00\x00w" + tensor_of(CONV, 1, 2, 1) + b"s"
    tensors = read_torchscript(planted(archive, {"data.pkl": PROTO + body + END}))
    kernel = torch.jit.load(archive).state_dict()["stem.conv.weight"]
    assert torch.equal(tensors["w"], kernel.flatten()[1:3])


def test_an_archive_cannot_unpack_to_more_than_its_size(archive: Path, tmp_path: Path) -> None:
    compressed = planted(archive, {}, compression=zipfile.ZIP_DEFLATED)
    with pytest.raises(WeightsError, match="is compressed"):
        read_torchscript(compressed)
    # A module that refers to itself ends, and one of 2^60 paths does too.
    loop = b"}q\x00X\x01\x00\x00\x00ah\x00s"
    paths = b"}q\x00" + b"".join(
        b"}(X\x01\x00\x00\x00ah%cX\x01\x00\x00\x00bh%cuq%c" % (i, i, i + 1) for i in range(60)
    )
    for body in (loop, paths):
        with pytest.raises(WeightsError, match="over 100000 values"):
            read_torchscript(planted(archive, {"data.pkl": PROTO + body + END}))


def test_cut_and_foreign_files_are_named(archive: Path, tmp_path: Path) -> None:
    data = archive.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    assert not is_torchscript(tmp_path / "cut.pt")
    with pytest.raises(WeightsError, match="cut.pt: damaged"):
        read_network(tmp_path / "cut.pt")
    with pytest.raises(WeightsError, match="cut.pt: damaged"):
        read_torchscript(tmp_path / "cut.pt")


# -- searching -------------------------------------------------------------------------------------


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a working folder without any weights around it."""
    folder = tmp_path / "work" / "here"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    monkeypatch.delenv("ECHOLAB_WEIGHTS", raising=False)
    monkeypatch.setattr(model_files, "CACHE", tmp_path / "cache")
    return folder


def pinned(content: bytes) -> ModelFile:
    return ModelFile("net.pth", len(content), hashlib.sha256(content).hexdigest(),
                     ("https://example.org/net.pth",), "MIT")  # fmt: skip


def test_folders_are_searched_in_order_and_digests_compared(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pinned(b"weights")
    named, variable, cache = (tmp_path / name for name in ("named", "variable", "cache"))
    folders = [cache, Path("../shared/weights"), Path("weights"), variable, named]
    monkeypatch.setenv("ECHOLAB_WEIGHTS", str(variable))
    variable.mkdir()
    # Every folder that is filled comes before the ones that were filled earlier.
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "net.pth").write_bytes(b"weights")
        given = named if folder == named else None
        assert find_model_file(model, given).samefile(folder / "net.pth")
    (named / "net.pth").write_bytes(b"weight$")
    with pytest.raises(WeightsError, match=r"named/net.pth: sha256 .*need .*; replace it from"):
        find_model_file(model, named)


def test_a_missing_network_is_named_in_one_line(empty: Path, tmp_path: Path) -> None:
    for model in RELEASED:
        with pytest.raises(MissingWeightsError) as caught:
            find_model_file(model)
        line = str(caught.value)
        assert "\n" not in line and model.name in line and model.urls[0] in line
        assert str(tmp_path / "cache") in line and "ECHOLAB_WEIGHTS" in line
    with pytest.raises(WeightsError, match="none: no such folder; give ECHOLAB_WEIGHTS=FOLDER"):
        find_model_file(I3D, tmp_path / "none")


def test_every_released_network_is_described(empty: Path) -> None:
    assert len({model.name for model in RELEASED}) == len(RELEASED)
    for model in RELEASED:
        assert model.license and all(url.startswith("https://") for url in model.urls)
        assert (model.bytes > 0) == (len(model.sha256) == 64), "a file is pinned, a folder is not"


def test_only_what_is_pinned_and_asked_for_is_downloaded(
    empty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Response:
        def __enter__(self) -> "Response":
            return self

        def __exit__(self, *_: object) -> None: ...

        def read(self, size: int) -> bytes:
            return b"weights"[:size]

    def urlopen(url: str, timeout: float) -> Response:
        asked.append(url)
        return Response()

    monkeypatch.setattr(model_files.urllib.request, "urlopen", urlopen)
    model = pinned(b"weights")
    with pytest.raises(MissingWeightsError, match="get it from"):
        find_model_file(model)
    with pytest.raises(MissingWeightsError, match="get it from"):
        find_model_file(model._replace(sha256=""), download=True)
    assert asked == []
    with pytest.raises(MissingWeightsError, match="differs from the pinned one"):
        find_model_file(pinned(b"others"), download=True)
    path = find_model_file(model, download=True)
    assert path == tmp_path / "cache" / "net.pth" and path.read_bytes() == b"weights"
    assert asked == ["https://example.org/net.pth"] * 2


# -- filling networks ------------------------------------------------------------------------------


def test_released_weights_fill_a_network_and_its_card(tmp_path: Path) -> None:
    source = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    source[1].running_mean.normal_()
    # Old files lack the counters of batch norm, which must not matter.
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state, tmp_path / "net.pth")
    model = pinned((tmp_path / "net.pth").read_bytes())
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    network = released_network(net, model, tmp_path, architecture="two layers")
    assert network[1:] == ("two layers", model.sha256, "MIT")
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(network.net(x), source.eval()(x))
    assert not any(parameter.requires_grad for parameter in network.net.parameters())
    with pytest.raises(WeightsError, match="net.pth: lacks weight and 6 more"):
        released_network(nn.Linear(2, 2), model, tmp_path, architecture="another")
    small = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4))
    with pytest.raises(WeightsError, match=r"0.weight is \[4, 3, 3, 3\], need \[4, 3, 1, 1\]"):
        released_network(small, model, tmp_path, architecture="another")


def test_random_weights_depend_on_the_seed_alone() -> None:
    def values(seed: int) -> Tensor:
        network = random_network(nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32)), "two", seed)
        assert network.weights == "random"
        return torch.cat([value.flatten().float() for value in network.net.state_dict().values()])

    assert torch.equal(values(0), values(0))
    assert not torch.equal(values(0), values(1))
    deep = nn.Sequential(*(layer for _ in range(20) for layer in (nn.Linear(256, 256), nn.ReLU())))
    spread = random_network(deep, "deep").net(torch.randn(64, 256)).square().mean().sqrt()
    assert 0.1 < float(spread) < 10
