"""Loads or converts ViLT and IEFT checkpoints of any format, and reports what became of each tensor.

    python convert_checkpoint.py vilt_200k_mlm_itm.ckpt converted/vilt --tokenizer bert-base-uncased
    python convert_checkpoint.py https://github.com/.../vilt_200k_mlm_itm.ckpt converted/vilt

The source is an original ViLT checkpoint or one of the published IEFT code, as a file or URL, or a folder or Hub id of
a transformers ViLT or of an IEFT of this project. The result is a model with its processor.
"""

import argparse
import logging
import os
import re
import sys
import tempfile
import zipfile
from collections import Counter
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import BertTokenizer, ViltConfig

from configuration_ieft import IeftConfig
from ieft.data.downloads import cached_file, is_url
from modeling_ieft import IeftForImageTextRetrieval
from processing_ieft import IeftImageProcessor, IeftProcessor

logger = logging.getLogger(__name__)

EMBEDDINGS = "vilt.embeddings."
CONVOLUTION = r"vilt.encoder.enhancement.\1.gated_convolution."
BLOCK = {r"transformer\.blocks\.(\d+)\.": r"vilt.encoder.layer.\1."}
CHANNEL_BLOCK = {r"transformer\.SE_blocks\.(\d+)\.": r"vilt.encoder.enhancement.\1.channel_attention."}
INSIDE_A_BLOCK = {
    r"norm1\.": "layernorm_before.",
    r"norm2\.": "layernorm_after.",
    r"attn\.qkv\.": "attention.attention.qkv.",
    r"attn\.proj\.": "attention.output.dense.",
    r"mlp\.fc1\.": "intermediate.dense.",
    r"mlp\.fc2\.": "output.dense.",
}
# Published name, as a pattern from its start -> ours.
PUBLISHED_NAMES = {
    r"text_embeddings\.(?!position_ids)": EMBEDDINGS + "text_embeddings.",
    r"token_type_embeddings\.": EMBEDDINGS + "token_type_embeddings.",
    r"transformer\.cls_token$": EMBEDDINGS + "cls_token",
    r"transformer\.pos_embed$": EMBEDDINGS + "position_embeddings",
    r"transformer\.patch_embed\.proj\.": EMBEDDINGS + "patch_embeddings.projection.",
    r"transformer\.norm\.": "vilt.layernorm.",
    r"pooler\.": "vilt.pooler.",
    r"rank_output\.": "rank_output.",
    r"local_net\.(\d+)\.norm2\.body\.": CONVOLUTION + "layernorm.",
    r"local_net\.(\d+)\.ffn\.project_(in|out)\.": CONVOLUTION + r"project_\2.",
    r"local_net\.(\d+)\.ffn\.dwconv\.": CONVOLUTION + "depthwise.",
    **{
        outer + inner: outer_name + inner_name
        for outer, outer_name in (BLOCK | CHANNEL_BLOCK).items()
        for inner, inner_name in INSIDE_A_BLOCK.items()
    },
}
# Tensors of a source that IEFT does not use, and why.
IGNORED = {
    r"text_embeddings\.position_ids$": "a buffer of 0, 1, 2, ...",
    r"local_net\.\d+\.(norm1|attn|gata_tra)\.": "stored in published IEFT checkpoints, never run",
    r"itm_score\.": "image-text matching; its row 1 initializes the ranking head",
    r"(mlm|mpp)_score\.": "masked language and patch modelling",
    r"(vqa_|nlvr2_)?classifier\.": "classification",
    r"(image_projection|text_projection|logit_scale)\b": "contrastive heads, not requested",
}
CONTRASTIVE_HEADS = ("image_projection.", "text_projection.", "logit_scale")
# Configuration fields taken from a transformers ViLT; dropout and depth are IEFT's own.
SHARED_SIZES = (
    "vocab_size", "type_vocab_size", "modality_type_vocab_size", "max_position_embeddings", "hidden_size",
    "num_attention_heads", "intermediate_size", "hidden_act", "initializer_range", "layer_norm_eps", "image_size",
    "patch_size", "num_channels", "qkv_bias",
)  # fmt: skip
DEFAULT_TOKENIZER = "bert-base-uncased"
EXPECTED_TOKENIZER = (
    "Pass --tokenizer of convert_checkpoint.py with a folder that holds BERT's uncased vocabulary (vocab.txt or "
    "tokenizer.json), or a Hub id that can be reached; run_retrieval.py takes the folder that it writes."
)
# What the published IEFT starts from: ViLT-B/32 after 200k steps, with its image-text-matching head.
VILT_RELEASE = "https://github.com/dandelin/ViLT/releases/download/200k/vilt_200k_mlm_itm.ckpt"
# Packages whose classes Lightning's checkpoints name beside the weights. None is needed, imported or run.
BOOKKEEPING = ("pytorch_lightning", "lightning", "sacred", "numpy")


