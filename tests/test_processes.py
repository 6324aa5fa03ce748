"""Tests with one, two and four processes: equal scores, groups, losses and gradients, and the death of a process."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate.commands.config.config_args import load_config_from_file
from small_training import (
    CONTRASTIVE,
    assert_same_bits,
    losses,
    make_trainer,
    run_ranks,
)

import run_retrieval
from ieft.training.checkpoints import find_last_checkpoint
from ieft.training.distributed import process_count, process_rank

ROOT = Path(__file__).parent.parent
BATCH = 8
# Loss settings, and progress of training: before the ranking loss, with random groups, with mined groups.
CASES = {
    "contrastive alone": ({"contrastive_weight": 0.5}, 0.0),
    "random groups": ({"contrastive_weight": 0.5}, 0.2),
    "mined groups": ({"contrastive_weight": 0.5}, 0.8),
    "one group, so that some process has none of its images": (
        {"contrastive_weight": 0.5, "groups_per_step": 1, "num_negatives": 1}, 0.8,
    ),
    "published": ({}, 0.5),
}  # fmt: skip


def gradients_of_one_batch(folder):
    """In a process: loss and gradients of its part of one batch, averaged as in training, for each case."""
    found = {}
    for name, (options, progress) in CASES.items():
        trainer = make_trainer(folder, dropout=0.0, **options)
        trainer.state.max_steps, trainer.state.global_step = 10, int(10 * progress)
        if process_count() > 1:
            trainer.model_wrapped = torch.nn.parallel.DistributedDataParallel(trainer.model)
        share = BATCH // process_count()
        rows = [(5 * row) % len(trainer.train_dataset) for row in range(BATCH)]  # a sentence twice among them
        items = [trainer.train_dataset[row] for row in rows][process_rank() * share :][:share]
        loss = trainer.compute_loss(trainer.model_wrapped, trainer.train_dataset.collate(items))
        loss.backward()
        found[name] = {each: weight.grad for each, weight in trainer.model.named_parameters()} | {
            "loss": loss.detach()
        }
    torch.save(found, Path(folder) / f"gradients{process_rank()}.pt")


def scores_then_training(folder, **options):
    """In a process: scores before training, then a training."""
    from small_training import train

    def keep_scores(trainer):
        np.save(Path(folder) / f"scores{process_rank()}.npy", trainer.score(trainer.eval_dataset))

    train(folder, prepare=keep_scores, **options)


@pytest.fixture(scope="module")
def of_worlds(tmp_path_factory):
    """Number of processes -> folder with the gradients of one batch, scores, and a training without dropout."""
    folders = {}
    for world in (1, 2, 4):
        folders[world] = tmp_path_factory.mktemp(f"world{world}")
        options = {"per_device_train_batch_size": BATCH // world, "dropout": 0.0, "max_steps": 8, "eval_steps": 4,
                   "save_steps": 4, **CONTRASTIVE}  # fmt: skip
        for call, own in ((gradients_of_one_batch, {}), (scores_then_training, options)):
            codes = run_ranks(folders[world], world, call=call, **own)
            assert codes == [0] * world, (folders[world] / f"printed{np.argmax(codes)}.txt").read_text()[-2000:]
    return folders


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_gradients_are_those_of_one_big_batch(of_worlds, world, case):
    expected = torch.load(of_worlds[1] / "gradients0.pt")[case]
    largest = max(gradient.abs().max() for gradient in expected.values())
    mean_loss = 0.0
    for rank in range(world):
        found = torch.load(of_worlds[world] / f"gradients{rank}.pt")[case]
        mean_loss += found.pop("loss") / world
        for name, gradient in found.items():
            assert (gradient - expected[name]).abs().max() < 1e-5 * max(1, largest), f"{name} on rank {rank}"
    torch.testing.assert_close(mean_loss, expected["loss"])
    assert any(gradient.abs().max() > 1e-3 for name, gradient in expected.items() if name != "loss")


def test_scores_are_the_same_bits_on_every_process(of_worlds):
    expected = np.load(of_worlds[1] / "scores0.npy")
    for world in (2, 4):
        for rank in range(world):
            assert np.array_equal(np.load(of_worlds[world] / f"scores{rank}.npy"), expected)


@pytest.mark.parametrize("world", [2, 4])
def test_training_is_the_same_for_the_same_batch(of_worlds, world):
    """Two epochs without dropout; the only difference is the order of summation."""
    assert losses(of_worlds[world]) == pytest.approx(losses(of_worlds[1]), rel=1e-4) and len(losses(of_worlds[1])) == 8


def test_two_processes_killed_and_gone_on_with_end_in_the_same_bits(tmp_path):
    """With dropout, which each process draws for itself."""
    options = {"max_steps": 6, **CONTRASTIVE}
    assert run_ranks(tmp_path / "unharmed", 2, **options) == [0, 0]
    assert run_ranks(tmp_path / "killed", 2, kill=("step", 5), **options) == [-9, -9]
    assert run_ranks(tmp_path / "killed", 2, resume=True, **options) == [0, 0]
    assert_same_bits(tmp_path / "unharmed", tmp_path / "killed")


# Machines and launchers ----------------------------------------------------------------------------------------------


def test_a_process_that_dies_ends_the_run_on_every_machine_and_leaves_its_checkpoints(tmp_path):
    """Two launchers, as on two machines; after three steps together one process is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc_per_node", "1",
              "--master_addr", "127.0.0.1", "--master_port", port]  # fmt: skip
    training = [str(ROOT / "tests" / "small_training.py"), str(tmp_path), "1"]
    options = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    launchers = [
        subprocess.Popen([*launch, "--node_rank", node, *training], stdout=subprocess.PIPE, **options)
        for node in ("0", "1")
    ]
    try:
        printed = [launcher.communicate(timeout=400)[0] for launcher in launchers]
    finally:
        for launcher in launchers:
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
    assert all(launcher.returncode for launcher in launchers)
    assert "Signal 9 (SIGKILL)" in printed[1] and "Root Cause" in printed[1], printed[1][-2000:]
    assert "small_training.py FAILED" in printed[0], printed[0][-2000:]
    last, damages = find_last_checkpoint(tmp_path)
    assert Path(last).name == "checkpoint-2" and not damages
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in Path(last).iterdir()}


def test_a_process_that_lost_another_says_so_in_a_line(tmp_path, monkeypatch):
    """Two processes are forked; one is killed while the other waits for it in a sum."""

    def end(rank):
        dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=rank, world_size=2)
        dist.barrier()
        if rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        dist.all_reduce(torch.ones(1))

    def fork(rank):
        process = os.fork()
        if process:
            return process
        try:
            with (tmp_path / "printed.txt").open("a") as file:
                os.dup2(file.fileno(), 2)
                sys.stderr = os.fdopen(2, "w")
                run_retrieval.command()
        except SystemExit as ended:
            print(ended.code, file=sys.stderr, flush=True)
            os._exit(1)
        finally:
            os._exit(2)

    codes = []
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setattr(run_retrieval, "main", lambda rank=rank: end(rank))
        codes.append(fork(rank))
    codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in codes]
    printed = (tmp_path / "printed.txt").read_text()
    assert codes == [-signal.SIGKILL, 1] and "another process of this run has ended" in printed, printed


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "launch").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_launch_files(path):
    config = load_config_from_file(str(path))
    assert config.num_processes >= 4 and config.distributed_type.value in ("MULTI_GPU", "FSDP", "DEEPSPEED")
    assert f"--config_file docs/launch/{path.name} run_retrieval.py" in path.read_text()
