"""Settings of the preference objectives: trl's names, and a one-line error for a wrong value."""

from pathlib import Path
from typing import Any

import pytest
import tiny

from echolab.config.check import check
from echolab.config.compose import compose
from echolab.diffusion.objectives import Preference
from echolab.diffusion.phases import PHDA, ModalityDropout
from echolab.diffusion.preference_losses import PAIR_LOSSES
from echolab.errors import ConfigError
from echolab.models.frozen import Frozen

BASE = compose(["schedule=dpo", "data.clips=x", "data.pairs=y"])


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_trl_accepts_every_loss_that_the_settings_accept(name: str, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    smoothing = 0.1 if name in ("sigmoid", "robust", "exo_pair") else 0.0
    settings = {"beta": 300.0, "label_smoothing": smoothing}
    checked = check({**BASE, "objective": {**BASE["objective"], **settings, "loss_type": name}})
    assert checked["objective"]["loss_type"] == name
    trl.DPOConfig(
        output_dir=str(tmp_path), report_to="none", bf16=False, use_cpu=True, loss_type=[name],
        **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_type": "sigmoidal"}, "objective.loss_type=sigmoidal: must be one of sigmoid"),
        ({"loss_type": "nonsense"}, "objective.loss_type=nonsense: must be one of sigmoid"),
        ({"sft_weight": -1.0}, "objective.sft_weight=-1"),
        ({"beta": "strong"}, "objective.beta=strong: must be a number"),
        ({"beta": -5.0}, "objective.beta=-5"),
        ({"label_smoothing": True}, "objective.label_smoothing=.*: must be a number"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        check({**BASE, "objective": {**BASE["objective"], **wrong}})
    assert "\n" not in str(error.value)


REFERENCE = Frozen(tiny.net())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta=0: must be above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5: must lie in \[0, 0.5\)"),
        ({"loss_type": "exo_pair"}, "loss_type=exo_pair: infinite at label_smoothing=0"),
        ({"loss_type": "sigmoidal"}, "loss_type=sigmoidal: unknown; one of sigmoid"),
        ({"target_grad_factor": 0.5}, "target_grad_factor=0.5"),
    ],
)
def test_the_objective_refuses_values_out_of_range(wrong: dict[str, Any], message: str) -> None:
    settings = {"beta": 300.0, "loss_type": "sigmoid", "label_smoothing": 0.0, **wrong}
    with pytest.raises(ConfigError, match=message):
        Preference(ModalityDropout(PHDA), REFERENCE, **settings)
