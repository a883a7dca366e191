"""Which package may import which, read from the source: nothing is imported here."""

import ast
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = {
    "types": 0, "geometry": 0, "errors": 0, "arguments": 0, "redaction": 0,
    "atomic_io": 0, "progress": 0, "heartbeat": 0, "plugins": 0, "model_files": 0,
    "diffusion": 1, "tasks": 1, "models": 1, "fitting": 1,
    "encoders": 2, "data": 2,
    "vision": 3,
    "metrics": 4,
    "evaluation": 5,
    "training": 6, "preference": 6,
    "tracking": 7, "launch": 7,
    "config": 8,
    "inference": 9,
    "bench": 10,
    "cli": 11,
}  # fmt: skip
# Within training: a part imports parts of lower layers only.  Parts of the lowest layer may import
# each other, and so may all that are not named here, which make up the loop.
TRAINING_LAYERS = {
    "distributed": 0, "schedule": 0, "intervals": 0, "signals": 0,
    "engine": 1,
    "checkpoints": 2,
    "adapters": 3,
    "guards": 4,
}  # fmt: skip
LOOP = 5
DATA_PREP_LAYER = 3  # data_prep is a separate package, and may use layers 0 to 3

# Third parties that are allowed at the bottom, and those that only some may touch.
ALLOWED = {0: {"torch"}, 1: {"torch", "einops", "numpy"}}
ALLOWED_ALSO = {
    "progress": {"rich"},
    "diffusion": {"diffusers"},  # its schedulers
    "fitting": {"safetensors"},  # it keeps the stand-in networks' files
    "models": {"safetensors"},  # released weights, in and out
}
LOWEST_LAYER = {
    "pytorch_lightning": 6, "lightning": 6, "deepspeed": 6, "trl": 6, "peft": 6,
    "submitit": 7, "optuna": 7,
}  # fmt: skip
ONLY_IN = {"wandb": {"tracking"}, "hydra": {"config", "cli"}, "omegaconf": {"config", "cli"}}

FILES = sorted([*ROOT.glob("echolab/**/*.py"), *ROOT.glob("data_prep/**/*.py")])
NAMES = [str(path.relative_to(ROOT)) for path in FILES]


def imports(source: str) -> list[str]:
    """List every module that a source imports, anywhere in it; relative ones start with a dot."""
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            # `from echolab import data` imports echolab.data
            modules += [f"{base}.{a.name}" for a in node.names] if base == "echolab" else [base]
    return modules


def package(name: str) -> str:
    """Return the part of echolab that a file or module belongs to:

    `echolab/data/x.py` -> `data`.
    """
    parts = re.split(r"[./]", name.removesuffix(".py"))
    return parts[1] if len(parts) > 1 and parts[0] == "echolab" else parts[0]


def faults(name: str, source: str) -> list[str]:
    """List the forbidden imports of a file, one line each."""
    here = package(name)
    if here in ("echolab", "__init__"):
        return [
            f"echolab/__init__.py imports {i}" for i in imports(source) if i not in ("os", "sys")
        ]
    layer = DATA_PREP_LAYER if here == "data_prep" else LAYERS[here]
    broken = []
    for module in imports(source):
        top, there = module.split(".")[0], package(module)
        if module.startswith("."):
            broken.append(f"{name}: relative import {module}")
        elif top == "data_prep" and here not in ("data_prep", "cli"):
            broken.append(f"{name}: {module} is not part of echolab; only cli may use it")
        elif top == "echolab" and there in LAYERS and there != here:
            lower = LAYERS[there] < layer or LAYERS[there] == layer == 0
            if not (lower or (here == "data_prep" and LAYERS[there] <= layer)):
                broken.append(f"{name}: layer {layer} imports {module} of layer {LAYERS[there]}")
        elif top not in sys.stdlib_module_names | {"echolab", "data_prep"}:
            broken += _third_party_faults(name, here, layer, top)
    return broken


def _third_party_faults(name: str, here: str, layer: int, top: str) -> list[str]:
    if layer in ALLOWED and top not in ALLOWED[layer] | ALLOWED_ALSO.get(here, set()):
        return [f"{name}: layer {layer} imports {top}"]
    if LOWEST_LAYER.get(top, 0) > layer:
        return [f"{name}: {top} is for layer {LOWEST_LAYER[top]} and above"]
    if top in ONLY_IN and here not in ONLY_IN[top]:
        return [f"{name}: {top} is for {' and '.join(sorted(ONLY_IN[top]))} alone"]
    return []


