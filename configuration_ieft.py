"""The shape of an IEFT network.

In: sizes. Out: an `IeftConfig`, saved as `config.json`. It knows nothing of weights, images or captions.
"""

from transformers import ViltConfig


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

    Raises:
        ValueError: for a grid that is not square or not whole, and for stages that do not fit the network.
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

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.image_size = _square("image_size", self.image_size)
        self.patch_size = _square("patch_size", self.patch_size)
        self.enhancement_layers = list(self.enhancement_layers)
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size must be a multiple of patch_size; got image_size={self.image_size}, "
                f"patch_size={self.patch_size}."
            )
        blocks = self.enhancement_layers
        if blocks != sorted(set(blocks)) or any(not 0 <= block < self.num_hidden_layers for block in blocks):
            raise ValueError(
                f"enhancement_layers must be rising block indices below num_hidden_layers={self.num_hidden_layers}, "
                f"each once; got {blocks}."
            )
        self.check_first_joint_layer()
        if self.enhancement_num_heads is None:
            heads = range(self.num_attention_heads, 0, -1)
            self.enhancement_num_heads = next(count for count in heads if self.num_patches % count == 0)
        if self.num_patches % self.enhancement_num_heads:
            raise ValueError(
                f"enhancement_num_heads must divide the {self.num_patches} patches of a {self.grid_size}x"
                f"{self.grid_size} grid; got {self.enhancement_num_heads}. Leave it out to have one chosen."
            )

    def check_first_joint_layer(self):
        """Raise a ValueError unless it is one of the blocks; networks ask again, since `from_pretrained` sets its
        keyword arguments unseen."""
        if not 0 <= self.first_joint_layer < self.num_hidden_layers:
            raise ValueError(
                f"first_joint_layer must be a block index from 0 (the published network) to "
                f"{self.num_hidden_layers - 1} (num_hidden_layers - 1: at least one block reads caption and image "
                f"together); got {self.first_joint_layer}."
            )

    @property
    def joins_last(self):
        """Whether blocks below the last read each side alone: then a pair is one question of the text CLS."""
        return 0 < self.first_joint_layer == self.num_hidden_layers - 1

    @property
    def grid_size(self):
        """Patches along one side of the image."""
        return self.image_size // self.patch_size

    @property
    def num_patches(self):
        """Patches of one image."""
        return self.grid_size**2


def _square(name, size):
    """A side length from an integer or from a pair of equal integers."""
    if isinstance(size, int):
        return size
    if len(size) == 2 and size[0] == size[1]:
        return size[0]
    raise ValueError(f"IEFT reads square grids: {name} must be one integer or two equal ones; got {size}.")


IeftConfig.register_for_auto_class()

__all__ = ["IeftConfig"]
