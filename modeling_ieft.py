"""IEFT, a cross-encoder: one transformer reads a caption and an image together and gives a matching score.

With contrastive heads the same network also gives an embedding of each image and each caption. Paper and dimension
letters: see `layers_ieft.py`; E is the size of the contrastive embeddings.
"""

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, ViltModel
from transformers import initialization as init
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

try:
    from .configuration_ieft import IeftConfig
    from .layers_ieft import IeftEmbeddings, IeftEncoder, IeftPooler, Prepared, pair_attentions
    from .ranking_ieft import RankingMixin, save_pipeline_code
except ImportError:  # imported from the clone or the wheel, where these files are top-level modules
    from configuration_ieft import IeftConfig
    from layers_ieft import IeftEmbeddings, IeftEncoder, IeftPooler, Prepared, pair_attentions
    from ranking_ieft import RankingMixin, save_pipeline_code

AUTO_CLASSES = {
    "AutoConfig": "configuration_ieft.IeftConfig",
    "AutoModel": "modeling_ieft.IeftModel",
    # As the cross-encoders of text retrieval: a pair goes in, one logit comes out.
    "AutoModelForSequenceClassification": "modeling_ieft.IeftForImageTextRetrieval",
}
PIPELINE = {"impl": "pipeline_ieft.ImageTextRetrievalPipeline", "pt": ["AutoModelForSequenceClassification"]}
# Parts that pairs are cut into by the lengths of their captions: at most so many, and of at least so many numbers in
# the hidden states of their pairs, since small ones take as long as large ones.
PARTS_AT_MOST, NUMBERS_AT_LEAST = 8, 2**19
MAX_LOGIT_SCALE = math.log(100.0)  # as CLIP: similarities are never scaled by more than 100


@dataclass
class IeftRetrievalOutput(ModelOutput):
    """What `IeftForImageTextRetrieval` gives.

    Attributes:
        loss: the loss of the scores against `labels`, where these are given.
        logits: (B, 1) matching scores, any real number, higher is better.
        image_features: (I, E) unit vectors, with `output_features`.
        text_features: (C, E) unit vectors, with `output_features`.
        similarity_scale: the learned factor on their dot products in the contrastive loss, with `output_features`.
        hidden_states: the embeddings and the output of each block, each (B, S, D), with `output_hidden_states`.
        attentions: one (B, H, S, S) per block, rows summing to 1, with `output_attentions`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    image_features: Tensor | None = None
    text_features: Tensor | None = None
    similarity_scale: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class IeftModelOutput(BaseModelOutputWithPooling):
    """What `IeftModel` gives: as transformers', and with `first_joint_layer` above 0 each side as it was read alone.

    Attributes:
        text_states: (C, L, D) captions as they enter the first joint block.
        image_states: (I, 1+P, D) images as they enter it.
    """

    text_states: Tensor | None = None
    image_states: Tensor | None = None


class IeftPreTrainedModel(PreTrainedModel):
    config: IeftConfig
    config_class = IeftConfig
    base_model_prefix = "vilt"  # plain ViLT checkpoints load into it
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as ViltModel has it
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["IeftEmbeddings", "IeftLayer", "IeftEnhancement"]
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, IeftEmbeddings):
            init.normal_(module.cls_token, std=self.config.initializer_range)
            init.normal_(module.position_embeddings, std=self.config.initializer_range)
        elif isinstance(module, IeftForImageTextRetrieval) and module.config.contrastive_dim:
            init.constant_(module.logit_scale, math.log(1 / 0.07))  # as CLIP

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As transformers', and the code that `trust_remote_code=True` runs where this project is not installed."""
        self.config.auto_map = dict(AUTO_CLASSES)
        self.config.custom_pipelines = {"image-text-retrieval": dict(PIPELINE)}
        super().save_pretrained(save_directory, *args, **kwargs)
        save_pipeline_code(self, save_directory)


