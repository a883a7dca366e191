"""Work on many shards at once, each by one of several processes."""

import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from echolab.errors import DataError

Job = TypeVar("Job")
Result = TypeVar("Result")


WORTHWHILE = 2**27  # bytes that a process should have to read, or starting it takes longer


def processes(workers: int | None, sizes: Sequence[int]) -> int:
    """How many processes to take for files of so many bytes.

    By default one a core, and fewer where there is little to read.  Raises DataError for less than
    one.
    """
    if workers is not None and workers < 1:
        raise DataError(f"workers={workers}: must be 1 or more")
    useful = min(len(os.sched_getaffinity(0)), sum(sizes) // WORTHWHILE)
    return max(1, min(useful if workers is None else workers, len(sizes)))


def spread(
    work: Callable[[Job], Result], jobs: Iterable[Job], workers: int
) -> Iterator[tuple[int, Result]]:
    """(number of the job, its result) as they are done; one worker is this process.

    `work` is a function of a module.  What it raises ends all.  Few jobs are held at a time.
    """
    if workers == 1:
        yield from ((number, work(job)) for number, job in enumerate(jobs))
        return
    # Not forked: this process may hold threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        number_of: dict[Future[Result], int] = {}
        try:
            for number, job in enumerate(jobs):
                number_of[pool.submit(work, job)] = number
                if len(number_of) >= 2 * workers:
                    yield from _done(number_of)
            while number_of:
                yield from _done(number_of)
        except BrokenProcessPool as error:
            raise DataError(
                "a worker process died (killed, or out of memory?); run again with workers=1"
            ) from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _done(number_of: dict[Future[Result], int]) -> list[tuple[int, Result]]:
    """Wait for one at least, and take those that are done out."""
    done, _ = wait(number_of, return_when=FIRST_COMPLETED)
    return [(number_of.pop(future), future.result()) for future in done]
