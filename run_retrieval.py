"""Train and evaluate IEFT for image-text retrieval.

    python run_retrieval.py --dataset_name scenes --output_dir outputs/scenes
    accelerate launch run_retrieval.py --dataset_name rsicd

Training writes the model and its processor, results, figures and a model card to `--output_dir`. With only `--do_eval`
or `--do_predict`, a trained model is evaluated: that of `--model_name_or_path`, or the one in `--output_dir`. Options
can also be given as one JSON or YAML file, which must then be the only argument.
"""

import argparse
import json
import logging
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path

import datasets
import torch
import transformers
from datasets import concatenate_datasets
from transformers import HfArgumentParser, PretrainedConfig, set_seed

from configuration_ieft import CALIBRATION, IeftConfig
from convert_checkpoint import VILT_RELEASE, load_any_checkpoint
from ieft.data.downloads import is_url
from ieft.data.duplicates import find_copies, make_thumbnail
from ieft.data.invalid_examples import BadRowsError, save_bad_rows
from ieft.evaluation.calibration import MOST_SENTENCES, fit_probability, judge_probability, shown_pairs
from ieft.evaluation.embedders import full_name, load_embedder
from ieft.evaluation.report import (
    ranked_sheet,
    recall_table,
    reliability_diagram,
    training_curves,
    two_stage_table,
)
from ieft.evaluation.two_stage import choose_similarity_weight, compare_stages, make_shortlists
from ieft.hub import check_repository, push_folder, write_model_card
from ieft.training.checkpoints import explained_if_not_written, write_json
from ieft.training.cost import TrainingCost
from ieft.training.distillation import check_teacher
from ieft.training.distributed import is_lost_process, leave_processes
from ieft.training.items import AUGMENTATIONS, NEGATIVES, EvaluationSet, TrainingItems, learn_tokenizer
from ieft.training.output_folder import OF_THE_MODEL, OutputFolder
from ieft.training.settings import SETTINGS_ENDINGS, read_settings, refuse_settings
from ieft.training.trainer import IeftTrainer, IeftTrainingArguments
from modeling_ieft import IeftForImageTextRetrieval
from prepare_datasets import load_and_check, load_lazily, published_counts
from processing_ieft import IeftImageProcessor, IeftProcessor

logger = logging.getLogger("run_retrieval")

# The published network; one for photographs from scratch, by late fusion; one for synthetic scenes.
NETWORKS = {
    "base": {},
    "small": {
        "image_size": 128,
        "patch_size": 16,
        "hidden_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 512,
        "enhancement_layers": [1, 2],
        "enhancement_num_heads": 8,
        "enhancement_mlp_ratio": 2,
        "initializer_range": 0.05,
        "hidden_dropout_prob": 0.0,
        "first_joint_layer": 3,
    },
    "tiny": {
        "image_size": 96,
        "patch_size": 24,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 128,
        "enhancement_layers": [0, 1, 2],
        "enhancement_mlp_ratio": 2,
        "initializer_range": 0.08,
        "hidden_dropout_prob": 0.0,
    },
}
# Defaults: the published recipe, and the differences for the small networks.
PUBLISHED_RECIPE = {
    "learning_rate": 1e-4,
    "adam_beta2": 0.98,
    "weight_decay": 0.01,
    "warmup_steps": 0.1,
    "seed": 0,
    "num_train_epochs": 50,
    "train_batch_size": 256,
    "eval_strategy": "epoch",
    "save_strategy": "epoch",
    "save_total_limit": 2,
    "logging_steps": 10,
}
TINY_RECIPE = {
    "learning_rate": 2e-3,
    "train_batch_size": 64,
    "max_steps": 800,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 200,
    "save_steps": 200,
    "augmentation": "turns",
    "contrastive_weight": 1.0,
    "num_negatives": 10,
    "groups_per_step": 1,
}
SMALL_RECIPE = {
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.1,
    "train_batch_size": 64,
    "max_steps": 3000,
    "eval_strategy": "steps",
    "save_strategy": "steps",
    "eval_steps": 500,
    "save_steps": 500,
    "augmentation": "crops",
    "contrastive_weight": 1.0,
    "ranking_start": 0.05,
    "num_negatives": 63,
    "groups_per_step": 1,
}
NETWORK_RECIPES = {"base": {}, "small": SMALL_RECIPE, "tiny": TINY_RECIPE}
LARGEST_WIDTHS = {"tiny": 64, "small": 128}  # checkpoints up to these hidden sizes are trained with their recipes
SYNTHETIC = ("scenes", "twins")
DATASET_RECIPES = {
    "sydney": {"train_batch_size": 512, "num_train_epochs": 100},
    "ucm": {"num_train_epochs": 100},
}
STAGES = ("do_train", "do_eval", "do_predict")  # without options, all of them
ALL_STAGES = (*STAGES, "do_calibrate")
SECONDS_FOR_THE_MAIN_PROCESS = 10
# Options that affect the result of training: a resumed run must repeat them.
DECIDES_TRAINING = (
    "model_name_or_path", "network", "first_joint_layer", "teacher", "fit", "enhancement_layers", "contrastive_dim",
    "dataset_name", "data_dir", "image_column", "caption_column", "bands", "protocol", "on_bad_rows",
    "max_train_samples", "max_eval_samples", "negatives", "augmentation", "phrase_probability", "num_negatives",
    "contrastive_weight", "selection_cost", "ranking_start", "mining_start", "batches", "groups_per_step",
    "distillation_weight", "seed", "learning_rate", "train_batch_size", "num_train_epochs", "max_steps",
    "warmup_steps", "lr_scheduler_type", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "optim", "bf16", "fp16", "bf16_full_eval", "fp16_full_eval",
)  # fmt: skip
# Options that affect the result of an evaluation, which may only replace results with the same options.
DECIDES_EVALUATION = (
    "model_name_or_path", "dataset_name", "data_dir", "image_column", "caption_column", "bands", "protocol",
    "on_bad_rows", "max_eval_samples", "max_predict_samples", "fit", "first_joint_layer", "rerank_top_k",
    "eval_datasets", "embedder",
)  # fmt: skip
# Option -> stages, at least one of which must run for the option to have an effect.
NEEDED_STAGES = {
    "teacher": ("do_train",),
    "enhancement_layers": ("do_train",),
    "rerank_top_k": ("do_predict",),
    "eval_datasets": ("do_predict",),
    "network": ("do_train",),
    "from_scratch": ("do_train",),
    "contrastive_dim": ("do_train",),
    "selection_cost": ("do_train",),
    "phrase_probability": ("do_train",),
}
ABOUT_ONE_COLLECTION = ("data_dir", "image_column", "caption_column")
ABOUT_COLLECTIONS = ("bands", "streaming", "on_bad_rows")  # they also apply to `--eval_datasets`
SHOWN_ON_THE_CARD = (
    "learning_rate", "train_batch_size", "world_size", "num_train_epochs", "max_steps", "num_negatives",
    "negatives", "augmentation", "phrase_probability", "contrastive_weight", "seed",
)  # fmt: skip


