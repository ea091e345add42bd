"""Work that threads do behind the caller, a bounded number of pieces ahead."""

import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor

AHEAD = 4  # pieces per thread that may wait: enough to keep it busy, and little memory


def own_cores():
    """Cores for each of the processes that a launcher has started on this host."""
    return max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


class Background:
    """Calls made by `threads` threads while the caller goes on; at the end of the `with` block all of them are done.

    An error of a call is raised to the caller, by a later `call` or at the end; calls that have not begun are dropped.
    """

    def __init__(self, threads):
        self.pool, self.most = ThreadPoolExecutor(threads), threads * AHEAD
        self.waiting = deque()

    def call(self, work, *arguments, **options):
        """Have work(*arguments, **options) done; waits while too many calls are waiting."""
        if len(self.waiting) >= self.most:
            self.waiting.popleft().result()
        self.waiting.append(self.pool.submit(work, *arguments, **options))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        try:
            while self.waiting and not error:
                self.waiting.popleft().result()
        finally:
            self.pool.shutdown(cancel_futures=True)


def map_ahead(work, items, threads):
    """Yield work(item) for all items, in their order, a few of them ahead; errors are raised in their turn."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) >= threads * AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