def load_any_checkpoint(source, *, tokenizer=None, fit=None, **sizes):
    """Load the network and processor of a ViLT or IEFT checkpoint; new parameters are initialized.

    Args:
        source: a file (Lightning `.ckpt`, `.pt`, `.bin`) or its URL, a folder, or a Hub id.
        tokenizer: folder or Hub id of the tokenizer; by default the source's own, or BERT's uncased.
        fit: as `IeftImageProcessor`; by default the source's own, or "crop".
        sizes: fields of `IeftConfig` to change, such as `image_size` (positions are interpolated) or
            `contrastive_dim`; None keeps the source's value.

    Returns:
        (IeftForImageTextRetrieval in eval mode and float32, IeftProcessor)

    Raises:
        ValueError: if the source is none of these, holds more than tensors, or does not fit.
        OSError: if the source or tokenizer cannot be found or downloaded.
    """
    sizes = {name: value for name, value in sizes.items() if value is not None}
    if is_url(source):
        path = cached_file(source)
        try:
            return load_any_checkpoint(path, tokenizer=tokenizer, fit=fit, **sizes)
        except ValueError as error:
            raise ValueError(
                f"{error}\nThe file was downloaded from {source}. Delete it to download it again."
            ) from error
    if os.path.isfile(source):
        folder, tensors = Path(source).parent, read_tensors(source)
        config = published_config(source, tensors, sizes)
        renamed, unknown = rename_published(tensors)
    else:
        folder = find_folder(source)
        config, tensors = folder_config(source, folder, sizes), read_folder(folder)
        renamed, unknown = rename_transformers(tensors), []
    renamed = start_ranking_head(renamed, tensors)
    if "rank_output.weight" not in renamed:
        logger.warning(
            "%s has neither a ranking head nor the image-text-matching head of ViLT (the Hub's dandelin/vilt-b32-mlm "
            "was saved without it): the ranking head starts from random weights. The published training starts from "
            "%s, which has it.", source, VILT_RELEASE,
        )  # fmt: skip
    model = build_model(config, renamed, unknown)
    return model, load_processor(folder, config, tokenizer=tokenizer, fit=fit)


# Reading ------------------------------------------------------------------------------------------------------------


def read_tensors(path):
    """Name -> tensor of one file. No code in the file is executed.

    Raises:
        ValueError: if the file is no checkpoint, or if reading it would need to run code from it.
    """
    if str(path).endswith(".safetensors"):
        with open(path, "rb"):  # safetensors says of a file without permission that there is none
            pass
        try:
            return load_file(path)
        except (SafetensorError, ValueError, KeyError, MemoryError) as error:
            raise ValueError(
                f"{path} is not a safetensors file, or it is damaged: {error}. Download it again."
            ) from error
    _check_unpacked_size(path)
    try:
        with torch.serialization.safe_globals(inert_classes(path)):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # garbage can raise anything
        reason = re.search(r"[Uu]nsupported (GLOBAL|global|operand)[: ]*(GLOBAL )?[\w.]+", str(error))
        raise ValueError(
            f"{path} was not read: more than tensors and plain values would have to be loaded from it, which can run "
            f"code, or it is damaged ({reason.group(0) if reason else repr(error)}). If you trust its "
            "source, save its `state_dict` alone: torch.save(torch.load(path, weights_only=False)['state_dict'], new)."
        ) from None
    tensors = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise ValueError(f"{path} holds no `state_dict` of tensors: is it a checkpoint?")
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise ValueError(f"{path} holds a tensor under {name!r}, which is no name: is it a checkpoint?")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{path} holds {name!r} as a sparse or quantized tensor; a plain one is expected.")
        if tensor.is_meta or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{path} says that {name!r} is {list(tensor.shape)}, and holds fewer numbers than that.")
    return tensors


