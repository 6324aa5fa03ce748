"""Tests of losses, mined groups and evaluation by ranking, and of training that is reproducible bit for bit."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import set_seed

from configuration_ieft import IeftConfig
from ieft.cpu import prepacked
from ieft.data.scenes import draw_scene
from ieft.evaluation import ranking
from ieft.evaluation.metrics import retrieval_recalls
from ieft.training.items import EvaluationSet, TrainingItems, learn_tokenizer
from ieft.training.losses import matching_loss
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor


@pytest.fixture(scope="module")
def split():
    scenes = [draw_scene(1, index, size=32) for index in range(12)]
    return Dataset.from_dict({"image": [s.image for s in scenes], "captions": [s.captions for s in scenes]})


@pytest.fixture(scope="module")
def processor(split):
    tokenizer = learn_tokenizer(caption for row in split["captions"] for caption in row)
    return IeftProcessor(IeftImageProcessor(image_size=32), tokenizer)


def make_trainer(split, processor, folder, *, contrastive=False, seed=0, **changes):
    set_seed(seed)
    config = IeftConfig(
        vocab_size=len(processor.tokenizer), hidden_size=24, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, image_size=32, patch_size=8, enhancement_layers=[1], initializer_range=0.1,
        contrastive_dim=16 if contrastive else 0,
    )  # fmt: skip
    options = {
        "output_dir": str(folder), "per_device_train_batch_size": 6, "max_steps": 4, "learning_rate": 1e-3,
        "num_negatives": 3, "contrastive_weight": 1.0 if contrastive else 0.0, "seed": seed, "use_cpu": True,
        "disable_tqdm": True, "remove_unused_columns": False, "save_strategy": "no", "logging_steps": 1,
    }  # fmt: skip
    args = IeftTrainingArguments(**(options | changes))
    items = TrainingItems(
        split, processor, num_negatives=0 if contrastive else args.num_negatives, augmentation="turns", seed=seed
    )
    evaluation_set = EvaluationSet.from_split(split, processor)
    model = IeftForImageTextRetrieval(config)
    return IeftTrainer(model, args, train_dataset=items, eval_dataset=evaluation_set)


def first_batch(trainer, size=6):
    items = trainer.train_dataset
    return items.collate([items[row] for row in range(0, 5 * size, 5)])  # one caption of each of the first images


# Losses --------------------------------------------------------------------------------------------------------------


def slow_matching_loss(scores, is_match):
    """Cross-entropy one row and one column at a time, without other matching pairs."""
    losses = []
    for group, matches in zip(scores, is_match, strict=True):
        for own in range(len(group)):
            for line, others in ((group[own], matches[own]), (group[:, own], matches[:, own])):
                kept = [line[j] for j in range(len(group)) if j == own or not others[j]]
                losses.append(torch.logsumexp(torch.stack(kept), 0) - line[own])
    return torch.stack(losses).mean()


def test_matching_loss_equals_one_query_at_a_time():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 5, 5, generator=generator)
    is_match = torch.eye(5, dtype=torch.bool).repeat(3, 1, 1)
    is_match[0, 1, 3] = is_match[0, 3, 1] = is_match[2, 0, 4] = True
    torch.testing.assert_close(matching_loss(scores, is_match), slow_matching_loss(scores, is_match))


def test_published_loss_is_cross_entropy_of_the_own_caption_among_the_candidates(split, processor, tmp_path):
    trainer = make_trainer(split, processor, tmp_path)
    trainer.model.eval()
    batch = first_batch(trainer)
    losses = []
    for row, candidates in enumerate(batch["candidates"]):
        scores = trainer.model(
            batch["input_ids"][candidates],
            batch["attention_mask"][candidates],
            pixel_values=batch["pixel_values"][row : row + 1].expand(4, -1, -1, -1),
        ).logits[:, 0]
        losses.append(torch.logsumexp(scores, 0) - scores[0])
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), torch.stack(losses).mean())


def test_contrastive_and_group_loss_equals_its_parts(split, processor, tmp_path):
    trainer = make_trainer(split, processor, tmp_path, contrastive=True, contrastive_weight=0.5, groups_per_step=1)
    model = trainer.model.eval()
    batch = first_batch(trainer)
    own = batch["candidates"][:, 0]
    ids, mask, is_match = batch["input_ids"][own], batch["attention_mask"][own], batch["is_match"][:, own]
    similarity = model.get_image_features(batch["pixel_values"]) @ model.get_text_features(ids, mask).T
    contrastive = slow_matching_loss((similarity * model.similarity_scale())[None], is_match[None])
    trainer.state.max_steps, trainer.state.global_step = 100, 0
    torch.testing.assert_close(trainer.compute_loss(model, batch), 0.5 * contrastive)
    trainer.state.global_step = 20  # the ranking loss has joined, groups are random
    tensors = {"pixel_values": batch["pixel_values"], "input_ids": ids, "attention_mask": mask}
    (group,) = trainer._choose_groups(tensors, is_match, mined=False)
    scores = torch.stack(
        [
            model(ids[group], mask[group], pixel_values=batch["pixel_values"][[image] * 4]).logits[:, 0]
            for image in group.tolist()
        ]
    )
    ranking = slow_matching_loss(scores[None], is_match[group][:, group][None])
    torch.testing.assert_close(trainer.compute_loss(model, batch), 0.5 * contrastive + ranking)


@pytest.mark.parametrize("groups_per_step, shape", [(None, (3, 4)), (1, (1, 4)), (2, (2, 4))])
def test_random_groups_are_rows_of_the_batch_without_repeats(split, processor, tmp_path, groups_per_step, shape):
    trainer = make_trainer(split, processor, tmp_path, contrastive=True, groups_per_step=groups_per_step)
    is_match = torch.eye(12, dtype=torch.bool)
    groups = trainer._choose_groups({}, is_match, mined=False)
    assert groups.shape == shape
    assert len(groups.unique()) == groups.numel()
    trainer.state.global_step = 1
    assert not torch.equal(trainer._choose_groups({}, is_match, mined=False), groups)


def test_mined_groups_are_what_the_embeddings_confuse_and_never_a_match(split, processor, tmp_path):
    trainer = make_trainer(split, processor, tmp_path, contrastive=True, groups_per_step=2)
    batch = first_batch(trainer)
    own = batch["candidates"][:, 0]
    tensors = {
        "pixel_values": batch["pixel_values"],
        "input_ids": batch["input_ids"][own],
        "attention_mask": batch["attention_mask"][own],
    }
    is_match = batch["is_match"][:, own].clone()
    groups = trainer._choose_groups(tensors, is_match, mined=True)
    model = trainer.model.eval()
    similarity = model.get_image_features(tensors["pixel_values"]) @ model.get_text_features(
        tensors["input_ids"], tensors["attention_mask"]
    ).T  # fmt: skip
    both_ways = similarity + similarity.T
    for group in groups.tolist():
        others = [row for row in range(6) if row != group[0] and not is_match[group[0], row]]
        hardest = sorted(others, key=lambda row: -both_ways[group[0], row].item())[:3]
        assert group[1:] == hardest
    nearest = groups[0, 1].item()
    is_match[groups[0, 0], nearest] = True
    assert nearest not in trainer._choose_groups(tensors, is_match, mined=True)[0].tolist()


# Evaluation and training ---------------------------------------------------------------------------------------------


def test_evaluation_ranks_the_whole_matrix(split, processor, tmp_path):
    trainer = make_trainer(split, processor, tmp_path)
    metrics = trainer.evaluate()
    evaluation_set = trainer.eval_dataset
    model = trainer.model.eval()
    scores = np.empty((12, len(evaluation_set.captions)), dtype=np.float32)
    with torch.no_grad():
        for column, caption in enumerate(evaluation_set.caption_tokens):
            for row in range(12):
                scores[row, column] = model(
                    torch.tensor([caption]), pixel_values=evaluation_set.images[row][None]
                ).logits.item()
    expected = retrieval_recalls(scores, evaluation_set.caption_image, evaluation_set.caption_text_id)
    assert {name: metrics[f"eval_{name}"] for name in expected} == pytest.approx(expected)
    both = trainer.evaluate({"one": evaluation_set, "two": evaluation_set})
    assert both["eval_one_mean_recall"] == both["eval_two_mean_recall"] == metrics["eval_mean_recall"]


def test_evaluation_in_bfloat16_while_training_in_float32(split, processor, tmp_path, monkeypatch):
    """By the prepacked copy, also in the middle of training: scores of about 0.5 within 0.01."""
    monkeypatch.setattr(ranking, "multiplies_bfloat16", lambda: True)  # imitated, if need be
    monkeypatch.setattr(prepacked, "multiplies_bfloat16", lambda: True)
    trainer, exact = (
        make_trainer(split.select(range(4)), processor, tmp_path, bf16_full_eval=half, learning_rate=1e-2)
        for half in (True, False)
    )
    trainer.train()
    exact.model.load_state_dict(trainer.model.train().state_dict())
    scores, expected = trainer.score(trainer.eval_dataset), exact.score(trainer.eval_dataset)
    assert not np.array_equal(scores, expected) and np.abs(scores - expected).max() < 0.01
    assert trainer.evaluate()["eval_mean_recall"] == trainer.recalls(trainer.eval_dataset, scores)["mean_recall"]
    assert trainer.model.training and trainer.model.dtype == torch.float32


@pytest.mark.parametrize("contrastive", [False, True])
def test_training_twice_ends_in_the_same_weights(split, processor, tmp_path, contrastive):
    weights = []
    for run, seed in enumerate((3, 3, 4)):
        trainer = make_trainer(split, processor, tmp_path / str(run), contrastive=contrastive, seed=seed)
        before = trainer.model.rank_output.weight.clone()
        trainer.train()
        weights.append({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
        assert not torch.equal(before, trainer.model.rank_output.weight)
    first, again, other_seed = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other_seed[name]) for name in first)


def test_training_learns_what_it_is_shown(split, processor, tmp_path):
    trainer = make_trainer(
        split, processor, tmp_path, contrastive=True, max_steps=160, learning_rate=2e-3, ranking_start=0.0,
        per_device_train_batch_size=12, num_negatives=11,
    )  # fmt: skip
    before = trainer.evaluate()["eval_mean_recall"]
    trainer.train()
    assert trainer.evaluate()["eval_mean_recall"] > before + 20


def test_epochs_reach_the_items(split, processor, tmp_path):
    trainer = make_trainer(split, processor, tmp_path, max_steps=25)  # sixty captions, ten steps an epoch
    seen = []
    set_epoch = trainer.train_dataset.set_epoch
    trainer.train_dataset.set_epoch = lambda epoch: seen.append(epoch) or set_epoch(epoch)
    trainer.train()
    assert list(dict.fromkeys(seen)) == [0, 1, 2] and seen == sorted(seen)


def test_the_best_checkpoint_comes_back(split, processor, tmp_path):
    trainer = make_trainer(
        split, processor, tmp_path, contrastive=True, max_steps=6, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="mean_recall",
        greater_is_better=True, learning_rate=2e-2,
    )  # fmt: skip
    trainer.train()
    recalls = [entry["eval_mean_recall"] for entry in trainer.state.log_history if "eval_mean_recall" in entry]
    assert len(recalls) == 3
    assert trainer.evaluate()["eval_mean_recall"] == pytest.approx(max(recalls))


def test_a_limit_of_one_checkpoint_keeps_the_newest_beside_the_best(tmp_path):
    """The Trainer would delete the newest at the end, and a resumed run would train again."""
    together = {"eval_strategy": "steps", "save_strategy": "steps", "load_best_model_at_end": True}
    limits = [
        IeftTrainingArguments(str(tmp_path), save_total_limit=1, use_cpu=True, **options).save_total_limit
        for options in (together, {})
    ]
    assert limits == [2, 1]
