"""`echolab bench step|generate|data`: speed on this machine, compared with other programs."""

import importlib

from echolab.errors import ConfigError

BENCHES = {
    "step": ("echolab.bench.step", "a training step, compared with diffusers' network"),
    "generate": ("echolab.bench.generate", "a video by solver, steps and window"),
    "data": ("echolab.bench.data", "reading shards, compared with plain webdataset and the disk"),
}


def help_text() -> str:
    """Return one line for every benchmark."""
    return "\n".join(
        [
            "usage: echolab bench NAME [key=value ...]",
            "",
            "Measures on this machine; with format=json a list of rows, each with name, value,",
            "unit, baseline, baseline_value and ratio = value / baseline_value.",
            "",
            *(f"  {name:<8}  {summary}" for name, (_, summary) in BENCHES.items()),
            "",
            "`echolab bench NAME --help` lists the arguments of a benchmark.",
        ]
    )


def main(argv: list[str]) -> int | None:
    """Run one benchmark."""
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0 if argv else 2
    name, rest = argv[0], argv[1:]
    if name not in BENCHES:
        raise ConfigError(f"bench {name}: unknown; one of {', '.join(BENCHES)}")
    code: int | None = importlib.import_module(BENCHES[name][0]).main(rest)
    return code
