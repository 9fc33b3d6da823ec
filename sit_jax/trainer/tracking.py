"""TensorBoard and wandb: where the scalars and images of a run go besides files."""

import secrets
import time

from sit_jax.errors import UserError


class TensorBoard:
    """Events through tensorboardX's synchronous writer.

    Its SummaryWriter hands them to a thread instead, and waits for that thread for
    ever once a full disk has ended it.
    """

    def __init__(self, folder, last):
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        self._folder, self._event = folder, Event
        with naming(folder):
            folder.mkdir(exist_ok=True)
            # a second writer in the same second must not overwrite the first
            self._writer = EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        start = SessionLog(status=SessionLog.START)  # hides this step and all later
        self._write(step=last + 1, session_log=start)

    def scalars(self, step, values):
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=k, simple_value=v) for k, v in values.items()]
        self._write(step=step, summary=Summary(value=points))

    def image(self, step, name, array):
        from tensorboardX.summary import image

        self._write(step=step, summary=image(name, array, dataformats="HWC"))

    def close(self):
        with naming(self._folder):
            self._writer.close()

    def _write(self, **fields):
        with naming(self._folder):
            self._writer.write_event(self._event(wall_time=time.time(), **fields))
            self._writer.flush()


class Wandb:
    """Weights & Biases. A resumed run goes on under the id kept in the workdir."""

    def __init__(self, workdir, arguments):
        try:
            import wandb
        except ImportError as error:
            raise UserError("wandb is not installed: pip install wandb") from error
        self._image, path = wandb.Image, workdir / "wandb_id.txt"
        with naming(path):
            if not path.exists():
                path.write_text(secrets.token_hex(8))
            name = path.read_text().strip()
        try:
            self._run = wandb.init(
                **{"dir": str(workdir), "id": name, "resume": "allow", **arguments}
            )
        except wandb.Error as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(
                f"wandb: {reason}; WANDB_MODE=offline needs no account"
            ) from error
        # its own step counter refuses steps that a resumed run repeats
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step, values):
        self._run.log({"step": step, **values})

    def image(self, step, name, array):
        array = array[..., 0] if array.shape[-1] == 1 else array
        self._run.log({"step": step, name: self._image(array)})

    def close(self):
        self._run.finish()


class naming:
    """Turns an OSError inside the block into a UserError that names the path."""

    def __init__(self, path):
        self._path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise UserError(
                f"cannot write {self._path}: {error.strerror or error}; free space, "
                "change the permissions or choose another --workdir"
            ) from error
