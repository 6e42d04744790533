"""Trainer's checkpoints with the place in the data, so that a job goes on at the very batch."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

LOADER_STATE = "dcp_loader.json"  # in a checkpoint's folder, written last: with it, it is whole

_Trainer: Any = object  # what comes behind the mixin, a Trainer, has more


class ExactResume(_Trainer):
    """What makes a kin of ``transformers.Trainer`` go on exactly where a checkpoint was written.

    Attributes:
        data: what is trained on, with ``state_dict`` (its ``epoch`` among it), ``load_state_dict``
            and ``close``; None outside of training. :meth:`begin` sets it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.args.ignore_data_skip = True  # the data goes on by its own state
        self.data: Any = None
        self._resume_from: str | None = None

    def begin(self, data: Any) -> None:
        """Train on ``data``, from where the checkpoint stood that training resumes."""
        self.close()
        self.data = data
        if self._resume_from is not None:
            data.load_state_dict(read_state(Path(self._resume_from)))

    def close(self) -> None:
        """End what the data holds, such as planning processes."""
        if self.data is not None:
            self.data.close()
            self.data = None

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **options: Any) -> Any:
        """Trainer's; going on from a checkpoint is exact to the batch, on any number of ranks.

        True, and ``"latest"``, are the newest whole checkpoint of the output folder; ``"auto"`` is
        that, or a start from nothing where there is none.
        """
        if resume_from_checkpoint in (True, "latest", "auto"):
            found = last_checkpoint(self.args.output_dir)
            if found is None and resume_from_checkpoint != "auto":
                raise ValueError(f"there is no checkpoint to resume in {self.args.output_dir!r}")
            resume_from_checkpoint = found
        self._resume_from = resume_from_checkpoint or None
        if self._resume_from is not None:
            read_state(Path(self._resume_from))  # refused before anything is loaded
        try:
            return super().train(self._resume_from, *args, **options)
        finally:
            self._resume_from = None
            self.close()

    def _init_training_state(self, *args: Any, **options: Any) -> tuple[int, int]:
        epochs, _ = super()._init_training_state(*args, **options)
        return (epochs if self._resume_from is None else self.data.state_dict()["epoch"]), 0

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        state = self.data.state_dict()
        if dist.is_initialized():
            dist.barrier()  # other ranks have written their parts
        if self.args.should_save:
            name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            folder = Path(self._get_output_dir(trial=trial)) / name
            draft = folder / f"{LOADER_STATE}.partial"
            draft.write_text(json.dumps(state))
            draft.rename(folder / LOADER_STATE)


def last_checkpoint(output: str | Path) -> str | None:
    """The newest checkpoint of an output folder that was written to its end."""
    found = [
        (int(match[1]), str(path))
        for path in Path(output).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name))
        and (path / LOADER_STATE).exists()
    ]
    return max(found)[1] if found else None


def read_state(folder: Path) -> Any:
    """The place in the data of a checkpoint; ``ValueError`` where it has none."""
    path = folder / LOADER_STATE
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder} cannot be resumed exactly: {path.name} is missing or damaged ({error}); it "
            "is no whole checkpoint of planned training"
        ) from None
