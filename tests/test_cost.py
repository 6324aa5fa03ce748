"""Tests of what a training is expected to cost: operations, memory, steps, and the part of validation that is used."""

import json
import logging
import re

import numpy as np
import pytest
import torch
from small_training import CONTRASTIVE, make_trainer
from torch.utils.flop_counter import FlopCounterMode

import run_retrieval
from configuration_ieft import IeftConfig
from ieft.training import cost
from ieft.training.cost import (
    TrainingCost,
    choose_selection,
    count_steps,
    fit_micro_batch,
    free_memory,
    measure_ranking,
)
from ieft.training.losses import FEATURES, call_model
from ieft.training.output_folder import OutputFolder
from ieft.training.trainer import IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval

LOSSES = {"published": {}, "contrastive": CONTRASTIVE, "late fusion": CONTRASTIVE | {"first_joint_layer": 1}}


@pytest.mark.parametrize("options", LOSSES.values(), ids=LOSSES)
def test_a_forward_pass_on_fake_tensors_is_that_on_real_ones(tmp_path, options):
    """Kept bytes, and operations, those of attention from its written-out form, where all captions are the longest."""
    trainer = make_trainer(tmp_path, train_batch_size=8, max_steps=100, **options)
    tokens = trainer.train_dataset.caption_tokens
    longest = max(range(len(tokens)), key=lambda row: len(tokens[row]))
    rows = [longest, *(row for row in range(0, 30, 4) if row != longest)][:8]
    batch = trainer.train_dataset.collate([trainer.train_dataset[row] for row in rows])
    trainer.state.max_steps, trainer.state.global_step = 100, 20
    if options:
        (call, names), *_ = trainer._group(batch).calls(8)
    else:  # every candidate is a caption of its own, as in a large collection
        rows = batch["candidates"].flatten()
        call = {"pixel_values": batch["pixel_values"], "input_ids": batch["input_ids"][rows],
                "attention_mask": batch["attention_mask"][rows],
                "pair_images": torch.arange(8), "pair_captions": torch.arange(len(rows)).view(8, -1)}  # fmt: skip
        names = ("logits",)
    call = call | {"attention_mask": torch.ones_like(call["attention_mask"])}
    kept, model = {}, trainer.model.train()
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = call_model(model, call, names)
    real = sum(size for place, size in kept.items() if place not in weights)
    assert set(outputs) == set(names) and (not options or set(FEATURES) < set(names))
    assert 0.99 * real < trainer.batch_cost[1] < 1.1 * real
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        call_model(model, call, names)
    assert trainer.batch_cost[0] == counter.get_total_flops()


def test_ranking_costs_what_its_parts_cost():
    config = IeftConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
                        image_size=32, patch_size=8, enhancement_layers=[1], vocab_size=100)  # fmt: skip
    model = IeftForImageTextRetrieval(config).eval()
    found = measure_ranking(model, 7)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        images = model.prepare_images(torch.zeros(1, 3, 32, 32))
        captions = model.prepare_captions(torch.ones(1, 7, dtype=torch.long))
        model.score_prepared(captions, images)
    assert sum(found) == counter.get_total_flops() and min(found) > 0
    assert found.of(3, 5) == 3 * found.image + 5 * found.caption + 15 * found.pair


# Memory --------------------------------------------------------------------------------------------------------------


def test_the_micro_batch_is_the_share_halved_until_it_fits():
    device = torch.device("cpu")
    usable = cost.USABLE["cpu"] * free_memory(device)
    image = usable / cost.WORKING_SHARE / 40  # forty images would fit exactly
    assert fit_micro_batch(100, image, 0, device) == 25
    assert fit_micro_batch(16, image, 0, device) == 16
    assert fit_micro_batch(100, image, 0.75 * usable, device) == 7  # ten would fit; other programs take some meanwhile
    assert fit_micro_batch(100, 1e18, 0, device) == 1


def test_a_training_takes_the_micro_batch_of_its_checkpoint_or_what_fits(tmp_path, monkeypatch):
    options = {"train_batch_size": 8, "max_steps": 4}
    make_trainer(tmp_path, per_device_train_batch_size=3, **options).train()
    state = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["train_batch_size"] == 3
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert resumed.args.per_device_train_batch_size == 3
    started = make_trainer(tmp_path / "new", **options | {"max_steps": 1})
    monkeypatch.setitem(
        cost.USABLE, "cpu", 3.5 * cost.WORKING_SHARE * started.image_bytes / free_memory(torch.device("cpu"))
    )
    monkeypatch.setattr("ieft.training.trainer.fixed_memory", lambda model: -started._train_batch_size * 12 * 32**2)
    started.train()
    assert started.args.per_device_train_batch_size == 2


# Batch ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, batch",
    [
        ({}, (8, None)),
        ({"per_device_train_batch_size": 6}, (6, 6)),
        ({"per_device_train_batch_size": 6, "gradient_accumulation_steps": 3}, (18, 6)),
        ({"train_batch_size": 64}, (64, None)),
        ({"train_batch_size": 64, "per_device_train_batch_size": 8}, (64, 8)),
        ({"train_batch_size": 64, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 8}, (64, 8)),
        ({"train_batch_size": 20, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3}, (20, 8)),
    ],
)
def test_the_total_decides(tmp_path, options, batch):
    args = IeftTrainingArguments(str(tmp_path), use_cpu=True, **options)
    assert (args.train_batch_size, args.per_device_train_batch_size) == batch
    assert args.gradient_accumulation_steps == 1


