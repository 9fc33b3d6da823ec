"""What is seen of a network in training: sheets of samples and a curve of FIDs."""

from sit_jax.errors import UserError
from sit_jax.parallel import multihost
from sit_jax.planning.program import as_sampled
from sit_jax.trainer.curve import curve
from sit_jax.trainer.preview import Preview


class Views:
    """Calling it with a step and its average does what the step is due for.

    -> seconds. ends: nothing is begun any more, as it may take minutes. names: of the
    classes, where known.
    """

    def __init__(self, log, config, parts, mesh, names=None):
        sampled = as_sampled(config, parts)  # or figures are not those of sample.py
        self._log, self._steps, self._sheets = log, config.steps, config.sample_every
        self._looks = [
            (config.sample_every, _sheets(log, config, mesh, *sampled, names)),
            (config.get("evaluate_every", 0), _curve(log, config, mesh, *sampled)),
        ]
        able = [each is not _nothing for _, each in self._looks]
        multihost.assert_equal(
            "able to draw sheets and FIDs", able, "give all hosts the Inception weights"
        )
        self._able = able[0]

    def __call__(self, at, average, ends=False):
        due = lambda every: every and (at % every == 0 or at == self._steps)
        wanted = [
            each for every, each in self._looks if due(every) and each is not _nothing
        ]
        if wanted and ends:
            last = at == self._steps
            how = "sample.py makes them of it" if last else "a run that goes on does"
            self._log.say(f"no samples of step {at} were drawn; {how}")
            return 0.0
        return sum((each(at, average) for each in wanted), 0.0)

    def catch_up(self, at, average):
        """What the step that a run goes on from was due for, if it has no sheet.

        A stop leaves it out, and a kill may have come before it.
        """
        due = self._able and self._sheets and at and at % self._sheets == 0
        if due and multihost.broadcast(self._log.lacks(at, "samples")):
            self(at, average)


def _nothing(at, average):
    return 0.0


def _sheets(log, config, mesh, parts, around, names):
    if not config.preview:
        return _nothing
    try:
        preview = Preview(parts, mesh, config.seed, config.preview, around, names)
    except UserError as reason:
        log.say(f"no sheets of samples: {reason}")
        return _nothing

    def show(at, average):
        picture, seconds = preview(average)
        log.image(at, "samples", picture)
        log.say(f"drew the samples of step {at} in {seconds:.1f} s")
        return seconds

    return show


def _curve(log, config, mesh, parts, around):
    if not config.get("evaluate_every", 0):
        return _nothing
    try:
        judge = curve(config, parts, mesh, around)
    except UserError as reason:
        log.say(f"no curve of FIDs: {reason}")
        return _nothing

    def evaluate(at, average):
        found, seconds = judge(average)
        log.scalars(at, {judge.name: found})
        log.say(f"judged step {at} in {seconds:.1f} s")
        return seconds

    return evaluate
