"""The layers of IEFT: embeddings, transformer blocks, visual enhancement stages and the encoder that chains them.

Paper: Tang, Wang, Ma, Zhang, Liu, Jiao, "Interacting-Enhancing Feature Transformer for Cross-Modal Remote-Sensing
Image and Text Retrieval", IEEE TGRS 2023 (FEM, IMRI, VFE and RM are its modules). Base network: ViLT-B/32, Kim et
al., ICML 2021; weight names follow transformers' ViLT.

Dimension letters: I images, C captions, B pairs, L caption tokens, P patches (G x G), S = L + 1 + P tokens of a pair,
Q query tokens, D hidden size, H heads, W width of the gated convolution.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CONVOLUTION_LAYER_NORM_EPS = 1e-5


class IeftTextEmbeddings(nn.Module):
    """BERT's embeddings of a caption (FEM, text side)."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.text_layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)  # (C, L, D)
        num_captions, length, _ = inputs_embeds.shape
        longest = self.position_embeddings.num_embeddings
        if length > longest:
            raise ValueError(
                f"Captions of up to {longest} tokens expected (max_position_embeddings); got {length}. "
                "Cut them with the processor, which does so by default."
            )
        if token_type_ids is None:
            token_type_ids = torch.zeros(num_captions, length, dtype=torch.long, device=inputs_embeds.device)
        positions = torch.arange(length, device=inputs_embeds.device)
        embeddings = inputs_embeds + self.token_type_embeddings(token_type_ids) + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(embeddings))  # (C, L, D)


class IeftPatchEmbeddings(nn.Module):
    """One convolution whose kernel and stride are a patch."""

    def __init__(self, config):
        super().__init__()
        self.expected = (config.num_channels, config.image_size, config.image_size)
        self.projection = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != self.expected:
            raise ValueError(
                f"pixel_values of shape (images, {', '.join(map(str, self.expected))}) expected; got "
                f"{tuple(pixel_values.shape)}. Prepare images with this checkpoint's own processor."
            )
        patches = self.projection(pixel_values.to(self.projection.weight.dtype))  # (I, D, G, G)
        return patches.flatten(2).transpose(1, 2)  # (I, P, D), raster order


class IeftEmbeddings(nn.Module):
    """Captions and images as token embeddings of one width (FEM)."""

    def __init__(self, config):
        super().__init__()
        self.text_embeddings = IeftTextEmbeddings(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embeddings = IeftPatchEmbeddings(config)
        self.position_embeddings = nn.Parameter(torch.zeros(1, config.num_patches + 1, config.hidden_size))
        self.token_type_embeddings = nn.Embedding(config.modality_type_vocab_size, config.hidden_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def embed_images(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embeddings(pixel_values)  # (I, P, D)
        tokens = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], dim=1)  # (I, 1+P, D)
        return self.dropout(tokens + self.position_embeddings)

    def mark_captions(self, text_embeds: Tensor) -> Tensor:
        """Add the modality embedding of captions, row 0."""
        return text_embeds + self.token_type_embeddings.weight[0]

    def mark_images(self, image_embeds: Tensor) -> Tensor:
        """Add the modality embedding of images, row 1, to the image CLS too."""
        return image_embeds + self.token_type_embeddings.weight[1]


def eager_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention written out, for its probabilities: (B, H, Q, D/H) x (B, H, S, D/H) -> (B, Q, H, D/H)."""
    logits = torch.matmul(query, key.transpose(2, 3)) * scaling  # (B, H, Q, S)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attention_mask, torch.finfo(logits.dtype).min)
    elif attention_mask is not None:
        logits = logits + attention_mask
    probabilities = nn.functional.softmax(logits, dim=-1)
    dropped = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(dropped, value).transpose(1, 2).contiguous(), probabilities


class IeftSelfAttention(nn.Module):
    """Query, key and value of a block, and the attention between them."""

    is_causal = False  # read by transformers' attention functions

    def __init__(self, config, width, num_heads):
        super().__init__()
        if width % num_heads:
            raise ValueError(f"The width of a block must be a multiple of its heads; got {width} and {num_heads}.")
        self.config = config
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=config.qkv_bias)
        self.key = nn.Linear(width, width, bias=config.qkv_bias)
        self.value = nn.Linear(width, width, bias=config.qkv_bias)

    def split_heads(self, tokens: Tensor) -> Tensor:
        """(B, S, D) -> (B, H, S, D/H)."""
        return tokens.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """(B, Q, D), (B, S, D), (B, S, D) -> context (B, Q, D) and, if asked, probabilities (B, H, Q, S)."""
        query, key, value = (self.split_heads(x) for x in (query, key, value))
        if attention_mask is not None:
            attention_mask = attention_mask[:, :, : query.shape[2]]  # (B, 1, Q, S): one row per query
        # Fused kernels keep no probabilities: whoever asks for them gets the written-out form.
        name = "eager" if output_attentions else self.config._attn_implementation
        context, probabilities = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention)(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.config.attention_probs_dropout_prob if self.training else 0.0,
            scaling=query.shape[-1] ** -0.5,
        )
        return context.flatten(2), probabilities  # (B, Q, D)

    @staticmethod
    def attend_in_part(
        query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Attention to a part of the tokens, without dropout: (B, H, Q, D/H), (B, H, S, D/H) twice.

        The attention to two parts together is the mean of both contexts, weighted by the exponentials of both
        `log_sum`.

        Args:
            attention_mask: (B, S), 1 on tokens to be seen; None for all.

        Returns:
            context (B, H, Q, D/H), and log_sum (B, H, Q) of the exponentiated logits in float32.
        """
        key, value = key.to(query.dtype), value.to(query.dtype)  # stored ones are float32
        logits = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(2, 3)).float()  # (B, H, Q, S)
        if attention_mask is not None:
            logits = logits.masked_fill(attention_mask[:, None, None] == 0, -torch.inf)
        log_sum = logits.logsumexp(-1)  # (B, H, Q)
        return torch.matmul((logits - log_sum[..., None]).exp_().to(value.dtype), value), log_sum


