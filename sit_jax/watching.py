"""What is seen of a network in training: sheets of samples and a curve of FIDs."""

from sit_jax import hosts
from sit_jax.curve import curve
from sit_jax.errors import UserError
from sit_jax.preview import Preview
from sit_jax.program import as_sampled


def viewer(log, config, parts, mesh):
    """-> look(step, average, ends), which does what the step is due for -> seconds.

    ends: nothing is begun any more, as it may take minutes.
    """
    sampled = as_sampled(config, parts)  # or figures are not those of sample.py
    looks = [
        (config.sample_every, _sheets(log, config, mesh, *sampled)),
        (config.get("evaluate_every", 0), _curve(log, config, mesh, *sampled)),
    ]
    able = [each is not _nothing for _, each in looks]
    hosts.require_same(
        "able to draw sheets and FIDs", able, "give all hosts the Inception weights"
    )

    def look(at, average, ends=False):
        due = lambda every: every and (at % every == 0 or at == config.steps)
        wanted = [each for every, each in looks if due(every) and each is not _nothing]
        if wanted and ends:
            log.say(f"no samples of step {at} were drawn; sample.py makes them of it")
            return 0.0
        return sum((each(at, average) for each in wanted), 0.0)

    return look


def _nothing(at, average):
    return 0.0


def _sheets(log, config, mesh, parts, around):
    if not config.preview:
        return _nothing
    try:
        preview = Preview(parts, mesh, config.seed, config.preview, around)
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
