"""Preference settings: in trl's words, and refused in one line."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest
import tiny

from echolab.diffusion.objectives import Preference
from echolab.diffusion.phases import PHDA, ModalityDropout
from echolab.diffusion.preference_losses import PAIR_LOSSES
from echolab.errors import ConfigError
from echolab.models.frozen import Frozen
from echolab.preference.settings import PreferenceSettings, checked


@pytest.fixture
def quiet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a working folder in which trl must leave nothing."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", list(PAIR_LOSSES))
def test_every_loss_that_we_have_is_one_of_trl(name: str, quiet: Path) -> None:
    smoothing = 0.1 if name in ("sigmoid", "robust", "exo_pair") else 0.0
    settings = PreferenceSettings(loss_type=name, label_smoothing=smoothing)
    assert checked(settings) is settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"loss_type": "sigmoidal"}, "loss_type=sigmoidal: unknown; one of sigmoid"),
        ({"sft_weight": -1.0}, "sft_weight=-1: must be 0 or more"),
        ({"beta": "strong"}, "beta=strong: must be a number"),
        ({"label_smoothing": True}, "label_smoothing=True: must be a number"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    wrong: dict[str, object], message: str, quiet: Path
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        checked(PreferenceSettings(**wrong))  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)


REFERENCE = Frozen(tiny.net())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"beta": 0.0}, "beta=0: must be above 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing=0.5: must lie in \[0, 0.5\)"),
        ({"loss_type": "exo_pair"}, "loss_type=exo_pair: infinite at label_smoothing=0"),
        ({"target_grad_factor": 0.5}, "target_grad_factor=0.5"),
    ],
)
def test_ranges_are_refused_where_the_objective_is_made(
    wrong: dict[str, object], message: str
) -> None:
    settings = asdict(PreferenceSettings(**wrong))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=message):
        Preference(ModalityDropout(PHDA), REFERENCE, **settings)
