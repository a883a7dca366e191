"""Settings of a run that trains a SyncNet, which has another conf/model.  Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field

from echolab.config.schema import NUMBER, Section, Settings, Size


class SyncModel(Section):
    """conf/model/syncnet*.yaml: a network that compares lips and audio, trained in sync epochs."""

    network: Literal["SyncNet", "SyncNetDemo"] = Field(
        description="SyncNet: the published one, on faces of 224 pixels; SyncNetDemo: a small one"
    )
    embed_dim: Size = Field(description="width of the vectors that are compared; SyncNet has 1024")
    frames: Annotated[int, Field(ge=12, le=10**4), NUMBER] = Field(
        description="frames of each clip in one step, drawn from longer clips"
    )


class SyncSettings(Settings):
    """conf/train.yaml with a SyncNet of conf/model."""

    model: SyncModel = Field(description="SyncNet")  # type: ignore[assignment]
