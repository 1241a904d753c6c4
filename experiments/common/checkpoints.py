"""The checkpoints of a run, by Orbax: the last few states, written beside the training and complete or not there."""

from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.common.errors import RunError

KEEP = 2  # the latest, and one to go back to


class Checkpoints:
    """The folder of the checkpoints of one run, each under the number of its step.

    Raises:
      RunError: if it cannot be a folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(exist_ok=True)  # Orbax would notice what is in the way at the first checkpoint only
        except OSError as error:
            raise self._not_written(error) from error
        self._manager = ocp.CheckpointManager(folder, options=ocp.CheckpointManagerOptions(max_to_keep=KEEP))

    def latest_step(self) -> int:
        """Of the latest complete checkpoint; 0 without one."""
        return self._manager.latest_step() or 0

    def restore(self, step: int, like: Any) -> Any:
        """The state after a step, in the structure, shapes, dtypes and shardings of `like`, which has a field `step`.

        Raises:
          RunError: if it cannot be read, or is another's.
        """
        try:
            sums = jax.eval_shape(checksums, like)
            whole = self._manager.restore(step, args=ocp.args.StandardRestore({"state": like, "checksums": sums}))
            if not np.array_equal(checksums(whole["state"]), whole["checksums"]):
                raise ValueError("its numbers are not those that were saved")
            if whole["state"].step != step:
                raise ValueError(f"it is that of step {whole['state'].step}")
            return whole["state"]
        except Exception as error:  # whatever Orbax and its storage find wrong, each with an exception of its own
            earlier = [other for other in self._manager.all_steps() if other < step]
            goes_on = f"to go on from step {max(earlier)}" if earlier else "to start again"
            raise RunError(
                f"the checkpoint {self.folder / str(step)} is damaged or of another model "
                f"({self._summary(error)}); move it away {goes_on}, or choose another workdir."
            ) from error

    def save(self, step: int, state: Any) -> None:
        """Takes a copy of the state and writes it while the training goes on.

        Raises:
          RunError: if this one, or the one before, could not be written.
        """
        try:
            whole = {"state": state, "checksums": checksums(state)}
            self._manager.save(step, args=ocp.args.StandardSave(whole))
        except Exception as error:
            raise self._not_written(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception: type[BaseException] | None, *_: object) -> None:
        """Waits for what is being written. Raises what `save` raises, unless there is an exception already."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            if exception is None:
                raise self._not_written(error) from error
        finally:
            self._manager.close()

    def _summary(self, error: Exception) -> str:
        """The first line, without the folder, which the sentences name already."""
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        return line.replace(f"{self.folder}/", "").rstrip(".")[:400]

    def _not_written(self, error: Exception) -> RunError:
        return RunError(f"a checkpoint could not be written to {self.folder} ({self._summary(error)}).")


@jax.jit
def checksums(state: Any) -> jax.Array:
    """One of each array: the storage itself notices 5 in 6 of the flipped bits that matter, and this the others.

    The bits of a number, times an odd one that depends on its place, added modulo 2**32: no single flip is lost.
    """

    def checksum(array: jax.Array) -> jax.Array:
        bits = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{8 * array.dtype.itemsize}")).ravel()
        return jnp.sum(bits.astype(jnp.uint32) * (2 * jnp.arange(bits.size, dtype=jnp.uint32) + 1), dtype=jnp.uint32)

    return jnp.stack([checksum(array) for array in jax.tree.leaves(state)])