class Inert:
    """Stands for a class that a checkpoint names beside its weights; does nothing, whatever it is given."""

    def __init__(self, *args, **kwargs):
        pass

    def __setstate__(self, state):
        pass


def inert_classes(path):
    """Classes that do nothing, under those names in a file that belong to packages of `BOOKKEEPING`."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not the zip format of torch.save, or damaged: torch.load will say so
        return []
    places = [name.rpartition(".") for name in names if name.split(".")[0] in BOOKKEEPING]
    return [type(name, (Inert,), {"__module__": module}) for module, _, name in places]


def _check_unpacked_size(path):
    """Raise a ValueError for compressed zip files: `torch.save` does not compress, a decompression bomb does."""
    try:
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(member.file_size for member in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError):
        return  # the older format, or a file that torch.load will refuse
    if unpacked > os.path.getsize(path):
        raise ValueError(
            f"{path} unpacks to {unpacked:,} bytes, more than it has: no checkpoint that torch saves does."
        )


def find_folder(source):
    """A folder unchanged, or the cached files of a Hub repository; safetensors are preferred."""
    if os.path.isdir(source):
        return Path(source)
    if str(source).count("/") > 1 or str(source).endswith((".ckpt", ".pt", ".bin", ".safetensors")):
        raise FileNotFoundError(f"There is no file or folder {source}.")
    try:
        folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "model*.safetensors"]))
        if not list(folder.glob("model*.safetensors")):
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", "pytorch_model*.bin"]))
    except (OSError, ValueError) as error:  # no such model, no network, or not the form of an id
        raise FileNotFoundError(
            f"There is no file or folder {str(source)!r}, and no model of that name came from the Hub: {error}"
        ) from error
    return folder


def read_folder(folder):
    """Name -> tensor of all weight files of a `save_pretrained` folder."""
    files = sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder} holds neither model.safetensors nor pytorch_model.bin.")
    return {name: tensor for file in files for name, tensor in read_tensors(file).items()}


# Sizes --------------------------------------------------------------------------------------------------------------


def published_config(source, tensors, sizes):
    """Infer the configuration of a published checkpoint from its shapes; head size is 64 as in all published ones.

    Raises:
        ValueError: if the names are of another network.
    """
    missing = [name for name in SIZED_BY if name not in tensors]
    if missing:
        raise ValueError(
            f"{source} is neither an original ViLT nor a published IEFT checkpoint: it has no {missing[0]!r}; its "
            f"first names are {list(tensors)[:3]}. For weights saved by transformers, pass their folder."
        )
    wrong = [name for name, rank in SIZED_BY.items() if tensors[name].dim() != rank]
    if wrong:
        shape = list(tensors[wrong[0]].shape)
        raise ValueError(f"{source}: {wrong[0]} of {SIZED_BY[wrong[0]]} dimensions expected; it is {shape}.")
    positions, patch, words, captions, token_types, modalities, mlp = (tensors[name].shape for name in SIZED_BY)
    blocks = len({name.split(".")[2] for name in tensors if re.match(r"transformer\.blocks\.\d+\.", name)})
    stages = len({name.split(".")[2] for name in tensors if re.match(r"transformer\.SE_blocks\.\d+\.", name)})
    depth = min(blocks, IeftConfig.num_hidden_layers)
    found = {
        "hidden_size": positions[2],
        "num_attention_heads": max(1, positions[2] // 64),
        "num_hidden_layers": depth,
        "patch_size": patch[2],
        "image_size": round((positions[1] - 1) ** 0.5) * patch[2],
        "num_channels": patch[1],
        "vocab_size": words[0],
        "max_position_embeddings": captions[0],
        "type_vocab_size": token_types[0],
        "modality_type_vocab_size": modalities[0],
        "intermediate_size": mlp[0],
        "qkv_bias": "transformer.blocks.0.attn.qkv.bias" in tensors,
        "enhancement_layers": list(range(1, stages + 1)) if stages else fitting_stages(depth),
    }
    return IeftConfig(**(found | sizes))


# Tensors that sizes are read off -> their dimensions.
SIZED_BY = {
    "transformer.pos_embed": 3,
    "transformer.patch_embed.proj.weight": 4,
    "text_embeddings.word_embeddings.weight": 2,
    "text_embeddings.position_embeddings.weight": 2,
    "text_embeddings.token_type_embeddings.weight": 2,
    "token_type_embeddings.weight": 2,
    "transformer.blocks.0.mlp.fc1.weight": 2,
}


def fitting_stages(depth):
    """The published positions of enhancement stages, limited to the number of blocks."""
    return [block for block in IeftConfig.enhancement_layers if block < depth]


def folder_config(source, folder, sizes):
    """The configuration of an IEFT folder, or of an IEFT that is initialized from a transformers ViLT."""
    found, _ = IeftConfig.get_config_dict(folder)
    if found.get("model_type") == "ieft":
        return IeftConfig.from_pretrained(folder, **sizes)
    if found.get("model_type") != "vilt":
        raise ValueError(f"A ViLT or IEFT checkpoint expected; {source} is of type {found.get('model_type')!r}.")
    try:
        vilt = ViltConfig.from_dict(found)
    except Exception as error:  # for fields of a wrong type, transformers raises many kinds of errors
        raise ValueError(f"{source}: its config.json is not that of a ViLT: {error}") from error
    shared = {name: getattr(vilt, name) for name in SHARED_SIZES}
    depth = min(vilt.num_hidden_layers, IeftConfig.num_hidden_layers)
    shared |= {"text_layer_norm_eps": vilt.layer_norm_eps, "num_hidden_layers": depth}
    return IeftConfig(**(shared | {"enhancement_layers": fitting_stages(depth)} | sizes))


# Tensors ------------------------------------------------------------------------------------------------------------


def rename_transformers(state_dict):
    """Rename tensors of a transformers ViLT, or of an IEFT saved with or without its head, to our names."""
    network = ("embeddings.", "encoder.", "layernorm.", "pooler.")
    return {"vilt." + name if name.startswith(network) else name: tensor for name, tensor in state_dict.items()}


def rename_published(state_dict):
    """Rename published tensors to our names, and list the names that have no counterpart in IEFT.

    A fused `qkv` tensor becomes query, key and value; a 1x1 convolution becomes a linear layer.

    Returns:
        (dict of renamed tensors, list of source names without a counterpart)
    """
    renamed, left_over = {}, []
    for name, tensor in state_dict.items():
        ours = _our_name(name)
        if ours is None:
            left_over.append(name)
        elif ".qkv." in ours:
            if tensor.dim() == 0 or tensor.shape[0] % 3:
                raise ValueError(
                    f"{name} must hold a query, a key and a value in its rows; it is {list(tensor.shape)}."
                )
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[ours.replace("qkv", part)] = rows
        else:
            renamed[ours] = tensor.flatten(1) if ".project_" in ours and tensor.dim() > 1 else tensor
    return renamed, left_over


def _our_name(name):
    for pattern, replacement in PUBLISHED_NAMES.items():
        ours, count = re.subn("^" + pattern, replacement, name)
        if count:
            return ours
    return None


def build_model(config, tensors, unknown):
    """A model with these weights.

    Args:
        config: configuration of the model.
        tensors: our name -> tensor.
        unknown: names of the source that have no counterpart.

    Raises:
        ValueError: lists every tensor that is unexpected, missing or of another shape.
    """
    with torch.device("meta"):  # only shapes: no memory is allocated for a checkpoint that does not fit
        own = IeftForImageTextRetrieval(config).state_dict()
    tensors = reshape(tensors, own, config)
    left_out = [name for name in [*unknown, *tensors] if name not in own]
    reasons = {name: reason_to_ignore(name, config.num_hidden_layers) for name in left_out}
    new = [name for name in own if name not in tensors]
    faults = [f"no place for {name}" for name, reason in reasons.items() if reason is None]
    faults += [f"no value for {name}" for name in new if not may_be_new(name, tensors)]
    faults += [
        f"{name} is {list(tensors[name].shape)}, {list(own[name].shape)} expected"
        for name in own.keys() & tensors.keys()
        if tensors[name].shape != own[name].shape
    ]
    if faults:
        raise ValueError(f"The checkpoint does not fit an IEFT ({len(faults)} faults):\n" + "\n".join(sorted(faults)))
    model = IeftForImageTextRetrieval(config).eval()
    model.load_state_dict({name: tensor for name, tensor in tensors.items() if name in own}, strict=False)
    for reason, count in Counter(reasons.values()).items():
        logger.info("%d tensors left out: %s", count, reason)
    if new:
        stages_and_heads = sorted({re.sub(r"(enhancement\.\d+)\..*", r"\1", name) for name in new})
        logger.info("Newly initialized, to be trained: %s", ", ".join(stages_and_heads))
    return model


def reshape(tensors, own, config):
    """Interpolate positions to the grid of `config`; drop contrastive heads whose size differs from `own`."""
    positions = EMBEDDINGS + "position_embeddings"
    if positions in tensors and tensors[positions].dim() == 3 and tensors[positions].shape[1] > 1:
        tensors = tensors | {positions: interpolate_positions(tensors[positions], config.grid_size)}
    if all(tensors[name].shape == own[name].shape for name in own.keys() & tensors.keys() if is_contrastive(name)):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if not is_contrastive(name)}


def start_ranking_head(renamed, source):
    """Add a ranking head if there is none: row 1 ("match") of the source's image-text matching head."""
    if "itm_score.fc.weight" not in source or "rank_output.weight" in renamed:
        return renamed
    return renamed | {f"rank_output.{kind}": source[f"itm_score.fc.{kind}"][1:] for kind in ("weight", "bias")}