class IeftModel(IeftPreTrainedModel, ViltModel):
    """The network without ranking head. In eval mode equal inputs give equal outputs: patches keep raster order."""

    embeddings: IeftEmbeddings
    encoder: IeftEncoder
    pooler: Any

    def __init__(self, config, add_pooling_layer=True):
        PreTrainedModel.__init__(self, config)  # ViltModel's own would build modules that IEFT replaces
        self.embeddings = IeftEmbeddings(config)
        self.encoder = IeftEncoder(config)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.pooler = IeftPooler(config) if add_pooling_layer else None
        self.post_init()

    def embed_captions(
        self,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """(C, L) ids, or (C, L, D) word embeddings -> (C, L, D), the modality embedding not yet added."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("Captions expected as exactly one of input_ids and inputs_embeds.")
        return self.embeddings.text_embeddings(input_ids, token_type_ids, inputs_embeds)

    def embed_images(self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None) -> Tensor:
        """(I, 3, image_size, image_size) in [-1, 1] -> `image_embeds` (I, 1+P, D), the modality not yet added."""
        if (pixel_values is None) == (image_embeds is None):
            raise ValueError("Images expected as exactly one of pixel_values and image_embeds.")
        if image_embeds is None:
            return self.embeddings.embed_images(pixel_values)
        expected = (self.config.num_patches + 1, self.config.hidden_size)
        if image_embeds.dim() != 3 or tuple(image_embeds.shape[1:]) != expected:
            raise ValueError(
                f"image_embeds of shape (images, {expected[0]}, {expected[1]}) expected, as `embed_images` gives "
                f"them; got {tuple(image_embeds.shape)}."
            )
        return image_embeds

    def encode(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple]:
        """Blocks and final LayerNorm on (B, S, D) marked tokens; `attention_mask` (B, S) is 1 on real tokens.

        Returns:
            The normalised output (B, Q, D), all hidden states, all attentions; options as `IeftEncoder.forward`.
        """
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        last, all_hidden_states, attentions = self.encoder(hidden_states, attention_mask, **options)
        return self.layernorm(last), all_hidden_states, attentions

    def read_alone(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, *, has_image: bool = True,
        output_attentions: bool = False,
    ) -> tuple[Tensor, tuple[Tensor, ...], tuple]:  # fmt: skip
        """One side of pairs, (N, T, D) marked tokens, up to the first joint block: also the stage before that has run.

        Returns:
            The states (N, T, D) that enter the block, the embeddings and the output of each block below it, and the
            attentions of those.
        """
        if attention_mask is not None:
            attention_mask = create_bidirectional_mask(self.config, hidden_states, attention_mask)
        join = self.config.first_joint_layer
        last, all_hidden_states, attentions = self.encoder(
            hidden_states, attention_mask, blocks=range(join), has_image=has_image, output_attentions=output_attentions
        )
        return self.encoder.enhance(join, last) if has_image else last, all_hidden_states, attentions

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, pixel_values: Tensor | None = None, pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, image_embeds: Tensor | None = None, *,
        pair_images: Tensor | None = None, pair_captions: Tensor | None = None, num_queries: int | None = None,
        output_attentions: bool | None = None, output_hidden_states: bool | None = None,
        return_dict: bool | None = None, **kwargs: Any,
    ) -> IeftModelOutput | tuple:  # fmt: skip
        """Captions with images, row by row, or in any pairing.

        Args:
            input_ids, attention_mask, token_type_ids: (C, L); the mask is 1 on real tokens, 0 on padding.
            pixel_values: (I, 3, image_size, image_size) in [-1, 1].
            pixel_mask: accepted for ViLT's sake; must be all ones, since every image fills its grid.
            inputs_embeds: (C, L, D) word embeddings instead of ids.
            image_embeds: (I, 1+P, D) from `embed_images` instead of pixels.
            pair_images, pair_captions: (B,) rows of images and captions to read together, each embedded once; left
                out, row b is read with row b.
            num_queries: compute the last block for this many leading tokens alone.

        Returns:
            IeftModelOutput: `last_hidden_state` (B, S, D), text tokens, image CLS, patches in raster order;
            `pooler_output` (B, D). Where blocks read each side alone, attentions between the two are 0.

        Raises:
            ValueError: for a wrong image size, a caption longer than the position table, unequal batches, padding
                among the pixels.
        """
        unknown = sorted(name for name, value in kwargs.items() if value is not None)
        if unknown:
            raise ValueError(
                f"The network takes no {', '.join(unknown)}: it would be ignored. See `IeftModel.forward` for the "
                "arguments; losses are computed by `IeftTrainer`."
            )
        if pixel_mask is not None and not bool(pixel_mask.all()):
            raise ValueError("pixel_mask of ones expected: IEFT reads the whole square image. Leave pixel_mask out.")
        text = self.embeddings.mark_captions(self.embed_captions(input_ids, token_type_ids, inputs_embeds))
        image = self.embeddings.mark_images(self.embed_images(pixel_values, image_embeds))
        check_mask(attention_mask, text)
        output_attentions = self.config.output_attentions if output_attentions is None else output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        join, pairing = self.config.first_joint_layer, (pair_images, pair_captions)
        earlier: Any = None
        if join:
            texts = self.read_alone(text, attention_mask, has_image=False, output_attentions=output_attentions)
            images = self.read_alone(image, output_attentions=output_attentions)
            (text, image), *earlier = zip(texts, images, strict=True)
        pairs, pair_mask = self._pair_up(text, image, attention_mask, *pairing)
        last, all_hidden_states, attentions = self.encode(
            pairs, pair_mask, blocks=range(join, self.config.num_hidden_layers), is_enhanced=join > 0,
            num_queries=num_queries, output_attentions=output_attentions,
        )  # fmt: skip
        if earlier and output_hidden_states:
            sides = zip(*earlier[0], strict=True)
            paired = [self._pair_up(one, other, None, *pairing)[0] for one, other in sides]
            all_hidden_states = (*paired, *all_hidden_states[1:])
        if earlier and output_attentions:
            attentions = (
                *(pair_attentions(*sides, *pairing) for sides in zip(*earlier[1], strict=True)),
                *attentions,
            )
        output = IeftModelOutput(
            last_hidden_state=last,
            pooler_output=None if self.pooler is None else self.pooler(last),
            hidden_states=all_hidden_states if output_hidden_states else None,
            attentions=attentions if output_attentions else None,
            text_states=text if join else None,
            image_states=image if join else None,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    @staticmethod
    def _pair_up(text, image, attention_mask, pair_images, pair_captions):
        """Marked captions (C, L, D) with images (I, 1+P, D): tokens (B, S, D), and the mask (B, S) or None."""
        if pair_images is not None:
            image = image[pair_images]  # (B, 1+P, D)
        if pair_captions is not None:
            text = text[pair_captions]  # (B, L, D)
            attention_mask = None if attention_mask is None else attention_mask[pair_captions]
        if len(text) != len(image):
            raise ValueError(
                f"As many captions as images expected, to be read in pairs; got {len(text)} captions and {len(image)} "
                "images. For another pairing pass pair_images and pair_captions."
            )
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (0, image.shape[1]), value=1)  # (B, S)
        return torch.cat([text, image], dim=1), attention_mask


class IeftForImageTextRetrieval(RankingMixin, IeftPreTrainedModel):
    """IEFT with its ranking head (RM), and with the contrastive heads if `config.contrastive_dim` is not 0."""

    vilt: IeftModel
    accepts_loss_kwargs = False  # the loss is a mean over the batch, which Trainer divides by its accumulation steps

    def __init__(self, config):
        super().__init__(config)
        self.vilt = IeftModel(config)
        self.rank_output = nn.Linear(config.hidden_size, 1)
        if config.contrastive_dim:
            self.image_projection = nn.Linear(config.hidden_size, config.contrastive_dim, bias=False)
            self.text_projection = nn.Linear(config.hidden_size, config.contrastive_dim, bias=False)
            self.logit_scale = nn.Parameter(torch.tensor(0.0))
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, pixel_values: Tensor | None = None, pixel_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None, image_embeds: Tensor | None = None, *,
        pair_images: Tensor | None = None, pair_captions: Tensor | None = None, labels: Tensor | None = None,
        output_features: bool = False, output_attentions: bool | None = None,
        output_hidden_states: bool | None = None, return_dict: bool | None = None, **kwargs: Any,
    ) -> IeftRetrievalOutput | tuple:  # fmt: skip
        """Matching scores; arguments and errors as `IeftModel.forward`.

        Args:
            pair_captions: also (G, M) rows of captions to read with each of G images, those of `pair_images` or all,
                or (1, M) for the same captions with each: G*M pairs, image by image. What does not depend on the
                other side is then computed once for each image and caption, dropout included, up to the projections of
                the fusion layer, and little padding is read. Where the last block alone reads captions and images
                together, image tokens are read once for each group and not copied.
            labels: (B,) or (B, 1) targets, one for each pair. By default they lie between 0 (no match) and 1 (match),
                and the loss is the binary cross-entropy of the logits, as in sentence-transformers' cross-encoders.
                With `config.problem_type="regression"` they are any numbers and the loss is the mean squared error.
            output_features: also give the contrastive embeddings of the images and captions, each read alone.

        Raises:
            ValueError: also for labels of another number than the pairs or out of range, and for a `problem_type` that
                one score cannot have.
        """
        if image_embeds is None:
            image_embeds = self.vilt.embed_images(pixel_values)
            pixel_values = None
        keep_all = output_hidden_states or output_attentions
        keep_all = keep_all or self.config.output_hidden_states or self.config.output_attentions
        captions = (input_ids, attention_mask, token_type_ids, inputs_embeds)
        in_groups = pair_captions is not None and pair_captions.dim() == 2
        num_groups = len(image_embeds if pair_images is None else pair_images)
        if pair_captions is not None and in_groups and len(pair_captions) not in (1, num_groups):
            raise ValueError(
                f"One row of captions for each image expected, or one for all; got pair_captions of shape "
                f"{tuple(pair_captions.shape)} for {num_groups} images."
            )
        if in_groups and self._can_share_sides and not keep_all and pixel_mask is None and not kwargs:
            logits, outputs = self._score_in_groups(captions, image_embeds, pair_images, pair_captions)
        else:
            if in_groups:
                pair_images, pair_captions = pair_groups(pair_images, pair_captions, len(image_embeds))
            outputs = self.vilt(
                input_ids,
                attention_mask,
                token_type_ids,
                pixel_values,
                pixel_mask,
                inputs_embeds,
                image_embeds,
                pair_images=pair_images,
                pair_captions=pair_captions,
                num_queries=None if keep_all else 1,  # the score reads text token 0 alone
                output_attentions=output_attentions,
                output_hidden_states=output_hidden_states,
                return_dict=True,
                **kwargs,
            )
            logits = self.rank_output(outputs.pooler_output)  # (B, 1)
        image_features = text_features = similarity_scale = None
        if output_features:
            image_features = self.get_image_features(image_embeds=image_embeds, image_states=outputs.image_states)
            text_features = self.get_text_features(*captions, text_states=outputs.text_states)
            similarity_scale = self.similarity_scale()
        output = IeftRetrievalOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            image_features=image_features,
            text_features=text_features,
            similarity_scale=similarity_scale,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _loss(self, logits, labels):
        """The mean loss of (B, 1) logits in float32; `labels` and errors as `forward`."""
        kind = self.config.problem_type
        if kind not in (None, "regression", "multi_label_classification"):
            raise ValueError(
                "config.problem_type of None (binary cross-entropy) or 'regression' (mean squared error) expected, "
                f"for one score a pair; got {kind!r}."
            )
        if labels.numel() != len(logits):
            raise ValueError(f"One label for each of {len(logits)} pairs expected; got {tuple(labels.shape)}.")
        logits, labels = logits.float(), labels.to(logits.device).float().view(-1, 1)
        if kind == "regression":
            return nn.functional.mse_loss(logits, labels)
        if not torch.compiler.is_compiling() and not bool(((labels >= 0) & (labels <= 1)).all()):
            raise ValueError(
                f"Labels from 0 (no match) to 1 (match) expected; got {labels.min().item():g} to "
                f"{labels.max().item():g}. For other numbers set config.problem_type to 'regression'."
            )
        return nn.functional.binary_cross_entropy_with_logits(logits, labels)

    def get_image_features(
        self, pixel_values: Tensor | None = None, image_embeds: Tensor | None = None, *,
        image_states: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Images read alone by the same network: unit vectors (I, E), to be compared with captions' by dot product.

        With `first_joint_layer` above 0 they are read where the pairs join, so that the `image_states` of scoring,
        from `read_images`, hold them too; at 0 after all blocks.
        """
        self._require_contrastive_heads()
        if image_states is not None:
            return self._project_states(self.image_projection, image_states)
        image = self.vilt.embeddings.mark_images(self.vilt.embed_images(pixel_values, image_embeds))
        return self._project_alone(self.image_projection, image)

    def get_text_features(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None, inputs_embeds: Tensor | None = None, *,
        text_states: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Captions read alone by the same network: unit vectors (C, E); as `get_image_features`."""
        self._require_contrastive_heads()
        if text_states is not None:
            return self._project_states(self.text_projection, text_states)
        text = self.vilt.embed_captions(input_ids, token_type_ids, inputs_embeds)
        text = self.vilt.embeddings.mark_captions(text)
        return self._project_alone(self.text_projection, text, attention_mask, has_image=False)

    def _project_alone(self, projection, hidden, attention_mask=None, **options):
        blocks = range(self.config.first_joint_layer or self.config.num_hidden_layers)
        first, _, _ = self.vilt.encode(hidden, attention_mask, blocks=blocks, num_queries=1, **options)  # (N, 1, D)
        return nn.functional.normalize(projection(first[:, 0]), dim=-1)

    def _project_states(self, projection, states):
        if not self.config.first_joint_layer:
            raise ValueError(
                "Embeddings are in the states of networks with first_joint_layer above 0; this one's is 0."
            )
        return nn.functional.normalize(projection(self.vilt.layernorm(states[:, 0])), dim=-1)

    def similarity_scale(self) -> Tensor:
        """The learned factor on dot products of features in the contrastive loss, in (0, 100]."""
        self._require_contrastive_heads()
        return self.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def _require_contrastive_heads(self):
        if not self.config.contrastive_dim:
            raise ValueError(
                "Embeddings need contrastive heads, and this checkpoint has none (contrastive_dim is 0). Train one "
                "with --contrastive_weight above 0."
            )

    @property
    def _can_share_sides(self):
        """Whether groups are scored from both sides computed once: not where `score_groups` would leave attention
        dropout out, nor where activations, of which projections are some, are to be computed again."""
        if self.config.joins_last:
            return not (self.training and self.config.attention_probs_dropout_prob)
        return not (self.training and self.vilt.encoder.layer[-1].gradient_checkpointing)

    def _score_in_groups(self, captions, image_embeds, pair_images, pair_captions):
        """Images with groups of captions, `captions` as `_text_states` takes them: logits (G*M, 1), the states."""
        text_states, attention_mask = self._text_states(*captions), captions[1]
        image_states = self._image_states(image_embeds=image_embeds)
        prepared = self.prepare_captions(attention_mask=attention_mask, text_states=text_states)
        images = self.prepare_images(image_states=image_states)
        if self.config.joins_last:
            images = images if pair_images is None else images.take(pair_images)
            scores = self.score_groups(prepared.take(pair_captions), images)  # (G, M)
        else:
            scores = self._score_by_length(
                prepared, images, *pair_groups(pair_images, pair_captions, len(image_embeds))
            )
        join = self.config.first_joint_layer
        outputs = IeftModelOutput(
            text_states=text_states if join else None, image_states=image_states if join else None
        )
        return scores.reshape(-1, 1), outputs

    def _score_by_length(self, captions, images, pair_images, pair_captions):
        """Scores (B,) of pairs given by rows, those with captions of similar length together and cut to the longest:
        padding takes as long as words."""
        num_tokens = captions.hidden.shape[1] + images.hidden.shape[1]
        count = min(PARTS_AT_MOST, len(pair_images) * num_tokens * self.config.hidden_size // NUMBERS_AT_LEAST)
        if captions.attention_mask is None or count < 2:
            return self.score_prepared(captions.take(pair_captions), images.take(pair_images))
        mask = captions.attention_mask.cpu()[pair_captions.cpu()] != 0  # (B, L)
        lengths = (mask * torch.arange(1, mask.shape[1] + 1)).amax(dim=1).clamp(min=1)  # (B,)
        ends = lengths.sort().values[torch.linspace(0, len(lengths) - 1, count + 1)[1:].long()].unique()
        part_of = torch.bucketize(lengths, ends)
        parts, scores = [], []
        for part, longest in enumerate(ends.tolist()):
            parts.append(torch.nonzero(part_of == part)[:, 0])
            rows = parts[-1].to(pair_captions.device)
            some = captions.cut(longest).take(pair_captions[rows])
            if mask[parts[-1], :longest].all():
                some = some._replace(attention_mask=None)
            scores.append(self.score_prepared(some, images.take(pair_images[rows])))
        return torch.cat(scores)[torch.cat(parts).argsort().to(pair_captions.device)]

    def read_images(self, pixel_values: Tensor | None) -> Tensor:
        """(I, 3, image_size, image_size) -> the states (I, 1+P, D) that enter the first joint block.

        All that scoring needs to know of an image; with `first_joint_layer` above 0 its embedding is in it too.
        """
        return self._image_states(pixel_values)

    def _image_states(self, pixel_values=None, image_embeds=None):
        return self.vilt.read_alone(
            self.vilt.embeddings.mark_images(self.vilt.embed_images(pixel_values, image_embeds))
        )[0]

    def _text_states(self, input_ids=None, attention_mask=None, token_type_ids=None, inputs_embeds=None):
        """(C, L, D) as they enter the first joint block."""
        text = self.vilt.embed_captions(input_ids, token_type_ids, inputs_embeds)
        check_mask(attention_mask, text)
        return self.vilt.read_alone(self.vilt.embeddings.mark_captions(text), attention_mask, has_image=False)[0]

    def prepare_images(self, pixel_values: Tensor | None = None, *, image_states: Tensor | None = None) -> Prepared:
        """The image side of scoring, once per image: `Prepared`.

        Args:
            pixel_values: (I, 3, image_size, image_size).
            image_states: instead, what `read_images` gave, (I, 1+P, D), or `read_keys_and_values`, (I, 1+P, 2D).
        """
        states = self.read_images(pixel_values) if image_states is None else image_states
        layer = self.vilt.encoder.layer[self.config.first_joint_layer]
        if not self.config.joins_last:
            return Prepared(states, *layer.project(states))
        are_read = states.shape[-1] == 2 * self.config.hidden_size
        both = states.chunk(2, dim=-1) if are_read else self._keys_and_values(states)
        key, value = (layer.attention.attention.split_heads(each).contiguous() for each in both)
        return Prepared(key=key, value=value)

    def read_keys_and_values(self, image_states: Tensor) -> Tensor:
        """Keys and values of the last block, where it alone is joint: all that scoring needs of an image.

        Args:
            image_states: (I, 1+P, D) that `read_images` gave.

        Returns:
            (I, 1+P, 2D), keys before values.

        Raises:
            ValueError: where another block reads captions and images together too.
        """
        if not self.config.joins_last:
            raise ValueError(
                f"A network whose last block alone reads captions and images together expected (first_joint_layer "
                f"{self.config.num_hidden_layers - 1}); that of this one is {self.config.first_joint_layer}."
            )
        return torch.cat(self._keys_and_values(image_states), dim=-1)

    def _keys_and_values(self, image_states):
        layer = self.vilt.encoder.layer[-1]
        normed, attention = layer.layernorm_before(image_states), layer.attention.attention
        return [attention.key(normed), attention.value(normed)]

    def prepare_captions(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *,
        text_states: Tensor | None = None,
    ) -> Prepared:  # fmt: skip
        """The caption side of scoring, once per caption: (C, L), with a mask where some are padded -> `Prepared`."""
        states = self._text_states(input_ids, attention_mask) if text_states is None else text_states
        layer = self.vilt.encoder.layer[self.config.first_joint_layer]
        if not self.config.joins_last:
            return Prepared(states, *layer.project(states), attention_mask)
        attention = layer.attention.attention
        query, key, value = layer.project(states, num_queries=1)
        heads = [attention.split_heads(x) for x in (query, key, value)]
        context, log_sum = attention.attend_in_part(*heads, attention_mask)  # (C, H, 1, D/H), (C, H, 1)
        return Prepared(states[:, 0], query[:, 0], context=context.flatten(1), log_sum=log_sum[..., 0])

    def score_prepared(self, captions: Prepared, images: Prepared) -> Tensor:
        """Matching scores of pairs whose halves were prepared; equal to the plain forward pass.

        Args:
            captions: `Prepared` of B captions, or of one to be read with each image.
            images: `Prepared` of B images, or of one to be read with each caption.

        Returns:
            (B,) scores.
        """
        if self.config.joins_last:
            places = (None, slice(None)) if len(images.key) == 1 else (slice(None), None)  # (1, B) or (B, 1)
            return self.score_groups(captions.take(places), images).flatten()
        num_pairs = max(len(captions.hidden), len(images.hidden))
        pairs = [
            torch.cat([text.expand(num_pairs, -1, -1), image.expand(num_pairs, -1, -1)], dim=1)
            for text, image in zip(captions[:4], images[:4], strict=True)
        ]  # hidden, query, key, value: each (B, S, D)
        attention_mask = captions.attention_mask
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (0, images.hidden.shape[1]), value=1)
            attention_mask = attention_mask.expand(num_pairs, -1)  # (B, S)
        blocks = range(self.config.first_joint_layer, self.config.num_hidden_layers)
        first, _, _ = self.vilt.encode(
            pairs[0], attention_mask, blocks=blocks, is_enhanced=True, projected=pairs[1:], num_queries=1
        )
        return self.rank_output(self.vilt.pooler(first))[:, 0]  # (B,)

    def score_groups(self, captions: Prepared, images: Prepared) -> Tensor:
        """Matching scores of each image with its own group of captions, where the last block alone is joint.

        Keys and values of an image are read once for its group and never copied.

        Args:
            captions: `Prepared` of (I, M) captions, or (1, M) for the same ones with each image.
            images: `Prepared` of I images.

        Returns:
            (I, M) scores.
        """
        layer = self.vilt.encoder.layer[-1]
        attention = layer.attention.attention
        query, own = (attention.split_heads(x) for x in (captions.query, captions.context))  # (I, H, M, D/H)
        context, log_sum = attention.attend_in_part(query, images.key, images.value)  # and (I, H, M)
        share = (captions.log_sum.transpose(1, 2) - log_sum).sigmoid()[..., None]  # of the caption's own tokens
        context = context + share.to(context.dtype) * (own - context)
        hidden = layer.finish(captions.hidden, context.transpose(1, 2).flatten(2))  # (I, M, D)
        first = self.vilt.layernorm(hidden).flatten(0, 1)[:, None]  # (I*M, 1, D)
        return self.rank_output(self.vilt.pooler(first)).view(hidden.shape[:2])


def check_mask(attention_mask, text):
    """Raise a ValueError for a mask of another shape than that of captions (C, L, D): some would be broadcast."""
    if attention_mask is not None and attention_mask.shape != text.shape[:2]:
        raise ValueError(
            f"attention_mask of shape {tuple(text.shape[:2])} expected, as the captions; got "
            f"{tuple(attention_mask.shape)}."
        )


def pair_groups(pair_images, pair_captions, num_images):
    """Rows of G images, or None for all, and (G, M) or (1, M) rows of captions -> rows of both (G*M,)."""
    if pair_images is None:
        pair_images = torch.arange(num_images, device=pair_captions.device)
    num_captions = pair_captions.shape[1]
    return pair_images.repeat_interleave(num_captions), pair_captions.expand(len(pair_images), -1).flatten()


IeftModel.register_for_auto_class("AutoModel")
IeftForImageTextRetrieval.register_for_auto_class("AutoModelForSequenceClassification")

__all__ = ["IeftForImageTextRetrieval", "IeftModel", "IeftPreTrainedModel", "IeftRetrievalOutput"]
