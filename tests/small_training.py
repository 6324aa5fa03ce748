"""Runs a training of a few seconds in its own process, which can be killed at a chosen point.

The folder then holds what the trainer wrote, the final weights as `final.pt` and the log as `log.json`; the exit code
is -9 after SIGKILL. Processes are forked from one that has imported everything, so that each starts at once.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback, set_seed

from configuration_ieft import IeftConfig
from ieft.data.scenes import draw_scene
from ieft.training import checkpoints
from ieft.training.checkpoints import find_last_checkpoint
from ieft.training.items import EvaluationSet, TrainingItems, learn_tokenizer
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

CONTRASTIVE = {"contrastive_weight": 1.0, "mining_start": 0.3}
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["small_training"])
# For the fork server, which does not use sys.path.
HERE = Path(__file__).parent
ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent)]), "OMP_NUM_THREADS": "1"}


def start(folder, *, call=None, rank=0, world=1, port=None, **options):
    """A process that trains (or runs `call` on its trainer); see `train` for the options."""
    process = PROCESSES.Process(target=_in_process, args=(str(folder), call, rank, world, port, options))
    with patch.dict(os.environ, ENVIRONMENT):
        process.start()
    return process


def finish(*processes, seconds=900):
    """Exit codes."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
    return [process.exitcode for process in processes]


def run(folder, **options):
    """Train in a separate process: its exit code."""
    return finish(start(folder, **options))[0]