def reason_to_ignore(name, num_hidden_layers):
    """Why an unexpected tensor can be ignored, or None if it cannot."""
    block = re.match(r"vilt\.encoder\.layer\.(\d+)\.", name)
    if block and int(block.group(1)) >= num_hidden_layers:
        return "blocks beyond those that are used"
    inner = name.removeprefix("vilt.embeddings.")
    return next((reason for pattern, reason in IGNORED.items() if re.match(pattern, inner)), None)


def may_be_new(name, tensors):
    """Whether a parameter may be newly initialized: enhancement stages if the source has none, and heads."""
    if ".enhancement." in name:
        return not any(".enhancement." in other for other in tensors)
    return name.startswith("rank_output.") or is_contrastive(name)


def is_contrastive(name):
    return name.startswith(CONTRASTIVE_HEADS)


def interpolate_positions(positions, grid_size):
    """Interpolate learned positions (1, 1+P, D) to another grid, (1, 1+grid_size^2, D): bilinear, corners aligned."""
    old_size = round((positions.shape[1] - 1) ** 0.5)
    if old_size == grid_size or old_size**2 != positions.shape[1] - 1:
        return positions
    grid = positions[:, 1:].transpose(1, 2).unflatten(2, (old_size, old_size)).float()  # (1, D, G, G)
    grid = torch.nn.functional.interpolate(grid, (grid_size, grid_size), mode="bilinear", align_corners=True)
    return torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2).to(positions.dtype)], dim=1)


