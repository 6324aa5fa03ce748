"""Checks of the output folder of a run: no result of an earlier run is overwritten.

A training run either resumes the run in the folder or requires that none of the files that it would write exist. An
evaluation replaces only its own results. This is decided from the options alone, before data is loaded and before any
file is changed.
"""

import json
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout
from transformers.utils import logging

from ieft.training.checkpoints import find_damage, find_last_checkpoint, write_json

logger = logging.get_logger(__name__)
RECORD, LOCK = ".run.json", ".lock"
MODEL_FILES = ("config.json", "model*.safetensors", "pytorch_model*.bin")
RESULT_FILES = (
    "*_results.json", "eval_datasets.json", "two_stage.json", "probability.json", "ranked.png", "reliability.png",
)  # fmt: skip
OF_THE_MODEL = ("fit", "first_joint_layer")  # options of an evaluation that a trained model holds
TRAINING_FILES = (
    *MODEL_FILES, *RESULT_FILES, "checkpoint-*", "README.md", "*_ieft.py", "training.png", "training_args.bin",
    "processor_config.json", "preprocessor_config.json", "tokenizer*.json", "vocab.txt",
)  # fmt: skip


class OutputFolder:
    """The output folder of one run.

    Args:
        path: the folder; it need not exist.
        training: the options that affect the result of training, as JSON values; None for an evaluation.
        evaluation: the options that affect the result of the evaluation.
    """

    def __init__(self, path, *, training, evaluation):
        self.path = Path(path)
        self.training, self.evaluation = training, evaluation

    def _check_folder(self):
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file: --output_dir must be a folder. Pass another one.")

    def find_checkpoint(self, wish):
        """The checkpoint that training resumes from, or None to start; and the corrupt ones that were skipped.

        Args:
            wish: value of `--resume_from_checkpoint`: true, false, None or the path of a checkpoint.

        Raises:
            ValueError: if files in the folder would be overwritten, if the run in it had other options, or if the
                requested checkpoint cannot be used.
        """
        self._check_folder()
        wish = str(wish or "false")
        by_path = wish.lower() not in ("true", "false")
        if by_path and (damage := find_damage(wish) if Path(wish).is_dir() else "there is no such folder"):
            raise ValueError(
                f"--resume_from_checkpoint {wish}: {damage}. Pass true to resume from the last complete checkpoint."
            )
        own = by_path and Path(wish).resolve().parent == self.path.resolve()
        last, damages = find_last_checkpoint(self.path)
        if wish.lower() == "true" or own:
            if not (last or damages):
                self._check_nothing_is_replaced("It holds no checkpoint to resume from.")
            self._check_same_run()
            if self.evaluation:
                self._check_same_evaluation()
        else:
            advice = " --resume_from_checkpoint true resumes its run." if last or damages else ""
            self._check_nothing_is_replaced(advice)
        return (wish, []) if by_path else (last, damages)

    def find_model(self, source):
        """The checkpoint to evaluate: `source`, or the trained model in this folder.

        Raises:
            ValueError: if there is none, or if results of another evaluation would be replaced.
        """
        self._check_folder()
        has_model = (self.path / "config.json").is_file() and any(self.path.glob("model*.safetensors"))
        if source is None and not has_model:
            raise ValueError(
                f"No model to evaluate: {self.path} holds none. Pass --model_name_or_path, the --output_dir of a "
                "trained model, or --do_train to train one."
            )
        own = source is None or Path(source).resolve() == self.path.resolve()
        if has_model and not own:
            raise ValueError(
                f"{self.path} holds another model than --model_name_or_path {source}; the results would stand beside "
                "the wrong one. Pass another --output_dir."
            )
        if own:  # repeated from the training, these options change nothing
            trained = self._recorded().get("training") or {}
            repeated = [name for name in OF_THE_MODEL if self.evaluation.get(name) == trained.get(name)]
            self.evaluation |= dict.fromkeys(repeated)
        self._check_same_evaluation()
        return str(self.path) if own else source

    @contextmanager
    def claimed(self):
        """Lock the folder against other runs.

        Raises:
            ValueError: if another run holds the lock.
            OSError: if the folder cannot be written.
        """
        lock = FileLock(self.path / LOCK)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            raise ValueError(f"Another run is writing to {self.path} now. Pass another --output_dir.") from None
        except OSError as error:
            raise OSError(f"{self.path} cannot be written: {error.strerror}. Pass another --output_dir.") from error
        try:
            yield
        finally:
            lock.release()

    def record(self):
        """Save the options of this run, so that later runs can be compared with it."""
        self.path.mkdir(parents=True, exist_ok=True)
        recorded, now = self._recorded(), {"training": self.training, "evaluation": self.evaluation}
        options = {kind: recorded.get(kind, {}) | options for kind, options in now.items() if options is not None}
        write_json(self.path / RECORD, recorded | options)

    def _recorded(self):
        try:
            recorded = json.loads((self.path / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        training = recorded.get("training") or {}
        if "per_device_train_batch_size" in training:  # the total, under the name that earlier versions gave it
            training.setdefault("train_batch_size", training.pop("per_device_train_batch_size"))
        return recorded

    def _check_nothing_is_replaced(self, advice=""):
        found = sorted({path.name for pattern in TRAINING_FILES for path in self.path.glob(pattern)})
        if found:
            shown = ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")
            raise ValueError(
                f"{self.path} holds {shown}, which training would write over.{' ' + advice.strip() if advice else ''} "
                "Pass another --output_dir to begin a new run."
            )

    def _check_same_run(self):
        if not self._recorded().get("training"):
            logger.warning(
                "%s holds no readable %s (earlier versions wrote none), so its options cannot be compared with those "
                "of this command: make sure that they are the same.", self.path, RECORD,
            )  # fmt: skip
        changed = _differences(self._recorded().get("training"), self.training)
        if changed:
            raise ValueError(
                f"The run in {self.path} was started with other options: {changed}. Repeat its command with "
                "--resume_from_checkpoint true, or pass another --output_dir to begin a new run."
            )

    def _check_same_evaluation(self):
        results = sorted({path.name for pattern in RESULT_FILES for path in self.path.glob(pattern)})
        if not results:
            return
        before = self._recorded().get("evaluation") or _evaluation_of_results(self.path)
        changed = _differences(before, self.evaluation)
        if changed:
            raise ValueError(
                f"{self.path} holds results of another evaluation ({', '.join(results)}), which would be written "
                f"over: {changed}. Pass another --output_dir"
                + (f" and --model_name_or_path {self.path}." if any(self.path.glob("model*.safetensors")) else ".")
            )


def _differences(before, now):
    """Options that both contain and that differ, as text; empty if there are none."""
    pairs = [(name, before[name], now[name]) for name in now if name in before] if before else []
    return ", ".join(f"{name} was {old!r} and is {new!r}" for name, old, new in pairs if old != new)


def _evaluation_of_results(folder):
    """The evaluation options that `test_results.json` contains, for folders without a record."""
    try:
        results = json.loads((folder / "test_results.json").read_text(encoding="utf-8"))
        return {"dataset_name": results["dataset"], "protocol": results["protocol"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}