def training_faults(name: str, source: str) -> list[str]:
    """List which parts of training a file of training must not import, one line each."""
    part = re.split(r"[/.]", name)[2]
    layer = TRAINING_LAYERS.get(part, LOOP)
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "echolab.training":
            modules += [f"echolab.training.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module or "")
        elif isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
    faults = []
    for module in modules:
        if not module.startswith("echolab.training."):
            continue
        other = module.split(".")[2]
        there = TRAINING_LAYERS.get(other, LOOP)
        if other != part and not (there < layer or there == layer in (0, LOOP)):
            faults.append(f"{name}: {part} of layer {layer} imports {module} of layer {there}")
    return faults


TRAINING = [name for name in NAMES if name.startswith("echolab/training/")]


@pytest.mark.parametrize("name", TRAINING)
def test_parts_of_training_import_only_lower_parts(name: str) -> None:
    assert training_faults(name, (ROOT / name).read_text()) == []


def test_every_part_of_training_in_the_table_exists() -> None:
    assert set(TRAINING_LAYERS) <= {name.split("/")[2].removesuffix(".py") for name in TRAINING}


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("engine/a.py", "from echolab.training import distributed", True),
        ("engine/a.py", "from echolab.training.engine.ema import Ema", True),
        ("engine/a.py", "from echolab.training.checkpoints.writer import ITEM", False),
        ("checkpoints/a.py", "from echolab.training.adapters.lora import Lora", False),
        ("checkpoints/a.py", "def f():\n    from echolab.training import config", False),
        ("adapters/a.py", "import echolab.training.checkpoints.checkpoint", True),
        ("guards/a.py", "from echolab.training.config import TrainConfig", False),
        ("schedule.py", "from echolab.training import engine", False),
        ("signals.py", "from echolab.training.intervals import Intervals", True),
        ("config.py", "from echolab.training.guards.spikes import SpikeConfig", True),
    ],
)
def test_the_rule_within_training(name: str, source: str, allowed: bool) -> None:
    assert (training_faults(f"echolab/training/{name}", source) == []) is allowed


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_every_file_imports_only_what_its_layer_may(path: Path) -> None:
    assert faults(str(path.relative_to(ROOT)), path.read_text()) == []


def test_every_package_has_a_layer() -> None:
    named = {package(name) for name in NAMES if name.startswith("echolab/")}
    assert named - {"__init__"} <= set(LAYERS)


@pytest.mark.parametrize(
    ("name", "source", "allowed"),
    [
        ("echolab/models/a.py", "import echolab.types", True),
        ("echolab/models/a.py", "from echolab.tasks import masks", False),  # siblings
        ("echolab/models/a.py", "from echolab import data", False),  # upwards
        ("echolab/models/a.py", "import scipy.linalg", False),
        ("echolab/models/a.py", "from . import b", False),
        ("echolab/data/a.py", "def f():\n    import trl", False),  # hidden in a function
        ("echolab/training/a.py", "import wandb", False),
        ("echolab/launch/a.py", "import hydra", False),
        ("echolab/arguments.py", "from echolab.errors import ConfigError", True),
        ("echolab/encoders/a.py", "import data_prep.draw", False),
        ("echolab/inference/a.py", "from data_prep import source", False),
        ("data_prep/a.py", "from echolab.data import shards", True),
        ("data_prep/a.py", "from echolab.tracking import report", False),
        ("echolab/cli/a.py", "import hydra, data_prep.draw", True),
    ],
)
def test_the_rule_itself(name: str, source: str, allowed: bool) -> None:
    assert (faults(name, source) == []) is allowed


def test_imported_distributions_are_declared_and_pinned() -> None:
    def plain(name: str) -> str:
        return re.sub(r"[-_.]+", "-", re.split(r"[<>=!~ \[;]", name)[0]).lower()

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {plain(word) for word in project["dependencies"]}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] != "#"]
    third = {i.split(".")[0] for path in FILES for i in imports(path.read_text())}
    third -= sys.stdlib_module_names | {"echolab", "data_prep"}
    sources = packages_distributions()
    used = {plain(dist) for top in third if top in sources for dist in sources[top][:1]}
    assert used <= declared, "imported, but not in pyproject.toml"
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {plain(pin) for pin in pins}
    assert declared <= pinned, "declared, but not in constraints.txt"
    strangers = ("nvidia-", "triton", "torchvision", "torchaudio")
    assert not [name for name in pinned if name.startswith(strangers)]
