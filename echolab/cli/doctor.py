"""`echolab doctor metrics`: which released networks are there, and for which scores."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from echolab.arguments import argument, check_exists, parse


@dataclass(frozen=True, kw_only=True)
class DoctorArguments:
    """List the released networks of the scores: present, wrong or missing, license and address.

    Files are searched in networks=, ECHOLAB_WEIGHTS, ./weights and ~/.cache/echolab/weights, and
    compared with the published sha256.  Nothing is downloaded or executed.
    """

    subject: Literal["metrics"] = argument("what to examine")
    networks: Path | None = argument("folder of released networks", None, default_text="usual ones")
    format: Literal["text", "json"] = argument("output format", "text")


def main(argv: list[str]) -> int:
    """Print the state of each network; return 0 even if some are missing."""
    arguments = parse(DoctorArguments, argv, command="echolab doctor", positional=("subject",))
    check_exists(arguments, "networks")
    states = network_states(arguments.networks)
    # A score of a missing network is left out of every evaluation, which is no error.
    if arguments.format == "json":
        print(json.dumps({"networks": states}))
        return 0
    for state in states:
        print(f"{state['state']:<8} {state['network']}: {state['scores']}")
        print(f"         {state['path'] or state['address']}; license: {state['license']}")
        if state["problem"]:
            print(f"         {state['problem']}")
    present = sum(state["state"] == "present" for state in states)
    print(f"{present} of {len(states)} networks are present")
    return 0


def network_states(folder: Path | None) -> list[dict[str, Any]]:
    """Return name, scores, state (present, wrong, missing), path, address, license, problem."""
    from echolab.errors import MissingWeightsError, WeightsError
    from echolab.model_files import find_model_file

    states: list[dict[str, Any]] = []
    for scores, model in needed_networks():
        path, problem, state = "", "", "present"
        try:
            path = str(find_model_file(model, folder, setting="networks"))
        except MissingWeightsError:
            state = "missing"
        except WeightsError as error:
            state, problem = "wrong", str(error)
        states.append(
            {"network": model.name, "scores": scores, "state": state, "path": path,
             "address": model.urls[0], "sha256": model.sha256, "license": model.license,
             "problem": problem}
        )  # fmt: skip
    return states


def needed_networks() -> list[tuple[str, Any]]:
    """Return the scores that a network computes, in words, with the file of the network."""
    from echolab.metrics import weights
    from echolab.vision.face_models import LANDMARKER, YUNET

    return [
        ("fid, kid", weights.INCEPTION),
        ("fvd, kvd", weights.I3D),
        ("fvd and kvd with features=videomae", weights.VIDEOMAE),
        ("sync_c, sync_d, av_offset", weights.SYNCNET),
        ("faces of all scores", YUNET),
        ("lips and blendshapes: silent_mouth, efid_blendshapes", LANDMARKER),
        ("csim, identity_drift", weights.MOBILEFACENET),
        ("csim by insightface", weights.ARCFACE),
        ("hkc, hkv: hands and body", weights.DWPOSE),
        ("hkc, hkv: people", weights.YOLOX),
        ("lpips: features", weights.ALEXNET),
        ("lpips: linear layers", weights.LPIPS_ALEX),
        ("iqa, ase", weights.Q_ALIGN),
    ]
