"""Configuration of an IEFT network, saved as `config.json`."""

import math
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import ViltConfig
from transformers.activations import ACT2FN

# Fields and their ranges, whole numbers where the ends are: beyond any network in use, small enough to compute with.
RANGES = {
    "image_size": (1, 2**14), "patch_size": (1, 2**14), "num_channels": (1, 2**10),
    "hidden_size": (1, 2**16), "intermediate_size": (1, 2**20), "num_hidden_layers": (1, 2**10),
    "num_attention_heads": (1, 2**16), "vocab_size": (1, 2**24), "max_position_embeddings": (1, 2**16),
    "type_vocab_size": (1, 2**16), "modality_type_vocab_size": (2, 2**16), "contrastive_dim": (0, 2**16),
    "hidden_dropout_prob": (0.0, 1.0), "attention_probs_dropout_prob": (0.0, 1.0), "initializer_range": (0.0, 100.0),
    "layer_norm_eps": (0.0, 1.0), "text_layer_norm_eps": (0.0, 1.0), "enhancement_mlp_ratio": (1e-3, 1e3),
    "enhancement_expansion": (1e-3, 1e3),
}  # fmt: skip
CALIBRATION = ("calibration_scale", "calibration_offset")
MAX_PATCHES = 2**16
MAX_PARAMETERS = 2**32  # 17 GB in float32; the published network has a hundred million
MAX_LABELS = 2**16  # IEFT has no use for labels, but transformers names each of them
IS_HUB_CODE = "." in __name__  # loaded from a checkpoint, by a user who trusts its code
FURTHER_FIELDS = {"num_labels", "num_images", "max_image_length", "qkv_bias"}  # of ViLT and of transformers


