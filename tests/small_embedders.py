"""Small random CLIP and SigLIP networks, saved in the layouts in which transformers and open_clip publish theirs."""

import io
import json

import torch
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizer,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    SiglipProcessor,
)

SENTENCES = ["a red house beside a river .", "two grey ships in a harbour .", "many green fields ."] * 3
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": 32, "patch_size": 8}
OPEN_CLIP = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def make_distinct(model, seed):
    """Random weights with which inputs give clearly different embeddings, as those of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim and "norm" not in name and "ln_" not in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.2)
    return model.eval()


def save_clip(folder, seed=0):
    """A checkpoint of transformers like `flax-community/clip-rsicd-v2`."""
    tokenizer = CLIPTokenizer().train_new_from_iterator(SENTENCES, vocab_size=300)
    ids = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("bos", "eos", "pad")}
    text = TOWER | ids | {"vocab_size": len(tokenizer), "max_position_embeddings": 16}
    make_distinct(
        CLIPModel(CLIPConfig(text_config=text, vision_config=VISION, projection_dim=24)), seed
    ).save_pretrained(folder)
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def save_siglip(folder, seed=0):
    """A checkpoint of transformers like `lcybuaa/Git-RSCLIP`."""
    import sentencepiece
    from transformers import SiglipTokenizer

    folder.mkdir(exist_ok=True)
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=words,
        vocab_size=40,
        pad_id=-1,
        bos_id=-1,
        minloglevel=2,
        hard_vocab_limit=False,
    )
    (folder / "spiece.model").write_bytes(words.getvalue())
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_max_length=64, model_input_names=["input_ids"])
    text = TOWER | {"vocab_size": len(tokenizer), "max_position_embeddings": 64, "projection_size": 32}
    make_distinct(SiglipModel(SiglipConfig(text_config=text, vision_config=VISION)), seed).save_pretrained(folder)
    SiglipProcessor(SiglipImageProcessor(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return folder


def make_open_clip(seed=0):
    import open_clip

    return make_distinct(open_clip.CLIP(**OPEN_CLIP), seed)


def save_open_clip(folder, seed=0):
    """A folder like a repository of open_clip on the Hub."""
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    settings = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic", "resize_mode": "shortest"}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": OPEN_CLIP, "preprocess_cfg": settings}))
    weights = {name: weight.contiguous() for name, weight in make_open_clip(seed).state_dict().items()}
    save_file(weights, folder / "open_clip_model.safetensors")
    return folder


def save_raw(folder, seed=0):
    """A state dict as RemoteCLIP publishes its, of an architecture that open_clip is told of: the embedder's name."""
    import open_clip

    folder.mkdir(exist_ok=True)
    for name, changed in {"Tiny-8": {}, "Tiny-16": {"patch_size": 16}, "Tiny-8-48": {"image_size": 48}}.items():
        (folder / f"{name}.json").write_text(json.dumps(OPEN_CLIP | {"vision_cfg": OPEN_CLIP["vision_cfg"] | changed}))
        open_clip.add_model_config(folder / f"{name}.json")
    torch.save(make_open_clip(seed).state_dict(), folder / "RemoteCLIP-Tiny-8.pt")
    return f"Tiny-8:{folder / 'RemoteCLIP-Tiny-8.pt'}"
