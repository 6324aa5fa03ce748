"""Embedders of the first stage other than IEFT's own heads: CLIP and SigLIP networks of transformers and open_clip.

Images are preprocessed and sentences tokenized by the network's own library, and the results are those of a plain call
of it. Weights are read as tensors: no code that comes with a checkpoint is run. Radford et al., "Learning Transferable
Visual Models From Natural Language Supervision", ICML 2021; Zhai et al., "Sigmoid Loss for Language Image
Pre-Training", ICCV 2023.
"""

import hashlib
import json
import logging
import os
import re
from functools import partial
from itertools import islice

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PretrainedConfig, SiglipModel

from ieft.evaluation.devices import choose_device, choose_dtype
from ranking_ieft import check_finite

logger = logging.getLogger(__name__)

IMAGES_AT_ONCE = 64
CAPTIONS_AT_ONCE = 256
MOST_ELONGATED = 100  # long side by short side: beyond, resizing the short side makes gigabytes
FINGERPRINT = "2-"  # prefix of this version
PROBE = "Two Red HOUSES, é ß 中 3x4-storey ..."  # distinguishes tokenizers of one vocabulary, by case and accents
NETWORKS = {"clip": CLIPModel, "siglip": SiglipModel}  # by the `model_type` of transformers
# Fields of transformers' configurations that embeddings depend on.
COMPUTED_BY = (
    "hidden_act", "layer_norm_eps", "num_hidden_layers", "num_attention_heads", "image_size", "patch_size",
    "max_position_embeddings", "eos_token_id", "vision_use_head",
)  # fmt: skip
PREPROCESSED_BY = (
    "size", "crop_size", "resample", "do_resize", "do_center_crop", "do_rescale", "rescale_factor", "do_normalize",
    "image_mean", "image_std", "do_convert_rgb",
)  # fmt: skip
SCHEMES = ("hf-hub:", "local-dir:")  # of open_clip
CONFIG = "open_clip_config.json"  # in the folders of these
WEIGHT_FILES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors")
NAMES = (
    "a CLIP or SigLIP checkpoint of transformers (a folder or user/name), or of open_clip hf-hub:user/name, "
    "local-dir:FOLDER, or ARCHITECTURE:FILE such as ViT-B-32:RemoteCLIP-ViT-B-32.pt"
)
RUNS_CODE = ("trust_remote_code", "auto_map")  # keys of a configuration with which a tokenizer's code would be loaded


class Embedder:
    """Embeds images and sentences by a network that compares them by the cosine of their embeddings.

    Made by `load_embedder`.

    Attributes:
        name: by which `load_embedder` finds it again; paths are absolute.
        preprocess: a function that can be pickled: a PIL RGB image -> float32 array (3, S, S).
        fingerprint: a digest of all that embeddings depend on: weights, configuration, preprocessing, tokenizer.
        dim, side: E, the size of the embeddings; S, of the network's input.
    """

    def __init__(self, name, model, *, preprocess, settings):
        self.name, self.model = name, model.eval().requires_grad_(False)
        self.preprocess = partial(_check_and_preprocess, preprocess)
        self.fingerprint = fingerprint_weights(model, [*settings, self._tokenize([PROBE])["input_ids"].tolist()])
        self._dtype = None
        self.dim = self.embed_captions([PROBE]).shape[1]
        self.side = self.preprocess(Image.new("RGB", (2, 2))).shape[-1]

    @property
    def device(self):
        return next(self.model.parameters()).device

    @property
    def dtype(self):
        """The type of the weights."""
        return next(self.model.parameters()).dtype

    def to(self, device="auto", dtype="auto"):
        """Move the network to a device; `device` and `dtype` as in `ieft.evaluation.devices`.

        By default, a CPU computes in float32: the network's weights are not prepacked, so that bfloat16 gains little.
        """
        self.model.to(choose_device(device))
        self._dtype = None if dtype in (None, "auto") and self.device.type == "cpu" else choose_dtype(self, dtype)
        return self

    def embed_images(self, images, *, count=None, progress=False):
        """PIL RGB images, of which a few are held at once -> unit vectors, float32 (I, E).

        Args:
            count: the number of images, for the bar that `progress` shows.
        """
        images, parts = iter(images), []
        with tqdm(total=count, desc="Embedding images", unit=" images", disable=not progress) as bar:
            while some := list(islice(images, IMAGES_AT_ONCE)):
                parts.append(self.embed_pixels(np.stack([self.preprocess(image) for image in some])))
                bar.update(len(some))
        return np.concatenate(parts) if parts else np.empty((0, self.dim), np.float32)

    def embed_captions(self, captions):
        """Sentences -> unit vectors, float32 (C, E); equal sentences have equal ones."""
        places = {}
        column_of = [places.setdefault(caption, len(places)) for caption in captions]
        distinct, parts = list(places), []
        for first in range(0, len(distinct), CAPTIONS_AT_ONCE):
            tokens = self._tokenize(distinct[first : first + CAPTIONS_AT_ONCE])
            parts.append(
                self._compute(self._text_features, {name: ids.to(self.device) for name, ids in tokens.items()})
            )
        return np.concatenate(parts)[column_of] if parts else np.empty((0, self.dim), np.float32)

    def embed_pixels(self, pixels):
        """What `preprocess` made, (I, 3, S, S) -> unit vectors, float32 (I, E)."""
        return self._compute(self._image_features, torch.from_numpy(pixels).to(self.device))

    @torch.no_grad()
    def _compute(self, function, inputs):
        enabled = self._dtype is not None
        with torch.autocast(self.device.type, dtype=self._dtype, enabled=enabled):  # of this thread alone
            return unit_vectors(function(inputs))

    def similarity_scale(self):
        """By which the network's own loss multiplies the cosine. SigLIP's bias, one for all pairs, is left out."""
        return float(self.model.logit_scale.exp())

    def compare(self, images, captions, **options):
        """Scaled similarity of every image with every caption: (I, C) float32; options as `embed_images`."""
        return self.similarity_scale() * (self.embed_images(images, **options) @ self.embed_captions(captions).T)