@dataclass
class ModelArguments:
    """Which network to start from."""

    model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder, .ckpt or URL of an IEFT or ViLT checkpoint. Default of --network base: the file "
            f"that the published training starts from, {VILT_RELEASE}. Small networks start from scratch."
        },
    )
    network: str = field(
        default="base",
        metadata={
            "help": "base (the published network), small (for photographs, from scratch) or tiny (the default for "
            "synthetic scenes).",
            "choices": list(NETWORKS),
        },
    )
    from_scratch: bool = field(
        default=False, metadata={"help": "Train --network base from random weights, with a vocabulary of its own."}
    )
    first_joint_layer: int | None = field(
        default=None,
        metadata={
            "help": "Fusion layer: first block that reads caption and image together; blocks below encode each side "
            "once for all pairs. 0: the published network; the last block: fastest. Default: the checkpoint's, or 0."
        },
    )
    teacher: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder, .ckpt or URL of an IEFT whose scores are distilled into the model; both have "
            "the same vocabulary. See --distillation_weight."
        },
    )
    fit: str | None = field(
        default=None,
        metadata={
            "help": "How images that are not square are resized: crop or squash. Default: the checkpoint's, or crop.",
            "choices": ["crop", "squash"],
        },
    )
    enhancement_layers: list[int] | None = field(
        default=None,
        metadata={"help": "Blocks of a new network that have a visual enhancement stage before them."},
    )
    overwrite_repository: bool = field(
        default=False,
        metadata={"help": "With --push_to_hub: replace a repository that holds files of another origin."},
    )
    contrastive_dim: int = field(
        default=256,
        metadata={"help": "Size of the contrastive embeddings, used if --contrastive_weight is above 0."},
    )


