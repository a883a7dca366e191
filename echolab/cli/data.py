"""`echolab data STEP`: look at shards, and at what a run read of them."""

import importlib

from echolab.errors import ConfigError

STEPS = {
    "verify": ("echolab.cli.data_verify", "is a dataset whole?"),
    "index": ("echolab.cli.data_index", "dataset.json for plain WebDataset tars of any writer"),
    "audit": ("echolab.cli.data_audit", "did a run train on every sample exactly once an epoch?"),
    "shuffle-report": ("echolab.cli.data_shuffle", "how well a dataset's order shuffles"),
}


def help_text() -> str:
    """Every step with one line."""
    width = max(map(len, STEPS))
    return "\n".join(
        [
            "usage: echolab data STEP [key=value ...]",
            "",
            *(f"  {name:<{width}}  {summary}" for name, (_, summary) in STEPS.items()),
            "",
            "`echolab data STEP --help` says what a step takes.",
        ]
    )


def main(argv: list[str]) -> int | None:
    """Run one step."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in STEPS:
        raise ConfigError(f"data {name}: unknown; one of {', '.join(STEPS)}")
    code: int | None = importlib.import_module(STEPS[name][0]).main(rest)
    return code
