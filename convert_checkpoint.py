"""Checkpoints of other makes as IEFT weights.

In: a state dict in the names of the published IEFT code, or of original ViLT. Out: the same tensors under this
project's names. It knows nothing of training or data.
"""

import re

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


def rename_published(state_dict):
    """Tensors under our names, and the names that have no place in IEFT.

    A joined `qkv` tensor becomes a query, a key and a value; a 1x1 convolution becomes a linear map.

    Returns:
        (dict of renamed tensors, list of source names without a counterpart)
    """
    renamed, left_over = {}, []
    for name, tensor in state_dict.items():
        ours = _our_name(name)
        if ours is None:
            left_over.append(name)
        elif ".qkv." in ours:
            for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
                renamed[ours.replace("qkv", part)] = rows
        else:
            renamed[ours] = tensor.flatten(1) if ".project_" in ours else tensor
    return renamed, left_over


def _our_name(name):
    for pattern, replacement in PUBLISHED_NAMES.items():
        ours, count = re.subn("^" + pattern, replacement, name)
        if count:
            return ours
    return None