@dataclass
class DataArguments:
    """Which images and captions."""

    dataset_name: str = field(
        default="scenes",
        metadata={"help": "scenes, twins, rsicd, rsitmd, ucm, sydney, nwpu, a folder, file or archive, or user/name."},
    )
    data_dir: str | None = field(
        default=None,
        metadata={"help": "Folder, zip or tar of a named dataset, as distributed. Default for rsicd: from the Hub."},
    )
    image_column: str | None = field(default=None, metadata={"help": "Image column of tables and Hub datasets."})
    caption_column: str | None = field(default=None, metadata={"help": "Caption column of tables and Hub datasets."})
    eval_datasets: list[str] | None = field(
        default=None,
        metadata={
            "help": "Also evaluate on the test split of each of these datasets, excluding images that the model was "
            "trained on. Give a folder as rsicd=FOLDER, another split as rsicd=FOLDER:validation."
        },
    )
    bands: str | None = field(
        default=None,
        metadata={"help": "Bands used as red, green and blue, from 1, such as 3,2,1; for all images of the run."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read images from their source whenever they are used, without copies: for collections "
                          "larger than the disk. Not for datasets on the Hub."},
    )  # fmt: skip
    negatives: str = field(
        default="distinct",
        metadata={
            "help": "distinct: never a sentence that the image itself carries; uniform: any other, as published.",
            "choices": list(NEGATIVES),
        },
    )
    augmentation: str = field(
        default="randaugment",
        metadata={
            "help": "randaugment, turns (flips and quarter turns, for images without an orientation), crops (the "
            "same with random crops and colours) or none.",
            "choices": list(AUGMENTATIONS),
        },
    )
    phrase_probability: float = field(
        default=0.0,
        metadata={
            "help": "How often a training caption is replaced by a phrase of it, such as 'white storage tanks', so "
            "that short queries are learnt too: 0.5, for example. 0, as published: never."
        },
    )
    protocol: str = field(
        default="clean",
        metadata={
            "help": "clean: choose the checkpoint on validation, evaluate once on test. published: train on train and "
            "validation, choose the checkpoint on test.",
            "choices": ["clean", "published"],
        },
    )
    on_bad_rows: str = field(
        default="stop",
        metadata={
            "help": "Invalid examples (unreadable images, blank captions): stop before training, or skip them.",
            "choices": ["stop", "skip"],
        },
    )
    rerank_top_k: int | None = field(
        default=None,
        metadata={
            "help": "Also evaluate two-stage retrieval on the test split: this many candidates by embedding, "
            "re-ranked by the network. Needs contrastive heads or --embedder."
        },
    )
    embedder: str | None = field(
        default=None,
        metadata={
            "help": "What embeds for --rerank_top_k and mines for --batches embedder, instead of the network's own "
            "heads: a CLIP or SigLIP of transformers (folder or user/name), or of open_clip hf-hub:user/name or "
            "ARCHITECTURE:FILE such as ViT-B-32:RemoteCLIP-ViT-B-32.pt."
        },
    )
    selection_cost: float = field(
        default=0.1,
        metadata={
            "help": "What selecting the checkpoint on validation may cost, as a share of training: a random part of "
            "the validation images is used where all would cost more. inf: all. The final evaluation uses all."
        },
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use at most this many training images."})
    max_eval_samples: int | None = field(default=None, metadata={"help": "Use at most this many validation images."})
    max_predict_samples: int | None = field(default=None, metadata={"help": "Use at most this many test images."})


def main(arguments=None):
    """Load, train, evaluate, save.

    Returns:
        dict | None: the content of `test_results.json`, or None without `--do_predict`.
    """
    model_args, data_args, args = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    push, args.push_to_hub = args.push_to_hub, False  # the folder is pushed once at the end, not with every checkpoint
    set_up_logging(args)
    folder = OutputFolder(args.output_dir, **deciding_options(model_args, data_args, args))
    if push and args.should_save and not model_args.overwrite_repository:
        check_push(args)
    checkpoint, damages = None, []
    if args.do_train:
        checkpoint, damages = folder.find_checkpoint(args.resume_from_checkpoint)
    else:
        model_args.model_name_or_path = folder.find_model(model_args.model_name_or_path)
    with folder.claimed() if args.should_save else nullcontext():
        for damage in damages:
            logger.warning("Skipping corrupt checkpoint: %s.", damage)
        if checkpoint or damages:
            logger.warning("Resuming from %s.", checkpoint or "the beginning: no checkpoint is complete")
        return run(model_args, data_args, args, folder, checkpoint, push)


def run(model_args, data_args, args, folder, checkpoint, push):
    """Run the stages, after `main` has checked that nothing is overwritten."""
    set_seed(args.seed)
    with args.main_process_first(desc="preparing the dataset"):
        splits, bad_rows = load_splits(data_args, args)
        others = load_others(data_args, splits, args.seed)
    model, processor = load_model(model_args, args, splits["train"]["captions"])
    if data_args.rerank_top_k and not (model.config.contrastive_dim or data_args.embedder):
        raise ValueError(
            "--rerank_top_k needs contrastive heads: train with --contrastive_weight 1, or pass --embedder, such as a "
            "CLIP."
        )
    teacher = load_teacher(model_args, args, model, processor)
    embedder = None
    if data_args.embedder:
        with args.main_process_first(desc="loading the embedder"):
            embedder = load_embedder(data_args.embedder, device="cpu")  # moved where and when it computes
    trainer = make_trainer(model, processor, splits, data_args, args, teacher, embedder)
    validation = trainer.eval_dataset
    if args.do_train:
        selection = select_validation(trainer, processor, splits, data_args, args)
    if args.should_save:
        folder.record()
    if args.do_train:
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.log_metrics("train", trainer.state.log_history[-1])
        calibrate(trainer, validation)
        with explained_if_not_written("The model", args.output_dir):
            trainer.save_model()
        save_results(trainer, "selection", selection, data_args)
    elif args.do_calibrate:
        calibrate_checkpoint(trainer, validation, model_args.model_name_or_path)
    if args.do_eval:
        save_results(trainer, "eval", trainer.evaluate(validation), data_args)
    results = predict(trainer, processor, splits["test"], data_args, len(bad_rows)) if args.do_predict else None
    if args.do_predict and data_args.rerank_top_k:
        results["two_stage"] = judge_two_stage(trainer, processor, splits, results, data_args, embedder)
    if args.do_predict and others:
        results["eval_datasets"] = rank_others(trainer, processor, others, data_args)
    is_calibrated = model.config.calibration_scale is not None
    judged = judge_calibration(trainer, processor, splits["test"]) if args.do_predict and is_calibrated else None
    if trainer.is_world_process_zero():
        if args.do_train:
            shown = {name: getattr(args, name, getattr(data_args, name, None)) for name in SHOWN_ON_THE_CARD}
            options = {"repo_id": args.hub_model_id, "base_model": model_args.model_name_or_path}
            on_card = {} if results is None else results | {"probability": judged}
            write_model_card(args.output_dir, on_card, training_arguments=shown, **options)
        if push:
            options = {"private": args.hub_private_repo, "overwrite": model_args.overwrite_repository}
            print(f"Pushed: {push_folder(args.output_dir, args.hub_model_id, token=args.hub_token, **options)}")
    return results


def check_push(args):
    """Refuse a repository of another origin before any work.

    Raises:
        ValueError: that names the option to pass.
    """
    try:
        check_repository(args.output_dir, args.hub_model_id, token=args.hub_token)
    except ValueError as error:
        raise ValueError(f"{error} On the command line that is --overwrite_repository.") from error


def parse_arguments(arguments):
    """The three groups of arguments; options of the user override the recipe of the dataset and network.

    Raises:
        ValueError: if options contradict each other or would be ignored.
    """
    parser = HfArgumentParser((ModelArguments, DataArguments, IeftTrainingArguments), allow_abbrev=False)
    parser.error = refuse_options
    if len(arguments) > 1 and arguments[0].endswith(SETTINGS_ENDINGS):
        raise ValueError(f"{arguments[0]} must be the only argument: write the other options into it.")
    if len(arguments) == 1 and arguments[0].endswith(SETTINGS_ENDINGS):
        parser.error = partial(refuse_settings, arguments[0])
        arguments = read_settings(
            arguments[0], {each.name for group in parser.dataclass_types for each in fields(group)}
        )
    unset = argparse.Namespace(**{each.name: None for group in parser.dataclass_types for each in fields(group)})
    parsed = vars(parser.parse_args(arguments, unset))  # without argparse's defaults
    given = {name: value for name, value in parsed.items() if value is not None}
    asked = [stage for stage in ALL_STAGES if given.get(stage)]
    stages = asked or [stage for stage in STAGES if given.get(stage) is not False]
    check_options(given, stages)
    defaults = choose_recipe(given)
    if "do_train" in stages and not given.get("from_scratch") and given.get("network", defaults["network"]) == "base":
        defaults["model_name_or_path"] = VILT_RELEASE  # a full-size network learns little from a benchmark alone
    model_args, data_args, args = parser.parse_dict(defaults | given)
    for stage in ALL_STAGES:
        setattr(args, stage, stage in stages)  # do_eval is switched on by eval_strategy otherwise
    return model_args, data_args, args


def refuse_options(message):
    """Raise a ValueError instead of argparse's usage, of which each process would print its own."""
    raise ValueError(f"{message}. See run_retrieval.py --help.")


def check_options(given, stages):
    """Refuse options that would be ignored, contradict each other, or are out of range.

    Args:
        given: option -> value, for the options that the user gave.
        stages: those of `STAGES` that run.
    """
    if not stages:
        raise ValueError("Nothing to do: pass --do_train, --do_eval or --do_predict, or none of them for all three.")
    if "do_calibrate" in stages:
        check_calibrate(given, stages)
    for name, needed in NEEDED_STAGES.items():
        if name in given and not set(needed) & set(stages):
            raise ValueError(f"--{name} has no effect without {' or '.join(f'--{each}' for each in needed)}.")
    for name in ("max_train_samples", "max_eval_samples", "max_predict_samples", "rerank_top_k", "contrastive_dim"):
        if name in given and given[name] < 1:
            raise ValueError(f"--{name} must be 1 or more; got {given[name]}.")
    listed = [name_of_results(wish) for wish in given.get("eval_datasets", [])]
    for name in listed:
        if listed.count(name) > 1:
            raise ValueError(
                f"--eval_datasets has {name} more than once, and results are listed by name: leave one out, or "
                "evaluate it in another run."
            )
    if not given.get("selection_cost", 1) > 0:
        raise ValueError(f"--selection_cost must be above 0; got {given['selection_cost']}.")
    if given.get("dataset_name", DataArguments.dataset_name) in SYNTHETIC:
        names = ABOUT_ONE_COLLECTION + (() if "eval_datasets" in given else ABOUT_COLLECTIONS)
        ignored = [name for name in names if given.get(name)]
        if ignored:
            raise ValueError(
                f"--{ignored[0]} has no effect on synthetic scenes. Pass --dataset_name with your dataset."
            )
    if "model_name_or_path" in given:
        for name in ("network", "enhancement_layers", "from_scratch"):
            if given.get(name, False) is not False:
                raise ValueError(
                    f"--{name} applies to a new network, but --model_name_or_path starts from a checkpoint "
                    "with its own. Pass only one of the two."
                )
    mines = given.get("batches") == "embedder" and "do_train" in stages
    if "embedder" in given and not mines and "rerank_top_k" not in given:
        raise ValueError("--embedder has no effect without --rerank_top_k or --batches embedder.")
    if mines and "embedder" not in given:
        raise ValueError("--batches embedder needs --embedder, such as a CLIP, whose mistakes fill the batches.")
    if "contrastive_dim" in given and given.get("contrastive_weight") == 0:
        raise ValueError("--contrastive_dim has no effect without the contrastive loss: pass --contrastive_weight 1.")
    if given.get("push_to_hub") and not given.get("hub_model_id"):
        raise ValueError("--push_to_hub needs a target: pass --hub_model_id user/name.")
    if given.get("push_to_hub") and "do_train" not in stages and "model_name_or_path" in given:
        raise ValueError(
            "--push_to_hub pushes the model in --output_dir, and an evaluation of --model_name_or_path saves none "
            "there. Leave --model_name_or_path out, and pass its folder as --output_dir."
        )


def check_calibrate(given, stages):
    """Refuse `--do_calibrate` where it could not write its result, or would fit it to another network's scores."""
    if "do_train" in stages:
        raise ValueError("--do_calibrate is for a trained checkpoint: training calibrates its own at its end.")
    source = given.get("model_name_or_path")
    if source is not None and not os.path.isfile(Path(source, "config.json")):
        raise ValueError(
            f"--do_calibrate writes into the checkpoint's config.json: a folder expected; got --model_name_or_path "
            f"{source}. Download or convert it first (hf download, convert_checkpoint.py)."
        )
    for name in ("first_joint_layer", "fit"):
        if given.get(name) is not None:
            raise ValueError(f"--do_calibrate is for the checkpoint as it is: leave out --{name}.")


def choose_recipe(given):
    """Defaults of the options: published recipe, overridden by those of the dataset and the network."""
    dataset_name = given.get("dataset_name", DataArguments.dataset_name)
    recipe = PUBLISHED_RECIPE | DATASET_RECIPES.get(dataset_name, {})
    recipe["output_dir"] = f"outputs/{Path(dataset_name).name}"
    recipe["network"] = "tiny" if dataset_name in SYNTHETIC and not given.get("model_name_or_path") else "base"
    network = given.get("network") or size_of(given.get("model_name_or_path")) or recipe["network"]
    recipe |= NETWORK_RECIPES[network]
    if "num_train_epochs" in given:
        recipe.pop("max_steps", None)  # it would override the epochs
    together = {name: given.get(name, recipe[name]) for name in ("eval_strategy", "save_strategy")}
    if together["eval_strategy"] == together["save_strategy"] != "no":
        recipe |= {"load_best_model_at_end": True, "metric_for_best_model": "mean_recall", "greater_is_better": True}
    if torch.cuda.is_available():  # on a CPU, workers would compete with the training
        recipe |= {"dataloader_num_workers": min(8, os.cpu_count()), "dataloader_persistent_workers": True}
        if network == "base" and not (given.get("use_cpu") or given.get("fp16")):
            recipe["bf16"] = torch.cuda.is_bf16_supported(including_emulation=False)  # the original's precision=16
    return recipe | {"remove_unused_columns": False}


def size_of(source):
    """The smallest of `LARGEST_WIDTHS` that a checkpoint's network is within, None for larger ones."""
    if source is None or is_url(source) or os.path.isfile(source):
        return None
    try:
        settings, _ = PretrainedConfig.get_config_dict(source)
    except (OSError, ValueError):
        return None  # loading it will report the error
    width = settings.get("hidden_size")
    return next((size for size, most in LARGEST_WIDTHS.items() if isinstance(width, int) and width <= most), None)


def deciding_options(model_args, data_args, args):
    """The options by which `OutputFolder` compares this run with earlier ones."""
    options = {**vars(model_args), **vars(data_args), **{name: getattr(args, name) for name in DECIDES_TRAINING
               if hasattr(args, name)}}  # fmt: skip
    for name in ("data_dir", "dataset_name", "model_name_or_path", "teacher"):
        if options[name] and Path(options[name]).exists():
            options[name] = str(Path(options[name]).resolve())
    options |= {name: str(options[name].value) for name in DECIDES_TRAINING if hasattr(options[name], "value")}
    if options["embedder"]:
        options["embedder"] = full_name(options["embedder"])
    decides_training = DECIDES_TRAINING + (("embedder",) if options["batches"] == "embedder" else ())
    training = {name: options[name] for name in decides_training} if args.do_train else None
    evaluation = {name: options[name] for name in DECIDES_EVALUATION} | {"seed": args.seed}
    for stage, name in (("do_eval", "max_eval_samples"), ("do_predict", "max_predict_samples")):
        if not getattr(args, stage):
            del evaluation[name]
    for name in ("rerank_top_k", "eval_datasets", "embedder"):
        if not options[name] or name == "embedder" and not options["rerank_top_k"]:  # its results are not written
            del evaluation[name]
    if args.do_train:
        evaluation |= dict.fromkeys(OF_THE_MODEL)  # those of the model in this folder
    if args.do_train or options["model_name_or_path"] in (None, str(Path(args.output_dir).resolve())):
        evaluation["model_name_or_path"] = None  # the model in this folder
    evaluates = args.do_eval or args.do_predict or args.do_calibrate
    return {"training": training, "evaluation": evaluation if evaluates else None}


def set_up_logging(args):
    """The main process logs at INFO level, the others only warnings."""
    logging.basicConfig(format="%(message)s", level=logging.INFO if args.should_log else logging.WARNING)
    for library in (datasets, transformers):
        library.utils.logging.set_verbosity_warning()
    for client in ("httpx", "httpx2"):  # of the Hub's libraries: they log every request
        logging.getLogger(client).setLevel(logging.WARNING)


def load_splits(data_args, args):
    """The splits of the protocol, truncated to the requested sizes, and the invalid examples, which are also saved as
    `bad_rows.json`."""
    options = {name: getattr(data_args, name) for name in ("image_column", "caption_column", "on_bad_rows", "bands")}
    load = load_lazily if data_args.streaming else load_and_check
    try:
        splits, bad_rows = load(data_args.dataset_name, data_args.data_dir, seed=args.seed, **options)
    except BadRowsError as error:
        save_bad_rows(error.bad_rows, args.output_dir)
        raise
    if args.should_save:
        save_bad_rows(bad_rows, args.output_dir)
    missing = {"train", "validation", "test"} - set(splits)
    if missing:
        raise ValueError(f"{data_args.dataset_name} has no usable row in its {', '.join(sorted(missing))} split.")
    for line in published_counts(data_args.dataset_name, splits):
        logger.info(line)
    if data_args.protocol == "published":
        both = splits["train"], splits["validation"]
        splits["train"] = concatenate_datasets(both) if isinstance(both[0], datasets.Dataset) else both[0] + both[1]
        splits["validation"] = splits["test"]
    sizes = {
        "train": data_args.max_train_samples,
        "validation": data_args.max_eval_samples,
        "test": data_args.max_predict_samples,
    }
    for name, size in sizes.items():
        if size is not None:
            splits[name] = splits[name].select(range(min(size, len(splits[name]))))
    return splits, bad_rows


def load_others(data_args, splits, seed):
    """Name -> the requested split of each of `eval_datasets`, and how many of its images were excluded.

    Images that also occur in the training or validation split are excluded, even if they were saved again as JPEG or
    otherwise (`ieft.data.duplicates`), unless that very split is requested.
    """
    if not data_args.eval_datasets:
        return {}
    seen = [make_thumbnail(image) for name in ("train", "validation") for image in iterate_images(splits[name])]
    others = {}
    for wish in data_args.eval_datasets:
        name, folder, split = parse_wish(wish)
        same = (name, folder) == (data_args.dataset_name, data_args.data_dir)
        own = {"seed": seed if same else 0, "on_bad_rows": data_args.on_bad_rows, "bands": data_args.bands}
        try:
            loaded, bad_rows = (load_lazily if data_args.streaming else load_and_check)(name, folder, **own)
        except BadRowsError:
            raise
        except ValueError as error:
            raise ValueError(
                f"--eval_datasets {wish}: {error}\nHere, NAME=FOLDER stands for a name with its --data_dir; :train, "
                ":validation or :test may follow."
            ) from error
        if split not in loaded:
            raise ValueError(f"--eval_datasets {wish}: it has no usable row in its {split} split.")
        wanted = loaded[split]
        known = [] if same and split != "test" else seen
        copies = find_copies([make_thumbnail(image) for image in iterate_images(wanted)], known)
        kept = [row for row, copy in enumerate(copies) if not copy]
        if not kept:
            raise ValueError(
                f"--eval_datasets {wish}: all {len(wanted)} images of its {split} split are in the training or "
                f"validation split of {data_args.dataset_name}."
            )
        counts = {"removed_overlap": len(wanted) - len(kept), "bad_rows": len(bad_rows), "split": split}
        others[name_of_results(wish)] = (wanted.select(kept), counts)
    return others


def parse_wish(wish):
    """ "rsicd=FOLDER:validation" -> ("rsicd", "FOLDER", "validation"); by default no folder, and the test split."""
    place, _, split = wish.rpartition(":")
    place, split = (place, split) if split in ("train", "validation", "test") else (wish, "test")
    name, _, folder = (place, "", "") if Path(place).exists() else place.partition("=")
    return name, folder or None, split


def name_of_results(wish):
    """The name under which the results of one of `eval_datasets` are listed."""
    name, _, split = parse_wish(wish)
    return name if split == "test" else f"{name}:{split}"


def iterate_images(split):
    """Iterate over the images of a split."""
    return (row["image"] for row in split.select_columns(["image"]))


def rank_others(trainer, processor, others, data_args):
    """Recalls on each of the other datasets, saved as `eval_datasets.json` and printed as tables."""
    results = {}
    for name, (test, counts) in others.items():
        evaluation_set = EvaluationSet.from_split(test, processor)
        sizes = {"num_images": len(evaluation_set.images), "num_captions": len(evaluation_set.captions)} | counts
        results[name] = trainer.recalls(evaluation_set, trainer.score(evaluation_set)) | sizes
        results[name] |= {"protocol": data_args.protocol, "dataset": name}
        if trainer.is_world_process_zero():
            print(recall_table(results[name]))
            print(
                f"{name}: {counts['removed_overlap']} images excluded: they are in the training or validation split "
                f"of {data_args.dataset_name}."
            )
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / "eval_datasets.json", results)
    return results


