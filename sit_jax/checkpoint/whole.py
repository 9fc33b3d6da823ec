"""Whether a step can be used, said in one line that names the step before."""

from sit_jax.checkpoint.folder import steps
from sit_jax.checkpoint.sums import damages, has_sums
from sit_jax.errors import UserError
from sit_jax.places import place


class Damaged(UserError):
    """A step whose files are not what was saved. why: what is wrong with them."""

    def __init__(self, directory, step, why):
        self.directory, self.step, self.why = place(directory), step, why
        super().__init__(f"{directory}/{step} is damaged: {why}; {self._remedy()}")

    def _remedy(self):
        for step in reversed(steps(self.directory)):
            if step < self.step and not damages(self.directory / str(step)):
                checked = has_sums(self.directory / str(step))
                word = "is whole" if checked else "has no sums to tell whether it is"
                return f"the step before, {self.directory}/{step}, {word}"
        return "no step before it is whole"


def require_whole(directory, step, items=None):
    """Refuses a step of which a file of these items (None: all) has changed."""
    if lines := damages(place(directory) / str(step), items):
        more = f", and {len(lines) - 1} more" if len(lines) > 1 else ""
        raise Damaged(directory, step, lines[0] + more)
