"""Images against a reference: ADM's five figures, and what else can be said.

FID is Heusel et al. arXiv:1706.08500, sFID Nash et al. arXiv:2103.03841, both with the
conventions of the evaluator in openai/guided-diffusion that published figures of ADM,
DiT, SiT and MDT come from.
"""

from sit_jax.errors import UserError
from sit_jax.evaluation import resampling
from sit_jax.evaluation.features import unlike
from sit_jax.evaluation.metrics.gaussian import Gaussian, Moments, frechet
from sit_jax.evaluation.metrics.kernel import SIZE, SUBSETS, kernel_distance
from sit_jax.evaluation.metrics.manifold import precision_recall

LINES = {  # ADM's order and wording
    "inception_score": "Inception Score",
    "fid": "FID",
    "sfid": "sFID",
    "precision": "Precision",
    "recall": "Recall",
}
MORE = {"frechet_distance": "Frechet distance", "kid": "KID"}
SHARES = ("precision", "recall")  # of images
WANTED = (*LINES, "kid")  # what can be asked for
PUBLISHED = 50_000  # images behind a published figure
LEAST = 2048  # images for a covariance of as many features


def fid(batches, extractor, reference):
    """uint8 batches [n, H, W, 3] and a Summary -> FID of all the images, a float.

    For a curve in training: batches are what a Generator has drawn and decoded, and
    reference is a statistics file by the same pipeline. FID falls with the number of
    images, so that only curves of the same number can be compared (FID-k).
    """
    require_same(extractor.pipeline, reference.pipeline)
    moments = Moments(len(reference.pool.mean))
    for features in extractor(batches):
        require_widths({"pool": features["pool"].shape[1]}, reference.widths())
        moments.add(features["pool"])
    if moments.seen < 2:
        raise UserError(f"FID of {moments.seen} images; draw at least 2")
    return frechet(moments.gaussian(), reference.pool)


def overlap(samples, reference, wanted, progress=iter):
    """Features of both [N, D], or None -> {name: precision or recall} of those wanted.

    Computed on a device, so that all processes call this.
    """
    if samples is None or reference is None:
        return {}
    shares = precision_recall(samples, reference, progress)
    found = dict(zip(SHARES, shares, strict=True))
    return {name: share for name, share in found.items() if name in wanted}


def figures(samples, reference, wanted, shares=(), progress=iter):
    """Summaries -> {name: figure} of those wanted that both have what is needed for.

    shares: what overlap() found.
    """
    require_widths(samples.widths(), reference.widths())
    found = {}
    if "inception_score" in wanted and samples.score is not None:
        found["inception_score"] = samples.score
    if "fid" in wanted:
        name = "fid" if samples.is_inception else "frechet_distance"
        found[name] = frechet(samples.pool, reference.pool)
    if "sfid" in wanted and None not in (samples.spatial, reference.spatial):
        found["sfid"] = frechet(samples.spatial, reference.spatial)
    found |= dict(shares)
    sides = (samples.features, reference.features)
    if "kid" in wanted and not any(each is None for each in sides):
        found["kid"], found["kid_std"] = kernel_distance(*sides, progress=progress)
        found["kid_subsets"] = [SUBSETS, min(SIZE, *map(len, sides))]
    return found


def lines(found):
    """{name: figure} -> ADM's lines, and those that it has not."""
    said = [f"{words}: {found[n]}" for n, words in (LINES | MORE).items() if n in found]
    if "interval" in found:
        low, high = found["interval"]
        how = "as they are" if found.get("interval_by_class") else "drawn too"
        said.append(f"95 % of other samples, classes {how}: {low:.6g} to {high:.6g}")
    return said


def interval(features, reference, resamples, labels=None, progress=iter):
    """features [N, D], Gaussian -> (low, high), a 95 % interval of their distance.

    That of other sets drawn like this one; the reference is taken as exact. labels: of
    the images, where it was decided how many there are of each class; None where these
    numbers are chance too, as of random labels.
    """
    groups = resampling.strata(labels, len(features))
    rows = progress(resampling.draws(groups, resamples))
    found = [frechet(Gaussian.of(features[chosen]), reference) for chosen in rows]
    value = frechet(Gaussian.of(features), reference)
    return resampling.interval(value, found, groups)


def wanted(listed, kid):
    """A list like fid,recall -> the names of figures; None stands for ADM's five."""
    names = listed.split(",") if listed else list(LINES)
    if odd := [name for name in names if name not in WANTED]:
        raise UserError(f"--metrics: no {odd[0]!r}; there are {', '.join(WANTED)}")
    return [*names, "kid"] if kid and "kid" not in names else names


def needs_features(names):
    """Whether figures need features themselves, and not only their moments."""
    return bool({"precision", "recall", "kid"} & set(names))


def require_enough(names, *sides):
    """Refuses covariances of too few images, where their number is known."""
    for side in sides if {"fid", "sfid"} & set(names) else ():
        count, least = side.known.count, LEAST
        if side.known.is_inception is False:
            least = side.known.width
        if count is not None and count < least:
            raise UserError(
                f"{side.path} has {count} images; FID and sFID need {least} for their "
                "covariances; --force computes them nevertheless, --metrics without "
                "them"
            )


def require_comparable(samples, reference, extractor, force=False):
    """Refuses Sides whose features come from other networks, sizes or pipelines."""
    kinds = {samples.known.is_inception, reference.known.is_inception}
    if {True, False} <= kinds:
        raise UserError(
            f"only one of {samples.path} and {reference.path} has features of the "
            "Inception network"
        )
    require_widths(*(side.known.widths(extractor) for side in (samples, reference)))
    if not force:
        require_same(samples.pipeline(extractor), reference.pipeline(extractor))


def require_widths(ours, theirs):
    """Refuses features of other sizes; both {name: numbers in a feature}."""
    for name in ours.keys() & theirs.keys():
        if ours[name] != theirs[name]:
            raise UserError(
                f"the reference has {theirs[name]} {name} features, the samples have "
                f"{ours[name]}: they come from other networks"
            )


def require_same(pipeline, other):
    """Refuses a reference whose features come from another pipeline."""
    if odd := unlike(pipeline, other):
        said = "; ".join(f"{n}: {other.get(n)}, not {pipeline.get(n)}" for n in odd)
        raise UserError(
            "the reference was made by another pipeline (library "
            f"{other.get('library')}; {said}); make it anew by --stats, or compare all "
            "the same by --force"
        )


def notes(count, names, found):
    """Sentences on what a reader of the figures has to know."""
    said = []
    if {"fid", "sfid"} & found.keys() and count != PUBLISHED:
        many = "an unknown number of" if count is None else count
        said.append(f"{many} images: not comparable with a published FID-50K")
    given = {*found, "fid"} if "frechet_distance" in found else {*found}
    if left := [(LINES | MORE)[name] for name in names if name not in given]:
        said.append(
            f"not computed, for the files lack what it takes: {', '.join(left)}"
        )
    return said