# Processor and command ----------------------------------------------------------------------------------------------


def load_processor(folder, config, *, tokenizer=None, fit=None):
    """The processor of an IEFT folder, or a new one with the folder's tokenizer or the given one.

    Raises:
        OSError: if no tokenizer can be loaded.
        ValueError: if the vocabulary does not have the size of the network's embeddings.
    """
    if (folder / "processor_config.json").is_file() and tokenizer is None:
        try:
            processor = IeftProcessor.from_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # for damaged files, the tokenizers library raises any kind of error
            raise ValueError(f"The processor or tokenizer in {folder} cannot be read: {error}") from error
        processor.image_processor.image_size = config.image_size
        processor.image_processor.fit = fit or processor.image_processor.fit
        return processor
    has_own = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    place = tokenizer or (str(folder) if has_own else DEFAULT_TOKENIZER)
    try:
        vocabulary = BertTokenizer.from_pretrained(place)
    except Exception as error:  # for damaged files, the tokenizers library raises any kind of error
        raise OSError(f"No tokenizer could be loaded from {place!r}. {EXPECTED_TOKENIZER}") from error
    special = len(vocabulary.all_special_tokens)
    if len(vocabulary) <= special:  # what transformers returns if it finds no vocabulary
        raise OSError(f"No tokenizer could be loaded from {place!r}: it has no vocabulary. {EXPECTED_TOKENIZER}")
    if len(vocabulary) != config.vocab_size:
        raise ValueError(
            f"The network has embeddings for {config.vocab_size} tokens, the tokenizer from {place!r} has "
            f"{len(vocabulary)}. Pass --tokenizer with the one that the checkpoint was trained with."
        )
    image_processor = IeftImageProcessor(config.image_size, fit or "crop")
    return IeftProcessor(image_processor, vocabulary, max_caption_tokens=config.max_position_embeddings)