def load_model(model_args, args, captions):
    """The network and processor of a checkpoint, or new ones with a tokenizer trained on the captions."""
    contrastive_dim = model_args.contrastive_dim if args.contrastive_weight else 0
    if args.do_train:
        logger.info("The network starts from %s.", model_args.model_name_or_path or "random weights")
    if model_args.model_name_or_path:
        kept = None if not args.do_train else contrastive_dim  # a checkpoint that is only evaluated is not changed
        sizes = {"contrastive_dim": kept, "first_joint_layer": model_args.first_joint_layer,
                 "enhancement_layers": model_args.enhancement_layers}  # fmt: skip
        model, processor = load_any_checkpoint(model_args.model_name_or_path, fit=model_args.fit, **sizes)
        if args.do_train:  # its scores will be others
            model.config.calibration_scale = model.config.calibration_offset = None
        return model, processor
    tokenizer = learn_tokenizer(caption for of_image in captions for caption in of_image)
    network = {"vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id} | NETWORKS[model_args.network]
    if model_args.enhancement_layers is not None:
        network["enhancement_layers"] = model_args.enhancement_layers
    if model_args.first_joint_layer is not None:
        network["first_joint_layer"] = model_args.first_joint_layer
    model = IeftForImageTextRetrieval(IeftConfig(**network, contrastive_dim=contrastive_dim))
    image_processor = IeftImageProcessor(model.config.image_size, model_args.fit or "crop")
    return model, IeftProcessor(image_processor, tokenizer)


def load_teacher(model_args, args, model, processor):
    """The teacher of the distillation, or None without `--teacher`."""
    if not model_args.teacher or not args.do_train:
        return None
    teacher, teacher_processor = load_any_checkpoint(model_args.teacher)
    check_teacher(teacher, teacher_processor, model, processor)
    return teacher


def make_trainer(model, processor, splits, data_args, args, teacher=None, embedder=None):
    """The trainer with its training items and validation set."""
    items = None
    if args.do_train:
        items = TrainingItems(
            splits["train"],
            processor,
            num_negatives=0 if args.contrastive_weight else args.num_negatives,
            negatives=data_args.negatives,
            augmentation=data_args.augmentation,
            phrase_probability=data_args.phrase_probability,
            seed=args.seed,
        )
    validation = EvaluationSet.from_split(splits["validation"], processor)
    options = {"eval_dataset": validation, "processing_class": processor, "teacher": teacher, "embedder": embedder}
    return IeftTrainer(model, args, train_dataset=items, **options)


def select_validation(trainer, processor, splits, data_args, args):
    """Let the trainer evaluate a part of the validation split that costs no more than `--selection_cost`, and log what
    the training will cost.

    Returns:
        dict: the numbers of images and captions that checkpoints are selected on, 0 without evaluations.
    """
    validation = trainer.eval_dataset
    test = [EvaluationSet.from_split(splits["test"], processor)] if args.do_predict else []
    cost = TrainingCost(trainer, [validation] * args.do_eval + test)
    trainer.add_callback(cost)
    if not cost.evaluations:
        return {"selection_num_images": 0, "selection_num_captions": 0}
    rows = cost.choose_selection(validation, data_args.selection_cost).tolist()
    if len(rows) < len(validation.images):
        trainer.eval_dataset = EvaluationSet.from_split(splits["validation"].select(rows), processor)
        logger.info(
            "Checkpoints are selected on %d of the %d validation images, drawn by --seed, since all would cost more "
            "than --selection_cost %g of the training. The evaluation after training uses all.",
            len(rows), len(validation.images), data_args.selection_cost,
        )  # fmt: skip
    part = trainer.eval_dataset
    return {"selection_num_images": len(part.images), "selection_num_captions": len(part.captions)}


def predict(trainer, processor, test, data_args, num_bad_rows):
    """Rank the test split once; write its results and figures and print its table."""
    evaluation_set = EvaluationSet.from_split(test, processor)
    scores = trainer.score(evaluation_set)
    sizes = {"num_images": len(evaluation_set.images), "num_captions": len(evaluation_set.captions)}
    results = trainer.recalls(evaluation_set, scores) | sizes
    results |= {"protocol": data_args.protocol, "dataset": data_args.dataset_name, "bad_rows": num_bad_rows}
    save_results(trainer, "test", {f"test_{name}": value for name, value in results.items()}, data_args)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        write_json(folder / "test_results.json", results)
        ranked_sheet(
            scores, evaluation_set.images.image, evaluation_set.captions, evaluation_set.caption_image,
            caption_text_id=evaluation_set.caption_text_id,
        ).save(folder / "ranked.png")  # fmt: skip
        if trainer.state.log_history:
            training_curves(trainer.state.log_history, folder / "training.png")
        print(recall_table(results))
    return results


def judge_two_stage(trainer, processor, splits, results, data_args, embedder=None):
    """Compare two-stage retrieval with the exhaustive `results`: a printed table, and `two_stage.json`.

    Shortlists are made by `embedder`, or else by the network's own heads. The weight of the similarity relative to the
    matching score is chosen on the validation split.
    """
    model, options = trainer.accelerator.unwrap_model(trainer.model), trainer.ranking_options()
    options |= {"embedder": embedder.to(trainer.args.device)} if embedder else {}
    sets = {name: EvaluationSet.from_split(splits[name], processor) for name in ("validation", "test")}
    shortlists = {name: make_shortlists(model, each, data_args.rerank_top_k, **options) for name, each in sets.items()}
    weight = choose_similarity_weight(shortlists["validation"], sets["validation"])
    judged = compare_stages(shortlists["test"], sets["test"], similarity_weight=weight)
    judged |= {"rerank_top_k": data_args.rerank_top_k, "exhaustive": results}
    judged |= {"embedder": embedder.name, "embedder_fingerprint": embedder.fingerprint} if embedder else {}
    if trainer.is_world_process_zero():
        write_json(Path(trainer.args.output_dir) / "two_stage.json", judged)
        print(two_stage_table(judged))
    return judged


def calibrate(trainer, validation):
    """Fit the probability of a matching score on validation data, and set it in the model's configuration.

    Returns:
        str | None: why there is none; the configuration then has none.
    """
    config = trainer.accelerator.unwrap_model(trainer.model).config
    config.calibration_scale = config.calibration_offset = None
    if not config.contrastive_dim:
        problem = "it has no contrastive heads, and so no search"
    elif trainer.is_fsdp_enabled:
        problem = "its weights are shared out over processes: calibrate the saved checkpoint"
    else:
        pairs = shown_pairs(trainer.accelerator.unwrap_model(trainer.model), validation, most_sentences=MOST_SENTENCES,
                            seed=trainer.args.seed, **trainer.ranking_options())  # fmt: skip
        fitted = fit_probability(pairs.scores, pairs.belongs)
        if fitted:
            config.calibration_scale, config.calibration_offset = fitted
            logger.info("Calibrated on %d pairs of %d validation sentences.", pairs.scores.size, len(pairs.scores))
            return None
        problem = f"of {pairs.scores.size} pairs of validation data, a higher score does not tell those that belong"
    logger.info("Scores have no probability: %s.", problem)
    return problem


def calibrate_checkpoint(trainer, validation, folder):
    """`calibrate`, and write the result into the checkpoint's `config.json`, of which nothing else changes.

    Raises:
        ValueError: if there is no result.
    """
    problem = calibrate(trainer, validation)
    if problem:
        raise ValueError(f"{folder} cannot be calibrated: {problem}.")
    if trainer.is_world_process_zero():
        path, config = Path(folder) / "config.json", trainer.accelerator.unwrap_model(trainer.model).config
        written = json.loads(path.read_text(encoding="utf-8"))
        written |= {name: getattr(config, name) for name in CALIBRATION}
        write_json(path, dict(sorted(written.items())))
        print(f"{path}: calibration_scale {config.calibration_scale:.4f}, offset {config.calibration_offset:.4f}")


def judge_calibration(trainer, processor, test):
    """How true the probabilities are on the test split: a printed line, `probability.json` and `reliability.png`."""
    evaluation_set = EvaluationSet.from_split(test, processor)
    model = trainer.accelerator.unwrap_model(trainer.model)
    pairs = shown_pairs(model, evaluation_set, **trainer.ranking_options())
    judged = judge_probability(pairs, model.config.calibration_scale, model.config.calibration_offset)
    if trainer.is_world_process_zero():
        folder = Path(trainer.args.output_dir)
        write_json(folder / "probability.json", judged)
        reliability_diagram(judged, folder / "reliability.png")
        print(
            f"probabilities of {judged['pairs']:,} pairs that searches for {judged['sentences']:,} sentences show: "
            f"expected calibration error {judged['ece']:.3f}"
        )
    return judged


def save_results(trainer, name, results, data_args):
    """Save the results of one stage, and add them to `all_results.json`."""
    if not trainer.is_world_process_zero():
        return
    if not trainer.args.do_train:  # the epoch is that of this run, not of the training
        results = {key: value for key, value in results.items() if key != "epoch"}
    everything = Path(trainer.args.output_dir) / "all_results.json"
    before = json.loads(everything.read_text(encoding="utf-8")) if everything.exists() else {}
    write_json(everything, before | results)
    write_json(everything.with_name(f"{name}_results.json"), results)


def command():
    """`main` as a command: on errors, one message without traceback; exit code 1.

    The launcher ends all processes as soon as one fails, so the others leave the main process time to report an error
    that all have. An error of one process alone is reported by that process.
    """
    sys.stdout.reconfigure(errors="backslashreplace")  # a name that the terminal cannot show ends no run
    rank = int(os.environ.get("RANK", 0))
    try:
        main()
    except (ValueError, OSError, ImportError, FloatingPointError, MemoryError) as error:
        time.sleep(SECONDS_FOR_THE_MAIN_PROCESS if rank else 0)
        print(f"run_retrieval.py{f' (process {rank})' if rank else ''}: {error}", file=sys.stderr)
        sys.exit(1)
    except RuntimeError as error:
        time.sleep(SECONDS_FOR_THE_MAIN_PROCESS if rank else 0)
        if not is_lost_process(error):
            raise
        sys.exit(
            f"run_retrieval.py (process {rank}): another process of this run has ended; its message or the launcher's "
            "says why. Training resumes from its last checkpoint with --resume_from_checkpoint true."
        )
    leave_processes()


if __name__ == "__main__":
    command()