@pytest.mark.parametrize(
    "options, message",
    [
        ({"train_batch_size": 64, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 4},
         "follows from train_batch_size .64 images.*--train_batch_size 32"),
        ({"train_batch_size": 64, "gradient_accumulation_steps": 4}, "leave it out"),
        ({"train_batch_size": 64, "per_device_train_batch_size": 128}, "at most 64.*got 128.*pass --train_batch_size"),
        ({"train_batch_size": 0}, "train_batch_size must be above 0"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be above 0"),
        ({"auto_find_batch_size": True}, "leave out auto_find_batch_size"),
        ({"accelerator_config": {"split_batches": True}}, "leave out .*split_batches"),
    ],
)  # fmt: skip
def test_options_that_contradict_the_total_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        IeftTrainingArguments(str(tmp_path), use_cpu=True, **options)


def test_a_resumed_run_may_have_other_micro_batches_but_no_other_batch(tmp_path):
    def folder(*arguments):
        parsed = run_retrieval.parse_arguments(["--use_cpu", "--output_dir", str(tmp_path), *arguments])
        return OutputFolder(tmp_path, **run_retrieval.deciding_options(*parsed))

    folder("--train_batch_size", "32").record()
    (tmp_path / "checkpoint-1").mkdir()  # incomplete: the run begins again
    folder("--train_batch_size", "32", "--per_device_train_batch_size", "4").find_checkpoint("true")
    with pytest.raises(ValueError, match="train_batch_size was 32 and is 64"):
        folder().find_checkpoint("true")
    record = json.loads((tmp_path / ".run.json").read_text())
    record["training"]["per_device_train_batch_size"] = record["training"].pop("train_batch_size")  # earlier versions
    (tmp_path / ".run.json").write_text(json.dumps(record))
    folder("--train_batch_size", "32").find_checkpoint("true")
    with pytest.raises(ValueError, match="train_batch_size was 32 and is 64"):
        folder().find_checkpoint("true")


# Evaluation in proportion --------------------------------------------------------------------------------------------


def test_a_selection_fits_its_budget():
    rows = choose_selection(1000, lambda count: count**2, 100**2, seed=3)
    assert len(rows) == 100 and np.array_equal(rows, np.unique(rows)) and rows.max() < 1000
    assert np.array_equal(rows, choose_selection(1000, lambda count: count**2, 101**2 - 1, seed=3))
    assert not np.array_equal(rows, choose_selection(1000, lambda count: count**2, 100**2, seed=4))
    assert len(choose_selection(1000, lambda count: count**2, 1, seed=3)) == cost.FEWEST_IMAGES
    assert np.array_equal(choose_selection(20, lambda count: count, 1, seed=3), np.arange(20))
    assert np.array_equal(choose_selection(50, lambda count: count, float("inf"), seed=3), np.arange(50))


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 7, "eval_steps": 3, "save_steps": 3},
        {"max_steps": 26, "eval_steps": 0.9, "save_steps": 0.9},
        {"max_steps": -1, "num_train_epochs": 2.5, "eval_strategy": "epoch", "save_strategy": "epoch"},
        {"max_steps": 4, "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False},
    ],
)
def test_steps_and_evaluations_are_those_of_the_training(tmp_path, options, caplog):
    """Six steps an epoch; the log has the table before, and the time left after 20 steps."""
    trainer = make_trainer(tmp_path, train_batch_size=6, **options)
    cost_of_training = TrainingCost(trainer, [trainer.eval_dataset])
    trainer.add_callback(cost_of_training)
    with caplog.at_level(logging.INFO, logger="ieft.training.cost"):
        trainer.train()
    evaluations = sum("eval_mean_recall" in entry for entry in trainer.state.log_history)
    assert count_steps(trainer.args, 32) == (trainer.state.global_step, evaluations)
    table = next(message for message in caplog.messages if message.startswith("Parameters"))
    assert f"Steps       {trainer.state.global_step}" in table
    assert "Batch       6 images a step = 1 device x 1 micro-batch x 6 images" in table
    weights = sum(weight.numel() for weight in trainer.model.parameters())
    assert f"Parameters  {weights / 1e6:.2f} million" in table
    if evaluations:
        assert f"{evaluations} evaluations of 4 images x 8 captions" in table
    left = re.findall(
        r"Step (\d+), \S+ s a step: about \d+ s of training left, \d+ s of .* and \d+ s after", caplog.text
    )
    assert len(left) == (trainer.state.global_step > 20)


def test_checkpoints_are_selected_on_a_part_and_the_final_evaluation_is_whole(tmp_path, caplog):
    options = ["--use_cpu", "--disable_tqdm", "true", "--max_train_samples", "8", "--max_eval_samples", "34",
               "--max_predict_samples", "3", "--output_dir", str(tmp_path)]  # fmt: skip
    train = [
        "--first_joint_layer",
        "2",
        "--train_batch_size",
        "8",
        "--max_steps",
        "2",
        "--eval_steps",
        "1",
        "--save_steps",
        "1",
    ]
    with caplog.at_level(logging.INFO):
        run_retrieval.main([*options, *train])
    assert "Checkpoints are selected on 32 of the 34 validation images" in caplog.text
    results = json.loads((tmp_path / "all_results.json").read_text())
    assert results["selection_num_images"] == 32 and results["selection_num_captions"] > 32
    assert json.loads((tmp_path / "selection_results.json").read_text())["selection_num_images"] == 32
    whole = json.loads((tmp_path / "eval_results.json").read_text())
    run_retrieval.main([*options, "--do_eval"])
    again = json.loads((tmp_path / "eval_results.json").read_text())
    assert {name: whole[name] for name in again if name != "epoch"} == {
        name: value for name, value in again.items() if name != "epoch"
    }