def free_folder(output_dir):
    """The path of a folder that can be created, or replaced because it is empty; links are followed.

    Raises:
        FileExistsError: if something would be overwritten.
    """
    folder = Path(output_dir).resolve()
    if folder == Path.cwd():
        raise FileExistsError(f"{str(output_dir)!r} is the current folder. Pass the name of a new one as OUTPUT_DIR.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{output_dir} exists and is not an empty folder. Pass another OUTPUT_DIR.")
    for parent in folder.parents:
        if parent.is_file():
            raise FileExistsError(f"{output_dir} cannot be made: {parent} is a file. Pass another OUTPUT_DIR.")
    return folder


def save_whole(model, processor, output_dir):
    """Save model and processor as a folder, atomically.

    Raises:
        FileExistsError: if something would be overwritten.
    """
    output_dir = free_folder(output_dir)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".converting-") as parent:
        unfinished = Path(parent) / output_dir.name
        model.save_pretrained(unfinished)
        processor.save_pretrained(unfinished)
        free_folder(output_dir)  # another process may have made it meanwhile
        unfinished.replace(output_dir)


def main(arguments=None):
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("source", help="a ViLT or IEFT checkpoint: a file, URL, folder or Hub id")
    parser.add_argument("output_dir", help="folder to create")
    parser.add_argument("--tokenizer", help="folder or Hub id (default: the source's own, or bert-base-uncased)")
    parser.add_argument(
        "--image_size", type=int, help="another input size than the source's; positions are interpolated"
    )
    args = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    try:
        free_folder(args.output_dir)
        model, processor = load_any_checkpoint(args.source, tokenizer=args.tokenizer, image_size=args.image_size)
        save_whole(model, processor, args.output_dir)
    except (OSError, ValueError) as error:
        parser.exit(1, f"convert_checkpoint: {error}\n")
    print(f"{args.source} -> {args.output_dir}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal cannot show
    main()