class IeftResidualOutput(nn.Module):
    """The linear map that ends a branch of a block, and its dropout."""

    def __init__(self, width_in, width_out, dropout):
        super().__init__()
        self.dense = nn.Linear(width_in, width_out)
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.dropout(self.dense(hidden_states))


class IeftAttention(nn.Module):
    def __init__(self, config, width, num_heads):
        super().__init__()
        self.attention = IeftSelfAttention(config, width, num_heads)
        self.output = IeftResidualOutput(width, width, config.hidden_dropout_prob)


class IeftIntermediate(nn.Module):
    def __init__(self, config, width, mlp_width):
        super().__init__()
        self.dense = nn.Linear(width, mlp_width)
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activation(self.dense(hidden_states))


class IeftLayer(GradientCheckpointingLayer):
    """A pre-norm transformer block: joint blocks (IMRI), and the channel attention of VFE at its own width."""

    def __init__(self, config, width, num_heads, mlp_width):
        super().__init__()
        self.attention = IeftAttention(config, width, num_heads)
        self.intermediate = IeftIntermediate(config, width, mlp_width)
        self.output = IeftResidualOutput(mlp_width, width, config.hidden_dropout_prob)
        self.layernorm_before = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.layernorm_after = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def project(self, hidden_states: Tensor, num_queries: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> query (B, Q, D), key and value (B, S, D); Q is S, or the first `num_queries` tokens."""
        normed = self.layernorm_before(hidden_states)
        attention = self.attention.attention
        return attention.query(normed[:, :num_queries]), attention.key(normed), attention.value(normed)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *,
        projected: Sequence[Tensor] | None = None, num_queries: int | None = None, output_attentions: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """One block. `projected` takes a query, key and value computed before; `num_queries` keeps the first tokens.

        Returns:
            The block's output (B, Q, D), and the attention probabilities (B, H, Q, S) or None.
        """
        query, key, value = self.project(hidden_states, num_queries) if projected is None else projected
        context, probabilities = self.attention.attention.attend(query, key, value, attention_mask, output_attentions)
        return self.finish(hidden_states[:, :num_queries], context), probabilities

    def finish(self, hidden_states: Tensor, context: Tensor) -> Tensor:
        """What follows the attention, on tokens (..., D) each by itself."""
        hidden_states = hidden_states + self.attention.output(context)
        return hidden_states + self.output(self.intermediate(self.layernorm_after(hidden_states)))


class IeftGatedConvolution(nn.Module):
    """Step B of VFE: x + W_out(gelu(a) * b), where a, b halve depthwise3x3(W_in(LayerNorm(x))); no biases."""

    def __init__(self, config):
        super().__init__()
        width = int(config.hidden_size * config.enhancement_expansion)
        self.grid_size = config.grid_size
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=CONVOLUTION_LAYER_NORM_EPS)
        self.project_in = nn.Linear(config.hidden_size, 2 * width, bias=False)  # a 1x1 convolution
        self.depthwise = nn.Conv2d(2 * width, 2 * width, kernel_size=3, padding=1, groups=2 * width, bias=False)
        self.project_out = nn.Linear(width, config.hidden_size, bias=False)  # a 1x1 convolution

    def forward(self, patches: Tensor) -> Tensor:
        grid = self.project_in(self.layernorm(patches)).transpose(1, 2)  # (B, 2W, P)
        grid = self.depthwise(grid.unflatten(2, (self.grid_size, self.grid_size)))  # (B, 2W, G, G)
        gate, content = grid.flatten(2).transpose(1, 2).chunk(2, dim=-1)  # each (B, P, W)
        return patches + self.project_out(nn.functional.gelu(gate) * content)  # (B, P, D)


class IeftEnhancement(GradientCheckpointingLayer):
    """A visual enhancement stage (VFE): channel attention, then gated convolution, on the patch tokens alone."""

    def __init__(self, config):
        super().__init__()
        self.channel_attention = IeftLayer(
            config,
            width=config.num_patches,
            num_heads=config.enhancement_num_heads,
            mlp_width=int(config.num_patches * config.enhancement_mlp_ratio),
        )
        self.gated_convolution = IeftGatedConvolution(config)

    def forward(self, patches: Tensor) -> Tensor:
        channels, _ = self.channel_attention(patches.transpose(1, 2))  # (B, D, P): channels are the tokens
        return self.gated_convolution(channels.transpose(1, 2))  # (B, P, D)


class IeftEncoder(nn.Module):
    """The blocks, with an enhancement stage before some of them."""

    def __init__(self, config):
        super().__init__()
        config.check_first_joint_layer()
        self.num_patches = config.num_patches
        self.enhancement_layers = config.enhancement_layers
        self.layer = nn.ModuleList(
            IeftLayer(config, config.hidden_size, config.num_attention_heads, config.intermediate_size)
            for _ in range(config.num_hidden_layers)
        )
        self.enhancement = nn.ModuleList(IeftEnhancement(config) for _ in config.enhancement_layers)
        self.gradient_checkpointing = False

    def enhance(self, block: int, hidden_states: Tensor) -> Tensor:
        """The stage before `block`, if there is one, on the last P tokens: (B, S, D) -> (B, S, D)."""
        if block not in self.enhancement_layers:
            return hidden_states
        stage = self.enhancement[self.enhancement_layers.index(block)]
        others, patches = hidden_states[:, : -self.num_patches], hidden_states[:, -self.num_patches :]
        return torch.cat([others, stage(patches)], dim=1)

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, blocks: range | None = None,
        has_image: bool = True, is_enhanced: bool = False, projected: Sequence[Tensor] | None = None,
        num_queries: int | None = None, output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple[Tensor | None, ...]]:  # fmt: skip
        """Some blocks, one after another.

        Args:
            hidden_states: (B, S, D), text tokens, image CLS, patches; or those of one modality alone.
            attention_mask: as the attention functions want it, or None where no token is padding.
            blocks: a range of their indices; None for all.
            has_image: False for captions alone, which no stage touches.
            is_enhanced: the stage before the first of these blocks, if any, has run already.
            projected: query, key and value of the first of these blocks, where they are known already.
            num_queries: the last of these blocks computes only this many leading tokens.

        Returns:
            The output (B, Q, D), the embeddings and each block's output, and each block's attention or None.
        """
        blocks = range(len(self.layer)) if blocks is None else blocks
        all_hidden_states: tuple[Tensor, ...] = (hidden_states,)
        attentions: tuple[Tensor | None, ...] = ()
        for block in blocks:
            is_first, is_last = block == blocks[0], block == blocks[-1]
            if has_image and not (is_first and is_enhanced):
                hidden_states = self.enhance(block, hidden_states)
            hidden_states, probabilities = self.layer[block](
                hidden_states,
                attention_mask,
                projected=projected if is_first else None,
                num_queries=num_queries if is_last else None,
                output_attentions=output_attentions,
            )
            all_hidden_states += (hidden_states,)
            attentions += (probabilities,)
        return hidden_states, all_hidden_states, attentions


class IeftPooler(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return torch.tanh(self.dense(hidden_states[:, 0]))  # (B, D)


class Prepared(NamedTuple):
    """What one side of a pair brings to the first joint block, computed once per image or caption.

    Where the first joint block is the last, the text CLS alone asks in it, and has asked its own caption already.
    Captions then bring `hidden`, `query`, `context` and `log_sum` of this one token, images `key` and `value`.

    Attributes:
        hidden: (N, T, D) tokens that enter the block, or (N, D).
        query: (N, T, D) the block's projection of them, or (N, D).
        key, value: (N, T, D), or split into heads (N, H, T, D/H).
        attention_mask: (N, T) of captions, 1 on real tokens, or None where none is padded.
        context: (N, D) what the text CLS found in its own caption.
        log_sum: (N, H) logarithm of the weight that it found it with.
    """

    hidden: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    attention_mask: Tensor | None = None
    context: Tensor | None = None
    log_sum: Tensor | None = None

    def take(self, rows: Any) -> "Prepared":
        """The same for some rows: an index tensor of any shape, a list or a slice."""
        return Prepared(*(None if x is None else x[rows] for x in self))

    def cut(self, length: int) -> "Prepared":
        """The same for the first tokens alone."""
        return Prepared(*(None if x is None else x[:, :length] for x in self))


def pair_attentions(text: Tensor, image: Tensor, pair_images: Tensor | None, pair_captions: Tensor | None) -> Tensor:
    """Attentions within captions (C, H, L, L) and within images (I, H, 1+P, 1+P), as those of pairs (B, H, S, S)."""
    text = text if pair_captions is None else text[pair_captions]
    image = image if pair_images is None else image[pair_images]
    upper = nn.functional.pad(text, (0, image.shape[-1]))  # (B, H, L, S)
    return torch.cat([upper, nn.functional.pad(image, (text.shape[-1], 0))], dim=2)
