"""Tests of the distillation loss against a loop over lists, and of training on a teacher's scores."""

import pytest
import torch
from test_run_retrieval import SMALL
from test_trainer import first_batch, make_trainer, processor, split  # noqa: F401

import run_retrieval
from ieft.training.distillation import check_teacher, group_divergence, listwise_divergence
from ieft.training.items import learn_tokenizer
from ieft.training.losses import matching_loss
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftProcessor


def slow_divergence(scores, teacher_scores):
    """sum p log(p / q) of one list."""
    student, teacher = scores.softmax(0), teacher_scores.softmax(0)
    return sum(p * torch.log(p / q) for p, q in zip(teacher, student, strict=True))


def make_scores():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 3, 5, 5, generator=generator).double()


def test_divergence_equals_one_list_at_a_time():
    scores, teacher_scores = make_scores()
    lists = [slow_divergence(*pair) for pair in zip(scores.view(-1, 5), teacher_scores.view(-1, 5), strict=True)]
    torch.testing.assert_close(listwise_divergence(scores, teacher_scores), torch.stack(lists).mean())
    assert listwise_divergence(scores, scores + 3).abs() < 1e-12


def test_groups_are_lists_both_ways_without_other_right_pairs():
    scores, teacher_scores = make_scores()
    is_match = torch.eye(5, dtype=torch.bool).repeat(3, 1, 1)
    is_match[0, 1, 3] = is_match[2, 0, 4] = True
    lists = []
    for group in range(3):
        for own in range(5):
            columns = [j for j in range(5) if j == own or not is_match[group, own, j]]
            rows = [i for i in range(5) if i == own or not is_match[group, i, own]]
            lists.append(slow_divergence(scores[group, own, columns], teacher_scores[group, own, columns]))
            lists.append(slow_divergence(scores[group, rows, own], teacher_scores[group, rows, own]))
    torch.testing.assert_close(group_divergence(scores, teacher_scores, is_match), torch.stack(lists).mean())


def test_gradients_are_finite_where_entries_are_left_out():
    scores, teacher_scores = (x.float().requires_grad_() for x in make_scores())
    is_match = torch.eye(5, dtype=torch.bool).repeat(3, 1, 1)
    is_match[0, 1] = True
    group_divergence(scores, teacher_scores, is_match).backward()
    assert torch.isfinite(scores.grad).all() and scores.grad.abs().max() > 0


def with_teacher(trainer):
    """A trainer and a confident teacher with other weights, both without dropout."""
    torch.manual_seed(5)
    teacher = IeftForImageTextRetrieval(trainer.model.config)
    with torch.no_grad():
        teacher.rank_output.weight *= 30
    trainer.teacher = teacher.eval().requires_grad_(False)
    trainer.model.eval()
    return trainer


def test_published_loss_with_a_teacher_equals_its_parts(split, processor, tmp_path):  # noqa: F811
    trainer = make_trainer(split, processor, tmp_path, distillation_weight=0.5)
    batch = first_batch(trainer)
    plain = trainer.model.eval() and trainer.compute_loss(trainer.model, batch)
    with_teacher(trainer)
    lists = []
    for row, candidates in enumerate(batch["candidates"]):
        pixels = batch["pixel_values"][row : row + 1].expand(4, -1, -1, -1)
        inputs = (batch["input_ids"][candidates], batch["attention_mask"][candidates])
        scores = [network(*inputs, pixel_values=pixels).logits[:, 0] for network in (trainer.model, trainer.teacher)]
        lists.append(slow_divergence(*scores))
    expected = plain + 0.5 * torch.stack(lists).mean()
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_group_loss_with_a_teacher_equals_its_parts(split, processor, tmp_path):  # noqa: F811
    trainer = make_trainer(split, processor, tmp_path, contrastive=True, groups_per_step=1)
    batch = first_batch(trainer)
    own = batch["candidates"][:, 0]
    ids, mask, is_match = batch["input_ids"][own], batch["attention_mask"][own], batch["is_match"][:, own]
    trainer.state.max_steps, trainer.state.global_step = 100, 0
    trainer.model.eval()
    plain = trainer.compute_loss(trainer.model, batch)
    with_teacher(trainer)
    assert torch.equal(trainer.compute_loss(trainer.model, batch), plain)  # the ranking loss has not joined yet
    trainer.state.global_step = 20
    (group,) = trainer._choose_groups({}, is_match, mined=False)
    tables = []
    for network in (trainer.model, trainer.teacher):
        rows = [
            network(ids[group], mask[group], pixel_values=batch["pixel_values"][[image] * 4]).logits[:, 0]
            for image in group.tolist()
        ]
        tables.append(torch.stack(rows)[None])
    matches = is_match[group][:, group][None]
    expected = plain + matching_loss(tables[0], matches) + group_divergence(*tables, matches)
    torch.testing.assert_close(trainer.compute_loss(trainer.model, batch), expected)


def test_a_student_comes_to_score_as_its_teacher(split, processor, tmp_path):  # noqa: F811
    trainer = make_trainer(split, processor, tmp_path, max_steps=60, learning_rate=5e-3, distillation_weight=20.0)
    with_teacher(trainer)
    before = {name: tensor.clone() for name, tensor in trainer.teacher.state_dict().items()}
    batch = first_batch(trainer)

    def divergence():
        trainer.model.eval()
        tensors = {name: batch[name] for name in ("pixel_values", "input_ids", "attention_mask")}
        tensors |= {
            "pair_images": torch.arange(6).repeat_interleave(4),
            "pair_captions": batch["candidates"].flatten(),
        }
        scores = [network(**tensors).logits.view(6, 4) for network in (trainer.model, trainer.teacher)]
        return listwise_divergence(*scores).item()

    untrained = divergence()
    trainer.train()
    assert divergence() < untrained / 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.teacher.state_dict().items())


def test_the_command_trains_a_late_student_on_a_teacher(tmp_path):
    common = [*SMALL, "--do_train", "--max_steps", "2", "--eval_strategy", "no", "--save_strategy", "no"]
    run_retrieval.main([*common, "--output_dir", str(tmp_path / "exact")])
    late = ["--first_joint_layer", "2", "--teacher", str(tmp_path / "exact"), "--do_predict"]
    results = run_retrieval.main([*common, *late, "--output_dir", str(tmp_path / "late")])
    assert results["num_images"] == 8
    student = IeftForImageTextRetrieval.from_pretrained(tmp_path / "late")
    assert student.config.first_joint_layer == 2


def test_a_teacher_of_other_words_or_another_size_is_refused(split, processor, tmp_path):  # noqa: F811
    student = make_trainer(split, processor, tmp_path).model
    config = type(student.config)(**(student.config.to_dict() | {"image_size": 48}))
    other = IeftProcessor(processor.image_processor, learn_tokenizer(["a field ."]))
    with pytest.raises(ValueError, match="the teacher's has .* entries, the student's"):
        check_teacher(student, other, student, processor)
    with pytest.raises(ValueError, match="image_size expected, 32; the teacher's is 48"):
        check_teacher(IeftForImageTextRetrieval(config), processor, student, processor)
