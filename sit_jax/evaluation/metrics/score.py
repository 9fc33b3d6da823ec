"""The Inception Score as ADM's evaluator computes it."""

import numpy as np

SPLIT = 5000  # images


class InceptionScore:
    """Salimans et al. arXiv:1606.03498, of logits that come in batches.

    Consecutive images make splits of 5000, and a ragged last one counts as much as the
    others; other evaluators shuffle, and make 10 equal splits. A split needs only the
    sums of p and of p log p. In float64 on the host.
    """

    def __init__(self, split=SPLIT):
        self._split, self._count, self._scores = split, 0, []
        self._p = self._p_log_p = 0.0

    def add(self, logits):
        """float [n, K] of any n, in the order of the images."""
        start = 0
        while start < len(logits):
            part = logits[start : start + self._split - self._count]
            start += len(part)
            log_p = _log_softmax(np.asarray(part, np.float64))
            p = np.exp(log_p)
            self._p = self._p + p.sum(0)
            self._p_log_p += (p * log_p).sum()
            self._count += len(part)
            if self._count == self._split:
                self._scores.append(self._score())
                self._count, self._p, self._p_log_p = 0, 0.0, 0.0

    def value(self):
        """The mean over the splits so far; NaN without any image."""
        scores = self._scores + ([self._score()] if self._count else [])
        return float(np.mean(scores)) if scores else float("nan")

    def _score(self):
        mean = self._p / self._count
        entropy = (mean[mean > 0] * np.log(mean[mean > 0])).sum()
        return np.exp(self._p_log_p / self._count - entropy)


def _log_softmax(logits):
    logits = logits - logits.max(1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))