def run_ranks(folder, world, **options):
    """Train with `world` processes, with the environment of torchrun: their exit codes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return finish(*(start(folder, rank=rank, world=world, port=port, **options) for rank in range(world)))


def final_weights(folder):
    return torch.load(Path(folder) / "final.pt", weights_only=True)


def assert_same_bits(one, other):
    """The best weights, and those of the last step."""
    last = [load_file(Path(find_last_checkpoint(folder)[0]) / "model.safetensors") for folder in (one, other)]
    for first, second in ((final_weights(one), final_weights(other)), last):
        differing = [name for name in first if not torch.equal(first[name], second[name])]
        assert not differing, f"{len(differing)} of {len(first)} weights differ, first {differing[:3]}"


def losses(folder):
    entries = json.loads((Path(folder) / "log.json").read_text())
    return [entry["loss"] for entry in entries if "loss" in entry]


# In the process ------------------------------------------------------------------------------------------------------


def _in_process(folder, call, rank, world, port, options):
    Path(folder).mkdir(parents=True, exist_ok=True)
    output = open(Path(folder) / f"printed{rank}.txt", "a", buffering=1)  # noqa: SIM115, it outlives this function
    os.dup2(output.fileno(), 1)
    os.dup2(output.fileno(), 2)
    sys.stdout = sys.stderr = output
    torch.set_num_threads(1)
    if world > 1:
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        os.environ |= {name: str(value) for name, value in ranks.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    (call or train)(folder, **options)
    sys.stdout.flush()
    if world > 1:
        torch.distributed.destroy_process_group()


def train(folder, *, kill=None, resume=False, prepare=None, **changes):
    """Train, keep the best checkpoint, write `final.pt` and `log.json`.

    Args:
        kill: (where, which) as `KILLS` has them: the process ends there by SIGKILL.
        prepare: called with the trainer before it trains.
        changes: training arguments, `dropout`, `images`.
    """
    trainer = make_trainer(folder, **changes)
    if kill:
        KILLS[kill[0]](trainer, kill[1])
    if prepare:
        prepare(trainer)
    trainer.train(resume_from_checkpoint=find_last_checkpoint(folder)[0] if resume else None)
    if trainer.is_world_process_zero():
        torch.save(trainer.accelerator.unwrap_model(trainer.model).state_dict(), Path(folder) / "final.pt")
        (Path(folder) / "log.json").write_text(json.dumps(trainer.state.log_history))


@cache
def draw(index):
    return draw_scene(1, index, size=32)


def make_trainer(
    folder, *, dropout=0.1, images=16, augmentation="randaugment", first_joint_layer=0, **changes
):  # fmt: skip
    """A trainer on `images` scenes of two captions each."""
    scenes = [draw(index) for index in range(images)]
    split = Dataset.from_dict(
        {
            "image": [scene.image for scene in scenes],
            "filename": [f"scene{index}.png" for index in range(images)],
            "captions": [scene.captions[:2] for scene in scenes],
        }
    )
    processor = IeftProcessor(
        IeftImageProcessor(image_size=32), learn_tokenizer(c for s in scenes for c in s.captions)
    )
    options = {
        "output_dir": str(folder), "max_steps": 12, "learning_rate": 1e-2,
        "num_negatives": 3, "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False, "seed": 3,
        "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2,
        "save_total_limit": 2, "load_best_model_at_end": True, "metric_for_best_model": "mean_recall",
    }  # fmt: skip
    if "train_batch_size" not in changes:
        options["per_device_train_batch_size"] = 4
    args = IeftTrainingArguments(**(options | changes))
    set_seed(args.seed)
    config = IeftConfig(
        vocab_size=len(processor.tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, image_size=32, patch_size=8, enhancement_layers=[1], initializer_range=0.1,
        contrastive_dim=16 if args.contrastive_weight else 0, hidden_dropout_prob=dropout,
        first_joint_layer=first_joint_layer,
    )  # fmt: skip
    items = TrainingItems(
        split, processor, num_negatives=0 if args.contrastive_weight else args.num_negatives,
        augmentation=augmentation, seed=args.seed,
    )  # fmt: skip
    model = IeftForImageTextRetrieval(config)
    return IeftTrainer(
        model,
        args,
        train_dataset=items,
        eval_dataset=EvaluationSet.from_split(split.select(range(4)), processor),
        processing_class=processor,
    )


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_after_step(trainer, step):
    class Death(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == step:
                die()

    trainer.add_callback(Death())


def die_in_write(trainer, which):
    """Within a file: the `which`th (from 0) that torch or safetensors write is truncated to half its size."""
    import transformers.modeling_utils

    counted = {"files": 0}

    def torn(write, place):
        def write_torn(*arguments, **options):
            write(*arguments, **options)
            if counted["files"] == which:
                os.truncate(arguments[place], os.path.getsize(arguments[place]) // 2)
                die()
            counted["files"] += 1

        return write_torn

    torch.save = torn(torch.save, 1)
    transformers.modeling_utils.safe_save_file = torn(transformers.modeling_utils.safe_save_file, 1)


def die_in_publishing(trainer, which):
    """Around the rename of a checkpoint: `which` 0 is before the first, 0.5 after it, 1 before the second."""
    counted, replace = {"renames": 0}, checkpoints.os.replace

    def rename(source, target):
        if Path(target).name.startswith("checkpoint"):
            if counted["renames"] == which:
                die()
            replace(source, target)
            if counted["renames"] + 0.5 == which:
                die()
            counted["renames"] += 1
        else:
            replace(source, target)

    checkpoints.os = type("os", (), vars(os) | {"replace": staticmethod(rename)})


def die_in_rotation(trainer, which):
    """While an old checkpoint is deleted, with half of its files gone."""
    import transformers.trainer_utils

    def delete_half(folder, **options):
        files = sorted(Path(folder).iterdir())
        for path in files[: len(files) // 2]:
            path.unlink()
        die()

    transformers.trainer_utils.shutil = type("shutil", (), {"rmtree": staticmethod(delete_half)})


def die_in_evaluation(trainer, which):
    """After the `which`th evaluation (from 0) has scored, before its result is recorded."""
    counted, recalls = {"evaluations": 0}, trainer.recalls

    def recall_or_die(*arguments):
        if counted["evaluations"] == which:
            die()
        counted["evaluations"] += 1
        return recalls(*arguments)

    trainer.recalls = recall_or_die


KILLS = {
    "step": die_after_step,
    "write": die_in_write,
    "publish": die_in_publishing,
    "rotate": die_in_rotation,
    "evaluate": die_in_evaluation,
}


if __name__ == "__main__":  # under torchrun, one rank of which is to die
    doomed = os.environ["RANK"] == sys.argv[2]
    train(sys.argv[1], kill=("step", 3) if doomed else None, **CONTRASTIVE)
