"""An evaluation that is under way, until its output is there."""

import contextlib
import dataclasses

from sit_jax.evaluation import summary
from sit_jax.evaluation.feature_parts import FeatureParts
from sit_jax.evaluation.features import remembered, write_features
from sit_jax.files import absolute_path, require_free
from sit_jax.parallel import multihost
from sit_jax.sampling.parts import is_begun, remove_parts

SIDES = ("samples", "reference", "statistics")  # whose features lie beside the output


@contextlib.contextmanager
def unfinished(out, overwrite, saved=None):
    """Gives an Unfinished whose output no other run makes meanwhile."""
    with multihost.lock_output(out):
        work = Unfinished(out, overwrite, saved)
        multihost.barrier()  # until all have seen that these places are free
        yield work


class Unfinished:
    """out: of the figures or statistics; saved: of the samples' features, or None.

    Neither may be there already, unless it may be overwritten or was written by the
    run that goes on.
    """

    def __init__(self, out, overwrite, saved=None):
        out = absolute_path(out)
        self._parts = {side: f"{out}.{side}" for side in SIDES}
        begun = lambda path: any(is_begun(each, path) for each in self._parts.values())
        free = lambda path: require_free(path, overwrite or begun(path))
        self.out, self.saved = free(out), saved and free(saved)

    def complete(self, side, missing, extractor, name):
        """-> the Summary of a Side, from its file and from what it still lacks.

        In process 0 only, as of all that is made here.
        """
        if missing is None or (missing.needs_network and extractor is None):
            return side.summary
        saved = self.saved if name == "samples" else None
        found = self.summarized(missing, extractor, name, saved=saved)
        if side.summary is None or found is None:
            return found
        parts = {"features": found.features, "score": found.score}
        return dataclasses.replace(side.summary, **parts)

    def summarized(self, source, extractor, name, keep=None, saved=None):
        """-> the Summary of a source; its features are kept at `saved`, a path."""
        from tqdm import tqdm

        pipeline = extractor.pipeline if source.needs_network else source.pipeline
        if source.needs_network:
            writes = [path for path in (self.out, self.saved) if path]
            features = FeatureParts(source, extractor, self._parts[name], writes)
            features.tell(name)
        else:
            features = source.features()
        if not multihost.is_primary():
            return features.compute() if source.needs_network else None
        with tqdm(total=source.count, unit="image", disable=None) as bar:
            batches, store = summary.counted(features, bar.update), {}
            if saved:
                batches = remembered(batches, source.count, store)
            found = summary.summarize(
                batches, source.count, keep, pipeline, source.is_inception
            )
        if saved:
            record = {"pipeline": pipeline, "data": str(source.path)}
            write_features(saved, store, record)
            print(f"features of {source.count} images", saved)
        return found

    def finish(self):
        """The output is there: what lies beside it goes."""
        for parts in self._parts.values():
            remove_parts(parts)
