"""Averages and rates between two lines of the log."""

import collections
import math
import statistics
import time

import jax

LAG = 2  # steps whose metrics may still be on their way, so that logging never blocks


class Meter:
    """Collects each step's metrics and gives their means over every `every` steps.

    Steps that were skipped, being not finite, do not enter the means.
    """

    def __init__(self, every, images_per_step, flops_per_step, peak):
        self._every, self._images = every, images_per_step
        self._flops, self._peak = flops_per_step, peak
        self._pending, self._waited = collections.deque(), 0.0
        self._restart()

    def add(self, step, metrics, waited):
        """Queues a step's device metrics and its seconds of waiting for data.

        -> the steps that have arrived meanwhile, as [(step, metrics, line)]; line is
        None but at every `every`-th step, where it holds the means and rates since
        the line before.
        """
        self._pending.append((step, metrics))
        self._waited += waited
        return self._fetch(LAG)

    def flush(self):
        """-> the same for all steps still queued, waiting for them."""
        return self._fetch(0)

    def pause(self, seconds):
        """Time that went into something else than steps: a save, a picture."""
        self._since += seconds

    def _fetch(self, leave):
        arrived = []
        while len(self._pending) > leave:
            step, metrics = self._pending.popleft()
            metrics = jax.device_get(metrics)
            self._steps += 1
            for name, value in metrics.items():
                if value.ndim == 0 and name != "bad" and math.isfinite(value):
                    self._values[name].append(float(value))
            line = self._line() if step % self._every == 0 else None
            arrived.append((step, metrics, line))
        return arrived

    def _line(self):
        seconds = max(time.perf_counter() - self._since, 1e-9)
        line = {name: statistics.fmean(v) for name, v in self._values.items()}
        rate = self._steps / seconds
        line["steps_per_second"] = rate
        line["images_per_second"] = rate * self._images
        line["data_wait"] = self._waited / self._steps
        line["model_tflops"] = rate * self._flops / 1e12
        if self._peak:
            line["mfu"] = rate * self._flops / self._peak
        self._restart()
        return line

    def _restart(self):
        self._values = collections.defaultdict(list)
        self._steps, self._waited, self._since = 0, 0.0, time.perf_counter()