class _TransformersEmbedder(Embedder):
    def __init__(self, name, model, *, image_processor, tokenizer):
        self.tokenizer = tokenizer
        text = model.config.text_config
        # SigLIP pools the last token and was trained on captions of full length, padding read like words.
        self.is_padded = model.config.model_type == "siglip"
        self.options = {"max_length": text.max_position_embeddings, "truncation": True, "return_tensors": "pt"}
        self.options["padding"] = "max_length" if self.is_padded else True
        configs = ({field: getattr(config, field, None) for field in COMPUTED_BY}
                   for config in (text, model.config.vision_config))  # fmt: skip
        settings = image_processor.to_dict()
        settings = [*configs, {field: settings.get(field) for field in PREPROCESSED_BY}, tokenizer.get_vocab()]
        super().__init__(name, model, preprocess=partial(_processed, image_processor), settings=settings)

    def _tokenize(self, captions):
        tokens = self.tokenizer(captions, **self.options)
        return {"input_ids": tokens["input_ids"]} if self.is_padded else dict(tokens)

    def _image_features(self, pixels):
        return _pooled(self.model.get_image_features(pixel_values=pixels))

    def _text_features(self, tokens):
        return _pooled(self.model.get_text_features(**tokens))


class _OpenClipEmbedder(Embedder):
    def __init__(self, name, model, *, preprocess, tokenizer, config):
        self.tokenizer = tokenizer
        inner = getattr(tokenizer, "tokenizer", None)
        vocabulary = tokenizer.encoder if inner is None else inner.get_vocab()
        settings = [config, dict(model.visual.preprocess_cfg), vocabulary]
        super().__init__(name, model, preprocess=partial(_transformed, preprocess), settings=settings)

    def _tokenize(self, captions):
        return {"input_ids": self.tokenizer(captions)}  # truncated and padded to the network's length

    def _image_features(self, pixels):
        return self.model.encode_image(pixels)

    def _text_features(self, tokens):
        return self.model.encode_text(tokens["input_ids"])


def load_embedder(name, *, device="auto", dtype="auto"):
    """Load the embedder of a name.

    Args:
        name: a folder or Hub id (`user/name`) of a CLIP or SigLIP checkpoint of transformers; of open_clip,
            `hf-hub:user/name`, `local-dir:FOLDER` or `ARCHITECTURE:FILE`, such as `ViT-B-32:RemoteCLIP-ViT-B-32.pt`,
            a state dict as PyTorch or safetensors save it.
        device, dtype: as `Embedder.to`.

    Raises:
        ValueError: if it is none of these, does not hold all weights, or cannot be read without running code.
        OSError: if it cannot be found or downloaded.
        ImportError: if a library that it needs is not installed.
    """
    name = full_name(name)
    load = _load_openclip if _is_of_openclip(name) else _load_transformers
    try:
        return load(name).to(device, dtype)
    except (ImportError, OSError, ValueError):
        raise
    except Exception as error:  # torch, safetensors, tokenizers and open_clip raise errors of many kinds
        raise ValueError(
            f"The embedder {name} cannot be loaded: {type(error).__name__}: {error}\nExpected: {NAMES}."
        ) from error


def full_name(name):
    """The name of an embedder with its path, if it has one, made absolute."""
    name = os.fspath(name)
    if not _is_of_openclip(name):
        return os.path.abspath(name) if os.path.exists(name) else name
    kind, _, place = name.partition(":")
    return name if kind == "hf-hub" else f"{kind}:{os.path.abspath(place)}"


def _is_of_openclip(name):
    return name.startswith(SCHEMES) or (":" in name and not os.path.exists(name))


