"""Table of the tasks: name, title, required inputs, mask rule.  Imports no torch.

The command line, curriculum, report, data preparation and demo all read this table.  A new task is
one entry here, and a function in `masks` if its mask rule is new.
"""

from typing import NamedTuple


class Task(NamedTuple):
    """A task, defined by the given part of a clip; the network generates the rest."""

    name: str
    title: str  # title in the report
    given: str  # description of the given part, for captions
    mask: str  # key of `masks.MASK_RULES`
    inputs: tuple[str, ...]  # required arguments of `echolab generate`
    optional_inputs: tuple[str, ...] = ()  # further accepted arguments
    local: bool = False  # generates only a part of each frame; the rest can be pasted back
    in_curriculum: bool = True  # part of the default curriculum
    in_validation: bool = False  # part of the default held-out error

    @property
    def has_known(self) -> bool:
        """True if any pixels are given, so that encoded samples hold known latents of the task."""
        return self.mask != "nothing"


# From hard to easy, by the size of the generated part; continuation is only for inference.
TASK_TABLE = {
    task.name: task
    for task in (
        Task("t2v", "Text to video", "text and audio alone", "nothing", (), ("audio",)),
        Task(
            "i2v", "Image to video", "first frame given", "first_frame",
            ("image", "audio"), in_validation=True,
        ),
        Task(
            "flf2v", "First and last frame", "first and last frame given", "first_and_last_frame",
            ("image", "last_image", "audio"),
        ),
        Task(
            "avatar_sync", "Avatar sync", "all but the head given", "outside_head",
            ("source_video", "audio"), local=True,
        ),
        Task(
            "lip_sync", "Lip sync", "all but the lips given", "outside_lips",
            ("source_video", "audio"), local=True, in_validation=True,
        ),
        Task(
            "continuation", "Continuation", "first eight frames given", "first_frames",
            ("source_video", "audio"), in_curriculum=False,
        ),
    )
}  # fmt: skip
# Task names: all, and by property.
TASKS = tuple(TASK_TABLE)
DEFAULT_TASK = "i2v"

CURRICULUM_TASKS = tuple(name for name, task in TASK_TABLE.items() if task.in_curriculum)
VALIDATION_TASKS = tuple(name for name, task in TASK_TABLE.items() if task.in_validation)
KNOWN_TASKS = tuple(name for name, task in TASK_TABLE.items() if task.has_known)
LOCAL_TASKS = tuple(name for name, task in TASK_TABLE.items() if task.local)


def tasks_with(argument: str) -> str:
    """Return the tasks that accept an argument of `echolab generate`, for help texts."""
    # Consider required and optional inputs.
    accepting = (
        name
        for name, task in TASK_TABLE.items()
        if argument in (*task.inputs, *task.optional_inputs)
    )
    return ", ".join(accepting)