def check_spelling(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a ValueError if a name in `given` is not in `known`, but almost.

    Other unknown names are left to transformers, which keeps them for its own use and for later versions.
    """
    for name in sorted(set(given) - set(known)):
        close = [each for each in known if sorted(each) == sorted(name)]  # letters in another order
        close += get_close_matches(name, known, n=1, cutoff=0.85)
        if close:
            raise ValueError(f"There is no option {name}; did you mean {close[0]}?")


class IeftConfig(ViltConfig):
    """Configuration of IEFT: a ViLT with visual enhancement stages between its blocks.

    The defaults are the published network (Tang et al., IEEE TGRS 2023): 384-pixel images in 32-pixel patches, six
    joint blocks of width 768, and enhancement on the patch tokens before blocks 1, 2 and 3. What ViLT has too is
    described in `transformers.ViltConfig`; IEFT adds or changes:

    Args:
        num_hidden_layers: joint blocks; published ViLT and IEFT checkpoints store 12, IEFT runs the first 6.
        layer_norm_eps: epsilon of the joint blocks, of the channel attention and of the final LayerNorm.
        text_layer_norm_eps: epsilon of the LayerNorm over the caption embeddings.
        enhancement_layers: indices of the joint blocks that an enhancement stage precedes, rising, each once.
        enhancement_num_heads: heads of the channel attention, a divisor of the number of patches. None takes
            `num_attention_heads`, or the largest divisor below it.
        enhancement_mlp_ratio: width of the channel attention's MLP as a multiple of the number of patches.
        enhancement_expansion: width of the gated convolution as a multiple of `hidden_size`, rounded down.
        contrastive_dim: width of the image and caption embeddings used for shortlists; 0 leaves those heads out, as
            published.
        first_joint_layer: index of the first block that reads caption and image together. Those below it, and the
            stages up to it, read each of them alone, once for all pairs. 0 is the published network; the weights are
            the same for all.
        calibration_scale, calibration_offset: make a matching score a probability, 1 / (1 + exp(-(scale * score +
            offset))); None where they were not fitted. Training fits them on validation data.

    Raises:
        ValueError: for a grid that is not square or not whole, for stages that do not fit the network, for a field of
            another type or out of its range (`RANGES`), for a calibration of one number or one that turns the order of
            scores round, and for more than `MAX_PARAMETERS` parameters.
    """

    model_type = "ieft"

    num_hidden_layers: int = 6
    hidden_dropout_prob: float | int = 0.1
    layer_norm_eps: float = 1e-6
    text_layer_norm_eps: float = 1e-12
    enhancement_layers: list[int] | tuple[int, ...] = (1, 2, 3)
    enhancement_num_heads: int | None = None
    enhancement_mlp_ratio: float | int = 4
    enhancement_expansion: float | int = 2.66
    contrastive_dim: int = 0
    first_joint_layer: int = 0
    calibration_scale: float | int | None = None
    calibration_offset: float | int | None = None

    def __post_init__(self, **kwargs):
        _check_further_fields(type(self), kwargs)
        check_spelling(kwargs.keys() - FURTHER_FIELDS, type(self).__dataclass_fields__)
        if not IS_HUB_CODE:
            kwargs.pop("custom_pipelines", None)  # the installed pipeline is used; transformers would load Hub code
        try:
            super().__post_init__(**kwargs)
        except (AttributeError, KeyError, TypeError, OverflowError, ArithmeticError) as error:  # of transformers' own
            raise ValueError(f"A field of config.json is not what transformers expects: {error}") from error
        self.image_size = _square("image_size", self.image_size)
        self.patch_size = _square("patch_size", self.patch_size)
        self._check_ranges()
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size; got image_size={self.image_size}, "
                f"patch_size={self.patch_size}."
            )
        self.check_first_joint_layer()
        if self.enhancement_num_heads is None:
            counts = range(self.num_attention_heads, 0, -1)
            self.enhancement_num_heads = next(count for count in counts if self.num_patches % count == 0)
        heads = self.enhancement_num_heads
        if type(heads) is not int or heads < 1 or self.num_patches % heads:
            raise ValueError(
                f"enhancement_num_heads must divide the {self.num_patches} patches of a {self.grid_size}x"
                f"{self.grid_size} grid; got {heads!r}. Leave it out to have one chosen."
            )

    def __setattr__(self, name, value):
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:
            raise ValueError(str(error)) from error

    def _check_ranges(self):
        for name, ends in RANGES.items():
            _check_range(name, getattr(self, name), ends)
        self._check_calibration()
        blocks = self.enhancement_layers
        known = range(self.num_hidden_layers)
        is_list = isinstance(blocks, list | tuple) and all(type(block) is int and block in known for block in blocks)
        if not is_list or sorted(set(blocks)) != list(blocks):
            raise ValueError(
                f"enhancement_layers must be a list of rising block indices below num_hidden_layers={len(known)}, "
                f"each once; got {blocks!r}."
            )
        self.enhancement_layers = list(blocks)
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {', '.join(ACT2FN)}; got {self.hidden_act!r}.")
        if type(self.dtype).__name__ not in ("NoneType", "dtype", "str"):
            raise ValueError(f"dtype must name a number type of torch, such as 'float32'; got {self.dtype!r}.")
        pad = self.pad_token_id
        if pad is not None and not -self.vocab_size <= pad < self.vocab_size:
            raise ValueError(f"pad_token_id must be below vocab_size={self.vocab_size}, or None; got {pad}.")
        if self.num_patches > MAX_PATCHES or self.count_parameters() > MAX_PARAMETERS:
            raise ValueError(
                f"A network of up to {MAX_PATCHES:,} patches and {MAX_PARAMETERS:,} parameters expected; this one has "
                f"{self.num_patches:,} and about {self.count_parameters():,}."
            )

    def _check_calibration(self):
        pair = tuple(getattr(self, name) for name in CALIBRATION)
        if pair == (None, None):
            return
        are_numbers = all(type(each) in (int, float) and math.isfinite(each) for each in pair)
        if not are_numbers or pair[0] <= 0:
            raise ValueError(
                "calibration_scale and calibration_offset must be two finite numbers, the first above 0, or both "
                f"None; got {pair[0]!r} and {pair[1]!r}. run_retrieval.py --do_calibrate fits them."
            )

    def count_parameters(self) -> int:
        """About how many parameters the network has: its matrices, without biases and norms."""
        width, patches = self.hidden_size, self.num_patches
        embeddings = self.vocab_size + self.max_position_embeddings + self.type_vocab_size + patches
        patch = self.num_channels * int(self.patch_size) ** 2  # type: ignore[arg-type]
        embeddings += self.modality_type_vocab_size + patch + 2 * self.contrastive_dim
        block = 4 * width**2 + 2 * width * self.intermediate_size
        gated = int(width * self.enhancement_expansion) * (3 * width + 18)
        stage = 4 * patches**2 + 2 * patches * int(patches * self.enhancement_mlp_ratio) + gated
        return width * embeddings + self.num_hidden_layers * block + len(self.enhancement_layers) * stage

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers'; what it sets after the fields of the file is checked too, and the calibration is left out
        where a keyword makes another network, with other scores.

        Raises:
            ValueError: as the class, and where the file asks for attention from a kernel on the Hub, which is code.
        """
        _check_attention(config_dict)
        check_spelling(kwargs.keys() - FURTHER_FIELDS, cls.__dataclass_fields__)
        changed = (set(RANGES) | set(cls.__annotations__)) & kwargs.keys() - set(CALIBRATION)
        if any(config_dict.get(name, getattr(cls, name)) != kwargs[name] for name in changed):
            config_dict = config_dict | {name: None for name in CALIBRATION}
        made = super().from_dict(config_dict, **kwargs)
        (made[0] if isinstance(made, tuple) else made)._check_ranges()
        return made

    @classmethod
    def _dict_from_json_file(cls, json_file):
        try:
            config_dict = super()._dict_from_json_file(json_file)
        except RecursionError as error:
            raise OSError(f"{json_file} nests too deeply to be a configuration.") from error
        if not isinstance(config_dict, dict):
            raise OSError(f"{json_file} must hold a JSON object; it holds a {type(config_dict).__name__}.")
        return config_dict

    def check_first_joint_layer(self) -> None:
        """Raise a ValueError unless it is one of the blocks; networks ask again, since `from_pretrained` sets its
        keyword arguments unseen."""
        if type(self.first_joint_layer) is not int or not 0 <= self.first_joint_layer < self.num_hidden_layers:
            raise ValueError(
                f"first_joint_layer must be a block index from 0 (the published network) to "
                f"{self.num_hidden_layers - 1} (num_hidden_layers - 1: at least one block reads caption and image "
                f"together); got {self.first_joint_layer!r}."
            )

    @property
    def joins_last(self) -> bool:
        """Whether blocks below the last read each side alone: then a pair is one question of the text CLS."""
        return 0 < self.first_joint_layer == self.num_hidden_layers - 1

    @property
    def grid_size(self) -> int:
        """Patches along one side of the image."""
        return self.image_size // self.patch_size  # type: ignore[operator]  # both whole numbers by now

    @property
    def num_patches(self) -> int:
        """Patches of one image."""
        return self.grid_size**2


def _square(name, size):
    """A side length from an integer or from a pair of equal integers."""
    side = size if isinstance(size, int) else size[0] if len(size) == 2 and size[0] == size[1] else None
    if side is None:
        raise ValueError(f"IEFT reads square grids: {name} must be one integer or two equal ones; got {size}.")
    return side


def _check_range(name, value, ends):
    lowest, highest = ends
    is_whole = isinstance(highest, int)
    kind = int if is_whole else int | float
    if isinstance(value, bool) or not isinstance(value, kind) or not lowest <= value <= highest:
        number = "whole number" if is_whole else "number"
        raise ValueError(f"{name} must be a {number} from {lowest:g} to {highest:,}; got {value!r}.")


def _check_further_fields(config_class, fields):
    """What a file adds to the fields of a configuration becomes its attributes: none may take a method's place."""
    for name in fields:
        own = getattr(config_class, name, None)
        if name.startswith("__") or callable(own) or name in ("attribute_map", "sub_configs", "sub_configs_defaults"):
            raise ValueError(f"{name!r} cannot be a field of config.json: it would replace a part of IeftConfig.")
    if fields.get("num_labels") is not None:
        _check_range("num_labels", fields["num_labels"], (0, MAX_LABELS))
    if not isinstance(fields.get("quantization_config", {}), dict | type(None)) and not hasattr(
        fields["quantization_config"], "to_dict"
    ):
        raise ValueError(f"quantization_config must be an object; got {fields['quantization_config']!r}.")


def _check_attention(fields):
    for name in ("attn_implementation", "_attn_implementation"):
        wish = fields.get(name)
        if wish is not None and (not isinstance(wish, str) or not wish.replace("_", "").isalnum()):
            raise ValueError(
                f"{name} of config.json must be the name of an attention, such as 'sdpa' or 'eager'; got {wish!r}. "
                "Kernels from the Hub are code: pass one to from_pretrained yourself if you trust it."
            )


IeftConfig.register_for_auto_class()

__all__ = ["IeftConfig"]
