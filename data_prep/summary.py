"""What the user sees: a bar or plain lines while it runs, and the figures at the end."""

import json
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Watch:
    """Progress over files, on standard error: a bar on a terminal, else one line a file."""

    def __init__(self, files: int, done: int) -> None:
        self.files, self.done = files, done
        self.console = Console(stderr=True, highlight=False)
        self.shares: dict[str, float] = {}
        self.bar: Progress | None = None
        if self.console.is_terminal:
            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self.console,
            )
            self.task = self.bar.add_task("files", total=files, completed=done)

    def __enter__(self) -> Self:
        if self.bar:
            self.bar.start()
        if self.done:
            self.say(f"{self.done} of {self.files} files were done before")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.bar:
            self.bar.stop()

    def progress(self, name: str, share: float) -> None:
        """A file is done by `share`."""
        self.shares[name] = share
        if self.bar:
            completed = self.done + sum(self.shares.values())
            self.bar.update(self.task, completed=completed, description=name[-40:])

    def finish(self, name: str, clips: int, reasons: list[str]) -> None:
        """A file is done."""
        self.shares.pop(name, None)
        self.done += 1
        if self.bar:
            self.bar.update(self.task, completed=self.done + sum(self.shares.values()))
        kinds = sorted({reason.partition(":")[0] for reason in reasons})
        refused = f"; {len(reasons)} refused: {', '.join(kinds)}" if reasons else ""
        self.say(f"[{self.done}/{self.files}] {name}: {clips} clips{refused}")

    def say(self, line: str) -> None:
        """One line, over the bar if there is one, whatever the names in it hold."""
        line = "\\n".join(line.splitlines())
        self.console.print(line, markup=False, soft_wrap=True)


def summarise(figures: dict[str, Any], format: str) -> str:
    """The figures as lines to read, or as json."""
    if format == "json":
        return json.dumps(figures)
    lines = [
        f"{figures['clips']} clips, {figures['seconds']:.1f} s, of {figures['files_used']} of "
        f"{figures['files']} files, in {figures['shards']} shards: {figures['out']}"
    ]
    for kind, of in sorted(figures["refused"].items(), key=lambda item: -item[1]["seconds"]):
        lines.append(f"  refused {of['seconds']:8.1f} s in {of['spans']:4d} spans: {kind}")
    return "\n".join(lines)