def _load_transformers(name):
    if os.path.isfile(name):
        raise ValueError(f"The embedder {name} is a file: name its architecture too, such as ViT-B-32:{name}.")
    if not os.path.isdir(name) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise FileNotFoundError(f"There is no embedder {name}. Expected: {NAMES}.")
    if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
        is_of_openclip = os.path.isfile(os.path.join(name, CONFIG))
        hint = f"; it is one of open_clip: pass local-dir:{name}" if is_of_openclip else ""
        raise FileNotFoundError(f"The embedder {name} has no config.json{hint}.")
    kind = PretrainedConfig.get_config_dict(name)[0].get("model_type")
    if kind not in NETWORKS:
        raise ValueError(f"The embedder {name} is of the kind {kind!r}. Expected: {NAMES}.")
    model, report = NETWORKS[kind].from_pretrained(name, dtype=torch.float32, output_loading_info=True)
    if absent := sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}):
        raise ValueError(
            f"The embedder {name} lacks {len(absent)} weights of a {type(model).__name__}, such as {absent[0]}."
        )
    parts = {"image_processor": AutoImageProcessor, "tokenizer": AutoTokenizer}
    parts = {part: kind.from_pretrained(name, trust_remote_code=False) for part, kind in parts.items()}
    return _TransformersEmbedder(name, model, **parts)


def _load_openclip(name):
    try:
        import open_clip
    except ImportError as error:
        raise ImportError(f"The embedder {name} needs open_clip: pip install 'ieft[openclip]'.") from error
    architecture, file = name, None
    if not name.startswith(SCHEMES):
        architecture, _, file = name.partition(":")
        if architecture not in open_clip.list_models():
            raise ValueError(
                f"{architecture!r} is no architecture of open_clip, and {name} no folder. Expected: {NAMES}."
            )
        if not file.endswith(WEIGHT_FILES) or not os.path.isfile(file):
            raise FileNotFoundError(
                f"A file of weights ({', '.join(WEIGHT_FILES)}) expected after {architecture}:, and {file} is none."
            )
        _check_preprocessing(architecture, file)
    elif name.startswith("local-dir:") and not os.path.isfile(os.path.join(name[len("local-dir:") :], CONFIG)):
        raise FileNotFoundError(f"The embedder {name} has no {CONFIG}. Expected: {NAMES}.")
    config = open_clip.get_model_config(architecture)
    if any(key in json.dumps(config) for key in RUNS_CODE):
        raise ValueError(
            f"The embedder {name} asks for code to be run ({' or '.join(RUNS_CODE)}), which is never done."
        )
    model, preprocess = open_clip.create_model_from_pretrained(
        architecture, file, precision="fp32", device="cpu", weights_only=True, pretrained_text=False
    )
    if file:
        _check_positions(architecture, file, open_clip.factory.load_state_dict(file), model)
    return _OpenClipEmbedder(
        name, model, preprocess=preprocess, tokenizer=open_clip.get_tokenizer(architecture), config=config
    )


def _check_preprocessing(architecture, file):
    """Refuse a file of an architecture whose published weights all take other images than open_clip gives to files."""
    import open_clip

    own = vars(open_clip.transform.PreprocessCfg())  # as for the first CLIP
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    published = [open_clip.get_pretrained_cfg(architecture, tag) for tag in tags]
    differing = [[name for name in own if settings.get(name, own[name]) != own[name]] for settings in published]
    if published and all(differing):
        raise ValueError(
            f"{file} does not tell how its images are preprocessed, and the published weights of {architecture} have "
            f"another {', '.join(differing[0])} than CLIP: put it into a folder with an open_clip_config.json, and "
            "pass local-dir:FOLDER."
        )


def _check_positions(architecture, file, weights, model):
    """Refuse weights for images or sentences of another size, whose positions open_clip interpolates."""
    for name in ("visual.positional_embedding", "positional_embedding"):
        own = model.state_dict().get(name)
        if name in weights and own is not None and weights[name].shape != own.shape:
            raise ValueError(
                f"{file} holds weights of another architecture than {architecture}: {name} is of shape "
                f"{tuple(weights[name].shape)} instead of {tuple(own.shape)}."
            )


# At the top of the module, so that worker processes can be given them.


def _check_and_preprocess(preprocess, image):
    width, height = image.size
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(
            f"an image of {width} x {height} pixels is too long for the embedder, which takes a square: cut it into "
            "tiles"
        )
    return preprocess(image)


def _processed(image_processor, image):
    return image_processor(images=image, return_tensors="np")["pixel_values"][0]


def _transformed(transform, image):
    return transform(image).numpy()


def _pooled(output):
    """The features of what transformers gives, which is a tensor or, from version 5 on, holds it."""
    return getattr(output, "pooler_output", output)


def unit_vectors(features):
    """(N, E) of any type and device -> float32, of length 1 but for rounding, which 16 bits would not hold."""
    check_finite(features, "embeddings")
    features = features.float().cpu()
    return torch.nn.functional.normalize(features, dim=-1).numpy()


def fingerprint_weights(model, settings):
    """A digest of settings and weights.

    Weights are compared as bfloat16, so that the same checkpoint in float32 and in bfloat16 has one fingerprint, and
    without their names, which versions of a library change.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    tensors = (tensor.detach().cpu() for tensor in model.state_dict().values() if tensor.is_floating_point())
    for part in sorted(_digest(tensor.to(torch.bfloat16)) for tensor in tensors):
        digest.update(part)
    return FINGERPRINT + digest.hexdigest()


def _digest(tensor):
    digest = hashlib.sha256(str(tuple(tensor.shape)).encode())
    digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.digest()
